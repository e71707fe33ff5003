//! What the types have in common that look their values up, in a grid or in a table of sixteen.
//!
//! Grids lie in the module's memory, an entry a word, and stay in L1: none is larger than 8 KB. A byte
//! permutation then turns an entry's codes, with the signs, into levels, four at a time.

use super::*;
use cuda_std::int::prmt;
use cuda_std::memory::ldg_u32;

/// Bit 0 of each nibble.
const NIBBLES: u32 = 0x1111_1111;
/// Bit 0 of each byte.
const BYTES: u32 = 0x0101_0101;

/// Entry `i` of a grid; `i` has no more bits than that takes.
#[inline(always)]
pub fn entry<const N: usize>(grid: &'static [u32; N], i: u32) -> u32 {
    const { assert!(N.is_power_of_two()) };
    debug_assert!((i as usize) < N);
    // Every index of that many bits is inside.
    unsafe { ldg_u32(grid.as_ptr().add(i as usize)) }
}

/// Byte `i` of a word.
#[inline(always)]
pub fn byte(word: u32, i: usize) -> u32 {
    (word >> (8 * i)) & 0xff
}

/// Levels of 32 weights: each nibble of `codes` names a byte, 0 to 3 of `low`, 4 to 7 of `high`.
#[inline(always)]
pub fn choose(codes: [u32; 4], low: u32, high: u32) -> [u32; 8] {
    unrolled!(8, |w| prmt(low, high, codes[w / 2] >> (16 * (w % 2))))
}

/// Of the signs that [`pack_run_signs`] packed those of run `k` of eight weights, bit 2 of each nibble.
#[inline(always)]
pub fn run_signs(signs: u32, k: usize) -> u32 {
    ((signs >> k) & NIBBLES) << 2
}

/// The same where the eighth sign is not stored: it makes their number even.
#[inline(always)]
pub fn even_run_signs(signs: u32, k: usize) -> u32 {
    let seven = (signs >> k) & (NIBBLES >> 4);
    (seven << 2) | ((seven.count_ones() & 1) << 30)
}

/// Signs as [`run_signs`] reads them: bit `4 i + k` is that of weight `i` of run `k`.
#[inline(always)]
pub fn pack_run_signs(sign: impl Fn(usize, usize) -> u32) -> u32 {
    let mut v = 0;
    for k in 0..4 {
        for i in 0..8 {
            v |= (sign(k, i) & 1) << (4 * i + k);
        }
    }
    v
}

/// Bit `i` of the seven signs of run `k`, as the file packs them; 0 for the eighth.
#[inline(always)]
pub fn seven_signs(word: u32, k: usize, i: usize) -> u32 {
    if i < 7 { (word >> (7 * k + i)) & 1 } else { 0 }
}

/// `offset ± magnitude` of four weights, given `offset + magnitude`, and a bit 0 in each byte that is
/// negative.
#[inline(always)]
pub fn negate<const OFFSET: u32>(levels: u32, signs: u32) -> u32 {
    // 255 - (offset + magnitude) - (255 - 2 offset), no byte borrowing from the next.
    (levels ^ (signs * 255)) - signs * (255 - 2 * OFFSET)
}

/// The four signs of word `w` of a group, bit 0 of each byte; bit `8 b + w` of `signs` is that of weight
/// `4 w + b`.
#[inline(always)]
pub fn word_signs(signs: u32, w: usize) -> u32 {
    (signs >> w) & BYTES
}

/// The same where every eighth sign is not stored: it makes the number of its eight even.
#[inline(always)]
pub fn even_word_signs(signs: u32, w: usize) -> u32 {
    if w % 2 == 0 {
        return word_signs(signs, w);
    }
    let seven = signs & ((BYTES << (w - 1)) | (0x0001_0101 << w));
    ((signs >> w) & 0x0001_0101) | ((seven.count_ones() & 1) << 24)
}

/// A grid of four magnitudes an entry, each raised by `offset`.
pub const fn raised<const N: usize>(grid: &[[u8; 4]; N], offset: u8) -> [u32; N] {
    let mut out = [0; N];
    let mut i = 0;
    while i < N {
        let [a, b, c, d] = grid[i];
        out[i] = u32::from_le_bytes([a + offset, b + offset, c + offset, d + offset]);
        i += 1;
    }
    out
}

/// Sixteen values as words of bytes, each raised by `offset`.
pub const fn table(values: [i8; 16], offset: i32) -> [u32; 4] {
    let mut out = [0; 4];
    let mut i = 0;
    while i < 16 {
        out[i / 4] |= ((values[i] as i32 + offset) as u32) << (8 * (i % 4));
        i += 1;
    }
    out
}

/// Levels of 32 nibbles, in order, from a table of sixteen.
#[inline(always)]
pub fn look_up(qs: [u32; 4], table: [u32; 4]) -> [u32; 8] {
    unrolled!(8, |w| {
        let q = qs[w / 2] >> (16 * (w % 2));
        // The top bit of each nibble chooses between the table's halves.
        let (index, half) = (q & 0x7777, (q & 0x8888) >> 1);
        prmt(
            prmt(table[0], table[1], index),
            prmt(table[2], table[3], index),
            0x3210 | half,
        )
    })
}

/// What [`look_up`] takes.
#[inline(always)]
pub unsafe fn write_nibbles<T: Weights>(m: &MatrixRow<T>, g: usize, level: impl Fn(usize) -> u32) {
    for w in 0..4 {
        let mut v = 0;
        for i in 0..8 {
            v |= (level(8 * w + i) & 15) << (4 * i);
        }
        unsafe { write::word(m, 0, g * 4 + w, v) }
    }
}
