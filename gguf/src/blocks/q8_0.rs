use bytemuck::{Pod, Zeroable};

use super::{Block, F16};
use crate::GgmlType;
use crate::quantize::{half, inverse, round};

/// 32 elements of 8 bits with one scale: `d * q`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Q8_0 {
    /// The scale.
    pub d: F16,
    /// The elements in order.
    pub qs: [i8; 32],
}

impl Block for Q8_0 {
    const TYPE: GgmlType = GgmlType::Q8_0;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        super::fill::<32>(out, |i| f32::from(self.qs[i]) * d);
    }

    fn quantize(values: &[f32]) -> Option<Q8_0> {
        let peak = values.iter().fold(0.0f32, |p, v| p.max(v.abs()));
        // With so many levels, clipping gains nothing.
        let d = half(peak / 127.0);
        let inverse = inverse(d.to_f32());
        Some(Q8_0 {
            d,
            qs: std::array::from_fn(|i| round(values[i] * inverse, -127, 127) as i8),
        })
    }
}
