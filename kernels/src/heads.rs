//! Attention of rows of several sequences, one of each, over an f16 cache, on tensor cores: as a decode step's
//! ([`decode`](crate::decode)), a key-value head for up to eight of its query heads, so that keys and values are read once for these.
//!
//! A block takes a split of a row's tokens for one of them, its warps tiles of 16 tokens. Rows are split by their own numbers of tokens
//! ([`own_split`](crate::attention::own_split)), and [`attend_combine`](crate::attention::attend_combine) merges splits: what
//! comes of a row does not depend on the others.

use crate::attention::{AttendArgs, LOG2_E, NONE, with_sink};
use crate::decode::attend::{
    ASKED_BYTES, HEADS, NO_SCORES, PART, Place, TOKENS, WIDTH, add_scores, load_keys, load_values,
    part_element, seen, value_token,
};
use crate::decode::running::Running;
use crate::rows::BLOCK_TOKENS;
use cuda_std::memory::{ld_v4_u32, ldg_u32};
use cuda_std::thread::{
    block_idx_x, block_idx_y, griddepcontrol_launch_dependents, griddepcontrol_wait, lane_id,
    sync_threads, thread_idx_x,
};
use cuda_std::{float, kernel};

/// Threads per block.
pub const THREADS: u32 = 32 * WARPS;
const WARPS: u32 = 4;

/// Words from part to part of the warps' parts: these, and as many more as send neighbours' words to different banks.
const STRIDE: u32 = WARPS * PART + 4;

/// Blocks of a row and split, of `kv_heads` heads with `group` query heads each.
pub const fn blocks_of_row(kv_heads: u32, group: u32) -> u32 {
    kv_heads * group.div_ceil(HEADS)
}

/// Bytes of shared memory, for heads of so many elements.
pub const fn shared_bytes(head_dim: u32) -> usize {
    (ASKED_BYTES + HEADS * head_dim.div_ceil(WIDTH) * STRIDE * 4) as usize
}

/// Heads of up to 64 elements, a multiple of eight. Grid: `(rows * `[`blocks_of_row`]`, splits)`, with [`shared_bytes`].
/// `own` is set, there is no soft cap.
#[kernel(launch_bounds(128))]
pub unsafe fn attend_heads_64(a: AttendArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    unsafe { attend::<2, 1>(&a) }
}

/// [`attend_heads_64`] of up to 128.
#[kernel(launch_bounds(128))]
pub unsafe fn attend_heads_128(a: AttendArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    unsafe { attend::<4, 2>(&a) }
}

/// Of `K` times 32 elements, `H` times [`WIDTH`].
#[inline(always)]
unsafe fn attend<const K: usize, const H: usize>(a: &AttendArgs) {
    unsafe {
        let (kv_heads, head_dim) = (a.cache.kv_heads, a.cache.head_dim);
        let group = a.heads / kv_heads;
        let pieces = group.div_ceil(HEADS);
        let (row, piece) = (
            block_idx_x() / (kv_heads * pieces),
            block_idx_x() % (kv_heads * pieces),
        );
        let (kv_head, before) = (piece / pieces, piece % pieces * HEADS);
        let heads = if group - before < HEADS {
            group - before
        } else {
            HEADS
        };
        let position = a.step.position(row as usize);
        let (first, tokens) = (a.variant.first(position), position + 1);
        let (splits, chunk) = a.split(tokens - first);
        let split = block_idx_y() as usize;
        if split >= splits {
            return;
        }
        let from = (first + split * chunk) as u32;
        let to = if from as usize + chunk < tokens {
            from + chunk as u32
        } else {
            tokens as u32
        };
        let (warp, lane) = (thread_idx_x() / 32, lane_id());
        let table = a.step.table(row as usize);
        // Tiles lie in one block of the cache, so that the first may begin before the split.
        let mut base = from / TOKENS * TOKENS + warp * TOKENS;
        let tile = |base: u32| {
            let block = ldg_u32(table.add(base as usize / BLOCK_TOKENS)) * kv_heads + kv_head;
            let at = block * BLOCK_TOKENS as u32 + base % BLOCK_TOKENS as u32;
            let at = at as usize * head_dim as usize * 2;
            let keys = load_keys::<K>(a.cache.keys.add(at), head_dim, to - base);
            let mut values = [[[0; 4]; 4]; H];
            for h in 0..H {
                let from = a.cache.values.add(at);
                values[h] = load_values(from, head_dim, to - base, h as u32 * WIDTH);
            }
            (keys, values)
        };
        // The first are on their way while the queries are.
        let (mut keys, mut values) = ([[[0; 4]; 2]; K], [[[0; 4]; 4]; H]);
        if base < to {
            (keys, values) = tile(base);
        }
        let place = Place::at(0);
        let first_head = row * a.heads + kv_head * group + before;
        let mut head = warp;
        while head < HEADS {
            let element = 4 * lane;
            let mut v = [0.0; 4];
            if head < heads && element < head_dim {
                let q = a.q.add(((first_head + head) * head_dim + element) as usize);
                v = ld_v4_u32(q).map(|v| f32::from_bits(v) * (a.scale * LOG2_E));
            }
            if element < H as u32 * WIDTH {
                place.put_query(head, element, v);
            }
            head += WARPS;
        }
        sync_threads();
        let mut running = Running::<H>::new();
        while base < to {
            let mut scores = NO_SCORES;
            for c in 0..K {
                add_scores(&mut scores, place, c as u32, &keys[c]);
            }
            let mut s = seen(&scores, base, to);
            for i in 0..4 {
                if base + value_token(i as u32) < from {
                    s[i] = NONE;
                }
            }
            let [p] = running.weigh([s]);
            for h in 0..H {
                running.add(h, &values[h], &p);
            }
            base += TOKENS * WARPS;
            if base < to {
                (keys, values) = tile(base);
            }
        }
        let parts = place.parts();
        running.leave(parts, STRIDE, heads, warp, true);
        sync_threads();
        // Four elements a thread.
        let mut i = thread_idx_x();
        while i < heads * H as u32 * (WIDTH / 4) {
            let (part, at) = (i / (WIDTH / 4), i % (WIDTH / 4) * 4);
            // Those of wide heads' second halves come last.
            let second = part >= heads;
            let head = if second { part - heads } else { part };
            let element = second as u32 * WIDTH + part_element(at);
            i += THREADS;
            if element >= head_dim {
                continue;
            }
            let of_warp = |w: u32| parts.add(part * STRIDE + w * PART);
            let mut peak = NONE;
            for w in 0..WARPS {
                peak = peak.max(of_warp(w).add(WIDTH).load());
            }
            let (mut sums, mut mass) = ([0.0f32; 4], 0.0);
            for w in 0..WARPS {
                let [top, own] = of_warp(w).add(WIDTH).load_v2();
                let weight = float::exp2_approx(top - peak);
                mass += weight * own;
                let v = of_warp(w).add(at).load_v4();
                for n in 0..4 {
                    sums[n] += weight * v[n];
                }
            }
            let head = first_head + head;
            let target = if splits == 1 {
                let sink = a.variant.sink((head - row * a.heads) as usize);
                let (shrink, mass) = with_sink(peak, mass, sink);
                sums = sums.map(|s| s * (shrink / mass));
                a.out.add((head * head_dim) as usize)
            } else {
                let at = head as usize * a.splits as usize + split;
                let target = a.partial.add(at * (head_dim as usize + 2));
                if element == 0 {
                    target.add(head_dim as usize).write(peak);
                    target.add(head_dim as usize + 1).write(mass);
                }
                target
            };
            for n in 0..4 {
                target.add(element as usize + n).write(sums[n]);
            }
        }
    }
}
