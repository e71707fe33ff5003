use bytemuck::{Pod, Zeroable};

use super::Block;
use crate::GgmlType;

/// One f32, little-endian, at any address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(transparent)]
pub struct F32 {
    pub bytes: [u8; 4],
}

impl F32 {
    /// The value.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        f32::from_le_bytes(self.bytes)
    }
}

impl Block for F32 {
    const TYPE: GgmlType = GgmlType::F32;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        super::fill::<1>(out, |_| self.to_f32());
    }

    fn quantize(values: &[f32]) -> Option<F32> {
        Some(F32 {
            bytes: values[0].to_le_bytes(),
        })
    }
}
