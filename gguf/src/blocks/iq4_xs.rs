use bytemuck::{Pod, Zeroable};
use gguf_codebooks::IQ4_VALUES;

use super::{Block, F16};
use crate::GgmlType;
use crate::quantize::{Table, inverse, scaled};

/// 256 elements of 4 bits in 8 sub-blocks of 32, each with a scale of 6 bits, unevenly spaced:
/// `(d * (scale - 32)) * value[q]`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Iq4Xs {
    /// The scale of the scales.
    pub d: F16,
    /// The high two bits of each scale, the first lowest.
    pub scales_h: [u8; 2],
    /// The low four bits of each scale, two a byte, the first in the low half.
    pub scales_l: [u8; 4],
    /// Sixteen bytes for each sub-block, as in [`super::Iq4Nl`].
    pub qs: [[u8; 16]; 8],
}

impl Iq4Xs {
    /// The scale of sub-block `j`, -32 to 31.
    #[inline(always)]
    pub fn scale(&self, j: usize) -> i8 {
        let low = super::nibble(&self.scales_l, j);
        let high = (u16::from_le_bytes(self.scales_h) >> (2 * j)) as u8 & 3;
        (low | high << 4) as i8 - 32
    }
}

impl Block for Iq4Xs {
    const TYPE: GgmlType = GgmlType::IQ4_XS;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        assert_eq!(out.len(), Self::LEN);
        let d = self.d.to_f32();
        for (j, out) in out.chunks_exact_mut(32).enumerate() {
            let d = d * f32::from(self.scale(j));
            super::fill_nibbles(out, &self.qs[j], |_, q| {
                d * f32::from(IQ4_VALUES[usize::from(q)])
            });
        }
    }

    fn quantize(values: &[f32]) -> Option<Iq4Xs> {
        let table = Table::new(IQ4_VALUES);
        let s = scaled::<8>(values, &table, [-32, 31]);
        let mut block = Iq4Xs {
            d: s.d,
            ..Zeroable::zeroed()
        };
        let mut high = 0u16;
        for (j, &scale) in s.scales.iter().enumerate() {
            let stored = (scale + 32) as u8;
            block.scales_l[j / 2] |= (stored & 15) << (j % 2 * 4);
            high |= u16::from(stored >> 4) << (2 * j);
            let inverse = inverse(s.d.to_f32() * scale as f32);
            let place = |i: usize| table.place(values[32 * j + i] * inverse) as u8;
            block.qs[j] = super::pack_nibbles(place);
        }
        block.scales_h = high.to_le_bytes();
        Some(block)
    }
}
