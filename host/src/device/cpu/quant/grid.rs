//! What the types have in common that look their values up: in a grid ([`Grid`]), or in a table of 16.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Quant, UNIT};
use gguf::blocks::{Block, F16};

/// A type whose values are looked up in a grid, a run of 4 or 8 elements at once.
pub(super) trait Grid: Block {
    /// As [`Quant::SUB`].
    const SUB: usize;
    /// As [`Quant::MAX`].
    const MAX: u8;
    /// As [`Quant::OFFSET`].
    const OFFSET: f32;

    /// Unit `unit` of the block.
    fn unit(&self, unit: usize) -> Signed;

    /// The scale of the scales.
    fn d(&self) -> F16;

    /// The scale of sub-block `j`, to be multiplied by [`Grid::d`].
    fn scale(&self, j: usize) -> f32;
}

impl<G: Grid> Quant for G {
    const SUB: usize = <G as Grid>::SUB;
    const MAX: u8 = <G as Grid>::MAX;
    const OFFSET: f32 = <G as Grid>::OFFSET;

    #[inline(always)]
    fn quants(&self, unit: usize) -> [u8; UNIT] {
        self.unit(unit).quants()
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = f32_of(self.d());
        for j in 0..G::LEN / <G as Grid>::SUB {
            s[j] = d * self.scale(j);
            m[j] = -<G as Grid>::OFFSET * s[j];
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, unit: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe { self.unit(unit).quants_avx2() }
    }
}

/// A unit's magnitudes, eight a word, a bit for each element that is negative, and what is added to all.
pub(super) struct Signed {
    pub magnitudes: [u64; 4],
    pub signs: u32,
    pub offset: u8,
}

impl Signed {
    /// `offset ± magnitude`.
    #[inline(always)]
    pub fn quants(self) -> [u8; UNIT] {
        let offset = self.offset;
        std::array::from_fn(|i| {
            let magnitude = (self.magnitudes[i / 8] >> (i % 8 * 8)) as u8;
            if self.signs >> i & 1 == 0 {
                offset + magnitude
            } else {
                offset - magnitude
            }
        })
    }

    /// The same.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub unsafe fn quants_avx2(self) -> __m256i {
        let [a, b, c, d] = self.magnitudes.map(|m| m as i64);
        // SAFETY: the caller's.
        unsafe {
            let negative = super::spread_bits_avx2(self.signs, -1);
            let flipped = _mm256_xor_si256(_mm256_setr_epi64x(a, b, c, d), negative);
            let signed = _mm256_sub_epi8(flipped, negative);
            _mm256_add_epi8(signed, _mm256_set1_epi8(self.offset as i8))
        }
    }
}

/// A grid's entries as words.
pub(super) const fn words<const N: usize>(grid: &[[u8; 8]; N]) -> [u64; N] {
    let mut out = [0; N];
    let mut i = 0;
    while i < N {
        out[i] = u64::from_le_bytes(grid[i]);
        i += 1;
    }
    out
}

/// The same of entries of four.
pub(super) const fn half_words<const N: usize>(grid: &[[u8; 4]; N]) -> [u32; N] {
    let mut out = [0; N];
    let mut i = 0;
    while i < N {
        out[i] = u32::from_le_bytes(grid[i]);
        i += 1;
    }
    out
}

/// Words of two entries of four, `entry(0)` and `entry(1)` first.
#[inline(always)]
pub(super) fn two_halves(entry: impl Fn(usize) -> u32) -> [u64; 4] {
    std::array::from_fn(|i| u64::from(entry(2 * i)) | u64::from(entry(2 * i + 1)) << 32)
}

/// Four times all eight signs, of which seven are stored, from a word's lowest bit on.
#[inline(always)]
pub(super) fn even_signs(word: u32) -> u32 {
    let eight = |i: u32| u32::from(gguf_codebooks::even_signs((word >> (7 * i)) as u8 & 127));
    eight(0) | eight(1) << 8 | eight(2) << 16 | eight(3) << 24
}

/// `offset` more than each of 16 values.
pub(super) const fn raised(values: [i8; 16], offset: i16) -> [u8; 16] {
    let mut out = [0; 16];
    let mut i = 0;
    while i < 16 {
        out[i] = (values[i] as i16 + offset) as u8;
        i += 1;
    }
    out
}

/// The values of nibbles: low halves first.
#[inline(always)]
pub(super) fn look_up(bytes: &[u8; 16], table: &[u8; 16]) -> [u8; UNIT] {
    std::array::from_fn(|i| table[usize::from(bytes[i % 16] >> (i / 16 * 4)) & 15])
}

/// The same.
///
/// # Safety
/// The processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) unsafe fn look_up_avx2(bytes: &[u8; 16], table: &[u8; 16]) -> __m256i {
    // SAFETY: 16 bytes are there; AVX2 is the caller's promise.
    unsafe {
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        _mm256_shuffle_epi8(table, super::nibbles_avx2(bytes))
    }
}
