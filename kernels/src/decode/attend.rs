//! Attention of the step's row over the cache, on tensor cores.
//!
//! A piece is up to [`HEADS`] query heads that share a key-value head, with [`WIDTH`] elements of the values, over a split
//! of the tokens; a block takes one at a time, its warps tiles of 16 tokens. With the tokens as rows of `K Qᵀ` and the
//! elements as rows of `Vᵀ Pᵀ` the heads are the eight columns of both products, so that keys and values are read once
//! for all of them, straight into fragments: which element is which of a product's summands, and which of its rows, is
//! free, and chosen so that a lane's are neighbours. A query and a weight are two f16 each, of which the second is what the
//! first leaves over: products are those of f32 that way, in all but the last bits.
//!
//! A warp's running softmax (arXiv:2205.14135) goes from tile to tile; warps merge in shared memory, splits in
//! [`merge`](super::merge).

use super::seal::Seal;
use super::{
    Current, DecodeArgs, LATE, Listed, PLAIN, ROWS_AT, Source, WARPS, WIDE, blocks, cache_block,
    get, kind, lane, may_be, sync, thread,
};
use crate::attention::NONE;
use crate::rows::BLOCK_TOKENS;
use crate::unrolled;
use cuda_std::half::{F16, pack_f16x2};
use cuda_std::int::{here, prmt, quotient};
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
use cuda_std::memory::prefetch_bulk_l2;
use cuda_std::memory::{ld_relaxed_v4_u32, ld_v4_u32, ldg_f32, ldg_v4_u32, st_global_v2};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::{block_idx_x, spin};
use cuda_std::{float, mma, warp};

/// Query heads of a piece: the columns of a product.
pub const HEADS: u32 = 8;
/// Elements of the values of a piece. All of a wide head's would take more registers than there are.
pub const WIDTH: u32 = 64;
/// Most elements of a head.
pub const MAX_HEAD_DIM: u32 = 128;
/// Tokens of a tile: the rows of a product.
const TOKENS: u32 = 16;
/// Elements of a lane at a time, 16 bytes of the cache; four lanes take a chunk.
const EIGHT: u32 = 8;
const CHUNK: u32 = 4 * EIGHT;
/// Heads up to so many elements wide are of two chunks at most, others of four.
pub const NARROW_DIM: u32 = 2 * CHUNK;

/// Two f16.
const ONES: u32 = 0x3c00_3c00;

const LOG2_E: f32 = core::f32::consts::LOG2_E;

/// Shared memory before the warps' parts: queries, as both halves' fragments of up to four chunks; then the
/// step's own key and value.
const FRESH_AT: u32 = MAX_HEAD_DIM / CHUNK * 32 * 32;
const ASKED_BYTES: u32 = FRESH_AT + 2 * 2 * MAX_HEAD_DIM;

/// Bytes of shared memory that attention needs, with so many query heads for each key-value head.
pub const fn attend_bytes(group: u32) -> u32 {
    let heads = if group < HEADS { group } else { HEADS };
    ASKED_BYTES + heads * HEAD_PARTS * 4
}

/// Pieces before the tokens are split.
pub const fn attend_pieces(kv_heads: u32, group: u32, head_dim: u32) -> u32 {
    kv_heads * group.div_ceil(HEADS) * head_dim.div_ceil(WIDTH)
}

/// Words of a part: the elements' sums, their peak and mass, two unused.
pub const PART: u32 = WIDTH + 4;

/// Words from head to head of the warps' parts in shared memory: these, and as many more as send neighbours' words to different
/// banks.
const HEAD_PARTS: u32 = WARPS * PART + 4;

/// `n / d`: most often `d` is 1, and a division takes long.
#[inline(always)]
unsafe fn share(n: u32, d: u32) -> u32 {
    if d == 1 { n } else { unsafe { quotient(n, d) } }
}

/// What a block takes at a time.
#[derive(Clone, Copy)]
struct Piece {
    kv_head: u32,
    /// Its first query head.
    head: u32,
    heads: u32,
    /// Its first element of the values, and how many.
    element: u32,
    width: u32,
    split: u32,
    /// Its tokens: `from .. to`.
    from: u32,
    to: u32,
}

impl Piece {
    /// Piece `index` where the row's token is number `position`.
    #[inline(always)]
    unsafe fn of(op: impl Source, index: u32, position: u32) -> Piece {
        unsafe {
            let (splits, head_dim) = (get!(op, splits), get!(op, cache.head_dim));
            let group = get!(op, group);
            let whole = share(index, splits);
            let split = index - whole * splits;
            let (parts, pieces) = (head_dim.div_ceil(WIDTH), group.div_ceil(HEADS));
            const { assert!(MAX_HEAD_DIM == 2 * WIDTH, "one part or two") };
            let piece = whole >> (parts - 1);
            let element = (whole - piece * parts) * WIDTH;
            let kv_head = share(piece, pieces);
            let first = (piece - kv_head * pieces) * HEADS;
            // Whole tiles, which lie in one block of the cache.
            let tokens = position + 1;
            let chunk = share(tokens + splits - 1, splits).next_multiple_of(TOKENS);
            let from = if split * chunk < tokens {
                split * chunk
            } else {
                tokens
            };
            Piece {
                kv_head,
                head: kv_head * group + first,
                heads: if group - first < HEADS {
                    group - first
                } else {
                    HEADS
                },
                element,
                width: if head_dim - element < WIDTH {
                    head_dim - element
                } else {
                    WIDTH
                },
                split,
                from,
                to: if from + chunk < tokens {
                    from + chunk
                } else {
                    tokens
                },
            }
        }
    }

    /// Warps that have tokens.
    #[inline(always)]
    fn warps(&self) -> u32 {
        let tiles = (self.to - self.from).div_ceil(TOKENS);
        if tiles < WARPS { tiles } else { WARPS }
    }
}

/// Shared memory of a piece.
#[derive(Clone, Copy)]
struct Place {
    asked: u32,
    parts: SharedPtr<f32>,
}

impl Place {
    #[inline(always)]
    fn here() -> Place {
        Place {
            asked: ROWS_AT,
            parts: shared::at(ROWS_AT + ASKED_BYTES),
        }
    }

    /// This lane's query elements of a chunk, the greater halves or what these leave over.
    #[inline(always)]
    fn query(&self, chunk: u32, rest: u32) -> SharedPtr<u32> {
        shared::at(self.asked + ((2 * chunk + rest) * 32 + lane()) * 16)
    }

    /// Four elements of a head's query, from `element` on.
    #[inline(always)]
    fn query_of(&self, head: u32, element: u32, rest: u32) -> SharedPtr<u32> {
        let (chunk, t) = (element / CHUNK, element % CHUNK / EIGHT);
        let at = ((2 * chunk + rest) * 32 + head * 4 + t) * 16;
        shared::at(self.asked + at + element % EIGHT * 2)
    }

    /// Elements of the step's key (`kind` 0) or value (1), as the cache holds them.
    #[inline(always)]
    fn fresh(&self, kind: u32, element: u32) -> SharedPtr<u32> {
        shared::at(self.asked + FRESH_AT + (kind * MAX_HEAD_DIM + element) * 2)
    }
}

/// [`kind::ATTEND`](super::kind::ATTEND).
#[inline(always)]
pub unsafe fn attend(a: &DecodeArgs, op: Current) {
    unsafe {
        let mut index = block_idx_x();
        while index < pieces(op) {
            let (place, piece) = (Place::here(), Piece::of(op, index, get!(op, now.position)));
            if get!(op, cache.head_dim) <= NARROW_DIM || !may_be(WIDE) {
                walk::<2>(a, op, place, piece);
            } else {
                walk::<4>(a, op, place, piece);
            }
            join(op, place.parts, here(index));
            sync();
            index += blocks();
        }
    }
}

/// Asks for keys and values of the block's first piece in the second-level cache, for a row whose token is number `position`: long
/// before they are needed, while memory has less to do than when they are.
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
#[inline(always)]
pub unsafe fn prefetch(a: &DecodeArgs, op: Listed, position: u32) {
    unsafe {
        // Shorter ones take no time.
        if get!(op, kind) != kind::ATTEND || get!(op, splits) == 1 || block_idx_x() >= pieces(op) {
            return;
        }
        let piece = Piece::of(op, block_idx_x(), position);
        let bytes = get!(op, cache.head_dim) * TOKENS * 2;
        let both = get!(op, cache.head_dim) <= WIDTH;
        let (keys, values) = (get!(op, cache.keys), get!(op, cache.values));
        let mut base = piece.from + lane() * TOKENS;
        let end = piece.from + PREFETCHED * TOKENS;
        let end = if piece.to < end { piece.to } else { end };
        while base < end {
            let at = tile_at(a, op, piece.kv_head, base);
            // Of pieces with the same keys each takes its part.
            if both || piece.element == 0 {
                prefetch_bulk_l2(keys.add(at), bytes);
            }
            if both || piece.element != 0 {
                prefetch_bulk_l2(values.add(at), bytes);
            }
            base += 32 * TOKENS;
        }
    }
}

/// Tiles of a piece that are asked for ahead at most: more would be gone from that cache before they are needed.
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
const PREFETCHED: u32 = WARPS;

/// Pieces of an operation, with its splits.
#[inline(always)]
unsafe fn pieces(op: impl Source) -> u32 {
    unsafe {
        let group = get!(op, group);
        attend_pieces(get!(op, cache.kv_heads), group, get!(op, cache.head_dim)) * get!(op, splits)
    }
}

/// This lane's keys of a tile, as they lie in the cache: eight elements of two keys for each of `K` chunks.
type Keys<const K: usize> = [[[u32; 4]; 2]; K];
/// Its values: eight elements of four.
type Values = [[u32; 4]; 4];

/// Row and column of this lane's place in a fragment.
#[inline(always)]
fn place_in_fragment() -> (u32, u32) {
    (lane() / 4, lane() % 4)
}

/// The token of a tile whose value is the lane's `i`th: a product's summands `2 t`, `2 t + 1`, `2 t + 8`, `2 t + 9`.
#[inline(always)]
fn value_token(i: u32) -> u32 {
    2 * (lane() % 4) + i % 2 + i / 2 * 8
}

/// Where the tile at token `base` begins in the cache, in bytes.
#[inline(always)]
unsafe fn tile_at(a: &DecodeArgs, op: impl Source, kv_head: u32, base: u32) -> usize {
    unsafe {
        let tokens = BLOCK_TOKENS as u32;
        let block = cache_block(a, base);
        let row = (block * get!(op, cache.kv_heads) + kv_head) * tokens + base % tokens;
        row as usize * get!(op, cache.head_dim) as usize * 2
    }
}

/// Keys of the tile at `at`, of its tokens before `tokens`.
#[inline(always)]
unsafe fn load_keys<const K: usize>(op: Current, at: usize, tokens: u32) -> Keys<K> {
    unsafe {
        let head_dim = get!(op, cache.head_dim);
        let (g, t) = place_in_fragment();
        let from = get!(op, cache.keys).add(at);
        let mut keys = [[[0; 4]; 2]; K];
        // From place to place by constants: addresses of their own would take as many registers as what is loaded.
        for r in 0..2 {
            let token = g + 8 * r as u32;
            let from = from.wrapping_add(((token * head_dim + t * EIGHT) * 2) as usize);
            for c in 0..K {
                if c as u32 * CHUNK + t * EIGHT < head_dim && token < tokens {
                    keys[c][r] = ld_v4_u32(from.wrapping_add(c * 2 * CHUNK as usize));
                }
            }
        }
        keys
    }
}

/// Values likewise, from element `element` on.
#[inline(always)]
unsafe fn load_values(op: Current, at: usize, tokens: u32, element: u32) -> Values {
    unsafe {
        let head_dim = get!(op, cache.head_dim);
        let element = element + lane() / 4 * EIGHT;
        let from = get!(op, cache.values).add(at);
        let mut values = [[0; 4]; 4];
        for i in 0..4 {
            let token = value_token(i as u32);
            if element < head_dim && token < tokens {
                values[i] = ld_v4_u32(from.add(((token * head_dim + element) * 2) as usize));
            }
        }
        values
    }
}

/// Puts the step's own key, token `token` of the tile, in its place.
#[inline(always)]
unsafe fn put_key<const K: usize>(keys: &mut Keys<K>, place: Place, token: u32, head_dim: u32) {
    let (g, t) = place_in_fragment();
    for c in 0..K {
        let e = c as u32 * CHUNK + t * EIGHT;
        for r in 0..2 {
            if g + 8 * r as u32 == token && e < head_dim {
                keys[c][r] = unsafe { place.fresh(0, e).load_v4() };
            }
        }
    }
}

/// Its value likewise.
#[inline(always)]
unsafe fn put_value(values: &mut Values, place: Place, token: u32, element: u32, head_dim: u32) {
    let element = element + lane() / 4 * EIGHT;
    for i in 0..4 {
        if value_token(i as u32) == token && element < head_dim {
            values[i] = unsafe { place.fresh(1, element).load_v4() };
        }
    }
}

/// Waits for the queries, a warp for each head, and for the step's own key and value, a warp each, and leaves them
/// where all warps find them. A barrier must follow.
#[inline(always)]
unsafe fn ask<const K: usize>(a: &DecodeArgs, op: Current, place: Place, piece: Piece) {
    unsafe {
        let (warp, element) = (thread() / 32, 4 * lane());
        if warp >= HEADS + 2 {
            return;
        }
        let head_dim = get!(op, cache.head_dim);
        let fresh = get!(op, fresh);
        let seal = Seal::of(op, get!(op, input.from));
        let query = warp < HEADS;
        let (from, exists);
        if query {
            exists = warp < piece.heads;
            from = get!(op, input.x).wrapping_add(((piece.head + warp) * head_dim) as usize);
        } else {
            exists = !fresh.is_null() && get!(op, now.position) < piece.to;
            let first = (warp - HEADS) * get!(op, cache.kv_heads) + piece.kv_head;
            from = fresh.cast_const().wrapping_add((first * head_dim) as usize);
        }
        let active = exists && element < head_dim;
        let scale = f32::from_bits(here((get!(op, scale) * LOG2_E).to_bits()));
        let mut words = [0; 4];
        loop {
            let mut all = true;
            if active {
                words = ld_relaxed_v4_u32(from.add(element as usize));
                all = seal.all_on(words);
            }
            // The lanes stay together.
            if warp::all(all) {
                break;
            }
            spin();
        }
        let mut v = words.map(|w| seal.open(w));
        if may_be(LATE) && get!(op, late) != 0 && warp <= HEADS {
            v = turn(op, v, !query);
            // Of the pieces with this key, the first keeps it.
            let group = get!(op, group);
            let first = piece.element == 0 && piece.head == piece.kv_head * group;
            if !query && active && first {
                let base = get!(op, now.position) - get!(op, now.position) % TOKENS;
                let at = tile_at(a, op, piece.kv_head, base)
                    + (get!(op, now.position) % TOKENS * head_dim + element) as usize * 2;
                let words = [pack_f16x2(v[0], v[1]), pack_f16x2(v[2], v[3])];
                st_global_v2(get!(op, cache.keys).add(at), words);
            }
        }
        if !query {
            if active {
                let words = [pack_f16x2(v[0], v[1]), pack_f16x2(v[2], v[3])];
                place.fresh(warp - HEADS, element).store_v2(words);
            }
            return;
        }
        v = v.map(|v| if active { v * scale } else { 0.0 });
        if element < K as u32 * CHUNK {
            let (near, far) = (split(v[0], v[1]), split(v[2], v[3]));
            for rest in 0..2 {
                let to = place.query_of(warp, element, rest as u32);
                to.store_v2([near[rest], far[rest]]);
            }
        }
    }
}

/// Norms a head, four elements a lane, and rotates it.
#[inline(always)]
unsafe fn turn(op: Current, v: [f32; 4], key: bool) -> [f32; 4] {
    unsafe {
        let (lane, head_dim) = (lane(), get!(op, cache.head_dim));
        let element = 4 * lane;
        let inside = element < head_dim;
        let weight = if key {
            get!(op, key_norm)
        } else {
            get!(op, input.norm)
        };
        let mut w = [0.0; 4];
        if inside {
            w = ldg_v4_u32(weight.add(element as usize)).map(f32::from_bits);
        }
        let squares = (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]);
        let mean = warp::reduce_sum_f32(squares) * float::rcp_approx(head_dim as f32);
        let scale = float::rsqrt_approx(mean + get!(op, input.eps));
        let v: [f32; 4] = unrolled!(4, |k| v[k] * scale * w[k]);
        let dims = get!(op, rotation.dims);
        let halves = get!(op, rotation.halves) != 0;
        // The pairs' other elements: half of the rotated ones away, or beside it.
        let apart = if halves { dims / 8 } else { 0 };
        let upper = lane >= apart;
        let partner = if upper { lane - apart } else { lane + apart };
        let others = v.map(|v| warp::shuffle_idx(v, partner % 32));
        if element >= dims {
            return v;
        }
        let table = get!(op, rotation.table).add((get!(op, now.position) * dims) as usize);
        let mut turned = [0.0; 4];
        for k in 0..4 {
            let e = element + k as u32;
            let (pair, other, second) = if halves {
                (if upper { e - dims / 2 } else { e }, others[k], upper)
            } else {
                (e / 2, v[k ^ 1], k % 2 == 1)
            };
            let at = table.add(2 * pair as usize);
            let (cos, sin) = (ldg_f32(at), ldg_f32(at.add(1)));
            turned[k] = v[k] * cos + if second { other } else { -other } * sin;
        }
        turned
    }
}

/// Two values as pairs of f16: rounded, and what the rounding leaves over.
#[inline(always)]
fn split(low: f32, high: f32) -> [u32; 2] {
    let word = pack_f16x2(low, high);
    let back = |bits: u32| F16::from_bits(bits as u16).to_f32();
    [word, pack_f16x2(low - back(word), high - back(word >> 16))]
}

/// This warp's share of the block's piece, left in its part.
#[inline(always)]
unsafe fn walk<const K: usize>(a: &DecodeArgs, op: Current, place: Place, piece: Piece) {
    unsafe {
        let warp = thread() / 32;
        let mut base = here(piece.from + warp * TOKENS);
        // What the cache holds: the step's own is still on its way.
        let fresh = !get!(op, fresh).is_null();
        let cached = get!(op, now.position) + u32::from(!fresh);
        let end = if piece.to < cached { piece.to } else { cached };
        let any = base < piece.to;
        let (mut keys, mut values) = ([[[0; 4]; 2]; K], [[0; 4]; 4]);
        // The first are on their way while the query is awaited.
        if any {
            let at = tile_at(a, op, piece.kv_head, base);
            keys = load_keys(op, at, end.saturating_sub(base));
            let at = tile_at(a, op, piece.kv_head, here(base));
            values = load_values(op, at, end.saturating_sub(base), piece.element);
        }
        // The step's own token, as the tile counts them.
        let mut own = here(if fresh {
            get!(op, now.position).wrapping_sub(base)
        } else {
            u32::MAX
        });
        ask::<K>(a, op, place, piece);
        sync();
        // Of heads `2 t` and `2 t + 1`; of elements `8 g + 2 j` and the next.
        let mut peak = [NONE; 2];
        let mut sums = [[0.0f32; 4]; 4];
        // The weights' own, by a product with ones: the same in every lane of a head. Where it is known to begin with zero, the first tile
        // gets code of its own.
        let mut mass = [f32::from_bits(here(0)), 0.0, 0.0, 0.0];
        // Who has no tokens leaves a part of no weight.
        while base < piece.to {
            if own < TOKENS {
                let head_dim = get!(op, cache.head_dim);
                put_key(&mut keys, place, own, head_dim);
                put_value(&mut values, place, own, piece.element, head_dim);
            }
            // Several sums, so that one product does not wait for the last.
            let mut scores = [[[0.0f32; 4]; 2]; 2];
            for c in 0..K {
                let k = keys[c];
                for rest in 0..2 {
                    let q = place.query(c as u32, rest as u32).load_v4();
                    for h in 0..2 {
                        let keys = [k[0][2 * h], k[1][2 * h], k[0][2 * h + 1], k[1][2 * h + 1]];
                        let sum = &mut scores[rest][h];
                        *sum = mma::m16n8k16_f16(keys, [q[2 * h], q[2 * h + 1]], *sum);
                    }
                }
            }
            let mut s: [f32; 4] = unrolled!(4, |i| {
                let [[a, b], [c, d]] = [0, 1].map(|rest: usize| scores[rest].map(|v| v[i]));
                (a + b) + (c + d)
            });
            let (g, _) = place_in_fragment();
            for i in 0..4 {
                if base + g + i as u32 / 2 * 8 >= piece.to {
                    s[i] = NONE;
                }
            }
            let mut top = [s[0].max(s[2]), s[1].max(s[3])];
            for width in [4, 8, 16] {
                for i in 0..2 {
                    top[i] = top[i].max(warp::shuffle_xor(top[i], width));
                }
            }
            // Nothing has been summed yet for the first tile, which most often is the only one.
            if mass[0] != 0.0 {
                for i in 0..2 {
                    top[i] = top[i].max(peak[i]);
                    let shrink = float::exp2_approx(peak[i] - top[i]);
                    mass[i] *= shrink;
                    mass[i + 2] *= shrink;
                    for j in 0..4 {
                        sums[j][i] *= shrink;
                        sums[j][i + 2] *= shrink;
                    }
                }
            }
            peak = top;
            let weights: [f32; 4] = unrolled!(4, |i| float::exp2_approx(s[i] - top[i % 2]));
            let (near, far) = (split(weights[0], weights[1]), split(weights[2], weights[3]));
            for rest in 0..2 {
                let p = [mma::transpose(near[rest]), mma::transpose(far[rest])];
                let v = values;
                mass = mma::m16n8k16_f16([ONES; 4], p, mass);
                for j in 0..4 {
                    let values = [
                        prmt(v[0][j], v[1][j], 0x5410),
                        prmt(v[0][j], v[1][j], 0x7632),
                        prmt(v[2][j], v[3][j], 0x5410),
                        prmt(v[2][j], v[3][j], 0x7632),
                    ];
                    sums[j] = mma::m16n8k16_f16(values, p, sums[j]);
                }
            }
            base += TOKENS * WARPS;
            own = own.wrapping_sub(TOKENS * WARPS);
            if base < piece.to {
                let at = tile_at(a, op, piece.kv_head, base);
                keys = load_keys(op, at, end.saturating_sub(base));
                values = load_values(op, at, end.saturating_sub(base), piece.element);
            }
        }
        let (g, t) = place_in_fragment();
        for i in 0..2 {
            let head = 2 * t + i as u32;
            if head < piece.heads {
                let part = place.parts.add(head * HEAD_PARTS + warp * PART);
                for j in [0, 2] {
                    let (s, next) = (sums[j], sums[j + 1]);
                    let at = part.add(g * EIGHT + 2 * j as u32);
                    at.store_v4([s[i], s[i + 2], next[i], next[i + 2]]);
                }
                if g == 0 {
                    part.add(WIDTH).store_v2([peak[i], mass[i]]);
                }
            }
        }
    }
}

/// Warps whose parts are merged at once: one after the other they would take as long as everything else.
const BATCH: usize = 4;
const BATCHES: usize = WARPS as usize / BATCH;

/// Threads that merge the warps' parts, four elements each: the block's last, whose warps have no tokens where a sequence is
/// short. They know what goes where by the time that the others are done.
const JOINING: u32 = HEADS * WIDTH / 4;

/// Merges the warps' parts of piece `index`, once they are there, and writes what comes of it.
#[inline(always)]
unsafe fn join(op: Current, parts: SharedPtr<f32>, index: u32) {
    unsafe {
        let i = thread().wrapping_sub(32 * WARPS - JOINING);
        let (mut warps, mut splits, mut at, mut to) = (0, 0, 0, 0);
        let mut seal = Seal::PLAIN;
        let e = i % (WIDTH / 4) * 4;
        if i < JOINING {
            // Not known from before: it would take registers that the tiles need.
            let piece = Piece::of(op, index, get!(op, now.position));
            let head = i / (WIDTH / 4);
            if head < piece.heads && e < piece.width {
                let number = if get!(op, sealed) != 0 {
                    get!(op, number)
                } else {
                    PLAIN
                };
                seal = Seal::of(op, number);
                warps = piece.warps();
                splits = get!(op, splits);
                at = parts.add(head * HEAD_PARTS).addr();
                let (head, head_dim) = (piece.head + head, get!(op, cache.head_dim));
                to = if splits == 1 {
                    head * head_dim + piece.element + e
                } else {
                    let part = head * head_dim.div_ceil(WIDTH) + piece.element / WIDTH;
                    (part * splits + piece.split) * PART + e
                };
            }
        }
        let (seal, to) = (seal.here(), get!(op, out).add(here(to) as usize));
        let (warps, splits, at) = (here(warps), here(splits), here(at));
        sync();
        if splits == 0 {
            return;
        }
        let part = |w: usize| SharedPtr::<f32>::from_addr(at).add(w as u32 * PART);
        let mut stats = [[[0.0; 2]; BATCH]; BATCHES];
        for b in 0..BATCHES {
            for k in 0..BATCH {
                stats[b][k] = part(b * BATCH + k).add(WIDTH).load_v2();
            }
        }
        let tops = stats.map(|s| s.into_iter().fold(NONE, |top, s| top.max(s[0])));
        let peak = tops.into_iter().fold(NONE, f32::max);
        // As its word will have it: what is rounded off would count as much as the peak is great.
        let peak = seal.open(seal.close(peak));
        let (mut sums, mut mass) = ([0.0; 4], 0.0);
        for b in 0..BATCHES {
            if (b * BATCH) as u32 >= warps {
                break;
            }
            let mut parts = [[0.0; 4]; BATCH];
            for k in 0..BATCH {
                parts[k] = part(b * BATCH + k).add(e).load_v4();
            }
            for k in 0..BATCH {
                let weight = float::exp2_approx(stats[b][k][0] - peak);
                mass += weight * stats[b][k][1];
                for n in 0..4 {
                    sums[n] += weight * parts[k][n];
                }
            }
        }
        if splits == 1 {
            let inverse = float::rcp_approx(mass);
            seal.write_four(to, sums.map(|s| s * inverse));
        } else {
            seal.write_four(to, sums);
            if e == 0 {
                seal.write_four(to.add(WIDTH as usize), [peak, mass, 0.0, 0.0]);
            }
        }
    }
}

const _: () = assert!(JOINING <= 32 * WARPS);
