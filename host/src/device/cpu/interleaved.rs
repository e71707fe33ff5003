//! Tiles of 16 rows of weights with the rows side by side, as many bytes as in the file: what
//! decoding reads where the processor has AVX-512.
//!
//! Rows as they lie in the file leave the few elements that share a scale in part of a vector, and
//! sums to be added across its lanes. Here a lane is a row: a vector holds four elements of each of
//! 16 rows, which is what the dot-product instructions add up, 16 scales lie in another, and a third
//! of the instructions do. That leaves the processor waiting for memory alone.
//!
//! Types whose blocks are one unit are laid out so, unit after unit:
//!
//! - 4 bits: vectors 0 to 3, vector `v` with elements `4v..4v + 4` of each row in the low halves of
//!   its bytes, `16 + 4v..` in the high halves;
//! - 5 bits: the same with the low four bits, then a vector whose bit `g` of each byte is the fifth
//!   of elements `4g..4g + 4`;
//! - 8 bits: vectors 0 to 7, vector `g` with elements `4g..4g + 4`, unsigned;
//! - then 16 halves `d`, and 16 halves `m` where the type has a minimum.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use super::activations::LOW_BITS;
use super::activations::RowView;
#[cfg(target_arch = "x86_64")]
use super::dot::prefetch;
use super::gemm::{self, ROWS, Tile};
use super::quant::{Quant, UNIT};
use super::simd::{Level, Set};

/// Bytes of a vector: four elements of each row.
const VECTOR: usize = 4 * ROWS;

/// Vectors of four elements in a unit.
const GROUPS: usize = UNIT / 4;

/// Bytes of 16 halves.
const HALVES: usize = 2 * ROWS;

/// Bits of a quant.
const fn bits<Q: Quant>() -> usize {
    match Q::MAX {
        15 => 4,
        31 => 5,
        _ => 8,
    }
}

/// Halves in a block, which begin it: `d`, and `m` where there is no offset.
const fn halves<Q: Quant>() -> usize {
    if Q::OFFSET == 0.0 { 2 } else { 1 }
}

/// Bytes of a unit's quants.
const fn quant_bytes<Q: Quant>() -> usize {
    bits::<Q>() * VECTOR
}

/// The products of one type.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    /// Lays out up to 16 rows, given as the file's bytes and the bytes of a row; the tile is scratch.
    pub pack: fn(Level, &[u8], usize, &mut Tile, &mut [u8]),
    /// The products of a tile of rows and a row of activations.
    pub dot: fn(Level, &[u8], &RowView<'_>, &mut [f32; ROWS]),
    /// Unpacks a tile.
    pub unpack: fn(Level, &[u8], &mut Tile),
}

/// Whether products at this level read tiles laid out so.
pub(super) fn used_at(level: Level) -> bool {
    match level.0 {
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => true,
        _ => false,
    }
}

/// The products of a type whose blocks are the quants of one unit, a scale and maybe a minimum.
pub(super) const fn kernels<Q: Quant>() -> Option<Kernels> {
    let plain = UNIT * bits::<Q>() / 8 + 2 * halves::<Q>();
    if Q::LEN != UNIT || size_of::<Q>() != plain {
        return None;
    }
    Some(Kernels {
        pack: pack::<Q>,
        dot: dot::<Q>,
        unpack: unpack::<Q>,
    })
}

/// See [`Kernels::pack`]. Rows that are missing become 0.
fn pack<Q: Quant>(level: Level, weights: &[u8], row_bytes: usize, tile: &mut Tile, out: &mut [u8]) {
    assert!(out.len() == row_bytes * ROWS);
    gemm::unpack::<Q>(level, weights, row_bytes, tile);
    let units = out.chunks_exact_mut(size_of::<Q>() * ROWS);
    for (at, (q, out)) in tile.q.chunks_exact(UNIT * ROWS).zip(units).enumerate() {
        let (quants, scales) = out.split_at_mut(quant_bytes::<Q>());
        if bits::<Q>() == 8 {
            quants.copy_from_slice(q);
        } else {
            let (nibbles, fifth) = quants.split_at_mut(GROUPS / 2 * VECTOR);
            let (low, high) = q.split_at(GROUPS / 2 * VECTOR);
            for ((out, low), high) in nibbles.iter_mut().zip(low).zip(high) {
                *out = (low & 0x0f) | (high << 4);
            }
            fifth.fill(0);
            for (group, q) in q.chunks_exact(VECTOR).enumerate() {
                for (out, q) in fifth.iter_mut().zip(q) {
                    *out |= (q >> 4) << group;
                }
            }
        }
        scales.fill(0);
        for (row, weights) in weights.chunks_exact(row_bytes).enumerate() {
            let block = &weights[at * size_of::<Q>()..];
            for half in 0..halves::<Q>() {
                let to = half * HALVES + 2 * row;
                scales[to..to + 2].copy_from_slice(&block[2 * half..2 * half + 2]);
            }
        }
    }
}

/// See [`Kernels::dot`].
///
/// # Panics
/// The level has no such products, or there are not as many activations as a row has weights.
fn dot<Q: Quant>(level: Level, weights: &[u8], x: &RowView<'_>, out: &mut [f32; ROWS]) {
    let units = x.d.len();
    assert!(weights.len() == units * size_of::<Q>() * ROWS);
    assert!(x.high.len() == units * UNIT && x.low.len() == x.high.len());
    assert!(x.sums.len() == units);
    match level.0 {
        // SAFETY: a level of this set exists only after its features were detected; the lengths were
        // checked above.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe { dot_avx512::<Q>(weights, x, out) },
        _ => unreachable!("weights are interleaved for AVX-512 alone"),
    }
}

/// See [`Kernels::unpack`].
///
/// # Panics
/// The level has no such products, or `weights` is no whole number of units.
fn unpack<Q: Quant>(level: Level, weights: &[u8], tile: &mut Tile) {
    let units = weights.len() / (size_of::<Q>() * ROWS);
    assert!(weights.len() == units * size_of::<Q>() * ROWS);
    tile.resize::<Q>(units);
    match level.0 {
        // SAFETY: as above; the tile has room for all units.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe { unpack_avx512::<Q>(weights, tile) },
        _ => unreachable!("weights are interleaved for AVX-512 alone"),
    }
}

/// A unit's quants, four of each row to a vector.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn groups<Q: Quant>(unit: *const u8) -> [__m512i; GROUPS] {
    // SAFETY: the unit is there and AVX-512 is, by the caller's promise.
    unsafe {
        let vector = |i: usize| _mm512_loadu_si512(unit.add(i * VECTOR).cast());
        if bits::<Q>() == 8 {
            return std::array::from_fn(vector);
        }
        let nibble = _mm512_set1_epi8(0x0f);
        let q: [_; GROUPS] = std::array::from_fn(|g| {
            let both = vector(g % 4);
            let half = if g < 4 {
                both
            } else {
                _mm512_srli_epi16::<4>(both)
            };
            _mm512_and_si512(half, nibble)
        });
        if bits::<Q>() == 4 {
            return q;
        }
        // Bit g of each byte to where 16 is.
        let fifth = vector(4);
        let fifths = [
            _mm512_slli_epi16::<4>(fifth),
            _mm512_slli_epi16::<3>(fifth),
            _mm512_slli_epi16::<2>(fifth),
            _mm512_slli_epi16::<1>(fifth),
            fifth,
            _mm512_srli_epi16::<1>(fifth),
            _mm512_srli_epi16::<2>(fifth),
            _mm512_srli_epi16::<3>(fifth),
        ];
        let sixteen = _mm512_set1_epi8(16);
        // q | (fifth & 16).
        std::array::from_fn(|g| _mm512_ternarylogic_epi32::<0xf8>(q[g], fifths[g], sixteen))
    }
}

/// The `at`th halves of a unit's rows as f32.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn scales<Q: Quant>(unit: *const u8, at: usize) -> __m512 {
    // SAFETY: the caller's.
    unsafe {
        let halves = unit.add(quant_bytes::<Q>() + at * HALVES);
        _mm512_cvtph_ps(_mm256_loadu_si256(halves.cast()))
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn dot_avx512<Q: Quant>(weights: &[u8], x: &RowView<'_>, out: &mut [f32; ROWS]) {
    let stride = size_of::<Q>() * ROWS;
    // SAFETY: `dot` checked the lengths, and the level the features.
    unsafe {
        let (mut acc, mut offsets) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for at in 0..x.d.len() {
            let unit = weights.as_ptr().add(at * stride);
            prefetch(unit, stride);
            let q = groups::<Q>(unit);
            let (mut high, mut low) = (_mm512_setzero_si512(), _mm512_setzero_si512());
            for g in 0..GROUPS {
                let four = |x: &[i8]| {
                    let x = x.as_ptr().add(at * UNIT + 4 * g).cast::<i32>();
                    _mm512_set1_epi32(x.read_unaligned())
                };
                high = _mm512_dpbusd_epi32(high, q[g], four(x.high));
                low = _mm512_dpbusd_epi32(low, q[g], four(x.low));
            }
            let sums = _mm512_add_epi32(_mm512_slli_epi32::<LOW_BITS>(high), low);
            let s = scales::<Q>(unit, 0);
            let m = if Q::OFFSET == 0.0 {
                scales::<Q>(unit, 1)
            } else {
                s
            };
            let d = _mm512_set1_ps(*x.d.get_unchecked(at));
            let x_sum = _mm512_set1_ps(*x.sums.get_unchecked(at));
            acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(s, d), acc);
            offsets = _mm512_fmadd_ps(m, x_sum, offsets);
        }
        let factor = if Q::OFFSET == 0.0 { 1.0 } else { -Q::OFFSET };
        let products = _mm512_fmadd_ps(offsets, _mm512_set1_ps(factor), acc);
        _mm512_storeu_ps(out.as_mut_ptr(), products);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn unpack_avx512<Q: Quant>(weights: &[u8], tile: &mut Tile) {
    let stride = size_of::<Q>() * ROWS;
    // SAFETY: `unpack` made the tile large enough; the features are the caller's promise.
    unsafe {
        for at in 0..weights.len() / stride {
            let unit = weights.as_ptr().add(at * stride);
            let to = tile.q.as_mut_ptr().add(at * UNIT * ROWS);
            for (g, q) in groups::<Q>(unit).into_iter().enumerate() {
                _mm512_storeu_si512(to.add(g * VECTOR).cast(), q);
            }
            let s = scales::<Q>(unit, 0);
            let m = if Q::OFFSET == 0.0 {
                scales::<Q>(unit, 1)
            } else {
                _mm512_mul_ps(s, _mm512_set1_ps(-Q::OFFSET))
            };
            _mm512_storeu_ps(tile.s.as_mut_ptr().add(at * ROWS), s);
            _mm512_storeu_ps(tile.m.as_mut_ptr().add(at * ROWS), m);
        }
    }
}
