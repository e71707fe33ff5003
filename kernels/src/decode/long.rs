//! Attention over many tokens: keys and values of a split come through the [ring](super::ring), among the weights.
//!
//! So they are on their way long before the query is there, and memory is at work while blocks wait for each other. A turn is a
//! block of the cache, all its keys of a head and behind them its values. The copy engine sees what launches before this one have
//! written; the cache's last blocks, which this one writes into, warps read themselves.

use super::attend::{
    CHUNK, EIGHT, HEAD_PARTS, NO_SCORES, Piece, Place, TOKENS, WIDTH, add_scores, ask, cached_end,
    load_keys, load_values, own_token, pieces, place_in_fragment, put_key, put_value, seen,
    tile_at,
};
use super::ring::Ring;
use super::running::Running;
use super::{Current, DecodeArgs, Listed, WARPS, Warp, blocks, get, kind, sync, thread};
use crate::rows::BLOCK_TOKENS;
use cuda_std::int::here;
use cuda_std::shared::SharedPtr;
use cuda_std::thread::block_idx_x;

/// Tokens of a turn.
const TURN: u32 = BLOCK_TOKENS as u32;
const _: () = assert!(TURN == 2 * TOKENS, "two warps take a turn's tiles");

/// Bytes of a turn, and as many more as are read past its last row.
pub const fn turn_bytes(head_dim: u32) -> u32 {
    2 * half_bytes(head_dim) + 2 * (head_dim.next_multiple_of(WIDTH) - head_dim)
}

/// Bytes of a turn's keys.
const fn half_bytes(head_dim: u32) -> u32 {
    2 * head_dim * TURN
}

/// A piece's tokens that come through the ring end there, a whole block.
#[inline(always)]
fn ring_end(a: &DecodeArgs, piece: &Piece) -> u32 {
    let old = here(a.position) / TURN * TURN;
    if piece.to < old { piece.to } else { old }
}

/// What the feeder does for an operation that may be an attention, of a row whose token is number `position`.
#[inline(always)]
pub(super) unsafe fn feed<const BULK: bool>(
    a: &DecodeArgs,
    op: Listed,
    position: u32,
    ring: &mut Ring,
) {
    unsafe {
        if get!(op, kind) != kind::ATTEND || get!(op, splits) == 1 {
            return;
        }
        let head_dim = get!(op, cache.head_dim);
        let mut index = block_idx_x();
        while index < pieces(op) {
            let piece = Piece::of(op, index, position);
            let mut base = piece.from;
            while base < ring_end(a, &piece) {
                let at = tile_at(a, op, piece.kv_head, base);
                let keys = get!(op, cache.keys).cast_const().wrapping_add(at);
                let values = get!(op, cache.values).cast_const().wrapping_add(at);
                let (half, all) = (half_bytes(head_dim), turn_bytes(head_dim));
                ring.bring::<BULK>(a, [keys, values], half, all);
                base += TURN;
            }
            index += blocks();
        }
    }
}

/// This warp's share of the block's piece, left in its parts.
#[inline(always)]
pub(super) unsafe fn walk<const K: usize, const H: usize>(
    a: &DecodeArgs,
    op: Current,
    place: Place,
    piece: Piece,
    w: &mut Warp,
) {
    unsafe {
        let warp = here(thread() / 32);
        let old = ring_end(a, &piece);
        let old = if piece.from < old { old } else { piece.from };
        let mut turns = (old - piece.from) / TURN;
        // Tile `n` is warp `n % WARPS`'s, and of those that do not come through the ring there are fewer than warps. These are on their
        // way while the query is awaited.
        let after = (warp + WARPS - 2 * turns % WARPS) % WARPS;
        let base = here(old + after * TOKENS);
        let recent = base < piece.to;
        let (mut keys, mut values) = ([[[0; 4]; 2]; K], [[[0; 4]; 4]; H]);
        if recent {
            let dim = get!(op, cache.head_dim);
            let there = cached_end(op, &piece).saturating_sub(base);
            let at = tile_at(a, op, piece.kv_head, base);
            keys = load_keys(get!(op, cache.keys).add(at), dim, there);
            for h in 0..H {
                let at = tile_at(a, op, piece.kv_head, here(base));
                let from = get!(op, cache.values).add(at);
                values[h] = load_values(from, dim, there, h as u32 * WIDTH);
            }
        }
        ask::<K>(a, op, place, piece);
        sync();
        let mut running = Running::<H>::new();
        if recent {
            let own = own_token(op, base);
            if own < TOKENS {
                let head_dim = get!(op, cache.head_dim);
                put_key(&mut keys, place, own, head_dim);
                for h in 0..H {
                    put_value(&mut values[h], place, own, h as u32 * WIDTH, head_dim);
                }
            }
            let mut scores = NO_SCORES;
            for c in 0..K {
                add_scores(&mut scores, place, c as u32, &keys[c]);
            }
            let p = running.weigh(seen(&scores, base, piece.to));
            for h in 0..H {
                running.add(h, &values[h], &p);
            }
        }
        // Of a turn two neighbours have each a tile.
        let mut others = warp / 2;
        while turns > 0 {
            turns -= 1;
            if others > 0 {
                others -= 1;
                w.place.pass();
                continue;
            }
            others = WARPS / 2 - 1;
            let start = w.place.wait().start;
            add_tile::<K, H>(op, place, start, warp % 2, &mut running);
            w.place.release();
        }
        running.leave(place.parts(), HEAD_PARTS, piece.heads, warp);
    }
}

/// Adds one of the two tiles of a turn that begins at address `start`.
#[inline(always)]
unsafe fn add_tile<const K: usize, const H: usize>(
    op: Current,
    place: Place,
    start: u32,
    tile: u32,
    running: &mut Running<H>,
) {
    unsafe {
        let row = 2 * get!(op, cache.head_dim);
        let (g, t) = place_in_fragment();
        let eight = |from: u32| SharedPtr::<u32>::from_addr(from).load_v4();
        // A row's elements past its end are the next one's: zero in the query, and not written of what comes of values.
        let keys = start + (tile * TOKENS + g) * row + 2 * EIGHT * t;
        let mut scores = NO_SCORES;
        for c in 0..K {
            let keys = [0, 8].map(|r| eight(keys + r * row + c as u32 * 2 * CHUNK));
            add_scores(&mut scores, place, c as u32, &keys);
        }
        let p = running.weigh(seen(&scores, 0, TOKENS));
        let values = start + (TURN + tile * TOKENS + 2 * t) * row + 2 * EIGHT * g;
        for h in 0..H {
            let [a, b, c, d] = [0, 1, 8, 9].map(|i| eight(values + i * row + h as u32 * 2 * WIDTH));
            running.add(h, &[a, b, c, d], &p);
        }
    }
}
