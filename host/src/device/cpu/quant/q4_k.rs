//! `d * scale * q - dmin * min`, 4 bits, scales of 32 elements.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Quant, Scales, UNIT};
use gguf::blocks::{F16, Q4K, scale_min_k4};

impl Quant for Q4K {
    const SUB: usize = 32;
    const MAX: u8 = 15;
    const OFFSET: f32 = 0.0;
    const INTERLEAVED: Option<Scales> = Some(Scales::K4);

    #[inline(always)]
    fn quants(&self, unit: usize) -> [u8; UNIT] {
        super::field(&self.qs[unit / 2 * 32..], unit % 2 * 4, 0x0f)
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let (d, dmin) = (f32_of(self.d), f32_of(self.dmin));
        for j in 0..8 {
            let (scale, min) = scale_min_k4(j, &self.scales);
            s[j] = d * f32::from(scale);
            m[j] = -dmin * f32::from(min);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, unit: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe { super::field_avx2(&self.qs[unit / 2 * 32..], unit % 2 * 4, 0x0f) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn units_avx512(&self, pair: usize) -> __m512i {
        // SAFETY: the caller's.
        unsafe {
            super::fields_avx512(&self.qs[pair * 32..], 0, 4, 0x0f)
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn scales_avx512(&self) -> (__m512, __m512) {
        // SAFETY: the caller's.
        unsafe { super::scales_k4_avx512(&self.scales, self.d, self.dmin) }
    }
}
