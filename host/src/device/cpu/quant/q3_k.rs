//! `d * scale * (q - 4)`, 3 bits, scales of 16 elements.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Quant, UNIT};
use gguf::blocks::{F16, Q3K};

impl Quant for Q3K {
    const SUB: usize = 16;
    const MAX: u8 = 7;
    const OFFSET: f32 = 4.0;

    #[inline(always)]
    fn quants(&self, unit: usize) -> [u8; UNIT] {
        let low = super::field(&self.qs[unit / 4 * 32..], unit % 4 * 2, 3);
        let high = super::field(&self.hmask, unit, 1);
        std::array::from_fn(|i| low[i] | (high[i] << 2))
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = f32_of(self.d);
        for j in 0..16 {
            s[j] = d * f32::from(self.scale(j));
            m[j] = -4.0 * s[j];
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, unit: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe {
            let low = super::field_avx2(&self.qs[unit / 4 * 32..], unit % 4 * 2, 3);
            super::join_avx2(low, super::field_avx2(&self.hmask, unit, 1), 2)
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn units_avx512(&self, pair: usize) -> __m512i {
        let (run, first) = (pair / 2, 4 * (pair % 2) as i16);
        // SAFETY: the caller's.
        unsafe {
            let low = super::fields_avx512(&self.qs[run * 32..], first, first + 2, 3);
            let (first, second) = (2 * pair as i16, 2 * pair as i16 + 1);
            let high = super::fields_avx512(&self.hmask, first, second, 1);
            _mm512_or_si512(low, _mm512_slli_epi16::<2>(high))
        }
    }
}
