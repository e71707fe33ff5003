use bytemuck::{Pod, Zeroable};

use super::{Block, F16};
use crate::GgmlType;
use crate::quantize::{Even, half, inverse, round, scale};

/// 256 elements of -1, 0 or 1 with one scale, five a byte: `d * (q - 1)`.
///
/// A byte is `256 / 243` of a number of five digits to the base 3, rounded up, so that times 3 its part above
/// 256 is the first digit, and what remains below is such a byte again.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Tq1_0 {
    /// Five digits a byte: of the first 32 bytes digit `n` of byte `i` is element `32 n + i`, of the last
    /// 16 it is element `160 + 16 n + i`.
    pub qs: [u8; 48],
    /// Four digits a byte: digit `n` of byte `i` is element `240 + 4 n + i`.
    pub qh: [u8; 4],
    /// The scale.
    pub d: F16,
}

impl Tq1_0 {
    /// The byte that has element `i`, and the digit that it is.
    #[inline(always)]
    pub fn place(i: usize) -> (usize, usize) {
        match i {
            0..160 => (i % 32, i / 32),
            160..240 => (32 + i % 16, (i - 160) / 16),
            _ => (48 + i % 4, (i - 240) / 4),
        }
    }

    /// Digit `n` of a byte, 0 to 2.
    #[inline(always)]
    pub fn digit(byte: u8, n: usize) -> u8 {
        let rest = byte.wrapping_mul([1, 3, 9, 27, 81][n]);
        ((u16::from(rest) * 3) >> 8) as u8
    }
}

impl Block for Tq1_0 {
    const TYPE: GgmlType = GgmlType::TQ1_0;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        super::fill::<256>(out, |i| {
            let (at, n) = Self::place(i);
            let byte = if at < 48 {
                self.qs[at]
            } else {
                self.qh[at - 48]
            };
            d * f32::from(Self::digit(byte, n) as i8 - 1)
        });
    }

    fn quantize(values: &[f32]) -> Option<Tq1_0> {
        let d = half(scale(values, &Even(-1, 1)));
        let inverse = inverse(d.to_f32());
        let mut numbers = [0u16; 52];
        for (i, &x) in values.iter().enumerate() {
            let (at, n) = Self::place(i);
            let q = (round(x * inverse, -1, 1) + 1) as u16;
            numbers[at] += q * [81, 27, 9, 3, 1][n];
        }
        let bytes = numbers.map(|number| (256 * number).div_ceil(243) as u8);
        Some(Tq1_0 {
            qs: std::array::from_fn(|i| bytes[i]),
            qh: std::array::from_fn(|i| bytes[48 + i]),
            d,
        })
    }
}
