use bytemuck::{Pod, Zeroable};

use super::{Block, F16};
use crate::GgmlType;
use crate::quantize::{half, inverse, round, scale_and_offset};

/// 32 elements of 5 bits with a scale and a minimum: `d * q + m`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Q5_1 {
    /// The scale.
    pub d: F16,
    /// The minimum, added.
    pub m: F16,
    /// The fifth bits: of element `i` bit `i` of the little-endian u32.
    pub qh: [u8; 4],
    /// The low four bits: element `i` in the low half of byte `i`, `i + 16` in the high half.
    pub qs: [u8; 16],
}

impl Block for Q5_1 {
    const TYPE: GgmlType = GgmlType::Q5_1;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        let qh = u32::from_le_bytes(self.qh);
        super::fill_nibbles(out, &self.qs, |i, low| {
            let high = ((qh >> i) & 1) as u8;
            f32::from(low | (high << 4)) * d + m
        });
    }

    fn quantize(values: &[f32]) -> Option<Q5_1> {
        let (d, m) = scale_and_offset(values, 31, false);
        let (d, m) = (half(d), half(m));
        let (inverse, low) = (inverse(d.to_f32()), m.to_f32());
        let q = |i: usize| round((values[i] - low) * inverse, 0, 31) as u8;
        Some(Q5_1 {
            d,
            m,
            qh: super::pack_fifth_bits(q),
            qs: super::pack_nibbles(q),
        })
    }
}
