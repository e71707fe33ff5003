use bytemuck::{Pod, Zeroable};

use super::{Block, F16, scale_min_k4};
use crate::GgmlType;
use crate::quantize::scaled_offset;

/// 256 elements of 4 bits in 8 sub-blocks of 32, each with a scale and a minimum of 6 bits:
/// `(d * scale) * q - (dmin * min)`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Q4K {
    /// The scale of the scales.
    pub d: F16,
    /// The scale of the minimums, which are subtracted.
    pub dmin: F16,
    /// 8 scales and 8 minimums, see [`scale_min_k4`].
    pub scales: [u8; 12],
    /// Four runs of 32 bytes for 64 elements each: of byte `l` of a run the low half is its element
    /// `l`, the high half its element `32 + l`.
    pub qs: [u8; 128],
}

impl Block for Q4K {
    const TYPE: GgmlType = GgmlType::Q4_K;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        assert_eq!(out.len(), Self::LEN);
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        for (j, out) in out.chunks_exact_mut(32).enumerate() {
            let (scale, min) = scale_min_k4(j, &self.scales);
            let (d, min) = (d * f32::from(scale), dmin * f32::from(min));
            let qs = &self.qs[j / 2 * 32..][..32];
            let shift = j % 2 * 4;
            super::fill::<32>(out, |l| {
                let q = (qs[l] >> shift) & 0x0f;
                d * f32::from(q) - min
            });
        }
    }

    fn quantize(values: &[f32]) -> Option<Q4K> {
        let s = scaled_offset::<8>(values, 15, 63);
        let mut block = Q4K {
            d: s.d,
            dmin: s.dmin,
            scales: super::pack_scale_min_k4(&s.scales, &s.mins),
            ..Zeroable::zeroed()
        };
        for (i, &x) in values.iter().enumerate() {
            block.qs[i / 64 * 32 + i % 32] |= s.level(i / 32, x, 15) << (i % 64 / 32 * 4);
        }
        Some(block)
    }
}
