use bytemuck::{Pod, Zeroable};

use super::{Block, F16};
use crate::GgmlType;
use crate::quantize::{Even, half, inverse, round, scale};

/// 256 elements of 2 bits with one scale, meant for -1, 0 and 1: `d * (q - 1)`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Tq2_0 {
    /// Two runs of 32 bytes for 128 elements each: bits `2 n` and up of byte `i` of a run are its element
    /// `32 n + i`.
    pub qs: [u8; 64],
    /// The scale.
    pub d: F16,
}

impl Block for Tq2_0 {
    const TYPE: GgmlType = GgmlType::TQ2_0;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        super::fill::<256>(out, |i| {
            let q = self.qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
            d * f32::from(q as i8 - 1)
        });
    }

    fn quantize(values: &[f32]) -> Option<Tq2_0> {
        let d = half(scale(values, &Even(-1, 1)));
        let inverse = inverse(d.to_f32());
        let mut qs = [0; 64];
        for (i, &x) in values.iter().enumerate() {
            let q = (round(x * inverse, -1, 1) + 1) as u8;
            qs[i / 128 * 32 + i % 32] |= q << (i % 128 / 32 * 2);
        }
        Some(Tq2_0 { qs, d })
    }
}
