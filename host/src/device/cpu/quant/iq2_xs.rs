//! `d * (0.5 + scale) / 4 * ±magnitude`, magnitudes from a grid, scales of 16 elements.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::grid::{Signed, words};
use super::{Quant, UNIT};
use gguf::blocks::{F16, Iq2Xs};

static GRID: [u64; 512] = words(&Iq2Xs::GRID);

#[inline(always)]
fn unit(block: &Iq2Xs, unit: usize) -> Signed {
    let runs: [(usize, u8); 4] = std::array::from_fn(|run| block.run(4 * unit + run));
    Signed {
        magnitudes: runs.map(|(index, _)| GRID[index]),
        signs: u32::from_le_bytes(runs.map(|(_, signs)| signs)),
    }
}

impl Quant for Iq2Xs {
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
