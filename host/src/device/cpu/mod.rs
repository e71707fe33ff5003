//! The CPU: threads and vector instructions.
//!
//! - [`linear`]: weight matrices stay in the mapped file and are multiplied as they lie there: a row at
//!   a time for a few rows of activations ([`dot`]: decoding, at the speed of memory), or in unpacked
//!   tiles for many ([`gemm`]: prompts). With AVX-512 the common types are copied, 16 rows side by side
//!   ([`interleaved`], to an [`arena`]), and both read that. [`quant`] holds a file per weight type.
//! - [`activations`]: activations in 15 bits, 32 to a scale. In exact mode, and for F32, F16 and BF16
//!   weights, products are f32 throughout ([`float`]).
//! - [`cache`]: the KV cache and attention over its blocks; [`attend`]: rows and heads shared out.
//! - [`experts`]: mixtures of experts.
//! - [`pool`]: the threads; [`simd`]: instruction sets, chosen when the program runs.

mod activations;
mod arena;
mod attend;
mod cache;
mod dot;
mod experts;
mod float;
#[allow(clippy::needless_range_loop)] // `g` is a group number, of weights and of sums alike.
mod gemm;
#[allow(clippy::needless_range_loop)] // As above.
mod interleaved;
mod linear;
mod pool;
mod quant;
mod simd;
#[cfg(test)]
mod speed;
mod system;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use cache::Cache;
pub use linear::{Weight, multiplies};
pub use simd::Level;

use self::arena::Arena;
use self::gemm::ROWS;
use self::linear::{Input, Scratch, View};
use self::pool::{Parts, Pool};
use super::{
    Activation, Attention, Batch, CachePlace, CacheShape, Device, DeviceInfo, Experts, GateUp,
    Head, Linear, Norm, NormKind, Qkv, Residual, SampleRow,
};
use crate::error::{Error, Result};
use gguf::Gguf;
use std::ops::Range;
use std::sync::Arc;

/// f32 values in memory.
pub struct Buffer(Vec<f32>);

/// The processor as a device.
pub struct Cpu {
    info: DeviceInfo,
    level: Level,
    exact: bool,
    pool: Pool,
    arena: Arena,
    batch: Batch,
    /// Of each row of the batch: its span, and its position in the sequence.
    places: Vec<(usize, usize)>,
    input: Input,
    /// A thread's own.
    scratch: Vec<Scratch>,
    attention: attend::Scratch,
    /// Products between two steps of an operation.
    between: [Vec<f32>; 2],
    /// Products with the first matrices of adapters.
    low: Vec<Vec<f32>>,
    experts: experts::Scratch,
    logits: Vec<f32>,
}

/// Threads beyond this are a slip of the keyboard.
const MAX_THREADS: usize = 1024;

impl Cpu {
    /// The processor with `threads` threads, or one per core; `exact` keeps activations and cache in
    /// f32.
    ///
    /// # Errors
    /// No threads, too many, or the system refuses to start them.
    pub fn new(threads: Option<usize>, exact: bool) -> Result<Cpu> {
        Cpu::with_level(threads, exact, Level::best())
    }

    /// [`Cpu::new`] with a chosen instruction set, for comparisons.
    ///
    /// # Errors
    /// As [`Cpu::new`].
    pub fn with_level(threads: Option<usize>, exact: bool, level: Level) -> Result<Cpu> {
        let threads = match threads {
            None => std::thread::available_parallelism()
                .map_or(1, |n| n.get())
                .min(MAX_THREADS),
            Some(n) if (1..=MAX_THREADS).contains(&n) => n,
            Some(n) => {
                return Err(Error::Request(format!(
                    "--threads is {n}, expected 1 to {MAX_THREADS}"
                )));
            }
        };
        let name = system::processor();
        let pool = Pool::new(threads).map_err(|e| Error::Device {
            device: name.clone(),
            what: format!("{threads} threads could not be started: {e}; use fewer --threads"),
        })?;
        let (memory_bytes, _) = system::memory().unwrap_or((0, 0));
        Ok(Cpu {
            info: DeviceInfo {
                backend: "cpu",
                name,
                memory_bytes,
                memory_bytes_per_s: None,
                architecture: level.name().to_owned(),
            },
            level,
            exact,
            scratch: (0..threads).map(|_| Scratch::default()).collect(),
            attention: attend::Scratch::default(),
            between: Default::default(),
            low: Vec::new(),
            experts: experts::Scratch::default(),
            pool,
            arena: Arena::default(),
            batch: Batch::default(),
            places: Vec::new(),
            input: Input::default(),
            logits: Vec::new(),
        })
    }

    fn rows(&self) -> usize {
        self.batch.tokens.len()
    }

    /// Multiplies all tiles of `views` by the first `n` rows of the input; `take(view, rows of the
    /// matrix, products)` gets each tile's, on whichever thread.
    fn products(
        &mut self,
        views: &[View<'_>],
        n: usize,
        take: impl Fn(usize, Range<usize>, &[[f32; ROWS]]) + Sync,
    ) {
        let Self {
            level,
            pool,
            input,
            scratch,
            ..
        } = self;
        let tiles: usize = views.iter().map(View::tiles).sum();
        let grain = grain(tiles, pool.threads());
        let scratch = Parts::new(scratch);
        pool.for_ranges(tiles, grain, |thread, range| {
            // SAFETY: one thread has one number.
            let scratch = unsafe { &mut scratch.get(thread..thread + 1)[0] };
            for tile in range {
                let (mut view, mut tile) = (0, tile);
                while tile >= views[view].tiles() {
                    tile -= views[view].tiles();
                    view += 1;
                }
                views[view].multiply(*level, tile, input, n, scratch);
                take(view, views[view].tile_rows(tile), &scratch.out);
            }
        });
    }
}

/// Pieces of work a thread takes at once: some sixteen turns each, so that none waits long for
/// another at the end.
fn grain(pieces: usize, threads: usize) -> usize {
    (pieces / (16 * threads)).clamp(1, 16)
}

fn bias<'a>(linear: &Linear<'a, Cpu>) -> Option<&'a [f32]> {
    linear.bias.map(|b| &b.0[..])
}

/// Adds a bias to some rows' products.
#[inline]
fn biased(product: f32, bias: Option<&[f32]>, row: usize) -> f32 {
    bias.map_or(product, |bias| product + bias[row])
}

/// One row's norm.
fn norm_row(level: Level, norm: &Norm<'_, Cpu>, x: &[f32], weight: Range<usize>, out: &mut [f32]) {
    let bias = norm.bias.map(|b| &b.0[weight.clone()]);
    let weight = &norm.weight.0[weight];
    match norm.kind {
        NormKind::Rms => float::rms_norm(level, x, weight, norm.eps, out),
        NormKind::Layer => float::layer_norm(x, weight, bias, norm.eps, out),
    }
}

/// `cap * tanh(x / cap)`.
fn soft_cap(x: f32, cap: f32) -> f32 {
    cap * (x / cap).tanh()
}

impl Device for Cpu {
    type Weight = Weight;
    type Buffer = Buffer;
    type Cache = Cache;
    // A step of these takes seconds on a few cores, and nothing can be cancelled within it.
    const STEP_ROWS: usize = 512;
    // Rows are multiplied in other ways as there are more of them, and nobody's tokens are to show that.
    const MAX_BATCH: usize = 1;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<u64> {
        // Where the system does not say, allocation will.
        Ok(system::memory().map_or(u64::MAX, |(_, free)| free))
    }

    fn load(
        &mut self,
        tensor: gguf::Tensor<'_>,
        rows: Range<usize>,
        file: &Arc<Gguf>,
    ) -> Result<Weight> {
        let mut weight = Weight::new(tensor, rows, file)?;
        let Self {
            level,
            pool,
            scratch,
            arena,
            ..
        } = self;
        if self.exact || !weight.interleave(*level, pool, scratch, arena)? {
            weight.touch(pool)?;
        }
        Ok(weight)
    }

    fn load_table(
        &mut self,
        tensor: gguf::Tensor<'_>,
        rows: Range<usize>,
        file: &Arc<Gguf>,
    ) -> Result<Weight> {
        let weight = Weight::new(tensor, rows, file)?;
        weight.touch(&mut self.pool)?;
        Ok(weight)
    }

    fn finish_loading(&mut self) -> Result<()> {
        Ok(())
    }

    fn shape(weight: &Weight) -> (usize, usize) {
        (weight.rows, weight.cols)
    }

    fn upload(&mut self, values: &[f32]) -> Result<Buffer> {
        Ok(Buffer(values.to_vec()))
    }

    fn alloc(&mut self, len: usize) -> Result<Buffer> {
        Ok(Buffer(vec![0.0; len]))
    }

    fn alloc_cache(&mut self, shape: CacheShape) -> Result<Cache> {
        Ok(Cache::new(shape))
    }

    fn step(
        &mut self,
        batch: &Batch,
        record: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        self.batch.clone_from(batch);
        self.places.clear();
        for (i, span) in batch.spans.iter().enumerate() {
            self.places
                .extend((0..span.len).map(|row| (i, span.past + row)));
        }
        record(self)
    }

    fn embed(&mut self, table: &Weight, scale: f32, out: &mut Buffer) -> Result<()> {
        let cols = table.cols;
        for (&token, out) in self.batch.tokens.iter().zip(out.0.chunks_exact_mut(cols)) {
            table.row(token as usize, out)?;
            if scale != 1.0 {
                out.iter_mut().for_each(|x| *x *= scale);
            }
        }
        Ok(())
    }

    fn norm_qkv(
        &mut self,
        x: &Buffer,
        op: &Qkv<'_, Self>,
        cache: &mut Cache,
        place: CachePlace,
        q: &mut Buffer,
    ) -> Result<()> {
        let n = self.rows();
        let kv_dim = op.heads.kv_heads * op.heads.head_dim;
        let [mut keys, mut values] = std::mem::take(&mut self.between);
        keys.resize(n * kv_dim, 0.0);
        values.resize(n * kv_dim, 0.0);
        let outs = [
            Parts::new(&mut q.0),
            Parts::new(&mut keys),
            Parts::new(&mut values),
        ];
        self.linears(&[op.q, op.k, op.v], Rows::Normed(x, &op.norm), &outs, false)?;
        self.rotate_and_store(op, cache, place, q, &mut keys, &values);
        self.between = [keys, values];
        Ok(())
    }

    fn attend(
        &mut self,
        q: &Buffer,
        cache: &Cache,
        place: CachePlace,
        op: &Attention<'_, Self>,
        out: &mut Buffer,
    ) -> Result<()> {
        self.attend_over(q, cache, place, op, out);
        Ok(())
    }

    fn linear_add(
        &mut self,
        linear: Linear<'_, Self>,
        input: &Buffer,
        residual: &Residual<'_, Self>,
        x: &mut Buffer,
    ) -> Result<()> {
        if residual.is_plain() {
            let outs = [Parts::new(&mut x.0)];
            return self.linears(&[linear], Rows::Plain(input), &outs, true);
        }
        let [mut y, other] = std::mem::take(&mut self.between);
        y.resize(self.rows() * linear.weight.rows, 0.0);
        let outs = [Parts::new(&mut y)];
        self.linears(&[linear], Rows::Plain(input), &outs, false)?;
        self.add_residual(residual, &mut y, x, linear.weight.rows);
        self.between = [y, other];
        Ok(())
    }

    fn norm_gate_up(&mut self, x: &Buffer, op: &GateUp<'_, Self>, out: &mut Buffer) -> Result<()> {
        let up = Some(op.up);
        let both: Vec<_> = op.gate.into_iter().chain(up).collect();
        if both.iter().any(|linear| !linear.adapters.is_empty()) {
            return self.gate_up_adapted(x, op, &both, out);
        }
        let mut views = Vec::with_capacity(2);
        for linear in &both {
            views.push((linear.weight.view(self.exact)?, bias(linear)));
        }
        let inputs: Vec<_> = views.iter().map(|v| v.0).collect();
        let n = self.take(Rows::Normed(x, &op.norm), &inputs);
        self.gate_up(&views, op.activation, n, Parts::new(&mut out.0));
        Ok(())
    }

    fn experts(&mut self, op: &Experts<'_, Self>, x: &mut Buffer) -> Result<()> {
        self.run_experts(op, x)
    }

    fn norm_head(&mut self, x: &Buffer, op: &Head<'_, Self>, logits: &mut Buffer) -> Result<()> {
        let outputs = std::mem::take(&mut self.batch.outputs);
        let outs = [Parts::new(&mut logits.0)];
        let rows = Rows::Gathered(x, &op.norm, &outputs);
        let done = self.linears(&[op.output], rows, &outs, false);
        let values = &mut logits.0[..outputs.len() * op.output.weight.rows];
        self.batch.outputs = outputs;
        if op.scale != 1.0 {
            values.iter_mut().for_each(|l| *l *= op.scale);
        }
        if let Some(cap) = op.soft_cap {
            values.iter_mut().for_each(|l| *l = soft_cap(*l, cap));
        }
        done
    }

    fn sample(
        &mut self,
        logits: &Buffer,
        vocabulary: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<u32>> {
        let logits = logits.0.chunks_exact(vocabulary);
        let mut tokens = Vec::with_capacity(rows.len());
        for (row, logits) in rows.iter().zip(logits) {
            // Sampling changes what it is given.
            self.logits.clear();
            self.logits.extend_from_slice(logits);
            tokens.push(crate::sampling::sample(
                row.params,
                row.u(),
                row.seen,
                &mut self.logits,
            ));
        }
        Ok(tokens)
    }

    fn read(&mut self, buffer: &Buffer, offset: usize, out: &mut [f32]) -> Result<()> {
        let range = offset..offset.saturating_add(out.len());
        let Some(values) = buffer.0.get(range) else {
            return Err(Error::Device {
                device: self.info.name.clone(),
                what: format!(
                    "read of {} values from {offset} in a buffer of {}",
                    out.len(),
                    buffer.0.len()
                ),
            });
        };
        out.copy_from_slice(values);
        Ok(())
    }
}

/// Rows of activations that products take.
#[derive(Clone, Copy)]
enum Rows<'a> {
    Plain(&'a Buffer),
    Normed(&'a Buffer, &'a Option<Norm<'a, Cpu>>),
    /// Those listed, normed.
    Gathered(&'a Buffer, &'a Norm<'a, Cpu>, &'a [usize]),
}

impl Cpu {
    /// Makes `rows` the input of `views`; returns how many they are.
    fn take(&mut self, rows: Rows<'_>, views: &[View<'_>]) -> usize {
        let n = match rows {
            Rows::Gathered(_, _, list) => list.len(),
            _ => self.batch.tokens.len(),
        };
        let cols = views[0].cols();
        let Self {
            level, pool, input, ..
        } = self;
        let level = *level;
        let of = |row: usize| row * cols..(row + 1) * cols;
        input.fill(level, pool, (n, cols), views, |row, out| match rows {
            Rows::Plain(x) | Rows::Normed(x, None) => Some(&x.0[of(row)]),
            Rows::Normed(x, Some(norm)) => {
                norm_row(level, norm, &x.0[of(row)], 0..cols, out);
                None
            }
            Rows::Gathered(x, norm, list) => {
                norm_row(level, norm, &x.0[of(list[row])], 0..cols, out);
                None
            }
        });
        n
    }

    /// Products of `rows` with each of `linears`, biases and adapters added, to `outs[i]`,
    /// `[rows][matrix rows]`; or added to what is there.
    fn linears(
        &mut self,
        linears: &[Linear<'_, Self>],
        rows: Rows<'_>,
        outs: &[Parts<'_, f32>],
        add: bool,
    ) -> Result<()> {
        let mut views = Vec::with_capacity(linears.len());
        for linear in linears {
            views.push(linear.weight.view(self.exact)?);
        }
        // All that take the input itself at once.
        let adapters: Vec<_> = linears
            .iter()
            .enumerate()
            .flat_map(|(i, linear)| linear.adapters.iter().map(move |adapter| (i, adapter)))
            .collect();
        for (_, adapter) in &adapters {
            views.push(adapter.a.view(self.exact)?);
        }
        let n = self.take(rows, &views);
        let mut low = std::mem::take(&mut self.low);
        low.resize_with(low.len().max(adapters.len()), Vec::new);
        for (low, (_, adapter)) in low.iter_mut().zip(&adapters) {
            low.resize(n * adapter.a.rows, 0.0);
        }
        let lows: Vec<_> = low.iter_mut().map(|low| Parts::new(low)).collect();
        let biases: Vec<_> = linears.iter().map(bias).collect();
        self.products(&views, n, |view, rows, products| {
            let width = views[view].rows();
            let (out, bias, add) = match view.checked_sub(linears.len()) {
                None => (&outs[view], biases[view], add),
                Some(adapter) => (&lows[adapter], None, false),
            };
            for (at, products) in products.iter().enumerate() {
                let start = at * width;
                // SAFETY: a tile's columns of a row are written by one thread.
                let out = unsafe { out.get(start + rows.start..start + rows.end) };
                for ((out, &product), row) in out.iter_mut().zip(products).zip(rows.clone()) {
                    let y = biased(product, bias, row);
                    *out = if add { *out + y } else { y };
                }
            }
        });
        for (&(i, adapter), low) in adapters.iter().zip(&low) {
            let view = [adapter.b.view(self.exact)?];
            let rank = adapter.a.rows;
            let Self {
                level, pool, input, ..
            } = self;
            input.fill(*level, pool, (n, rank), &view, |row, out| {
                for (out, x) in out.iter_mut().zip(&low[row * rank..]) {
                    *out = x * adapter.scale;
                }
                None
            });
            let width = adapter.b.rows;
            self.products(&view, n, |_, rows, products| {
                for (at, products) in products.iter().enumerate() {
                    let start = at * width;
                    // SAFETY: as above.
                    let out = unsafe { outs[i].get(start + rows.start..start + rows.end) };
                    out.iter_mut().zip(products).for_each(|(out, y)| *out += y);
                }
            });
        }
        self.low = low;
        Ok(())
    }

    /// `out = activation(gate, up)` of the input's first `n` rows, for one matrix (`up`) or two (gate and
    /// `up`), tile by tile; `[n][matrix rows]`.
    fn gate_up(
        &mut self,
        views: &[(View<'_>, Option<&[f32]>)],
        activation: Activation,
        n: usize,
        out: Parts<'_, f32>,
    ) {
        let (width, tiles) = (views[0].0.rows(), views[0].0.tiles());
        let Self {
            level,
            pool,
            input,
            scratch,
            ..
        } = self;
        let level = *level;
        let scratch = Parts::new(scratch);
        let grain = grain(views.len() * tiles, pool.threads());
        pool.for_ranges(tiles, grain.div_ceil(views.len()), |thread, range| {
            // SAFETY: one thread has one number.
            let scratch = unsafe { &mut scratch.get(thread..thread + 1)[0] };
            for tile in range {
                let rows = views[0].0.tile_rows(tile);
                for (view, bias) in views.iter().rev() {
                    // Up first: what is in `out` at the end is the gate's.
                    std::mem::swap(&mut scratch.out, &mut scratch.second);
                    view.multiply(level, tile, input, n, scratch);
                    if let Some(bias) = bias {
                        for products in &mut scratch.out {
                            for (product, bias) in products.iter_mut().zip(&bias[rows.clone()]) {
                                *product += bias;
                            }
                        }
                    }
                }
                let up = (views.len() == 2).then_some(&scratch.second[..]);
                float::activate(level, activation, &mut scratch.out, up);
                for (at, products) in scratch.out.iter().enumerate() {
                    let start = at * width;
                    // SAFETY: a tile's columns of a row are written by one thread.
                    let out = unsafe { out.get(start + rows.start..start + rows.end) };
                    out.copy_from_slice(&products[..rows.len()]);
                }
            }
        });
    }

    /// [`Device::norm_gate_up`] of matrices with adapters, whose whole products come first.
    fn gate_up_adapted(
        &mut self,
        x: &Buffer,
        op: &GateUp<'_, Self>,
        both: &[Linear<'_, Self>],
        out: &mut Buffer,
    ) -> Result<()> {
        let len = self.rows() * both[0].weight.rows;
        let mut products = std::mem::take(&mut self.between);
        products.iter_mut().for_each(|p| p.resize(len, 0.0));
        let outs = products.each_mut().map(|p| Parts::new(p));
        self.linears(both, Rows::Normed(x, &op.norm), &outs, false)?;
        let (gates, ups) = (products[0].chunks(ROWS), products[1].chunks(ROWS));
        for ((gate, up), out) in gates.zip(ups).zip(out.0[..len].chunks_mut(ROWS)) {
            let pad = |values: &[f32]| {
                let mut row = [0.0; ROWS];
                row[..values.len()].copy_from_slice(values);
                [row]
            };
            let mut result = pad(gate);
            let up = pad(up);
            let up = (both.len() == 2).then_some(&up[..]);
            float::activate(self.level, op.activation, &mut result, up);
            out.copy_from_slice(&result[0][..out.len()]);
        }
        self.between = products;
        Ok(())
    }

    /// `x += scale * norm(y)`, rows of `cols` elements; `y` is used up.
    fn add_residual(
        &mut self,
        residual: &Residual<'_, Self>,
        y: &mut [f32],
        x: &mut Buffer,
        cols: usize,
    ) {
        let n = self.rows();
        let level = self.level;
        let (x, y) = (Parts::new(&mut x.0), Parts::new(y));
        self.pool.for_ranges(n, 16, |_, range| {
            let mut normed = vec![0.0; cols];
            for row in range {
                // SAFETY: each row is visited once.
                let (x, y) = unsafe {
                    let row = row * cols..(row + 1) * cols;
                    (x.get(row.clone()), y.get(row))
                };
                let y = match &residual.norm {
                    Some(norm) => {
                        norm_row(level, norm, y, 0..cols, &mut normed);
                        &normed[..]
                    }
                    None => y,
                };
                x.iter_mut()
                    .zip(y)
                    .for_each(|(x, y)| *x += residual.scale * y);
            }
        });
    }
}
