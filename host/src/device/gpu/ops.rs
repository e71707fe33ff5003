//! The operations of [`Device`](crate::device::Device) as launches.
//!
//! Four ways of one product: an operation of the kernel `decode` for a single row, with norm and epilogue
//! fused; `gemm` on tensor cores for more; `dense`, the same with weights unpacked beforehand, for
//! many; `linear_exact` in f32 with `--exact`. All but the first are launches of their own, with norm and
//! epilogue as kernels beside them.
//!
//! In a step of several rows without `--exact`, what goes from [`Gpu::op_attend`] or
//! [`Gpu::op_norm_gate_up`] to [`Gpu::op_linear_add`] lies in its buffer as f16, rows padded with zeros
//! to whole groups: the form that products take.

use super::decode::Role;
use super::{Address, Buffer, Cache, Driver, Gpu, Scratch, Weight};
use crate::device::{
    Activation, Attention, CachePart, CachePlace, CacheType, GateUp, Head, HeadNorm, Heads, Linear,
    Norm, NormKind, Qkv, Residual, RopeLayout, SampleRow,
};
use crate::error::{Error, Result};
use crate::sampling::{MIN_TEMPERATURE, fraction};
use kernels::attention::{self, AttendArgs, Variant};
use kernels::decode::{self, Input, NO_OP, Op, PLAIN, kind};
use kernels::dense::{self, DenseArgs, DequantiseArgs, Part};
use kernels::exact::{self, LinearArgs};
use kernels::flash::{self, FlashArgs};
use kernels::gemm::{self, GemmArgs};
use kernels::rows::{
    ActivateArgs, CacheLayer, CastArgs, EmbedArgs, FinishArgs, NormArgs, RopeCacheArgs, Rotation,
    activations, cache_types, norms,
};
use kernels::sample::{self, ArgmaxArgs, DrawArgs};
use kernels::types::{GROUP, NO_MATRIX};
use std::ptr;

const ELEMENTWISE: u32 = 256;

/// Tokens that are worth a split of their own.
const MIN_SPLIT_TOKENS: usize = 64;
const MAX_SPLITS: usize = 64;

/// Over how many blocks each row and head's tokens are split, so that a few rows fill the card: a power of
/// two, so that a recorded step serves many lengths.
pub(super) fn attention_splits(multiprocessors: u32, tasks: usize, longest: usize) -> u32 {
    let warps = multiprocessors as usize * 16;
    let wanted = (warps / tasks.max(1)).clamp(1, MAX_SPLITS);
    let useful = longest.div_ceil(MIN_SPLIT_TOKENS);
    let splits = wanted.min(useful).next_power_of_two();
    splits.min(MAX_SPLITS) as u32
}

/// Rows of the longest sequence of a step from which on attention goes through tiles of rows.
const FLASH_ROWS: usize = 4;

/// Bytes of weights unpacked at a time: their product should take many turns of the whole card, the last
/// of which is rarely full.
pub(super) const SLICE_BYTES: usize = 128 << 20;

/// An output of `dense` products.
#[derive(Clone, Copy)]
struct Target {
    address: Address,
    element_bytes: usize,
    stride: usize,
    add: bool,
}

fn blocks(n: usize, per_block: u32) -> u32 {
    n.div_ceil(per_block as usize) as u32
}

/// A product's optional bias.
fn bias_ptr<D: Driver>(linear: Linear<'_, Gpu<D>>) -> *const f32 {
    linear.bias.map_or(ptr::null(), |b| b.ptr().cast_const())
}

/// Rows `first .. first + rows` of a matrix, to be unpacked from row `out_row` on.
fn part<D: Driver>(linear: &Linear<'_, Gpu<D>>, first: usize, rows: usize, out_row: usize) -> Part {
    Part {
        matrix: linear.weight.matrix,
        bias: bias_ptr(*linear),
        first: first as u32,
        rows: rows as u32,
        out_row: out_row as u32,
    }
}

/// Input rows of a product that is not fused.
#[derive(Clone, Copy)]
pub(super) enum Rows {
    F32(*const f32),
    F16(*const u16),
}

/// Rows of f32 to be normed; see [`NormArgs`].
#[derive(Clone, Copy)]
pub(super) struct NormRows {
    pub x: *const f32,
    pub x_stride: usize,
    pub gather: *const u32,
    pub rows: usize,
    /// Parts of a row normed by themselves.
    pub parts: usize,
    /// Elements of a part.
    pub len: usize,
    /// Elements of weight and bias.
    pub weights: usize,
    pub out: Address,
    pub stride: usize,
    pub f16: bool,
    pub scale: f32,
    pub add: bool,
}

impl NormRows {
    /// Whole rows of `len`, in order, each where it lies.
    pub fn whole(x: *const f32, rows: usize, len: usize) -> Self {
        NormRows {
            x,
            x_stride: len,
            gather: ptr::null(),
            rows,
            parts: 1,
            len,
            weights: len,
            out: x as Address,
            stride: len,
            f16: false,
            scale: 1.0,
            add: false,
        }
    }
}

/// The kernels' number of an activation.
pub(super) fn activation_number(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => activations::SILU,
        Activation::Gelu => activations::GELU,
        Activation::ClampedSwish => activations::CLAMPED_SWISH,
    }
}

/// Rotation as kernels take it; a null table where nothing rotates.
fn rotation<D: Driver>(op: &Qkv<'_, Gpu<D>>) -> Rotation {
    op.rope.as_ref().map_or(
        Rotation {
            table: ptr::null(),
            dims: 0,
            halves: 0,
        },
        |rope| Rotation {
            table: rope.table.ptr(),
            dims: rope.dims as u32,
            halves: u32::from(rope.layout == RopeLayout::Halves),
        },
    )
}

fn variant<D: Driver>(op: &Attention<'_, Gpu<D>>) -> Variant {
    Variant {
        window: op.window.map_or(0, |w| u32::try_from(w).unwrap_or(0)),
        soft_cap: op.soft_cap.unwrap_or(0.0),
        sinks: op.sinks.map_or(ptr::null(), |s| s.ptr().cast_const()),
    }
}

impl<D: Driver> Gpu<D> {
    pub(super) fn cache_layer(&self, cache: &Cache, place: CachePlace) -> CacheLayer {
        let offset = cache.shape.offset(place);
        CacheLayer {
            keys: (cache.keys + offset as u64) as *mut u8,
            values: (cache.values + offset as u64) as *mut u8,
            kv_heads: cache.shape.kv_heads as u32,
            head_dim: cache.shape.head_dim as u32,
        }
    }

    /// The input of an operation of `decode`: in a recorded step what an operation before has written in the place
    /// of `x`, attention's parts where they stand for it; `x` itself otherwise.
    fn input(
        &mut self,
        x: *const f32,
        norm: Option<&Norm<'_, Self>>,
        len: usize,
        float: bool,
    ) -> Result<Input> {
        let plain = Input {
            x,
            norm: norm.map_or(ptr::null(), |n| n.weight.ptr()),
            from: PLAIN,
            eps: norm.map_or(0.0, |n| n.eps),
            len: len as u32,
            inverse_len: 0.0,
            keep_f32: u32::from(float),
            splits: 0,
            head_dim: 0,
        };
        if !self.fused() {
            return Ok(plain);
        }
        let parts = self.parts_of(x);
        let role = parts.map_or(Role::Buffer(x as Address), |p| p.role);
        Ok(Input {
            from: self.number_of(role)?,
            x: self.numbered(role, 0)?,
            splits: parts.map_or(0, |_| self.decode_splits()),
            head_dim: parts.map_or(0, |p| p.head_dim),
            ..plain
        })
    }

    pub(super) fn op_embed(&mut self, table: &Weight, scale: f32, out: &Buffer) -> Result<()> {
        if self.fused() {
            let role = Role::Buffer(out.address);
            let op = Op {
                kind: kind::EMBED,
                input: Input {
                    len: table.cols as u32,
                    ..NO_OP.input
                },
                matrices: [table.matrix, NO_MATRIX, NO_MATRIX],
                scale,
                out: self.numbered(role, table.cols)?,
                ..NO_OP
            };
            self.push("embed", op, &[role]);
            return Ok(());
        }
        let args = EmbedArgs {
            table: table.matrix,
            step: self.step_args(CachePart::Whole),
            scale,
            len: table.cols as u32,
            out: out.ptr(),
        };
        let grid = (
            blocks(table.matrix.cols as usize / GROUP, 32),
            self.current.rows as u32,
        );
        self.driver.launch("embed", grid, 32, 0, &args)
    }

    /// Norms, or without a norm scales, casts or adds, rows of f32.
    pub(super) fn norm(&mut self, norm: Option<&Norm<'_, Self>>, r: NormRows) -> Result<()> {
        let kind = match norm.map(|n| n.kind) {
            None => norms::NONE,
            Some(NormKind::Rms) => norms::RMS,
            Some(NormKind::Layer) => norms::LAYER,
        };
        let args = NormArgs {
            x: r.x,
            x_stride: r.x_stride as u32,
            rows: r.gather,
            kind,
            weight: norm.map_or(ptr::null(), |n| n.weight.ptr().cast_const()),
            bias: norm.and_then(|n| n.bias).map_or(ptr::null(), |b| b.ptr()),
            weight_stride: if r.weights > r.len { r.len as u32 } else { 0 },
            eps: norm.map_or(0.0, |n| n.eps),
            parts: r.parts as u32,
            len: r.len as u32,
            out: r.out as *mut u8,
            stride: r.stride as u32,
            f16: u32::from(r.f16),
            scale: r.scale,
            add: u32::from(r.add),
        };
        let grid = ((r.rows * r.parts) as u32, 1);
        self.driver.launch("norm", grid, 256, 128, &args)
    }

    /// `rows` normed rows of `x`, in the form that products of several rows take.
    pub(super) fn norm_rows(
        &mut self,
        x: &Buffer,
        norm: Option<&Norm<'_, Self>>,
        len: usize,
        rows: usize,
        gather: *const u32,
        f16: bool,
    ) -> Result<Rows> {
        if norm.is_none() && !f16 && gather.is_null() {
            return Ok(Rows::F32(x.ptr()));
        }
        let stride = if f16 {
            len.next_multiple_of(GROUP)
        } else {
            len
        };
        let (which, bytes) = if f16 {
            (Scratch::Half, 2)
        } else {
            (Scratch::Normed, 4)
        };
        let out = self.scratch(which, rows * stride * bytes)?;
        self.norm(
            norm,
            NormRows {
                gather,
                out,
                stride,
                f16,
                ..NormRows::whole(x.ptr(), rows, len)
            },
        )?;
        Ok(if f16 {
            Rows::F16(out as *const u16)
        } else {
            Rows::F32(out as *const f32)
        })
    }

    /// Adds what a linear's adapters make of the rows `x` to its product `out`, `[rows][matrix rows]`.
    fn adapt(
        &mut self,
        linear: Linear<'_, Self>,
        x: Rows,
        rows: usize,
        out: *mut f32,
    ) -> Result<()> {
        for adapter in linear.adapters {
            let plain = |weight| Linear {
                weight,
                bias: None,
                adapters: &[],
            };
            let rank = adapter.a.matrix.rows as usize;
            let low = self.scratch(Scratch::Low, rows * rank * 4)?;
            self.product(plain(&adapter.a), x, rows, low as *mut f32, false)?;
            let low = NormRows {
                scale: adapter.scale,
                ..NormRows::whole(low as *const f32, rows, rank)
            };
            let scaled = match x {
                Rows::F32(_) => {
                    self.norm(None, low)?;
                    Rows::F32(low.x)
                }
                Rows::F16(_) => {
                    let stride = rank.next_multiple_of(GROUP);
                    let half = self.scratch(Scratch::LowHalf, rows * stride * 2)?;
                    let half = NormRows {
                        out: half,
                        stride,
                        f16: true,
                        ..low
                    };
                    self.norm(None, half)?;
                    Rows::F16(half.out as *const u16)
                }
            };
            self.product(plain(&adapter.b), scaled, rows, out, true)?;
        }
        Ok(())
    }

    /// A product with its adapters, `out = x Wᵀ + b`.
    pub(super) fn whole_product(
        &mut self,
        linear: Linear<'_, Self>,
        x: Rows,
        rows: usize,
        out: *mut f32,
    ) -> Result<()> {
        self.product(linear, x, rows, out, false)?;
        self.adapt(linear, x, rows, out)
    }

    /// `x += scale * norm(y)`.
    pub(super) fn add_residual(
        &mut self,
        residual: &Residual<'_, Self>,
        y: Address,
        len: usize,
        x: &Buffer,
    ) -> Result<()> {
        let rows = self.current.rows;
        let mut from = NormRows::whole(y as *const f32, rows, len);
        if let Some(norm) = &residual.norm {
            from.weights = norm.weight.len;
        }
        self.norm(
            residual.norm.as_ref(),
            NormRows {
                out: x.address,
                scale: residual.scale,
                add: true,
                ..from
            },
        )
    }

    /// Norms the heads of rows, where they lie.
    fn norm_heads(
        &mut self,
        op: &Option<HeadNorm<'_, Self>>,
        x: *mut f32,
        stride: usize,
        row_len: usize,
    ) -> Result<()> {
        let Some(op) = op else {
            return Ok(());
        };
        let rows = self.current.rows;
        self.norm(
            Some(&op.norm),
            NormRows {
                x_stride: stride,
                stride,
                parts: row_len / op.len,
                weights: op.norm.weight.len,
                ..NormRows::whole(x, rows, op.len)
            },
        )
    }

    /// Columns of a row of `len` values in f16, once it is known that a step's rows fit `buffer` so.
    fn half_stride(&self, len: usize, buffer: &Buffer) -> Result<usize> {
        let stride = len.next_multiple_of(GROUP);
        if self.current.rows * stride * 2 > buffer.len * 4 {
            return Err(Error::Request(format!(
                "rows of {len} values are too short for the GPU kernels"
            )));
        }
        Ok(stride)
    }

    /// Whether weights are unpacked beforehand for the products of this step.
    fn dense(&self) -> bool {
        !self.exact && self.current.rows >= D::DENSE_ROWS
    }

    /// Unpacks rows of up to three matrices, `rows` in all, and multiplies: `ways` is 1 for parts that
    /// follow each other, 2 for gate and up.
    fn dense_product(
        &mut self,
        parts: &[Part],
        ways: usize,
        x: *const u16,
        to: Target,
    ) -> Result<()> {
        let (rows, cols) = (self.current.rows, parts[0].matrix.cols as usize);
        let n: usize = parts.iter().map(|p| p.rows as usize).sum();
        let w = self.scratch(Scratch::Weights, n * cols * 2)?;
        let bias = self.scratch(Scratch::Biases, n * 4)?;
        let groups = |p: &Part| p.rows as usize * p.matrix.groups();
        let most = parts.iter().map(groups).max().unwrap_or(0);
        let args = DequantiseArgs {
            parts: std::array::from_fn(|i| parts[i.min(parts.len() - 1)]),
            ways: ways as u32,
            out: w as *mut u16,
            bias: bias as *mut f32,
        };
        let threads = dense::DEQUANTISE_THREADS;
        let grid = (blocks(most, threads), parts.len() as u32);
        self.driver
            .launch("dequantise", grid, threads, dense::DEQUANTISE_SHARED, &args)?;
        let args = DenseArgs {
            w: w as *const u16,
            bias: bias as *const f32,
            x,
            rows: rows as u32,
            cols: cols as u32,
            n: n as u32,
            out: to.address as *mut u8,
            stride: to.stride as u32,
            add: u32::from(to.add),
        };
        // Large tiles read shared memory less often, small ones share the work out better; where they
        // draw level was measured on an H100, in blocks for two multiprocessors.
        let fills = |bm: u32, bn: u32, many: u32| {
            2 * blocks(rows, bm) * blocks(n, bn) >= many * self.driver.multiprocessors()
        };
        let (kernel, bm, bn) = match (ways, fills(128, 128, 5), fills(64, 128, 3)) {
            (1, true, _) => ("dense_128x128", 128, 128),
            (1, _, true) => ("dense_64x128", 64, 128),
            (1, ..) => ("dense_64x64", 64, 64),
            (_, true, _) => ("dense_gate_up_128x128", 128, 128),
            _ => ("dense_gate_up_64x128", 64, 128),
        };
        let grid = (blocks(rows, bm), blocks(n, bn));
        let shared = dense::shared_bytes(bm as usize, bn as usize);
        self.driver
            .launch(kernel, grid, dense::THREADS, shared, &args)
    }

    /// [`Gpu::dense_product`] of one matrix, or of gate and up, slice by slice.
    fn dense_sliced(
        &mut self,
        linears: &[Linear<'_, Self>],
        x: *const u16,
        to: Target,
    ) -> Result<()> {
        let ways = linears.len();
        let matrix = linears[0].weight.matrix;
        let (n, row_bytes) = (matrix.rows as usize, ways * matrix.cols as usize * 2);
        // Slices of whole tiles, and of equal size.
        let slices = (n * row_bytes).div_ceil(SLICE_BYTES);
        let slice = n.div_ceil(slices).next_multiple_of(128);
        for first in (0..n).step_by(slice) {
            let mut parts = Vec::with_capacity(ways);
            for (way, linear) in linears.iter().enumerate() {
                parts.push(part(linear, first, slice.min(n - first), 8 * way));
            }
            let address = to.address + (first * to.element_bytes) as u64;
            self.dense_product(&parts, ways, x, Target { address, ..to })?;
        }
        Ok(())
    }

    /// A product that is not fused: `out = x Wᵀ + b`, or `out += …`.
    fn product(
        &mut self,
        linear: Linear<'_, Self>,
        x: Rows,
        rows: usize,
        out: *mut f32,
        add: bool,
    ) -> Result<()> {
        let matrix = linear.weight.matrix;
        let bias = bias_ptr(linear);
        let add = u32::from(add);
        let n = matrix.rows as usize;
        let columns = blocks(n, gemm::BN as u32);
        match x {
            Rows::F32(x) => {
                let len = linear.weight.cols as u32;
                let args = LinearArgs {
                    matrix,
                    bias,
                    x,
                    len,
                    rows: rows as u32,
                    out,
                    add,
                };
                let grid = (
                    blocks(n, exact::THREADS / 32),
                    blocks(rows, exact::ROWS as u32),
                );
                self.driver
                    .launch("linear_exact", grid, exact::THREADS, 0, &args)
            }
            // Not where a matrix has so many rows that one row of blocks fills the card anyway.
            Rows::F16(x)
                if rows == self.current.rows
                    && self.dense()
                    && (rows > 64 || columns < 4 * self.driver.multiprocessors()) =>
            {
                let to = Target {
                    address: out as Address,
                    element_bytes: 4,
                    stride: n,
                    add: add != 0,
                };
                self.dense_sliced(&[linear], x, to)
            }
            Rows::F16(x) => {
                let args = GemmArgs {
                    matrix,
                    bias,
                    x,
                    rows: rows as u32,
                    out,
                    add,
                };
                // The taller tile where it still gives every multiprocessor a block.
                let fills = columns * blocks(rows, 64) >= self.driver.multiprocessors();
                let (kernel, mt) = if rows > 32 && fills {
                    ("gemm_64", 2)
                } else {
                    ("gemm_32", 1)
                };
                let grid = (columns, blocks(rows, 32 * mt));
                let shared = gemm::shared_bytes(mt as usize);
                self.driver
                    .launch(kernel, grid, gemm::THREADS, shared, &args)
            }
        }
    }

    pub(super) fn op_norm_qkv(
        &mut self,
        x: &Buffer,
        op: &Qkv<'_, Self>,
        cache: &Cache,
        place: CachePlace,
        q: &Buffer,
    ) -> Result<()> {
        let h = op.heads;
        self.heads = h.heads;
        let len = op.q.weight.cols;
        let rotation = rotation(op);
        let cache_type = match cache.shape.ty {
            CacheType::F16 => cache_types::F16,
            CacheType::F32 => cache_types::F32,
            CacheType::Q8_0 => cache_types::Q8_0,
        };
        let cache = self.cache_layer(cache, place);
        let linears = [op.q, op.k, op.v];
        let step = self.step_args(place.part);
        let pairs = (h.heads + 2 * h.kv_heads) * h.head_dim / 2;
        if self.fused() {
            let float = linears.iter().any(|l| !l.weight.quantised);
            let role = Role::Buffer(q.address);
            let new = 2 * h.kv_heads * h.head_dim;
            let op = Op {
                kind: kind::QKV,
                input: self.input(x.ptr(), op.norm.as_ref(), len, float)?,
                matrices: linears.map(|l| l.weight.matrix),
                biases: linears.map(bias_ptr),
                rotation,
                cache,
                heads: h.heads as u32,
                fresh: self.numbered(Role::Fresh(new), new)?,
                out: self.numbered(role, h.heads * h.head_dim)?,
                ..NO_OP
            };
            self.push("qkv", op, &[role, Role::Fresh(new)]);
            return Ok(());
        }
        let rows = self.current.rows;
        let (q_len, kv_len) = (h.heads * h.head_dim, h.kv_heads * h.head_dim);
        let adapted = linears.iter().any(|l| !l.adapters.is_empty());
        let norm = op.norm.as_ref();
        let normed = self.norm_rows(x, norm, len, rows, ptr::null(), !self.exact)?;
        let (from_q, k, v, strides) = match normed {
            Rows::F16(x) if self.dense() && !adapted => {
                let n = q_len + 2 * kv_len;
                let joined = self.scratch(Scratch::First, rows * n * 4)?;
                let parts = [
                    part(&op.q, 0, q_len, 0),
                    part(&op.k, 0, kv_len, q_len),
                    part(&op.v, 0, kv_len, q_len + kv_len),
                ];
                let to = Target {
                    address: joined,
                    element_bytes: 4,
                    stride: n,
                    add: false,
                };
                self.dense_product(&parts, 1, x, to)?;
                let at = |column: usize| (joined + 4 * column as u64) as *mut f32;
                (at(0), at(q_len), at(q_len + kv_len), [n, n])
            }
            normed => {
                // Queries of f16 cannot be turned where they lie.
                let from_q = if self.flash(&h) {
                    self.scratch(Scratch::Partial, rows * q_len * 4)? as *mut f32
                } else {
                    q.ptr()
                };
                let k = self.scratch(Scratch::First, rows * kv_len * 4)? as *mut f32;
                let v = self.scratch(Scratch::Second, rows * kv_len * 4)? as *mut f32;
                self.whole_product(op.q, normed, rows, from_q)?;
                self.whole_product(op.k, normed, rows, k)?;
                self.whole_product(op.v, normed, rows, v)?;
                (from_q, k, v, [q_len, kv_len])
            }
        };
        self.norm_heads(&op.q_norm, from_q, strides[0], q_len)?;
        self.norm_heads(&op.k_norm, k, strides[1], kv_len)?;
        let long = op.rope.as_ref().and_then(|rope| rope.long);
        let args = RopeCacheArgs {
            q: from_q,
            k,
            v,
            strides: strides.map(|s| s as u32),
            out: q.ptr().cast(),
            f16: u32::from(self.flash(&h)),
            rotation,
            long_table: long.map_or(ptr::null(), |(table, _)| table.ptr()),
            long_above: long.map_or(0, |(_, above)| above as u32),
            cache,
            step,
            heads: h.heads as u32,
            cache_type,
        };
        let grid = (blocks(pairs, ELEMENTWISE), rows as u32);
        self.driver
            .launch("rope_cache", grid, ELEMENTWISE, 0, &args)?;
        if cache_type == cache_types::Q8_0 {
            let warps = 2 * h.kv_heads * h.head_dim.div_ceil(32);
            let grid = (blocks(warps * 32, ELEMENTWISE), rows as u32);
            self.driver
                .launch("store_q8", grid, ELEMENTWISE, 0, &args)?;
        }
        Ok(())
    }

    /// Whether this step's attention goes through tiles of rows; its queries are f16 then.
    fn flash(&self, h: &Heads) -> bool {
        let longest = self.current.spans.iter().map(|s| s[1]).max().unwrap_or(0);
        !self.exact
            && longest >= FLASH_ROWS
            && h.head_dim <= 128
            && h.heads / h.kv_heads <= flash::TILE_ROWS
            && (h.heads * h.head_dim).is_multiple_of(GROUP)
    }

    /// Lays out the tiles of this step's rows, unless an earlier layer did; their list and how many.
    fn flash_tiles(&mut self, per_tile: usize) -> Result<(Address, u32)> {
        if let Some(n) = self.current.tiles {
            let tiles = self.scratch(Scratch::Tiles, n as usize * 8)?;
            return Ok((tiles, n));
        }
        let mut order = Vec::new();
        for &[first, len, past] in &self.current.spans {
            for start in (0..len).step_by(per_tile) {
                let rows = per_tile.min(len - start);
                order.push((past + start + rows, [(first + start) as u32, rows as u32]));
            }
        }
        // Those with the most tokens to see first, so that the last to end are short.
        order.sort_by_key(|(tokens, _)| std::cmp::Reverse(*tokens));
        let list: Vec<[u32; 2]> = order.into_iter().map(|(_, tile)| tile).collect();
        let tiles = self.scratch(Scratch::Tiles, list.len() * 8)?;
        self.driver.write(tiles, bytemuck::cast_slice(&list))?;
        let n = list.len() as u32;
        self.current.tiles = Some(n);
        Ok((tiles, n))
    }

    pub(super) fn op_attend(
        &mut self,
        q: &Buffer,
        cache: &Cache,
        place: CachePlace,
        op: &Attention<'_, Self>,
        out: &Buffer,
    ) -> Result<()> {
        let heads = op.heads;
        if self.fused() {
            let values = heads.heads * decode::MAX_SPLITS as usize * (heads.head_dim + 4);
            let role = Role::Parts(values);
            let fresh = Role::Fresh(2 * heads.kv_heads * heads.head_dim);
            let op = Op {
                kind: kind::ATTEND,
                input: self.input(q.ptr(), None, heads.heads * heads.head_dim, false)?,
                cache: self.cache_layer(cache, place),
                heads: heads.heads as u32,
                splits: self.decode_splits(),
                scale: heads.scale,
                fresh: self.numbered(fresh, 0)?,
                out: self.numbered(role, values)?,
                ..NO_OP
            };
            self.push("attention", op, &[role]);
            self.set_parts(out, role, heads.head_dim);
            return Ok(());
        }
        let (rows, len) = (self.current.rows, heads.heads * heads.head_dim);
        if self.flash(&heads) {
            self.half_stride(len, out)?;
            let group = heads.heads / heads.kv_heads;
            let (tiles, n) = self.flash_tiles(flash::TILE_ROWS / group)?;
            let cache = match cache.shape.ty {
                CacheType::Q8_0 => self.unpacked_layer(cache, place)?,
                _ => self.cache_layer(cache, place),
            };
            let variant = variant(op);
            let args = FlashArgs {
                q: q.ptr().cast_const().cast(),
                cache,
                step: self.step_args(place.part),
                tiles: tiles as *const u32,
                group: group as u32,
                scale: heads.scale,
                variant,
                out: out.ptr().cast(),
            };
            let plain = variant.window == 0 && variant.soft_cap == 0.0 && variant.sinks.is_null();
            let (kernel, dims) = match (heads.head_dim <= 64, plain) {
                (true, true) => ("flash_64", 64),
                (true, false) => ("flash_64_variant", 64),
                (false, true) => ("flash_128", 128),
                (false, false) => ("flash_128_variant", 128),
            };
            let grid = (heads.kv_heads as u32, n);
            let shared = flash::shared_bytes(dims);
            return self
                .driver
                .launch(kernel, grid, flash::THREADS, shared, &args);
        }
        // Rows go on to their product in f16.
        let cast = !self.exact;
        let target = if cast {
            self.scratch(Scratch::First, rows * len * 4)? as *mut f32
        } else {
            out.ptr()
        };
        let splits = self.current.splits;
        let tasks = rows * heads.heads;
        let partial = if splits > 1 {
            let values = tasks * splits as usize * (heads.head_dim + 2);
            self.scratch(Scratch::Partial, values * 4)?
        } else {
            0
        };
        let args = AttendArgs {
            q: q.ptr(),
            cache: self.cache_layer(cache, place),
            step: self.step_args(place.part),
            heads: heads.heads as u32,
            splits,
            scale: heads.scale,
            variant: variant(op),
            out: target,
            partial: partial as *mut f32,
        };
        let kernel = match cache.shape.ty {
            CacheType::F16 => "attend_f16",
            CacheType::F32 => "attend_f32",
            CacheType::Q8_0 => "attend_q8",
        };
        let grid = (blocks(tasks, attention::THREADS / 32), splits);
        self.driver
            .launch(kernel, grid, attention::THREADS, 0, &args)?;
        if splits > 1 {
            self.driver
                .launch("attend_combine", (grid.0, 1), attention::THREADS, 0, &args)?;
        }
        if cast {
            let stride = self.half_stride(len, out)?;
            let args = CastArgs {
                x: target,
                out: out.ptr().cast(),
                len: len as u32,
                stride: stride as u32,
            };
            let grid = (blocks(stride, ELEMENTWISE), rows as u32);
            self.driver
                .launch("cast_f16", grid, ELEMENTWISE, 0, &args)?;
        }
        Ok(())
    }

    /// The product of one row.
    fn product_op(
        &mut self,
        linear: Linear<'_, Self>,
        x: *const f32,
        norm: Option<&Norm<'_, Self>>,
        out: *mut f32,
    ) -> Result<Op> {
        let weight = linear.weight;
        let rows = weight.matrix.rows as usize;
        let warps = self.driver.multiprocessors() as usize * decode::WARPS as usize;
        // A row's halves go to the lanes side by side where a warp would else take two long rows while
        // others have none.
        let split = weight.matrix.groups() > 32 && rows.div_ceil(2) * 2 <= warps;
        Ok(Op {
            kind: kind::PRODUCT,
            split: u32::from(split),
            input: self.input(x, norm, weight.cols, !weight.quantised)?,
            matrices: [weight.matrix, NO_MATRIX, NO_MATRIX],
            biases: [bias_ptr(linear), ptr::null(), ptr::null()],
            out,
            ..NO_OP
        })
    }

    pub(super) fn op_linear_add(
        &mut self,
        linear: Linear<'_, Self>,
        input: &Buffer,
        residual: &Residual<'_, Self>,
        x: &Buffer,
    ) -> Result<()> {
        if self.fused() {
            let role = Role::Buffer(x.address);
            let add_from = self.number_of(role)?;
            let to = self.numbered(role, linear.weight.matrix.rows as usize)?;
            let op = Op {
                add: 1,
                add_from,
                ..self.product_op(linear, input.ptr(), None, to)?
            };
            let name = if self.parts_of(input.ptr()).is_some() {
                "attention out"
            } else {
                "down"
            };
            self.push(name, op, &[role]);
            return Ok(());
        }
        let rows = self.current.rows;
        let input = if self.exact {
            Rows::F32(input.ptr())
        } else {
            Rows::F16(input.ptr().cast_const().cast())
        };
        if residual.is_plain() {
            self.product(linear, input, rows, x.ptr(), true)?;
            return self.adapt(linear, input, rows, x.ptr());
        }
        let len = linear.weight.matrix.rows as usize;
        let y = self.scratch(Scratch::First, rows * len * 4)?;
        self.whole_product(linear, input, rows, y as *mut f32)?;
        self.add_residual(residual, y, len, x)
    }

    pub(super) fn op_norm_gate_up(
        &mut self,
        x: &Buffer,
        op: &GateUp<'_, Self>,
        out: &Buffer,
    ) -> Result<()> {
        let GateUp {
            norm,
            gate,
            up,
            activation,
        } = op;
        let len = up.weight.cols;
        let width = up.weight.matrix.rows as usize;
        if let Some(gate) = gate
            && self.fused()
        {
            let float = !gate.weight.quantised || !up.weight.quantised;
            let role = Role::Buffer(out.address);
            let op = Op {
                kind: kind::GATE_UP,
                input: self.input(x.ptr(), norm.as_ref(), len, float)?,
                matrices: [gate.weight.matrix, up.weight.matrix, NO_MATRIX],
                biases: [bias_ptr(*gate), bias_ptr(*up), ptr::null()],
                out: self.numbered(role, width)?,
                ..NO_OP
            };
            self.push("gate, up", op, &[role]);
            return Ok(());
        }
        let rows = self.current.rows;
        let normed = self.norm_rows(x, norm.as_ref(), len, rows, ptr::null(), !self.exact)?;
        let stride = if self.exact {
            width
        } else {
            self.half_stride(width, out)?
        };
        if let (Rows::F16(x), Some(gate), Activation::Silu) = (normed, *gate, *activation)
            && self.dense()
            && width == stride
            && gate.adapters.is_empty()
            && up.adapters.is_empty()
        {
            let to = Target {
                address: out.address,
                element_bytes: 2,
                stride,
                add: false,
            };
            return self.dense_sliced(&[gate, *up], x, to);
        }
        // Without a gate, the activation is of `up`.
        let first = self.scratch(Scratch::First, rows * width * 4)? as *mut f32;
        self.whole_product(gate.unwrap_or(*up), normed, rows, first)?;
        let mut second = ptr::null_mut();
        if gate.is_some() {
            second = self.scratch(Scratch::Second, rows * width * 4)? as *mut f32;
            self.whole_product(*up, normed, rows, second)?;
        }
        self.activate(
            ActivateArgs {
                gate: first,
                up: second,
                out: out.ptr().cast(),
                len: width as u32,
                stride: stride as u32,
                f16: u32::from(!self.exact),
                activation: activation_number(*activation),
            },
            rows,
        )
    }

    pub(super) fn activate(&mut self, args: ActivateArgs, rows: usize) -> Result<()> {
        let grid = (blocks(args.stride as usize, ELEMENTWISE), rows as u32);
        self.driver
            .launch("activate_rows", grid, ELEMENTWISE, 0, &args)
    }

    pub(super) fn op_norm_head(
        &mut self,
        x: &Buffer,
        op: &Head<'_, Self>,
        logits: &Buffer,
    ) -> Result<()> {
        let Head {
            norm, output: head, ..
        } = op;
        let len = head.weight.cols;
        let outputs = self.current.outputs;
        if self.fused() {
            let op = self.product_op(*head, x.ptr(), Some(norm), logits.ptr())?;
            self.push("head", Op { choose: 1, ..op }, &[]);
            return Ok(());
        }
        let gather = self.step_args(CachePart::Whole).outputs;
        let adapted = !head.adapters.is_empty();
        let f16 = !self.exact && (outputs > 1 || adapted);
        match self.norm_rows(x, Some(norm), len, outputs, gather, f16)? {
            Rows::F32(x) if !self.exact => {
                let op = self.product_op(*head, x, None, logits.ptr())?;
                self.run_single(Op { choose: 1, ..op })?;
            }
            rows => self.whole_product(*head, rows, outputs, logits.ptr())?,
        }
        if op.scale == 1.0 && op.soft_cap.is_none() {
            return Ok(());
        }
        let len = outputs * head.weight.matrix.rows as usize;
        let args = FinishArgs {
            logits: logits.ptr(),
            len: len as u32,
            scale: op.scale,
            cap: op.soft_cap.unwrap_or(0.0),
        };
        let grid = (blocks(len, ELEMENTWISE), 1);
        self.driver
            .launch("finish_logits", grid, ELEMENTWISE, 0, &args)
    }

    pub(super) fn op_sample(
        &mut self,
        logits: &Buffer,
        vocabulary: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<u32>> {
        if rows.len() * vocabulary > logits.len {
            return Err(Error::Request(format!(
                "{} rows to sample from, too many",
                rows.len()
            )));
        }
        let plain = |row: &SampleRow<'_>| {
            row.params.temperature < MIN_TEMPERATURE
                && (row.params.repetition_penalty == 1.0 || row.seen.is_empty())
        };
        if let [row] = rows
            && plain(row)
            && let Some(id) = self.chosen()?
        {
            return self.within(vocabulary, vec![id]);
        }
        let out = self.scratch(Scratch::Ids, rows.len().max(1) * 4)?;
        if rows.iter().any(plain) {
            self.argmax(logits, vocabulary, rows.len(), out)?;
        }
        for (i, row) in rows.iter().enumerate() {
            if !plain(row) {
                let logits = logits.address + (4 * i * vocabulary) as u64;
                self.draw(logits, vocabulary, row, out + 4 * i as u64)?;
            }
        }
        let mut ids = vec![0u32; rows.len()];
        self.driver.read(out, bytemuck::cast_slice_mut(&mut ids))?;
        self.within(vocabulary, ids)
    }

    /// `ids`, all of them within the vocabulary.
    fn within(&self, vocabulary: usize, ids: Vec<u32>) -> Result<Vec<u32>> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::Device {
                device: self.driver.info().name.clone(),
                what: format!("sampling chose id {id} of a vocabulary of {vocabulary}"),
            });
        }
        Ok(ids)
    }

    fn argmax(
        &mut self,
        logits: &Buffer,
        vocabulary: usize,
        rows: usize,
        out: Address,
    ) -> Result<()> {
        let partial = self.scratch(Scratch::Ranks, rows * sample::ARGMAX_BLOCKS as usize * 8)?;
        let args = ArgmaxArgs {
            logits: logits.ptr(),
            vocabulary: vocabulary as u32,
            partial: partial as *mut u64,
            out: out as *mut u32,
        };
        let grid = (sample::ARGMAX_BLOCKS, rows as u32);
        self.driver
            .launch("argmax", grid, sample::ARGMAX_THREADS, 256, &args)?;
        self.driver
            .launch("argmax_final", (rows as u32, 1), 32, 256, &args)
    }

    fn draw(
        &mut self,
        logits: Address,
        vocabulary: usize,
        row: &SampleRow<'_>,
        out: Address,
    ) -> Result<()> {
        // Scratch for the scaled logits, and the ids seen behind them.
        let work = self.scratch(Scratch::Logits, vocabulary * 8)?;
        let seen = work + 4 * vocabulary as u64;
        let penalised = row.params.repetition_penalty != 1.0 && !row.seen.is_empty();
        if penalised {
            self.driver.write(seen, bytemuck::cast_slice(row.seen))?;
        }
        let p = row.params;
        let args = DrawArgs {
            logits: logits as *const f32,
            work: work as *mut f32,
            vocabulary: vocabulary as u32,
            seen: seen as *const u32,
            seen_len: if penalised { row.seen.len() as u32 } else { 0 },
            penalty: p.repetition_penalty,
            temperature: if p.temperature < MIN_TEMPERATURE {
                0.0
            } else {
                p.temperature
            },
            top_k: p.top_k,
            top_p: fraction(p.top_p),
            min_p: fraction(p.min_p),
            u: fraction(row.u).min((1 << 24) - 1),
            out: out as *mut u32,
        };
        let grid = (blocks(vocabulary, ELEMENTWISE), 1);
        self.driver
            .launch("scale_logits", grid, ELEMENTWISE, 0, &args)?;
        if penalised {
            let grid = (blocks(row.seen.len(), ELEMENTWISE), 1);
            self.driver
                .launch("penalise", grid, ELEMENTWISE, 0, &args)?;
        }
        self.driver.launch(
            "draw",
            (1, 1),
            sample::DRAW_THREADS,
            sample::DRAW_SHARED,
            &args,
        )
    }
}
