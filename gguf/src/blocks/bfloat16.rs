use bytemuck::{Pod, Zeroable};

use super::Block;
use crate::GgmlType;

/// One bfloat16, little-endian, at any address: the upper half of an f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(transparent)]
pub struct BF16 {
    pub bytes: [u8; 2],
}

impl BF16 {
    /// The bits.
    #[inline(always)]
    pub const fn to_bits(self) -> u16 {
        u16::from_le_bytes(self.bytes)
    }

    /// The value; exact.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Block for BF16 {
    const TYPE: GgmlType = GgmlType::BF16;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        super::fill::<1>(out, |_| self.to_f32());
    }

    fn quantize(values: &[f32]) -> Option<BF16> {
        Some(BF16 {
            bytes: half::bf16::from_f32(values[0]).to_le_bytes(),
        })
    }
}
