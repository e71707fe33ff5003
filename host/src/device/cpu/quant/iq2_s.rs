//! `d * (0.5 + scale) / 4 * ±magnitude`, magnitudes from a grid, scales of 16 elements.

use super::grid::{Grid, Signed, words};
use gguf::blocks::{F16, Iq2S, nibble};

static GRID: [u64; 1024] = words(&Iq2S::GRID);

impl Grid for Iq2S {
    const SUB: usize = 16;
    const MAX: u8 = 64 + 43;
    const OFFSET: f32 = 64.0;

    #[inline(always)]
    fn unit(&self, unit: usize) -> Signed {
        let signs = &self.signs[4 * unit..4 * unit + 4];
        Signed {
            magnitudes: std::array::from_fn(|run| GRID[self.index(4 * unit + run)]),
            signs: u32::from_le_bytes([signs[0], signs[1], signs[2], signs[3]]),
            offset: 64,
        }
    }

    #[inline(always)]
    fn d(&self) -> F16 {
        self.d
    }

    #[inline(always)]
    fn scale(&self, j: usize) -> f32 {
        0.25 * (0.5 + f32::from(nibble(&self.scales, j)))
    }
}
