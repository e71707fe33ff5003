//! A row of quantised weights times a row of activations: what decoding one token consists of.
//!
//! The weights are read once, as they lie in the file, so these products should run at the speed of
//! memory: about 9 bytes a cycle per core for both cores of a small machine.

use super::activations::{LOW_BITS, RowView};
use super::quant::{Quant, UNIT};
use super::simd::{Level, Set};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// `out[i] = sum(w * x)` for rows of weights, given as the file's bytes, as many as `out` is long.
///
/// # Panics
/// The bytes are no whole number of blocks, or not as many as the activations need.
pub(super) fn dot<Q: Quant>(level: Level, weights: &[u8], x: &RowView<'_>, out: &mut [f32]) {
    let weights: &[Q] = bytemuck::cast_slice(weights);
    let blocks = weights.len() / out.len();
    let units = blocks * (Q::LEN / UNIT);
    assert!(blocks * out.len() == weights.len());
    assert!(x.high.len() == units * UNIT && x.low.len() == x.high.len());
    assert!(x.d.len() == units && x.sums.len() == units);
    assert!(x.half_sums.len() == units * 2);
    assert!(x.lane_d.len() == units * 8 && x.lane_sums.len() == units * 8);
    match level.0 {
        Set::Portable => {
            for (weights, out) in weights.chunks_exact(blocks).zip(out) {
                *out = portable(weights, x);
            }
        }
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => {
            for (weights, out) in weights.chunks_exact(blocks).zip(out) {
                // SAFETY: a level of this set exists only after its features were detected; the
                // lengths were checked above.
                *out = unsafe { avx2(weights, x) };
            }
        }
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe { avx512(weights, blocks, x, out) },
    }
}

fn portable<Q: Quant>(weights: &[Q], x: &RowView<'_>) -> f32 {
    let (mut s, mut m) = ([0.0; 16], [0.0; 16]);
    let mut total = 0.0;
    let units = Q::LEN / UNIT;
    for (i, block) in weights.iter().enumerate() {
        block.scales(|h| h.to_f32(), &mut s, &mut m);
        for unit in 0..units {
            let at = i * units + unit;
            let q = block.quants(unit);
            for (part, q) in q.chunks_exact(Q::SUB).enumerate() {
                let of = at * UNIT + part * Q::SUB..at * UNIT + (part + 1) * Q::SUB;
                let sum = dot_portable(q, &x.high[of.clone()], &x.low[of]);
                let sub = unit * (UNIT / Q::SUB) + part;
                let x_sum = if Q::SUB == UNIT {
                    x.sums[at]
                } else {
                    x.half_sums[2 * at + part]
                };
                total += s[sub] * (x.d[at] * sum as f32) + m[sub] * x_sum;
            }
        }
    }
    total
}

/// The sum of products.
#[inline(always)]
pub(super) fn dot_portable(q: &[u8], high: &[i8], low: &[i8]) -> i32 {
    let dot = |x: &[i8]| -> i32 {
        let products = q.iter().zip(x);
        products.map(|(&q, &x)| i32::from(q) * i32::from(x)).sum()
    };
    (dot(high) << LOW_BITS) + dot(low)
}

/// The half as f32, in one instruction.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) unsafe fn half_f16c(h: gguf::blocks::F16) -> f32 {
    // SAFETY: F16C is the caller's promise.
    unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(h.to_bits())))) }
}

/// Sums of 4 products in each 32-bit lane; `MAX` is the greatest of `q`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) unsafe fn dot4_avx2(max: u8, q: __m256i, high: __m256i, low: __m256i) -> __m256i {
    // SAFETY: AVX2 is the caller's promise.
    unsafe {
        // What adds up the pairs also shifts them.
        let shifted = |pairs| _mm256_madd_epi16(pairs, _mm256_set1_epi16(1 << LOW_BITS));
        let high = if max < 128 {
            // 2 * 127 * 127 fits 16 bits.
            shifted(_mm256_maddubs_epi16(q, high))
        } else {
            // Pairs of products could overflow: multiply |q - 128| and add the offset's part, whose
            // pairs are 2 * 128 * 127 at most.
            let signed = _mm256_xor_si256(q, _mm256_set1_epi8(-128));
            let part =
                _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(high, signed));
            let offset = _mm256_maddubs_epi16(_mm256_set1_epi8(-128), high);
            _mm256_add_epi32(shifted(part), shifted(offset))
        };
        // 2 * 255 * 64 fits too.
        let low = _mm256_madd_epi16(_mm256_maddubs_epi16(q, low), _mm256_set1_epi16(1));
        _mm256_add_epi32(high, low)
    }
}

/// Sums of 4 products in each 32-bit lane.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn dot4_avx512(q: __m512i, high: __m512i, low: __m512i) -> __m512i {
    // SAFETY: AVX-512 is the caller's promise.
    unsafe {
        let high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q, high);
        _mm512_dpbusd_epi32(_mm512_slli_epi32::<LOW_BITS>(high), q, low)
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<Q: Quant>(weights: &[Q], x: &RowView<'_>) -> f32 {
    let (mut s, mut m) = ([0.0; 16], [0.0; 16]);
    let units = Q::LEN / UNIT;
    // SAFETY: `dot` checked the lengths, and the level the features.
    unsafe {
        let mut acc = _mm256_setzero_ps();
        let mut offsets = _mm256_setzero_ps();
        for (i, block) in weights.iter().enumerate() {
            block.scales(|h| half_f16c(h), &mut s, &mut m);
            for unit in 0..units {
                let at = i * units + unit;
                let q = block.quants_avx2(unit);
                let high = _mm256_loadu_si256(x.high.as_ptr().add(at * UNIT).cast());
                let low = _mm256_loadu_si256(x.low.as_ptr().add(at * UNIT).cast());
                let sums = _mm256_cvtepi32_ps(dot4_avx2(Q::MAX, q, high, low));
                let (scale, offset) = if Q::SUB == UNIT {
                    (_mm256_set1_ps(s[unit]), _mm256_set1_ps(m[unit]))
                } else {
                    let two = |v: &[f32; 16]| {
                        _mm256_set_m128(_mm_set1_ps(v[2 * unit + 1]), _mm_set1_ps(v[2 * unit]))
                    };
                    (two(&s), two(&m))
                };
                let scale = _mm256_mul_ps(scale, _mm256_loadu_ps(x.lane_d.as_ptr().add(at * 8)));
                acc = _mm256_fmadd_ps(sums, scale, acc);
                let x_sums = _mm256_loadu_ps(x.lane_sums.as_ptr().add(at * 8));
                offsets = _mm256_fmadd_ps(offset, x_sums, offsets);
            }
        }
        let x = _mm256_add_ps(acc, offsets);
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
    }
}

/// Rows that are multiplied side by side: they share the loads of activations, and while one waits
/// for a sum the others go on.
#[cfg(target_arch = "x86_64")]
const SIDE: usize = 4;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn avx512<Q: Quant>(weights: &[Q], blocks: usize, x: &RowView<'_>, out: &mut [f32]) {
    let mut groups = out.chunks_exact_mut(SIDE);
    let mut weights = weights.chunks_exact(blocks * SIDE);
    // SAFETY: `dot` checked the lengths, and the level the features.
    unsafe {
        for (out, weights) in (&mut groups).zip(&mut weights) {
            let sums = if Q::LEN == UNIT {
                avx512_single::<Q, SIDE>(weights, blocks, x)
            } else {
                avx512_super::<Q, SIDE>(weights, blocks, x)
            };
            out.copy_from_slice(&sums);
        }
        let rest = weights.remainder().chunks_exact(blocks);
        for (out, weights) in groups.into_remainder().iter_mut().zip(rest) {
            [*out] = if Q::LEN == UNIT {
                avx512_single::<Q, 1>(weights, blocks, x)
            } else {
                avx512_super::<Q, 1>(weights, blocks, x)
            };
        }
    }
}

/// Types with one unit a block: two blocks fill a vector.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn avx512_single<Q: Quant, const ROWS: usize>(
    weights: &[Q],
    blocks: usize,
    x: &RowView<'_>,
) -> [f32; ROWS] {
    // SAFETY: `dot` checked the lengths, and the level the features.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); ROWS];
        let mut offsets = [_mm512_setzero_ps(); ROWS];
        let weights = weights.as_ptr();
        let mut at = 0;
        while (blocks - at) * size_of::<Q>() >= 64 && blocks - at >= 2 {
            pair::<Q, ROWS, 4>(weights, blocks, at, x, &mut acc, &mut offsets);
            at += 2;
        }
        while blocks - at >= 2 {
            pair::<Q, ROWS, 2>(weights, blocks, at, x, &mut acc, &mut offsets);
            at += 2;
        }
        if at < blocks {
            pair::<Q, ROWS, 1>(weights, blocks, at, x, &mut acc, &mut offsets);
        }
        std::array::from_fn(|row| total::<Q>(acc[row], offsets[row]))
    }
}

/// How far ahead weights are fetched: what memory delivers in some 200 nanoseconds, about twice the
/// time that it takes to answer.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 4096;

/// Asks for `bytes` bytes from `AHEAD` after `p` on. Rows lie one after another, so that is what will
/// be needed soon, though rows side by side do not look like one stream to the processor.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) unsafe fn prefetch(p: *const u8, bytes: usize) {
    for line in 0..bytes.div_ceil(64) {
        // SAFETY: a prefetch reads nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + 64 * line).cast()) };
    }
}

/// Adds the products of two blocks of each row, or of one if `N` is 1; for `N` see
/// [`Quant::pair_avx512`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn pair<Q: Quant, const ROWS: usize, const N: usize>(
    weights: *const Q,
    blocks: usize,
    at: usize,
    x: &RowView<'_>,
    acc: &mut [__m512; ROWS],
    offsets: &mut [__m512; ROWS],
) {
    // SAFETY: the caller's.
    unsafe {
        let (high, low) = (
            x.high.as_ptr().add(at * UNIT),
            x.low.as_ptr().add(at * UNIT),
        );
        let (high, low, d, x_sums) = if N == 1 {
            (
                _mm512_zextsi256_si512(_mm256_loadu_si256(high.cast())),
                _mm512_zextsi256_si512(_mm256_loadu_si256(low.cast())),
                _mm512_zextps256_ps512(_mm256_loadu_ps(x.lane_d.as_ptr().add(at * 8))),
                _mm512_zextps256_ps512(_mm256_loadu_ps(x.lane_sums.as_ptr().add(at * 8))),
            )
        } else {
            (
                _mm512_loadu_si512(high.cast()),
                _mm512_loadu_si512(low.cast()),
                _mm512_loadu_ps(x.lane_d.as_ptr().add(at * 8)),
                _mm512_loadu_ps(x.lane_sums.as_ptr().add(at * 8)),
            )
        };
        prefetch(weights.add(at * ROWS).cast(), 2 * ROWS * size_of::<Q>());
        for row in 0..ROWS {
            let (q, s, m) = Q::pair_avx512::<N>(weights.add(row * blocks + at));
            let sums = dot4_avx512(q, high, low);
            acc[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(s, d), acc[row]);
            let m = if Q::OFFSET == 0.0 { m } else { s };
            offsets[row] = _mm512_fmadd_ps(m, x_sums, offsets[row]);
        }
    }
}

/// The sum of products, and that of `m * x`, or of `s * x` where [`Quant::OFFSET`] gives `m`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn total<Q: Quant>(acc: __m512, offsets: __m512) -> f32 {
    // SAFETY: AVX-512 is the caller's promise.
    unsafe {
        let factor = if Q::OFFSET == 0.0 { 1.0 } else { -Q::OFFSET };
        _mm512_reduce_add_ps(_mm512_fmadd_ps(offsets, _mm512_set1_ps(factor), acc))
    }
}

/// The lanes of a vector.
#[cfg(target_arch = "x86_64")]
#[repr(align(64))]
struct Lanes([i32; 16]);

/// The sub-block that the products of each lane belong to, for each pair of units in a block: with
/// sub-blocks of 32, then of 16 elements.
#[cfg(target_arch = "x86_64")]
static SUB_BLOCKS: [[Lanes; 4]; 2] = [
    [
        Lanes([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]),
        Lanes([2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]),
        Lanes([4, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5]),
        Lanes([6, 6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7]),
    ],
    [
        Lanes([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]),
        Lanes([4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7]),
        Lanes([8, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 10, 11, 11, 11, 11]),
        Lanes([
            12, 12, 12, 12, 13, 13, 13, 13, 14, 14, 14, 14, 15, 15, 15, 15,
        ]),
    ],
];

/// Types with eight units a block.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn avx512_super<Q: Quant, const ROWS: usize>(
    weights: &[Q],
    blocks: usize,
    x: &RowView<'_>,
) -> [f32; ROWS] {
    const UNITS: usize = 8;
    assert!(Q::LEN == UNITS * UNIT);
    // SAFETY: `dot` checked the lengths, and the level the features.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); ROWS];
        let mut offsets = [_mm512_setzero_ps(); ROWS];
        let twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        for i in 0..blocks {
            let at = i * UNITS;
            let d = _mm512_zextps256_ps512(_mm256_loadu_ps(x.d.as_ptr().add(at)));
            // A lane each for up to 16 sub-blocks.
            let (d, x_sums) = if Q::SUB == UNIT {
                (
                    d,
                    _mm512_zextps256_ps512(_mm256_loadu_ps(x.sums.as_ptr().add(at))),
                )
            } else {
                let x_sums = _mm512_loadu_ps(x.half_sums.as_ptr().add(2 * at));
                (_mm512_permutexvar_ps(twice, d), x_sums)
            };
            let x_q: [(__m512i, __m512i); UNITS / 2] = std::array::from_fn(|pair| {
                let from = (at + 2 * pair) * UNIT;
                (
                    _mm512_loadu_si512(x.high.as_ptr().add(from).cast()),
                    _mm512_loadu_si512(x.low.as_ptr().add(from).cast()),
                )
            });
            prefetch(weights.as_ptr().add(i * ROWS).cast(), ROWS * size_of::<Q>());
            for row in 0..ROWS {
                let block = weights.get_unchecked(row * blocks + i);
                let (s, m) = block.scales_avx512();
                let m = if Q::OFFSET == 0.0 { m } else { s };
                offsets[row] = _mm512_fmadd_ps(m, x_sums, offsets[row]);
                let scale = _mm512_mul_ps(s, d);
                for (pair, (high, low)) in x_q.into_iter().enumerate() {
                    let sums = dot4_avx512(block.units_avx512(pair), high, low);
                    let lanes = &SUB_BLOCKS[usize::from(Q::SUB != UNIT)][pair];
                    let lanes = _mm512_load_si512(lanes.0.as_ptr().cast());
                    let scale = _mm512_permutexvar_ps(lanes, scale);
                    acc[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, acc[row]);
                }
            }
        }
        std::array::from_fn(|row| total::<Q>(acc[row], offsets[row]))
    }
}
