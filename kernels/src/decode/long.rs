//! Attention over many tokens, or a cache of 8 bits: keys and values come through the [ring](super::ring), among the weights.
//!
//! So they are on their way long before the query is there, and memory is at work while blocks wait for each other. A turn is a
//! block of the cache, all its keys of a head and behind them its values. The copy engine sees what launches before this one have
//! written; the cache's last blocks, which this one writes into, warps read themselves.

use super::attend::{
    Asked, CHUNK, EIGHT, NO_SCORES, Place, TOKENS, Values, WIDTH, add_scores, ask, cached_end,
    key_token, own_token, place_in_fragment, put_key, put_value, row_of, seen, tile_keys,
    tile_values, token_of, value_token,
};
use super::join::leave;
use super::pieces::Piece;
use super::q8;
use super::ring::Ring;
use super::running::Running;
use super::task::Cached;
use super::{Current, DecodeArgs, HALF, QUANTISED, RAGGED, WARPS, Warp, get, may_be, sync, thread};
use crate::rows::BLOCK_TOKENS;
use cuda_std::int::{here, opaque};
use cuda_std::shared::SharedPtr;
use cuda_std::tensor::BOX_COLS;

/// Tokens of a turn.
pub const TURN: u32 = BLOCK_TOKENS as u32;
const _: () = assert!(TURN == 2 * TOKENS, "a turn is two tiles");

/// Warps that share a turn of which each takes so many tiles.
const fn sharers(tiles: usize) -> u32 {
    2 / tiles as u32
}

/// Turns in which each of a block's warps has so many tiles.
const fn round(tiles: usize) -> u32 {
    WARPS / sharers(tiles)
}

/// Bytes of a turn of heads of so many elements, whose rows are of so many bytes: of f16 whole lines, of 8 bits the rows, and as much as is
/// read past the last one.
pub const fn turn_bytes(head_dim: u32, row_bytes: u32, quantised: bool) -> u32 {
    if quantised {
        2 * row_bytes * TURN + 2 * (head_dim.next_multiple_of(WIDTH) - head_dim)
    } else {
        2 * head_dim.div_ceil(WIDTH) * LINE * TURN
    }
}

/// Bytes of [`WIDTH`] elements in f16, of a box's row ([`TensorMap`](cuda_std::tensor::TensorMap)). A turn of f16 has the lines of its keys,
/// row by row, and then those of its values. They are swizzled: lanes that read the same elements of several rows find them in several banks.
pub const LINE: u32 = 2 * BOX_COLS;
/// Pieces of a line, which change places.
pub(super) const PIECES: u32 = 8;
/// Where such a turn may begin.
pub(super) const ALIGN: u32 = LINE * PIECES;
const _: () = assert!(BOX_COLS == WIDTH && (LINE * TURN).is_multiple_of(ALIGN));

/// Whether the last line of heads of so many elements is not full, and what follows in memory is behind these.
pub(super) const fn ragged(head_dim: u32) -> bool {
    head_dim > WIDTH && !head_dim.is_multiple_of(WIDTH)
}

/// So many turns at least does a ring of so many bytes hold, wherever in it they lie.
pub const fn turns_in(ring_bytes: u32, turn_bytes: u32) -> u32 {
    // Where there is room, and at the ring's start, a turn begins a little later.
    ring_bytes.saturating_sub(2 * ALIGN) / turn_bytes
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
                let row_bytes = cached.row_bytes;
                let row = row_of(a, kv_heads, piece.kv_head, base);
                let at = row as usize * row_bytes as usize;
                let from = cached.bases.map(|base| base.wrapping_add(at));
                let quantised = may_be(QUANTISED) && (!may_be(HALF) || cached.quantised != 0);
                let all = turn_bytes(head_dim, row_bytes, quantised);
                if quantised {
                    ring.bring_quantised::<BULK>(a, from, row_bytes * TURN, all);
                } else {
                    ring.bring_half::<BULK>(a, from, cached.first_row + row, head_dim, all);
                }
                base += TURN;
            }
            index += cutting.step();
        }
    }
}

/// This warp's share of the block's piece, left in its parts; how many turns are left to [`pass`], for which nobody waits.
///
/// Of a turn two neighbours have each a tile, or a warp has both: its products and exchanges then go side by side. So many warps have both
/// that one round is enough, or all, where none is.
#[inline(always)]
pub(super) unsafe fn walk<const K: usize, const H: usize, const Q: bool>(
    a: &DecodeArgs,
    op: Current,
    place: Place,
    piece: Piece,
    w: &mut Warp,
) -> u32 {
    unsafe {
        let old = ring_end(a, &piece);
        let old = if piece.from < old { old } else { piece.from };
        let mut old = Old {
            end: old,
            turns: (old - piece.from) / TURN,
            whole: 0,
        };
        let room = get!(op, room);
        // Both tiles of a wide head would take more registers than there are.
        if H == 1 && room > round(2) {
            let behind = (piece.to - piece.from).div_ceil(TOKENS) - 2 * old.turns;
            if old.turns + behind > WARPS {
                old.whole = old.turns;
            } else {
                old.whole = (2 * old.turns + behind).saturating_sub(WARPS);
            }
            if thread() / 32 < old.whole {
                return share::<K, H, 2, Q>(a, op, place, piece, old, true, w);
            }
        }
        share::<K, H, 1, Q>(a, op, place, piece, old, room > round(1), w)
    }
}

/// What comes through the ring of a piece.
#[derive(Clone, Copy)]
struct Old {
    /// The first token behind it.
    end: u32,
    turns: u32,
    /// Turns of which a warp has both tiles: the first ones.
    whole: u32,
}

/// [`walk`], where a warp takes `N` tiles of a turn.
///
/// Whatever does not need the query comes before the wait for it: a warp's first tiles are in registers by then, if `eager`, which is
/// where the ring has room for a turn more than a [`round`]. Else warps would wait for each other's for ever; and at the ring's end one
/// may be lost.
#[inline(always)]
unsafe fn share<const K: usize, const H: usize, const N: usize, const Q: bool>(
    a: &DecodeArgs,
    op: Current,
    place: Place,
    piece: Piece,
    old: Old,
    eager: bool,
    w: &mut Warp,
) -> u32 {
    unsafe {
        let warp = here(thread() / 32);
        let mut turns = old.turns;
        let (mine, first) = if N == 2 {
            (warp, 0)
        } else {
            let behind = warp - old.whole;
            (old.whole + behind / 2, behind % 2)
        };
        // Tiles behind the turns go to the warps that would have the next ones', one each: they are fewer than warps.
        let shares = (2 * turns - old.whole) % WARPS;
        let after = (warp + WARPS - shares) % WARPS;
        let asked = Asked::first(op, piece);
        // Where a warp has one of these it is its first.
        let mut base = here(old.end + after * TOKENS);
        let mut to = if piece.to < base + TOKENS {
            piece.to
        } else {
            base + TOKENS
        };
        let mut own = u32::MAX;
        let mut keys = [[[[0; 4]; 2]; K]; N];
        let mut values = [[[[0; 4]; 4]; H]; N];
        let mut any = base < to;
        // So many turns pass by before a warp's first.
        let before = if turns < mine { turns } else { mine };
        if any {
            let there = cached_end(op, &piece).saturating_sub(base);
            let kv_head = piece.kv_head;
            keys[0] = tile_keys::<K, Q>(a, op, kv_head, base, there);
            for h in 0..H {
                let element = h as u32 * WIDTH;
                values[0][h] = tile_values::<Q>(a, op, kv_head, here(base), there, element);
            }
            own = own_token(op, base);
        }
        // And before its next.
        let mut others = before;
        if eager {
            pass(w, before);
            turns -= before;
            others = 0;
            if !any && turns > 0 {
                any = true;
                (base, to) = (0, N as u32 * TOKENS);
                let tiles = Tile::next::<N, H, Q>(op, first, w);
                for n in 0..N {
                    let rows = tiles[n].key_rows::<K, Q>(op);
                    for c in 0..K {
                        keys[n][c] = rows.keys::<K, Q>(op, c as u32);
                    }
                    for h in 0..H {
                        values[n][h] = tiles[n].values::<Q>(op, h as u32);
                    }
                }
                w.place.release();
                turns -= 1;
                others = round(N) - 1;
            }
        }
        if Q {
            keys = keys.map(|keys| q8::open_keys(&keys));
            values = values.map(|values| values.map(|values| q8::open_values(&values)));
        }
        ask::<K, Q>(a, op, place, piece, asked);
        sync();
        let mut running;
        if any {
            running = Running::<H>::new();
            if own < TOKENS {
                let head_dim = get!(op, cache.head_dim);
                put_key::<K, Q>(&mut keys[0], place, own, head_dim);
                for h in 0..H {
                    put_value(&mut values[0][h], place, own, h as u32 * WIDTH, head_dim);
                }
            }
            let mut scores = [NO_SCORES; N];
            for c in 0..K {
                for n in 0..N {
                    add_scores(&mut scores[n], place, c as u32, &keys[n][c]);
                }
            }
            let mut base = base;
            let p = running.weigh(scores.map(|scores| {
                let from = base;
                base += TOKENS;
                seen(&scores, from, to)
            }));
            for n in 0..N {
                for h in 0..H {
                    running.add(h, &values[n][h], &p[n]);
                }
            }
        } else {
            running = Running::none();
        }
        while turns > others {
            pass(w, others);
            turns -= others + 1;
            others = round(N) - 1;
            let tiles = Tile::next::<N, H, Q>(op, first, w);
            let mut scores = [NO_SCORES; N];
            let rows: [KeyRows; N] = core::array::from_fn(|n| tiles[n].key_rows::<K, Q>(op));
            for c in 0..K {
                for n in 0..N {
                    let mut keys = rows[n].keys::<K, Q>(op, c as u32);
                    if Q {
                        keys = keys.map(q8::open);
                    }
                    add_scores(&mut scores[n], place, c as u32, &keys);
                }
            }
            let p = running.weigh(scores.map(|scores| seen(&scores, 0, TOKENS)));
            for n in 0..N {
                for h in 0..H {
                    let mut values = tiles[n].values::<Q>(op, h as u32);
                    if Q {
                        values = q8::open_values(&values);
                    }
                    running.add(h, &values, &p[n]);
                }
            }
            w.place.release();
        }
        leave(&running, place, warp);
        if !eager {
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
    /// Addresses of its first token's rows.
    keys: u32,
    values: u32,
    /// Bytes from token to token.
    row: u32,
}

impl Tile {
    /// Tiles from `first` on of the next turn, once it has come.
    #[inline(always)]
    unsafe fn next<const N: usize, const H: usize, const Q: bool>(
        op: Current,
        first: u32,
        w: &Warp,
    ) -> [Tile; N] {
        unsafe {
            let start = w.place.wait().start;
            let row = if Q {
                get!(op, row_bytes)
            } else {
                H as u32 * LINE
            };
            core::array::from_fn(|n| {
                let keys = start + (first + n as u32) * TOKENS * row;
                Tile {
                    keys,
                    values: keys + TURN * row,
                    row,
                }
            })
        }
    }

    // A row's elements past its end are zeros or the next one's: zero in the query, and not written of what comes of values.

    /// This lane's rows of the keys.
    #[inline(always)]
    unsafe fn key_rows<const K: usize, const Q: bool>(self, op: Current) -> KeyRows {
        unsafe {
            let head_dim = if Q { get!(op, cache.head_dim) } else { 0 };
            let (_, t) = place_in_fragment();
            KeyRows([0, 1].map(|r| {
                let before = key_token(r) * self.row;
                let row = self.keys + before;
                if Q {
                    q8::Row::new(row, q8::key_element::<K>(), head_dim)
                } else {
                    q8::Row::plain(row + swizzled(before / LINE, t))
                }
            }))
        }
    }

    /// Its values of one part.
    #[inline(always)]
    unsafe fn values<const Q: bool>(self, op: Current, part: u32) -> Values {
        let (g, _) = place_in_fragment();
        [0, 1, 2, 3].map(|i| unsafe {
            let before = value_token(i) * self.row;
            let row = self.values + before;
            let element = part * WIDTH + EIGHT * g;
            if Q {
                q8::Row::new(row, element, get!(op, cache.head_dim)).eight(element)
            } else {
                eight(next_line(row + swizzled(before / LINE, g), part))
            }
        })
    }
}

/// Where in line `line` of a turn piece `piece` begins.
#[inline(always)]
const fn swizzled(line: u32, piece: u32) -> u32 {
    (piece ^ (line % PIECES)) * (LINE / PIECES)
}

/// Eight lanes, who read at the same time, read all of the banks, be it keys or values, of narrow heads or of wide ones, of which a
/// row has two lines.
const _: () = {
    let mut lines = 1;
    while lines <= 2 {
        let mut eight = 0;
        while eight < 4 {
            let (mut keys, mut values) = (0u32, [0u32; 2]);
            let mut lane = 0;
            while lane < 8 {
                let (g, t) = (2 * eight + lane / 4, lane % 4);
                keys |= 1 << (swizzled(token_of(g) * lines, t) / 16);
                values[0] |= 1 << (swizzled(token_of(2 * t) * lines, g) / 16);
                values[1] |= 1 << (swizzled(token_of(2 * t + 1) * lines, g) / 16);
                lane += 1;
            }
            assert!(keys & values[0] & values[1] == 0xff);
            eight += 1;
        }
        lines += 1;
    }
};

/// Where the same piece of the next line is, the number of that with `at` being even, or `at` again: `next` is 1 or 0.
#[inline(always)]
fn next_line(at: u32, next: u32) -> u32 {
    (at ^ (next * (LINE / PIECES))) + next * LINE
}

/// Rows that have a lane's keys.
#[derive(Clone, Copy)]
struct KeyRows([q8::Row; 2]);

impl KeyRows {
    /// Those of a chunk.
    #[inline(always)]
    unsafe fn keys<const K: usize, const Q: bool>(self, op: Current, chunk: u32) -> [[u32; 4]; 2] {
        self.0.map(|row| unsafe {
            if Q {
                return row.eight(q8::key_element::<K>() + EIGHT * chunk);
            }
            // A line has two chunks, and the swizzle as many pieces in either.
            const { assert!(2 * CHUNK == WIDTH) };
            let at = row.start() ^ (chunk % 2 * (LINE / 2));
            let keys = eight(next_line(at, chunk / 2));
            let (_, t) = place_in_fragment();
            // What lies behind may never have been written.
            if may_be(RAGGED) && chunk * CHUNK + EIGHT * t >= get!(op, cache.head_dim) {
                return [0; 4];
            }
            keys
        })
    }
}

#[inline(always)]
unsafe fn eight(from: u32) -> [u32; 4] {
    unsafe { SharedPtr::<u32>::from_addr(from).load_v4() }
}
