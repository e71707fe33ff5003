//! Attention of the step's row over the cache.
//!
//! A block takes one head and split of the tokens at a time, its warps parts of them. A warp's lanes form teams
//! of just enough lanes to hold a head, eight elements each; each team walks its own tokens with a running
//! softmax (arXiv:2205.14135); teams, then warps merge at the end, and the product that follows merges splits.

use super::seal::{Seal, pause};
use super::{
    AHEAD, Current, DecodeArgs, PLAIN, ROWS_AT, WARPS, Warp, await_op, blocks, copy_op, get, lane,
    sync, thread,
};
use crate::attention::{LoadEight, NONE};
use crate::rows::BLOCK_TOKENS;
use crate::types::to_f16;
use crate::unrolled;
use cuda_std::int::{here, quotient};
use cuda_std::memory::{ld_relaxed_v4_u32, ld_v4_u32, ldg_u32};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::block_idx_x;
use cuda_std::{float, warp};

/// Each warp's part of a head: sums of up to 256 elements, peak and mass.
const PART: u32 = 256 + 4;
pub const PARTS_BYTES: u32 = WARPS * PART * 4;

/// Tokens a team loads before it computes, so that their loads overlap.
const UNROLL: usize = 2;

const LOG2_E: f32 = core::f32::consts::LOG2_E;

/// Attention over some tokens, not yet normalised: `sum / mass` where these are all of them.
struct Part {
    /// Elements `8 * lane ..` of the head, in the lanes that have one.
    sum: [f32; 8],
    /// The greatest score, in units of log2; [`NONE`] without tokens.
    peak: f32,
    mass: f32,
}

/// [`kind::ATTEND`](super::kind::ATTEND).
///
/// Little is kept from one step to the next: what is needed again is looked up again.
#[inline(always)]
pub unsafe fn attend(a: &DecodeArgs, op: Current, w: &mut Warp) {
    unsafe {
        copy_op(a, w.index + AHEAD);
        let mut index = block_idx_x();
        while index < get!(op, heads) * get!(op, splits) {
            let (head, from, to) = share(a, op, index);
            let part = attend_tokens(a, op, head, from, to);
            let slot = parts(a, w).add(thread() / 32 * PART);
            let lane = lane();
            if lane * 8 < get!(op, cache.head_dim) {
                let s = part.sum;
                slot.add(lane * 8).store_v4([s[0], s[1], s[2], s[3]]);
                slot.add(lane * 8 + 4).store_v4([s[4], s[5], s[6], s[7]]);
            }
            if lane == 0 {
                slot.add(256).store(part.peak);
                slot.add(257).store(part.mass);
            }
            sync();
            merge(a, op, parts(a, w), here(index));
            sync();
            index += blocks();
        }
        await_op();
        sync();
    }
}

/// Where the warps leave their parts.
#[inline(always)]
fn parts(a: &DecodeArgs, w: &Warp) -> SharedPtr<f32> {
    shared::at(ROWS_AT + here(w.index) % 2 * a.row_bytes)
}

/// Head of the block's piece `index`, and this warp's tokens of it: `from .. to`.
#[inline(always)]
unsafe fn share(a: &DecodeArgs, op: Current, index: u32) -> (u32, u32, u32) {
    unsafe {
        let splits = get!(op, splits);
        let head = quotient(index, splits);
        let tokens = a.position + 1;
        let chunk = quotient(tokens + splits - 1, splits);
        let first = (index - head * splits) * chunk;
        let last = if first + chunk < tokens {
            first + chunk
        } else {
            tokens
        };
        // Whole turns of all teams, so that no warp is left with a remainder of another's.
        let team_lanes = get!(op, cache.head_dim).div_ceil(8).next_power_of_two();
        let teams = quotient(32, team_lanes);
        let share = (chunk.div_ceil(WARPS) + teams - 1) & !(teams - 1);
        let from = first + thread() / 32 * share;
        let to = if from + share < last {
            from + share
        } else {
            last
        };
        (head, from, to)
    }
}

/// Merges the warps' parts of the block's piece `index`, a thread for each element, and writes what comes of it.
#[inline(always)]
unsafe fn merge(a: &DecodeArgs, op: Current, parts: SharedPtr<f32>, index: u32) {
    unsafe {
        let (head_dim, splits) = (get!(op, cache.head_dim), get!(op, splits));
        let e = thread();
        let whole = splits == 1;
        if e >= if whole { head_dim } else { head_dim + 2 } {
            return;
        }
        let mut peak = NONE;
        for w in 0..WARPS {
            peak = peak.max(parts.add(w * PART + 256).load());
        }
        let (mut sum, mut mass) = (0.0, 0.0);
        for w in 0..WARPS {
            let at = parts.add(w * PART);
            let weight = float::exp2_approx(at.add(256).load() - peak);
            mass += weight * at.add(257).load();
            if e < head_dim {
                sum += weight * at.add(e).load();
            }
        }
        let number = if get!(op, sealed) != 0 {
            get!(op, number)
        } else {
            PLAIN
        };
        // A whole is a row of heads; of splits there are elements, then peak, then mass.
        let (v, at) = if whole {
            (sum * float::rcp_approx(mass), index * head_dim + e)
        } else {
            let v = if e < head_dim {
                sum
            } else if e == head_dim {
                peak
            } else {
                mass
            };
            (v, index * (head_dim + 4) + e)
        };
        Seal::of(a, number).write(get!(op, out).add(at as usize), v);
    }
}

/// This warp's attention of one query head over tokens `from .. to`.
#[inline(always)]
unsafe fn attend_tokens(a: &DecodeArgs, op: Current, head: u32, from: u32, to: u32) -> Part {
    unsafe {
        let head_dim = get!(op, cache.head_dim);
        let kv_heads = get!(op, cache.kv_heads);
        let kv_head = quotient(head, quotient(get!(op, heads), kv_heads));
        let scale = get!(op, scale) * LOG2_E;
        let (keys_at, values_at) = (get!(op, cache.keys), get!(op, cache.values));
        let fresh = get!(op, fresh);
        let lane = lane();
        let team_lanes = head_dim.div_ceil(8).next_power_of_two();
        let teams = quotient(32, team_lanes);
        let team = quotient(lane, team_lanes);
        let member = lane - team * team_lanes;
        let element = member * 8;
        let active = element < head_dim;
        let (mut peak, mut mass, mut sum) = (NONE, 0.0f32, [0.0f32; 8]);
        let written = Seal::of(a, get!(op, input.from));
        let mut scaled = [0.0; 8];
        let mut base = from;
        // Every lane takes every turn, for the shuffles; a team past the end has nothing to add.
        while base < to {
            let mut keys = [[0u32; 4]; UNROLL];
            let mut values = [[0u32; 4]; UNROLL];
            let mut new = false;
            for u in 0..UNROLL {
                let token = base + u as u32 * teams + team;
                if active && token < to {
                    if token == a.position && !fresh.is_null() {
                        new = true;
                    } else {
                        let tokens = BLOCK_TOKENS as u32;
                        let block = ldg_u32(a.table.add((token / tokens) as usize));
                        let at = (block * kv_heads + kv_head) * tokens + token % tokens;
                        let at = (at as usize * head_dim as usize + element as usize) * 2;
                        keys[u] = ld_v4_u32(keys_at.add(at));
                        values[u] = ld_v4_u32(values_at.add(at));
                    }
                }
            }
            // The first keys are on their way while query and new key and value are awaited, all at once.
            let first = base == from;
            if first || warp::any(new) {
                let q = get!(op, input.x).add((head * head_dim + element) as usize);
                let key = fresh.wrapping_add((kv_head * head_dim + element) as usize);
                let value = key.wrapping_add((kv_heads * head_dim) as usize);
                let mut query = [[0u32; 4]; 2];
                let mut fresh = [[0u32; 4]; 4];
                loop {
                    if first && active {
                        query = unrolled!(2, |i| ld_relaxed_v4_u32(q.add(4 * i)));
                    }
                    if new {
                        let new = [key, key.add(4), value, value.add(4)];
                        fresh = unrolled!(4, |i| ld_relaxed_v4_u32(new[i]));
                    }
                    let mut all = true;
                    for i in 0..2 {
                        all &= !(first && active) || written.all_on(query[i]);
                    }
                    for i in 0..4 {
                        all &= !new || written.all_on(fresh[i]);
                    }
                    // The lanes stay together, for the shuffles.
                    if warp::all(all) {
                        break;
                    }
                    pause();
                }
                if first {
                    for k in 0..8 {
                        scaled[k] = written.open(query[k / 4][k % 4]) * scale;
                    }
                }
                for u in 0..UNROLL {
                    if new && base + u as u32 * teams + team == a.position {
                        keys[u] = pack(written, [fresh[0], fresh[1]]);
                        values[u] = pack(written, [fresh[2], fresh[3]]);
                    }
                }
            }
            let mut scores = [0.0; UNROLL];
            for u in 0..UNROLL {
                let key = u16::unpack_eight(keys[u]);
                for k in 0..8 {
                    scores[u] += scaled[k] * key[k];
                }
            }
            let mut width = 1;
            while width < team_lanes {
                for u in 0..UNROLL {
                    scores[u] += warp::shuffle_xor(scores[u], width);
                }
                width *= 2;
            }
            let mut top = peak;
            for u in 0..UNROLL {
                if base + u as u32 * teams + team >= to {
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
                let value = u16::unpack_eight(values[u]);
                for k in 0..8 {
                    sum[k] += weight * value[k];
                }
            }
            peak = top;
            base += UNROLL as u32 * teams;
        }
        let mut width = team_lanes;
        while width < 32 {
            let other = warp::shuffle_xor(peak, width);
            let top = peak.max(other);
            let shrink = float::exp2_approx(peak - top);
            mass *= shrink;
            mass += warp::shuffle_xor(mass, width);
            for k in 0..8 {
                sum[k] *= shrink;
                sum[k] += warp::shuffle_xor(sum[k], width);
            }
            peak = top;
            width *= 2;
        }
        Part { sum, peak, mass }
    }
}

/// Eight values of this step's key or value, as the cache holds them.
#[inline(always)]
fn pack(seal: Seal, words: [[u32; 4]; 2]) -> [u32; 4] {
    unrolled!(4, |k| {
        let f16 = |i: usize| u32::from(to_f16(seal.open(words[i / 4][i % 4])));
        f16(2 * k) | (f16(2 * k + 1) << 16)
    })
}
