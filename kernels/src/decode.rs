//! A decode step: one persistent kernel that carries a list of operations over one row.
//!
//! Decoding reads every weight once and computes little, so a step's time is that of the reads, plus what
//! lies between two operations: seven microseconds where each is a launch. Here the whole step is one
//! cooperative launch of a block per multiprocessor. Between operations stands a barrier over the grid, and
//! before a warp waits there it asks for the weights of its next tasks, so that the memory works on while
//! the blocks meet, norm and quantise.
//!
//! In a product, every block brings the whole input row into shared memory, normalised and quantised to 8
//! bits per group of 32 (`x ≈ d * q`): a read of the row from L2 instead of an operation of its own. A warp
//! then computes two dot products at a time, a lane taking every 32nd group; which two is the operation's
//! choice: a rotation's pair, a gate and its up, two neighbours, or two halves of one row.

use crate::attention::{self, NONE};
use crate::for_each_type;
use crate::rows::{BLOCK_TOKENS, CacheLayer, Rotation, rotation_at, silu};
use crate::sample::{block_max, max_u64, rank};
use crate::types::*;
use crate::unrolled;
use cuda_std::int::dp4a_us;
use cuda_std::memory::{
    cp_async_16, cp_async_wait_all, ld_v2_u32, ld_v4_u32, ldg_f32, ldg_u32, prefetch_l2,
    threadfence, threadfence_system,
};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::{block_idx_x, grid_dim_x, sync_threads, thread_idx_x};
use cuda_std::{atomic, float, grid, kernel, thread, warp};

/// Threads per block, one block per multiprocessor.
pub const THREADS: u32 = 512;
const WARPS: usize = THREADS as usize / 32;

/// Most splits of a head's tokens; see [`Op::splits`].
pub const MAX_SPLITS: u32 = 16;

/// What an [`Op`] does.
pub mod kind {
    /// `out = table[token] * scale`.
    pub const EMBED: u32 = 0;
    /// `out = W norm(x) + b`, or `out += …`.
    pub const PRODUCT: u32 = 1;
    /// `out = silu(Wg norm(x) + bg) * (Wu norm(x) + bu)`.
    pub const GATE_UP: u32 = 2;
    /// `out = rope(Wq norm(x) + bq)`; keys, rotated, and values go to the f16 cache.
    pub const QKV: u32 = 3;
    /// Attention of the row over the cache, `input.x` being the queries; `out` is as [`super::Input::x`]
    /// with `splits` describes it.
    pub const ATTEND: u32 = 4;
}

/// The input row of a product.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Input {
    /// f32, `len` long. With `splits`, attention's parts instead: f32
    /// `[heads][splits][head_dim + 4]`, unnormalised sums, their peak and mass, two unused.
    pub x: *const f32,
    /// RMS norm's weight; null for no norm.
    pub norm: *const f32,
    pub eps: f32,
    pub len: u32,
    /// Whether f32 values are kept too, for matrices of float types.
    pub keep_f32: u32,
    pub splits: u32,
    pub head_dim: u32,
}

/// One operation. What its `kind` has no use for may be anything.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub struct Op {
    pub kind: u32,
    /// Whether to add to `out` instead of overwriting it.
    pub add: u32,
    /// Whether a task is one row in two halves rather than two rows: for long rows of a short matrix.
    pub split: u32,
    /// Whether `out` are logits, the greatest of which is the step's choice.
    pub choose: u32,
    pub input: Input,
    /// The one; gate and up; Q, K and V.
    pub matrices: [Matrix; 3],
    /// f32, null for none.
    pub biases: [*const f32; 3],
    pub rotation: Rotation,
    pub cache: CacheLayer,
    pub heads: u32,
    /// Parts that each head's tokens are cut into, at most [`MAX_SPLITS`]; a block takes one at a time.
    pub splits: u32,
    /// Of the attention scores, or of the embedding.
    pub scale: f32,
    /// f32.
    pub out: *mut f32,
}

/// Bytes of an [`Op`].
const OP_BYTES: usize = size_of::<Op>();

/// The greatest logit of a step.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Choice {
    /// The greatest [`rank`] so far; zero between launches.
    pub best: u64,
    /// Blocks that have added theirs; zero between launches.
    pub blocks: u32,
    pub unused: u32,
}

/// Arguments of [`decode`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DecodeArgs {
    pub ops: *const Op,
    pub count: u32,
    pub token: u32,
    pub position: u32,
    /// The number that the host knows this step's choice by.
    pub sequence: u32,
    /// The sequence's cache blocks.
    pub table: *const u32,
    /// One word for the grid's barriers, zero before its first use.
    pub barrier: *mut u32,
    pub choice: *mut Choice,
    /// Where the chosen id is written, `sequence` above it: memory that the host can read.
    pub chosen: *mut u64,
    /// Longest norm weight of any operation.
    pub norm_len: u32,
}

/// Start of the two operations in shared memory: the current one and the next. Scratch lies before.
const OPS_AT: usize = 256;
const NORM_AT: usize = OPS_AT + 2 * OP_BYTES;

/// Shared memory of a launch: `norm_len` is the longest norm weight, `row_bytes` the greatest
/// [`row_bytes`] of any operation.
pub const fn shared_bytes(norm_len: usize, row_bytes: usize) -> usize {
    let row = if row_bytes > ATTENTION_BYTES {
        row_bytes
    } else {
        ATTENTION_BYTES
    };
    NORM_AT + (4 * norm_len).next_multiple_of(16) + row
}

/// Shared memory for an input row of `cols` values (a multiple of 32); `float` where any matrix is of
/// a float type.
pub const fn row_bytes(cols: usize, float: bool) -> usize {
    cols + cols / 4 + if float { 4 * cols } else { 0 }
}

/// Each warp's part of a head: sums of up to 256 elements, peak and mass.
const ATTENTION_BYTES: usize = WARPS * PART * 4;
const PART: usize = 256 + 4;

/// An input row in shared memory. Quantised values: the first 16 of every group, then the last 16, so
/// that 16-byte loads of neighbouring lanes fall into different banks; then for each group `d` and the
/// sums of its halves' integers.
#[derive(Clone, Copy)]
struct Row {
    low: SharedPtr<u32>,
    meta: SharedPtr<u32>,
    groups: u32,
    /// Multiplies every product: the norm's `1 / sqrt(mean(x²) + eps)`, which is known only after the
    /// values are stored.
    scale: f32,
}

/// The current operation, in shared memory.
type Current = *const Op;

/// Starts the copy of operation `index` into its place in shared memory.
#[inline(always)]
unsafe fn copy_op(a: &DecodeArgs, index: u32) {
    let t = thread_idx_x() as usize;
    if t < OP_BYTES / 16 {
        let to = OPS_AT + (index as usize % 2) * OP_BYTES + 16 * t;
        unsafe {
            cp_async_16(
                shared::at::<u8>(to as u32),
                a.ops.add(index as usize).cast::<u8>().add(16 * t),
            );
        }
    }
}

#[inline(always)]
fn op_at(index: u32) -> Current {
    shared::at::<Op>((OPS_AT + (index as usize % 2) * OP_BYTES) as u32).as_ptr()
}

/// Whether an input's norm weight is brought to shared memory ahead of time.
#[inline(always)]
fn norm_ahead(input: &Input) -> bool {
    !input.norm.is_null() && input.len % 4 == 0
}

/// Starts the copy of the norm weight of `op`.
#[inline(always)]
unsafe fn copy_norm(op: Current) {
    unsafe {
        let input = &(*op).input;
        if (*op).kind != kind::ATTEND && norm_ahead(input) {
            let mut i = thread_idx_x();
            while i < input.len / 4 {
                cp_async_16(
                    shared::at::<f32>(NORM_AT as u32 + 16 * i),
                    input.norm.add(4 * i as usize),
                );
                i += THREADS;
            }
        }
    }
}

impl Row {
    // Computed when needed: registers are scarce.
    #[inline(always)]
    fn high(&self) -> SharedPtr<u32> {
        self.low.byte_add(self.groups * (GROUP as u32 / 2))
    }

    #[inline(always)]
    fn values(&self) -> SharedPtr<f32> {
        self.low.byte_add(self.groups * GROUP as u32).cast()
    }

    #[inline(always)]
    fn new(a: &DecodeArgs, cols: usize, keep_f32: bool) -> Row {
        let start = NORM_AT + (4 * a.norm_len as usize).next_multiple_of(16);
        let at = |bytes: usize| (start + bytes) as u32;
        Row {
            low: shared::at(at(0)),
            // Last, as it is aligned to eight bytes only.
            meta: shared::at(at(cols + if keep_f32 { 4 * cols } else { 0 })),
            groups: (cols / GROUP) as u32,
            scale: 1.0,
        }
    }

    /// Multiplies by the norm weight, quantises and stores the input of `op`; ends with a barrier, past which the next
    /// operation is in shared memory too.
    ///
    /// Each thread takes four values at a time, eight threads a group.
    #[inline(always)]
    unsafe fn fill(a: &DecodeArgs, op: Current) -> Row {
        unsafe {
            let input = (*op).input;
            let len = input.len as usize;
            let cols = len.next_multiple_of(GROUP);
            let mut row = Row::new(a, cols, input.keep_f32 != 0);
            let t = thread_idx_x() as usize;
            let threads = THREADS as usize;
            let normed = !input.norm.is_null();
            let mut squares = 0.0;
            let mut base = 0;
            while base < cols {
                // All lanes of a warp stay together for the shuffles; those past the end carry zeros.
                let i = base + 4 * t;
                let mut v = [0.0; 4];
                if i < cols {
                    v = if input.splits != 0 {
                        load4_combined(&input, i)
                    } else {
                        load4(input.x, i, len)
                    };
                    squares += v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
                    if normed && i < len {
                        if norm_ahead(&input) {
                            let w = shared::at::<f32>(NORM_AT as u32).add(i as u32).load_v4();
                            for k in 0..4 {
                                v[k] *= w[k];
                            }
                        } else {
                            for k in 0..4 {
                                if i + k < len {
                                    v[k] *= ldg_f32(input.norm.add(i + k));
                                }
                            }
                        }
                    }
                }
                row.store(i, cols, v, input.keep_f32 != 0);
                base += 4 * threads;
            }
            let scratch = shared::at::<f32>(0);
            let squares = warp::reduce_sum_f32(squares);
            if t % 32 == 0 {
                scratch.add(t as u32 / 32).store(squares);
            }
            cp_async_wait_all();
            sync_threads();
            if normed {
                let lane = thread::lane_id();
                let squares = if lane < WARPS as u32 {
                    scratch.add(lane).load()
                } else {
                    0.0
                };
                let squares = warp::reduce_sum_f32(squares);
                row.scale = 1.0 / float::sqrt(squares / len as f32 + input.eps);
            }
            row
        }
    }

    /// Stores values `i .. i + 4`; threads whose `i` is past `cols` only take part in the shuffles.
    #[inline(always)]
    unsafe fn store(&self, i: usize, cols: usize, v: [f32; 4], keep_f32: bool) {
        unsafe {
            let mut peak = v[0].abs().max(v[1].abs()).max(v[2].abs().max(v[3].abs()));
            peak = peak.max(warp::shuffle_xor(peak, 1));
            peak = peak.max(warp::shuffle_xor(peak, 2));
            peak = peak.max(warp::shuffle_xor(peak, 4));
            let d = peak / 127.0;
            let inverse = if peak > 0.0 { 127.0 / peak } else { 0.0 };
            let round = |x: f32| float::round_to_i32(x * inverse);
            let q = [round(v[0]), round(v[1]), round(v[2]), round(v[3])];
            let mut sum = q[0] + q[1] + q[2] + q[3];
            sum += warp::shuffle_xor(sum, 1);
            sum += warp::shuffle_xor(sum, 2);
            let other = warp::shuffle_xor(sum, 4);
            if i < cols {
                let word = (q[0] as u32 & 0xff)
                    | ((q[1] as u32 & 0xff) << 8)
                    | ((q[2] as u32 & 0xff) << 16)
                    | ((q[3] as u32) << 24);
                let (group, w) = ((i / GROUP) as u32, ((i % GROUP) / 4) as u32);
                if w < 4 {
                    self.low.add(group * 4 + w).store(word);
                } else {
                    self.high().add(group * 4 + w - 4).store(word);
                }
                if w == 0 {
                    self.meta.add(group * 2).store(d.to_bits());
                    self.meta
                        .add(group * 2 + 1)
                        .store((sum as u32 & 0xffff) | ((other as u32) << 16));
                }
                if keep_f32 {
                    self.values().add(i as u32).store_v4(v);
                }
            }
        }
    }
}

/// Four values from `x[i..]`, zeros past `len`. Other blocks wrote them in this launch.
#[inline(always)]
unsafe fn load4(x: *const f32, i: usize, len: usize) -> [f32; 4] {
    unsafe {
        if i + 4 <= len && len.is_multiple_of(4) {
            let v = ld_v4_u32(x.add(i));
            unrolled!(4, |k| f32::from_bits(v[k]))
        } else {
            unrolled!(4, |k| if i + k < len {
                x.add(i + k).read()
            } else {
                0.0
            })
        }
    }
}

/// Splits that are loaded before the first is used.
const COMBINE: usize = 8;

/// Four values of attention's result from its parts: `Σ 2^(pₛ - p) sumₛ / Σ 2^(pₛ - p) massₛ`, with `p`
/// the greatest of the peaks `pₛ` (arXiv:2205.14135, section 3.1).
#[inline(always)]
unsafe fn load4_combined(input: &Input, i: usize) -> [f32; 4] {
    let (splits, head_dim) = (input.splits as usize, input.head_dim as usize);
    let stride = head_dim + 4;
    let (mut peak, mut mass, mut sum) = (NONE, 0.0f32, [0.0f32; 4]);
    unsafe {
        let head = (i as u32 / input.head_dim) as usize;
        let parts = input.x.add(head * splits * stride);
        let element = i - head * head_dim;
        let mut first = 0;
        while first < splits {
            // Parts past the last are the last again, with no weight.
            let at = |s: usize| {
                let s = first + s;
                parts.add(if s < splits { s } else { splits - 1 } * stride)
            };
            let stats = unrolled!(8, |s| ld_v2_u32(at(s).add(head_dim)));
            let values = unrolled!(8, |s| ld_v4_u32(at(s).add(element)));
            let mut top = peak;
            for s in 0..COMBINE {
                top = top.max(f32::from_bits(stats[s][0]));
            }
            let shrink = float::exp2_approx(peak - top);
            mass *= shrink;
            for k in 0..4 {
                sum[k] *= shrink;
            }
            for s in 0..COMBINE {
                let weight = if first + s < splits {
                    float::exp2_approx(f32::from_bits(stats[s][0]) - top)
                } else {
                    0.0
                };
                mass += weight * f32::from_bits(stats[s][1]);
                for k in 0..4 {
                    sum[k] += weight * f32::from_bits(values[s][k]);
                }
            }
            peak = top;
            first += COMBINE;
        }
    }
    unrolled!(4, |k| sum[k] / mass)
}

/// This lane's part of the product of one group.
#[inline(always)]
fn dot_group<T: Quantised>(
    raw: T::Raw,
    g: usize,
    low: &[u32; 4],
    high: &[u32; 4],
    meta: (f32, i32, i32),
) -> f32 {
    let levels = T::levels(raw);
    let a = T::affine(raw, g);
    let (mut first, mut last) = (0, 0);
    for w in 0..4 {
        first = dp4a_us(levels[w], low[w], first);
    }
    for w in 0..4 {
        last = dp4a_us(levels[w + 4], high[w], last);
    }
    let (d, sum_first, sum_last) = meta;
    let v = if T::UNIFORM {
        a.d[0] * (first + last) as f32 + a.m[0] * (sum_first + sum_last) as f32
    } else {
        a.d[0] * first as f32
            + a.m[0] * sum_first as f32
            + (a.d[1] * last as f32 + a.m[1] * sum_last as f32)
    };
    d * v
}

/// A run of one matrix row's groups.
#[derive(Clone, Copy)]
struct Run {
    /// First group, counted over the matrix.
    first: u32,
    /// Its place in the input row.
    at: u32,
    len: u32,
}

/// This lane's parts of two dot products, of matrices of one quantised type. `b` is at most as long as
/// `a`, and lies at the same place of the row unless `apart`.
#[inline(always)]
unsafe fn dot2_quantised<T: Quantised>(
    row: &Row,
    m0: &Matrix,
    a: Run,
    m1: &Matrix,
    b: Run,
    apart: bool,
) -> (f32, f32) {
    let (mut s0, mut s1) = (0.0, 0.0);
    let lane = thread::lane_id();
    let load = |at: u32| unsafe {
        let low = row.low.add(at * 4).load_v4();
        let high = row.high().add(at * 4).load_v4();
        let [d, sums] = row.meta.add(at * 2).load_v2();
        let meta = (
            f32::from_bits(d),
            i32::from(sums as i16),
            i32::from((sums >> 16) as i16),
        );
        (low, high, meta)
    };
    macro_rules! turn {
        ($wide:tt, $base:expr) => {{
            let base: u32 = $base;
            // Past the end the last group again, which is not counted.
            let at = |u: usize, len: u32| {
                let g = base + 32 * u as u32 + lane;
                (if g < len { g } else { len - 1 }, g < len)
            };
            let w0 = unrolled!($wide, |u| T::load(m0, (a.first + at(u, a.len).0) as usize));
            let w1 = unrolled!($wide, |u| T::load(m1, (b.first + at(u, b.len).0) as usize));
            for u in 0..w0.len() {
                let ((g, g_counts), (h, h_counts)) = (at(u, a.len), at(u, b.len));
                let x = load(a.at + g);
                let y = if apart { load(b.at + h) } else { x };
                let v0 = dot_group::<T>(w0[u], (a.first + g) as usize, &x.0, &x.1, x.2);
                let v1 = dot_group::<T>(w1[u], (b.first + h) as usize, &y.0, &y.1, y.2);
                s0 += if g_counts { v0 } else { 0.0 };
                s1 += if h_counts { v1 } else { 0.0 };
            }
        }};
    }
    unsafe {
        // Several groups a turn: all are loaded before the first is used.
        let mut base = 0;
        while base + 32 < a.len {
            turn!(2, base);
            base += 64;
        }
        if base < a.len {
            turn!(1, base);
        }
    }
    (s0, s1)
}

/// The same with float weights and the f32 row.
#[inline(always)]
unsafe fn dot2_float<T: Eight>(
    row: &Row,
    m0: &Matrix,
    a: Run,
    m1: &Matrix,
    b: Run,
    apart: bool,
) -> (f32, f32) {
    let (mut s0, mut s1) = (0.0, 0.0);
    let lane = thread::lane_id();
    let load = |i: u32| unsafe {
        let at = row.values().add(i * 8);
        (at.load_v4(), at.add(4).load_v4())
    };
    let mut base = 0;
    unsafe {
        while base < a.len * 4 {
            // Past the end the last eight again, which are not counted.
            let at = |u: usize, len: u32| {
                let e = base + 32 * u as u32 + lane;
                (if e < len * 4 { e } else { len * 4 - 1 }, e < len * 4)
            };
            let w0 = unrolled!(2, |u| T::eight(
                m0,
                a.first as usize * 4 + at(u, a.len).0 as usize
            ));
            let w1 = unrolled!(2, |u| T::eight(
                m1,
                b.first as usize * 4 + at(u, b.len).0 as usize
            ));
            for u in 0..2 {
                let ((e, e_counts), (f, f_counts)) = (at(u, a.len), at(u, b.len));
                let x = load(a.at * 4 + e);
                let y = if apart { load(b.at * 4 + f) } else { x };
                let (mut v0, mut v1) = (0.0, 0.0);
                for k in 0..4 {
                    v0 += w0[u][k] * x.0[k] + w0[u][k + 4] * x.1[k];
                    v1 += w1[u][k] * y.0[k] + w1[u][k + 4] * y.1[k];
                }
                s0 += if e_counts { v0 } else { 0.0 };
                s1 += if f_counts { v1 } else { 0.0 };
            }
            base += 64;
        }
    }
    (s0, s1)
}

macro_rules! dot2_by_type {
    ($($ty:literal => $name:ident, $kind:ident;)*) => {
        #[inline(always)]
        unsafe fn dot2_same(
            row: &Row,
            m0: &Matrix,
            a: Run,
            m1: &Matrix,
            b: Run,
            apart: bool,
        ) -> (f32, f32) {
            unsafe {
                match m0.ty {
                    $($ty => dot2_by_type!(@$kind $name, row, m0, a, m1, b, apart),)*
                    _ => (f32::NAN, f32::NAN),
                }
            }
        }
    };
    (@quantised $name:ident, $($arg:expr),*) => { dot2_quantised::<$name>($($arg),*) };
    (@float $name:ident, $($arg:expr),*) => { dot2_float::<$name>($($arg),*) };
}
for_each_type!(dot2_by_type);

/// Two matrix rows (the number of a matrix of the operation, and a row of it), or one twice.
#[derive(Clone, Copy)]
struct Task {
    m0: u32,
    r0: u32,
    m1: u32,
    r1: u32,
    /// A [`kind::QKV`]'s head and pair of elements within its matrix, and whether they rotate.
    head: u32,
    pair: u32,
    rotates: bool,
}

/// Tasks of a product, one per warp and turn.
#[inline(always)]
unsafe fn tasks(op: Current) -> u32 {
    unsafe {
        let rows = (*op).matrices[0].rows;
        match (*op).kind {
            kind::PRODUCT if (*op).split != 0 => rows,
            kind::PRODUCT => rows.div_ceil(2),
            kind::GATE_UP => rows,
            kind::QKV => {
                let heads = (*op).heads + 2 * (*op).cache.kv_heads;
                heads * (*op).cache.head_dim / 2
            }
            _ => 0,
        }
    }
}

#[inline(always)]
unsafe fn task(op: Current, index: u32) -> Task {
    let mut task = Task {
        m0: 0,
        r0: index,
        m1: 0,
        r1: index,
        head: 0,
        pair: 0,
        rotates: false,
    };
    unsafe {
        match (*op).kind {
            kind::PRODUCT if (*op).split == 0 => {
                task.r0 = 2 * index;
                let last = (*op).matrices[0].rows - 1;
                task.r1 = if 2 * index < last {
                    2 * index + 1
                } else {
                    2 * index
                };
            }
            kind::GATE_UP => task.m1 = 1,
            kind::QKV => {
                let head_dim = (*op).cache.head_dim;
                let (heads, kv_heads) = ((*op).heads, (*op).cache.kv_heads);
                let pairs = head_dim / 2;
                let head = index / pairs;
                let (which, head) = if head < heads {
                    (0, head)
                } else if head < heads + kv_heads {
                    (1, head - heads)
                } else {
                    (2, head - heads - kv_heads)
                };
                let pair = index % pairs;
                let (e0, e1, rotates) = (*op).rotation.pair(pair as usize, which < 2);
                task = Task {
                    m0: which,
                    r0: head * head_dim + e0 as u32,
                    m1: which,
                    r1: head * head_dim + e1 as u32,
                    head,
                    pair,
                    rotates,
                };
            }
            _ => {}
        }
    }
    task
}

/// This warp's first task. Neighbouring tasks go to different blocks, so that a few keep all busy.
#[inline(always)]
fn first_task() -> u32 {
    thread_idx_x() / 32 * grid_dim_x() + block_idx_x()
}

/// From one of this warp's tasks to the next.
#[inline(always)]
fn task_stride() -> u32 {
    grid_dim_x() * WARPS as u32
}

/// Matrices of an operation.
#[inline(always)]
unsafe fn matrices(op: Current) -> usize {
    match unsafe { (*op).kind } {
        kind::PRODUCT => 1,
        kind::GATE_UP => 2,
        kind::QKV => 3,
        _ => 0,
    }
}

/// Asks for this block's share of the weights of `op`. Which block will use them does not matter: L2 is
/// everybody's.
#[inline(always)]
unsafe fn prefetch(op: Current) {
    unsafe {
        let count = matrices(op);
        let mut m = 0;
        while m < count {
            let matrix = &raw const (*op).matrices[m];
            for plane in 0..4 {
                let row_bytes = (*matrix).row_bytes[plane];
                if row_bytes != 0 {
                    let bytes = row_bytes as usize * (*matrix).rows as usize;
                    // A line a thread; blocks side by side, whole lines.
                    let line = block_idx_x() as usize * THREADS as usize + thread_idx_x() as usize;
                    let at = 128 * line;
                    if at < bytes {
                        prefetch_l2((*matrix).planes[plane].add(at));
                    }
                }
            }
            let bias = (*op).biases[m];
            let at = 32 * (thread_idx_x() * grid_dim_x() + block_idx_x()) as usize;
            if !bias.is_null() && at < (*matrix).rows as usize {
                prefetch_l2(bias.add(at));
            }
            m += 1;
        }
    }
}

/// `v` of a matrix's optional bias.
#[inline(always)]
unsafe fn bias(op: Current, m: u32, r: u32) -> f32 {
    unsafe {
        let bias = (*op).biases[m as usize];
        if bias.is_null() {
            0.0
        } else {
            ldg_f32(bias.add(r as usize))
        }
    }
}

/// [`kind::PRODUCT`], [`kind::GATE_UP`] and [`kind::QKV`].
#[inline(always)]
unsafe fn products(a: &DecodeArgs, op: Current, number: u32) {
    unsafe {
        let row = Row::fill(a, op);
        if number + 1 < a.count {
            prefetch(op_at(number + 1));
        }
        let lane = thread::lane_id();
        let count = tasks(op);
        let apart = (*op).split != 0;
        let mut best = 0;
        let mut index = first_task();
        while index < count {
            let t = task(op, index);
            // What the epilogue needs is asked for first, and comes while the weights do.
            let biases = (bias(op, t.m0, t.r0), bias(op, t.m1, t.r1));
            // A rotation's cosine and sine; or what the product is added to.
            let mut extra = (if (*op).kind == kind::QKV { 1.0 } else { 0.0 }, 0.0);
            if t.rotates {
                extra = rotation_at(&(*op).rotation, a.position as usize, t.pair as usize);
            } else if (*op).add != 0 {
                extra.0 = (*op)
                    .out
                    .add(if lane == 1 { t.r1 } else { t.r0 } as usize)
                    .read();
            }
            let groups = row.groups;
            let half = if apart { groups.div_ceil(2) } else { groups };
            let run0 = Run {
                first: t.r0 * groups,
                at: 0,
                len: half,
            };
            let run1 = if apart && groups > half {
                Run {
                    first: t.r0 * groups + half,
                    at: half,
                    len: groups - half,
                }
            } else {
                Run {
                    first: t.r1 * groups,
                    at: 0,
                    len: groups,
                }
            };
            // Types that differ are rare (a gate and an up of a hand-made mix): one after the other then,
            // through the same code.
            let (m0, m1) = (
                &(*op).matrices[t.m0 as usize],
                &(*op).matrices[t.m1 as usize],
            );
            let same = m0.ty == m1.ty;
            let (mut s0, mut s1) = (0.0, 0.0);
            let mut pass = 0;
            while pass < 2 {
                let (ma, ra) = if pass == 0 { (m0, run0) } else { (m1, run1) };
                let (mb, rb) = if same { (m1, run1) } else { (ma, ra) };
                let s = dot2_same(&row, ma, ra, mb, rb, apart && same);
                if pass == 0 {
                    s0 = s.0;
                }
                if same {
                    s1 = s.1;
                    break;
                }
                s1 = s.0;
                pass += 1;
            }
            if apart {
                // A single group is both runs.
                s0 += if groups > half { s1 } else { 0.0 };
                s1 = s0;
            }
            let (v0, v1) = (
                warp::reduce_sum_f32(s0) * row.scale + biases.0,
                warp::reduce_sum_f32(s1) * row.scale + biases.1,
            );
            // Read again rather than held in a register meanwhile.
            let op_kind = (&raw const (*op).kind).read_volatile();
            if op_kind == kind::PRODUCT {
                if lane < 2 && (lane == 0 || t.r1 > t.r0) {
                    let (r, v) = if lane == 0 { (t.r0, v0) } else { (t.r1, v1) };
                    (*op).out.add(r as usize).write(v + extra.0);
                    best = max_u64(best, rank(v, r as usize));
                }
            } else if lane == 0 {
                if op_kind == kind::GATE_UP {
                    (*op).out.add(t.r0 as usize).write(silu(v0) * v1);
                } else {
                    let v = (v0 * extra.0 - v1 * extra.1, v0 * extra.1 + v1 * extra.0);
                    if t.m0 == 0 {
                        (*op).out.add(t.r0 as usize).write(v.0);
                        (*op).out.add(t.r1 as usize).write(v.1);
                    } else {
                        let base = if t.m0 == 1 {
                            (*op).cache.keys
                        } else {
                            (*op).cache.values
                        };
                        let position = a.position as usize;
                        let block = ldg_u32(a.table.add(position / BLOCK_TOKENS)) as usize;
                        let kv_heads = (*op).cache.kv_heads as usize;
                        let head_dim = (*op).cache.head_dim as usize;
                        let at = (block * kv_heads + t.head as usize) * BLOCK_TOKENS
                            + position % BLOCK_TOKENS;
                        let to = base.cast::<u16>().add(at * head_dim);
                        to.add(t.r0 as usize - t.head as usize * head_dim)
                            .write(to_f16(v.0));
                        to.add(t.r1 as usize - t.head as usize * head_dim)
                            .write(to_f16(v.1));
                    }
                }
            }
            index += task_stride();
        }
        if (*op).choose != 0 {
            choose(a, best);
        }
    }
}

/// Publishes the greatest of all blocks' ranks: the last block to come knows it.
#[inline(always)]
unsafe fn choose(a: &DecodeArgs, best: u64) {
    unsafe {
        // Other warps still read the row.
        sync_threads();
        let best = block_max(best, shared::at(0));
        if thread_idx_x() == 0 {
            let choice = a.choice;
            atomic::max_u64(&raw mut (*choice).best, best);
            threadfence();
            let blocks = atomic::add_u32(&raw mut (*choice).blocks, 1);
            if blocks == grid_dim_x() - 1 {
                threadfence();
                let best = atomic::exch_u64(&raw mut (*choice).best, 0);
                atomic::exch_u32(&raw mut (*choice).blocks, 0);
                let id = !(best as u32);
                threadfence_system();
                a.chosen
                    .write_volatile((u64::from(a.sequence) << 32) | u64::from(id));
            }
        }
    }
}

/// [`kind::EMBED`]: a thread per group.
#[inline(always)]
unsafe fn embed(a: &DecodeArgs, op: Current) {
    unsafe {
        let table = &(*op).matrices[0];
        let groups = table.groups() as u32;
        let mut g = thread_idx_x() * grid_dim_x() + block_idx_x();
        while g < groups {
            let v = unpack(table, (a.token * groups + g) as usize);
            let left = (*op).input.len - g * GROUP as u32;
            let out = (*op).out.add(g as usize * GROUP);
            for i in 0..GROUP {
                if (i as u32) < left {
                    out.add(i).write(v[i] * (*op).scale);
                }
            }
            g += THREADS * grid_dim_x();
        }
        cp_async_wait_all();
        sync_threads();
    }
}

/// [`kind::ATTEND`]: a block takes one head and split at a time, its warps parts of the split's tokens.
#[inline(always)]
unsafe fn attend(a: &DecodeArgs, op: Current) {
    unsafe {
        let cache = (*op).cache;
        let head_dim = cache.head_dim as usize;
        let splits = (*op).splits;
        let team_lanes = head_dim.div_ceil(8).next_power_of_two();
        let (warp_index, lane) = (thread_idx_x() as usize / 32, thread::lane_id() as usize);
        let tokens = a.position as usize + 1;
        let start = NORM_AT + (4 * a.norm_len as usize).next_multiple_of(16);
        let parts = shared::at::<f32>(start as u32);
        let mut index = block_idx_x();
        while index < (*op).heads * splits {
            let (head, split) = ((index / splits) as usize, (index % splits) as usize);
            let chunk = (tokens as u32).div_ceil(splits) as usize;
            let first = split * chunk;
            let last = if first + chunk < tokens {
                first + chunk
            } else {
                tokens
            };
            // Whole turns of all teams, so that no warp is left with a remainder of another's.
            let teams = 32 / team_lanes;
            let share = chunk.div_ceil(WARPS).next_multiple_of(teams);
            let from = first + warp_index * share;
            let to = if from + share < last {
                from + share
            } else {
                last
            };
            let part = attention::attend_tokens::<u16>(
                (*op).input.x.add(head * head_dim),
                &cache,
                a.table,
                (head as u32 / ((*op).heads / cache.kv_heads)) as usize,
                (*op).scale,
                from,
                to,
            );
            let slot = parts.add((warp_index * PART) as u32);
            if lane < team_lanes && lane * 8 < head_dim {
                let s = part.sum;
                slot.add(lane as u32 * 8).store_v4([s[0], s[1], s[2], s[3]]);
                slot.add(lane as u32 * 8 + 4)
                    .store_v4([s[4], s[5], s[6], s[7]]);
            }
            if lane == 0 {
                slot.add(256).store(part.peak);
                slot.add(257).store(part.mass);
            }
            sync_threads();
            // A thread per element merges the warps.
            let e = thread_idx_x() as usize;
            if e < head_dim + 2 {
                let mut peak = NONE;
                for w in 0..WARPS {
                    peak = peak.max(parts.add((w * PART + 256) as u32).load());
                }
                let mut sum = 0.0;
                for w in 0..WARPS {
                    let at = parts.add((w * PART) as u32);
                    let weight = float::exp2_approx(at.add(256).load() - peak);
                    let element = if e < head_dim { e } else { 257 };
                    sum += weight * at.add(element as u32).load();
                }
                let stride = head_dim + 4;
                let to = (*op).out.add((head * splits as usize + split) * stride);
                // Elements, then peak, then mass.
                if e < head_dim {
                    to.add(e).write(sum);
                } else if e == head_dim {
                    to.add(e).write(peak);
                } else {
                    to.add(e).write(sum);
                }
            }
            sync_threads();
            index += grid_dim_x();
        }
        cp_async_wait_all();
        sync_threads();
    }
}

/// Carries `ops` in order over one row. The launch is cooperative, with [`shared_bytes`].
#[kernel(launch_bounds(512, 1))]
pub unsafe fn decode(a: DecodeArgs) {
    unsafe {
        copy_op(&a, 0);
        cp_async_wait_all();
        sync_threads();
        copy_norm(op_at(0));
        cp_async_wait_all();
        sync_threads();
        let mut i = 0;
        while i < a.count {
            let op = op_at(i);
            let more = i + 1 < a.count;
            if more {
                copy_op(&a, i + 1);
            }
            match (*op).kind {
                kind::EMBED => embed(&a, op),
                kind::ATTEND => attend(&a, op),
                _ => products(&a, op, i),
            }
            if more && matches!((*op).kind, kind::EMBED | kind::ATTEND) {
                prefetch(op_at(i + 1));
            }
            if more {
                copy_norm(op_at(i + 1));
                // Each thread's own copies; the barrier shows them to the block.
                cp_async_wait_all();
                grid::sync(a.barrier);
            }
            i += 1;
        }
    }
}

/// An operation of no kind, for the fields that a kind has no use for.
pub const NO_OP: Op = Op {
    kind: u32::MAX,
    add: 0,
    split: 0,
    choose: 0,
    input: Input {
        x: core::ptr::null(),
        norm: core::ptr::null(),
        eps: 0.0,
        len: 0,
        keep_f32: 0,
        splits: 0,
        head_dim: 0,
    },
    matrices: [NO_MATRIX; 3],
    biases: [core::ptr::null(); 3],
    rotation: Rotation {
        table: core::ptr::null(),
        dims: 0,
        halves: 0,
    },
    cache: CacheLayer {
        keys: core::ptr::null_mut(),
        values: core::ptr::null_mut(),
        kv_heads: 0,
        head_dim: 0,
    },
    heads: 0,
    splits: 0,
    scale: 0.0,
    out: core::ptr::null_mut(),
};
