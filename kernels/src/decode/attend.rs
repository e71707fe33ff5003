//! Attention of the step's row over the cache, on tensor cores.
//!
//! A piece is up to [`HEADS`] query heads that share a key-value head, over a split of the tokens; with all of the values where these
//! come [through the ring](super::long), as they do in several splits and of 8 bits, else with [`WIDTH`] elements of them. A block takes one at a time, its warps
//! tiles of 16 tokens. The heads are eight rows of `Q Kᵀ`, whose columns are the tokens, and the columns of `Vᵀ Pᵀ`, whose rows are
//! the elements: what is a fragment of the scores is one of the weights, and keys and values are read once
//! for all heads, straight into fragments. Which element is which of a product's summands, and which of its rows, is
//! free, and chosen so that a lane's are neighbours; so is which token is which, chosen for the banks ([`token_of`]). A query and a weight are two f16 each, of which the second is what the
//! first leaves over: products are those of f32 that way, in all but the last bits. Of a query they are two of `Q`'s sixteen rows.
//!
//! A warp's [running softmax](super::running) goes from tile to tile; warps merge in shared memory, splits in
//! [`merge`](super::merge), which some of the blocks do once they are through with their pieces.

use super::join::{TARGET_BYTES, Target, join, leave};
use super::pieces::{Cutting, Piece};
use super::running::{Running, split};
use super::seal::Seal;
use super::{
    Current, DecodeArgs, LATE, ROWS_AT, WARPS, WIDE, Warp, cache_block, get, is_quantised, lane,
    may_be, sync, thread,
};
use super::{long, merge, q8};
use crate::attention::{LOG2_E, NONE};
use crate::rows::BLOCK_TOKENS;
use crate::unrolled;
use cuda_std::half::pack_f16x2;
use cuda_std::int::here;
use cuda_std::memory::{ld_relaxed_v4_u32, ld_v4_u32, ldg_f32, ldg_v4_u32, st_global_v2};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::block_idx_x;
use cuda_std::{float, mma, warp};

/// Query heads of a piece: the columns of a product.
pub const HEADS: u32 = 8;
/// Elements of the values of a piece. All of a wide head's would take more registers than there are.
pub const WIDTH: u32 = 64;
/// Most elements of a head.
pub const MAX_HEAD_DIM: u32 = 128;
/// Tokens of a tile: the rows of a product.
pub(crate) const TOKENS: u32 = 16;
/// Elements of a lane at a time, 16 bytes of the cache; four lanes take a chunk.
pub(super) const EIGHT: u32 = 8;
pub(crate) const CHUNK: u32 = 4 * EIGHT;
/// Heads up to so many elements wide are of two chunks at most, others of four.
pub const NARROW_DIM: u32 = 2 * CHUNK;

/// Shared memory before the warps' parts: queries, as fragments of both halves of up to four chunks; then the
/// step's own key and value.
const FRESH_AT: u32 = MAX_HEAD_DIM / CHUNK * 32 * 32;
/// And of the piece what is needed once its tokens are through.
const TARGET_AT: u32 = FRESH_AT + 2 * 2 * MAX_HEAD_DIM;
pub(crate) const ASKED_BYTES: u32 = TARGET_AT + TARGET_BYTES;

/// Bytes of shared memory that attention needs, with so many query heads for each key-value head, where it is [`Op::ringed`](super::Op::ringed) or is not.
pub const fn attend_bytes(group: u32, head_dim: u32, ringed: bool) -> u32 {
    let heads = if group < HEADS { group } else { HEADS };
    let halves = if ringed { head_dim.div_ceil(WIDTH) } else { 1 };
    ASKED_BYTES + heads * halves * HEAD_PARTS * 4
}

/// Words that a head's splits leave, for each of these.
pub const fn split_words(head_dim: u32) -> u32 {
    head_dim + OCTET
}

/// Elements of a head whose parts lie together, a sector of the memory: what is written of less takes longer to be seen by others.
pub const OCTET: u32 = 8;

/// Where split `split` of so many leaves element `element` of a head; or, behind the last, its peak and mass. Those of all splits are
/// neighbours, as who merges them reads them at once.
#[inline(always)]
pub(super) fn part_at(head_dim: u32, splits: u32, head: u32, element: u32, split: u32) -> u32 {
    let before = element % OCTET;
    (head * split_words(head_dim) + element - before) * splits + OCTET * split + before
}

/// Words of a part: the elements' sums, in places of four; their peak and mass, two unused.
pub const PART: u32 = WIDTH + 4;

/// Where in a part element `element`, of a multiple of four, begins: who leaves eight neighbours in two pieces leaves the second ones behind
/// all the first ones, so that neighbours' pieces are in different banks.
#[inline(always)]
pub(crate) const fn part_place(element: u32) -> u32 {
    element / EIGHT * 4 + element % EIGHT / 4 * (WIDTH / 2)
}

/// And which element is in place `place`, a multiple of four.
#[inline(always)]
pub(crate) const fn part_element(place: u32) -> u32 {
    place % (WIDTH / 2) * 2 + place / (WIDTH / 2) * 4
}

const _: () = {
    let mut element = 0;
    while element < WIDTH {
        assert!(part_element(part_place(element)) == element);
        element += 4;
    }
};

/// Words from head to head of the warps' parts in shared memory, of all heads' first halves and then of wide ones' second: these, and as many
/// more as send neighbours' words to different banks.
pub(super) const HEAD_PARTS: u32 = WARPS * PART + 4;

/// The thread that says what the piece is, of a warp that waits for no query.
const KEEPER: u32 = 32 * (WARPS - 1);
const _: () = assert!(KEEPER / 32 >= HEADS + 2);

/// Shared memory of a piece.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    asked: u32,
    parts: SharedPtr<f32>,
}

impl Place {
    #[inline(always)]
    fn here() -> Place {
        Place::at(ROWS_AT)
    }

    /// From so many bytes into shared memory on.
    #[inline(always)]
    pub fn at(start: u32) -> Place {
        Place {
            asked: start,
            parts: shared::at(start + ASKED_BYTES),
        }
    }

    /// The warps' parts.
    #[inline(always)]
    pub fn parts(&self) -> SharedPtr<f32> {
        self.parts
    }

    /// This lane's fragment of the queries, of either half of a chunk.
    #[inline(always)]
    pub fn query(&self, chunk: u32, half: u32) -> SharedPtr<u32> {
        shared::at(self.asked + ((2 * chunk + half) * 32 + lane()) * 16)
    }

    /// Leaves four elements of a head's query there, scaled, from `element` on.
    #[inline(always)]
    pub unsafe fn put_query(&self, head: u32, element: u32, v: [f32; 4]) {
        let place = (
            element / CHUNK,
            element % CHUNK / EIGHT,
            element % EIGHT / 4,
        );
        unsafe { self.put_query_at(head, place, v) }
    }

    /// The same in a place of chunk, lane of four and half.
    #[inline(always)]
    unsafe fn put_query_at(&self, head: u32, (chunk, t, half): (u32, u32, u32), v: [f32; 4]) {
        let (near, far) = (split(v[0], v[1]), split(v[2], v[3]));
        let at = ((2 * chunk + half) * 32 + head * 4 + t) * 16;
        let to = shared::at::<u32>(self.asked + at);
        unsafe { to.store_v4([near[0], near[1], far[0], far[1]]) }
    }

    /// What [`join`](super::join) keeps of the piece.
    #[inline(always)]
    pub fn target(&self) -> SharedPtr<u32> {
        shared::at(self.asked + TARGET_AT)
    }

    /// Elements of the step's key (`kind` 0) or value (1), as the cache holds them.
    #[inline(always)]
    pub fn fresh(&self, kind: u32, element: u32) -> SharedPtr<u32> {
        shared::at(self.asked + FRESH_AT + (kind * MAX_HEAD_DIM + element) * 2)
    }
}

/// [`kind::ATTEND`](super::kind::ATTEND).
#[inline(always)]
pub(super) unsafe fn attend(a: &DecodeArgs, op: Current, w: &mut Warp) {
    unsafe {
        let mut index = Cutting::of(op).first();
        while index < Cutting::of(op).pieces() {
            let piece = Piece::of(Cutting::of(op), index, get!(op, now.position));
            let place = Place::here();
            if thread() == KEEPER {
                Target::new(op, &piece).store(place);
            }
            if is_quantised(op) {
                ringed::<true>(a, op, place, piece, w);
            } else if get!(op, splits) > 1 {
                ringed::<false>(a, op, place, piece, w);
            } else {
                if may_be(WIDE) && get!(op, cache.head_dim) > NARROW_DIM {
                    walk::<4>(a, op, place, piece);
                } else {
                    walk::<2>(a, op, place, piece);
                }
                join::<1>(op, place);
            }
            index += Cutting::of(op).step();
            // Of the last the operation's end is the barrier.
            if index < Cutting::of(op).pieces() {
                sync();
            }
        }
        if get!(op, splits) > 1 && block_idx_x() < get!(op, mergers) {
            merge::merge(op);
        }
    }
}

/// A piece whose keys and values come through the ring, of a cache of 8 bits (`Q`) or of f16.
#[inline(always)]
unsafe fn ringed<const Q: bool>(
    a: &DecodeArgs,
    op: Current,
    place: Place,
    piece: Piece,
    w: &mut Warp,
) {
    unsafe {
        if may_be(WIDE) && get!(op, cache.head_dim) > NARROW_DIM {
            let behind = long::walk::<4, 2, Q>(a, op, place, piece, w);
            join::<2>(op, place);
            long::pass(w, behind);
        } else {
            let behind = long::walk::<2, 1, Q>(a, op, place, piece, w);
            join::<1>(op, place);
            long::pass(w, behind);
        }
    }
}

/// This lane's keys of a tile, as they lie in a cache of f16: eight elements of two keys for each of `K` chunks.
pub(crate) type Keys<const K: usize> = [[[u32; 4]; 2]; K];
/// Its values: eight elements of four.
pub(crate) type Values = [[u32; 4]; 4];

/// Row and column of this lane's place in a fragment.
#[inline(always)]
pub(crate) fn place_in_fragment() -> (u32, u32) {
    (lane() / 4, lane() % 4)
}

/// The token of a tile in column `column` of a product, of eight: an order in which lanes that read [swizzled](super::long) rows at the same time, of
/// two neighbouring columns for keys, of every other one for values, find them in different banks.
#[inline(always)]
pub(super) const fn token_of(column: u32) -> u32 {
    (0x1625_4370 >> (4 * column)) & 7
}

/// The token of a tile whose key is the lane's `r`th: of columns `g` and `g + 8`.
#[inline(always)]
pub(super) fn key_token(r: u32) -> u32 {
    token_of(lane() / 4) + 8 * r
}

/// The token of a tile whose score, and whose value, is the lane's `i`th: of a product's columns, and then summands, `2 t`, `2 t + 1`,
/// `2 t + 8`, `2 t + 9`.
#[inline(always)]
pub(crate) fn value_token(i: u32) -> u32 {
    token_of(2 * (lane() % 4) + i % 2) + i / 2 * 8
}

/// Where the tile at token `base` begins in the cache, in bytes.
#[inline(always)]
pub(super) unsafe fn tile_at(a: &DecodeArgs, op: Current, kv_head: u32, base: u32) -> usize {
    unsafe {
        at_token(
            a,
            get!(op, cache.kv_heads),
            get!(op, row_bytes),
            kv_head,
            base,
        )
    }
}

/// Where the row of token `token` and of a head begins in a cache of so many heads and rows of so many bytes, in bytes.
#[inline(always)]
pub(super) unsafe fn at_token(
    a: &DecodeArgs,
    kv_heads: u32,
    row_bytes: u32,
    kv_head: u32,
    token: u32,
) -> usize {
    unsafe { row_of(a, kv_heads, kv_head, token) as usize * row_bytes as usize }
}

/// The number of that row.
#[inline(always)]
pub(super) unsafe fn row_of(a: &DecodeArgs, kv_heads: u32, kv_head: u32, token: u32) -> u32 {
    let tokens = BLOCK_TOKENS as u32;
    let block = unsafe { cache_block(a, token) };
    (block * kv_heads + kv_head) * tokens + token % tokens
}

/// Keys of the tile that begins at `from`, of its tokens before `tokens`.
#[inline(always)]
pub(crate) unsafe fn load_keys<const K: usize>(
    from: *const u8,
    head_dim: u32,
    tokens: u32,
) -> Keys<K> {
    unsafe {
        let (_, t) = place_in_fragment();
        let mut keys = [[[0; 4]; 2]; K];
        // From place to place by constants: addresses of their own would take as many registers as what is loaded.
        for r in 0..2 {
            let token = key_token(r as u32);
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
pub(crate) unsafe fn load_values(
    from: *const u8,
    head_dim: u32,
    tokens: u32,
    element: u32,
) -> Values {
    unsafe {
        let element = element + lane() / 4 * EIGHT;
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

/// Keys of the tile at token `base`, of its first `tokens`.
#[inline(always)]
pub(super) unsafe fn tile_keys<const K: usize, const Q: bool>(
    a: &DecodeArgs,
    op: Current,
    kv_head: u32,
    base: u32,
    tokens: u32,
) -> Keys<K> {
    unsafe {
        let from = get!(op, cache.keys).add(tile_at(a, op, kv_head, base));
        let head_dim = get!(op, cache.head_dim);
        if Q {
            q8::load_keys(from, head_dim, get!(op, row_bytes), tokens)
        } else {
            load_keys(from, head_dim, tokens)
        }
    }
}

/// Values likewise, from element `element` on.
#[inline(always)]
pub(super) unsafe fn tile_values<const Q: bool>(
    a: &DecodeArgs,
    op: Current,
    kv_head: u32,
    base: u32,
    tokens: u32,
    element: u32,
) -> Values {
    unsafe {
        let from = get!(op, cache.values).add(tile_at(a, op, kv_head, base));
        let head_dim = get!(op, cache.head_dim);
        if Q {
            q8::load_values(from, head_dim, get!(op, row_bytes), tokens, element)
        } else {
            load_values(from, head_dim, tokens, element)
        }
    }
}

/// Puts the step's own key, token `token` of the tile, in its place.
#[inline(always)]
pub(super) unsafe fn put_key<const K: usize, const Q: bool>(
    keys: &mut Keys<K>,
    place: Place,
    token: u32,
    head_dim: u32,
) {
    let (_, t) = place_in_fragment();
    for c in 0..K {
        let e = if Q {
            q8::key_element::<K>() + c as u32 * EIGHT
        } else {
            c as u32 * CHUNK + t * EIGHT
        };
        for r in 0..2 {
            if key_token(r as u32) == token && e < head_dim {
                keys[c][r] = unsafe { place.fresh(0, e).load_v4() };
            }
        }
    }
}

/// Its value likewise.
#[inline(always)]
pub(super) unsafe fn put_value(
    values: &mut Values,
    place: Place,
    token: u32,
    element: u32,
    head_dim: u32,
) {
    let element = element + lane() / 4 * EIGHT;
    for i in 0..4 {
        if value_token(i as u32) == token && element < head_dim {
            values[i] = unsafe { place.fresh(1, element).load_v4() };
        }
    }
}

/// What a lane has asked for of a piece's queries, a warp for each head, or of the step's own key and value, a warp each.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    from: *const f32,
    active: bool,
    words: [u32; 4],
}

impl Asked {
    /// Looks for it the first time.
    #[inline(always)]
    pub unsafe fn first(op: Current, piece: Piece) -> Asked {
        unsafe {
            let (warp, element) = (thread() / 32, 4 * lane());
            let head_dim = get!(op, cache.head_dim);
            let fresh = get!(op, fresh);
            let (from, exists);
            if warp < HEADS {
                exists = warp < piece.heads;
                from = get!(op, input.x).wrapping_add(((piece.head + warp) * head_dim) as usize);
            } else {
                let own = get!(op, now.position) < piece.to;
                exists = warp < HEADS + 2 && !fresh.is_null() && own;
                let first = (warp - HEADS) * get!(op, cache.kv_heads) + piece.kv_head;
                from = fresh.cast_const().wrapping_add((first * head_dim) as usize);
            }
            let mut asked = Asked {
                from: from.wrapping_add(element as usize),
                active: exists && element < head_dim,
                words: [0; 4],
            };
            if asked.active {
                asked.words = ld_relaxed_v4_u32(asked.from);
            }
            asked
        }
    }
}

/// Waits for what has been asked for, and leaves it where all warps find it. A barrier must follow.
#[inline(always)]
pub(super) unsafe fn ask<const K: usize, const Q: bool>(
    a: &DecodeArgs,
    op: Current,
    place: Place,
    piece: Piece,
    asked: Asked,
) {
    unsafe {
        let (warp, element) = (thread() / 32, 4 * lane());
        if warp >= HEADS + 2 {
            return;
        }
        let head_dim = get!(op, cache.head_dim);
        let seal = Seal::of(op, get!(op, input.from));
        let query = warp < HEADS;
        let Asked {
            from,
            active,
            mut words,
        } = asked;
        let scale = f32::from_bits(here((get!(op, scale) * LOG2_E).to_bits()));
        if !warp::all(!active || seal.all_on(words)) {
            // Behind the head the last are as good as any to wait for.
            let behind = if active { 0 } else { element + 4 - head_dim };
            let [come] = seal.await_all([from.wrapping_sub(behind as usize)]);
            words = come.map(|w| if active { w } else { 0 });
        }
        let mut v = words.map(|w| seal.open(w));
        let turns = may_be(LATE) && get!(op, late) != 0 && warp <= HEADS;
        if turns {
            v = turn(op, v, !query);
        }
        if !query {
            let mut words = [pack_f16x2(v[0], v[1]), pack_f16x2(v[2], v[3])];
            if Q || turns {
                // Of the pieces with this key, the first keeps it.
                let group = get!(op, group);
                let first = piece.element == 0 && piece.head == piece.kv_head * group;
                let own = get!(op, now.position) < piece.to;
                let at = at_token(
                    a,
                    get!(op, cache.kv_heads),
                    get!(op, row_bytes),
                    piece.kv_head,
                    get!(op, now.position),
                );
                if Q {
                    let key = warp == HEADS;
                    let base = if key {
                        get!(op, cache.keys)
                    } else {
                        get!(op, cache.values)
                    };
                    let keeps = first && own && !get!(op, fresh).is_null();
                    words = q8::keep(op, v, keeps, base.wrapping_add(at));
                } else if active && first {
                    st_global_v2(get!(op, cache.keys).add(at + 2 * element as usize), words);
                }
            }
            if active {
                place.fresh(warp - HEADS, element).store_v2(words);
            }
            return;
        }
        v = v.map(|v| if active { v * scale } else { 0.0 });
        if element < K as u32 * CHUNK {
            if Q {
                place.put_query_at(warp, q8::query_place::<K>(element), v);
            } else {
                place.put_query(warp, element, v);
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

/// This warp's share of the block's piece, of one split, left in its part.
#[inline(always)]
unsafe fn walk<const K: usize>(a: &DecodeArgs, op: Current, place: Place, piece: Piece) {
    unsafe {
        let warp = thread() / 32;
        let mut base = here(piece.from + warp * TOKENS);
        let end = cached_end(op, &piece);
        let any = base < piece.to;
        let (mut keys, mut values) = ([[[0; 4]; 2]; K], [[0; 4]; 4]);
        // The first are on their way while the query is awaited.
        if any {
            let (dim, there) = (get!(op, cache.head_dim), end.saturating_sub(base));
            let at = tile_at(a, op, piece.kv_head, base);
            keys = load_keys(get!(op, cache.keys).add(at), dim, there);
            let at = tile_at(a, op, piece.kv_head, here(base));
            values = load_values(get!(op, cache.values).add(at), dim, there, piece.element);
        }
        let mut own = here(own_token(op, base));
        let asked = Asked::first(op, piece);
        ask::<K, false>(a, op, place, piece, asked);
        sync();
        let mut running = Running::<1>::new();
        while base < piece.to {
            if own < TOKENS {
                let head_dim = get!(op, cache.head_dim);
                put_key::<K, false>(&mut keys, place, own, head_dim);
                put_value(&mut values, place, own, piece.element, head_dim);
            }
            // Several sums, so that one product does not wait for the last.
            let mut scores = NO_SCORES;
            for c in 0..K {
                add_scores(&mut scores, place, c as u32, &keys[c]);
            }
            let [p] = running.weigh([seen(&scores, base, piece.to)]);
            running.add(0, &values, &p);
            base += TOKENS * WARPS;
            own = own.wrapping_sub(TOKENS * WARPS);
            if base < piece.to {
                let (dim, there) = (get!(op, cache.head_dim), end.saturating_sub(base));
                let at = tile_at(a, op, piece.kv_head, base);
                keys = load_keys(get!(op, cache.keys).add(at), dim, there);
                values = load_values(get!(op, cache.values).add(at), dim, there, piece.element);
            }
        }
        leave(&running, place, warp);
    }
}

/// A piece's tokens in the cache end there: the step's own is still on its way.
#[inline(always)]
pub(super) unsafe fn cached_end(op: Current, piece: &Piece) -> u32 {
    unsafe {
        let cached = get!(op, now.position) + u32::from(get!(op, fresh).is_null());
        if piece.to < cached { piece.to } else { cached }
    }
}

/// The step's own token, as the tile at token `base` counts them, where its key and value are on their way.
#[inline(always)]
pub(super) unsafe fn own_token(op: Current, base: u32) -> u32 {
    unsafe {
        if get!(op, fresh).is_null() {
            u32::MAX
        } else {
            get!(op, now.position).wrapping_sub(base)
        }
    }
}

/// Sums of a tile's scores: of either half of the tokens, and of two halves of a chunk.
pub(crate) type Scores = [[[f32; 4]; 2]; 2];
pub(crate) const NO_SCORES: Scores = [[[0.0; 4]; 2]; 2];

/// Adds the products of a chunk of the queries with that of this lane's two keys.
#[inline(always)]
pub(crate) unsafe fn add_scores(scores: &mut Scores, place: Place, chunk: u32, k: &[[u32; 4]; 2]) {
    for h in 0..2 {
        let queries = unsafe { place.query(chunk, h as u32).load_v4() };
        for half in 0..2 {
            let sum = &mut scores[half][h];
            *sum = mma::m16n8k16_f16(queries, [k[half][2 * h], k[half][2 * h + 1]], *sum);
        }
    }
}

/// The scores of head `g` and [`value_token`]s of the tile at token `base`, of tokens before `to`.
#[inline(always)]
pub(crate) fn seen(scores: &Scores, base: u32, to: u32) -> [f32; 4] {
    let mut s: [f32; 4] = unrolled!(4, |i| {
        let [a, b] = scores[i / 2].map(|v| v[i % 2] + v[i % 2 + 2]);
        a + b
    });
    // Most are whole.
    if base + TOKENS > to {
        for i in 0..4 {
            if base + value_token(i as u32) >= to {
                s[i] = NONE;
            }
        }
    }
    s
}
