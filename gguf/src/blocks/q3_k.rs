use bytemuck::{Pod, Zeroable};

use super::{Block, F16};
use crate::GgmlType;
use crate::quantize::{Even, inverse, round, scaled};

/// 256 elements of 3 bits in 16 sub-blocks of 16, each with a scale of 6 bits:
/// `(d * (scale - 32)) * (q - 4)`.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Q3K {
    /// The third bits: bit `s` of byte `l` belongs to element `32 * s + l`.
    pub hmask: [u8; 32],
    /// The low two bits, as the elements of [`super::Q2K`].
    pub qs: [u8; 64],
    /// 16 scales of 6 bits, see [`Q3K::scale`].
    pub scales: [u8; 12],
    /// The scale of the scales.
    pub d: F16,
}

impl Q3K {
    /// The scale of sub-block `j`, -32 to 31. Its low four bits are a half of byte `j % 8` (low for
    /// `j < 8`, else high), its high two bits are bits `j / 4 * 2` and up of byte `8 + j % 4`.
    #[inline(always)]
    pub fn scale(&self, j: usize) -> i8 {
        let low = (self.scales[j % 8] >> (j / 8 * 4)) & 0x0f;
        let high = (self.scales[8 + j % 4] >> (j / 4 * 2)) & 3;
        (low | (high << 4)) as i8 - 32
    }
}

impl Block for Q3K {
    const TYPE: GgmlType = GgmlType::Q3_K;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        assert_eq!(out.len(), Self::LEN);
        for (j, out) in out.chunks_exact_mut(16).enumerate() {
            let d = d * f32::from(self.scale(j));
            let qs = &self.qs[j / 8 * 32 + j % 2 * 16..][..16];
            let hmask = &self.hmask[j % 2 * 16..][..16];
            let (shift, bit) = (j % 8 / 2 * 2, j / 2);
            super::fill::<16>(out, |l| {
                let low = (qs[l] >> shift) & 3;
                let high = (hmask[l] >> bit) & 1;
                d * f32::from((low | (high << 2)) as i8 - 4)
            });
        }
    }

    fn quantize(values: &[f32]) -> Option<Q3K> {
        let s = scaled::<16>(values, &Even(-4, 3), [-32, 31]);
        let mut block = Q3K {
            d: s.d,
            ..Zeroable::zeroed()
        };
        for (j, &scale) in s.scales.iter().enumerate() {
            let scale = (scale + 32) as u8;
            block.scales[j % 8] |= (scale & 15) << (j / 8 * 4);
            block.scales[8 + j % 4] |= (scale >> 4) << (j / 4 * 2);
        }
        for (i, &x) in values.iter().enumerate() {
            let d = s.d.to_f32() * s.scales[i / 16] as f32;
            let q = (round(x * inverse(d), -4, 3) + 4) as u8;
            block.qs[i / 128 * 32 + i % 32] |= (q & 3) << (i % 128 / 32 * 2);
            block.hmask[i % 32] |= (q >> 2) << (i / 32);
        }
        Some(block)
    }
}
