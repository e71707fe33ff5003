//! A decoder-only transformer, written once over the operations of [`Device`]; a
//! [`Blueprint`](super::architectures::Blueprint) says which parts of them a model uses.

use super::architectures::{Blueprint, HeadNorms, LayerPlan};
use super::{Config, MAX_OUTPUTS, ModelInfo, Ring, Runner};
use crate::device::{
    Adapter, Attention, BLOCK_TOKENS, Batch, CachePlace, CacheShape, Device, DeviceInfo, Experts,
    GateUp, HandOff, Head, HeadNorm, Heads, Linear, Norm, NormKind, OpTiming, Qkv, Residual, Rope,
    SampleRow,
};
use crate::error::{Error, Result};

/// A layer's weights.
pub(super) struct Layer<D: Device> {
    pub plan: LayerPlan,
    pub place: CachePlace,
    pub attention_norm: Option<NormWeights<D>>,
    pub q: Projection<D>,
    pub k: Projection<D>,
    pub v: Projection<D>,
    pub q_norm: Option<NormWeights<D>>,
    pub k_norm: Option<NormWeights<D>>,
    pub sinks: Option<D::Buffer>,
    pub output: Projection<D>,
    pub post_attention_norm: Option<NormWeights<D>>,
    /// `None` where there is none, or where it is `attention_norm`.
    pub feed_forward_norm: Option<NormWeights<D>>,
    pub feed_forward: FeedForward<D>,
    pub post_feed_forward_norm: Option<NormWeights<D>>,
}

pub(super) enum FeedForward<D: Device> {
    Dense {
        gate: Option<Projection<D>>,
        up: Projection<D>,
        down: Projection<D>,
    },
    Experts {
        router: Projection<D>,
        gate: Projection<D>,
        up: Projection<D>,
        down: Projection<D>,
    },
}

pub(super) struct NormWeights<D: Device> {
    pub weight: D::Buffer,
    pub bias: Option<D::Buffer>,
}

pub(super) struct Projection<D: Device> {
    pub weight: D::Weight,
    pub bias: Option<D::Buffer>,
    pub adapters: Vec<Adapter<D>>,
}

impl<D: Device> Projection<D> {
    fn linear(&self) -> Linear<'_, D> {
        Linear {
            weight: &self.weight,
            bias: self.bias.as_ref(),
            adapters: &self.adapters,
        }
    }
}

/// The table of a rotation; of one with other angles for long sequences, that too and above how many
/// tokens it is for.
pub(super) struct RopeTables<D: Device> {
    pub table: D::Buffer,
    pub long: Option<(D::Buffer, usize)>,
}

/// Intermediate activations of one step, a row for each of its tokens.
pub(super) struct Scratch<D: Device> {
    pub x: D::Buffer,
    pub q: D::Buffer,
    pub attended: D::Buffer,
    pub hidden: D::Buffer,
    /// [`MAX_OUTPUTS`] rows.
    pub logits: D::Buffer,
}

pub(super) struct Transformer<D: Device> {
    pub device: D,
    pub info: ModelInfo,
    pub device_info: DeviceInfo,
    pub config: Config,
    pub cache_shape: CacheShape,
    pub ring: Option<Ring>,
    /// Rows of one step at most.
    pub step_rows: usize,
    pub embedding: D::Weight,
    pub layers: Vec<Layer<D>>,
    pub output_norm: NormWeights<D>,
    /// `None` where the embedding table serves as the output matrix too.
    pub head: Option<Projection<D>>,
    pub ropes: Vec<RopeTables<D>>,
    pub cache: D::Cache,
    pub scratch: Scratch<D>,
}

impl<D: Device> Transformer<D> {
    fn check(&self, batch: &Batch) -> Result<()> {
        let bad = |what: String| Err(Error::Request(what));
        let rows = batch.tokens.len();
        if rows == 0 || rows > self.step_rows {
            let most = self.step_rows;
            return bad(format!("a step has {rows} rows, expected 1 to {most}"));
        }
        if batch.outputs.len() > MAX_OUTPUTS {
            let n = batch.outputs.len();
            return bad(format!(
                "a step wants logits of {n} rows, at most {MAX_OUTPUTS} can be had"
            ));
        }
        if let Some(id) = batch
            .tokens
            .iter()
            .find(|&&id| id as usize >= self.config.shape.vocabulary)
        {
            let limit = self.config.shape.vocabulary;
            return bad(format!(
                "token id {id} is outside the vocabulary of {limit}"
            ));
        }
        let mut next = 0;
        for span in &batch.spans {
            let end = span.past + span.len;
            if span.start != next || span.len == 0 {
                return bad(format!(
                    "a span starts at row {}, expected {next}",
                    span.start
                ));
            }
            next += span.len;
            if end > self.info.context {
                return bad(format!(
                    "a sequence would reach {end} tokens, past the context of {}; use a larger \
                     --ctx-size",
                    self.info.context
                ));
            }
            if span.blocks.len() * BLOCK_TOKENS < end
                || span
                    .blocks
                    .iter()
                    .any(|&b| b as usize >= self.cache_shape.blocks)
            {
                return bad(format!("blocks {:?} do not hold {end} tokens", span.blocks));
            }
            if let Some(ring) = self.ring {
                let needed = end.div_ceil(BLOCK_TOKENS).min(ring.len);
                let outside = |&b: &u32| b as usize >= ring.blocks;
                if span.ring.len() < needed || span.ring.iter().any(outside) {
                    return bad(format!(
                        "blocks {:?} do not hold the window of {end} tokens",
                        span.ring
                    ));
                }
            }
        }
        if next != rows || batch.outputs.iter().any(|&row| row >= rows) {
            return bad(format!("spans cover {next} of {rows} rows"));
        }
        Ok(())
    }
}

/// Makes operations of a layer's weights.
struct Parts<'a, D: Device> {
    config: &'a Config,
    ropes: &'a [RopeTables<D>],
}

impl<'a, D: Device> Parts<'a, D> {
    fn blueprint(&self) -> &'a Blueprint {
        &self.config.blueprint
    }

    fn norm(&self, weights: &'a NormWeights<D>) -> Norm<'a, D> {
        Norm {
            kind: self.blueprint().norm,
            weight: &weights.weight,
            bias: weights.bias.as_ref(),
            eps: self.blueprint().eps,
        }
    }

    fn head_norm(
        &self,
        weights: &'a Option<NormWeights<D>>,
        heads: usize,
    ) -> Option<HeadNorm<'a, D>> {
        let norm = self.norm(weights.as_ref()?);
        let len = match self.blueprint().head_norms? {
            HeadNorms::Head => self.config.shape.head_dim,
            HeadNorms::Row => heads * self.config.shape.head_dim,
        };
        Some(HeadNorm { norm, len })
    }

    fn heads(&self) -> Heads {
        let shape = &self.config.shape;
        Heads {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            scale: self.blueprint().attention_scale,
        }
    }

    fn qkv(&self, layer: &'a Layer<D>) -> Qkv<'a, D> {
        let shape = &self.config.shape;
        let rope = layer.plan.rotation.map(|i| Rope {
            table: &self.ropes[i].table,
            long: self.ropes[i]
                .long
                .as_ref()
                .map(|(table, above)| (table, *above)),
            dims: shape.rope_dims,
            layout: self.blueprint().rope_layout,
        });
        Qkv {
            norm: layer.attention_norm.as_ref().map(|n| self.norm(n)),
            q: layer.q.linear(),
            k: layer.k.linear(),
            v: layer.v.linear(),
            q_norm: self.head_norm(&layer.q_norm, shape.heads),
            k_norm: self.head_norm(&layer.k_norm, shape.kv_heads),
            rope,
            heads: self.heads(),
        }
    }

    fn attention(&self, layer: &'a Layer<D>) -> Attention<'a, D> {
        Attention {
            heads: self.heads(),
            window: layer.plan.window,
            soft_cap: self.blueprint().soft_cap,
            sinks: layer.sinks.as_ref(),
        }
    }

    fn residual(&self, norm: &'a Option<NormWeights<D>>) -> Residual<'a, D> {
        Residual {
            norm: norm.as_ref().map(|n| self.norm(n)),
            scale: self.blueprint().residual_scale,
        }
    }

    /// The norm before a layer's feed-forward part.
    fn feed_forward_norm(&self, layer: &'a Layer<D>) -> Option<Norm<'a, D>> {
        let shared = layer
            .attention_norm
            .as_ref()
            .filter(|_| self.blueprint().parallel);
        let norm = layer.feed_forward_norm.as_ref().or(shared)?;
        Some(self.norm(norm))
    }
}

impl<D: Device> Runner for Transformer<D> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn device(&self) -> &DeviceInfo {
        &self.device_info
    }

    fn cache_blocks(&self) -> usize {
        self.cache_shape.blocks
    }

    fn ring(&self) -> Option<Ring> {
        self.ring
    }

    fn long_above(&self) -> Option<usize> {
        let long = |rope: &RopeTables<D>| rope.long.as_ref().map(|(_, above)| *above);
        self.ropes.iter().find_map(long)
    }

    fn step_rows(&self) -> usize {
        self.step_rows
    }

    fn max_batch(&self) -> usize {
        D::MAX_BATCH.min(self.step_rows)
    }

    fn profile(&mut self) -> Result<Vec<OpTiming>> {
        self.device.profile()
    }

    fn hand_offs(&mut self) -> Result<Vec<HandOff>> {
        self.device.hand_offs()
    }

    fn forward(&mut self, batch: &Batch) -> Result<()> {
        self.check(batch)?;
        let Self {
            device,
            config,
            embedding,
            layers,
            output_norm,
            head,
            ropes,
            cache,
            scratch: s,
            ..
        } = self;
        let parts = Parts { config, ropes };
        let blueprint = &config.blueprint;
        device.step(batch, &mut |device: &mut D| {
            device.embed(embedding, blueprint.embedding_scale, &mut s.x)?;
            for layer in &*layers {
                let place = layer.place;
                device.norm_qkv(&s.x, &parts.qkv(layer), cache, place, &mut s.q)?;
                let gate_up = match &layer.feed_forward {
                    FeedForward::Dense { gate, up, .. } => Some(GateUp {
                        norm: parts.feed_forward_norm(layer),
                        gate: gate.as_ref().map(Projection::linear),
                        up: up.linear(),
                        activation: blueprint.activation,
                    }),
                    FeedForward::Experts { .. } => None,
                };
                // Side by side with attention, it reads what attention read.
                if blueprint.parallel
                    && let Some(op) = &gate_up
                {
                    device.norm_gate_up(&s.x, op, &mut s.hidden)?;
                }
                device.attend(&s.q, cache, place, &parts.attention(layer), &mut s.attended)?;
                let residual = parts.residual(&layer.post_attention_norm);
                device.linear_add(layer.output.linear(), &s.attended, &residual, &mut s.x)?;
                if !blueprint.parallel
                    && let Some(op) = &gate_up
                {
                    device.norm_gate_up(&s.x, op, &mut s.hidden)?;
                }
                let residual = parts.residual(&layer.post_feed_forward_norm);
                match &layer.feed_forward {
                    FeedForward::Dense { down, .. } => {
                        device.linear_add(down.linear(), &s.hidden, &residual, &mut s.x)?;
                    }
                    FeedForward::Experts {
                        router,
                        gate,
                        up,
                        down,
                    } => {
                        let Some(plan) = blueprint.experts else {
                            continue;
                        };
                        let op = Experts {
                            norm: parts.feed_forward_norm(layer),
                            router: router.linear(),
                            gate: gate.linear(),
                            up: up.linear(),
                            down: down.linear(),
                            activation: blueprint.activation,
                            count: plan.count,
                            used: plan.used,
                            renormalise: plan.renormalise,
                            residual,
                        };
                        device.experts(&op, &mut s.x)?;
                    }
                }
            }
            if !batch.outputs.is_empty() {
                let tied = Linear {
                    weight: embedding,
                    bias: None,
                    adapters: &[],
                };
                let op = Head {
                    norm: parts.norm(output_norm),
                    output: head.as_ref().map_or(tied, Projection::linear),
                    scale: blueprint.logit_scale,
                    soft_cap: blueprint.logit_cap,
                };
                device.norm_head(&s.x, &op, &mut s.logits)?;
            }
            Ok(())
        })
    }

    fn sample(&mut self, rows: &[SampleRow<'_>]) -> Result<Vec<u32>> {
        self.device
            .sample(&self.scratch.logits, self.config.shape.vocabulary, rows)
    }

    fn steps_begun(&self) -> usize {
        self.device.steps_begun()
    }

    fn hidden(&mut self, row: usize) -> Result<Vec<f32>> {
        let n = self.config.shape.embedding;
        let mut read = |buffer: &D::Buffer, at: usize| {
            let mut values = vec![0.0f32; n];
            self.device.read(buffer, at, &mut values).map(|()| values)
        };
        let x = read(&self.scratch.x, row * n)?;
        let weight = read(&self.output_norm.weight, 0)?;
        let bias = match &self.output_norm.bias {
            Some(bias) => read(bias, 0)?,
            None => vec![0.0; n],
        };
        // Once for each row of a text, so the host does it.
        let blueprint = &self.config.blueprint;
        let mean = match blueprint.norm {
            NormKind::Rms => 0.0,
            NormKind::Layer => x.iter().map(|&v| f64::from(v)).sum::<f64>() / n as f64,
        };
        let squares: f64 = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum();
        let scale = 1.0 / (squares / n as f64 + f64::from(blueprint.eps)).sqrt();
        let normed = x.iter().zip(&weight).zip(&bias);
        Ok(normed
            .map(|((&v, &w), &b)| ((f64::from(v) - mean) * scale) as f32 * w + b)
            .collect())
    }

    fn logits(&mut self, output: usize) -> Result<Vec<f32>> {
        let n = self.config.shape.vocabulary;
        let mut logits = vec![0.0; n];
        self.device
            .read(&self.scratch.logits, output * n, &mut logits)?;
        Ok(logits)
    }
}
