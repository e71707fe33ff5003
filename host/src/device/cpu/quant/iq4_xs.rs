//! `d * scale * value[q]`, 4 bits, looked up, scales of 32 elements; values as in [`super::iq4_nl`].

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::grid::look_up;
use super::iq4_nl::VALUES;
use super::{Quant, UNIT};
use gguf::blocks::{F16, Iq4Xs};

impl Quant for Iq4Xs {
    const SUB: usize = 32;
    const MAX: u8 = 255;
    const OFFSET: f32 = 128.0;

    #[inline(always)]
    fn quants(&self, unit: usize) -> [u8; UNIT] {
        look_up(&self.qs[unit], &VALUES)
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = f32_of(self.d);
        for j in 0..8 {
            s[j] = d * f32::from(self.scale(j));
            m[j] = -128.0 * s[j];
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, unit: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe { super::grid::look_up_avx2(&self.qs[unit], &VALUES) }
    }
}
