use bytemuck::{Pod, Zeroable};
use gguf_codebooks::{IQ3_S, IQ3_S_MAGNITUDES, bytes_of_nibbles};

use super::{Block, F16};
use crate::GgmlType;

/// 256 elements in 64 runs of 4, each an entry of a grid of 512 with its signs; a scale of 4 bits for each
/// 32: `(d * (1 + 2 * scale)) * ±magnitude`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Iq3S {
    /// The scale of the scales.
    pub d: F16,
    /// The low eight bits of each run's index into the grid.
    pub qs: [u8; 64],
    /// The ninth bits: eight runs a byte, the first lowest.
    pub qh: [u8; 8],
    /// The signs of each 8 elements, the first's lowest.
    pub signs: [u8; 32],
    /// Of each 64 elements the first 32's scale in the low half, the last 32's in the high half.
    pub scales: [u8; 4],
}

impl Iq3S {
    /// The magnitudes of each entry of the grid.
    pub const GRID: [[u8; 4]; 512] = bytes_of_nibbles(&IQ3_S, IQ3_S_MAGNITUDES);

    /// The index of a run.
    #[inline(always)]
    pub fn index(&self, run: usize) -> usize {
        let high = self.qh[run / 8] >> (run % 8) & 1;
        usize::from(self.qs[run]) | usize::from(high) << 8
    }
}

impl Block for Iq3S {
    const TYPE: GgmlType = GgmlType::IQ3_S;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        static GRID: [[u8; 4]; 512] = Iq3S::GRID;
        assert_eq!(out.len(), Self::LEN);
        let d = self.d.to_f32();
        for (eight, out) in out.chunks_exact_mut(8).enumerate() {
            let d = d * f32::from(1 + 2 * super::nibble(&self.scales, eight / 4));
            super::fill::<8>(out, |i| {
                let entry = &GRID[self.index(2 * eight + i / 4)];
                super::signed(d * f32::from(entry[i % 4]), self.signs[eight], i)
            });
        }
    }
}
