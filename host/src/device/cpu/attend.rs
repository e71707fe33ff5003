//! Attention: norms and rotation of queries and keys, the cache's writes, and rows and heads shared out
//! over threads and merged.

use super::cache::{self, Blocks, Cache, Job, Partial, Store};
use super::pool::Parts;
use super::simd::Level;
use super::{Buffer, Cpu, grain, norm_row};
use crate::device::{Attention, BLOCK_TOKENS, CachePlace, HeadNorm, Heads, Qkv, Rope, RopeLayout};

/// What attention needs between two steps, kept from one use to the next.
#[derive(Default)]
pub(super) struct Scratch {
    partials: Vec<Partial>,
    /// Block numbers of each span, in the cache's own count.
    blocks: Vec<Vec<usize>>,
}

/// Blocks of context that are worth a thread's turn.
const SPLIT_BLOCKS: usize = 4;

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

/// The pairs of a position, in a sequence that is to come to `horizon` tokens.
fn rope_pairs<'a>(rope: &Rope<'a, Cpu>, position: usize, horizon: usize) -> &'a [f32] {
    let table = match rope.long {
        Some((long, above)) if horizon > above => long,
        _ => rope.table,
    };
    &table.0[position * rope.dims..(position + 1) * rope.dims]
}

/// Norms a row of heads, or each of its heads.
fn norm_heads(level: Level, op: &HeadNorm<'_, Cpu>, row: &mut [f32]) {
    let weights = op.norm.weight.0.len();
    let mut whole = vec![0.0; op.len];
    for (i, part) in row.chunks_exact_mut(op.len).enumerate() {
        let first = i * op.len % weights;
        norm_row(level, &op.norm, part, first..first + op.len, &mut whole);
        part.copy_from_slice(&whole);
    }
}

impl Cpu {
    /// Norms and rotates queries and keys, and writes keys and values to the cache.
    pub(super) fn rotate_and_store(
        &mut self,
        op: &Qkv<'_, Self>,
        cache: &mut Cache,
        place: CachePlace,
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
        let Self {
            level,
            pool,
            batch,
            places,
            ..
        } = self;
        let level = *level;
        let blocks: Vec<usize> = places
            .iter()
            .map(|&(span, at)| batch.spans[span].block(at / BLOCK_TOKENS, place.part))
            .map(|block| cache.block(place, block, 0))
            .collect();
        let writer = cache.writer();
        let q = Parts::new(&mut q.0);
        let keys = Parts::new(keys);
        pool.for_ranges(places.len(), 8, |_, range| {
            for row in range {
                let (span, position) = places[row];
                let span = &batch.spans[span];
                let horizon = span.horizon.max(span.past + span.len);
                // SAFETY: a row of the batch belongs to one thread.
                let (q, keys) = unsafe {
                    (
                        q.get(row * q_dim..(row + 1) * q_dim),
                        keys.get(row * kv_dim..(row + 1) * kv_dim),
                    )
                };
                for (norm, row) in [(&op.q_norm, &mut *q), (&op.k_norm, &mut *keys)] {
                    if let Some(norm) = norm {
                        norm_heads(level, norm, row);
                    }
                }
                if let Some(rope) = &op.rope {
                    let pairs = rope_pairs(rope, position, horizon);
                    let heads = q.chunks_exact_mut(head_dim);
                    for head in heads.chain(keys.chunks_exact_mut(head_dim)) {
                        rotate(head, rope.layout, pairs);
                    }
                }
                let values = &values[row * kv_dim..(row + 1) * kv_dim];
                let both = keys
                    .chunks_exact(head_dim)
                    .zip(values.chunks_exact(head_dim));
                for (head, (key, value)) in both.enumerate() {
                    // SAFETY: a row's token belongs to one thread.
                    unsafe { writer.put(blocks[row] + head, position % BLOCK_TOKENS, key, value) };
                }
            }
        });
    }

    pub(super) fn attend_over(
        &mut self,
        q: &Buffer,
        cache: &Cache,
        place: CachePlace,
        op: &Attention<'_, Self>,
        out: &mut Buffer,
    ) {
        let blocks = &mut self.attention.blocks;
        blocks.resize_with(self.batch.spans.len(), Vec::new);
        for (span, blocks) in self.batch.spans.iter().zip(blocks.iter_mut()) {
            blocks.clear();
            blocks.extend(
                (0..(span.past + span.len).div_ceil(BLOCK_TOKENS))
                    .map(|index| cache.block(place, span.block(index, place.part), 0)),
            );
        }
        match &cache.store {
            Store::Half(store) => self.attend_in(q, store, op, out),
            Store::Single(store) => self.attend_in(q, store, op, out),
            Store::Quantised(store) => self.attend_in(q, store, op, out),
        }
    }

    fn attend_in<B: Blocks>(
        &mut self,
        q: &Buffer,
        store: &B,
        op: &Attention<'_, Self>,
        out: &mut Buffer,
    ) {
        let Heads {
            heads: n_heads,
            kv_heads,
            head_dim,
            scale,
        } = op.heads;
        let group = n_heads / kv_heads;
        let (q_dim, group_dim) = (n_heads * head_dim, group * head_dim);
        let Self {
            level,
            pool,
            places,
            attention: Scratch { partials, blocks },
            ..
        } = self;
        let level = *level;
        // Blocks that a row sees, and tokens of the first that it does not.
        let seen = |position: usize| {
            let first = op.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let blocks = first / BLOCK_TOKENS..position / BLOCK_TOKENS + 1;
            (blocks, first % BLOCK_TOKENS)
        };
        let sinks = |kv_head: usize| {
            op.sinks
                .map(|sinks| &sinks.0[kv_head * group..(kv_head + 1) * group])
        };
        // Few rows over long contexts: several threads share a row, a part of the context each.
        let jobs = places.len() * kv_heads;
        let longest = places.iter().map(|place| seen(place.1).0.len()).max();
        let wanted = if jobs >= 4 * pool.threads() {
            1
        } else {
            4 * pool.threads() / jobs.max(1)
        };
        let splits = wanted.min(longest.unwrap_or(1) / SPLIT_BLOCKS).max(1);
        partials.resize_with(
            partials.len().max(jobs * splits).max(pool.threads()),
            Partial::default,
        );
        let out = Parts::new(&mut out.0);
        let shared = Parts::new(partials);
        let grain = grain(jobs * splits, pool.threads());
        pool.for_ranges(jobs * splits, grain, |thread, range| {
            let mut numbers = Vec::new();
            for job in range {
                let (split, row, kv_head) = (
                    job % splits,
                    job / splits / kv_heads,
                    job / splits % kv_heads,
                );
                let (span, position) = places[row];
                let (all, skip) = seen(position);
                let first = all.start + all.len() * split / splits;
                let last = all.start + all.len() * (split + 1) / splits;
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
                cache::attend(
                    level,
                    &Job {
                        store,
                        head_dim,
                        scale,
                        soft_cap: op.soft_cap.unwrap_or(0.0),
                        q: &q.0[start..start + group_dim],
                        blocks: &numbers,
                        skip: if first == all.start { skip } else { 0 },
                        tokens: (position + 1).min(last * BLOCK_TOKENS) - first * BLOCK_TOKENS,
                    },
                    partial,
                );
                if splits == 1 {
                    // SAFETY: one job writes these heads of this row.
                    let out = unsafe { out.get(start..start + group_dim) };
                    partial.finish(head_dim, sinks(kv_head), out);
                }
            }
        });
        if splits > 1 {
            for (job, parts) in partials[..jobs * splits]
                .chunks_exact_mut(splits)
                .enumerate()
            {
                let kv_head = job % kv_heads;
                let start = job / kv_heads * q_dim + kv_head * group_dim;
                // SAFETY: the threads are done with it.
                let out = unsafe { out.get(start..start + group_dim) };
                let mut parts = parts.iter_mut().filter(|p| !p.max.is_empty());
                if let Some(total) = parts.next() {
                    parts.for_each(|part| total.merge(part));
                    total.finish(head_dim, sinks(kv_head), out);
                }
            }
        }
    }
}
