//! The paged KV cache and causal attention over it.
//!
//! Keys of a block of [`BLOCK_TOKENS`] tokens lie `[layer][block][kv head][element][token]`, so that the
//! scores of a block's tokens are sums over vectors of tokens and cross no lanes; values lie
//! `[layer][block][kv head][token][element]`, rows padded to whole vectors, so that their weighted sum
//! does not either. An 8-bit cache keeps rows of both, and a block is unpacked before it is read.

use super::pool::Parts;
use super::simd::{Simd, multiversion};
use crate::device::{BLOCK_TOKENS, CachePlace, CacheShape, CacheType};
use std::ops::Range;

/// Value rows are padded to a multiple of this, the most lanes of any vector.
const PAD: usize = 16;

/// Elements to a scale of an 8-bit cache.
const UNIT: usize = 32;

/// Keys and values of every layer.
pub struct Cache {
    pub(super) shape: CacheShape,
    pub(super) store: Store,
}

/// The elements of a [`Cache`].
pub(super) enum Store {
    /// IEEE halves.
    Half(Plain<u16>),
    Single(Plain<f32>),
    Quantised(Rows),
}

/// Keys and values as they are.
pub(super) struct Plain<E> {
    keys: Vec<E>,
    values: Vec<E>,
}

/// Keys and values in 8 bits, `[block][token]` rows of `head_dim` integers and the f16 scales of each 32.
pub(super) struct Rows {
    keys: Vec<u8>,
    values: Vec<u8>,
    row_bytes: usize,
}

/// Elements a cache may have.
pub(super) trait Element: Copy + Send + Sync + 'static {
    fn from_f32(x: f32) -> Self;
    /// `LANES` elements.
    ///
    /// # Safety
    /// As for [`Simd`].
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
}

impl Element for u16 {
    #[inline(always)]
    fn from_f32(x: f32) -> u16 {
        half::f16::from_f32(x).to_bits()
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u16) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load_f16(p) }
    }
}

impl Element for f32 {
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const f32) -> S::V {
        // SAFETY: the caller's.
        unsafe { S::load(p) }
    }
}

/// A store that attention reads block by block.
pub(super) trait Blocks: Sync {
    type Element: Element;

    /// Keys `[element][token]` and values `[token][element, padded]` of a block, `number` by
    /// [`Cache::block`]; `scratch` is for those that are not stored so.
    fn block<'a>(
        &'a self,
        number: usize,
        dim: usize,
        scratch: &'a mut Vec<f32>,
    ) -> (&'a [Self::Element], &'a [Self::Element]);
}

impl<E: Element> Blocks for Plain<E> {
    type Element = E;

    #[inline(always)]
    fn block<'a>(&'a self, number: usize, dim: usize, _: &'a mut Vec<f32>) -> (&'a [E], &'a [E]) {
        let (keys, values) = block_len(dim);
        (
            &self.keys[number * keys..(number + 1) * keys],
            &self.values[number * values..(number + 1) * values],
        )
    }
}

impl Blocks for Rows {
    type Element = f32;

    fn block<'a>(
        &'a self,
        number: usize,
        dim: usize,
        scratch: &'a mut Vec<f32>,
    ) -> (&'a [f32], &'a [f32]) {
        let (key_len, value_len) = block_len(dim);
        scratch.clear();
        scratch.resize(key_len + value_len, 0.0);
        let (keys, values) = scratch.split_at_mut(key_len);
        let stride = value_len / BLOCK_TOKENS;
        for token in 0..BLOCK_TOKENS {
            let at = (number * BLOCK_TOKENS + token) * self.row_bytes;
            let row = |store: &'a [u8]| unpack_row(&store[at..at + self.row_bytes], dim);
            for (d, x) in row(&self.keys).enumerate() {
                keys[d * BLOCK_TOKENS + token] = x;
            }
            for (value, x) in values[token * stride..].iter_mut().zip(row(&self.values)) {
                *value = x;
            }
        }
        (keys, values)
    }
}

/// The elements of a row of an 8-bit cache.
fn unpack_row(row: &[u8], dim: usize) -> impl Iterator<Item = f32> + '_ {
    let (quants, scales) = row.split_at(dim);
    quants
        .chunks(UNIT)
        .zip(scales.chunks_exact(2))
        .flat_map(|(quants, d)| {
            let d = half::f16::from_le_bytes([d[0], d[1]]).to_f32();
            quants.iter().map(move |&q| d * f32::from(q as i8))
        })
}

/// Writes a row of an 8-bit cache: each 32 elements share the scale `max |x| / 127`, as in Q8_0.
fn pack_row(x: &[f32], row: &mut [u8]) {
    let (quants, scales) = row.split_at_mut(x.len());
    let units = x.chunks(UNIT).zip(quants.chunks_mut(UNIT));
    for ((x, quants), scale) in units.zip(scales.chunks_exact_mut(2)) {
        let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let d = most / 127.0;
        let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
        scale.copy_from_slice(&half::f16::from_f32(d).to_le_bytes());
        for (q, x) in quants.iter_mut().zip(x) {
            *q = (x * inverse).round() as i8 as u8;
        }
    }
}

/// Writes keys and values of single tokens, from several threads.
pub(super) enum Writer<'a> {
    Half(Parts<'a, u16>, Parts<'a, u16>),
    Single(Parts<'a, f32>, Parts<'a, f32>),
    Quantised(Parts<'a, u8>, Parts<'a, u8>, usize),
}

impl Writer<'_> {
    /// Writes a head's key and value of token `token` of block `number` (see [`Cache::block`]).
    ///
    /// # Safety
    /// No other thread writes this token's.
    pub unsafe fn put(&self, number: usize, token: usize, key: &[f32], value: &[f32]) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Writer::Half(keys, values) => put_plain(keys, values, number, token, key, value),
                Writer::Single(keys, values) => put_plain(keys, values, number, token, key, value),
                Writer::Quantised(keys, values, row_bytes) => {
                    let at = (number * BLOCK_TOKENS + token) * row_bytes;
                    pack_row(key, keys.get(at..at + row_bytes));
                    pack_row(value, values.get(at..at + row_bytes));
                }
            }
        }
    }
}

/// # Safety
/// As [`Writer::put`].
unsafe fn put_plain<E: Element>(
    keys: &Parts<'_, E>,
    values: &Parts<'_, E>,
    number: usize,
    token: usize,
    key: &[f32],
    value: &[f32],
) {
    let (key_len, value_len) = block_len(key.len());
    for (d, &x) in key.iter().enumerate() {
        let at = number * key_len + d * BLOCK_TOKENS + token;
        // SAFETY: the caller's.
        let cell = unsafe { keys.get(at..at + 1) };
        cell[0] = E::from_f32(x);
    }
    let at = number * value_len + token * (value_len / BLOCK_TOKENS);
    // SAFETY: the caller's.
    let cells = unsafe { values.get(at..at + value.len()) };
    for (cell, &x) in cells.iter_mut().zip(value) {
        *cell = E::from_f32(x);
    }
}

/// Elements of one block of one KV head: of its keys, of its values.
fn block_len(head_dim: usize) -> (usize, usize) {
    (
        BLOCK_TOKENS * head_dim,
        BLOCK_TOKENS * head_dim.next_multiple_of(PAD),
    )
}

impl Cache {
    pub(super) fn new(shape: CacheShape) -> Cache {
        let blocks = shape.layers * shape.blocks + shape.ring_layers * shape.ring_blocks;
        let blocks = blocks * shape.kv_heads;
        let (keys, values) = block_len(shape.head_dim);
        let (keys, values) = (blocks * keys, blocks * values);
        // Zeroed memory is mapped when it is first written.
        let store = match shape.ty {
            CacheType::F32 => Store::Single(Plain {
                keys: vec![0.0; keys],
                values: vec![0.0; values],
            }),
            CacheType::F16 => Store::Half(Plain {
                keys: vec![0; keys],
                values: vec![0; values],
            }),
            CacheType::Q8_0 => {
                let row_bytes = shape.ty.row_bytes(shape.head_dim);
                let bytes = blocks * BLOCK_TOKENS * row_bytes;
                Store::Quantised(Rows {
                    keys: vec![0; bytes],
                    values: vec![0; bytes],
                    row_bytes,
                })
            }
        };
        Cache { shape, store }
    }

    /// The number of a block of a KV head, which is where it starts in units of blocks.
    pub(super) fn block(&self, place: CachePlace, block: u32, kv_head: usize) -> usize {
        (self.shape.first_block(place) + block as usize) * self.shape.kv_heads + kv_head
    }

    pub(super) fn writer(&mut self) -> Writer<'_> {
        match &mut self.store {
            Store::Half(s) => Writer::Half(Parts::new(&mut s.keys), Parts::new(&mut s.values)),
            Store::Single(s) => Writer::Single(Parts::new(&mut s.keys), Parts::new(&mut s.values)),
            Store::Quantised(s) => Writer::Quantised(
                Parts::new(&mut s.keys),
                Parts::new(&mut s.values),
                s.row_bytes,
            ),
        }
    }
}

/// What an attention job needs.
pub(super) struct Job<'a, B> {
    pub store: &'a B,
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Bounds them, if it is not 0.
    pub soft_cap: f32,
    /// Queries of the KV head's group, `[group][head_dim]`.
    pub q: &'a [f32],
    /// The numbers ([`Cache::block`]) of the blocks to read, in order.
    pub blocks: &'a [usize],
    /// Tokens of the first block that are not looked at.
    pub skip: usize,
    /// Tokens in the blocks, `skip` included; those after are not looked at.
    pub tokens: usize,
}

/// Weighted sums of values that still have to be divided by the sums of their weights.
#[derive(Default)]
pub(super) struct Partial {
    /// The greatest score of each head.
    pub max: Vec<f32>,
    /// The sum of `exp(score - max)`.
    pub sum: Vec<f32>,
    /// `[head][head_dim, padded]`.
    pub acc: Vec<f32>,
    q: Vec<f32>,
    weights: Vec<[f32; BLOCK_TOKENS]>,
    block: Vec<f32>,
}

impl Partial {
    /// Writes the quotients, `[head][head_dim]`; `sinks` are the heads' scores without a value.
    pub fn finish(&self, head_dim: usize, sinks: Option<&[f32]>, out: &mut [f32]) {
        let stride = head_dim.next_multiple_of(PAD);
        let heads = self
            .acc
            .chunks_exact(stride)
            .zip(out.chunks_exact_mut(head_dim));
        for (head, (acc, out)) in heads.enumerate() {
            let (mut shrink, mut sum) = (1.0, self.sum[head]);
            if let Some(sink) = sinks.map(|sinks| sinks[head]) {
                let max = self.max[head].max(sink);
                shrink = (self.max[head] - max).exp();
                sum = sum * shrink + (sink - max).exp();
            }
            for (out, acc) in out.iter_mut().zip(acc) {
                *out = acc * shrink / sum;
            }
        }
    }

    /// Adds what was summed over other tokens.
    pub fn merge(&mut self, other: &Partial) {
        let stride = self.acc.len() / self.max.len();
        for head in 0..self.max.len() {
            let max = self.max[head].max(other.max[head]);
            let own = (self.max[head] - max).exp();
            let theirs = (other.max[head] - max).exp();
            self.max[head] = max;
            self.sum[head] = self.sum[head] * own + other.sum[head] * theirs;
            let at = head * stride..(head + 1) * stride;
            for (a, b) in self.acc[at.clone()].iter_mut().zip(&other.acc[at]) {
                *a = *a * own + b * theirs;
            }
        }
    }
}

multiversion! {
    /// Attention of one row's group of query heads over the job's blocks (at least one token).
    pub(super) fn attend[B: Blocks](job: &Job<'_, B>, out: &mut Partial) = attend_generic[B]
}

#[inline(always)]
fn attend_generic<S: Simd, B: Blocks>(job: &Job<'_, B>, out: &mut Partial) {
    let dim = job.head_dim;
    let group = job.q.len() / dim;
    let stride = dim.next_multiple_of(PAD);
    assert!(job.q.len() == group * dim && job.tokens > job.skip && job.skip < BLOCK_TOKENS);
    assert!(job.blocks.len() == job.tokens.div_ceil(BLOCK_TOKENS));

    out.max.clear();
    out.max.resize(group, f32::NEG_INFINITY);
    out.sum.clear();
    out.sum.resize(group, 0.0);
    out.acc.clear();
    out.acc.resize(group * stride, 0.0);
    out.q.clear();
    out.q.extend(job.q.iter().map(|q| q * job.scale));
    out.weights.resize(group, [0.0; BLOCK_TOKENS]);

    let mut scratch = std::mem::take(&mut out.block);
    for (i, &number) in job.blocks.iter().enumerate() {
        let end = (job.tokens - i * BLOCK_TOKENS).min(BLOCK_TOKENS);
        let tokens = if i == 0 { job.skip..end } else { 0..end };
        let (keys, values) = job.store.block(number, dim, &mut scratch);
        let block = Block {
            keys,
            values,
            dim,
            tokens,
            soft_cap: job.soft_cap,
        };
        let mut head = 0;
        while head < group {
            let n = (group - head).min(4);
            match n {
                1 => block_of::<S, B::Element, 1>(&block, head, out),
                2 => block_of::<S, B::Element, 2>(&block, head, out),
                3 => block_of::<S, B::Element, 3>(&block, head, out),
                _ => block_of::<S, B::Element, 4>(&block, head, out),
            }
            head += n;
        }
    }
    out.block = scratch;
}

/// One block of one KV head.
struct Block<'a, E> {
    keys: &'a [E],
    values: &'a [E],
    dim: usize,
    /// Those to be looked at.
    tokens: Range<usize>,
    soft_cap: f32,
}

/// Adds one block's tokens for `N` heads from `head` on.
#[inline(always)]
fn block_of<S: Simd, E: Element, const N: usize>(
    block: &Block<'_, E>,
    head: usize,
    out: &mut Partial,
) {
    let Block {
        keys,
        values,
        dim,
        soft_cap,
        ..
    } = *block;
    let tokens = block.tokens.clone();
    let stride = dim.next_multiple_of(PAD);
    let q: [&[f32]; N] = std::array::from_fn(|h| &out.q[(head + h) * dim..(head + h + 1) * dim]);
    let weights = &mut out.weights[head..head + N];
    assert!(keys.len() == dim * BLOCK_TOKENS && values.len() == stride * BLOCK_TOKENS);
    // SAFETY: vectors of tokens divide BLOCK_TOKENS, vectors of elements divide `stride`; both stay
    // inside the slices whose lengths were checked. `multiversion!` checked the features.
    unsafe {
        for at in (0..BLOCK_TOKENS).step_by(2 * S::LANES) {
            let mut scores = [[S::splat(0.0); 2]; N];
            for d in 0..dim {
                let key = keys.as_ptr().add(d * BLOCK_TOKENS + at);
                let (a, b) = (E::load::<S>(key), E::load::<S>(key.add(S::LANES)));
                for (scores, q) in scores.iter_mut().zip(&q) {
                    let q = S::splat(*q.get_unchecked(d));
                    scores[0] = S::fma(q, a, scores[0]);
                    scores[1] = S::fma(q, b, scores[1]);
                }
            }
            for (weights, scores) in weights.iter_mut().zip(scores) {
                S::store(weights.as_mut_ptr().add(at), scores[0]);
                S::store(weights.as_mut_ptr().add(at + S::LANES), scores[1]);
            }
        }
        for (h, weights) in weights.iter_mut().enumerate() {
            if soft_cap != 0.0 {
                for score in weights.iter_mut() {
                    *score = soft_cap * (*score / soft_cap).tanh();
                }
            }
            weights[..tokens.start].fill(f32::NEG_INFINITY);
            weights[tokens.end..].fill(f32::NEG_INFINITY);
            let mut max = S::load(weights.as_ptr());
            for at in (S::LANES..BLOCK_TOKENS).step_by(S::LANES) {
                max = S::max(max, S::load(weights.as_ptr().add(at)));
            }
            let (old, max) = (out.max[head + h], S::reduce_max(max));
            let max = if max > old { max } else { old };
            if max > old {
                out.max[head + h] = max;
                let scale = (old - max).exp();
                out.sum[head + h] *= scale;
                let acc = out.acc.as_mut_ptr().add((head + h) * stride);
                for at in (0..stride).step_by(S::LANES) {
                    S::store(acc.add(at), S::mul(S::load(acc.add(at)), S::splat(scale)));
                }
            }
            for at in (0..BLOCK_TOKENS).step_by(S::LANES) {
                let p = weights.as_mut_ptr().add(at);
                S::store(p, S::exp(S::sub(S::load(p), S::splat(max))));
            }
            // The vector exp is not exactly 0 far below; nothing may come of what lies there.
            weights[..tokens.start].fill(0.0);
            weights[tokens.end..].fill(0.0);
            let mut sum = S::load(weights.as_ptr());
            for at in (S::LANES..BLOCK_TOKENS).step_by(S::LANES) {
                sum = S::add(sum, S::load(weights.as_ptr().add(at)));
            }
            out.sum[head + h] += S::sum(sum);
        }
        for at in (0..stride).step_by(S::LANES) {
            let acc = out.acc.as_mut_ptr().add(head * stride + at);
            let mut sums: [S::V; N] = std::array::from_fn(|h| S::load(acc.add(h * stride)));
            for token in tokens.clone() {
                let value = E::load::<S>(values.as_ptr().add(token * stride + at));
                for (sum, weights) in sums.iter_mut().zip(weights.iter()) {
                    *sum = S::fma(S::splat(*weights.get_unchecked(token)), value, *sum);
                }
            }
            for (h, sum) in sums.into_iter().enumerate() {
                S::store(acc.add(h * stride), sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::CachePart;

    /// 40 elements: a whole group and a part of one.
    #[test]
    fn eight_bits_keep_a_row_to_half_a_step() {
        let shape = CacheShape {
            layers: 1,
            blocks: 2,
            ring_layers: 1,
            ring_blocks: 1,
            kv_heads: 2,
            head_dim: 40,
            ty: CacheType::Q8_0,
        };
        let place = CachePlace {
            part: CachePart::Ring,
            layer: 0,
        };
        let mut cache = Cache::new(shape);
        let row = |seed: usize| -> Vec<f32> {
            (0..40)
                .map(|i| ((i * 7 + seed * 13) % 31) as f32 - 15.0)
                .collect()
        };
        let number = cache.block(place, 0, 1);
        for token in 0..BLOCK_TOKENS {
            // SAFETY: one thread.
            unsafe {
                cache
                    .writer()
                    .put(number, token, &row(token), &row(token + 99))
            };
        }
        let Store::Quantised(rows) = &cache.store else {
            panic!("not of 8 bits");
        };
        let mut scratch = Vec::new();
        let (keys, values) = rows.block(number, 40, &mut scratch);
        for token in 0..BLOCK_TOKENS {
            let (key, value) = (row(token), row(token + 99));
            for d in 0..40 {
                // The greatest is at most 15, a step at most 15 / 127, its f16 a thousandth off.
                let limit = 0.5 * 15.0 / 127.0 + 0.01;
                assert!((keys[d * BLOCK_TOKENS + token] - key[d]).abs() <= limit);
                assert!((values[token * 48 + d] - value[d]).abs() <= limit);
            }
        }
    }
}
