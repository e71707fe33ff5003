use bytemuck::{Pod, Zeroable};

use super::{Block, F16};
use crate::GgmlType;

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
}
