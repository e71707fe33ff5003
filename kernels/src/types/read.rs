//! Reads that the types share.

use super::*;
use cuda_std::int::{funnel_shift_right, prmt};

#[inline(always)]
pub unsafe fn words4(m: &impl Planes, plane: usize, index: usize) -> [u32; 4] {
    unsafe { m.words4(plane, index) }
}

#[inline(always)]
pub unsafe fn words2(m: &impl Planes, plane: usize, index: usize) -> [u32; 2] {
    unsafe { m.words2(plane, index) }
}

#[inline(always)]
pub unsafe fn word(m: &impl Planes, plane: usize, index: usize) -> u32 {
    unsafe { m.word(plane, index) }
}

#[inline(always)]
pub unsafe fn half_word(m: &impl Planes, plane: usize, index: usize) -> u16 {
    unsafe { m.half_word(plane, index) }
}

#[inline(always)]
pub unsafe fn single(m: &impl Planes, plane: usize, index: usize) -> u8 {
    unsafe { m.single(plane, index) }
}

#[inline(always)]
pub fn f16(bits: u16) -> f32 {
    cuda_std::half::F16::from_bits(bits).to_f32()
}

/// Nibbles of 16 bytes: low nibbles are weights 0..16, high ones 16..32.
#[inline(always)]
pub fn nibbles(v: [u32; 4]) -> [u32; 8] {
    unrolled!(8, |w| (v[w % 4] >> (4 * (w / 4))) & 0x0f0f_0f0f)
}

/// The same, but the last 16 of them 16 times as large: where they lie.
#[inline(always)]
pub fn raised_nibbles(v: [u32; 4]) -> [u32; 8] {
    unrolled!(8, |w| v[w % 4] & (0x0f0f_0f0f << (4 * (w / 4))))
}

/// Bit `8b + w` is one bit of weight `4w + b`.
#[inline(always)]
pub fn bits(v: u32) -> [u32; 8] {
    unrolled!(8, |w| (v >> w) & 0x0101_0101)
}

/// Two bits of each weight: weight `4w + b` has bits `8b + 2(w % 4)` of word `w / 4`.
#[inline(always)]
pub fn pairs(v: [u32; 2]) -> [u32; 8] {
    unrolled!(8, |w| (v[w / 4] >> (2 * (w % 4))) & 0x0303_0303)
}

#[inline(always)]
pub fn byte(words: &[u32; 8], i: usize) -> u32 {
    (words[i / 4] >> (8 * (i % 4))) & 0xff
}

/// Five bits of each weight, the low four and the fifth.
#[inline(always)]
pub fn five_bits(low: [u32; 8], high: [u32; 8]) -> [u32; 8] {
    unrolled!(8, |w| low[w] | (high[w] << 4))
}

/// A pair of signed bytes.
#[inline(always)]
pub fn signed_pair(v: u16) -> [f32; 2] {
    [f32::from(v as i8), f32::from((v >> 8) as i8)]
}

/// What [`super::write::header_k4`] wrote, for group `g`: `d * scale * q - dmin * min`.
#[inline(always)]
pub fn header_k4(h: [u32; 4], g: usize) -> Affine {
    let j = (g % BLOCK_GROUPS) as u32;
    let low = prmt(h[1], h[2], j);
    // The nibble comes to bits 8 to 11, above the two bits of the byte: the minimum times 64.
    let high = funnel_shift_right(h[3], h[3], 4 * j + 24);
    // Set into mantissas whose last places are 1 and -1/64, which takes less than conversions.
    const SCALE: f32 = 8_388_608.0;
    const MIN: f32 = -131_072.0;
    let set_into = |of: f32, bits: u32| f32::from_bits(of.to_bits() | bits) - of;
    let scale = set_into(SCALE, low & 0x3f);
    let min = set_into(MIN, (low & 0xc0) | (high & 0xf00));
    let d = f16(h[0] as u16) * scale;
    let m = f16((h[0] >> 16) as u16) * min;
    Affine {
        d: [d, d],
        m: [m, m],
    }
}

/// Weights `4 w .. 4 w + 4` of a group.
#[inline(always)]
pub fn four_weights(levels: [u32; 8], a: Affine, w: usize) -> [f32; 4] {
    // Not indexed, for which they would go to local memory.
    let mut word = levels[0];
    for i in 1..8 {
        word = if i == w { levels[i] } else { word };
    }
    let (d, m) = if w < 4 {
        (a.d[0], a.m[0])
    } else {
        (a.d[1], a.m[1])
    };
    unrolled!(4, |i| d * ((word >> (8 * i)) & 0xff) as f32 + m)
}
