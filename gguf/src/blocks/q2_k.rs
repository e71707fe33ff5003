use bytemuck::{Pod, Zeroable};

use super::{Block, F16};
use crate::GgmlType;
use crate::quantize::scaled_offset;

/// 256 elements of 2 bits in 16 sub-blocks of 16, each with a scale and a minimum of 4 bits:
/// `(d * scale) * q - (dmin * min)`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Q2K {
    /// Of each sub-block the scale (low half) and the minimum (high half).
    pub scales: [u8; 16],
    /// Two runs of 32 bytes for 128 elements each. Bits `2s` and `2s + 1` of byte `l` of a run are
    /// its element `32 * s + l`.
    pub qs: [u8; 64],
    /// The scale of the scales.
    pub d: F16,
    /// The scale of the minimums, which are subtracted.
    pub dmin: F16,
}

impl Block for Q2K {
    const TYPE: GgmlType = GgmlType::Q2_K;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        assert_eq!(out.len(), Self::LEN);
        for (j, out) in out.chunks_exact_mut(16).enumerate() {
            let scale = self.scales[j];
            let (d, min) = (d * f32::from(scale & 0x0f), dmin * f32::from(scale >> 4));
            let qs = &self.qs[j / 8 * 32 + j % 2 * 16..][..16];
            let shift = j % 8 / 2 * 2;
            super::fill::<16>(out, |l| d * f32::from((qs[l] >> shift) & 3) - min);
        }
    }

    fn quantize(values: &[f32]) -> Option<Q2K> {
        let s = scaled_offset::<16>(values, 3, 15);
        let mut block = Q2K {
            d: s.d,
            dmin: s.dmin,
            ..Zeroable::zeroed()
        };
        for (scales, (scale, min)) in block.scales.iter_mut().zip(s.scales.iter().zip(s.mins)) {
            *scales = (scale | (min << 4)) as u8;
        }
        for (i, &x) in values.iter().enumerate() {
            block.qs[i / 128 * 32 + i % 32] |= s.level(i / 16, x, 3) << (i % 128 / 32 * 2);
        }
        Some(block)
    }
}
