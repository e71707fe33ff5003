//! Attention of many query rows over the paged cache, on tensor cores (FlashAttention-2,
//! arXiv:2307.08691).
//!
//! A block serves one key-value head for a run of consecutive rows of one sequence. The query heads
//! that share that head are packed with the rows into [`TILE_ROWS`] rows of one product, so that
//! keys and values are read once for all of them. It walks the tokens [`TILE_TOKENS`] at a time;
//! `cp.async` brings the next keys and values while tensor cores multiply the present ones. A warp keeps
//! 16 packed rows, their scores and their sums in registers: the scores' accumulator layout is the layout
//! in which the second product wants its left operand.

use crate::attention::{Variant, with_sink};
use crate::rows::{BLOCK_TOKENS, CacheLayer, Step, soft_cap};
use cuda_std::half::pack_f16x2;
use cuda_std::memory::{cp_async_16_zfill, cp_async_commit, cp_async_wait, ldg_u32};
use cuda_std::thread::{block_idx_x, block_idx_y, sync_threads, thread_idx_x};
use cuda_std::{float, kernel, mma, shared, warp};

/// Threads per block: four warps of 16 packed rows.
pub const THREADS: u32 = 128;
/// Rows times query heads of a block.
pub const TILE_ROWS: usize = 64;
/// Tokens per turn.
pub const TILE_TOKENS: usize = 64;

/// Shared memory of a block, for heads of up to `dims` elements: keys and values, twice.
pub const fn shared_bytes(dims: usize) -> usize {
    2 * 2 * TILE_TOKENS * dims * 2
}

/// Arguments of the `flash` kernels.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FlashArgs {
    /// f16 `[rows][heads * head_dim]`, rotated.
    pub q: *const u16,
    /// f16.
    pub cache: CacheLayer,
    pub step: Step,
    /// `[tiles][2]`: first row, rows. The rows of a tile belong to one sequence, and times the query
    /// heads of a key-value head they are at most [`TILE_ROWS`].
    pub tiles: *const u32,
    /// Query heads that share a key-value head, at least one.
    pub group: u32,
    /// Multiplies the scores.
    pub scale: f32,
    /// Of the `_variant` kernels.
    pub variant: Variant,
    /// f16 `[rows][heads * head_dim]`.
    pub out: *mut u16,
}

/// The score of a token that a row does not see: finite, so that differences of it never become NaN.
const NONE: f32 = -1e30;

/// Byte offset of 16-byte piece `piece` of token `token` in a tile of `N` pieces a token. Pieces change
/// places by token, so that eight of them at one place in eight tokens lie in different banks.
#[inline(always)]
fn swizzle<const N: usize>(token: usize, piece: usize) -> usize {
    (token * N + (piece ^ (token & 7))) * 16
}

/// Where a block's keys and values come from.
struct Source {
    cache: CacheLayer,
    /// The sequence's block table.
    table: *const u32,
    kv_head: usize,
    /// Tokens that there are.
    end: usize,
}

impl Source {
    /// Starts the copies of keys and values of [`TILE_TOKENS`] tokens from `first` on; what is past the
    /// end, or past a head's elements, becomes zero.
    #[inline(always)]
    unsafe fn load<const N: usize>(&self, keys: usize, values: usize, first: usize) {
        let head_dim = self.cache.head_dim as usize;
        let t = thread_idx_x() as usize;
        let (row, piece) = (t / N, t % N);
        // Tokens that the threads cover at a time.
        let per_turn = THREADS as usize / N;
        let wanted = piece * 8 < head_dim;
        for half in 0..TILE_TOKENS / BLOCK_TOKENS {
            unsafe {
                // Where nothing is read, the address must still be one.
                let index = (first / BLOCK_TOKENS + half).min((self.end - 1) / BLOCK_TOKENS);
                let block = ldg_u32(self.table.add(index)) as usize;
                let block = block * self.cache.kv_heads as usize + self.kv_head;
                let mut at = (block * BLOCK_TOKENS + row) * head_dim + piece * 8;
                for i in 0..BLOCK_TOKENS / per_turn {
                    let row = half * BLOCK_TOKENS + i * per_turn + row;
                    let inside = wanted && first + row < self.end;
                    let bytes = if inside { 16 } else { 0 };
                    let offset = swizzle::<N>(row, piece);
                    for (base, tile) in [(self.cache.keys, keys), (self.cache.values, values)] {
                        cp_async_16_zfill(
                            shared::at::<u8>((tile + offset) as u32),
                            base.cast::<u16>().wrapping_add(at),
                            bytes,
                        );
                    }
                    at += per_turn * head_dim;
                }
            }
        }
    }
}

/// `K` steps of 16 elements hold a head, `N = 2 K` pieces of eight. `VARIANT` is whether to look at the
/// arguments' variant.
#[inline(always)]
unsafe fn flash<const K: usize, const N: usize, const VARIANT: bool>(a: &FlashArgs) {
    let t = thread_idx_x() as usize;
    let (warp_index, lane) = (t / 32, t % 32);
    let kv_head = block_idx_x() as usize;
    let head_dim = a.cache.head_dim as usize;
    // No division by zero, and no code for its panic.
    let group = (a.group as usize).max(1);
    let heads = a.cache.kv_heads as usize * group;
    unsafe {
        let tile = a.tiles.add(block_idx_y() as usize * 2);
        let (first_row, rows) = (ldg_u32(tile) as usize, ldg_u32(tile.add(1)) as usize);
        let past = a.step.position(first_row);
        let sequence = ldg_u32(a.step.sequences.add(first_row)) as usize;
        let source = Source {
            cache: a.cache,
            table: a.step.tables.add(sequence * a.step.table_stride as usize),
            kv_head,
            end: past + rows,
        };
        let bytes = TILE_TOKENS * N * 16;
        let mut first = 0;
        if VARIANT {
            first = a.variant.first(past) / TILE_TOKENS * TILE_TOKENS;
        }
        source.load::<N>(0, bytes, first);
        cp_async_commit();

        // A lane has two packed rows of a fragment, eight apart.
        let mut last = [0; 2];
        let mut offset = [0; 2];
        let mut real = [false; 2];
        for i in 0..2 {
            let packed = warp_index * 16 + lane / 4 + i * 8;
            let row = packed / group;
            real[i] = row < rows;
            let row = if real[i] { row } else { rows - 1 };
            last[i] = past + row;
            offset[i] = ((first_row + row) * heads + kv_head * group + packed % group) * head_dim;
        }
        let mut q = [[0; 4]; K];
        for k in 0..K {
            for r in 0..4 {
                let e = k * 16 + (r / 2) * 8 + (lane % 4) * 2;
                if real[r % 2] && e < head_dim {
                    q[k][r] = ldg_u32(a.q.add(offset[r % 2] + e).cast());
                }
            }
        }

        const LOG2_E: f32 = core::f32::consts::LOG2_E;
        let capped = VARIANT && a.variant.soft_cap != 0.0;
        let scale = if capped { LOG2_E } else { a.scale * LOG2_E };
        let mut from = [0; 2];
        if VARIANT {
            from = [a.variant.first(last[0]), a.variant.first(last[1])];
        }
        let (mut peak, mut mass) = ([NONE; 2], [0.0f32; 2]);
        let mut sums = [[0.0f32; 4]; N];
        let mut stage = 0;
        while first < source.end {
            cp_async_wait::<0>();
            sync_threads();
            let keys = stage * 2 * bytes;
            let values = keys + bytes;
            if first + TILE_TOKENS < source.end {
                let next = (stage ^ 1) * 2 * bytes;
                source.load::<N>(next, next + bytes, first + TILE_TOKENS);
                cp_async_commit();
            }

            let mut scores = [[0.0f32; 4]; TILE_TOKENS / 8];
            for k in 0..K {
                for pair in 0..TILE_TOKENS / 16 {
                    // Two tiles of eight tokens: (first, k low), (first, k high), (second, …).
                    let token = pair * 16 + (lane / 16) * 8 + lane % 8;
                    let at = keys + swizzle::<N>(token, k * 2 + (lane / 8) % 2);
                    let b = mma::ldmatrix_x4(shared::at::<u16>(at as u32));
                    for half in 0..2 {
                        let s = &mut scores[pair * 2 + half];
                        *s = mma::m16n8k16_f16(q[k], [b[half * 2], b[half * 2 + 1]], *s);
                    }
                }
            }
            if capped {
                for j in 0..TILE_TOKENS / 8 {
                    for e in 0..4 {
                        scores[j][e] = soft_cap(scores[j][e] * a.scale, a.variant.soft_cap);
                    }
                }
            }
            if first + TILE_TOKENS > past + 1 || (VARIANT && a.variant.window != 0) {
                for j in 0..TILE_TOKENS / 8 {
                    for e in 0..4 {
                        let token = first + j * 8 + (lane % 4) * 2 + e % 2;
                        if token > last[e / 2] || (VARIANT && token < from[e / 2]) {
                            scores[j][e] = NONE;
                        }
                    }
                }
            }

            let mut top = peak;
            for j in 0..TILE_TOKENS / 8 {
                for e in 0..4 {
                    top[e / 2] = float::max(top[e / 2], scores[j][e]);
                }
            }
            let mut shrink = [0.0; 2];
            let mut base = [0.0; 2];
            for i in 0..2 {
                top[i] = float::max(top[i], warp::shuffle_xor(top[i], 1));
                top[i] = float::max(top[i], warp::shuffle_xor(top[i], 2));
                shrink[i] = float::exp2_approx((peak[i] - top[i]) * scale);
                base[i] = -top[i] * scale;
                // A row that sees no token of this tile, nor of one before: its weights are all 0.
                if VARIANT && top[i] <= NONE {
                    base[i] = f32::NEG_INFINITY;
                }
                mass[i] *= shrink[i];
            }
            peak = top;
            for n in 0..N {
                for e in 0..4 {
                    sums[n][e] *= shrink[e / 2];
                }
            }
            for k in 0..TILE_TOKENS / 16 {
                let mut p = [0; 4];
                for r in 0..4 {
                    let s = scores[k * 2 + r / 2];
                    let i = r % 2;
                    let low = float::exp2_approx(float::fma(s[i * 2], scale, base[i]));
                    let high = float::exp2_approx(float::fma(s[i * 2 + 1], scale, base[i]));
                    mass[i] += low + high;
                    p[r] = pack_f16x2(low, high);
                }
                for pair in 0..K {
                    // Transposed: (tokens low, first eight elements), (tokens high, …), (…, second eight).
                    let at = values + swizzle::<N>(k * 16 + lane % 16, pair * 2 + lane / 16);
                    let b = mma::ldmatrix_x4_trans(shared::at::<u16>(at as u32));
                    for half in 0..2 {
                        let sum = &mut sums[pair * 2 + half];
                        *sum = mma::m16n8k16_f16(p, [b[half * 2], b[half * 2 + 1]], *sum);
                    }
                }
            }
            first += TILE_TOKENS;
            stage ^= 1;
        }

        for i in 0..2 {
            mass[i] += warp::shuffle_xor(mass[i], 1);
            mass[i] += warp::shuffle_xor(mass[i], 2);
            let mut inverse = 1.0 / mass[i];
            if VARIANT {
                let packed = warp_index * 16 + lane / 4 + i * 8;
                let sink = a.variant.sink(kv_head * group + packed % group);
                let (shrink, mass) = with_sink(peak[i] * scale, mass[i], sink);
                inverse = shrink / mass;
            }
            for n in 0..N {
                let e = n * 8 + (lane % 4) * 2;
                if real[i] && e < head_dim {
                    let v = pack_f16x2(sums[n][i * 2] * inverse, sums[n][i * 2 + 1] * inverse);
                    a.out.add(offset[i] + e).cast::<u32>().write(v);
                }
            }
        }
    }
}

/// Heads of up to 64 elements, a multiple of eight. Grid: `(kv_heads, tiles)`.
#[kernel(launch_bounds(128))]
pub unsafe fn flash_64(a: FlashArgs) {
    unsafe { flash::<4, 8, false>(&a) }
}

/// Heads of up to 128 elements.
#[kernel(launch_bounds(128))]
pub unsafe fn flash_128(a: FlashArgs) {
    unsafe { flash::<8, 16, false>(&a) }
}

/// [`flash_64`] with a window, a cap or sinks.
#[kernel(launch_bounds(128))]
pub unsafe fn flash_64_variant(a: FlashArgs) {
    unsafe { flash::<4, 8, true>(&a) }
}

/// [`flash_128`] with a window, a cap or sinks.
#[kernel(launch_bounds(128))]
pub unsafe fn flash_128_variant(a: FlashArgs) {
    unsafe { flash::<8, 16, true>(&a) }
}
