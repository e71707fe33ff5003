use bytemuck::{Pod, Zeroable};

use super::{Block, F16};
use crate::GgmlType;
use crate::quantize::{half, inverse, round, scale_and_offset};

/// 32 elements of 4 bits with a scale and a minimum: `d * q + m`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Q4_1 {
    /// The scale.
    pub d: F16,
    /// The minimum, added.
    pub m: F16,
    /// Element `i` in the low half of byte `i`, element `i + 16` in the high half.
    pub qs: [u8; 16],
}

impl Block for Q4_1 {
    const TYPE: GgmlType = GgmlType::Q4_1;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        super::fill_nibbles(out, &self.qs, |_, q| f32::from(q) * d + m);
    }

    fn quantize(values: &[f32]) -> Option<Q4_1> {
        let (d, m) = scale_and_offset(values, 15, false);
        let (d, m) = (half(d), half(m));
        let (inverse, low) = (inverse(d.to_f32()), m.to_f32());
        Some(Q4_1 {
            d,
            m,
            qs: super::pack_nibbles(|i| round((values[i] - low) * inverse, 0, 15) as u8),
        })
    }
}
