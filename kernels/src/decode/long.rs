//! Attention over many tokens: keys and values of a split come through the [ring](super::ring), among the weights.
//!
//! So they are on their way long before the query is there, and memory is at work while blocks wait for each other. A turn is a
//! block of the cache, all its keys of a head and behind them its values. The copy engine sees what launches before this one have
//! written; the cache's last blocks, which this one writes into, warps read themselves.

use super::attend::{
    Asked, CHUNK, EIGHT, NO_SCORES, Piece, Place, TOKENS, Values, WIDTH, add_scores, ask, at_token,
    cached_end, load_keys, load_values, own_token, place_in_fragment, put_key, put_value, seen,
    tile_at,
};
use super::join::leave;
use super::ring::Ring;
use super::running::Running;
use super::task::Cached;
use super::{Current, DecodeArgs, WARPS, Warp, get, sync, thread};
use crate::rows::BLOCK_TOKENS;
use cuda_std::int::{here, opaque};
use cuda_std::shared::SharedPtr;

/// Tokens of a turn.
const TURN: u32 = BLOCK_TOKENS as u32;
const _: () = assert!(TURN == 2 * TOKENS, "two warps take a turn's tiles");

/// Turns between two of a warp's.
const BETWEEN: u32 = WARPS / 2 - 1;

/// Those in which each of a block's warps has a tile, and one more: so much may be lost at the ring's end.
pub const EAGER_TURNS: u32 = WARPS / 2 + 1;

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

/// What the feeder does for an attention of a row whose token is number `position`.
#[inline(always)]
pub(super) unsafe fn feed<const BULK: bool>(
    a: &DecodeArgs,
    cached: Cached,
    position: u32,
    ring: &mut Ring,
) {
    unsafe {
        let cutting = cached.cutting;
        let (kv_heads, head_dim) = (cutting.kv_heads, cutting.head_dim);
        let mut index = cutting.first();
        while index < cutting.pieces() {
            let piece = Piece::of(cutting, index, position);
            let mut base = piece.from;
            while base < ring_end(a, &piece) {
                let at = at_token(a, kv_heads, head_dim, piece.kv_head, base);
                let from = cached.bases.map(|base| base.wrapping_add(at));
                ring.bring::<BULK>(a, from, half_bytes(head_dim), turn_bytes(head_dim));
                base += TURN;
            }
            index += cutting.step();
        }
    }
}

/// This warp's share of the block's piece, left in its parts; how many turns are left to [`pass`], for which nobody waits.
///
/// Whatever does not need the query comes before the wait for it: a warp's first tile is in registers by then, where the ring has
/// room for all warps'.
#[inline(always)]
pub(super) unsafe fn walk<const K: usize, const H: usize>(
    a: &DecodeArgs,
    op: Current,
    place: Place,
    piece: Piece,
    w: &mut Warp,
) -> u32 {
    unsafe {
        let warp = here(thread() / 32);
        let old = ring_end(a, &piece);
        let old = if piece.from < old { old } else { piece.from };
        let mut turns = (old - piece.from) / TURN;
        // Tile `n` is warp `n % WARPS`'s, and of those that do not come through the ring there are fewer than warps.
        let after = (warp + WARPS - 2 * turns % WARPS) % WARPS;
        let asked = Asked::first(op, piece);
        // Where a warp has one of these it is its first.
        let mut base = here(old + after * TOKENS);
        let mut to = piece.to;
        let mut own = u32::MAX;
        let (mut keys, mut values) = ([[[0; 4]; 2]; K], [[[0; 4]; 4]; H]);
        let mut any = base < to;
        // Of a turn two neighbours have each a tile: so many turns pass by before a warp's first.
        let before = if turns < warp / 2 { turns } else { warp / 2 };
        if any {
            let dim = get!(op, cache.head_dim);
            let there = cached_end(op, &piece).saturating_sub(base);
            let at = tile_at(a, op, piece.kv_head, base);
            keys = load_keys(get!(op, cache.keys).add(at), dim, there);
            for h in 0..H {
                let at = tile_at(a, op, piece.kv_head, here(base));
                let from = get!(op, cache.values).add(at);
                values[h] = load_values(from, dim, there, h as u32 * WIDTH);
            }
            own = own_token(op, base);
        }
        // And before its next.
        let mut others = before;
        if get!(op, eager) != 0 {
            pass(w, before);
            turns -= before;
            others = 0;
            if !any && turns > 0 {
                any = true;
                (base, to) = (0, TOKENS);
                let tile = Tile::next(op, warp % 2, w);
                for c in 0..K {
                    keys[c] = tile.keys(c as u32);
                }
                for h in 0..H {
                    values[h] = tile.values(h as u32);
                }
                w.place.release();
                turns -= 1;
                others = BETWEEN;
            }
        }
        ask::<K>(a, op, place, piece, asked);
        sync();
        let mut running;
        if any {
            running = Running::<H>::new();
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
            let p = running.weigh(seen(&scores, base, to));
            for h in 0..H {
                running.add(h, &values[h], &p);
            }
        } else {
            running = Running::none();
        }
        while turns > others {
            pass(w, others);
            turns -= others + 1;
            others = BETWEEN;
            let tile = Tile::next(op, warp % 2, w);
            let mut scores = NO_SCORES;
            for c in 0..K {
                add_scores(&mut scores, place, c as u32, &tile.keys(c as u32));
            }
            let p = running.weigh(seen(&scores, 0, TOKENS));
            for h in 0..H {
                running.add(h, &tile.values(h as u32), &p);
            }
            w.place.release();
        }
        leave(&running, place, warp);
        if get!(op, eager) == 0 {
            // Others may be waiting for room.
            pass(w, turns);
            turns = 0;
        }
        turns
    }
}

/// Lets so many turns pass by.
#[inline(always)]
pub(super) unsafe fn pass(w: &mut Warp, turns: u32) {
    let mut turns = turns;
    while turns > 0 {
        unsafe { w.place.pass() }
        // Not unrolled.
        turns -= opaque(1);
    }
}

/// One of the two tiles of a turn.
#[derive(Clone, Copy)]
struct Tile {
    /// Addresses of this lane's first elements.
    keys: u32,
    values: u32,
    /// Bytes from token to token.
    row: u32,
}

impl Tile {
    /// Tile `tile` of the next turn, once it has come.
    #[inline(always)]
    unsafe fn next(op: Current, tile: u32, w: &Warp) -> Tile {
        unsafe {
            let start = w.place.wait().start;
            let row = 2 * get!(op, cache.head_dim);
            let (g, t) = place_in_fragment();
            Tile {
                keys: start + (tile * TOKENS + g) * row + 2 * EIGHT * t,
                values: start + (TURN + tile * TOKENS + 2 * t) * row + 2 * EIGHT * g,
                row,
            }
        }
    }

    // A row's elements past its end are the next one's: zero in the query, and not written of what comes of values.

    /// This lane's of a chunk of the keys.
    #[inline(always)]
    unsafe fn keys(self, chunk: u32) -> [[u32; 4]; 2] {
        [0, 8].map(|r| unsafe { eight(self.keys + r * self.row + chunk * 2 * CHUNK) })
    }

    /// Its values of one part.
    #[inline(always)]
    unsafe fn values(self, part: u32) -> Values {
        [0, 1, 8, 9].map(|i| unsafe { eight(self.values + i * self.row + part * 2 * WIDTH) })
    }
}

#[inline(always)]
unsafe fn eight(from: u32) -> [u32; 4] {
    unsafe { SharedPtr::<u32>::from_addr(from).load_v4() }
}
