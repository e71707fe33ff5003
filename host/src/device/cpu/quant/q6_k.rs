//! `d * scale * (q - 32)`, 6 bits, scales of 16 elements.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Quant, Scales, UNIT};
use gguf::blocks::{F16, Q6K};

impl Quant for Q6K {
    const SUB: usize = 16;
    const MAX: u8 = 63;
    const OFFSET: f32 = 32.0;
    const INTERLEAVED: Option<Scales> = Some(Scales::Bytes);

    #[inline(always)]
    fn quants(&self, unit: usize) -> [u8; UNIT] {
        let (run, at) = (unit / 4, unit % 4);
        let low = super::field(&self.ql[run * 64 + at % 2 * 32..], at / 2 * 4, 0x0f);
        let high = super::field(&self.qh[run * 32..], at * 2, 3);
        std::array::from_fn(|i| low[i] | (high[i] << 4))
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = f32_of(self.d);
        for j in 0..16 {
            s[j] = d * f32::from(self.scales[j]);
            m[j] = -32.0 * s[j];
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, unit: usize) -> __m256i {
        let (run, at) = (unit / 4, unit % 4);
        // SAFETY: the caller's.
        unsafe {
            let low = super::field_avx2(&self.ql[run * 64 + at % 2 * 32..], at / 2 * 4, 0x0f);
            super::join_avx2(low, super::field_avx2(&self.qh[run * 32..], at * 2, 3), 4)
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn units_avx512(&self, pair: usize) -> __m512i {
        let (run, at) = (pair / 2, pair % 2);
        // SAFETY: 64 bytes are there; the rest is the caller's promise.
        unsafe {
            let low = _mm512_loadu_si512(self.ql[run * 64..run * 64 + 64].as_ptr().cast());
            let low = if at == 0 { low } else { _mm512_srli_epi16::<4>(low) };
            let low = _mm512_and_si512(low, _mm512_set1_epi8(0x0f));
            let first = 4 * at as i16;
            let high = super::fields_avx512(&self.qh[run * 32..], first, first + 2, 3);
            _mm512_or_si512(low, _mm512_slli_epi16::<4>(high))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn scales_avx512(&self) -> (__m512, __m512) {
        // SAFETY: 16 bytes are there; the rest is the caller's promise.
        unsafe {
            let scales = _mm512_cvtepi8_epi32(_mm_loadu_si128(self.scales.as_ptr().cast()));
            let d = _mm512_set1_ps(super::dot::half_f16c(self.d));
            let s = _mm512_mul_ps(_mm512_cvtepi32_ps(scales), d);
            (s, _mm512_mul_ps(s, _mm512_set1_ps(-32.0)))
        }
    }
}
