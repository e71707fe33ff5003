use bytemuck::{Pod, Zeroable};
use gguf_codebooks::{MXFP4_VALUES, mxfp4_scale};

use super::Block;
use crate::GgmlType;
use crate::quantize::least;

/// 32 elements of 4 bits, floats of two bits exponent and one bit mantissa, with one power of two as their
/// scale: `2^(e - 127) * value[q]`. Source: OCP Microscaling Formats 1.0.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Mxfp4 {
    /// The scale's exponent, 127 more than it is.
    pub e: u8,
    /// Element `i` in the low half of byte `i`, element `i + 16` in the high half.
    pub qs: [u8; 16],
}

impl Block for Mxfp4 {
    const TYPE: GgmlType = GgmlType::MXFP4;

    #[inline]
    fn dequantize(&self, out: &mut [f32]) {
        let d = mxfp4_scale(self.e);
        super::fill_nibbles(out, &self.qs, |_, q| {
            d * f32::from(MXFP4_VALUES[usize::from(q)])
        });
    }

    fn quantize(values: &[f32]) -> Option<Mxfp4> {
        let peak = values.iter().fold(0.0f32, |p, v| p.max(v.abs()));
        // The exponents that bring the greatest value near the greatest level, 12.
        let near = (peak.to_bits() >> 23) as i32 - 1;
        let candidates = (near - 1..=near + 1).map(|e| e.clamp(0, 254) as u8);
        let pack = |e: u8| Mxfp4 {
            e,
            qs: super::pack_nibbles(|i| nearest(values[i] / mxfp4_scale(e))),
        };
        least(candidates.map(pack), |block| {
            let mut back = [0.0; 32];
            block.dequantize(&mut back);
            let pairs = values.iter().zip(back);
            pairs.map(|(&x, y)| f64::from(x - y).powi(2)).sum()
        })
    }
}

/// The code of the value nearest to `x`.
fn nearest(x: f32) -> u8 {
    let value = |code: u8| f32::from(MXFP4_VALUES[usize::from(code)]);
    let magnitude = (0..7).take_while(|&c| x.abs() > (value(c) + value(c + 1)) / 2.0);
    let code = magnitude.count() as u8;
    if x < 0.0 { code | 8 } else { code }
}
