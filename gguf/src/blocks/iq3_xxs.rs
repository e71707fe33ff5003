use bytemuck::{Pod, Zeroable};
use gguf_codebooks::{IQ3_XXS, IQ3_XXS_MAGNITUDES, bytes_of_nibbles, even_signs};

use super::{Block, F16};
use crate::GgmlType;

/// 256 elements in 64 runs of 4, each an entry of a grid of 256, seven stored signs for two runs; a scale
/// of 4 bits for each 32: `(d * (0.5 + scale) / 2) * ±magnitude`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Iq3Xxs {
    /// The scale of the scales.
    pub d: F16,
    /// The index of each run into the grid.
    pub qs: [u8; 64],
    /// For each 32 elements a word with seven signs of each 8 from the lowest bit on, and the scale in its
    /// top four bits.
    pub words: [[u8; 4]; 8],
}

impl Iq3Xxs {
    /// The magnitudes of each entry of the grid.
    pub const GRID: [[u8; 4]; 256] = bytes_of_nibbles(&IQ3_XXS, IQ3_XXS_MAGNITUDES);

    /// The word of signs and scale of 32 elements.
    #[inline(always)]
    pub fn signs_and_scale(&self, group: usize) -> u32 {
        u32::from_le_bytes(self.words[group])
    }
}

impl Block for Iq3Xxs {
    const TYPE: GgmlType = GgmlType::IQ3_XXS;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        static GRID: [[u8; 4]; 256] = Iq3Xxs::GRID;
        assert_eq!(out.len(), Self::LEN);
        let d = self.d.to_f32();
        for (eight, out) in out.chunks_exact_mut(8).enumerate() {
            let word = self.signs_and_scale(eight / 4);
            let d = d * (0.5 + (word >> 28) as f32) * 0.5;
            let signs = even_signs((word >> (eight % 4 * 7)) as u8 & 127);
            super::fill::<8>(out, |i| {
                let entry = &GRID[usize::from(self.qs[2 * eight + i / 4])];
                super::signed(d * f32::from(entry[i % 4]), signs, i)
            });
        }
    }
}
