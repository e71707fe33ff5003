//! `d * (1 + 2 * scale) * ±magnitude`, magnitudes from a grid, scales of 32 elements.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::grid::{Signed, half_words};
use super::{Quant, UNIT};
use gguf::blocks::{F16, Iq3S};

static GRID: [u32; 512] = half_words(&Iq3S::GRID);

#[inline(always)]
fn unit(block: &Iq3S, unit: usize) -> Signed {
    let entry = |run: usize| u64::from(GRID[block.index(8 * unit + run)]);
    let signs = &block.signs[4 * unit..4 * unit + 4];
    Signed {
        magnitudes: std::array::from_fn(|i| entry(2 * i) | entry(2 * i + 1) << 32),
        signs: u32::from_le_bytes([signs[0], signs[1], signs[2], signs[3]]),
    }
}

impl Quant for Iq3S {
    const SUB: usize = 32;
    const MAX: u8 = 16 + 15;
    const OFFSET: f32 = 16.0;

    #[inline(always)]
    fn quants(&self, at: usize) -> [u8; UNIT] {
        unit(self, at).quants(16)
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = f32_of(self.d);
        for j in 0..8 {
            s[j] = d * f32::from(1 + 2 * super::nibble(&self.scales, j));
            m[j] = -16.0 * s[j];
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, at: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe { unit(self, at).quants_avx2(16) }
    }
}
