//! `d * (0.5 + scale) / 2 * ±magnitude`, magnitudes from a grid, scales of 32 elements.

use super::grid::{Grid, Signed, even_signs, half_words, two_halves};
use gguf::blocks::{F16, Iq3Xxs};

static GRID: [u32; 256] = half_words(&Iq3Xxs::GRID);

impl Grid for Iq3Xxs {
    const SUB: usize = 32;
    const MAX: u8 = 64 + 62;
    const OFFSET: f32 = 64.0;

    #[inline(always)]
    fn unit(&self, unit: usize) -> Signed {
        let indices = &self.qs[8 * unit..8 * unit + 8];
        Signed {
            magnitudes: two_halves(|run| GRID[usize::from(indices[run])]),
            signs: even_signs(self.signs_and_scale(unit)),
            offset: 64,
        }
    }

    #[inline(always)]
    fn d(&self) -> F16 {
        self.d
    }

    #[inline(always)]
    fn scale(&self, j: usize) -> f32 {
        0.5 * (0.5 + (self.signs_and_scale(j) >> 28) as f32)
    }
}
