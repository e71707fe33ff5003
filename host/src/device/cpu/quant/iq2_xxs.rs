//! `d * (0.5 + scale) / 4 * ±magnitude`, magnitudes from a grid, scales of 32 elements.

use super::grid::{Grid, Signed, even_signs, words};
use gguf::blocks::{F16, Iq2Xxs};

static GRID: [u64; 256] = words(&Iq2Xxs::GRID);

impl Grid for Iq2Xxs {
    const SUB: usize = 32;
    const MAX: u8 = 64 + 43;
    const OFFSET: f32 = 64.0;

    #[inline(always)]
    fn unit(&self, unit: usize) -> Signed {
        let indices = &self.groups[unit];
        Signed {
            magnitudes: std::array::from_fn(|run| GRID[usize::from(indices[run])]),
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
        0.25 * (0.5 + (self.signs_and_scale(j) >> 28) as f32)
    }
}
