//! Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786): norms around each part, gated GELU,
//! embeddings scaled by the root of their length, and layers that see a sliding window between layers
//! that see everything.
//!
//! Gemma's norms multiply by `1 + weight`; in GGUF files the 1 is already added.

use super::{Blueprint, HeadNorms, LayerPlan, Norms, alternating};
use crate::device::{Activation, RopeLayout};
use crate::error::Result;
use crate::model::config::Shape;
use crate::model::keys::Keys;
use crate::model::rope::Rotation;

fn common(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    Ok(Blueprint {
        norms: Norms::Around,
        activation: Activation::Gelu,
        embedding_scale: (shape.embedding as f32).sqrt(),
        logit_cap: keys.positive_if_any("final_logit_softcapping")?,
        ..Blueprint::common(keys, shape, RopeLayout::Halves)?
    })
}

/// The 27B models scale their scores by the width of a head that the embedding divided evenly would give;
/// files do not say so.
fn attention_scale(shape: &Shape, layers_of_27b: usize) -> f32 {
    let width = if shape.layers == layers_of_27b {
        shape.embedding / shape.heads
    } else {
        shape.head_dim
    };
    1.0 / (width as f32).sqrt()
}

/// Scores and logits are capped; every other layer sees a window, the first among them.
pub(super) fn gemma2(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let local = LayerPlan {
        window: Some(keys.required("attention.sliding_window", usize::MAX)?),
        ..LayerPlan::FULL
    };
    Ok(Blueprint {
        attention_scale: attention_scale(shape, 46),
        soft_cap: keys.positive_if_any("attn_logit_softcapping")?,
        layers: alternating(shape.layers, local, |i| i % 2 == 0),
        ..common(keys, shape)?
    })
}

/// Queries and keys are normed; five layers of six see a window, and have a rotation of their own.
pub(super) fn gemma3(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let local = LayerPlan {
        window: Some(keys.required("attention.sliding_window", usize::MAX)?),
        rotation: Some(1),
    };
    let blueprint = common(keys, shape)?;
    let base = keys.positive_or("rope.freq_base_swa", 10_000.0)?;
    Ok(Blueprint {
        attention_scale: attention_scale(shape, 62),
        head_norms: Some(HeadNorms::Head),
        rotations: vec![blueprint.rotations[0].clone(), Rotation::plain(base)],
        layers: alternating(shape.layers, local, |i| (i + 1) % 6 != 0),
        ..blueprint
    })
}
