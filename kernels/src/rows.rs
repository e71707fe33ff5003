//! Work on single rows: embedding, norms, casts, the gated activation, rotation and cache writes.

use crate::types::{GROUP, Matrix, unpack};
use cuda_std::half::to_f16;
use cuda_std::memory::{ld_v4_u32, ldg_f32, ldg_u32, ldg_v4_u32, st_global_v2, st_global_v4};
use cuda_std::thread::{
    block_dim_x, block_idx_x, block_idx_y, griddepcontrol_launch_dependents, griddepcontrol_wait,
    index_1d, sync_threads, thread_idx_x,
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
    /// Tokens that each row's sequence is to come to.
    pub horizons: *const u32,
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

/// What [`norm`] takes out of a row, its argument `kind`.
pub mod norms {
    /// Nothing: rows are only scaled, cast or added.
    pub const NONE: u32 = 0;
    /// `x / sqrt(mean(x²) + eps)` (arXiv:1910.07467).
    pub const RMS: u32 = 1;
    /// `(x - mean(x)) / sqrt(var(x) + eps)` (arXiv:1607.06450).
    pub const LAYER: u32 = 2;
}

/// Arguments of [`norm`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NormArgs {
    /// f32, `x_stride` from row to row.
    pub x: *const f32,
    pub x_stride: u32,
    /// Rows of `x` to read; null for all in order.
    pub rows: *const u32,
    /// Of [`norms`].
    pub kind: u32,
    /// f32; `weight_stride` from part to part of a row. Null for none, so the bias.
    pub weight: *const f32,
    pub bias: *const f32,
    pub weight_stride: u32,
    pub eps: f32,
    /// Parts of a row, each normed by itself; 1 for whole rows.
    pub parts: u32,
    /// Elements of a part.
    pub len: u32,
    /// f32 `[rows][stride]`, which may be `x` itself; or f16, with zeros past `len` where that is a row.
    pub out: *mut u8,
    pub stride: u32,
    pub f16: u32,
    /// Multiplies the result.
    pub scale: f32,
    /// Whether to add to what `out`, f32, holds.
    pub add: u32,
}

/// `out = scale * (norm(x) * weight + bias)`, or `out += …`; a block of 256 threads per part of a row.
#[kernel(launch_bounds(256))]
pub unsafe fn norm(a: NormArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    let parts = (a.parts as usize).max(1);
    let (out_row, part) = (
        block_idx_x() as usize / parts,
        block_idx_x() as usize % parts,
    );
    let t = thread_idx_x() as usize;
    let threads = block_dim_x() as usize;
    let len = a.len as usize;
    let end = if a.f16 != 0 && parts == 1 {
        a.stride as usize
    } else {
        len
    };
    unsafe {
        let row = if a.rows.is_null() {
            out_row
        } else {
            ldg_u32(a.rows.add(out_row)) as usize
        };
        let x = a.x.add(row * a.x_stride as usize + part * len);
        let weight = a.weight.wrapping_add(part * a.weight_stride as usize);
        let bias = a.bias.wrapping_add(part * a.weight_stride as usize);
        let first_out = out_row * a.stride as usize + part * len;
        // Four values at a time where rows are aligned for it.
        let wide = len % 4 == 0
            && a.stride % 4 == 0
            && a.x_stride % 4 == 0
            && a.add == 0
            && !a.weight.is_null()
            && a.bias.is_null();
        let (first, turn) = if wide {
            (t * 4, threads * 4)
        } else {
            (t, threads)
        };
        let mut mean = 0.0;
        if a.kind == norms::LAYER {
            let mut sum = 0.0;
            let mut i = t;
            while i < len {
                sum += x.add(i).read();
                i += threads;
            }
            mean = block_sum(sum) / len as f32;
        }
        let mut scale = a.scale;
        if a.kind != norms::NONE {
            let mut sum = 0.0;
            let mut i = first;
            while i < len {
                if wide {
                    let v = ld_v4_u32(x.add(i)).map(|v| f32::from_bits(v) - mean);
                    sum += (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]);
                } else {
                    let v = x.add(i).read() - mean;
                    sum += v * v;
                }
                i += turn;
            }
            scale = a.scale / float::sqrt(block_sum(sum) / len as f32 + a.eps);
        }
        let mut i = first;
        while i < end {
            let at = first_out + i;
            if wide {
                let mut v = [0.0; 4];
                if i < len {
                    let x = ld_v4_u32(x.add(i)).map(f32::from_bits);
                    let w = ldg_v4_u32(weight.add(i)).map(f32::from_bits);
                    for e in 0..4 {
                        v[e] = (x[e] - mean) * scale * w[e];
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
                let mut v = 0.0;
                if i < len {
                    v = (x.add(i).read() - mean) * scale;
                    if !a.weight.is_null() {
                        v *= ldg_f32(weight.add(i));
                    }
                    if !a.bias.is_null() {
                        v += a.scale * ldg_f32(bias.add(i));
                    }
                    if a.add != 0 {
                        v += a.out.cast::<f32>().add(at).read();
                    }
                }
                put(a.out, a.f16 != 0, at, v);
            }
            i += turn;
        }
    }
}

/// The sum of a value over the block's threads; every thread must call it. Takes 32 words of shared
/// memory.
#[inline(always)]
unsafe fn block_sum(v: f32) -> f32 {
    let t = thread_idx_x() as usize;
    let warps = block_dim_x() as usize / 32;
    let partial = shared::at::<f32>(0);
    let sum = warp::reduce_sum_f32(v);
    unsafe {
        // What an earlier sum is read from must not change before it is.
        sync_threads();
        if t % 32 == 0 {
            partial.add(t as u32 / 32).store(sum);
        }
        sync_threads();
        let lane = t % 32;
        let sum = if lane < warps {
            partial.add(lane as u32).load()
        } else {
            0.0
        };
        warp::reduce_sum_f32(sum)
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
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
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

/// Activations, by number, as arguments carry them; what they are is said at the host's `Activation`.
pub mod activations {
    pub const SILU: u32 = 0;
    pub const GELU: u32 = 1;
    pub const CLAMPED_SWISH: u32 = 2;
}

/// An activation of a gate and what it gates; without a gate, `gate` is what there is and `up` 1.
#[inline(always)]
pub fn activate(kind: u32, gate: f32, up: f32) -> f32 {
    /// `sqrt(2 / pi)`.
    const GELU: f32 = 0.797_884_6;
    // All are `x * sigmoid(z)`; `tanh(u) = 2 sigmoid(2u) - 1`.
    if kind == activations::GELU {
        let z = 2.0 * GELU * (gate + 0.044_715 * gate * gate * gate);
        return gate / (1.0 + float::exp(-z)) * up;
    }
    if kind == activations::CLAMPED_SWISH {
        let gate = gate.min(7.0);
        let up = up.clamp(-7.0, 7.0) + 1.0;
        return gate / (1.0 + float::exp(-1.702 * gate)) * up;
    }
    silu(gate) * up
}

/// Arguments of [`activate_rows`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ActivateArgs {
    /// f32 `[rows][len]`.
    pub gate: *const f32,
    /// The same, or null where there is no gate.
    pub up: *const f32,
    /// f32 `[rows][stride]`, or f16, zeros past `len`.
    pub out: *mut u8,
    pub len: u32,
    pub stride: u32,
    pub f16: u32,
    /// Of [`activations`].
    pub activation: u32,
}

/// `out = activation(gate, up)`; an f32 `out` may be either input. Block `y` is a row.
#[kernel]
pub unsafe fn activate_rows(a: ActivateArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    let (row, i) = (block_idx_y() as usize, index_1d() as usize);
    if i < a.stride as usize {
        unsafe {
            let at = row * a.len as usize + i;
            let v = if i < a.len as usize {
                let up = if a.up.is_null() {
                    1.0
                } else {
                    a.up.add(at).read()
                };
                activate(a.activation, a.gate.add(at).read(), up)
            } else {
                0.0
            };
            put(a.out, a.f16 != 0, row * a.stride as usize + i, v);
        }
    }
}

/// `cap * tanh(x / cap)`.
#[inline(always)]
pub fn soft_cap(x: f32, cap: f32) -> f32 {
    cap * float::tanh(x / cap)
}

/// Arguments of [`finish_logits`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FinishArgs {
    pub logits: *mut f32,
    pub len: u32,
    pub scale: f32,
    /// 0 for none.
    pub cap: f32,
}

/// `l = cap * tanh(scale * l / cap)`, or without a cap `scale * l`.
#[kernel]
pub unsafe fn finish_logits(a: FinishArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    let i = index_1d() as usize;
    if i < a.len as usize {
        unsafe {
            let at = a.logits.add(i);
            let v = at.read() * a.scale;
            at.write(if a.cap == 0.0 { v } else { soft_cap(v, a.cap) });
        }
    }
}

/// Arguments of [`rope_cache`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RopeCacheArgs {
    /// f32, `strides[0]` from row to row.
    pub q: *const f32,
    /// f32, `strides[1]` from row to row; an 8-bit cache's keys are turned where they lie.
    pub k: *mut f32,
    pub v: *const f32,
    pub strides: [u32; 2],
    /// f32 `[rows][heads * head_dim]`, may be `q` itself; or f16.
    pub out: *mut u8,
    pub f16: u32,
    /// Its table is null where nothing rotates.
    pub rotation: Rotation,
    /// The table of sequences that are to come to more than `long_above` tokens, or null.
    pub long_table: *const f32,
    pub long_above: u32,
    pub cache: CacheLayer,
    pub step: Step,
    pub heads: u32,
    /// Of [`cache_types`].
    pub cache_type: u32,
}

/// What a cache is made of, as arguments carry it.
pub mod cache_types {
    pub const F16: u32 = 0;
    pub const F32: u32 = 1;
    pub const Q8_0: u32 = 2;
}

/// Rotates queries; writes rotated keys, and values, to the cache, unless that is of 8 bits, which
/// [`store_q8`] writes. Block `y` is a row, a thread a pair of elements.
#[kernel]
pub unsafe fn rope_cache(a: RopeCacheArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
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
            let k = a.k.cast_const();
            (1, head - q_heads, k.add(row * a.strides[1] as usize))
        } else {
            (
                2,
                head - q_heads - kv_heads,
                a.v.add(row * a.strides[1] as usize),
            )
        };
        let mut rotation = a.rotation;
        if !a.long_table.is_null() && ldg_u32(a.step.horizons.add(row)) > a.long_above {
            rotation.table = a.long_table;
        }
        let turned = which < 2 && !rotation.table.is_null();
        let (e0, e1, rotates) = rotation.pair(pair, turned);
        let at = source.add(head * head_dim);
        let mut v = (at.add(e0).read(), at.add(e1).read());
        if rotates {
            v = rotate(&rotation, position, pair, v);
        }
        if which == 0 {
            let at = (row * q_heads + head) * head_dim;
            put(a.out, a.f16 != 0, at + e0, v.0);
            put(a.out, a.f16 != 0, at + e1, v.1);
        } else if a.cache_type == cache_types::Q8_0 {
            if which == 1 {
                let at = a.k.add(row * a.strides[1] as usize + head * head_dim);
                at.add(e0).write(v.0);
                at.add(e1).write(v.1);
            }
        } else if a.cache_type == cache_types::F32 {
            write_cache::<f32>(&a.cache, &a.step, row, which == 2, head, e0, v.0);
            write_cache::<f32>(&a.cache, &a.step, row, which == 2, head, e1, v.1);
        } else {
            write_cache::<u16>(&a.cache, &a.step, row, which == 2, head, e0, v.0);
            write_cache::<u16>(&a.cache, &a.step, row, which == 2, head, e1, v.1);
        }
    }
}

/// Bytes of one head's key, or value, of a token in a cache of 8 bits: `head_dim` integers, then an f16
/// scale for each 32 of them, padded so that eight bytes can be loaded at once.
#[inline(always)]
pub const fn q8_row_bytes(head_dim: usize) -> usize {
    (head_dim + 2 * head_dim.div_ceil(32)).next_multiple_of(8)
}

/// Writes keys and values, as [`rope_cache`] left them, to a cache of 8 bits: a warp for each 32 elements
/// of a head. Block `y` is a row.
#[kernel]
pub unsafe fn store_q8(a: RopeCacheArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    let row = block_idx_y() as usize;
    let head_dim = a.cache.head_dim as usize;
    let kv_heads = a.cache.kv_heads as usize;
    let units = head_dim.div_ceil(32).max(1);
    let (warp_index, lane) = (index_1d() as usize / 32, index_1d() as usize % 32);
    let (head, unit) = (warp_index / units, warp_index % units);
    if head >= 2 * kv_heads {
        return;
    }
    let value = head >= kv_heads;
    let head = head % kv_heads.max(1);
    let element = unit * 32 + lane;
    unsafe {
        let from = if value { a.v } else { a.k.cast_const() };
        let from = from.add(row * a.strides[1] as usize + head * head_dim);
        let x = if element < head_dim {
            from.add(element).read()
        } else {
            0.0
        };
        let most = warp::reduce_max_f32(x.max(-x));
        let d = most / 127.0;
        let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
        let position = a.step.position(row);
        let block = a.step.block(row, position);
        let at = (block * kv_heads + head) * BLOCK_TOKENS + position % BLOCK_TOKENS;
        let base = if value { a.cache.values } else { a.cache.keys };
        let base = base.add(at * q8_row_bytes(head_dim));
        if element < head_dim {
            // Half away from zero.
            let q = x * inverse;
            let q = (if q < 0.0 { q - 0.5 } else { q + 0.5 }) as i32;
            base.add(element).write(q as i8 as u8);
        }
        if lane == 0 {
            base.add(head_dim + 2 * unit).cast::<u16>().write(to_f16(d));
        }
    }
}

/// Arguments of [`unpack_q8`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UnpackArgs {
    /// Of 8 bits.
    pub cache: CacheLayer,
    /// Of f16, blocks at the same places.
    pub out: CacheLayer,
    /// Blocks to be unpacked.
    pub blocks: *const u32,
}

/// Writes blocks of a cache of 8 bits as f16. Block `x` is one of them, `y` one of its heads; a thread a
/// token.
#[kernel]
pub unsafe fn unpack_q8(a: UnpackArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    let head_dim = a.cache.head_dim as usize;
    let token = thread_idx_x() as usize;
    if token >= BLOCK_TOKENS {
        return;
    }
    unsafe {
        let block = ldg_u32(a.blocks.add(block_idx_x() as usize)) as usize;
        let head = block * a.cache.kv_heads as usize + block_idx_y() as usize;
        let row = head * BLOCK_TOKENS + token;
        for (from, to) in [(a.cache.keys, a.out.keys), (a.cache.values, a.out.values)] {
            let from = from.add(row * q8_row_bytes(head_dim));
            let to = to.cast::<u16>().add(row * head_dim);
            let mut e = 0;
            while e < head_dim {
                let scale = from.add(head_dim + 2 * (e / 32)).cast::<u16>().read();
                let d = cuda_std::half::F16::from_bits(scale).to_f32();
                to.add(e)
                    .write(to_f16(d * f32::from(from.add(e).read() as i8)));
                e += 1;
            }
        }
    }
}
