//! The CPU: threads and vector instructions.
//!
//! - [`linear`]: weight matrices stay in the mapped file and are multiplied as they lie there: a row at
//!   a time for a few rows of activations ([`dot`]: decoding, at the speed of memory), or in unpacked
//!   tiles for many ([`gemm`]: prompts). [`quant`] holds a file per weight type.
//! - [`activations`]: activations in 8 bits, 32 to a scale. In exact mode, and for F32, F16 and BF16
//!   weights, products are f32 throughout ([`float`]).
//! - [`cache`]: the KV cache and attention.
//! - [`pool`]: the threads; [`simd`]: instruction sets, chosen when the program runs.

mod activations;
mod cache;
mod dot;
mod float;
#[allow(clippy::needless_range_loop)] // `g` is a group number, of weights and of sums alike.
mod gemm;
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
pub use linear::Weight;
pub use simd::Level;

use self::cache::{Element, Job, Partial, Store};
use self::gemm::ROWS;
use self::linear::{Input, Scratch, View};
use self::pool::{Parts, Pool};
use super::{
    BLOCK_TOKENS, Batch, CacheShape, Device, DeviceInfo, Heads, Linear, Norm, Qkv, Rope,
    RopeLayout, SampleRow,
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
    batch: Batch,
    /// Of each row of the batch: its span, and its position in the sequence.
    places: Vec<(usize, usize)>,
    input: Input,
    /// A thread's own.
    scratch: Vec<Scratch>,
    partials: Vec<Partial>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Block numbers of each span, in the cache's own count.
    blocks: Vec<Vec<usize>>,
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
                architecture: level.name().to_owned(),
            },
            level,
            exact,
            scratch: (0..threads).map(|_| Scratch::default()).collect(),
            partials: Vec::new(),
            pool,
            batch: Batch::default(),
            places: Vec::new(),
            input: Input::default(),
            keys: Vec::new(),
            values: Vec::new(),
            blocks: Vec::new(),
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

/// Rotates one head at the position whose `(cos, sin)` pairs these are.
fn rotate(head: &mut [f32], layout: RopeLayout, pairs: &[f32]) {
    let half = pairs.len() / 2;
    for (i, pair) in pairs.chunks_exact(2).enumerate() {
        let (a, b) = match layout {
            RopeLayout::Interleaved => (2 * i, 2 * i + 1),
            RopeLayout::Halves => (i, i + half),
        };
        let (x, y) = (head[a], head[b]);
        head[a] = x * pair[0] - y * pair[1];
        head[b] = x * pair[1] + y * pair[0];
    }
}

/// The pairs of a position.
fn rope_pairs<'a>(rope: &Rope<'a, Cpu>, position: usize) -> &'a [f32] {
    &rope.table.0[position * rope.dims..(position + 1) * rope.dims]
}

impl Device for Cpu {
    type Weight = Weight;
    type Buffer = Buffer;
    type Cache = Cache;
    // A step of these takes seconds on a few cores, and nothing can be cancelled within it.
    const STEP_ROWS: usize = 512;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&self) -> Result<u64> {
        // Where the system does not say, allocation will.
        Ok(system::memory().map_or(u64::MAX, |(_, free)| free))
    }

    fn cache_element_bytes(&self) -> usize {
        if self.exact { 4 } else { 2 }
    }

    fn load(&mut self, tensor: gguf::Tensor<'_>, file: &Arc<Gguf>) -> Result<Weight> {
        let weight = Weight::new(tensor, file)?;
        // Nothing is copied: touching each page brings it in now rather than in the first pass.
        const PAGE: usize = 4096;
        let data = tensor.data();
        self.pool
            .for_ranges(data.len().div_ceil(PAGE), 256, |_, range| {
                for page in range {
                    std::hint::black_box(data[page * PAGE]);
                }
            });
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
        Ok(Cache::new(shape, self.exact))
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
        let tensor = table.tensor()?;
        for (&token, out) in self.batch.tokens.iter().zip(out.0.chunks_exact_mut(cols)) {
            tensor.dequantize_row(u64::from(token), out)?;
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
        layer: usize,
        q: &mut Buffer,
    ) -> Result<()> {
        let linears = [&op.q, &op.k, &op.v];
        let mut views = Vec::with_capacity(3);
        for linear in linears {
            views.push(linear.weight.view(self.exact)?);
        }
        let n = self.rows();
        self.take_normed(x, &op.norm, &views, None);

        let q_dim = views[0].rows();
        let kv_dim = views[1].rows();
        let (mut keys, mut values) = (
            std::mem::take(&mut self.keys),
            std::mem::take(&mut self.values),
        );
        keys.resize(n * kv_dim, 0.0);
        values.resize(n * kv_dim, 0.0);
        let targets = [
            Parts::new(&mut q.0),
            Parts::new(&mut keys),
            Parts::new(&mut values),
        ];
        let widths = [q_dim, kv_dim, kv_dim];
        let biases = linears.map(bias);
        self.products(&views, n, |view, rows, products| {
            for (at, products) in products.iter().enumerate() {
                let start = at * widths[view];
                // SAFETY: a tile's columns of a row are written by one thread.
                let out = unsafe { targets[view].get(start + rows.start..start + rows.end) };
                for ((out, &product), row) in out.iter_mut().zip(products).zip(rows.clone()) {
                    *out = biased(product, biases[view], row);
                }
            }
        });

        match &mut cache.store {
            Store::Half { .. } => {
                self.rotate_and_store::<u16>(op, cache, layer, q, &mut keys, &values)
            }
            Store::Single { .. } => {
                self.rotate_and_store::<f32>(op, cache, layer, q, &mut keys, &values)
            }
        }
        (self.keys, self.values) = (keys, values);
        Ok(())
    }

    fn attend(
        &mut self,
        q: &Buffer,
        cache: &Cache,
        layer: usize,
        heads: Heads,
        out: &mut Buffer,
    ) -> Result<()> {
        match &cache.store {
            Store::Half { keys, values } => {
                self.attend_over(q, cache, keys, values, layer, heads, out)
            }
            Store::Single { keys, values } => {
                self.attend_over(q, cache, keys, values, layer, heads, out)
            }
        }
        Ok(())
    }

    fn linear_add(
        &mut self,
        linear: Linear<'_, Self>,
        input: &Buffer,
        x: &mut Buffer,
    ) -> Result<()> {
        let views = [linear.weight.view(self.exact)?];
        let (width, cols) = Self::shape(linear.weight);
        let n = self.rows();
        let Self {
            level,
            pool,
            input: to,
            ..
        } = self;
        to.fill(*level, pool, (n, cols), &views, |row, _| {
            Some(&input.0[row * cols..(row + 1) * cols])
        });
        let x = Parts::new(&mut x.0);
        let bias = bias(&linear);
        self.products(&views, n, |_, rows, products| {
            for (at, products) in products.iter().enumerate() {
                // SAFETY: a tile's columns of a row are written by one thread.
                let x = unsafe { x.get(at * width + rows.start..at * width + rows.end) };
                for ((x, &product), row) in x.iter_mut().zip(products).zip(rows.clone()) {
                    *x += biased(product, bias, row);
                }
            }
        });
        Ok(())
    }

    fn norm_gate_up(
        &mut self,
        x: &Buffer,
        norm: Norm<'_, Self>,
        gate: Linear<'_, Self>,
        up: Linear<'_, Self>,
        out: &mut Buffer,
    ) -> Result<()> {
        let views = [gate.weight.view(self.exact)?, up.weight.view(self.exact)?];
        let n = self.rows();
        self.take_normed(x, &norm, &views, None);
        let width = views[0].rows();
        let tiles = views[0].tiles();
        let out = Parts::new(&mut out.0);
        let biases = [bias(&gate), bias(&up)];
        let Self {
            level,
            pool,
            input,
            scratch,
            ..
        } = self;
        let level = *level;
        let scratch = Parts::new(scratch);
        let grain = grain(2 * tiles, pool.threads());
        pool.for_ranges(tiles, grain.div_ceil(2), |thread, range| {
            // SAFETY: one thread has one number.
            let scratch = unsafe { &mut scratch.get(thread..thread + 1)[0] };
            for tile in range {
                let rows = views[0].tile_rows(tile);
                for (view, bias) in views.iter().zip(biases).rev() {
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
                float::silu_mul(level, &mut scratch.out, &scratch.second);
                for (at, products) in scratch.out.iter().enumerate() {
                    let start = at * width;
                    // SAFETY: a tile's columns of a row are written by one thread.
                    let out = unsafe { out.get(start + rows.start..start + rows.end) };
                    out.copy_from_slice(&products[..rows.len()]);
                }
            }
        });
        Ok(())
    }

    fn norm_head(
        &mut self,
        x: &Buffer,
        norm: Norm<'_, Self>,
        head: Linear<'_, Self>,
        logits: &mut Buffer,
    ) -> Result<()> {
        let views = [head.weight.view(self.exact)?];
        let outputs = std::mem::take(&mut self.batch.outputs);
        self.take_normed(x, &norm, &views, Some(&outputs));
        let width = views[0].rows();
        let bias = bias(&head);
        let logits = Parts::new(&mut logits.0);
        self.products(&views, outputs.len(), |_, rows, products| {
            for (at, products) in products.iter().enumerate() {
                let start = at * width;
                // SAFETY: a tile's columns of a row are written by one thread.
                let logits = unsafe { logits.get(start + rows.start..start + rows.end) };
                for ((logit, &product), row) in logits.iter_mut().zip(products).zip(rows.clone()) {
                    *logit = biased(product, bias, row);
                }
            }
        });
        self.batch.outputs = outputs;
        Ok(())
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
                row.u,
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

impl Cpu {
    /// Makes the normed rows of `x`, all or those listed, the input of `views`.
    fn take_normed(
        &mut self,
        x: &Buffer,
        norm: &Norm<'_, Self>,
        views: &[View<'_>],
        rows: Option<&[usize]>,
    ) {
        let n = rows.map_or(self.batch.tokens.len(), <[_]>::len);
        let cols = norm.weight.0.len();
        let Self {
            level, pool, input, ..
        } = self;
        let level = *level;
        input.fill(level, pool, (n, cols), views, |row, out| {
            let row = rows.map_or(row, |rows| rows[row]);
            let x = &x.0[row * cols..(row + 1) * cols];
            float::rms_norm(level, x, &norm.weight.0, norm.eps, out);
            None
        });
    }

    /// Rotates queries and keys, and writes keys and values to the cache.
    fn rotate_and_store<E: Stored>(
        &mut self,
        op: &Qkv<'_, Self>,
        cache: &mut Cache,
        layer: usize,
        q: &mut Buffer,
        keys: &mut [f32],
        values: &[f32],
    ) {
        let Heads {
            heads,
            kv_heads,
            head_dim,
            ..
        } = op.heads;
        let (q_dim, kv_dim) = (heads * head_dim, kv_heads * head_dim);
        let padded = cache::block_len(head_dim).1 / BLOCK_TOKENS;
        let Self {
            pool,
            batch,
            places,
            ..
        } = self;
        let blocks: Vec<usize> = places
            .iter()
            .map(|&(span, position)| batch.spans[span].blocks[position / BLOCK_TOKENS])
            .map(|block| cache.block(layer, block, 0))
            .collect();
        let (key_cells, value_cells) = E::cells(&mut cache.store);
        let q = Parts::new(&mut q.0);
        let keys = Parts::new(keys);
        let key_cells = Parts::new(key_cells);
        let value_cells = Parts::new(value_cells);
        let (key_len, value_len) = cache::block_len(head_dim);
        pool.for_ranges(places.len(), 8, |_, range| {
            for row in range {
                let position = places[row].1;
                let pairs = rope_pairs(&op.rope, position);
                // SAFETY: a row of the batch, and its token's cells, belong to one thread.
                unsafe {
                    let q = q.get(row * q_dim..(row + 1) * q_dim);
                    let keys = keys.get(row * kv_dim..(row + 1) * kv_dim);
                    for head in q.chunks_exact_mut(head_dim) {
                        rotate(head, op.rope.layout, pairs);
                    }
                    let token = position % BLOCK_TOKENS;
                    let values = &values[row * kv_dim..(row + 1) * kv_dim];
                    let both = keys
                        .chunks_exact_mut(head_dim)
                        .zip(values.chunks_exact(head_dim));
                    for (head, (key, value)) in both.enumerate() {
                        rotate(key, op.rope.layout, pairs);
                        let block = blocks[row] + head;
                        for (d, &x) in key.iter().enumerate() {
                            let at = block * key_len + d * BLOCK_TOKENS + token;
                            key_cells.get(at..at + 1)[0] = E::from_f32(x);
                        }
                        let at = block * value_len + token * padded;
                        let cells = value_cells.get(at..at + head_dim);
                        for (cell, &x) in cells.iter_mut().zip(value) {
                            *cell = E::from_f32(x);
                        }
                    }
                }
            }
        });
    }

    /// Attention with the cache's elements at hand.
    fn attend_over<E: Element>(
        &mut self,
        q: &Buffer,
        cache: &Cache,
        keys: &[E],
        values: &[E],
        layer: usize,
        heads: Heads,
        out: &mut Buffer,
    ) {
        let Heads {
            heads: n_heads,
            kv_heads,
            head_dim,
            ..
        } = heads;
        let (q_dim, group_dim) = (n_heads * head_dim, n_heads / kv_heads * head_dim);
        let Self {
            level,
            pool,
            batch,
            places,
            partials,
            blocks,
            ..
        } = self;
        let level = *level;
        blocks.resize_with(batch.spans.len(), Vec::new);
        for (span, blocks) in batch.spans.iter().zip(blocks.iter_mut()) {
            blocks.clear();
            blocks.extend(
                span.blocks
                    .iter()
                    .map(|&block| cache.block(layer, block, 0)),
            );
        }
        // Few rows over long contexts: several threads share a row, a part of the context each.
        let jobs = places.len() * kv_heads;
        let longest = places
            .iter()
            .map(|place| place.1 / BLOCK_TOKENS + 1)
            .max()
            .unwrap_or(1);
        let wanted = if jobs >= 4 * pool.threads() {
            1
        } else {
            4 * pool.threads() / jobs.max(1)
        };
        let splits = wanted.min(longest / SPLIT_BLOCKS).max(1);
        partials.resize_with(
            partials.len().max(jobs * splits).max(pool.threads()),
            Partial::default,
        );
        let out = Parts::new(&mut out.0);
        let shared = Parts::new(partials);
        pool.for_ranges(
            jobs * splits,
            grain(jobs * splits, pool.threads()),
            |thread, range| {
                let mut numbers = Vec::new();
                for job in range {
                    let (split, row, kv_head) = (
                        job % splits,
                        job / splits / kv_heads,
                        job / splits % kv_heads,
                    );
                    let (span, position) = places[row];
                    let all = position / BLOCK_TOKENS + 1;
                    let first = all * split / splits;
                    let last = all * (split + 1) / splits;
                    // SAFETY: a job's number, or without splits a thread's, is used by one thread.
                    let partial = unsafe {
                        let at = if splits == 1 { thread } else { job };
                        &mut shared.get(at..at + 1)[0]
                    };
                    if first == last {
                        partial.max.clear();
                        continue;
                    }
                    numbers.clear();
                    numbers.extend(
                        blocks[span][first..last]
                            .iter()
                            .map(|block| block + kv_head),
                    );
                    let start = row * q_dim + kv_head * group_dim;
                    let tokens = (position + 1).min(last * BLOCK_TOKENS) - first * BLOCK_TOKENS;
                    let q = &q.0[start..start + group_dim];
                    cache::attend(
                        level,
                        &Job {
                            keys,
                            values,
                            heads,
                            q,
                            blocks: &numbers,
                            tokens,
                        },
                        partial,
                    );
                    if splits == 1 {
                        // SAFETY: one job writes these heads of this row.
                        partial.finish(head_dim, unsafe { out.get(start..start + group_dim) });
                    }
                }
            },
        );
        if splits > 1 {
            for (job, parts) in partials[..jobs * splits]
                .chunks_exact_mut(splits)
                .enumerate()
            {
                let start = job / kv_heads * q_dim + job % kv_heads * group_dim;
                // SAFETY: the threads are done with it.
                let out = unsafe { out.get(start..start + group_dim) };
                let mut parts = parts.iter_mut().filter(|p| !p.max.is_empty());
                if let Some(total) = parts.next() {
                    parts.for_each(|part| total.merge(part));
                    total.finish(head_dim, out);
                }
            }
        }
    }
}

/// Blocks of context that are worth a thread's turn.
const SPLIT_BLOCKS: usize = 4;

/// Elements of one of a cache's kinds.
trait Stored: Element {
    /// The keys and the values of a cache of this kind; empty for another.
    fn cells(store: &mut Store) -> (&mut [Self], &mut [Self]);
}

impl Stored for u16 {
    fn cells(store: &mut Store) -> (&mut [u16], &mut [u16]) {
        match store {
            Store::Half { keys, values } => (keys, values),
            Store::Single { .. } => (&mut [], &mut []),
        }
    }
}

impl Stored for f32 {
    fn cells(store: &mut Store) -> (&mut [f32], &mut [f32]) {
        match store {
            Store::Single { keys, values } => (keys, values),
            Store::Half { .. } => (&mut [], &mut []),
        }
    }
}
