//! `d * (0.5 + scale) / 4 * ±magnitude`, magnitudes from a grid, scales of 16 elements.

use super::grid::{Grid, Signed, words};
use gguf::blocks::{F16, Iq2Xs, nibble};

static GRID: [u64; 512] = words(&Iq2Xs::GRID);

impl Grid for Iq2Xs {
    const SUB: usize = 16;
    const MAX: u8 = 64 + 43;
    const OFFSET: f32 = 64.0;

    #[inline(always)]
    fn unit(&self, unit: usize) -> Signed {
        let runs: [(usize, u8); 4] = std::array::from_fn(|run| self.run(4 * unit + run));
        Signed {
            magnitudes: runs.map(|(index, _)| GRID[index]),
            signs: u32::from_le_bytes(runs.map(|(_, signs)| signs)),
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
