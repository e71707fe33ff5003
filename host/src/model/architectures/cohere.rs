//! Command R and Command R7B (arXiv:2504.00698): LayerNorm without bias, both parts of a block side by side
//! behind one norm, logits scaled; the newer ones see a window in three layers of four, and rotate only
//! there.

use super::{Blueprint, HeadNorms, LayerPlan};
use crate::device::RopeLayout;
use crate::error::Result;
use crate::model::config::Shape;
use crate::model::keys::Keys;

pub(super) fn command_r(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let normed = keys.has_tensor("blk.0.attn_q_norm.weight");
    Ok(Blueprint {
        parallel: true,
        head_norms: normed.then_some(HeadNorms::Head),
        logit_scale: keys.positive_or("logit_scale", 1.0)?,
        ..Blueprint::layer_normed(keys, shape, RopeLayout::Interleaved)?
    })
}

pub(super) fn cohere2(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let window = Some(keys.required("attention.sliding_window", usize::MAX)?);
    let layers = (0..shape.layers).map(|i| match (i + 1) % 4 {
        0 => LayerPlan {
            window: None,
            rotation: None,
        },
        _ => LayerPlan {
            window,
            rotation: Some(0),
        },
    });
    Ok(Blueprint {
        layers: layers.collect(),
        ..command_r(keys, shape)?
    })
}
