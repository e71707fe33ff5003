//! `d * (0.5 + scale) / 2 * ±magnitude`, magnitudes from a grid, scales of 32 elements.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::grid::{Signed, even_signs, half_words};
use super::{Quant, UNIT};
use gguf::blocks::{F16, Iq3Xxs};

static GRID: [u32; 256] = half_words(&Iq3Xxs::GRID);

#[inline(always)]
fn unit(block: &Iq3Xxs, unit: usize) -> Signed {
    let indices = &block.qs[8 * unit..8 * unit + 8];
    let entry = |run: usize| u64::from(GRID[usize::from(indices[run])]);
    Signed {
        magnitudes: std::array::from_fn(|i| entry(2 * i) | entry(2 * i + 1) << 32),
        signs: even_signs(block.signs_and_scale(unit)),
    }
}

impl Quant for Iq3Xxs {
    const SUB: usize = 32;
    const MAX: u8 = 64 + 62;
    const OFFSET: f32 = 64.0;

    #[inline(always)]
    fn quants(&self, at: usize) -> [u8; UNIT] {
        unit(self, at).quants(64)
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = 0.5 * f32_of(self.d);
        for j in 0..8 {
            s[j] = d * (0.5 + (self.signs_and_scale(j) >> 28) as f32);
            m[j] = -64.0 * s[j];
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, at: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe { unit(self, at).quants_avx2(64) }
    }
}
