use bytemuck::{Pod, Zeroable};
use gguf_codebooks::IQ1_DELTA;

use super::{Block, F16};
use crate::GgmlType;

/// As [`super::Iq1S`], with the sign of a shift for each 8 elements, a scale for each 16, and the scale of
/// the scales in what these leave of their words.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Iq1M {
    /// The low eight bits of each run's index into the grid of [`super::Iq1S`].
    pub qs: [u8; 32],
    /// Of each run the high three bits of the index and the sign: two runs a byte, the first in the low
    /// half.
    pub qh: [u8; 16],
    /// Four scales of 3 bits a word, the first lowest; in the words' top four bits the half that is their
    /// scale, lowest bits first.
    pub scales: [[u8; 2]; 4],
}

impl Iq1M {
    #[inline(always)]
    fn word(&self, i: usize) -> u16 {
        u16::from_le_bytes(self.scales[i])
    }

    /// The scale of the scales.
    #[inline(always)]
    pub fn d(&self) -> F16 {
        let top = |i: usize| (self.word(i) >> 12) << (4 * i);
        F16::from_bits(top(0) | top(1) | top(2) | top(3))
    }

    /// The scale of sub-block `j` of 16 elements, 1 to 15.
    #[inline(always)]
    pub fn scale(&self, j: usize) -> u8 {
        2 * (self.word(j / 4) >> (j % 4 * 3) & 7) as u8 + 1
    }

    /// The index of a run, and whether its shift is negative.
    #[inline(always)]
    pub fn run(&self, run: usize) -> (usize, bool) {
        let high = self.qh[run / 2] >> (run % 2 * 4);
        let index = usize::from(self.qs[run]) | usize::from(high & 7) << 8;
        (index, high & 8 != 0)
    }
}

impl Block for Iq1M {
    const TYPE: GgmlType = GgmlType::IQ1_M;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        assert_eq!(out.len(), Self::LEN);
        let d = self.d().to_f32();
        for (run, out) in out.chunks_exact_mut(8).enumerate() {
            let d = d * f32::from(self.scale(run / 2));
            let (index, negative) = self.run(run);
            let delta = if negative { -IQ1_DELTA } else { IQ1_DELTA };
            let entry = &super::iq1_s::GRID[index];
            super::fill::<8>(out, |i| d * (f32::from(entry[i]) - 1.0 + delta));
        }
    }
}
