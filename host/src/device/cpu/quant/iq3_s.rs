//! `d * (1 + 2 * scale) * ±magnitude`, magnitudes from a grid, scales of 32 elements.

use super::grid::{Grid, Signed, half_words, two_halves};
use gguf::blocks::{F16, Iq3S, nibble};

static GRID: [u32; 512] = half_words(&Iq3S::GRID);

impl Grid for Iq3S {
    const SUB: usize = 32;
    const MAX: u8 = 16 + 15;
    const OFFSET: f32 = 16.0;

    #[inline(always)]
    fn unit(&self, unit: usize) -> Signed {
        let signs = &self.signs[4 * unit..4 * unit + 4];
        Signed {
            magnitudes: two_halves(|run| GRID[self.index(8 * unit + run)]),
            signs: u32::from_le_bytes([signs[0], signs[1], signs[2], signs[3]]),
            offset: 16,
        }
    }

    #[inline(always)]
    fn d(&self) -> F16 {
        self.d
    }

    #[inline(always)]
    fn scale(&self, j: usize) -> f32 {
        f32::from(1 + 2 * nibble(&self.scales, j))
    }
}
