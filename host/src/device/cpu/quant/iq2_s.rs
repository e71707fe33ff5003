//! `d * (0.5 + scale) / 4 * ±magnitude`, magnitudes from a grid, scales of 16 elements.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::grid::{Signed, words};
use super::{Quant, UNIT};
use gguf::blocks::{F16, Iq2S};

static GRID: [u64; 1024] = words(&Iq2S::GRID);

#[inline(always)]
fn unit(block: &Iq2S, unit: usize) -> Signed {
    let signs = &block.signs[4 * unit..4 * unit + 4];
    Signed {
        magnitudes: std::array::from_fn(|run| GRID[block.index(4 * unit + run)]),
        signs: u32::from_le_bytes([signs[0], signs[1], signs[2], signs[3]]),
    }
}

impl Quant for Iq2S {
    const SUB: usize = 16;
    const MAX: u8 = 64 + 43;
    const OFFSET: f32 = 64.0;

    #[inline(always)]
    fn quants(&self, at: usize) -> [u8; UNIT] {
        unit(self, at).quants(64)
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = 0.25 * f32_of(self.d);
        for j in 0..16 {
            s[j] = d * (0.5 + f32::from(super::nibble(&self.scales, j)));
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
