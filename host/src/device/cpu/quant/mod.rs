//! Quantised weight types, as the integer products see them.
//!
//! Every type is `w = s * q + m` with unsigned 8-bit `q`, and `s` and `m` constant over sub-blocks of
//! 16 or 32 elements; a symmetric type's offset goes into `m`. A type is one file that says how its
//! blocks unpack to that form, and one line in the list below; the products are written once, in
//! [`super::dot`], [`super::interleaved`] and [`super::gemm`].

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::activations::RowView;
use super::dot;
use super::float;
use super::gemm::{self, Tile};
use super::interleaved::{self, Scales};
use super::simd::Level;
use gguf::GgmlType;
use gguf::blocks::{Block, F16};

mod grid;

/// Elements that are unpacked at once; scales belong to one or two parts of it.
pub(super) const UNIT: usize = 32;

/// A type of weights quantised in blocks.
pub(super) trait Quant: Block {
    /// Elements that share `s` and `m`: 16 or 32.
    const SUB: usize;
    /// The greatest `q`.
    const MAX: u8;
    /// `m` is `-OFFSET * s` throughout, unless this is 0.
    const OFFSET: f32;
    /// How the scales of 16 rows lie side by side; none where the type has no such layout.
    const INTERLEAVED: Option<Scales> = None;

    /// The `q` of unit `unit` (elements `32 * unit` and up) of the block.
    fn quants(&self, unit: usize) -> [u8; UNIT];

    /// `s` and `m` of each sub-block, from the first elements of the arrays on. `f32_of` converts the
    /// halves in the block.
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]);

    /// [`Quant::quants`] with AVX2.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[cfg(target_arch = "x86_64")]
    unsafe fn quants_avx2(&self, unit: usize) -> __m256i;

    /// Two units of a block, `2 * pair` and the next, with AVX-512.
    ///
    /// # Safety
    /// The processor has AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn units_avx512(&self, pair: usize) -> __m512i {
        // SAFETY: AVX-512 includes AVX2.
        unsafe { join_512(self.quants_avx2(2 * pair), self.quants_avx2(2 * pair + 1)) }
    }

    /// [`Quant::scales`] with AVX-512, in lanes; those past the last sub-block are 0.
    ///
    /// # Safety
    /// As above.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn scales_avx512(&self) -> (__m512, __m512) {
        let (mut s, mut m) = ([0.0; 16], [0.0; 16]);
        // SAFETY: the features are the caller's promise.
        unsafe {
            self.scales(|h| dot::half_f16c(h), &mut s, &mut m);
            (_mm512_loadu_ps(s.as_ptr()), _mm512_loadu_ps(m.as_ptr()))
        }
    }

    /// Of a type with one unit a block, two blocks with AVX-512: `q`, and `s` and `m` of the first
    /// block in lanes 0 to 7, of the second in lanes 8 to 15. `N` blocks may be read: from 3 on, that
    /// is 64 bytes or more; with 1 there is no second block, and its `s` and `m` are 0. A type with an
    /// [`Quant::OFFSET`] may leave out `m`.
    ///
    /// # Safety
    /// As above; the blocks are there, for an `N` above 2 at least 64 bytes.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn pair_avx512<const N: usize>(blocks: *const Self) -> (__m512i, __m512, __m512) {
        // SAFETY: the caller's.
        unsafe {
            let first = &*blocks;
            let (s, m) = first.scales_avx512();
            let (s, m) = (
                _mm512_broadcastss_ps(_mm512_castps512_ps128(s)),
                _mm512_broadcastss_ps(_mm512_castps512_ps128(m)),
            );
            if N == 1 {
                let q = _mm512_zextsi256_si512(first.quants_avx2(0));
                return (
                    q,
                    _mm512_maskz_mov_ps(0x00ff, s),
                    _mm512_maskz_mov_ps(0x00ff, m),
                );
            }
            let second = &*blocks.add(1);
            let (s1, m1) = second.scales_avx512();
            let q = join_512(first.quants_avx2(0), second.quants_avx2(0));
            let upper = |low, v| _mm512_mask_broadcastss_ps(low, 0xff00, _mm512_castps512_ps128(v));
            (q, upper(s, s1), upper(m, m1))
        }
    }
}

/// The products of one type at one level.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    /// The products of rows of weights, given as the file's bytes, and a row of activations.
    pub dot: fn(Level, &[u8], &RowView<'_>, &mut [f32]),
    /// Unpacks up to [`gemm::ROWS`] rows, given as the file's bytes and the bytes of a row.
    pub unpack: fn(Level, &[u8], usize, &mut Tile),
    /// Writes a row of weights, given as the file's bytes, as f32.
    pub to_f32: fn(Level, &[u8], &mut [f32]),
    /// Those of rows that lie side by side, if the type has that layout.
    pub interleaved: Option<interleaved::Kernels>,
}

macro_rules! types {
    ($($(#[$doc:meta])* $module:ident::$block:ident,)*) => {
        $(mod $module;)*

        /// The products for a type; none if it is not a quantised type known here.
        pub(super) fn kernels(ty: GgmlType) -> Option<Kernels> {
            $(
                if ty == <gguf::blocks::$block as Block>::TYPE {
                    return Some(Kernels {
                        dot: dot::dot::<gguf::blocks::$block>,
                        unpack: gemm::unpack::<gguf::blocks::$block>,
                        to_f32: float::quant_to_f32::<gguf::blocks::$block>,
                        interleaved: interleaved::kernels::<gguf::blocks::$block>(),
                    });
                }
            )*
            None
        }

        /// Calls the macro with each type.
        #[cfg(test)]
        pub(super) const TYPES: &[GgmlType] = &[$(<gguf::blocks::$block as Block>::TYPE),*];
    };
}

types! {
    q4_0::Q4_0,
    q4_1::Q4_1,
    q5_0::Q5_0,
    q5_1::Q5_1,
    q8_0::Q8_0,
    q2_k::Q2K,
    q3_k::Q3K,
    q4_k::Q4K,
    q5_k::Q5K,
    q6_k::Q6K,
    iq1_s::Iq1S,
    iq1_m::Iq1M,
    iq2_xxs::Iq2Xxs,
    iq2_xs::Iq2Xs,
    iq2_s::Iq2S,
    iq3_xxs::Iq3Xxs,
    iq3_s::Iq3S,
    iq4_nl::Iq4Nl,
    iq4_xs::Iq4Xs,
    tq1_0::Tq1_0,
    tq2_0::Tq2_0,
    mxfp4::Mxfp4,
}

/// The halves of 16 bytes: low halves first.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn nibbles_avx2(bytes: &[u8; 16]) -> __m256i {
    // SAFETY: 16 bytes are there; AVX2 is the caller's promise.
    unsafe {
        let packed = _mm_loadu_si128(bytes.as_ptr().cast());
        let both = _mm256_set_m128i(_mm_srli_epi16::<4>(packed), packed);
        _mm256_and_si256(both, _mm256_set1_epi8(0x0f))
    }
}

/// `bit` in each byte whose bit of `mask` is set, else 0.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn spread_bits_avx2(mask: u32, bit: i8) -> __m256i {
    // SAFETY: AVX2 is the caller's promise.
    unsafe {
        let all = _mm256_set1_epi32(mask as i32);
        // Byte i of the result looks at byte i / 8 of the mask.
        let byte = _mm256_setr_epi64x(
            0,
            0x0101_0101_0101_0101,
            0x0202_0202_0202_0202,
            0x0303_0303_0303_0303,
        );
        let spread = _mm256_shuffle_epi8(all, byte);
        let select = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, select), select);
        _mm256_and_si256(set, _mm256_set1_epi8(bit))
    }
}

/// 32 bytes shifted right by `shift` bits, then masked, as 8-bit lanes.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn field_avx2(bytes: &[u8], shift: usize, mask: u8) -> __m256i {
    let bytes = &bytes[..32];
    // SAFETY: 32 bytes are there; AVX2 is the caller's promise.
    unsafe {
        let all = _mm256_loadu_si256(bytes.as_ptr().cast());
        let shifted = _mm256_srl_epi16(all, _mm_cvtsi32_si128(shift as i32));
        _mm256_and_si256(shifted, _mm256_set1_epi8(mask as i8))
    }
}

/// The portable twin of [`field_avx2`].
#[inline(always)]
fn field(bytes: &[u8], shift: usize, mask: u8) -> [u8; UNIT] {
    let bytes = &bytes[..UNIT];
    std::array::from_fn(|i| (bytes[i] >> shift) & mask)
}

/// `a | b << shift`, byte by byte.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn join_avx2(a: __m256i, b: __m256i, shift: i32) -> __m256i {
    // SAFETY: AVX2 is the caller's promise. `b` is small enough to stay inside its bytes.
    unsafe { _mm256_or_si256(a, _mm256_sll_epi16(b, _mm_cvtsi32_si128(shift))) }
}

/// Two halves of a vector.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn join_512(low: __m256i, high: __m256i) -> __m512i {
    // SAFETY: AVX-512 is the caller's promise.
    unsafe { _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high) }
}

/// The bytes of one or two blocks of a type with one unit a block; see [`Quant::pair_avx512`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn pair_bytes_avx512<Q: Quant, const N: usize>(blocks: *const Q) -> __m512i {
    // SAFETY: the blocks, or 64 bytes, are there and AVX-512 is, by the caller's promise.
    unsafe {
        if N > 2 {
            // Processors fetch ahead of these, but not of loads with a mask.
            return _mm512_loadu_si512(blocks.cast());
        }
        let bytes = (N * size_of::<Q>()).min(64);
        _mm512_maskz_loadu_epi8(u64::MAX >> (64 - bytes), blocks.cast())
    }
}

/// Word `at` of a pair of blocks in lanes 0 to 7, the same word of the second block in lanes 8 to
/// 15, as f32.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn pair_halves_avx512<Q: Quant>(bytes: __m512i, at: usize) -> __m512 {
    let (a, b) = (at as i16, (at + size_of::<Q>() / 2) as i16);
    // SAFETY: AVX-512 is the caller's promise.
    unsafe {
        let words = _mm512_castsi256_si512(_mm256_setr_epi16(
            a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b,
        ));
        let words = _mm512_permutexvar_epi16(words, bytes);
        _mm512_cvtph_ps(_mm512_castsi512_si256(words))
    }
}

/// The words of a vector.
#[repr(align(64))]
struct Words([i16; 32]);

/// 0 for the low half of each byte, 4 for the high one, eight words each.
static NIBBLE_SHIFTS: Words = Words([
    0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4,
]);

/// The low halves, then the high halves, of the 16 bytes from word `AT` on, of both blocks.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn pair_nibbles_avx512<Q: Quant, const AT: usize>(bytes: __m512i) -> __m512i {
    // Constants, so that they do not depend on what the optimiser sees through.
    let words = const {
        let mut words = [0i16; 32];
        let mut i = 0;
        while i < 32 {
            words[i] = (AT + i % 8 + i / 16 * (size_of::<Q>() / 2)) as i16;
            i += 1;
        }
        &Words(words)
    };
    // SAFETY: AVX-512 is the caller's promise.
    unsafe {
        let words = _mm512_load_si512(words.0.as_ptr().cast());
        let shifts = _mm512_load_si512(NIBBLE_SHIFTS.0.as_ptr().cast());
        let shifted = _mm512_srlv_epi16(_mm512_permutexvar_epi16(words, bytes), shifts);
        _mm512_and_si512(shifted, _mm512_set1_epi8(0x0f))
    }
}

/// Adds 16 to the elements whose bits are set in the masks of both blocks.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn pair_fifth_bits_avx512(q: __m512i, first: [u8; 4], second: [u8; 4]) -> __m512i {
    let mask = u64::from(u32::from_le_bytes(first)) | u64::from(u32::from_le_bytes(second)) << 32;
    // SAFETY: AVX-512 is the caller's promise.
    unsafe { _mm512_mask_add_epi8(q, mask, q, _mm512_set1_epi8(16)) }
}

/// 32 bytes twice, shifted right by `first` and by `second` bits, then masked.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn fields_avx512(bytes: &[u8], first: i16, second: i16, mask: u8) -> __m512i {
    let bytes = &bytes[..32];
    // SAFETY: 32 bytes are there; AVX-512 is the caller's promise.
    unsafe {
        let both = _mm512_broadcast_i64x4(_mm256_loadu_si256(bytes.as_ptr().cast()));
        let shifts = join_512(_mm256_set1_epi16(first), _mm256_set1_epi16(second));
        _mm512_and_si512(
            _mm512_srlv_epi16(both, shifts),
            _mm512_set1_epi8(mask as i8),
        )
    }
}

/// Scales and minimums of Q4_K and Q5_K, times their scales; see [`gguf::blocks::scale_min_k4`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn scales_k4_avx512(scales: &[u8; 12], d: F16, dmin: F16) -> (__m512, __m512) {
    let word =
        |i: usize| u32::from_le_bytes([scales[i], scales[i + 1], scales[i + 2], scales[i + 3]]);
    let (a, b, c) = (word(0), word(4), word(8));
    // Four 6-bit numbers each: scales 0 to 3, 4 to 7, minimums 0 to 3, 4 to 7.
    let scales = [
        a & 0x3f3f_3f3f,
        (c & 0x0f0f_0f0f) | ((a >> 2) & 0x3030_3030),
        b & 0x3f3f_3f3f,
        ((c >> 4) & 0x0f0f_0f0f) | ((b >> 2) & 0x3030_3030),
    ];
    // SAFETY: AVX-512 is the caller's promise.
    unsafe {
        let both = |low: u32, high: u32| {
            let bytes = _mm_cvtsi64_si128(i64::from(low) | i64::from(high) << 32);
            _mm512_zextps256_ps512(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)))
        };
        let d = _mm512_set1_ps(dot::half_f16c(d));
        let dmin = _mm512_set1_ps(-dot::half_f16c(dmin));
        let s = _mm512_mul_ps(both(scales[0], scales[1]), d);
        (s, _mm512_mul_ps(both(scales[2], scales[3]), dmin))
    }
}
