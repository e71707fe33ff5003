use bytemuck::{Pod, Zeroable};

use super::{Block, F16};
use crate::GgmlType;
use crate::quantize::{Even, half, inverse, round, scale};

/// 32 elements of 5 bits with one scale: `d * (q - 16)`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Q5_0 {
    /// The scale.
    pub d: F16,
    /// The fifth bits: of element `i` bit `i` of the little-endian u32.
    pub qh: [u8; 4],
    /// The low four bits: element `i` in the low half of byte `i`, `i + 16` in the high half.
    pub qs: [u8; 16],
}

impl Block for Q5_0 {
    const TYPE: GgmlType = GgmlType::Q5_0;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let qh = u32::from_le_bytes(self.qh);
        super::fill_nibbles(out, &self.qs, |i, low| {
            let high = ((qh >> i) & 1) as u8;
            f32::from((low | (high << 4)) as i8 - 16) * d
        });
    }

    fn quantize(values: &[f32]) -> Option<Q5_0> {
        let d = half(scale(values, &Even(-16, 15)));
        let inverse = inverse(d.to_f32());
        let q = |i: usize| (round(values[i] * inverse, -16, 15) + 16) as u8;
        Some(Q5_0 {
            d,
            qh: super::pack_fifth_bits(q),
            qs: super::pack_nibbles(q),
        })
    }
}
