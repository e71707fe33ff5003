//! Writes of [`Weights::repack`]: most take `level(i)`, a weight's unsigned level.

use super::*;

#[inline(always)]
pub unsafe fn word<T: Weights>(m: &MatrixRow<T>, plane: usize, index: usize, value: u32) {
    unsafe { m.part::<u32>(plane, index).write(value) }
}

#[inline(always)]
pub unsafe fn half_word<T: Weights>(m: &MatrixRow<T>, plane: usize, index: usize, value: u16) {
    unsafe { m.part::<u16>(plane, index).write(value) }
}

#[inline(always)]
pub unsafe fn single<T: Weights>(m: &MatrixRow<T>, plane: usize, index: usize, value: u8) {
    unsafe { m.part::<u8>(plane, index).write(value) }
}

/// What [`read::nibbles`] reads.
#[inline(always)]
pub unsafe fn nibbles<T: Weights>(m: &MatrixRow<T>, g: usize, level: impl Fn(usize) -> u32) {
    for w in 0..4 {
        let mut v = 0;
        for b in 0..4 {
            let i = 4 * w + b;
            v |= ((level(i) & 15) | ((level(i + 16) & 15) << 4)) << (8 * b);
        }
        unsafe { word(m, 0, g * 4 + w, v) }
    }
}

/// What [`read::bits`] reads; `level` gives 0 or 1.
#[inline(always)]
pub unsafe fn bits<T: Weights>(
    m: &MatrixRow<T>,
    plane: usize,
    index: usize,
    level: impl Fn(usize) -> u32,
) {
    let mut v = 0;
    for w in 0..8 {
        for b in 0..4 {
            v |= (level(4 * w + b) & 1) << (8 * b + w);
        }
    }
    unsafe { word(m, plane, index, v) }
}

/// What [`read::pairs`] reads; `level` gives 0 to 3.
#[inline(always)]
pub unsafe fn pairs<T: Weights>(
    m: &MatrixRow<T>,
    plane: usize,
    index: usize,
    level: impl Fn(usize) -> u32,
) {
    for half in 0..2 {
        let mut v = 0;
        for w in 0..4 {
            for b in 0..4 {
                v |= (level(16 * half + 4 * w + b) & 3) << (8 * b + 2 * w);
            }
        }
        unsafe { word(m, plane, index * 2 + half, v) }
    }
}

/// A nibble block's level of weight `i`: low nibbles first.
#[inline(always)]
pub unsafe fn nibble(qs: *const u8, i: usize) -> u32 {
    unsafe { (u32::from(*qs.add(i % 16)) >> (4 * (i / 16))) & 15 }
}

/// The fifth bit of weight `i`: bit `i` of a little-endian word.
#[inline(always)]
pub unsafe fn fifth_bit(qh: *const u8, i: usize) -> u32 {
    unsafe { (u32::from(*qh.add(i / 8)) >> (i % 8)) & 1 }
}

/// The 6-bit scale and minimum of group `j`, packed over 12 bytes (Q4_K, Q5_K).
#[inline(always)]
unsafe fn scale_min(packed: *const u8, j: usize) -> (u32, u32) {
    let at = |i: usize| unsafe { u32::from(*packed.add(i)) };
    if j < 4 {
        (at(j) & 63, at(j + 4) & 63)
    } else {
        (
            (at(j + 4) & 15) | ((at(j - 4) >> 6) << 4),
            (at(j + 4) >> 4) | ((at(j) >> 6) << 4),
        )
    }
}

/// A block's header as Q4_K and Q5_K keep it on the device, 16 bytes: `d` and `dmin`; then for each
/// group a byte, the scale and above it the two low bits of the minimum; then a nibble, the minimum's other
/// four. A lane's group is the same in every block it sees, so that all shifts are known beforehand.
#[inline(always)]
pub unsafe fn header_k4<T: Weights>(s: *const u8, m: &MatrixRow<T>, plane: usize, b: usize) {
    unsafe {
        let (mut low, mut high) = ([0u32; 2], 0u32);
        for j in 0..BLOCK_GROUPS {
            let (scale, min) = scale_min(s.add(4), j);
            low[j / 4] |= (scale | ((min & 3) << 6)) << (8 * (j % 4));
            high |= (min >> 2) << (4 * j);
        }
        let d = u32::from(u16_at(s, 0)) | (u32::from(u16_at(s, 2)) << 16);
        word(m, plane, b * 4, d);
        word(m, plane, b * 4 + 1, low[0]);
        word(m, plane, b * 4 + 2, low[1]);
        word(m, plane, b * 4 + 3, high);
    }
}
