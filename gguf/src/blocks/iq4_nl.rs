use bytemuck::{Pod, Zeroable};
use gguf_codebooks::IQ4_VALUES;

use super::{Block, F16};
use crate::GgmlType;
use crate::quantize::{Table, half, inverse, scale};

/// 32 elements of 4 bits with one scale, unevenly spaced: `d * value[q]`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Iq4Nl {
    /// The scale.
    pub d: F16,
    /// Element `i` in the low half of byte `i`, element `i + 16` in the high half.
    pub qs: [u8; 16],
}

impl Block for Iq4Nl {
    const TYPE: GgmlType = GgmlType::IQ4_NL;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        super::fill_nibbles(out, &self.qs, |_, q| {
            d * f32::from(IQ4_VALUES[usize::from(q)])
        });
    }

    fn quantize(values: &[f32]) -> Option<Iq4Nl> {
        let table = Table::new(IQ4_VALUES);
        let d = half(scale(values, &table));
        let inverse = inverse(d.to_f32());
        Some(Iq4Nl {
            d,
            qs: super::pack_nibbles(|i| table.place(values[i] * inverse) as u8),
        })
    }
}
