//! `d * (q - 1)`, 2 bits, one scale.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Quant, UNIT};
use gguf::blocks::{F16, Tq2_0};

impl Quant for Tq2_0 {
    const SUB: usize = 32;
    const MAX: u8 = 3;
    const OFFSET: f32 = 1.0;

    #[inline(always)]
    fn quants(&self, unit: usize) -> [u8; UNIT] {
        super::field(&self.qs[unit / 4 * 32..], unit % 4 * 2, 3)
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = f32_of(self.d);
        s[..8].fill(d);
        m[..8].fill(-d);
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, unit: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe { super::field_avx2(&self.qs[unit / 4 * 32..], unit % 4 * 2, 3) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn units_avx512(&self, pair: usize) -> __m512i {
        let (run, first) = (pair / 2, 4 * (pair % 2) as i16);
        // SAFETY: the caller's.
        unsafe { super::fields_avx512(&self.qs[run * 32..], first, first + 2, 3) }
    }
}
