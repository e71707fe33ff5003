//! Whole operations, in one batch or several.

use super::super::testing::{Random, values};
use super::super::*;
use super::file_of;
use crate::device::{BLOCK_TOKENS, CachePart, CacheType, Heads, Rope, RopeLayout, Span};
use gguf::GgmlType;

/// One layer's shape.
#[derive(Clone, Copy)]
struct Shape {
    embedding: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    rope_dims: usize,
    layout: RopeLayout,
    ff: usize,
    vocabulary: usize,
    bias: bool,
}

const CONTEXT: usize = 320;
const LAYERS: usize = 2;

/// One layer's operations on a device and in f64, over the same numbers.
struct Rig {
    shape: Shape,
    cpu: Cpu,
    weights: Vec<Weight>,
    plain: Vec<Vec<f64>>,
    /// Of q, k, v, output, gate, up, down, head.
    bias: Vec<Vec<f32>>,
    bias_buffers: Vec<Buffer>,
    norm: Vec<f32>,
    norm_buffer: Buffer,
    table: Vec<f32>,
    table_buffer: Buffer,
    cache: Cache,
}

const NAMES: [&str; 9] = [
    "embedding",
    "q",
    "k",
    "v",
    "output",
    "gate",
    "up",
    "down",
    "head",
];
const EPS: f32 = 1e-5;

impl Rig {
    fn new(shape: Shape, ty: GgmlType, exact: bool, level: Level, threads: usize) -> Rig {
        let mut random = Random::new(42);
        let Shape {
            embedding: d,
            heads,
            kv_heads,
            head_dim,
            ff,
            vocabulary,
            ..
        } = shape;
        let (q_dim, kv_dim) = (heads * head_dim, kv_heads * head_dim);
        let sizes = [
            (d, vocabulary),
            (d, q_dim),
            (d, kv_dim),
            (d, kv_dim),
            (q_dim, d),
            (d, ff),
            (d, ff),
            (ff, d),
            (d, vocabulary),
        ];
        let mut tensors = Vec::new();
        for (name, (cols, rows)) in NAMES.into_iter().zip(sizes) {
            let data = if ty == GgmlType::F32 {
                // Sizes as a trained model's, or the softmax would have one term.
                let scale = 1.0 / (cols as f32).sqrt();
                let values = random.normals(rows * cols);
                values
                    .iter()
                    .flat_map(|w| (w * scale).to_le_bytes())
                    .collect()
            } else {
                random.weights(ty, rows * cols)
            };
            tensors.push((name, [cols as u64, rows as u64], ty, data));
        }
        let plain = tensors
            .iter()
            .map(|t| values(ty, &t.3).into_iter().map(f64::from).collect())
            .collect();
        let file = file_of(&tensors);
        let mut cpu = Cpu::with_level(Some(threads), exact, level).unwrap();
        let weights: Vec<_> = NAMES
            .iter()
            .map(|n| {
                let tensor = file.require(n).unwrap();
                let all = 0..tensor.rows() as usize;
                cpu.load(tensor, all, &file).unwrap()
            })
            .collect();
        cpu.finish_loading().unwrap();
        let bias: Vec<_> = sizes
            .iter()
            .map(|&(_, rows)| random.normals(rows))
            .collect();
        let norm = random.normals(d);
        let table: Vec<f32> = (0..CONTEXT)
            .flat_map(|p| {
                (0..shape.rope_dims / 2).flat_map(move |i| {
                    let angle = p as f32 * 0.7f32.powi(i as i32);
                    [angle.cos(), angle.sin()]
                })
            })
            .collect();
        let shape_of_cache = CacheShape {
            layers: LAYERS,
            blocks: CONTEXT / BLOCK_TOKENS,
            ring_layers: 0,
            ring_blocks: 0,
            kv_heads,
            head_dim,
            ty: if exact {
                CacheType::F32
            } else {
                CacheType::F16
            },
        };
        Rig {
            bias_buffers: bias.iter().map(|b| cpu.upload(b).unwrap()).collect(),
            norm_buffer: cpu.upload(&norm).unwrap(),
            table_buffer: cpu.upload(&table).unwrap(),
            cache: cpu.alloc_cache(shape_of_cache).unwrap(),
            shape,
            cpu,
            weights,
            plain,
            bias,
            norm,
            table,
        }
    }

    /// Embedding, one layer and the head on the device: the logits of the batch's outputs.
    fn run(&mut self, batch: &Batch, layer: usize) -> Vec<f32> {
        let Shape {
            embedding: d,
            heads,
            kv_heads,
            head_dim,
            ff,
            vocabulary,
            ..
        } = self.shape;
        let rows = batch.tokens.len();
        let Rig {
            cpu,
            weights,
            bias_buffers,
            norm_buffer,
            table_buffer,
            cache,
            shape,
            ..
        } = self;
        let linear = |i: usize| Linear {
            weight: &weights[i],
            bias: shape.bias.then_some(&bias_buffers[i]),
            adapters: &[],
        };
        let norm = || Norm {
            kind: NormKind::Rms,
            weight: norm_buffer,
            bias: None,
            eps: EPS,
        };
        let mut alloc = |n: usize| cpu.alloc(n).unwrap();
        let (mut x, mut q) = (alloc(rows * d), alloc(rows * heads * head_dim));
        let mut attended = alloc(rows * heads * head_dim);
        let (mut hidden, mut logits) = (alloc(rows * ff), alloc(batch.outputs.len() * vocabulary));
        let heads = Heads {
            heads,
            kv_heads,
            head_dim,
            scale: 0.3,
        };
        let qkv = Qkv {
            norm: Some(norm()),
            q: linear(1),
            k: linear(2),
            v: linear(3),
            q_norm: None,
            k_norm: None,
            rope: Some(Rope {
                table: table_buffer,
                long: None,
                dims: shape.rope_dims,
                layout: shape.layout,
            }),
            heads,
        };
        let attention = Attention {
            heads,
            window: None,
            soft_cap: None,
            sinks: None,
        };
        let gate_up = GateUp {
            norm: Some(norm()),
            gate: Some(linear(5)),
            up: linear(6),
            activation: Activation::Silu,
        };
        let head = Head {
            norm: norm(),
            output: linear(8),
            scale: 1.0,
            soft_cap: None,
        };
        let place = CachePlace {
            part: CachePart::Whole,
            layer,
        };
        cpu.step(batch, &mut |cpu| {
            cpu.embed(&weights[0], 2.0, &mut x)?;
            cpu.norm_qkv(&x, &qkv, cache, place, &mut q)?;
            cpu.attend(&q, cache, place, &attention, &mut attended)?;
            cpu.linear_add(linear(4), &attended, &Residual::PLAIN, &mut x)?;
            cpu.norm_gate_up(&x, &gate_up, &mut hidden)?;
            cpu.linear_add(linear(7), &hidden, &Residual::PLAIN, &mut x)?;
            cpu.norm_head(&x, &head, &mut logits)
        })
        .unwrap();
        logits.0
    }

    /// The same for a whole sequence in f64: the logits of every token.
    fn reference(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let Shape {
            embedding: d,
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.shape;
        let linear = |i: usize, x: &[f64]| -> Vec<f64> {
            self.plain[i]
                .chunks_exact(x.len())
                .zip(&self.bias[i])
                .map(|(w, &b)| {
                    let sum: f64 = w.iter().zip(x).map(|(w, x)| w * x).sum();
                    sum + if self.shape.bias { f64::from(b) } else { 0.0 }
                })
                .collect()
        };
        let norm = |x: &[f64]| -> Vec<f64> {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
            x.iter()
                .zip(&self.norm)
                .map(|(x, &w)| x * scale * f64::from(w))
                .collect()
        };
        let rope = |x: &mut [f64], position: usize| {
            let half = self.shape.rope_dims / 2;
            for head in x.chunks_exact_mut(head_dim) {
                for i in 0..half {
                    let (a, b) = match self.shape.layout {
                        RopeLayout::Interleaved => (2 * i, 2 * i + 1),
                        RopeLayout::Halves => (i, i + half),
                    };
                    let pair = &self.table[(position * half + i) * 2..][..2];
                    let (cos, sin) = (f64::from(pair[0]), f64::from(pair[1]));
                    let (u, v) = (head[a], head[b]);
                    head[a] = u * cos - v * sin;
                    head[b] = u * sin + v * cos;
                }
            }
        };
        let (mut keys, mut all_values) = (Vec::new(), Vec::new());
        let mut logits = Vec::new();
        for (position, &token) in tokens.iter().enumerate() {
            let row = &self.plain[0][token as usize * d..][..d];
            let mut x: Vec<f64> = row.iter().map(|v| 2.0 * v).collect();
            let normed = norm(&x);
            let (mut q, mut k) = (linear(1, &normed), linear(2, &normed));
            rope(&mut q, position);
            rope(&mut k, position);
            keys.push(k);
            all_values.push(linear(3, &normed));
            let mut attended = Vec::new();
            for (head, q) in q.chunks_exact(head_dim).enumerate() {
                let at = head / (heads / kv_heads) * head_dim;
                let scores: Vec<f64> = keys
                    .iter()
                    .map(|k| {
                        q.iter().zip(&k[at..]).map(|(q, k)| q * k).sum::<f64>() * 0.3f32 as f64
                    })
                    .collect();
                let max = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                for i in 0..head_dim {
                    let sum: f64 = weights
                        .iter()
                        .zip(&all_values)
                        .map(|(w, v)| w * v[at + i])
                        .sum();
                    attended.push(sum / total);
                }
            }
            for (x, y) in x.iter_mut().zip(linear(4, &attended)) {
                *x += y;
            }
            let normed = norm(&x);
            let gate = linear(5, &normed);
            let hidden: Vec<f64> = gate
                .iter()
                .zip(linear(6, &normed))
                .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                .collect();
            for (x, y) in x.iter_mut().zip(linear(7, &hidden)) {
                *x += y;
            }
            logits.push(linear(8, &norm(&x)));
        }
        logits
    }
}

fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square: f64 = got
        .iter()
        .zip(want)
        .map(|(&g, w)| (f64::from(g) - w).powi(2))
        .sum();
    (square / want.iter().map(|w| w * w).sum::<f64>()).sqrt()
}

/// Shapes with nothing round about them, one that is a real model's, one with a single head.
const SHAPES: [Shape; 3] = [
    Shape {
        embedding: 37,
        heads: 6,
        kv_heads: 2,
        head_dim: 10,
        rope_dims: 6,
        layout: RopeLayout::Interleaved,
        ff: 45,
        vocabulary: 51,
        bias: true,
    },
    Shape {
        embedding: 64,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        rope_dims: 64,
        layout: RopeLayout::Halves,
        ff: 70,
        vocabulary: 33,
        bias: false,
    },
    Shape {
        embedding: 20,
        heads: 1,
        kv_heads: 1,
        head_dim: 24,
        rope_dims: 24,
        layout: RopeLayout::Halves,
        ff: 16,
        vocabulary: 17,
        bias: true,
    },
];

fn tokens(random: &mut Random, n: usize, shape: &Shape) -> Vec<u32> {
    (0..n)
        .map(|_| random.below(shape.vocabulary) as u32)
        .collect()
}

/// Two sequences through shuffled blocks: chunks of prompt together, then tokens one by one, every
/// logit against the reference.
fn check_sequences(shape: Shape, exact: bool, level: Level, threads: usize, limit: f64) {
    let mut rig = Rig::new(shape, GgmlType::F32, exact, level, threads);
    let mut random = Random::new(3);
    // What another sequence left in the cache must not show.
    let blocks: Vec<u32> = (0..(CONTEXT / BLOCK_TOKENS) as u32).rev().collect();
    let junk = tokens(&mut random, CONTEXT, &shape);
    let outputs = vec![];
    let span = Span {
        start: 0,
        len: CONTEXT,
        past: 0,
        blocks,
        ..Span::default()
    };
    rig.run(
        &Batch {
            tokens: junk,
            spans: vec![span],
            outputs,
            ..Batch::default()
        },
        1,
    );

    let sequences = [
        tokens(&mut random, 5 * 32 + 7, &shape),
        tokens(&mut random, 75, &shape),
    ];
    let tables = [vec![7, 2, 9, 0, 4, 1], vec![3, 8, 6]];
    let references = sequences.each_ref().map(|s| rig.reference(s));
    let mut past = [0, 0];
    for lens in [[50, 1], [1, 40], [100, 30], [0, 1], [1, 1], [1, 0], [14, 2]] {
        let mut batch = Batch::default();
        let mut wanted = Vec::new();
        for i in 0..2 {
            let (start, len) = (batch.tokens.len(), lens[i]);
            if len == 0 {
                continue;
            }
            batch.tokens.extend(&sequences[i][past[i]..past[i] + len]);
            batch.spans.push(Span {
                start,
                len,
                past: past[i],
                blocks: tables[i].clone(),
                ..Span::default()
            });
            for row in (0..len).filter(|row| row % 9 == 0 || row + 1 == len) {
                batch.outputs.push(start + row);
                wanted.push(&references[i][past[i] + row]);
            }
            past[i] += len;
        }
        let logits = rig.run(&batch, 1);
        for (i, (got, want)) in logits
            .chunks_exact(shape.vocabulary)
            .zip(wanted)
            .enumerate()
        {
            let error = error(got, want);
            assert!(
                error < limit,
                "{level:?} {lens:?} output {i}: error {error}"
            );
        }
    }
    assert_eq!(past, [167, 75]);
}

#[test]
fn operations_equal_the_reference_in_exact_mode() {
    for level in Level::available() {
        for shape in SHAPES {
            check_sequences(shape, true, level, 2, 5e-6);
        }
    }
}

#[test]
fn operations_equal_the_reference_but_for_the_cache_in_halves() {
    for level in Level::available() {
        for (shape, threads) in SHAPES.into_iter().zip([1, 3, 2]) {
            check_sequences(shape, false, level, threads, 2e-3);
        }
    }
}

#[test]
fn batches_equal_separate_runs_with_quantised_weights() {
    let shape = Shape {
        embedding: 96,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        rope_dims: 32,
        layout: RopeLayout::Halves,
        ff: 160,
        vocabulary: 77,
        bias: true,
    };
    for ty in [GgmlType::Q4_1, GgmlType::Q8_0, GgmlType::F16] {
        for level in Level::available() {
            let mut rig = Rig::new(shape, ty, false, level, 2);
            let mut random = Random::new(11);
            let sequences: Vec<_> = (1..9).map(|n| tokens(&mut random, 3 * n, &shape)).collect();
            let mut together = Batch::default();
            let mut apart = Vec::new();
            for (i, sequence) in sequences.iter().enumerate() {
                let span = Span {
                    start: together.tokens.len(),
                    len: sequence.len(),
                    past: 0,
                    blocks: vec![i as u32],
                    ..Span::default()
                };
                together.tokens.extend(sequence);
                together.outputs.push(together.tokens.len() - 1);
                together.spans.push(span.clone());
                let batch = Batch {
                    tokens: sequence.clone(),
                    spans: vec![Span { start: 0, ..span }],
                    outputs: vec![sequence.len() - 1],
                    ..Batch::default()
                };
                apart.push(rig.run(&batch, 0));
            }
            let together = rig.run(&together, 0);
            for (one, all) in apart.iter().zip(together.chunks_exact(shape.vocabulary)) {
                let one: Vec<f64> = one.iter().map(|&x| f64::from(x)).collect();
                // A sum in another order may round an activation, or a half of the cache, to the next step.
                assert!(
                    error(all, &one) < 4e-4,
                    "{ty} {level:?}: {}",
                    error(all, &one)
                );
            }
        }
    }
}
