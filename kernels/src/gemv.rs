//! Matrix times one row: the products of a decode step, each with its norm before and its epilogue after.
//!
//! Every block brings the whole input row into shared memory, normalised and quantised to 8 bits per
//! group of 32 (`x ≈ d * q`), which costs a read of the row from L2 and saves a step over the whole
//! device. A warp then computes two rows of the matrix at a time, a lane taking every 32nd group;
//! which two is the epilogue's choice: a rotation's pair, a gate and its up, or two neighbours.

use crate::for_each_type;
use crate::rows::{Step, rotate, write_cache};
use crate::types::*;
use cuda_std::int::dp4a_us;
use cuda_std::memory::ldg_f32;
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::{block_dim_x, block_idx_x, grid_dim_x, sync_threads, thread_idx_x};
use cuda_std::{float, kernel, thread, warp};

/// Threads per block.
pub const THREADS: u32 = 256;
const WARPS: usize = THREADS as usize / 32;

/// Shared memory for an input row of `cols` values (a multiple of 32): see [`Row`]. `float` where any
/// matrix is of a float type.
pub const fn shared_bytes(cols: usize, float: bool) -> usize {
    64 + cols + cols / 4 + if float { 4 * cols } else { 0 }
}

/// The input row of a product.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Input {
    /// f32, `len` long.
    pub x: *const f32,
    /// RMS norm's weight; null for no norm.
    pub norm: *const f32,
    pub eps: f32,
    pub len: u32,
    /// Whether f32 values are kept too, for matrices of float types.
    pub keep_f32: u32,
}

/// An input row in shared memory. Quantised values: the first 16 of every group, then the last 16, so
/// that 16-byte loads of neighbouring lanes fall into different banks; then for each group `d` and the
/// sums of its halves' integers.
#[derive(Clone, Copy)]
struct Row {
    low: SharedPtr<u32>,
    high: SharedPtr<u32>,
    meta: SharedPtr<u32>,
    values: SharedPtr<f32>,
    groups: usize,
}

impl Row {
    #[inline(always)]
    fn new(cols: usize, keep_f32: bool) -> Row {
        let at = |bytes: usize| 64 + bytes as u32;
        Row {
            low: shared::at(at(0)),
            high: shared::at(at(cols / 2)),
            values: shared::at(at(cols)),
            // Last, as it is aligned to eight bytes only.
            meta: shared::at(at(cols + if keep_f32 { 4 * cols } else { 0 })),
            groups: cols / GROUP,
        }
    }

    /// Norms, quantises and stores `input`; ends with a barrier.
    ///
    /// Each thread takes four values at a time, eight threads a group.
    #[inline(always)]
    unsafe fn fill(input: &Input) -> Row {
        let len = input.len as usize;
        let cols = len.next_multiple_of(GROUP);
        let row = Row::new(cols, input.keep_f32 != 0);
        let t = thread_idx_x() as usize;
        let threads = block_dim_x() as usize;
        unsafe {
            let mut scale = 1.0;
            if !input.norm.is_null() {
                let mut sum = 0.0;
                let mut i = 4 * t;
                while i < len {
                    let v = load4(input.x, i, len);
                    sum += v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
                    i += 4 * threads;
                }
                let sum = block_sum(sum);
                scale = 1.0 / float::sqrt(sum / len as f32 + input.eps);
            }
            let mut base = 0;
            while base < cols {
                // All lanes of a warp stay together for the shuffles; those past the end carry zeros.
                let i = base + 4 * t;
                let mut v = if i < cols {
                    load4(input.x, i, len)
                } else {
                    [0.0; 4]
                };
                if !input.norm.is_null() && i < cols {
                    let w = load4(input.norm, i, len);
                    for k in 0..4 {
                        v[k] = v[k] * scale * w[k];
                    }
                }
                row.store(i, cols, v, input.keep_f32 != 0);
                base += 4 * threads;
            }
            sync_threads();
        }
        row
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
                    self.high.add(group * 4 + w - 4).store(word);
                }
                if w == 0 {
                    self.meta.add(group * 2).store(d.to_bits());
                    self.meta
                        .add(group * 2 + 1)
                        .store((sum as u32 & 0xffff) | ((other as u32) << 16));
                }
                if keep_f32 {
                    self.values.add(i as u32).store_v4(v);
                }
            }
        }
    }
}

/// Four values from `x[i..]`, zeros past `len`.
#[inline(always)]
unsafe fn load4(x: *const f32, i: usize, len: usize) -> [f32; 4] {
    unsafe {
        if i + 4 <= len && len.is_multiple_of(4) {
            ldg_v4_f32(x.add(i))
        } else {
            let at = |k: usize| {
                if i + k < len {
                    ldg_f32(x.add(i + k))
                } else {
                    0.0
                }
            };
            [at(0), at(1), at(2), at(3)]
        }
    }
}

/// Sum over the block; the first 64 bytes of shared memory are its scratch.
#[inline(always)]
unsafe fn block_sum(v: f32) -> f32 {
    let scratch = shared::at::<f32>(0);
    let t = thread_idx_x() as usize;
    unsafe {
        let v = warp::reduce_sum_f32(v);
        if t % 32 == 0 {
            scratch.add(t as u32 / 32).store(v);
        }
        sync_threads();
        let lane = t % 32;
        let v = if lane < WARPS {
            scratch.add(lane as u32).load()
        } else {
            0.0
        };
        warp::reduce_sum_f32(v)
    }
}

/// This lane's part of the product of one group.
#[inline(always)]
unsafe fn dot_group<T: Quantised>(
    m: &Matrix,
    g: usize,
    low: &[u32; 4],
    high: &[u32; 4],
    meta: (f32, i32, i32),
) -> f32 {
    unsafe {
        let levels = T::levels(m, g);
        let a = T::affine(m, g);
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
}

/// This lane's parts of the products of two rows, of matrices of one quantised type.
#[inline(always)]
unsafe fn dot2_quantised<T: Quantised>(
    row: &Row,
    m0: &Matrix,
    r0: usize,
    m1: &Matrix,
    r1: usize,
) -> (f32, f32) {
    let (mut s0, mut s1) = (0.0, 0.0);
    let (b0, b1) = (r0 * row.groups, r1 * row.groups);
    let mut g = thread::lane_id() as usize;
    unsafe {
        while g < row.groups {
            let at = g as u32;
            let low = row.low.add(at * 4).load_v4();
            let high = row.high.add(at * 4).load_v4();
            let [d, sums] = row.meta.add(at * 2).load_v2();
            let d = f32::from_bits(d);
            let meta = (d, i32::from(sums as i16), i32::from((sums >> 16) as i16));
            s0 += dot_group::<T>(m0, b0 + g, &low, &high, meta);
            s1 += dot_group::<T>(m1, b1 + g, &low, &high, meta);
            g += 32;
        }
    }
    (s0, s1)
}

/// The same with float weights and the f32 row.
#[inline(always)]
unsafe fn dot2_float<T: Eight>(
    row: &Row,
    m0: &Matrix,
    r0: usize,
    m1: &Matrix,
    r1: usize,
) -> (f32, f32) {
    let (mut s0, mut s1) = (0.0, 0.0);
    let eights = row.groups * 4;
    let (b0, b1) = (r0 * eights, r1 * eights);
    let mut e = thread::lane_id() as usize;
    unsafe {
        while e < eights {
            let at = row.values.add(e as u32 * 8);
            let (x0, x1) = (at.load_v4(), at.add(4).load_v4());
            let (w0, w1) = (T::eight(m0, b0 + e), T::eight(m1, b1 + e));
            for k in 0..4 {
                s0 += w0[k] * x0[k] + w0[k + 4] * x1[k];
                s1 += w1[k] * x0[k] + w1[k + 4] * x1[k];
            }
            e += 32;
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
            r0: usize,
            m1: &Matrix,
            r1: usize,
        ) -> (f32, f32) {
            unsafe {
                match m0.ty {
                    $($ty => dot2_by_type!(@$kind $name, row, m0, r0, m1, r1),)*
                    _ => (f32::NAN, f32::NAN),
                }
            }
        }
    };
    (@quantised $name:ident, $($arg:expr),*) => { dot2_quantised::<$name>($($arg),*) };
    (@float $name:ident, $($arg:expr),*) => { dot2_float::<$name>($($arg),*) };
}
for_each_type!(dot2_by_type);

/// Row `r0` of `m0` and row `r1` of `m1` times the input, in every lane.
#[inline(always)]
unsafe fn dot2(row: &Row, m0: &Matrix, r0: usize, m1: &Matrix, r1: usize) -> (f32, f32) {
    unsafe {
        // Types that differ are rare (a gate and an up of a hand-made mix): one after the other then,
        // through the same code.
        let same = m0.ty == m1.ty;
        let mut result = (0.0, 0.0);
        let mut pass = 0;
        while pass < 2 {
            let (ma, ra) = if pass == 0 { (m0, r0) } else { (m1, r1) };
            let (mb, rb) = if same { (m1, r1) } else { (ma, ra) };
            let s = dot2_same(row, ma, ra, mb, rb);
            if same {
                result = s;
                break;
            }
            if pass == 0 {
                result.0 = s.0;
            } else {
                result.1 = s.1;
            }
            pass += 1;
        }
        (
            warp::reduce_sum_f32(result.0),
            warp::reduce_sum_f32(result.1),
        )
    }
}

/// `x` of a matrix's optional bias.
#[inline(always)]
unsafe fn biased(v: f32, bias: *const f32, r: usize) -> f32 {
    if bias.is_null() {
        v
    } else {
        v + unsafe { ldg_f32(bias.add(r)) }
    }
}

/// Arguments of [`gemv`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemvArgs {
    pub input: Input,
    pub matrix: Matrix,
    pub bias: *const f32,
    /// f32, one per matrix row.
    pub out: *mut f32,
    /// Whether to add to `out` instead of overwriting it.
    pub add: u32,
}

/// `out = W norm(x) + b`, or `out += …`.
#[kernel(launch_bounds(256, 2))]
pub unsafe fn gemv(a: GemvArgs) {
    unsafe {
        let row = Row::fill(&a.input);
        let rows = a.matrix.rows as usize;
        let lane = thread::lane_id();
        let mut task = block_idx_x() as usize * WARPS + thread_idx_x() as usize / 32;
        while 2 * task < rows {
            let r0 = 2 * task;
            let r1 = if r0 + 1 < rows { r0 + 1 } else { r0 };
            let (v0, v1) = dot2_same(&row, &a.matrix, r0, &a.matrix, r1);
            let (v0, v1) = (warp::reduce_sum_f32(v0), warp::reduce_sum_f32(v1));
            if lane < 2 && (lane == 0 || r1 > r0) {
                let (r, v) = if lane == 0 { (r0, v0) } else { (r1, v1) };
                let out = a.out.add(r);
                let v = biased(v, a.bias, r);
                out.write(if a.add != 0 { out.read() + v } else { v });
            }
            task += grid_dim_x() as usize * WARPS;
        }
    }
}

/// Arguments of [`gemv_gate_up`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GateUpArgs {
    pub input: Input,
    pub gate: Matrix,
    pub up: Matrix,
    pub gate_bias: *const f32,
    pub up_bias: *const f32,
    /// f32, one per gate row.
    pub out: *mut f32,
}

/// `out = silu(Wg norm(x)) * (Wu norm(x))`.
#[kernel(launch_bounds(256, 2))]
pub unsafe fn gemv_gate_up(a: GateUpArgs) {
    unsafe {
        let row = Row::fill(&a.input);
        let mut r = block_idx_x() as usize * WARPS + thread_idx_x() as usize / 32;
        while r < a.gate.rows as usize {
            let (gate, up) = dot2(&row, &a.gate, r, &a.up, r);
            if thread::lane_id() == 0 {
                let gate = biased(gate, a.gate_bias, r);
                let up = biased(up, a.up_bias, r);
                a.out.add(r).write(crate::rows::silu(gate) * up);
            }
            r += grid_dim_x() as usize * WARPS;
        }
    }
}

/// Arguments of [`gemv_qkv`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct QkvArgs {
    pub input: Input,
    /// Q, K, V.
    pub matrices: [Matrix; 3],
    pub biases: [*const f32; 3],
    pub rotation: crate::rows::Rotation,
    pub cache: crate::rows::CacheLayer,
    pub step: Step,
    pub heads: u32,
    /// f32 `[heads][head_dim]`.
    pub q: *mut f32,
}

/// `q = rope(Wq norm(x) + bq)`; keys, rotated, and values go to the f16 cache. One row.
#[kernel(launch_bounds(256, 2))]
pub unsafe fn gemv_qkv(a: QkvArgs) {
    unsafe {
        let row = Row::fill(&a.input);
        let head_dim = a.cache.head_dim as usize;
        let pairs = head_dim / 2;
        let (q_heads, kv_heads) = (a.heads as usize, a.cache.kv_heads as usize);
        let tasks = (q_heads + 2 * kv_heads) * pairs;
        let position = a.step.position(0);
        let mut task = block_idx_x() as usize * WARPS + thread_idx_x() as usize / 32;
        while task < tasks {
            let (head, pair) = (task / pairs, task % pairs);
            let (which, head) = if head < q_heads {
                (0, head)
            } else if head < q_heads + kv_heads {
                (1, head - q_heads)
            } else {
                (2, head - q_heads - kv_heads)
            };
            let (e0, e1, rotates) = a.rotation.pair(pair, which < 2);
            let (r0, r1) = (head * head_dim + e0, head * head_dim + e1);
            // By value: a reference chosen at run time would put the arguments into local memory.
            let (matrix, bias) = match which {
                0 => (a.matrices[0], a.biases[0]),
                1 => (a.matrices[1], a.biases[1]),
                _ => (a.matrices[2], a.biases[2]),
            };
            let (v0, v1) = dot2_same(&row, &matrix, r0, &matrix, r1);
            let (v0, v1) = (warp::reduce_sum_f32(v0), warp::reduce_sum_f32(v1));
            if thread::lane_id() == 0 {
                let mut v = (biased(v0, bias, r0), biased(v1, bias, r1));
                if rotates {
                    v = rotate(&a.rotation, position, pair, v);
                }
                if which == 0 {
                    a.q.add(r0).write(v.0);
                    a.q.add(r1).write(v.1);
                } else {
                    write_cache::<u16>(&a.cache, &a.step, 0, which == 2, head, e0, v.0);
                    write_cache::<u16>(&a.cache, &a.step, 0, which == 2, head, e1, v.1);
                }
            }
            task += grid_dim_x() as usize * WARPS;
        }
    }
}
