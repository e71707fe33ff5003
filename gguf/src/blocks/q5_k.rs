use bytemuck::{Pod, Zeroable};

use super::{Block, F16, scale_min_k4};
use crate::GgmlType;
use crate::quantize::scaled_offset;

/// 256 elements of 5 bits in 8 sub-blocks of 32, each with a scale and a minimum of 6 bits:
/// `(d * scale) * q - (dmin * min)`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Q5K {
    /// The scale of the scales.
    pub d: F16,
    /// The scale of the minimums, which are subtracted.
    pub dmin: F16,
    /// 8 scales and 8 minimums, see [`scale_min_k4`].
    pub scales: [u8; 12],
    /// The fifth bits: bit `j` of byte `l` belongs to element `32 * j + l`.
    pub qh: [u8; 32],
    /// The low four bits, as the elements of [`super::Q4K`].
    pub qs: [u8; 128],
}

impl Block for Q5K {
    const TYPE: GgmlType = GgmlType::Q5_K;

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
                let low = (qs[l] >> shift) & 0x0f;
                let high = (self.qh[l] >> j) & 1;
                d * f32::from(low | (high << 4)) - min
            });
        }
    }

    fn quantize(values: &[f32]) -> Option<Q5K> {
        let s = scaled_offset::<8>(values, 31, 63);
        let mut block = Q5K {
            d: s.d,
            dmin: s.dmin,
            scales: super::pack_scale_min_k4(&s.scales, &s.mins),
            ..Zeroable::zeroed()
        };
        for (i, &x) in values.iter().enumerate() {
            let q = s.level(i / 32, x, 31);
            block.qs[i / 64 * 32 + i % 32] |= (q & 15) << (i % 64 / 32 * 4);
            block.qh[i % 32] |= (q >> 4) << (i / 32);
        }
        Some(block)
    }
}
