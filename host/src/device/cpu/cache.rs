//! The paged KV cache and causal attention over it.
//!
//! Keys of a block of [`BLOCK_TOKENS`] tokens lie `[layer][block][kv head][element][token]`, so that the
//! scores of a block's tokens are sums over vectors of tokens and cross no lanes; values lie
//! `[layer][block][kv head][token][element]`, rows padded to whole vectors, so that their weighted sum
//! does not either.

use super::simd::{Simd, multiversion};
use crate::device::{BLOCK_TOKENS, CacheShape, Heads};

/// Value rows are padded to a multiple of this, the most lanes of any vector.
const PAD: usize = 16;

/// Keys and values of every layer.
pub struct Cache {
    pub(super) shape: CacheShape,
    pub(super) store: Store,
}

/// The elements of a [`Cache`].
pub(super) enum Store {
    /// IEEE halves.
    Half {
        keys: Vec<u16>,
        values: Vec<u16>,
    },
    Single {
        keys: Vec<f32>,
        values: Vec<f32>,
    },
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

/// Elements of one block of one KV head: of its keys, of its values.
pub(super) fn block_len(head_dim: usize) -> (usize, usize) {
    (
        BLOCK_TOKENS * head_dim,
        BLOCK_TOKENS * head_dim.next_multiple_of(PAD),
    )
}

impl Cache {
    pub(super) fn new(shape: CacheShape, exact: bool) -> Cache {
        let (keys, values) = block_len(shape.head_dim);
        let blocks = shape.layers * shape.blocks * shape.kv_heads;
        let (keys, values) = (blocks * keys, blocks * values);
        // Zeroed memory is mapped when it is first written.
        let store = if exact {
            Store::Single {
                keys: vec![0.0; keys],
                values: vec![0.0; values],
            }
        } else {
            Store::Half {
                keys: vec![0; keys],
                values: vec![0; values],
            }
        };
        Cache { shape, store }
    }

    /// The number of a block of a KV head, which times [`block_len`] is where it starts.
    pub(super) fn block(&self, layer: usize, block: u32, kv_head: usize) -> usize {
        (layer * self.shape.blocks + block as usize) * self.shape.kv_heads + kv_head
    }
}

/// What an attention job needs.
pub(super) struct Job<'a, E> {
    pub keys: &'a [E],
    pub values: &'a [E],
    pub heads: Heads,
    /// Queries of the KV head's group, `[heads / kv_heads][head_dim]`.
    pub q: &'a [f32],
    /// The numbers ([`Cache::block`]) of the blocks to read, in order.
    pub blocks: &'a [usize],
    /// Tokens in them; those after are not looked at.
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
}

impl Partial {
    /// Writes the quotients, `[head][head_dim]`.
    pub fn finish(&self, head_dim: usize, out: &mut [f32]) {
        let stride = head_dim.next_multiple_of(PAD);
        let heads = self.acc.chunks_exact(stride).zip(&self.sum);
        for ((acc, sum), out) in heads.zip(out.chunks_exact_mut(head_dim)) {
            for (out, acc) in out.iter_mut().zip(acc) {
                *out = acc / sum;
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
    pub(super) fn attend[E: Element](job: &Job<'_, E>, out: &mut Partial) = attend_generic[E]
}

#[inline(always)]
fn attend_generic<S: Simd, E: Element>(job: &Job<'_, E>, out: &mut Partial) {
    let dim = job.heads.head_dim;
    let group = job.heads.heads / job.heads.kv_heads;
    let stride = dim.next_multiple_of(PAD);
    let (keys_len, values_len) = block_len(dim);
    assert!(job.q.len() == group * dim && job.tokens >= 1);
    assert!(job.blocks.len() == job.tokens.div_ceil(BLOCK_TOKENS));

    out.max.clear();
    out.max.resize(group, f32::NEG_INFINITY);
    out.sum.clear();
    out.sum.resize(group, 0.0);
    out.acc.clear();
    out.acc.resize(group * stride, 0.0);
    out.q.clear();
    out.q.extend(job.q.iter().map(|q| q * job.heads.scale));
    out.weights.resize(group, [0.0; BLOCK_TOKENS]);

    for (i, &block) in job.blocks.iter().enumerate() {
        let tokens = (job.tokens - i * BLOCK_TOKENS).min(BLOCK_TOKENS);
        let keys = &job.keys[block * keys_len..(block + 1) * keys_len];
        let values = &job.values[block * values_len..(block + 1) * values_len];
        let mut head = 0;
        while head < group {
            let n = (group - head).min(4);
            match n {
                1 => block_of::<S, E, 1>(keys, values, dim, tokens, head, out),
                2 => block_of::<S, E, 2>(keys, values, dim, tokens, head, out),
                3 => block_of::<S, E, 3>(keys, values, dim, tokens, head, out),
                _ => block_of::<S, E, 4>(keys, values, dim, tokens, head, out),
            }
            head += n;
        }
    }
}

/// Adds one block's tokens for `N` heads from `head` on.
#[inline(always)]
fn block_of<S: Simd, E: Element, const N: usize>(
    keys: &[E],
    values: &[E],
    dim: usize,
    tokens: usize,
    head: usize,
    out: &mut Partial,
) {
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
            weights[tokens..].fill(f32::NEG_INFINITY);
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
            weights[tokens..].fill(0.0);
            let mut sum = S::load(weights.as_ptr());
            for at in (S::LANES..BLOCK_TOKENS).step_by(S::LANES) {
                sum = S::add(sum, S::load(weights.as_ptr().add(at)));
            }
            out.sum[head + h] += S::sum(sum);
        }
        for at in (0..stride).step_by(S::LANES) {
            let acc = out.acc.as_mut_ptr().add(head * stride + at);
            let mut sums: [S::V; N] = std::array::from_fn(|h| S::load(acc.add(h * stride)));
            for token in 0..tokens {
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
