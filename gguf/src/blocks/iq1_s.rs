use bytemuck::{Pod, Zeroable};
use gguf_codebooks::{IQ1, IQ1_DELTA, bytes_of_pairs};

use super::{Block, F16};
use crate::GgmlType;

/// 256 elements in 32 runs of 8, each an entry of a grid of 2048; a scale of 3 bits and the sign of a shift
/// for each 32: `(d * (2 * scale + 1)) * (q - 1 ± 0.125)`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Iq1S {
    /// The scale of the scales.
    pub d: F16,
    /// The low eight bits of each run's index into the grid.
    pub qs: [u8; 32],
    /// For each 32 elements: the high three bits of four indices, from the lowest on, the scale, the sign.
    pub qh: [[u8; 2]; 8],
}

impl Iq1S {
    /// One more than the values of each entry of the grid.
    pub const GRID: [[u8; 8]; 2048] = bytes_of_pairs(&IQ1, [0, 1, 2]);

    /// What [`Iq1S::qh`] says of 32 elements.
    #[inline(always)]
    pub fn high(&self, group: usize) -> u16 {
        u16::from_le_bytes(self.qh[group])
    }

    /// The index of a run.
    #[inline(always)]
    pub fn index(&self, run: usize) -> usize {
        let high = self.high(run / 4) >> (run % 4 * 3) & 7;
        usize::from(self.qs[run]) | usize::from(high) << 8
    }
}

/// [`Iq1S::GRID`] where it can be looked up, for [`super::Iq1M`] too.
pub(super) static GRID: [[u8; 8]; 2048] = Iq1S::GRID;

impl Block for Iq1S {
    const TYPE: GgmlType = GgmlType::IQ1_S;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        assert_eq!(out.len(), Self::LEN);
        let d = self.d.to_f32();
        for (run, out) in out.chunks_exact_mut(8).enumerate() {
            let high = self.high(run / 4);
            let d = d * f32::from(2 * (high >> 12 & 7) + 1);
            let delta = if high >> 15 == 0 {
                IQ1_DELTA
            } else {
                -IQ1_DELTA
            };
            let entry = &GRID[self.index(run)];
            super::fill::<8>(out, |i| d * (f32::from(entry[i]) - 1.0 + delta));
        }
    }
}
