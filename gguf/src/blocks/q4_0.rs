use bytemuck::{Pod, Zeroable};

use super::{Block, F16};
use crate::GgmlType;
use crate::quantize::{Even, half, inverse, round, scale};

/// 32 elements of 4 bits with one scale: `d * (q - 8)`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Q4_0 {
    /// The scale.
    pub d: F16,
    /// Element `i` in the low half of byte `i`, element `i + 16` in the high half.
    pub qs: [u8; 16],
}

impl Block for Q4_0 {
    const TYPE: GgmlType = GgmlType::Q4_0;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        super::fill_nibbles(out, &self.qs, |_, q| f32::from(q as i8 - 8) * d);
    }

    fn quantize(values: &[f32]) -> Option<Q4_0> {
        let d = half(scale(values, &Even(-8, 7)));
        let inverse = inverse(d.to_f32());
        Some(Q4_0 {
            d,
            qs: super::pack_nibbles(|i| (round(values[i] * inverse, -8, 7) + 8) as u8),
        })
    }
}
