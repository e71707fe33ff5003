use bytemuck::{Pod, Zeroable};
use gguf_codebooks::{IQ2_MAGNITUDES, IQ2_XXS, bytes_of_pairs, even_signs};

use super::{Block, F16};
use crate::GgmlType;

/// 256 elements in 32 runs of 8, each an entry of a grid of 256 with seven stored signs; a scale of 4
/// bits for each 32: `(d * (0.5 + scale) / 4) * ±magnitude`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Iq2Xxs {
    /// The scale of the scales.
    pub d: F16,
    /// For each 32 elements: four indices into the grid; then a word with seven signs of each run from
    /// the lowest bit on, and the scale in its top four bits.
    pub groups: [[u8; 8]; 8],
}

impl Iq2Xxs {
    /// The magnitudes of each entry of the grid.
    pub const GRID: [[u8; 8]; 256] = bytes_of_pairs(&IQ2_XXS, IQ2_MAGNITUDES);

    /// The word of signs and scale of 32 elements.
    #[inline(always)]
    pub fn signs_and_scale(&self, group: usize) -> u32 {
        let [.., a, b, c, d] = self.groups[group];
        u32::from_le_bytes([a, b, c, d])
    }
}

impl Block for Iq2Xxs {
    const TYPE: GgmlType = GgmlType::IQ2_XXS;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        static GRID: [[u8; 8]; 256] = Iq2Xxs::GRID;
        assert_eq!(out.len(), Self::LEN);
        let d = self.d.to_f32();
        for (group, out) in out.chunks_exact_mut(32).enumerate() {
            let word = self.signs_and_scale(group);
            let d = d * (0.5 + (word >> 28) as f32) * 0.25;
            for (run, out) in out.chunks_exact_mut(8).enumerate() {
                let signs = even_signs((word >> (7 * run)) as u8 & 127);
                let entry = &GRID[usize::from(self.groups[group][run])];
                super::fill::<8>(out, |i| super::signed(d * f32::from(entry[i]), signs, i));
            }
        }
    }
}
