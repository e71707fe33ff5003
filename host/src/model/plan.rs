//! What a model takes in memory, said before anything is allocated.

use super::config::Shape;
use super::rope::Scaling;
use super::{Config, DEFAULT_CONTEXT, LoadOptions, MAX_OUTPUTS, Ring};
use crate::device::{BLOCK_TOKENS, CachePart, CachePlace, CacheShape, CacheType};
use crate::error::{Error, Result};
use gguf::Gguf;

/// Lengths of a row of queries, and of keys.
pub(super) fn dims(shape: &Shape) -> (usize, usize) {
    (
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    )
}

/// Memory that a model takes, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Tokens of the KV cache.
    pub context: usize,
    pub weights: u64,
    pub cache: u64,
    /// Activations, tables, and what operations need for themselves.
    pub working: u64,
}

impl Plan {
    pub fn total(&self) -> u64 {
        self.weights + self.cache + self.working
    }
}

/// Tokens that the KV cache is to hold.
///
/// # Errors
/// More than the model's own context.
pub(super) fn context(config: &Config, asked: Option<usize>) -> Result<usize> {
    let own = config.shape.context;
    match asked {
        None => Ok(own.min(DEFAULT_CONTEXT)),
        Some(n) if n >= 1 && n <= own => Ok(n),
        Some(n) => Err(Error::Request(format!(
            "--ctx-size is {n}, expected 1 to {own} (the model's own context)"
        ))),
    }
}

/// How many sequences have room for whole windows beside each other. Shorter ones take less, and more find
/// room.
const RINGS: usize = 4;

/// The KV cache of a model.
pub(super) struct CachePlan {
    pub shape: CacheShape,
    /// Of each layer.
    pub places: Vec<CachePlace>,
    pub ring: Option<Ring>,
}

impl CachePlan {
    /// `step_rows` is how many rows a step may add to a window before it is read.
    pub fn new(
        config: &Config,
        context: usize,
        options: &LoadOptions,
        step_rows: usize,
    ) -> CachePlan {
        let default = if options.exact {
            CacheType::F32
        } else {
            CacheType::F16
        };
        let blocks = context.div_ceil(BLOCK_TOKENS);
        let layers = &config.blueprint.layers;
        let widest = layers.iter().filter_map(|layer| layer.window).max();
        let ring = widest
            .map(|window| {
                // A window that begins and ends inside a block touches one more.
                let len = window.saturating_add(step_rows).div_ceil(BLOCK_TOKENS) + 1;
                Ring {
                    len,
                    blocks: len.saturating_mul(RINGS).min(blocks),
                }
            })
            .filter(|ring| ring.len < blocks);
        let (mut whole, mut windows) = (0, 0);
        let places = layers
            .iter()
            .map(|layer| {
                let (part, count) = match layer.window {
                    Some(_) if ring.is_some() => (CachePart::Ring, &mut windows),
                    _ => (CachePart::Whole, &mut whole),
                };
                *count += 1;
                CachePlace {
                    part,
                    layer: *count - 1,
                }
            })
            .collect();
        CachePlan {
            places,
            ring,
            shape: CacheShape {
                layers: whole,
                blocks,
                ring_layers: windows,
                ring_blocks: ring.map_or(0, |ring| ring.blocks),
                kv_heads: config.shape.kv_heads,
                head_dim: config.shape.head_dim,
                ty: options.cache_type.unwrap_or(default),
            },
        }
    }
}

/// Plans the memory of a model; `working` is what the device's operations need for rows of so many values,
/// in steps of `step_rows` rows.
pub(super) fn plan(
    file: &Gguf,
    config: &Config,
    cache: CacheShape,
    context: usize,
    step_rows: usize,
    working: impl Fn(usize) -> u64,
) -> Plan {
    let (shape, blueprint) = (&config.shape, &config.blueprint);
    let (q_dim, kv_dim) = dims(shape);
    let hidden = match blueprint.experts {
        Some(plan) => plan.used * (plan.feed_forward + shape.embedding),
        None => shape.feed_forward,
    };
    let widths = shape.embedding + 2 * q_dim + shape.feed_forward;
    let widest = (q_dim + 2 * kv_dim).max(hidden);
    let tables: usize = blueprint
        .rotations
        .iter()
        .map(|r| match r.scaling {
            Scaling::Long { .. } => 2,
            _ => 1,
        })
        .sum();
    Plan {
        context,
        weights: file.tensors().map(|t| t.data().len() as u64).sum(),
        cache: 2 * cache.bytes() as u64,
        working: 4
            * (step_rows * widths
                + MAX_OUTPUTS * shape.vocabulary
                + tables * context * shape.rope_dims) as u64
            + working(widest),
    }
}
