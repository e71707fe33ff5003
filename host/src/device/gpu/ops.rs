//! The operations of [`Device`](crate::device::Device) as launches.
//!
//! Three ways of one product: an operation of the kernel `decode` for a single row, with norm and epilogue
//! fused; `gemm` on tensor cores for more; `linear_exact` in f32 with `--exact`. The latter two are
//! launches of their own, with norm and epilogue as kernels beside them.

use super::{Address, Buffer, Cache, Driver, Gpu, Scratch, Weight};
use crate::device::{Heads, Linear, Norm, Qkv, RopeLayout, SampleRow};
use crate::error::{Error, Result};
use crate::sampling::{MIN_TEMPERATURE, fraction};
use kernels::attention::{self, AttendArgs};
use kernels::decode::{self, Input, NO_OP, Op, kind};
use kernels::exact::{self, LinearArgs};
use kernels::gemm::{self, GemmArgs};
use kernels::rows::{
    CacheLayer, CastArgs, EmbedArgs, RmsNormArgs, RopeCacheArgs, Rotation, SiluMulArgs,
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

fn blocks(n: usize, per_block: u32) -> u32 {
    n.div_ceil(per_block as usize) as u32
}

/// A product's optional bias.
fn bias_ptr<D: Driver>(linear: Linear<'_, Gpu<D>>) -> *const f32 {
    linear.bias.map_or(ptr::null(), |b| b.ptr().cast_const())
}

/// Input rows of a product that is not fused.
#[derive(Clone, Copy)]
enum Rows {
    F32(*const f32),
    F16(*const u16),
}

impl<D: Driver> Gpu<D> {
    fn cache_layer(&self, cache: &Cache, layer: usize) -> CacheLayer {
        let offset = (cache.shape.elements() / cache.shape.layers * layer) * cache.element_bytes;
        CacheLayer {
            keys: (cache.keys + offset as u64) as *mut u8,
            values: (cache.values + offset as u64) as *mut u8,
            kv_heads: cache.shape.kv_heads as u32,
            head_dim: cache.shape.head_dim as u32,
        }
    }

    /// The input of an operation of `decode`; attention's parts where `x` stands for them.
    fn input(
        &self,
        x: *const f32,
        norm: Option<&Norm<'_, Self>>,
        len: usize,
        float: bool,
    ) -> Input {
        let parts = self.parts_of(x);
        Input {
            x: parts.map_or(x, |p| p.0),
            norm: norm.map_or(ptr::null(), |n| n.weight.ptr()),
            eps: norm.map_or(0.0, |n| n.eps),
            len: len as u32,
            keep_f32: u32::from(float),
            splits: parts.map_or(0, |_| self.decode_splits()),
            head_dim: parts.map_or(0, |p| p.1),
        }
    }

    pub(super) fn op_embed(&mut self, table: &Weight, scale: f32, out: &Buffer) -> Result<()> {
        if self.fused() {
            self.push(Op {
                kind: kind::EMBED,
                input: self.input(ptr::null(), None, table.cols, false),
                matrices: [table.matrix, NO_MATRIX, NO_MATRIX],
                scale,
                out: out.ptr(),
                ..NO_OP
            });
            return Ok(());
        }
        let args = EmbedArgs {
            table: table.matrix,
            step: self.step_args(),
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

    /// `rows` normed rows of `x`, in the form that products of several rows take.
    fn norm_rows(
        &mut self,
        x: &Buffer,
        norm: &Norm<'_, Self>,
        len: usize,
        rows: usize,
        gather: *const u32,
        f16: bool,
    ) -> Result<Rows> {
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
        let args = RmsNormArgs {
            x: x.ptr(),
            rows: gather,
            weight: norm.weight.ptr(),
            eps: norm.eps,
            len: len as u32,
            out: out as *mut u8,
            stride: stride as u32,
            f16: u32::from(f16),
        };
        self.driver
            .launch("rms_norm", (rows as u32, 1), 256, 128, &args)?;
        Ok(if f16 {
            Rows::F16(out as *const u16)
        } else {
            Rows::F32(out as *const f32)
        })
    }

    /// f32 rows in the form that products of several rows take.
    fn plain_rows(&mut self, x: *const f32, len: usize, rows: usize) -> Result<Rows> {
        if self.exact {
            return Ok(Rows::F32(x));
        }
        let stride = len.next_multiple_of(GROUP);
        let out = self.scratch(Scratch::Half, rows * stride * 2)?;
        let args = CastArgs {
            x,
            out: out as *mut u16,
            len: len as u32,
            stride: stride as u32,
        };
        let grid = (blocks(stride, ELEMENTWISE), rows as u32);
        self.driver
            .launch("cast_f16", grid, ELEMENTWISE, 0, &args)?;
        Ok(Rows::F16(out as *const u16))
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
            Rows::F16(x) => {
                let args = GemmArgs {
                    matrix,
                    bias,
                    x,
                    rows: rows as u32,
                    out,
                    add,
                };
                let columns = blocks(n, gemm::BN as u32);
                // The tallest tile that still gives every multiprocessor a block.
                let fills =
                    |tall: u32| columns * blocks(rows, tall) >= self.driver.multiprocessors();
                let (kernel, mt) = if rows > 64 && fills(128) {
                    ("gemm_128", 4)
                } else if rows > 32 && fills(64) {
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
        layer: usize,
        q: &Buffer,
    ) -> Result<()> {
        let h = op.heads;
        self.heads = h.heads;
        let len = op.q.weight.cols;
        let rotation = Rotation {
            table: op.rope.table.ptr(),
            dims: op.rope.dims as u32,
            halves: u32::from(op.rope.layout == RopeLayout::Halves),
        };
        let cache = self.cache_layer(cache, layer);
        let linears = [op.q, op.k, op.v];
        let step = self.step_args();
        let pairs = (h.heads + 2 * h.kv_heads) * h.head_dim / 2;
        if self.fused() {
            let float = linears.iter().any(|l| !l.weight.quantised);
            self.push(Op {
                kind: kind::QKV,
                input: self.input(x.ptr(), Some(&op.norm), len, float),
                matrices: linears.map(|l| l.weight.matrix),
                biases: linears.map(bias_ptr),
                rotation,
                cache,
                heads: h.heads as u32,
                out: q.ptr(),
                ..NO_OP
            });
            return Ok(());
        }
        let rows = self.current.rows;
        let kv_len = h.kv_heads * h.head_dim;
        let normed = self.norm_rows(x, &op.norm, len, rows, ptr::null(), !self.exact)?;
        let k = self.scratch(Scratch::First, rows * kv_len * 4)? as *mut f32;
        let v = self.scratch(Scratch::Second, rows * kv_len * 4)? as *mut f32;
        self.product(op.q, normed, rows, q.ptr(), false)?;
        self.product(op.k, normed, rows, k, false)?;
        self.product(op.v, normed, rows, v, false)?;
        let args = RopeCacheArgs {
            q: q.ptr(),
            k,
            v,
            rotation,
            cache,
            step,
            heads: h.heads as u32,
            f32: u32::from(self.exact),
        };
        let grid = (blocks(pairs, ELEMENTWISE), rows as u32);
        self.driver
            .launch("rope_cache", grid, ELEMENTWISE, 0, &args)
    }

    pub(super) fn op_attend(
        &mut self,
        q: &Buffer,
        cache: &Cache,
        layer: usize,
        heads: Heads,
        out: &Buffer,
    ) -> Result<()> {
        if self.fused() {
            let splits = self.decode_splits();
            let values = heads.heads * splits as usize * (heads.head_dim + 4);
            let parts = self.scratch(Scratch::Partial, values * 4)?;
            self.push(Op {
                kind: kind::ATTEND,
                input: self.input(q.ptr(), None, heads.heads * heads.head_dim, false),
                cache: self.cache_layer(cache, layer),
                heads: heads.heads as u32,
                splits,
                scale: heads.scale,
                out: parts as *mut f32,
                ..NO_OP
            });
            self.set_parts(out, parts, heads.head_dim);
            return Ok(());
        }
        let splits = self.current.splits;
        let tasks = self.current.rows * heads.heads;
        let partial = if splits > 1 {
            let values = tasks * splits as usize * (heads.head_dim + 2);
            self.scratch(Scratch::Partial, values * 4)?
        } else {
            0
        };
        let args = AttendArgs {
            q: q.ptr(),
            cache: self.cache_layer(cache, layer),
            step: self.step_args(),
            heads: heads.heads as u32,
            splits,
            scale: heads.scale,
            out: out.ptr(),
            partial: partial as *mut f32,
        };
        let kernel = if self.exact {
            "attend_f32"
        } else {
            "attend_f16"
        };
        let grid = (blocks(tasks, attention::THREADS / 32), splits);
        self.driver
            .launch(kernel, grid, attention::THREADS, 0, &args)?;
        if splits > 1 {
            self.driver
                .launch("attend_combine", (grid.0, 1), attention::THREADS, 0, &args)?;
        }
        Ok(())
    }

    /// The product of one row.
    fn product_op(
        &self,
        linear: Linear<'_, Self>,
        x: *const f32,
        norm: Option<&Norm<'_, Self>>,
        out: *mut f32,
    ) -> Op {
        let weight = linear.weight;
        let rows = weight.matrix.rows as usize;
        let warps = self.driver.multiprocessors() as usize * (decode::THREADS as usize / 32);
        // A row's halves go to the lanes side by side where a warp would else take two long rows while
        // others have none.
        let split = weight.matrix.groups() > 32 && rows.div_ceil(2) * 2 <= warps;
        Op {
            kind: kind::PRODUCT,
            split: u32::from(split),
            input: self.input(x, norm, weight.cols, !weight.quantised),
            matrices: [weight.matrix, NO_MATRIX, NO_MATRIX],
            biases: [bias_ptr(linear), ptr::null(), ptr::null()],
            out,
            ..NO_OP
        }
    }

    pub(super) fn op_linear_add(
        &mut self,
        linear: Linear<'_, Self>,
        input: &Buffer,
        x: &Buffer,
    ) -> Result<()> {
        if self.fused() {
            let op = self.product_op(linear, input.ptr(), None, x.ptr());
            self.push(Op { add: 1, ..op });
            return Ok(());
        }
        let rows = self.current.rows;
        let input = self.plain_rows(input.ptr(), linear.weight.cols, rows)?;
        self.product(linear, input, rows, x.ptr(), true)
    }

    pub(super) fn op_norm_gate_up(
        &mut self,
        x: &Buffer,
        norm: Norm<'_, Self>,
        gate: Linear<'_, Self>,
        up: Linear<'_, Self>,
        out: &Buffer,
    ) -> Result<()> {
        let len = gate.weight.cols;
        let width = gate.weight.matrix.rows as usize;
        if self.fused() {
            let float = !gate.weight.quantised || !up.weight.quantised;
            self.push(Op {
                kind: kind::GATE_UP,
                input: self.input(x.ptr(), Some(&norm), len, float),
                matrices: [gate.weight.matrix, up.weight.matrix, NO_MATRIX],
                biases: [bias_ptr(gate), bias_ptr(up), ptr::null()],
                out: out.ptr(),
                ..NO_OP
            });
            return Ok(());
        }
        let rows = self.current.rows;
        let normed = self.norm_rows(x, &norm, len, rows, ptr::null(), !self.exact)?;
        let second = self.scratch(Scratch::Second, rows * width * 4)? as *mut f32;
        self.product(gate, normed, rows, out.ptr(), false)?;
        self.product(up, normed, rows, second, false)?;
        let values = rows * width;
        let args = SiluMulArgs {
            gate: out.ptr(),
            up: second,
            out: out.ptr(),
            len: values as u64,
        };
        self.driver.launch(
            "silu_mul",
            (blocks(values, ELEMENTWISE), 1),
            ELEMENTWISE,
            0,
            &args,
        )
    }

    pub(super) fn op_norm_head(
        &mut self,
        x: &Buffer,
        norm: Norm<'_, Self>,
        head: Linear<'_, Self>,
        logits: &Buffer,
    ) -> Result<()> {
        let len = head.weight.cols;
        let outputs = self.current.outputs;
        if self.fused() {
            let op = self.product_op(head, x.ptr(), Some(&norm), logits.ptr());
            self.push(Op { choose: 1, ..op });
            return Ok(());
        }
        let gather = self.step_args().outputs;
        let f16 = !self.exact && outputs > 1;
        match self.norm_rows(x, &norm, len, outputs, gather, f16)? {
            Rows::F32(x) if !self.exact => {
                let op = self.product_op(head, x, None, logits.ptr());
                self.run_single(Op { choose: 1, ..op })
            }
            rows => self.product(head, rows, outputs, logits.ptr(), false),
        }
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
