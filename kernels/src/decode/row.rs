//! A product's input row in shared memory.
//!
//! The warps of a block share the row out in *parts* of four groups, of which a lane brings four values, eight lanes a
//! group. They are quantised to 15 bits, `x ≈ d * (128 high + low)`, and multiplied as bytes. Of a product on tensor cores lane `t` of
//! four has the summands `4 t .. 4 t + 4` and `16 + 4 t ..`, which are all group `t`'s: of the row as B's fragments, whose columns
//! are `2 g` for the high bytes of group `g` and `2 g + 1` for the low ones, other lanes have zeros. So a group's sums end in the lanes
//! that have its weights and scales, and these are whole groups as they lie in memory.

use super::seal::Seal;
use super::{Current, ENDS, HALVES, ROWS_AT, UNEVEN, WARPS, ZEROS_AT, get, lane, may_be, thread};
use crate::types::{FLOATS, GROUP};
use crate::unrolled;
use cuda_std::int::{here, opaque, prmt};
use cuda_std::memory::{ld_relaxed_u32, ld_relaxed_v4_u32, ldg_f32, ldg_v4_u32};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::{float, mma, warp};

/// Groups of a part: all in one tile.
pub const GROUPS: u32 = 4;
/// Shared memory of a part of the row: of each group its high bytes, then its low ones; then for each group `d`, the sums of what its
/// halves stand for and `d /` [`PART_OF`]; then, if kept, the values as f32.
const META_AT: u32 = GROUPS * COLUMN_BYTES * 2;
/// High or low bytes of a group.
const COLUMN_BYTES: u32 = GROUP as u32;
/// As many bytes of zeros are what other groups' lanes have of a column. Wherever a part lies, what lanes read beside each other is in
/// different banks: columns begin at an even number of 16 bytes, these at an odd one.
pub const ZEROS_BYTES: u32 = COLUMN_BYTES;
const _: () = assert!(ZEROS_AT % 32 == 16 && ROWS_AT.is_multiple_of(32));
const _: () = assert!(PART_BYTES.is_multiple_of(32) && FLOAT_PART_BYTES.is_multiple_of(32));
/// What [`Part::d_part`] is of [`Part::d`].
pub const PART_OF: u8 = 16;
const VALUES_AT: u32 = META_AT + GROUPS * 16;
const PART_BYTES: u32 = VALUES_AT;
const FLOAT_PART_BYTES: u32 = VALUES_AT + 32 * 16;

/// Shared memory for an input row of `cols` values (a multiple of 32); `float` where any matrix is of a float type.
pub const fn row_bytes(cols: u32, float: bool) -> u32 {
    let part = if float { FLOAT_PART_BYTES } else { PART_BYTES };
    parts(cols / GROUP as u32) * part
}

/// Parts of a row of so many groups.
#[inline(always)]
pub const fn parts(groups: u32) -> u32 {
    groups.div_ceil(GROUPS)
}

/// Places for each warp's sum of squares of its parts of an operation's row.
pub const SQUARES: u32 = WARPS;
const _: () = assert!(WARPS.is_multiple_of(4), "whole vectors");

/// Each warp's sum of squares of its part of an operation's row.
#[inline(always)]
fn squares_of(index: u32) -> SharedPtr<f32> {
    shared::at(index % 2 * (4 * SQUARES))
}

/// What multiplies every product of operation `index`: the norm's `1 / sqrt(mean(x²) + eps)`, known only after the
/// values are.
#[inline(always)]
pub unsafe fn norm_scale(index: u32, inverse_len: f32, eps: f32) -> f32 {
    let sum = unsafe { sum_of(squares_of(index)) };
    float::rsqrt_approx(sum * inverse_len + eps)
}

/// The sum of [`WARPS`] words.
#[inline(always)]
pub unsafe fn sum_of(words: SharedPtr<f32>) -> f32 {
    let mut sum = 0.0;
    for i in 0..WARPS / 4 {
        let v = unsafe { words.add(4 * i).load_v4() };
        sum += (v[0] + v[1]) + (v[2] + v[3]);
    }
    sum
}

/// Parts of a long row that a warp awaits and quantises at once: both take about as long for several as for one.
const SEVERAL: usize = 2;

/// This lane's values of some parts, and their norm weights, on their way.
#[derive(Clone, Copy)]
pub struct Asked {
    words: [[u32; 4]; SEVERAL],
    weights: [[f32; 4]; SEVERAL],
}

/// The number of this lane's first value of part `part`, and of every [`WARPS`]th after it.
#[inline(always)]
fn value_of(part: u32, c: usize) -> u32 {
    (part + c as u32 * WARPS) * (GROUPS * GROUP as u32) + 4 * lane()
}

/// Asks for this lane's values of part `part` and of the next that are this warp's: before anything else is done, so that
/// a block that comes late finds them there at the first look.
#[inline(always)]
pub unsafe fn ask(op: Current, part: u32) -> Asked {
    unsafe {
        let len = get!(op, input.len);
        let (x, norm) = (get!(op, input.x), get!(op, input.norm));
        let mut asked = Asked {
            words: [[0; 4]; SEVERAL],
            weights: [[1.0; 4]; SEVERAL],
        };
        let halves = may_be(HALVES) && get!(op, input.halves) != 0;
        for c in 0..SEVERAL {
            let (i, x) = if halves {
                const { assert!(SEVERAL == 2) };
                (value_of(part, 0), x.wrapping_add(c * len as usize))
            } else {
                (value_of(part, c), x)
            };
            if i < len && !(may_be(UNEVEN) && len % 4 != 0) {
                asked.words[c] = ld_relaxed_v4_u32(x.add(i as usize));
                let first = c == 0 || !halves;
                if first && !norm.is_null() {
                    asked.weights[c] = ldg_v4_u32(norm.add(i as usize)).map(f32::from_bits);
                }
            }
        }
        asked
    }
}

impl Asked {
    /// Waits for the values of `C` parts; them, and the sum of their squares. What lies past the row's end is zero, in parts that are there.
    #[inline(always)]
    unsafe fn come<const C: usize>(
        &mut self,
        op: Current,
        seal: Seal,
        part: u32,
    ) -> ([[f32; 4]; C], f32) {
        unsafe {
            let (x, len) = (get!(op, input.x), get!(op, input.len));
            let mut v = [[0.0; 4]; C];
            let inside: [bool; C] = core::array::from_fn(|c| value_of(part, c) < len);
            if may_be(UNEVEN) && len % 4 != 0 {
                self.come_singly(op, seal, part, &mut v);
            } else {
                let mut all = true;
                for c in 0..C {
                    all &= !inside[c] || seal.all_on(self.words[c]);
                }
                // The lanes stay together: shuffles among lanes that do not are many times slower.
                if !warp::all(all) {
                    // Past the end the last are as good as any to wait for.
                    let from = core::array::from_fn(|c| {
                        let i = value_of(part, c);
                        x.add(if inside[c] { i } else { len - 4 } as usize)
                    });
                    let words: [_; C] = seal.await_all(from);
                    for c in 0..C {
                        self.words[c] =
                            words[c].map(|w| if inside[c] || !may_be(ENDS) { w } else { 0 });
                    }
                }
                for c in 0..C {
                    for k in 0..4 {
                        v[c][k] = seal.open(self.words[c][k]);
                    }
                }
            }
            let mut squares = 0.0;
            for c in 0..C {
                let mut of_part = 0.0;
                for k in 0..4 {
                    of_part += v[c][k] * v[c][k];
                    v[c][k] *= self.weights[c][k];
                }
                squares += if inside[c] { of_part } else { 0.0 };
            }
            (v, squares)
        }
    }

    /// Waits for both halves of one part's values; as [`Asked::come`].
    #[inline(always)]
    unsafe fn both(&mut self, op: Current, seal: Seal, part: u32) -> ([[f32; 4]; 1], f32) {
        unsafe {
            let (x, len) = (get!(op, input.x), get!(op, input.len));
            let i = value_of(part, 0);
            let inside = i < len;
            let there = seal.all_on(self.words[0]) && seal.all_on(self.words[1]);
            if !warp::all(!inside || there) {
                let x = x.add(if inside { i } else { len - 4 } as usize);
                let words = seal.await_all([x, x.wrapping_add(len as usize)]);
                self.words = words.map(|words| words.map(|w| if inside { w } else { 0 }));
            }
            let mut v = [0.0; 4];
            let mut squares = 0.0;
            for k in 0..4 {
                let sum = seal.open(self.words[0][k]) + seal.open(self.words[1][k]);
                squares += sum * sum;
                v[k] = sum * self.weights[0][k];
            }
            ([v], squares)
        }
    }

    /// Rows of a length that vectors do not fit.
    #[inline(always)]
    unsafe fn come_singly<const C: usize>(
        &mut self,
        op: Current,
        seal: Seal,
        part: u32,
        v: &mut [[f32; 4]; C],
    ) {
        unsafe {
            let (x, norm) = (get!(op, input.x), get!(op, input.norm));
            for c in 0..C {
                let i = value_of(part, c);
                let mut k = 0;
                while k < 4 {
                    let mut word = [0.0, 1.0];
                    if i + k < get!(op, input.len) {
                        let p = x.add((i + k) as usize);
                        word[0] = seal.await_word(p, ld_relaxed_u32(p.cast()));
                        if !norm.is_null() {
                            word[1] = ldg_f32(norm.add((i + k) as usize));
                        }
                    }
                    // One after the other, through the same code.
                    v[c] = [v[c][1], v[c][2], v[c][3], word[0]];
                    let w = self.weights[c];
                    self.weights[c] = [w[1], w[2], w[3], word[1]];
                    k += opaque(1);
                }
            }
            warp::sync_warp();
        }
    }
}

/// Waits for the input of `op`, multiplies it by the norm weight, quantises it and leaves it in shared memory, as it does the
/// sum of this warp's squares. A barrier of the warps that compute must follow.
#[inline(always)]
pub unsafe fn fill(op: Current, seal: Seal, index: u32, groups: u32, asked: Asked) {
    unsafe {
        let mut asked = asked;
        let mut part = thread() / 32;
        let mut squares = 0.0;
        let halves = may_be(HALVES) && get!(op, input.halves) != 0;
        if halves || parts(groups) <= WARPS {
            while part < parts(groups) {
                let (v, squared) = if halves {
                    asked.both(op, seal, part)
                } else {
                    asked.come::<1>(op, seal, part)
                };
                let this = part;
                part += WARPS;
                if halves && part < parts(groups) {
                    asked = ask(op, part);
                }
                let [squared] = keep(op, this, groups, v, [squared]);
                squares += squared;
                if !may_be(HALVES) {
                    break;
                }
            }
        } else {
            while part < parts(groups) {
                let (v, squared) = asked.come::<SEVERAL>(op, seal, part);
                squares += squared;
                let this = part;
                part += SEVERAL as u32 * WARPS;
                // What has come is out of its registers by now: else these would be copied, which waits for what is to come.
                asked = ask(op, part);
                keep(op, this, groups, v, []);
            }
            if !get!(op, input.norm).is_null() {
                squares = warp::reduce_sum_f32(squares);
            }
        }
        // Known before the question, which takes no branch that way.
        let to = SharedPtr::<f32>::from_addr(here(squares_of(index).add(thread() / 32).addr()));
        if lane() == 0 {
            to.store(squares);
        }
    }
}

/// Quantises a warp's values of part `part` and of every [`WARPS`]th after it, and leaves them in shared memory. Beside that,
/// since both wait for shuffles most of the time, it adds up `sums` of all lanes.
#[inline(always)]
unsafe fn keep<const C: usize, const S: usize>(
    op: Current,
    part: u32,
    groups: u32,
    v: [[f32; 4]; C],
    sums: [f32; S],
) -> [f32; S] {
    unsafe {
        let mut sums = sums;
        let (bytes, metas) = quantise(v, &mut sums);
        for c in 0..C {
            let part = part + c as u32 * WARPS;
            if part < parts(groups) {
                let kept = Kept::new(op, part);
                if kept.float {
                    kept.values().add(4 * lane()).store_v4(v[c]);
                }
                for i in 0..2 {
                    kept.word_of_lane(i).store(bytes[c][i as usize]);
                }
                if lane() < GROUPS {
                    kept.meta().store_v4(metas[c]);
                }
            }
        }
        sums
    }
}

/// A part of the row as a product takes it.
#[derive(Clone, Copy)]
pub struct Part {
    /// This lane's fragments: the bytes of its column that are of group `lane % 4`.
    pub bytes: [u32; 8],
    /// Of group `lane % 4`: what a unit stands for, and the halves' sums.
    pub d: f32,
    pub sums: [f32; 2],
    /// A [`PART_OF`]th of `d`.
    pub d_part: f32,
}

/// The shared memory of a part.
#[derive(Clone, Copy)]
pub struct Kept {
    at: u32,
    float: bool,
}

impl Kept {
    /// Of part `part`.
    #[inline(always)]
    pub unsafe fn new(op: Current, part: u32) -> Kept {
        unsafe {
            Kept {
                at: shared::at::<u8>(ROWS_AT + part * Kept::bytes(op)).addr(),
                float: Kept::is_float(op),
            }
        }
    }

    #[inline(always)]
    unsafe fn is_float(op: Current) -> bool {
        may_be(FLOATS as u64) && unsafe { get!(op, input.keep_f32) } != 0
    }

    /// From part to part.
    #[inline(always)]
    unsafe fn bytes(op: Current) -> u32 {
        if unsafe { Kept::is_float(op) } {
            FLOAT_PART_BYTES
        } else {
            PART_BYTES
        }
    }

    /// Where the high bytes (0) or the low ones (1) of this lane's four values go.
    #[inline(always)]
    fn word_of_lane(self, low: u32) -> SharedPtr<u32> {
        SharedPtr::from_addr(self.at + (2 * (lane() / 8) + low) * COLUMN_BYTES + 4 * (lane() % 8))
    }

    #[inline(always)]
    fn meta(self) -> SharedPtr<f32> {
        SharedPtr::from_addr(self.at + META_AT + 16 * (lane() % 4))
    }

    /// The values themselves, where they are kept.
    #[inline(always)]
    pub fn values(self) -> SharedPtr<f32> {
        SharedPtr::from_addr(self.at + VALUES_AT)
    }

    /// Of column `lane / 4` what is of group `lane % 4`: zeros, where it is another group's.
    #[inline(always)]
    fn column(self) -> SharedPtr<u32> {
        let own = lane() % 4 == lane() / 8;
        SharedPtr::from_addr(if own {
            self.at + lane() / 4 * COLUMN_BYTES
        } else {
            shared::at::<u8>(ZEROS_AT).addr()
        })
    }

    /// What [`fill`] left.
    #[inline(always)]
    pub unsafe fn load(self) -> Part {
        unsafe {
            let [d, first, second, d_part] = self.meta().load_v4();
            let column = self.column();
            let (near, far) = (column.load_v4(), column.add(4).load_v4());
            Part {
                bytes: unrolled!(8, |j| if j < 4 { near[j % 4] } else { far[j % 4] }),
                d,
                sums: [first, second],
                d_part,
            }
        }
    }
}

/// Adds to each sum that of the lane `width` away.
#[inline(always)]
fn add_over<const S: usize>(sums: &mut [f32; S], width: u32) {
    for i in 0..S {
        sums[i] += warp::shuffle_xor(sums[i], width);
    }
}

/// Quantises a warp's values of some parts: of lane `8 g + 4 h + t` those of half `h` of group `g`, from the `4 t`th on.
/// This lane's high bytes and low ones, and what is kept of group `lane % 4`. Adds up `sums` of all lanes beside it.
#[inline(always)]
fn quantise<const C: usize, const S: usize>(
    v: [[f32; 4]; C],
    sums: &mut [f32; S],
) -> ([[u32; 2]; C], [[f32; 4]; C]) {
    /// The greatest level: 127 high, no low.
    const MOST: f32 = 16256.0;
    /// Added to a value below 2^22, it leaves this rounded in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let (mut bytes, mut metas) = ([[0; 2]; C], [[0.0; 4]; C]);
    let mut peaks = [0.0f32; C];
    for c in 0..C {
        let v = v[c];
        peaks[c] = v[0].abs().max(v[1].abs()).max(v[2].abs().max(v[3].abs()));
    }
    for width in [1, 2, 4] {
        for c in 0..C {
            peaks[c] = peaks[c].max(warp::shuffle_xor(peaks[c], width));
        }
        add_over(sums, width);
    }
    for c in 0..C {
        let d = warp::shuffle_idx(peaks[c] * (1.0 / MOST), lane() % 4 * 8);
        if c == 0 {
            add_over(sums, 8);
        }
        // A peak so small that its inverse is infinite stands for nothing.
        let inverse = MOST * float::rcp_approx(peaks[c].max(1e-30));
        let level = v[c].map(|v| float::fma(v, inverse, ROUND).to_bits());
        // Two at a time in 16 bits each: high bytes of both signs, low ones from 0 to 127.
        let near = prmt(level[0], level[1], 0x5410);
        let far = prmt(level[2], level[3], 0x5410);
        let high = prmt(near >> 7, far >> 7, 0x6420);
        let low = prmt(near, far, 0x6420) & 0x7f7f_7f7f;
        bytes[c] = [high, low];
        // A product with 128 and one: what lies beside each other is a column's, the halves' sums end where those of weights will.
        let ones = mma::m16n8k16_u8_s8([0x0101_0101; 2], low, [0; 4]);
        let [first, second, ..] = mma::m16n8k16_u8_s8([0x8080_8080; 2], high, ones);
        metas[c] = [
            d,
            d * first as f32,
            d * second as f32,
            d * (1.0 / PART_OF as f32),
        ];
    }
    add_over(sums, 16);
    (bytes, metas)
}
