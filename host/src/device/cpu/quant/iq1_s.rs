//! `d * scale * (v ± 1/8)` with `v` of -1, 0 and 1 from a grid, scales of 32 elements: here
//! `d * scale / 8 * (q - 16)` with `q = 16 + 8 v ± 1`.

use super::grid::{Grid, Signed, words};
use gguf::blocks::{F16, Iq1S};
use gguf_codebooks::{IQ1, bytes_of_pairs};

/// `8 v + 16`.
static GRID: [u64; 2048] = words(&bytes_of_pairs(&IQ1, [8, 16, 24]));

/// Four runs, each with an index into the grid and whether its shift is negative.
#[inline(always)]
pub(super) fn shifted(run: impl Fn(usize) -> (usize, bool)) -> Signed {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let word = |i: usize| {
        let (index, negative) = run(i);
        // No byte leaves its bounds.
        let shift = if negative { ONES.wrapping_neg() } else { ONES };
        GRID[index].wrapping_add(shift)
    };
    Signed {
        magnitudes: std::array::from_fn(word),
        signs: 0,
        offset: 0,
    }
}

impl Grid for Iq1S {
    const SUB: usize = 32;
    const MAX: u8 = 25;
    const OFFSET: f32 = 16.0;

    #[inline(always)]
    fn unit(&self, unit: usize) -> Signed {
        let negative = self.high(unit) >> 15 != 0;
        shifted(|run| (self.index(4 * unit + run), negative))
    }

    #[inline(always)]
    fn d(&self) -> F16 {
        self.d
    }

    #[inline(always)]
    fn scale(&self, j: usize) -> f32 {
        0.125 * f32::from(2 * ((self.high(j) >> 12) & 7) + 1)
    }
}
