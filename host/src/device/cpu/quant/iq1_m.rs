//! As [`super::iq1_s`], with scales of 16 elements and shifts of 8.

use super::grid::{Grid, Signed};
use super::iq1_s::shifted;
use gguf::blocks::{F16, Iq1M};

impl Grid for Iq1M {
    const SUB: usize = 16;
    const MAX: u8 = 25;
    const OFFSET: f32 = 16.0;

    #[inline(always)]
    fn unit(&self, unit: usize) -> Signed {
        shifted(|run| self.run(4 * unit + run))
    }

    #[inline(always)]
    fn d(&self) -> F16 {
        Iq1M::d(self)
    }

    #[inline(always)]
    fn scale(&self, j: usize) -> f32 {
        0.125 * f32::from(Iq1M::scale(self, j))
    }
}
