//! Tiles of 16 rows of weights times many rows of activations: what reading a prompt consists of.
//!
//! A tile is unpacked once, to 8-bit quants with the rows side by side, and multiplied by all rows of
//! activations while it is in the cache: a vector lane per row of weights, four elements of each row
//! in it, which is what the dot-product instructions add up. No sums cross lanes.

use super::activations::{LOW_BITS, TiledView};
use super::dot::dot_portable;
#[cfg(target_arch = "x86_64")]
use super::dot::dot4_avx2;
use super::quant::{Quant, UNIT};
use super::simd::{Level, Set};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Rows of weights in a tile.
pub(super) const ROWS: usize = 16;

/// Rows of activations whose sums are kept at hand: with the activations of one unit they stay in a
/// first-level cache.
const CHUNK: usize = 128;

/// Elements that a 32-bit lane multiplies at once.
const LANE: usize = 4;

/// Sixteen rows of weights, unpacked. Rows that are missing are 0.
#[derive(Default)]
pub(super) struct Tile {
    units: usize,
    /// 16 or 32: elements that share a scale.
    sub: usize,
    /// The greatest quant.
    max: u8,
    /// `[unit][8 groups of 4][row][4]`.
    pub(super) q: Vec<u8>,
    /// `[unit][32 / sub][row]`.
    pub(super) s: Vec<f32>,
    pub(super) m: Vec<f32>,
}

impl Tile {
    /// Makes room for rows of `units` units of a type.
    pub(super) fn resize<Q: Quant>(&mut self, units: usize) {
        (self.units, self.sub, self.max) = (units, Q::SUB, Q::MAX);
        let scales = units * (UNIT / Q::SUB) * ROWS;
        self.q.resize(units * UNIT * ROWS, 0);
        self.s.resize(scales, 0.0);
        self.m.resize(scales, 0.0);
    }
}

/// Unpacks rows of weights, given as the file's bytes, `row_bytes` each, into `tile`.
pub(super) fn unpack<Q: Quant>(level: Level, weights: &[u8], row_bytes: usize, tile: &mut Tile) {
    let rows = weights.len() / row_bytes;
    let units = row_bytes / size_of::<Q>() * (Q::LEN / UNIT);
    assert!(rows <= ROWS && rows * row_bytes == weights.len());
    tile.resize::<Q>(units);
    if rows < ROWS {
        tile.q.fill(0);
        tile.s.fill(0.0);
        tile.m.fill(0.0);
    }
    let weights: &[Q] = bytemuck::cast_slice(weights);
    let blocks = row_bytes / size_of::<Q>();
    match level.0 {
        Set::Portable => {
            for (row, weights) in weights.chunks_exact(blocks).enumerate() {
                unpack_row::<Q>(weights, row, tile, |h| h.to_f32(), Q::quants);
            }
        }
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => {
            for (row, weights) in weights.chunks_exact(blocks).enumerate() {
                // SAFETY: a level of this set exists only after its features were detected.
                unsafe { unpack_row_avx2(weights, row, tile) };
            }
        }
        // SAFETY: as above; the tile's sizes were set above.
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => unsafe {
            if Q::LEN == UNIT {
                unpack_single_avx512(weights, blocks, tile);
            } else {
                unpack_super_avx512(weights, blocks, tile);
            }
        },
    }
}

#[inline(always)]
fn unpack_row<Q: Quant>(
    weights: &[Q],
    row: usize,
    tile: &mut Tile,
    f32_of: impl Fn(gguf::blocks::F16) -> f32 + Copy,
    quants: impl Fn(&Q, usize) -> [u8; UNIT],
) {
    let (mut s, mut m) = ([0.0; 16], [0.0; 16]);
    let subs = Q::LEN / Q::SUB;
    let mut units = tile.q.chunks_exact_mut(UNIT * ROWS);
    for (i, block) in weights.iter().enumerate() {
        block.scales(f32_of, &mut s, &mut m);
        for sub in 0..subs {
            tile.s[(i * subs + sub) * ROWS + row] = s[sub];
            tile.m[(i * subs + sub) * ROWS + row] = m[sub];
        }
        for (unit, out) in (0..Q::LEN / UNIT).zip(&mut units) {
            let q = quants(block, unit);
            for (q, out) in q.chunks_exact(LANE).zip(out.chunks_exact_mut(LANE * ROWS)) {
                out[row * LANE..(row + 1) * LANE].copy_from_slice(q);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) unsafe fn bytes_of(v: __m256i) -> [u8; UNIT] {
    // SAFETY: both are 32 bytes without padding.
    unsafe { std::mem::transmute::<__m256i, [u8; UNIT]>(v) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack_row_avx2<Q: Quant>(weights: &[Q], row: usize, tile: &mut Tile) {
    // SAFETY: the features are the caller's promise.
    unpack_row(
        weights,
        row,
        tile,
        |h| unsafe { super::dot::half_f16c(h) },
        |block, unit| unsafe { bytes_of(block.quants_avx2(unit)) },
    );
}

/// Types with one unit a block: two blocks of each row fill a vector.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn unpack_single_avx512<Q: Quant>(weights: &[Q], blocks: usize, tile: &mut Tile) {
    let rows = weights.len() / blocks;
    // SAFETY: `unpack` made the tile large enough for all blocks; the features are the caller's
    // promise.
    unsafe {
        let mut q = [_mm512_setzero_si512(); ROWS];
        for at in (0..blocks).step_by(2) {
            let left = blocks - at;
            prefetch_tile(weights, at * ROWS, 2 * ROWS);
            for (row, q) in q.iter_mut().enumerate().take(rows) {
                let first = weights.as_ptr().add(row * blocks + at);
                let (values, s, m) = if left == 1 {
                    Q::pair_avx512::<1>(first)
                } else if left * size_of::<Q>() < 64 {
                    Q::pair_avx512::<2>(first)
                } else {
                    Q::pair_avx512::<4>(first)
                };
                *q = values;
                let m = if Q::OFFSET == 0.0 {
                    m
                } else {
                    _mm512_mul_ps(s, _mm512_set1_ps(-Q::OFFSET))
                };
                for (to, v) in [(&mut tile.s, s), (&mut tile.m, m)] {
                    let to = to.as_mut_ptr().add(at * ROWS + row);
                    *to = _mm512_cvtss_f32(v);
                    if left > 1 {
                        *to.add(ROWS) = _mm256_cvtss_f32(_mm512_extractf32x8_ps::<1>(v));
                    }
                }
            }
            let to = tile.q.as_mut_ptr().add(at * UNIT * ROWS);
            if left > 1 {
                transpose_avx512(&q, to.cast());
            } else {
                let mut groups = [_mm512_setzero_si512(); 16];
                transpose_avx512(&q, groups.as_mut_ptr());
                to.copy_from_nonoverlapping(groups.as_ptr().cast(), UNIT * ROWS);
            }
        }
    }
}

/// Types with eight units a block.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn unpack_super_avx512<Q: Quant>(weights: &[Q], blocks: usize, tile: &mut Tile) {
    let rows = weights.len() / blocks;
    let subs = Q::LEN / Q::SUB;
    // SAFETY: `unpack` made the tile large enough for all blocks; the features are the caller's
    // promise.
    unsafe {
        let mut s = [_mm512_setzero_si512(); ROWS];
        let (mut m, mut q) = (s, s);
        for at in 0..blocks {
            prefetch_tile(weights, at * ROWS, ROWS);
            for row in 0..rows {
                let (s_row, m_row) = weights.get_unchecked(row * blocks + at).scales_avx512();
                (s[row], m[row]) = (_mm512_castps_si512(s_row), _mm512_castps_si512(m_row));
            }
            for (to, v) in [(&mut tile.s, &s), (&mut tile.m, &m)] {
                let to = to.as_mut_ptr().add(at * subs * ROWS);
                if subs == 16 {
                    transpose_avx512(v, to.cast());
                } else {
                    let mut lanes = [_mm512_setzero_si512(); 16];
                    transpose_avx512(v, lanes.as_mut_ptr());
                    to.copy_from_nonoverlapping(lanes.as_ptr().cast(), subs * ROWS);
                }
            }
            for pair in 0..Q::LEN / UNIT / 2 {
                for (row, q) in q.iter_mut().enumerate().take(rows) {
                    *q = weights.get_unchecked(row * blocks + at).units_avx512(pair);
                }
                let to = tile
                    .q
                    .as_mut_ptr()
                    .add((at * Q::LEN + pair * 2 * UNIT) * ROWS);
                transpose_avx512(&q, to.cast());
            }
        }
    }
}

/// Fetches what the next tile will have in the place of these blocks of this one: rows side by side
/// do not look like one stream to the processor.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn prefetch_tile<Q>(weights: &[Q], at: usize, blocks: usize) {
    let next = weights.as_ptr_range().end.wrapping_add(at).cast::<i8>();
    for line in 0..(blocks * size_of::<Q>()).div_ceil(64) {
        // SAFETY: a prefetch reads nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(64 * line)) };
    }
}

/// Writes vectors so that lane `i` of vector `j` becomes lane `j` of the vector `i` that is written.
///
/// The steps are spelled out: as loops over arrays they end up in memory.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transpose_avx512(v: &[__m512i; 16], to: *mut __m512i) {
    macro_rules! each {
        ($step:ident: $($i:literal)*) => { [$($step!($i)),*] };
        ($step:ident) => { each!($step: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
    }
    // SAFETY: AVX-512, and room for sixteen vectors, are the caller's promise.
    unsafe {
        // 2 by 2 lanes, then 4 by 4, inside each quarter of the vectors.
        macro_rules! pair {
            ($i:literal) => {
                if $i % 2 == 0 {
                    _mm512_unpacklo_epi32(v[$i / 2 * 2], v[$i / 2 * 2 + 1])
                } else {
                    _mm512_unpackhi_epi32(v[$i / 2 * 2], v[$i / 2 * 2 + 1])
                }
            };
        }
        let pairs = each!(pair);
        macro_rules! quad {
            ($i:literal) => {{
                const AT: usize = $i / 4 * 4 + $i % 4 / 2;
                if $i % 2 == 0 {
                    _mm512_unpacklo_epi64(pairs[AT], pairs[AT + 2])
                } else {
                    _mm512_unpackhi_epi64(pairs[AT], pairs[AT + 2])
                }
            }};
        }
        let quads = each!(quad);
        // Quarter p of quads[4 * k + i] holds lane 4 * p + i of vectors 4 * k to 4 * k + 3: now the
        // quarters change places.
        macro_rules! half {
            ($i:literal) => {{
                const AT: usize = $i / 8 * 8 + $i % 4;
                const SELECT: i32 = if $i / 4 % 2 == 0 { 0x88 } else { 0xdd };
                _mm512_shuffle_i32x4::<SELECT>(quads[AT], quads[AT + 4])
            }};
        }
        // halves[8 * k + 4 * p + i]: quarters p and p + 2 of vectors 8 * k to 8 * k + 7.
        let halves = each!(half);
        macro_rules! store {
            ($i:literal) => {{
                const AT: usize = 4 * ($i / 4 % 2) + $i % 4;
                const SELECT: i32 = if $i / 8 == 0 { 0x88 } else { 0xdd };
                let whole = _mm512_shuffle_i32x4::<SELECT>(halves[AT], halves[8 + AT]);
                _mm512_storeu_si512(to.add($i), whole)
            }};
        }
        each!(store);
    }
}

/// Multiplies the tile by every row of `x`; `out[row]` are that row's sixteen products.
///
/// # Panics
/// The columns differ, or `out` is not as long as there are rows.
pub(super) fn multiply(level: Level, tile: &Tile, x: &TiledView<'_>, out: &mut [[f32; ROWS]]) {
    assert!(tile.units == x.units && out.len() == x.rows);
    assert!(tile.q.len() == tile.units * UNIT * ROWS);
    assert!(x.high.len() == x.units * x.rows * UNIT && x.low.len() == x.high.len());
    assert!(tile.s.len() == tile.units * (UNIT / tile.sub) * ROWS && tile.m.len() == tile.s.len());
    assert!(x.d.len() == x.units * x.rows && x.sums.len() == x.d.len());
    assert!(x.half_sums.len() == 2 * x.d.len());
    for (chunk, out) in out.chunks_mut(CHUNK).enumerate() {
        out.fill([0.0; ROWS]);
        let first = chunk * CHUNK;
        match level.0 {
            Set::Portable => portable(tile, x, first, out),
            // SAFETY: a level of this set exists only after its features were detected; the lengths
            // were checked above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe {
                if tile.sub == UNIT {
                    avx2::<1>(tile, x, first, out)
                } else {
                    avx2::<2>(tile, x, first, out)
                }
            },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe {
                if tile.sub == UNIT {
                    avx512::<1>(tile, x, first, out)
                } else {
                    avx512::<2>(tile, x, first, out)
                }
            },
        }
    }
}

fn portable(tile: &Tile, x: &TiledView<'_>, first: usize, out: &mut [[f32; ROWS]]) {
    let subs = UNIT / tile.sub;
    for unit in 0..tile.units {
        for (row, out) in out.iter_mut().enumerate() {
            let at = unit * x.rows + first + row;
            for sub in 0..subs {
                let mut sums = [0i32; ROWS];
                for lane in 0..tile.sub / LANE {
                    let group = sub * (tile.sub / LANE) + lane;
                    let high = &x.high[at * UNIT + group * LANE..][..LANE];
                    let low = &x.low[at * UNIT + group * LANE..][..LANE];
                    let q = &tile.q[(unit * (UNIT / LANE) + group) * ROWS * LANE..][..ROWS * LANE];
                    for (sum, q) in sums.iter_mut().zip(q.chunks_exact(LANE)) {
                        *sum += dot_portable(q, high, low);
                    }
                }
                let x_sum = if subs == 1 {
                    x.sums[at]
                } else {
                    x.half_sums[2 * at + sub]
                };
                let scales = (unit * subs + sub) * ROWS;
                for (i, out) in out.iter_mut().enumerate() {
                    *out += tile.s[scales + i] * (x.d[at] * sums[i] as f32)
                        + tile.m[scales + i] * x_sum;
                }
            }
        }
    }
}

/// `SUBS` scales per unit.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<const SUBS: usize>(
    tile: &Tile,
    x: &TiledView<'_>,
    first: usize,
    out: &mut [[f32; ROWS]],
) {
    const GROUPS: usize = UNIT / LANE;
    // SAFETY: `multiply` checked the lengths, and the level the features.
    unsafe {
        for unit in 0..tile.units {
            for half in 0..2 {
                let q: [__m256i; GROUPS] = std::array::from_fn(|g| {
                    let at = ((unit * GROUPS + g) * ROWS + half * 8) * LANE;
                    _mm256_loadu_si256(tile.q.as_ptr().add(at).cast())
                });
                let scale = |v: &[f32], sub: usize| {
                    _mm256_loadu_ps(v.as_ptr().add((unit * SUBS + sub) * ROWS + half * 8))
                };
                let s: [__m256; SUBS] = std::array::from_fn(|sub| scale(&tile.s, sub));
                let m: [__m256; SUBS] = std::array::from_fn(|sub| scale(&tile.m, sub));
                for (row, out) in out.iter_mut().enumerate() {
                    let at = unit * x.rows + first + row;
                    let out = out.as_mut_ptr().add(half * 8);
                    let mut acc = _mm256_loadu_ps(out);
                    let d = _mm256_set1_ps(*x.d.get_unchecked(at));
                    for sub in 0..SUBS {
                        let mut sums = _mm256_setzero_si256();
                        for g in sub * (GROUPS / SUBS)..(sub + 1) * (GROUPS / SUBS) {
                            let four = |x: &[i8]| {
                                let x = x.as_ptr().add(at * UNIT + g * LANE).cast::<i32>();
                                _mm256_set1_epi32(x.read_unaligned())
                            };
                            let products = dot4_avx2(tile.max, q[g], four(x.high), four(x.low));
                            sums = _mm256_add_epi32(sums, products);
                        }
                        let x_sum = if SUBS == 1 {
                            *x.sums.get_unchecked(at)
                        } else {
                            *x.half_sums.get_unchecked(2 * at + sub)
                        };
                        acc = _mm256_fmadd_ps(
                            _mm256_cvtepi32_ps(sums),
                            _mm256_mul_ps(s[sub], d),
                            acc,
                        );
                        acc = _mm256_fmadd_ps(m[sub], _mm256_set1_ps(x_sum), acc);
                    }
                    _mm256_storeu_ps(out, acc);
                }
            }
        }
    }
}

/// `SUBS` scales per unit.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn avx512<const SUBS: usize>(
    tile: &Tile,
    x: &TiledView<'_>,
    first: usize,
    out: &mut [[f32; ROWS]],
) {
    const GROUPS: usize = UNIT / LANE;
    // SAFETY: `multiply` checked the lengths, and the level the features.
    unsafe {
        for unit in 0..tile.units {
            let q: [__m512i; GROUPS] = std::array::from_fn(|g| {
                _mm512_loadu_si512(
                    tile.q
                        .as_ptr()
                        .add((unit * GROUPS + g) * ROWS * LANE)
                        .cast(),
                )
            });
            let scale =
                |v: &[f32], sub: usize| _mm512_loadu_ps(v.as_ptr().add((unit * SUBS + sub) * ROWS));
            let s: [__m512; SUBS] = std::array::from_fn(|sub| scale(&tile.s, sub));
            let m: [__m512; SUBS] = std::array::from_fn(|sub| scale(&tile.m, sub));
            for (row, out) in out.iter_mut().enumerate() {
                let at = unit * x.rows + first + row;
                let mut acc = _mm512_loadu_ps(out.as_ptr());
                let d = _mm512_set1_ps(*x.d.get_unchecked(at));
                for sub in 0..SUBS {
                    // Apart to the end: one after the other, each sum would wait for sixteen before it.
                    let (mut high, mut low) = (_mm512_setzero_si512(), _mm512_setzero_si512());
                    for g in sub * (GROUPS / SUBS)..(sub + 1) * (GROUPS / SUBS) {
                        let four = |x: &[i8]| {
                            let x = x.as_ptr().add(at * UNIT + g * LANE).cast::<i32>();
                            _mm512_set1_epi32(x.read_unaligned())
                        };
                        high = _mm512_dpbusd_epi32(high, q[g], four(x.high));
                        low = _mm512_dpbusd_epi32(low, q[g], four(x.low));
                    }
                    let sums = _mm512_add_epi32(_mm512_slli_epi32::<LOW_BITS>(high), low);
                    let x_sum = if SUBS == 1 {
                        *x.sums.get_unchecked(at)
                    } else {
                        *x.half_sums.get_unchecked(2 * at + sub)
                    };
                    acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(s[sub], d), acc);
                    acc = _mm512_fmadd_ps(m[sub], _mm512_set1_ps(x_sum), acc);
                }
                _mm512_storeu_ps(out.as_mut_ptr(), acc);
            }
        }
    }
}
