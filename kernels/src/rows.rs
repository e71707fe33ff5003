//! Work on single rows: embedding, norms, casts, the gated activation, rotation and cache writes.

use crate::types::{GROUP, Matrix, to_f16, unpack};
use cuda_std::memory::{ld_v4_u32, ldg_f32, ldg_u32, ldg_v4_u32, st_global_v2, st_global_v4};
use cuda_std::thread::{
    block_dim_x, block_idx_x, block_idx_y, index_1d, sync_threads, thread_idx_x,
};
use cuda_std::{float, kernel, shared, warp};

/// Tokens per block of the KV cache.
pub const BLOCK_TOKENS: usize = 32;

/// What a step's rows are; the host writes the arrays before each step, the pointers stay.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Step {
    pub tokens: *const u32,
    pub positions: *const u32,
    /// Each row's sequence.
    pub sequences: *const u32,
    /// Block tables, `[sequence][table_stride]`.
    pub tables: *const u32,
    pub table_stride: u32,
    pub rows: u32,
    /// Rows whose logits are wanted.
    pub outputs: *const u32,
}

impl Step {
    #[inline(always)]
    pub unsafe fn position(&self, row: usize) -> usize {
        unsafe { ldg_u32(self.positions.add(row)) as usize }
    }

    /// The block table of the row's sequence.
    #[inline(always)]
    pub unsafe fn table(&self, row: usize) -> *const u32 {
        unsafe {
            let sequence = ldg_u32(self.sequences.add(row)) as usize;
            self.tables.add(sequence * self.table_stride as usize)
        }
    }

    /// The cache block that holds token `token` of the row's sequence.
    #[inline(always)]
    pub unsafe fn block(&self, row: usize, token: usize) -> usize {
        unsafe { ldg_u32(self.table(row).add(token / BLOCK_TOKENS)) as usize }
    }
}

/// One layer of the KV cache: `[block][kv head][token in block][element]`, keys and values alike.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CacheLayer {
    pub keys: *mut u8,
    pub values: *mut u8,
    pub kv_heads: u32,
    pub head_dim: u32,
}

/// An element of the cache: f16 bits, or f32.
pub trait CacheElement: Copy {
    fn from_f32(v: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl CacheElement for u16 {
    #[inline(always)]
    fn from_f32(v: f32) -> u16 {
        to_f16(v)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        cuda_std::half::F16::from_bits(self).to_f32()
    }
}

impl CacheElement for f32 {
    #[inline(always)]
    fn from_f32(v: f32) -> f32 {
        v
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

/// Which elements rotate by how much.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Rotation {
    /// `(cos, sin)`, `[position][dims / 2][2]`.
    pub table: *const f32,
    pub dims: u32,
    /// 1 where `(i, i + dims / 2)` are a pair, 0 for `(2i, 2i + 1)`.
    pub halves: u32,
}

impl Rotation {
    /// The two elements of a head's pair `pair`, and whether they rotate.
    #[inline(always)]
    pub fn pair(&self, pair: usize, rotates: bool) -> (usize, usize, bool) {
        let half = self.dims as usize / 2;
        if rotates && self.halves != 0 && pair < half {
            (pair, pair + half, true)
        } else {
            (2 * pair, 2 * pair + 1, rotates && pair < half)
        }
    }
}

/// Cosine and sine of a pair's angle at `position`.
#[inline(always)]
pub unsafe fn rotation_at(r: &Rotation, position: usize, pair: usize) -> (f32, f32) {
    unsafe {
        let at = r.table.add((position * (r.dims as usize / 2) + pair) * 2);
        (ldg_f32(at), ldg_f32(at.add(1)))
    }
}

/// A pair turned by its angle at `position`.
#[inline(always)]
pub unsafe fn rotate(r: &Rotation, position: usize, pair: usize, v: (f32, f32)) -> (f32, f32) {
    let (cos, sin) = unsafe { rotation_at(r, position, pair) };
    (v.0 * cos - v.1 * sin, v.0 * sin + v.1 * cos)
}

/// Writes one element of row `row`'s key or value.
#[inline(always)]
pub unsafe fn write_cache<E: CacheElement>(
    cache: &CacheLayer,
    step: &Step,
    row: usize,
    value: bool,
    head: usize,
    element: usize,
    v: f32,
) {
    unsafe {
        let position = step.position(row);
        let block = step.block(row, position);
        let at = (block * cache.kv_heads as usize + head) * BLOCK_TOKENS + position % BLOCK_TOKENS;
        let base = if value { cache.values } else { cache.keys };
        base.cast::<E>()
            .add(at * cache.head_dim as usize + element)
            .write(E::from_f32(v));
    }
}

/// `x / (1 + exp(-x))`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + float::exp(-x))
}

/// Arguments of [`embed`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct EmbedArgs {
    pub table: Matrix,
    pub step: Step,
    pub scale: f32,
    pub len: u32,
    /// f32 `[rows][len]`.
    pub out: *mut f32,
}

/// `out[row] = table[tokens[row]] * scale`; block `y` is a row, a thread a group.
#[kernel]
pub unsafe fn embed(a: EmbedArgs) {
    unsafe {
        let row = block_idx_y() as usize;
        let group = index_1d() as usize;
        if group >= a.table.groups() {
            return;
        }
        let token = ldg_u32(a.step.tokens.add(row)) as usize;
        let v = unpack(&a.table, token, group);
        let len = a.len as usize;
        for i in 0..GROUP {
            let e = group * GROUP + i;
            if e < len {
                a.out.add(row * len + e).write(v[i] * a.scale);
            }
        }
    }
}

/// Arguments of [`rms_norm`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RmsNormArgs {
    /// f32 `[..][len]`.
    pub x: *const f32,
    /// Rows of `x` to read; null for all in order.
    pub rows: *const u32,
    pub weight: *const f32,
    pub eps: f32,
    pub len: u32,
    /// f32 `[rows][len]`, or f16 `[rows][stride]` with zeros past `len`.
    pub out: *mut u8,
    pub stride: u32,
    pub f16: u32,
}

/// `x / sqrt(mean(x²) + eps) * weight`, a block per row of 256 threads (arXiv:1910.07467).
#[kernel(launch_bounds(256))]
pub unsafe fn rms_norm(a: RmsNormArgs) {
    let out_row = block_idx_x() as usize;
    let t = thread_idx_x() as usize;
    let threads = block_dim_x() as usize;
    let len = a.len as usize;
    unsafe {
        let row = if a.rows.is_null() {
            out_row
        } else {
            ldg_u32(a.rows.add(out_row)) as usize
        };
        let x = a.x.add(row * len);
        // Four values at a time where rows are aligned for it.
        let wide = len % 4 == 0 && a.stride % 4 == 0;
        let (first, turn) = if wide {
            (t * 4, threads * 4)
        } else {
            (t, threads)
        };
        let mut sum = 0.0;
        let mut i = first;
        while i < len {
            if wide {
                let v = ld_v4_u32(x.add(i)).map(f32::from_bits);
                sum += (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]);
            } else {
                let v = x.add(i).read();
                sum += v * v;
            }
            i += turn;
        }
        let partial = shared::at::<f32>(0);
        let sum = warp::reduce_sum_f32(sum);
        if t % 32 == 0 {
            partial.add(t as u32 / 32).store(sum);
        }
        sync_threads();
        let lane = t % 32;
        let sum = if lane < threads / 32 {
            partial.add(lane as u32).load()
        } else {
            0.0
        };
        let scale = 1.0 / float::sqrt(warp::reduce_sum_f32(sum) / len as f32 + a.eps);
        let mut i = first;
        while i < a.stride as usize {
            let at = out_row * a.stride as usize + i;
            if wide {
                let mut v = [0.0; 4];
                if i < len {
                    let x = ld_v4_u32(x.add(i)).map(f32::from_bits);
                    let w = ldg_v4_u32(a.weight.add(i)).map(f32::from_bits);
                    for e in 0..4 {
                        v[e] = x[e] * scale * w[e];
                    }
                }
                if a.f16 != 0 {
                    let h = [to_f16(v[0]), to_f16(v[1]), to_f16(v[2]), to_f16(v[3])].map(u32::from);
                    let pairs = [h[0] | (h[1] << 16), h[2] | (h[3] << 16)];
                    st_global_v2(a.out.cast::<u16>().add(at), pairs);
                } else {
                    st_global_v4(a.out.cast::<f32>().add(at), v.map(f32::to_bits));
                }
            } else {
                let v = if i < len {
                    x.add(i).read() * scale * ldg_f32(a.weight.add(i))
                } else {
                    0.0
                };
                put(a.out, a.f16 != 0, at, v);
            }
            i += turn;
        }
    }
}

#[inline(always)]
unsafe fn put(out: *mut u8, f16: bool, i: usize, v: f32) {
    unsafe {
        if f16 {
            out.cast::<u16>().add(i).write(to_f16(v));
        } else {
            out.cast::<f32>().add(i).write(v);
        }
    }
}

/// Arguments of [`cast_f16`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CastArgs {
    /// f32 `[rows][len]`.
    pub x: *const f32,
    /// f16 `[rows][stride]`, zeros past `len`.
    pub out: *mut u16,
    pub len: u32,
    pub stride: u32,
}

/// f32 rows to padded f16 rows; block `y` is a row.
#[kernel]
pub unsafe fn cast_f16(a: CastArgs) {
    let (row, i) = (block_idx_y() as usize, index_1d() as usize);
    if i < a.stride as usize {
        unsafe {
            let v = if i < a.len as usize {
                a.x.add(row * a.len as usize + i).read()
            } else {
                0.0
            };
            a.out.add(row * a.stride as usize + i).write(to_f16(v));
        }
    }
}

/// Arguments of [`silu_mul`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SiluMulArgs {
    /// f32 `[rows][len]`.
    pub gate: *const f32,
    pub up: *const f32,
    /// f32 `[rows][stride]`, or f16, zeros past `len`.
    pub out: *mut u8,
    pub len: u32,
    pub stride: u32,
    pub f16: u32,
}

/// `out = silu(gate) * up`; an f32 `out` may be either input. Block `y` is a row.
#[kernel]
pub unsafe fn silu_mul(a: SiluMulArgs) {
    let (row, i) = (block_idx_y() as usize, index_1d() as usize);
    if i < a.stride as usize {
        unsafe {
            let at = row * a.len as usize + i;
            let v = if i < a.len as usize {
                silu(a.gate.add(at).read()) * a.up.add(at).read()
            } else {
                0.0
            };
            put(a.out, a.f16 != 0, row * a.stride as usize + i, v);
        }
    }
}

/// Arguments of [`rope_cache`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RopeCacheArgs {
    /// f32, `strides[0]` from row to row.
    pub q: *const f32,
    /// f32, `strides[1]` from row to row.
    pub k: *const f32,
    pub v: *const f32,
    pub strides: [u32; 2],
    /// f32 `[rows][heads * head_dim]`, may be `q` itself; or f16.
    pub out: *mut u8,
    pub f16: u32,
    pub rotation: Rotation,
    pub cache: CacheLayer,
    pub step: Step,
    pub heads: u32,
    /// Whether the cache is f32.
    pub f32: u32,
}

/// Rotates queries; writes rotated keys, and values, to the cache. Block `y` is a row, a
/// thread a pair of elements.
#[kernel]
pub unsafe fn rope_cache(a: RopeCacheArgs) {
    let row = block_idx_y() as usize;
    let head_dim = a.cache.head_dim as usize;
    let pairs = head_dim / 2;
    let (q_heads, kv_heads) = (a.heads as usize, a.cache.kv_heads as usize);
    let task = index_1d() as usize;
    if task >= (q_heads + 2 * kv_heads) * pairs {
        return;
    }
    let (head, pair) = (task / pairs, task % pairs);
    unsafe {
        let position = a.step.position(row);
        let (which, head, source) = if head < q_heads {
            (0, head, a.q.add(row * a.strides[0] as usize))
        } else if head < q_heads + kv_heads {
            (1, head - q_heads, a.k.add(row * a.strides[1] as usize))
        } else {
            (
                2,
                head - q_heads - kv_heads,
                a.v.add(row * a.strides[1] as usize),
            )
        };
        let (e0, e1, rotates) = a.rotation.pair(pair, which < 2);
        let at = source.add(head * head_dim);
        let mut v = (at.add(e0).read(), at.add(e1).read());
        if rotates {
            v = rotate(&a.rotation, position, pair, v);
        }
        if which == 0 {
            let at = (row * q_heads + head) * head_dim;
            put(a.out, a.f16 != 0, at + e0, v.0);
            put(a.out, a.f16 != 0, at + e1, v.1);
        } else if a.f32 != 0 {
            write_cache::<f32>(&a.cache, &a.step, row, which == 2, head, e0, v.0);
            write_cache::<f32>(&a.cache, &a.step, row, which == 2, head, e1, v.1);
        } else {
            write_cache::<u16>(&a.cache, &a.step, row, which == 2, head, e0, v.0);
            write_cache::<u16>(&a.cache, &a.step, row, which == 2, head, e1, v.1);
        }
    }
}
