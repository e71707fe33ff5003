use bytemuck::{Pod, Zeroable};

use super::{Block, F16};
use crate::GgmlType;
use crate::quantize::{Even, inverse, round, scaled};

/// 256 elements of 6 bits in 16 sub-blocks of 16, each with a scale of 8 bits:
/// `(d * scale) * (q - 32)`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Q6K {
    /// The low four bits: two runs of 64 bytes for 128 elements each. Of byte `l` of a run the low
    /// half belongs to its element `l`, the high half to its element `64 + l`.
    pub ql: [u8; 128],
    /// The high two bits: two runs of 32 bytes for 128 elements each. Bits `2s` and `2s + 1` of
    /// byte `l` of a run belong to its element `32 * s + l`.
    pub qh: [u8; 64],
    /// The scales of the sub-blocks.
    pub scales: [i8; 16],
    /// The scale of the scales.
    pub d: F16,
}

impl Block for Q6K {
    const TYPE: GgmlType = GgmlType::Q6_K;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        assert_eq!(out.len(), Self::LEN);
        for (j, out) in out.chunks_exact_mut(16).enumerate() {
            let d = d * f32::from(self.scales[j]);
            let ql = &self.ql[j / 8 * 64 + j % 4 * 16..][..16];
            let qh = &self.qh[j / 8 * 32 + j % 2 * 16..][..16];
            let (low_shift, high_shift) = (j % 8 / 4 * 4, j % 8 / 2 * 2);
            super::fill::<16>(out, |l| {
                let low = (ql[l] >> low_shift) & 0x0f;
                let high = (qh[l] >> high_shift) & 3;
                d * f32::from((low | (high << 4)) as i8 - 32)
            });
        }
    }

    fn quantize(values: &[f32]) -> Option<Q6K> {
        let s = scaled::<16>(values, &Even(-32, 31), [-128, 127]);
        let mut block = Q6K {
            scales: s.scales.map(|scale| scale as i8),
            d: s.d,
            ..Zeroable::zeroed()
        };
        for (i, &x) in values.iter().enumerate() {
            let d = s.d.to_f32() * s.scales[i / 16] as f32;
            let q = (round(x * inverse(d), -32, 31) + 32) as u8;
            let (run, at) = (i / 128, i % 128);
            block.ql[run * 64 + at % 64] |= (q & 15) << (at / 64 * 4);
            block.qh[run * 32 + at % 32] |= (q >> 4) << (at / 32 * 2);
        }
        Some(block)
    }
}
