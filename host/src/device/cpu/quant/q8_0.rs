//! `d * q`, 8 bits, signed: 128 is added to make it unsigned.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Quant, Scales, UNIT};
use gguf::blocks::{F16, Q8_0};

impl Quant for Q8_0 {
    const SUB: usize = 32;
    const MAX: u8 = 255;
    const OFFSET: f32 = 128.0;
    const INTERLEAVED: Option<Scales> = Some(Scales::Halves);

    #[inline(always)]
    fn quants(&self, _unit: usize) -> [u8; UNIT] {
        self.qs.map(|q| (q as u8) ^ 0x80)
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = f32_of(self.d);
        s[0] = d;
        m[0] = -128.0 * d;
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, _unit: usize) -> __m256i {
        // SAFETY: 32 bytes are there; AVX2 is the caller's promise.
        unsafe {
            let signed = _mm256_loadu_si256(self.qs.as_ptr().cast());
            _mm256_xor_si256(signed, _mm256_set1_epi8(-128))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn pair_avx512<const N: usize>(blocks: *const Self) -> (__m512i, __m512, __m512) {
        // SAFETY: the caller's.
        unsafe {
            let bytes = super::pair_bytes_avx512::<Self, N>(blocks);
            let s = super::pair_halves_avx512::<Self>(bytes, 0);
            let first = _mm256_loadu_si256((*blocks).qs.as_ptr().cast());
            let q = if N == 1 {
                // What the second half holds is multiplied by a scale of 0.
                _mm512_zextsi256_si512(first)
            } else {
                super::join_512(first, _mm256_loadu_si256((*blocks.add(1)).qs.as_ptr().cast()))
            };
            (_mm512_xor_si512(q, _mm512_set1_epi8(-128)), s, _mm512_setzero_ps())
        }
    }
}
