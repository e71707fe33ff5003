//! `d * value[q]`, `d` a power of two, 4 bits, looked up: here `d * (q - 16)` with `q = 16 + value`.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::grid::{look_up, raised};
use super::{Quant, UNIT};
use gguf::blocks::{F16, Mxfp4};
use gguf_codebooks::{MXFP4_VALUES, mxfp4_scale};

const VALUES: [u8; 16] = raised(MXFP4_VALUES, 16);

impl Quant for Mxfp4 {
    const SUB: usize = 32;
    const MAX: u8 = 28;
    const OFFSET: f32 = 16.0;

    #[inline(always)]
    fn quants(&self, _unit: usize) -> [u8; UNIT] {
        look_up(&self.qs, &VALUES)
    }

    #[inline(always)]
    fn scales(&self, _f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = mxfp4_scale(self.e);
        s[0] = d;
        m[0] = -16.0 * d;
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, _unit: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe { super::grid::look_up_avx2(&self.qs, &VALUES) }
    }
}
