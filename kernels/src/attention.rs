//! Attention over the paged cache, one query row at a time, its tokens split over blocks.
//!
//! A warp serves one query head of one row over one split of the tokens. Its lanes form teams of just
//! enough lanes to hold a head, eight elements each; each team walks its own tokens with a running
//! softmax (arXiv:2205.14135), and the teams merge at the end. [`attend_combine`] merges the splits.
//!
//! Sums depend on where tokens are split. Rows of several sequences are therefore split by their own numbers of tokens
//! ([`own_split`]): what comes of a row does not depend on the others.

use crate::rows::{BLOCK_TOKENS, CacheLayer, Step, q8_row_bytes, soft_cap};
use crate::unrolled;
use cuda_std::half::F16;
use cuda_std::memory::{ld_v2_u32, ld_v4_u32, ldg_f32, ldg_u32};
use cuda_std::thread::{
    block_idx_x, block_idx_y, griddepcontrol_launch_dependents, griddepcontrol_wait, thread_idx_x,
};
use cuda_std::{float, kernel, thread, warp};

/// Threads per block: four warps, four heads.
pub const THREADS: u32 = 128;
const WARPS: usize = THREADS as usize / 32;

/// Most splits of a row's tokens.
pub const MAX_SPLITS: usize = 64;

/// Tokens of a split by a row's own number of tokens, unless that took more than [`MAX_SPLITS`].
const OWN_SPLIT: usize = 128;

/// Tokens of each split of a row that sees `tokens`, whatever other rows there are.
#[inline(always)]
pub const fn own_split(tokens: usize) -> usize {
    let least = tokens.div_ceil(MAX_SPLITS);
    if least > OWN_SPLIT { least } else { OWN_SPLIT }
}

/// Most splits of [`own_split`] tokens each that a row can have which sees no more than `tokens`.
pub const fn most_own_splits(tokens: usize) -> usize {
    let splits = tokens.div_ceil(OWN_SPLIT);
    if splits < MAX_SPLITS {
        splits
    } else {
        MAX_SPLITS
    }
}

/// Tokens a team loads before it computes, so that their loads overlap.
const UNROLL: usize = 4;

/// What models vary in attention.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Variant {
    /// A row at position `p` sees positions above `p - window`; 0 for all.
    pub window: u32,
    /// Scores `s` become `cap * tanh(s / cap)`; 0 for as they are.
    pub soft_cap: f32,
    /// f32 `[heads]`, scores that take part in the softmax and have no value; or null.
    pub sinks: *const f32,
}

impl Variant {
    pub const NONE: Variant = Variant {
        window: 0,
        soft_cap: 0.0,
        sinks: core::ptr::null(),
    };

    /// The first position that a row at `position` sees.
    #[inline(always)]
    pub fn first(&self, position: usize) -> usize {
        let window = self.window as usize;
        if window == 0 || position < window {
            0
        } else {
            position + 1 - window
        }
    }

    /// The sink of a head, in units of log2; [`NONE`] without sinks.
    #[inline(always)]
    pub unsafe fn sink(&self, head: usize) -> f32 {
        if self.sinks.is_null() {
            NONE
        } else {
            unsafe { ldg_f32(self.sinks.add(head)) * LOG2_E }
        }
    }
}

/// Arguments of the attention kernels.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AttendArgs {
    /// f32 `[rows][heads * head_dim]`.
    pub q: *const f32,
    pub cache: CacheLayer,
    pub step: Step,
    pub heads: u32,
    /// Splits of each row's tokens; with `own`, [`most_own_splits`] of the row that sees most.
    pub splits: u32,
    /// Whether rows are split by their own numbers of tokens ([`own_split`]).
    pub own: u32,
    /// Multiplies the scores.
    pub scale: f32,
    pub variant: Variant,
    /// f32 `[rows][heads * head_dim]`, written where a row has one split.
    pub out: *mut f32,
    /// f32 `[rows][heads][splits][head_dim + 2]` otherwise: unnormalised sums, then peak and mass.
    pub partial: *mut f32,
}

impl AttendArgs {
    /// Splits of a row that sees `tokens`, and the tokens of each.
    #[inline(always)]
    pub(crate) fn split(&self, tokens: usize) -> (usize, usize) {
        if self.own != 0 {
            let own = own_split(tokens);
            (tokens.div_ceil(own), own)
        } else {
            let splits = self.splits as usize;
            (splits, tokens.div_ceil(splits))
        }
    }
}

/// Elements of the cache, eight at a time. This launch may have written them.
pub trait LoadEight {
    /// As they lie in memory: what waits for its use takes as few registers as can be.
    type Raw: Copy;
    const ZERO: Self::Raw;

    /// Elements `element ..`, a multiple of eight, of row `row` of `head_dim` elements.
    unsafe fn load_eight(base: *const u8, row: usize, head_dim: usize, element: usize)
    -> Self::Raw;

    fn unpack_eight(raw: Self::Raw) -> [f32; 8];
}

impl LoadEight for u16 {
    type Raw = [u32; 4];
    const ZERO: [u32; 4] = [0; 4];

    #[inline(always)]
    unsafe fn load_eight(base: *const u8, row: usize, head_dim: usize, element: usize) -> [u32; 4] {
        unsafe { ld_v4_u32(base.add((row * head_dim + element) * 2)) }
    }

    #[inline(always)]
    fn unpack_eight(raw: [u32; 4]) -> [f32; 8] {
        unrolled!(8, |k| F16::from_bits((raw[k / 2] >> (16 * (k % 2))) as u16)
            .to_f32())
    }
}

impl LoadEight for f32 {
    type Raw = [u32; 8];
    const ZERO: [u32; 8] = [0; 8];

    #[inline(always)]
    unsafe fn load_eight(base: *const u8, row: usize, head_dim: usize, element: usize) -> [u32; 8] {
        let base = base.cast::<f32>().wrapping_add(row * head_dim + element);
        let (a, b) = unsafe { (ld_v4_u32(base), ld_v4_u32(base.add(4))) };
        unrolled!(8, |k| if k < 4 { a[k] } else { b[k - 4] })
    }

    #[inline(always)]
    fn unpack_eight(raw: [u32; 8]) -> [f32; 8] {
        unrolled!(8, |k| f32::from_bits(raw[k]))
    }
}

/// A cache of 8 bits; see [`q8_row_bytes`].
pub enum Q8 {}

impl LoadEight for Q8 {
    /// Integers, and the scale's bits.
    type Raw = ([u32; 2], u16);
    const ZERO: Self::Raw = ([0; 2], 0);

    #[inline(always)]
    unsafe fn load_eight(
        base: *const u8,
        row: usize,
        head_dim: usize,
        element: usize,
    ) -> Self::Raw {
        unsafe {
            let row = base.add(row * q8_row_bytes(head_dim));
            let scale = row.add(head_dim + 2 * (element / 32));
            (ld_v2_u32(row.add(element)), scale.cast::<u16>().read())
        }
    }

    #[inline(always)]
    fn unpack_eight((q, scale): Self::Raw) -> [f32; 8] {
        let d = F16::from_bits(scale).to_f32();
        unrolled!(8, |k| d * f32::from(
            (q[k / 4] >> (8 * (k % 4))) as u8 as i8
        ))
    }
}

pub(crate) const LOG2_E: f32 = core::f32::consts::LOG2_E;

/// Scores are kept in units of log2, so that an exponential is one instruction. "No token yet" is a
/// finite number, so that differences of it never become NaN.
pub const NONE: f32 = -1e30;

/// Attention over some tokens, not yet normalised: `sum / mass` where these are all of them.
#[derive(Clone, Copy)]
pub struct Part {
    /// Elements `8 * lane ..` of the head, in the lanes that have one.
    pub sum: [f32; 8],
    /// The greatest score, in units of log2; [`NONE`] without tokens.
    pub peak: f32,
    pub mass: f32,
}

/// This warp's attention of one query head, at `q`, over tokens `from .. to` of one sequence, whose cache
/// blocks `table` lists.
#[inline(always)]
pub unsafe fn attend_tokens<E: LoadEight>(
    q: *const f32,
    cache: &CacheLayer,
    table: *const u32,
    kv_head: usize,
    scale: f32,
    from: usize,
    to: usize,
) -> Part {
    unsafe { attend_capped::<E, false>(q, cache, table, kv_head, (scale, 0.0), from, to) }
}

/// [`attend_tokens`] with scores `s` made `cap * tanh(s / cap)` if `CAPPED`.
#[inline(always)]
unsafe fn attend_capped<E: LoadEight, const CAPPED: bool>(
    q: *const f32,
    cache: &CacheLayer,
    table: *const u32,
    kv_head: usize,
    (scale, cap): (f32, f32),
    from: usize,
    to: usize,
) -> Part {
    let head_dim = cache.head_dim as usize;
    let kv_heads = cache.kv_heads as usize;
    let lane = thread::lane_id() as usize;
    let team_lanes = head_dim.div_ceil(8).next_power_of_two();
    let teams = 32 / team_lanes;
    let (team, member) = (lane / team_lanes, lane % team_lanes);
    let element = member * 8;
    let active = element < head_dim;
    let (mut peak, mut mass, mut sum) = (NONE, 0.0f32, [0.0f32; 8]);
    unsafe {
        let mut scaled = [0.0; 8];
        if active {
            let (x, y) = (ld_v4_u32(q.add(element)), ld_v4_u32(q.add(element + 4)));
            for k in 0..4 {
                scaled[k] = f32::from_bits(x[k]) * (scale * LOG2_E);
                scaled[k + 4] = f32::from_bits(y[k]) * (scale * LOG2_E);
            }
        }
        let mut base = from;
        // Every lane takes every turn, for the shuffles; a team past the end has nothing to add.
        while base < to {
            let mut keys = [E::ZERO; UNROLL];
            let mut values = [E::ZERO; UNROLL];
            for u in 0..UNROLL {
                let token = base + u * teams + team;
                if active && token < to {
                    let block = ldg_u32(table.add(token / BLOCK_TOKENS)) as usize;
                    let at = (block * kv_heads + kv_head) * BLOCK_TOKENS + token % BLOCK_TOKENS;
                    keys[u] = E::load_eight(cache.keys, at, head_dim, element);
                    values[u] = E::load_eight(cache.values, at, head_dim, element);
                }
            }
            let mut scores = [0.0; UNROLL];
            for u in 0..UNROLL {
                let key = E::unpack_eight(keys[u]);
                for k in 0..8 {
                    scores[u] += scaled[k] * key[k];
                }
            }
            let mut width = 1;
            while width < team_lanes {
                for u in 0..UNROLL {
                    scores[u] += warp::shuffle_xor(scores[u], width as u32);
                }
                width *= 2;
            }
            if CAPPED {
                for u in 0..UNROLL {
                    scores[u] = soft_cap(scores[u] / LOG2_E, cap) * LOG2_E;
                }
            }
            let mut top = peak;
            for u in 0..UNROLL {
                if base + u * teams + team >= to {
                    scores[u] = NONE;
                }
                top = top.max(scores[u]);
            }
            let shrink = float::exp2_approx(peak - top);
            mass *= shrink;
            for k in 0..8 {
                sum[k] *= shrink;
            }
            for u in 0..UNROLL {
                let weight = if scores[u] > NONE {
                    float::exp2_approx(scores[u] - top)
                } else {
                    0.0
                };
                mass += weight;
                let value = E::unpack_eight(values[u]);
                for k in 0..8 {
                    sum[k] += weight * value[k];
                }
            }
            peak = top;
            base += UNROLL * teams;
        }
        let mut width = team_lanes;
        while width < 32 {
            let other = warp::shuffle_xor(peak, width as u32);
            let top = peak.max(other);
            let shrink = float::exp2_approx(peak - top);
            mass *= shrink;
            mass += warp::shuffle_xor(mass, width as u32);
            for k in 0..8 {
                sum[k] *= shrink;
                sum[k] += warp::shuffle_xor(sum[k], width as u32);
            }
            peak = top;
            width *= 2;
        }
    }
    Part { sum, peak, mass }
}

#[inline(always)]
unsafe fn attend<E: LoadEight>(a: &AttendArgs) {
    let heads = a.heads as usize;
    let head_dim = a.cache.head_dim as usize;
    let task = block_idx_x() as usize * WARPS + thread_idx_x() as usize / 32;
    if task >= a.step.rows as usize * heads {
        return;
    }
    let (row, head) = (task / heads, task % heads);
    let kv_head = head / (heads / a.cache.kv_heads as usize);
    let split = block_idx_y() as usize;
    let element = thread::lane_id() as usize * 8;
    unsafe {
        let position = a.step.position(row);
        let (first, tokens) = (a.variant.first(position), position + 1);
        let (splits, chunk) = a.split(tokens - first);
        if split >= splits {
            return;
        }
        let start = first + split * chunk;
        let end = if start + chunk < tokens {
            start + chunk
        } else {
            tokens
        };
        let q = a.q.add((row * heads + head) * head_dim);
        let table = a.step.table(row);
        let Part {
            mut sum,
            peak,
            mass,
        } = if a.variant.soft_cap == 0.0 {
            attend_tokens::<E>(q, &a.cache, table, kv_head, a.scale, start, end)
        } else {
            let scale = (a.scale, a.variant.soft_cap);
            attend_capped::<E, true>(q, &a.cache, table, kv_head, scale, start, end)
        };
        if element < head_dim {
            let target = if splits == 1 {
                let (shrink, mass) = with_sink(peak, mass, a.variant.sink(head));
                for k in 0..8 {
                    sum[k] *= shrink / mass;
                }
                a.out.add((row * heads + head) * head_dim)
            } else {
                let stride = head_dim + 2;
                let at = ((row * heads + head) * a.splits as usize + split) * stride;
                let target = a.partial.add(at);
                if element == 0 {
                    target.add(head_dim).write(peak);
                    target.add(head_dim + 1).write(mass);
                }
                target
            };
            for k in 0..8 {
                target.add(element + k).write(sum[k]);
            }
        }
    }
}

/// What sums are multiplied by, and their mass, once a score without a value has joined.
#[inline(always)]
pub fn with_sink(peak: f32, mass: f32, sink: f32) -> (f32, f32) {
    let top = peak.max(sink);
    let shrink = float::exp2_approx(peak - top);
    (shrink, mass * shrink + float::exp2_approx(sink - top))
}

/// Attention over an f16 cache. Grid: `(rows * heads / 4, splits)`.
#[kernel(launch_bounds(128))]
pub unsafe fn attend_f16(a: AttendArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    unsafe { attend::<u16>(&a) }
}

/// Attention over an f32 cache.
#[kernel(launch_bounds(128))]
pub unsafe fn attend_f32(a: AttendArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    unsafe { attend::<f32>(&a) }
}

/// Attention over a cache of 8 bits.
#[kernel(launch_bounds(128))]
pub unsafe fn attend_q8(a: AttendArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    unsafe { attend::<Q8>(&a) }
}

/// Merges the splits of the kernels above; a warp per row and head.
#[kernel(launch_bounds(128))]
pub unsafe fn attend_combine(a: AttendArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    let heads = a.heads as usize;
    let head_dim = a.cache.head_dim as usize;
    let task = block_idx_x() as usize * WARPS + thread_idx_x() as usize / 32;
    if task >= a.step.rows as usize * heads {
        return;
    }
    let stride = head_dim + 2;
    unsafe {
        let position = a.step.position(task / heads);
        let (splits, _) = a.split(position + 1 - a.variant.first(position));
        // The row is done.
        if splits == 1 {
            return;
        }
        let part = a
            .partial
            .cast_const()
            .add(task * a.splits as usize * stride);
        let mut peak = NONE;
        for s in 0..splits {
            peak = peak.max(part.add(s * stride + head_dim).read());
        }
        let mut mass = 0.0;
        for s in 0..splits {
            let p = part.add(s * stride + head_dim);
            mass += p.add(1).read() * float::exp2_approx(p.read() - peak);
        }
        let (shrink, mass) = with_sink(peak, mass, a.variant.sink(task % heads));
        let mut e = thread::lane_id() as usize;
        while e < head_dim {
            let mut v = 0.0;
            for s in 0..splits {
                let weight = float::exp2_approx(part.add(s * stride + head_dim).read() - peak);
                v += weight * part.add(s * stride + e).read();
            }
            a.out.add(task * head_dim + e).write(v * (shrink / mass));
            e += 32;
        }
    }
}
