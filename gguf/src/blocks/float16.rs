use bytemuck::{Pod, Zeroable};

use super::Block;
use crate::GgmlType;

/// One IEEE half, little-endian, at any address. Also the scale inside the quantised blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(transparent)]
pub struct F16 {
    pub bytes: [u8; 2],
}

impl F16 {
    /// The half with these bits.
    #[inline(always)]
    pub const fn from_bits(bits: u16) -> F16 {
        F16 {
            bytes: bits.to_le_bytes(),
        }
    }

    /// The bits.
    #[inline(always)]
    pub const fn to_bits(self) -> u16 {
        u16::from_le_bytes(self.bytes)
    }

    /// The value; exact, as every half is an f32.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        half::f16::from_bits(self.to_bits()).to_f32()
    }
}

impl Block for F16 {
    const TYPE: GgmlType = GgmlType::F16;

    #[inline(always)]
    fn dequantize(&self, out: &mut [f32]) {
        super::fill::<1>(out, |_| self.to_f32());
    }

    fn quantize(values: &[f32]) -> Option<F16> {
        Some(crate::quantize::half(values[0]))
    }
}
