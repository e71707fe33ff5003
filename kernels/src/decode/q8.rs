//! Keys and values of a cache of 8 bits ([`q8_row_bytes`](crate::rows::q8_row_bytes)), as attention's products take them: f16,
//! rounded once from `d q`. Until they are [opened](open_keys), of the four words of eight elements the first two are the integers, the
//! third has their scale in both halves.
//!
//! A lane's elements of a key are neighbours, `8 K` of them where there are `K` chunks, so that four lanes of a wide head have
//! a scale each; what falls to which summand of a product is free as long as the queries have it the same.

use super::attend::{Keys, Values, key_token, value_token};
use super::{Current, get, lane};
use crate::unrolled;
use cuda_std::float;
use cuda_std::half::{Half2, hmul2, hsub2, to_f16};
use cuda_std::int::prmt;
use cuda_std::memory::{ld_relaxed_u32, ld_relaxed_u64};
use cuda_std::shared::SharedPtr;
use cuda_std::warp;

/// Elements of a scale.
const UNIT: u32 = 32;
/// Elements that are unpacked at a time.
const EIGHT: u32 = 8;

/// Of a lane's elements of a key, of `K` chunks, the first one.
#[inline(always)]
pub fn key_element<const K: usize>() -> u32 {
    lane() % 4 * (EIGHT * K as u32)
}

/// Where element `element` of a query is among the fragments: chunk, lane of four and half, as [`key_element`] has it.
#[inline(always)]
pub fn query_place<const K: usize>(element: u32) -> (u32, u32, u32) {
    let each = EIGHT * K as u32;
    (element % each / EIGHT, element / each, element % EIGHT / 4)
}

/// What a lane has loaded of keys, as products take it.
#[inline(always)]
pub fn open_keys<const K: usize>(keys: &Keys<K>) -> Keys<K> {
    keys.map(|rows| rows.map(open))
}

/// Values likewise.
#[inline(always)]
pub fn open_values(values: &Values) -> Values {
    values.map(open)
}

/// `d q` of eight integers.
#[inline(always)]
pub fn open([low, high, d, _]: [u32; 4]) -> [u32; 4] {
    /// `1024 + 128`: what an integer and [`HIGH`] have come to, less the integer.
    const BIAS: Half2 = Half2(0x6480_6480);
    /// Above a byte `b` it makes `1024 + b` of it.
    const HIGH: u32 = 0x6464_6464;
    let biased = [low, high].map(|q| q ^ 0x8080_8080);
    unrolled!(4, |k| {
        let selector = if k % 2 == 0 { 0x4140 } else { 0x4342 };
        let q = hsub2(Half2(prmt(biased[k / 2], HIGH, selector)), BIAS);
        hmul2(q, Half2(d)).0
    })
}

#[inline(always)]
fn both(d: u16) -> u32 {
    u32::from(d) * 0x1_0001
}

/// The scale of element `element` of the row at `row`.
#[inline(always)]
unsafe fn load_scale(row: *const u8, element: u32, head_dim: u32) -> u32 {
    let unit = element / UNIT;
    let at = head_dim + unit / 2 * 4;
    let two = unsafe { ld_relaxed_u32(row.wrapping_add(at as usize).cast()) };
    prmt(two, 0, if unit % 2 == 0 { 0x1010 } else { 0x3232 })
}

#[inline(always)]
fn closed(q: u64, d: u32) -> [u32; 4] {
    [q as u32, (q >> 32) as u32, d, 0]
}

/// Keys of the tile that begins at `from`, of its tokens before `tokens`. A row shares its sectors with others, which an earlier step of
/// this launch may have written: nothing is taken from what this multiprocessor has kept.
#[inline(always)]
pub unsafe fn load_keys<const K: usize>(
    from: *const u8,
    head_dim: u32,
    row_bytes: u32,
    tokens: u32,
) -> Keys<K> {
    unsafe {
        let mut keys = [[[0; 4]; 2]; K];
        for r in 0..2 {
            let token = key_token(r as u32);
            let row = from.wrapping_add((token * row_bytes) as usize);
            let first = key_element::<K>();
            if token < tokens && first < head_dim {
                let d = load_scale(row, first, head_dim);
                for c in 0..K {
                    let element = first + EIGHT * c as u32;
                    if element < head_dim {
                        let q = ld_relaxed_u64(row.wrapping_add(element as usize).cast());
                        keys[c][r] = closed(q, d);
                    }
                }
            }
        }
        keys
    }
}

/// Values likewise, from element `element` on.
#[inline(always)]
pub unsafe fn load_values(
    from: *const u8,
    head_dim: u32,
    row_bytes: u32,
    tokens: u32,
    element: u32,
) -> Values {
    unsafe {
        let element = element + lane() / 4 * EIGHT;
        let mut values = [[0; 4]; 4];
        for i in 0..4 {
            let token = value_token(i as u32);
            let row = from.wrapping_add((token * row_bytes) as usize);
            if element < head_dim && token < tokens {
                let q = ld_relaxed_u64(row.wrapping_add(element as usize).cast());
                values[i] = closed(q, load_scale(row, element, head_dim));
            }
        }
        values
    }
}

/// Rows in shared memory: the first byte of each, and the scale of the lane's elements there.
#[derive(Clone, Copy)]
pub struct Row {
    start: u32,
    d: u32,
}

impl Row {
    /// The row at `start`, of which the lane's elements begin with `element`.
    #[inline(always)]
    pub unsafe fn new(start: u32, element: u32, head_dim: u32) -> Row {
        // Not behind the scales: it may be no number.
        let last = (head_dim - 1) / UNIT;
        let unit = element / UNIT;
        let unit = if unit < last { unit } else { last };
        let d = unsafe { SharedPtr::<u16>::from_addr(start + head_dim + 2 * unit).load() };
        Row { start, d: both(d) }
    }

    /// A row that has none.
    #[inline(always)]
    pub fn plain(start: u32) -> Row {
        Row { start, d: 0 }
    }

    #[inline(always)]
    pub fn start(self) -> u32 {
        self.start
    }

    #[inline(always)]
    pub unsafe fn eight(self, element: u32) -> [u32; 4] {
        let [low, high] = unsafe { SharedPtr::<u32>::from_addr(self.start + element).load_v2() };
        [low, high, self.d, 0]
    }
}

/// Quantises four elements a lane of the step's own key, or value, from the `4 lane`th on: what the cache has of them, as f16. Where
/// this is who `keeps` it, it goes to the row at `to`.
#[inline(always)]
pub unsafe fn keep(op: Current, v: [f32; 4], keeps: bool, to: *mut u8) -> [u32; 2] {
    unsafe {
        let (element, head_dim) = (4 * lane(), get!(op, cache.head_dim));
        let v = v.map(|v| if element < head_dim { v } else { 0.0 });
        let mut most = v[0].abs().max(v[1].abs()).max(v[2].abs().max(v[3].abs()));
        for width in [1, 2, 4] {
            most = most.max(warp::shuffle_xor(most, width));
        }
        // A peak so small that its inverse is infinite stands for nothing.
        let (d, inverse) = (
            most * (1.0 / 127.0),
            127.0 * float::rcp_approx(most.max(1e-30)),
        );
        // Half away from zero, as `store_q8` has it.
        let q = v.map(|v| {
            let q = v * inverse;
            (if q < 0.0 { q - 0.5 } else { q + 0.5 }) as i32 as u32 & 0xff
        });
        let q = q[0] | q[1] << 8 | q[2] << 16 | q[3] << 24;
        let d = to_f16(d);
        if keeps && element < head_dim {
            to.add(element as usize).cast::<u32>().write(q);
            if element % UNIT == 0 {
                let at = head_dim + element / UNIT * 2;
                to.add(at as usize).cast::<u16>().write(d);
            }
        }
        let [first, second, ..] = open([q, 0, both(d), 0]);
        [first, second]
    }
}
