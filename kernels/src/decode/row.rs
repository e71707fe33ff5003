//! A product's input row in shared memory.

use super::gather::WRITER;
use super::seal::{Seal, pause};
use super::{Current, DecodeArgs, ROWS_AT, get, lane, thread};
use crate::types::GROUP;
use cuda_std::int::{dp4a, here, opaque};
use cuda_std::memory::{ld_relaxed_u32, ld_relaxed_v4_u32, ldg_f32, ldg_v4_u32};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::{float, warp};

/// Shared memory for an input row of `cols` values (a multiple of 32); `float` where any matrix is of
/// a float type.
pub const fn row_bytes(cols: u32, float: bool) -> u32 {
    cols + cols / 2 + if float { 4 * cols } else { 0 }
}

/// An input row in shared memory. Quantised values: the first 16 of every group, then the last 16, so
/// that 16-byte loads of neighbouring lanes fall into different banks; then for each group `d` (`x ≈ d * q`), the sum of its `d * q` and those of its halves;
/// then, if kept, the values as f32.
#[derive(Clone, Copy)]
pub struct Row {
    low: SharedPtr<u32>,
    /// Values, a multiple of 32.
    cols: u32,
}

/// A group of the row.
#[derive(Clone, Copy)]
pub struct Group {
    pub low: [u32; 4],
    pub high: [u32; 4],
    pub d: f32,
    /// The sums of what `low` and `high` stand for.
    pub sums: [f32; 2],
}

/// Each warp's sum of squares of its part of an operation's row.
#[inline(always)]
fn squares_of(index: u32) -> SharedPtr<f32> {
    shared::at(index % 2 * (4 * SQUARES))
}

/// Places for [`squares_of`]: whole vectors, the last of which stay zero.
const SQUARES: u32 = WRITER.next_multiple_of(4);

/// Clears the places that no warp writes; a barrier must follow.
#[inline(always)]
pub unsafe fn init() {
    if thread() < 2 * SQUARES {
        unsafe { shared::at::<f32>(4 * thread()).store(0.0) }
    }
}

/// What multiplies every product of operation `index`: the norm's `1 / sqrt(mean(x²) + eps)`, known only after the
/// values are stored.
#[inline(always)]
pub unsafe fn norm_scale(op: Current, index: u32) -> f32 {
    unsafe {
        let mut sum = 0.0;
        for i in 0..SQUARES / 4 {
            let v = squares_of(index).add(4 * i).load_v4();
            sum += (v[0] + v[1]) + (v[2] + v[3]);
        }
        let scale = float::rsqrt_approx(sum * get!(op, input.inverse_len) + get!(op, input.eps));
        // Without a branch: this goes beside the first products.
        if get!(op, input.norm).is_null() {
            1.0
        } else {
            scale
        }
    }
}

/// Threads that fill a row: all but those of the warp that writes outputs, whose looks would wait for its stores.
const THREADS: u32 = 32 * WRITER;
/// Values that the block takes at once, four a thread.
const STRIDE: u32 = 4 * THREADS;

/// This thread's first values of a row, and their norm weights, on their way.
#[derive(Clone, Copy)]
pub struct Asked {
    words: [u32; 4],
    weights: [f32; 4],
}

/// Asks for the input of `op` before anything else is done: a block that comes late finds it there at the first look.
#[inline(always)]
pub unsafe fn ask(op: Current) -> Asked {
    unsafe {
        let (len, i) = (get!(op, input.len), 4 * thread());
        let mut asked = Asked {
            words: [0; 4],
            weights: [1.0; 4],
        };
        if len % 4 == 0 && i < len && thread() < THREADS {
            asked.words = ld_relaxed_v4_u32(get!(op, input.x).add(i as usize));
            asked.weights = load_norm(get!(op, input.norm), i, len);
        }
        asked
    }
}

impl Row {
    /// The row of so many values of operation `index`. Rows of neighbouring operations lie apart, so that a block may
    /// fill one while its slower warps still read the other.
    #[inline(always)]
    pub fn new(a: &DecodeArgs, index: u32, cols: u32) -> Row {
        Row {
            low: shared::at(ROWS_AT + index % 2 * here(a.row_bytes)),
            cols,
        }
    }

    #[inline(always)]
    fn high(&self) -> SharedPtr<u32> {
        self.low.byte_add(self.cols / 2)
    }

    #[inline(always)]
    fn meta(&self) -> SharedPtr<f32> {
        self.low.byte_add(self.cols).cast()
    }

    /// The values themselves.
    #[inline(always)]
    pub fn values(&self) -> SharedPtr<f32> {
        self.low.byte_add(self.cols + self.cols / 2).cast()
    }

    #[inline(always)]
    pub unsafe fn group(&self, g: u32) -> Group {
        unsafe {
            let [d, _, first, last] = self.meta().add(g * 4).load_v4();
            Group {
                low: self.low.add(g * 4).load_v4(),
                high: self.high().add(g * 4).load_v4(),
                d,
                sums: [first, last],
            }
        }
    }

    /// Waits for the input of `op`, multiplies it by the norm weight, quantises and stores it. A barrier of
    /// the block must follow.
    ///
    /// Each thread takes four values at a time, eight threads a group.
    #[inline(always)]
    pub unsafe fn fill(&self, a: &DecodeArgs, op: Current, index: u32, asked: Asked) {
        unsafe {
            if thread() >= THREADS {
                return;
            }
            let seal = Seal::of(a, get!(op, input.from));
            let squares = if get!(op, input.len) % 4 != 0 {
                self.fill_words(op, seal)
            } else {
                self.fill_vectors(op, seal, asked)
            };
            if !get!(op, input.norm).is_null() {
                let squares = warp::reduce_sum_f32(squares);
                if lane() == 0 {
                    squares_of(index).add(thread() / 32).store(squares);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn fill_vectors(&self, op: Current, seal: Seal, asked: Asked) -> f32 {
        unsafe {
            let (x, norm) = (get!(op, input.x), get!(op, input.norm));
            let len = get!(op, input.len);
            let keep = get!(op, input.keep_f32) != 0;
            let (t, cols) = (thread(), self.cols);
            let look = |i: u32| {
                if i < len {
                    ld_relaxed_v4_u32(x.add(i as usize))
                } else {
                    [0; 4]
                }
            };
            let mut squares = 0.0;
            let mut i = 4 * t;
            let Asked {
                words: mut first,
                mut weights,
            } = asked;
            // Whole warps: the lanes stay together for the shuffles, those past the end carry zeros.
            while i & !127 < cols {
                // Two are awaited at once: a look takes as long for both as for one.
                let mut words = [first, look(i + STRIDE)];
                loop {
                    let mut all = true;
                    for c in 0..2 {
                        let i = i + c as u32 * STRIDE;
                        if i < len && !seal.all_on(words[c]) {
                            all = false;
                            words[c] = look(i);
                        }
                    }
                    // The lanes stay together: shuffles among lanes that do not are many times slower.
                    if warp::all(all) {
                        break;
                    }
                    pause();
                }
                first = look(i + 2 * STRIDE);
                let mut c = 0;
                while c < 2 && i & !127 < cols {
                    let mut v = [0.0; 4];
                    if i < len {
                        for k in 0..4 {
                            v[k] = seal.open(words[0][k]);
                            squares += v[k] * v[k];
                            v[k] *= weights[k];
                        }
                    }
                    self.store(i, cols, v, keep);
                    words[0] = words[1];
                    i += STRIDE;
                    weights = load_norm(norm, i, len);
                    c += opaque(1);
                }
            }
            squares
        }
    }

    /// Rows of a length that vectors do not fit.
    #[inline(always)]
    unsafe fn fill_words(&self, op: Current, seal: Seal) -> f32 {
        unsafe {
            let (x, norm) = (get!(op, input.x), get!(op, input.norm));
            let len = get!(op, input.len);
            let (t, cols) = (thread(), self.cols);
            let mut squares = 0.0;
            let mut base = 0;
            while base < cols {
                let i = base + 4 * t;
                let mut v = [0.0; 4];
                for k in 0..4 {
                    let i = i as usize + k;
                    if i < len as usize {
                        let p = x.add(i);
                        let value = seal.await_word(p, ld_relaxed_u32(p.cast()));
                        squares += value * value;
                        let weight = if norm.is_null() {
                            1.0
                        } else {
                            ldg_f32(norm.add(i))
                        };
                        v[k] = value * weight;
                    }
                }
                if base + 4 * (t / 32 * 32) < cols {
                    warp::sync_warp();
                    self.store(i, cols, v, get!(op, input.keep_f32) != 0);
                }
                base += 4 * THREADS;
            }
            squares
        }
    }

    /// Stores values `i .. i + 4`; threads whose `i` is past `cols` only take part in the shuffles.
    #[inline(always)]
    unsafe fn store(&self, i: u32, cols: u32, v: [f32; 4], keep_f32: bool) {
        unsafe {
            let mut peak = v[0].abs().max(v[1].abs()).max(v[2].abs().max(v[3].abs()));
            peak = peak.max(warp::shuffle_xor(peak, 1));
            peak = peak.max(warp::shuffle_xor(peak, 2));
            peak = peak.max(warp::shuffle_xor(peak, 4));
            let d = peak * (1.0 / 127.0);
            // A peak so small that its inverse is infinite stands for nothing.
            let inverse = if peak > 1e-30 {
                127.0 * float::rcp_approx(peak)
            } else {
                0.0
            };
            let round = |x: f32| float::round_to_i32(x * inverse);
            let q = [round(v[0]), round(v[1]), round(v[2]), round(v[3])];
            let word = (q[0] as u32 & 0xff)
                | ((q[1] as u32 & 0xff) << 8)
                | ((q[2] as u32 & 0xff) << 16)
                | ((q[3] as u32) << 24);
            let mut sum = dp4a(word, 0x0101_0101, 0);
            sum += warp::shuffle_xor(sum, 1);
            sum += warp::shuffle_xor(sum, 2);
            let other = warp::shuffle_xor(sum, 4);
            if i < cols {
                let (group, w) = (i / GROUP as u32, i % GROUP as u32 / 4);
                let part = if w < 4 { self.low } else { self.high() };
                part.add(group * 4 + w % 4).store(word);
                if w == 0 {
                    let (first, last) = (d * sum as f32, d * other as f32);
                    let meta = self.meta().add(group * 4);
                    meta.store_v4([d, d * (sum + other) as f32, first, last]);
                }
                if keep_f32 {
                    self.values().add(i).store_v4(v);
                }
            }
        }
    }
}

/// Norm weights `i .. i + 4`, ones without a norm.
#[inline(always)]
unsafe fn load_norm(norm: *const f32, i: u32, len: u32) -> [f32; 4] {
    if norm.is_null() || i >= len {
        [1.0; 4]
    } else {
        unsafe { ldg_v4_u32(norm.add(i as usize)) }.map(f32::from_bits)
    }
}
