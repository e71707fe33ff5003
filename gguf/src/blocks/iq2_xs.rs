use bytemuck::{Pod, Zeroable};
use gguf_codebooks::{IQ2_MAGNITUDES, IQ2_XS, bytes_of_pairs, even_signs};

use super::{Block, F16};
use crate::GgmlType;

/// 256 elements in 32 runs of 8, each an entry of a grid of 512 with seven stored signs; a scale of 4
/// bits for each 16: `(d * (0.5 + scale) / 4) * ±magnitude`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Iq2Xs {
    /// The scale of the scales.
    pub d: F16,
    /// Of each run the index into the grid in the low nine bits, and seven signs.
    pub qs: [[u8; 2]; 32],
    /// Of each 32 elements the first 16's scale in the low half, the last 16's in the high half.
    pub scales: [u8; 8],
}

impl Iq2Xs {
    /// The magnitudes of each entry of the grid.
    pub const GRID: [[u8; 8]; 512] = bytes_of_pairs(&IQ2_XS, IQ2_MAGNITUDES);

    /// The index of a run, and all its signs.
    #[inline(always)]
    pub fn run(&self, run: usize) -> (usize, u8) {
        let word = u16::from_le_bytes(self.qs[run]);
        (usize::from(word & 511), even_signs((word >> 9) as u8))
    }
}

impl Block for Iq2Xs {
    const TYPE: GgmlType = GgmlType::IQ2_XS;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        static GRID: [[u8; 8]; 512] = Iq2Xs::GRID;
        assert_eq!(out.len(), Self::LEN);
        let d = self.d.to_f32();
        for (run, out) in out.chunks_exact_mut(8).enumerate() {
            let d = d * (0.5 + f32::from(super::nibble(&self.scales, run / 2))) * 0.25;
            let (index, signs) = self.run(run);
            let entry = &GRID[index];
            super::fill::<8>(out, |i| super::signed(d * f32::from(entry[i]), signs, i));
        }
    }
}
