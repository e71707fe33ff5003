use bytemuck::{Pod, Zeroable};
use gguf_codebooks::{MXFP4_VALUES, mxfp4_scale};

use super::Block;
use crate::GgmlType;

/// 32 elements of 4 bits, floats of two bits exponent and one bit mantissa, with one power of two as their
/// scale: `2^(e - 127) * value[q]`. Source: OCP Microscaling Formats 1.0.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Mxfp4 {
    /// The scale's exponent, 127 more than it is.
    pub e: u8,
    /// Element `i` in the low half of byte `i`, element `i + 16` in the high half.
    pub qs: [u8; 16],
}

impl Block for Mxfp4 {
    const TYPE: GgmlType = GgmlType::MXFP4;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let d = mxfp4_scale(self.e);
        super::fill_nibbles(out, &self.qs, |_, q| {
            d * f32::from(MXFP4_VALUES[usize::from(q)])
        });
    }
}
