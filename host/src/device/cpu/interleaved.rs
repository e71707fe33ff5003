//! Tiles of 16 rows of weights with the rows side by side, as many bytes as in the file: what
//! decoding reads where the processor has AVX-512.
//!
//! Rows as they lie in the file leave the few elements that share a scale in part of a vector, and
//! sums to be added across its lanes. Here a lane is a row: a vector holds four elements of each of
//! 16 rows, which is what the dot-product instructions add up, 16 scales lie in another, and a third
//! of the instructions do.
//!
//! A tile is its blocks, one after another; a block is the quants of each unit, then the scales. A
//! unit's vectors, in which byte `4 * row + i` belongs to a row:
//!
//! - 4 bits: vector `v` of four has elements `4v..4v + 4` of each row in the low halves of its
//!   bytes, `16 + 4v..` in the high halves;
//! - 5 bits: the same with the low four bits, then a vector whose bit `g` of each byte is the fifth
//!   of elements `4g..4g + 4`;
//! - 6 bits: the same with the low four bits, then two vectors: bits `2g` and `2g + 1` of the first
//!   are the fifth and sixth of elements `4g..4g + 4`, those of the second of `16 + 4g..`;
//! - 8 bits: vector `g` of eight has elements `4g..4g + 4`, unsigned.
//!
//! For the scales see [`Scales`].

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
use gguf::blocks::scale_min_k4;

/// Bytes of a vector: four elements of each row.
const VECTOR: usize = 4 * ROWS;

/// Vectors of four elements in a unit.
const GROUPS: usize = UNIT / 4;

/// Bytes of 16 halves.
const HALVES: usize = 2 * ROWS;

/// The scales of a block, and how those of 16 rows lie.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Scales {
    /// Halves `d`, or `d` and `m`, which begin the block: 16 of the one, then 16 of the other.
    Halves,
    /// Halves `d` and `dmin` and then 6-bit scales and minimums of eight units (see
    /// [`scale_min_k4`]), which begin the block: 16 and 16 halves; then vectors of 32 bits a row, 4
    /// to a unit: the low bits of the scales, those of the minimums, and of both the high two bits.
    K4,
    /// A signed byte for each 16 elements, and a half `d`, which end the block: 16 bytes for the
    /// first sub-block, and so on, and 16 halves.
    Bytes,
}

/// Bits of a quant.
const fn bits<Q: Quant>() -> usize {
    match Q::MAX {
        15 => 4,
        31 => 5,
        63 => 6,
        _ => 8,
    }
}

/// Bytes of a unit's quants.
const fn quant_bytes<Q: Quant>() -> usize {
    bits::<Q>() * VECTOR
}

/// Units of a block.
const fn units<Q: Quant>() -> usize {
    Q::LEN / UNIT
}

/// Bytes of a block of 16 rows.
const fn block_bytes<Q: Quant>() -> usize {
    size_of::<Q>() * ROWS
}

/// Where in a block its scales are.
const fn scales_at<Q: Quant>() -> usize {
    units::<Q>() * quant_bytes::<Q>()
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

/// The products of a type, if it has a layout here.
pub(super) const fn kernels<Q: Quant>() -> Option<Kernels> {
    if Q::INTERLEAVED.is_none() {
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
    let mut q = tile.q.chunks_exact(UNIT * ROWS);
    for (at, out) in out.chunks_exact_mut(block_bytes::<Q>()).enumerate() {
        let (quants, scales) = out.split_at_mut(scales_at::<Q>());
        for (out, q) in quants.chunks_exact_mut(quant_bytes::<Q>()).zip(&mut q) {
            pack_quants::<Q>(q, out);
        }
        scales.fill(0);
        for (row, weights) in weights.chunks_exact(row_bytes).enumerate() {
            let block = &weights[at * size_of::<Q>()..][..size_of::<Q>()];
            pack_scales::<Q>(block, row, scales);
        }
    }
}

/// A unit of quants, `[group][row][4]`.
fn pack_quants<Q: Quant>(q: &[u8], out: &mut [u8]) {
    if bits::<Q>() == 8 {
        out.copy_from_slice(q);
        return;
    }
    let (nibbles, rest) = out.split_at_mut(GROUPS / 2 * VECTOR);
    let (low, high) = q.split_at(GROUPS / 2 * VECTOR);
    for ((out, low), high) in nibbles.iter_mut().zip(low).zip(high) {
        *out = (low & 0x0f) | (high << 4);
    }
    // The bits above, as many vectors as there are.
    rest.fill(0);
    let above = bits::<Q>() - 4;
    for (group, q) in q.chunks_exact(VECTOR).enumerate() {
        let at = group * above;
        for (out, q) in rest[at / 8 * VECTOR..].iter_mut().zip(q) {
            *out |= (q >> 4) << (at % 8);
        }
    }
}

/// The scales of row `row`'s block among those of 16 rows, which are 0 so far.
fn pack_scales<Q: Quant>(block: &[u8], row: usize, out: &mut [u8]) {
    let half = |out: &mut [u8], at: usize, half: &[u8]| {
        out[at + 2 * row..at + 2 * row + 2].copy_from_slice(half);
    };
    match Q::INTERLEAVED {
        Some(Scales::Halves) => {
            for at in 0..out.len() / HALVES {
                half(out, at * HALVES, &block[2 * at..2 * at + 2]);
            }
        }
        Some(Scales::K4) => {
            half(out, 0, &block[..2]);
            half(out, HALVES, &block[2..4]);
            let mut packed: [u8; 12] = [0; 12];
            packed.copy_from_slice(&block[4..16]);
            let mut lanes = [0u32; 3];
            for unit in 0..units::<Q>() {
                let (s, m) = scale_min_k4(unit, &packed);
                let high = (s >> 4) | (m >> 4 << 2);
                for (lane, bits) in lanes.iter_mut().zip([s & 15, m & 15, high]) {
                    *lane |= u32::from(bits) << (4 * unit);
                }
            }
            for (i, lane) in lanes.iter().enumerate() {
                let at = 2 * HALVES + i * VECTOR + 4 * row;
                out[at..at + 4].copy_from_slice(&lane.to_le_bytes());
            }
        }
        Some(Scales::Bytes) => {
            let subs = Q::LEN / Q::SUB;
            let (scales, d) = block[block.len() - subs - 2..].split_at(subs);
            for (sub, scale) in scales.iter().enumerate() {
                out[sub * ROWS + row] = *scale;
            }
            half(out, subs * ROWS, d);
        }
        None => {}
    }
}

/// See [`Kernels::dot`].
///
/// # Panics
/// The level has no such products, or there are not as many activations as a row has weights.
fn dot<Q: Quant>(level: Level, weights: &[u8], x: &RowView<'_>, out: &mut [f32; ROWS]) {
    let units = weights.len() / block_bytes::<Q>() * units::<Q>();
    assert!(weights.len().is_multiple_of(block_bytes::<Q>()));
    assert!(x.high.len() == units * UNIT && x.low.len() == x.high.len());
    assert!(x.d.len() == units && x.sums.len() == units && x.half_sums.len() == 2 * units);
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
/// The level has no such products, or `weights` is no whole number of blocks.
fn unpack<Q: Quant>(level: Level, weights: &[u8], tile: &mut Tile) {
    assert!(weights.len().is_multiple_of(block_bytes::<Q>()));
    tile.resize::<Q>(weights.len() / block_bytes::<Q>() * units::<Q>());
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
        // The bits above, to where 16 and 32 are.
        let (above, mask) = match bits::<Q>() {
            4 => return q,
            5 => {
                let fifth = vector(4);
                let above = [
                    _mm512_slli_epi16::<4>(fifth),
                    _mm512_slli_epi16::<3>(fifth),
                    _mm512_slli_epi16::<2>(fifth),
                    _mm512_slli_epi16::<1>(fifth),
                    fifth,
                    _mm512_srli_epi16::<1>(fifth),
                    _mm512_srli_epi16::<2>(fifth),
                    _mm512_srli_epi16::<3>(fifth),
                ];
                (above, 0x10)
            }
            _ => {
                let (a, b) = (vector(4), vector(5));
                let above = [
                    _mm512_slli_epi16::<4>(a),
                    _mm512_slli_epi16::<2>(a),
                    a,
                    _mm512_srli_epi16::<2>(a),
                    _mm512_slli_epi16::<4>(b),
                    _mm512_slli_epi16::<2>(b),
                    b,
                    _mm512_srli_epi16::<2>(b),
                ];
                (above, 0x30)
            }
        };
        let mask = _mm512_set1_epi8(mask);
        // q | (above & mask).
        std::array::from_fn(|g| _mm512_ternarylogic_epi32::<0xf8>(q[g], above[g], mask))
    }
}

/// `s` and `m` of sub-block `sub` of 16 rows; `m` means nothing where [`Quant::OFFSET`] gives it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn scales<Q: Quant>(scales: *const u8, sub: usize) -> (__m512, __m512) {
    // SAFETY: the scales are there and AVX-512 is, by the caller's promise.
    unsafe {
        let halves =
            |at: usize| _mm512_cvtph_ps(_mm256_loadu_si256(scales.add(at * HALVES).cast()));
        match Q::INTERLEAVED {
            Some(Scales::K4) => {
                let shift = _mm512_set1_epi32(4 * sub as i32);
                let [s, m, high] = std::array::from_fn(|i| {
                    let lanes = scales.add(2 * HALVES + i * VECTOR);
                    _mm512_srlv_epi32(_mm512_loadu_si512(lanes.cast()), shift)
                });
                let join = |low, high| {
                    let low = _mm512_and_si512(low, _mm512_set1_epi32(0x0f));
                    let six = _mm512_ternarylogic_epi32::<0xf8>(low, high, _mm512_set1_epi32(0x30));
                    _mm512_cvtepi32_ps(six)
                };
                let s = join(s, _mm512_slli_epi32::<4>(high));
                let m = join(m, _mm512_slli_epi32::<2>(high));
                let dmin = _mm512_sub_ps(_mm512_setzero_ps(), halves(1));
                (_mm512_mul_ps(s, halves(0)), _mm512_mul_ps(m, dmin))
            }
            Some(Scales::Bytes) => {
                let s = _mm512_cvtepi8_epi32(_mm_loadu_si128(scales.add(sub * ROWS).cast()));
                let d = halves(Q::LEN / Q::SUB * ROWS / HALVES);
                (_mm512_mul_ps(_mm512_cvtepi32_ps(s), d), d)
            }
            _ => (
                halves(0),
                if Q::OFFSET == 0.0 {
                    halves(1)
                } else {
                    halves(0)
                },
            ),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn dot_avx512<Q: Quant>(weights: &[u8], x: &RowView<'_>, out: &mut [f32; ROWS]) {
    let subs = UNIT / Q::SUB;
    // SAFETY: `dot` checked the lengths, and the level the features.
    unsafe {
        let (mut acc, mut offsets) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for i in 0..weights.len() / block_bytes::<Q>() {
            let block = weights.as_ptr().add(i * block_bytes::<Q>());
            let block_scales = block.add(scales_at::<Q>());
            prefetch(block_scales, block_bytes::<Q>() - scales_at::<Q>());
            for unit in 0..units::<Q>() {
                let at = i * units::<Q>() + unit;
                let quants = block.add(unit * quant_bytes::<Q>());
                prefetch(quants, quant_bytes::<Q>());
                let q = groups::<Q>(quants);
                let d = _mm512_set1_ps(*x.d.get_unchecked(at));
                for sub in 0..subs {
                    let (mut high, mut low) = (_mm512_setzero_si512(), _mm512_setzero_si512());
                    for g in sub * (GROUPS / subs)..(sub + 1) * (GROUPS / subs) {
                        let four = |x: &[i8]| {
                            let x = x.as_ptr().add(at * UNIT + 4 * g).cast::<i32>();
                            _mm512_set1_epi32(x.read_unaligned())
                        };
                        high = _mm512_dpbusd_epi32(high, q[g], four(x.high));
                        low = _mm512_dpbusd_epi32(low, q[g], four(x.low));
                    }
                    let sums = _mm512_add_epi32(_mm512_slli_epi32::<LOW_BITS>(high), low);
                    let (s, m) = scales::<Q>(block_scales, unit * subs + sub);
                    let m = if Q::OFFSET == 0.0 { m } else { s };
                    let x_sum = if subs == 1 {
                        *x.sums.get_unchecked(at)
                    } else {
                        *x.half_sums.get_unchecked(2 * at + sub)
                    };
                    acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(s, d), acc);
                    offsets = _mm512_fmadd_ps(m, _mm512_set1_ps(x_sum), offsets);
                }
            }
        }
        let factor = if Q::OFFSET == 0.0 { 1.0 } else { -Q::OFFSET };
        let products = _mm512_fmadd_ps(offsets, _mm512_set1_ps(factor), acc);
        _mm512_storeu_ps(out.as_mut_ptr(), products);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn unpack_avx512<Q: Quant>(weights: &[u8], tile: &mut Tile) {
    let subs = Q::LEN / Q::SUB;
    // SAFETY: `unpack` made the tile large enough; the features are the caller's promise.
    unsafe {
        for i in 0..weights.len() / block_bytes::<Q>() {
            let block = weights.as_ptr().add(i * block_bytes::<Q>());
            for unit in 0..units::<Q>() {
                let to = tile.q.as_mut_ptr().add((i * Q::LEN + unit * UNIT) * ROWS);
                let q = groups::<Q>(block.add(unit * quant_bytes::<Q>()));
                for (g, q) in q.into_iter().enumerate() {
                    _mm512_storeu_si512(to.add(g * VECTOR).cast(), q);
                }
            }
            for sub in 0..subs {
                let (s, m) = scales::<Q>(block.add(scales_at::<Q>()), sub);
                let m = if Q::OFFSET == 0.0 {
                    m
                } else {
                    _mm512_mul_ps(s, _mm512_set1_ps(-Q::OFFSET))
                };
                let at = (i * subs + sub) * ROWS;
                _mm512_storeu_ps(tile.s.as_mut_ptr().add(at), s);
                _mm512_storeu_ps(tile.m.as_mut_ptr().add(at), m);
            }
        }
    }
}
