use bytemuck::{Pod, Zeroable};
use gguf_codebooks::{IQ2_MAGNITUDES, IQ2_S, bytes_of_pairs};

use super::{Block, F16};
use crate::GgmlType;

/// 256 elements in 32 runs of 8, each an entry of a grid of 1024 with eight signs; a scale of 4 bits for
/// each 16: `(d * (0.5 + scale) / 4) * ±magnitude`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Iq2S {
    /// The scale of the scales.
    pub d: F16,
    /// The low eight bits of each run's index into the grid.
    pub qs: [u8; 32],
    /// The signs of each run, the first element's lowest.
    pub signs: [u8; 32],
    /// The high two bits of the indices: four runs a byte, the first lowest.
    pub qh: [u8; 8],
    /// Of each 32 elements the first 16's scale in the low half, the last 16's in the high half.
    pub scales: [u8; 8],
}

impl Iq2S {
    /// The magnitudes of each entry of the grid.
    pub const GRID: [[u8; 8]; 1024] = bytes_of_pairs(&IQ2_S, IQ2_MAGNITUDES);

    /// The index of a run.
    #[inline(always)]
    pub fn index(&self, run: usize) -> usize {
        let high = self.qh[run / 4] >> (run % 4 * 2) & 3;
        usize::from(self.qs[run]) | usize::from(high) << 8
    }
}

impl Block for Iq2S {
    const TYPE: GgmlType = GgmlType::IQ2_S;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        static GRID: [[u8; 8]; 1024] = Iq2S::GRID;
        assert_eq!(out.len(), Self::LEN);
        let d = self.d.to_f32();
        for (run, out) in out.chunks_exact_mut(8).enumerate() {
            let d = d * (0.5 + f32::from(super::nibble(&self.scales, run / 2))) * 0.25;
            let (entry, signs) = (&GRID[self.index(run)], self.signs[run]);
            super::fill::<8>(out, |i| super::signed(d * f32::from(entry[i]), signs, i));
        }
    }
}
