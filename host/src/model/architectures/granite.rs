//! Granite 3: the common block with four constants, of embeddings, scores, residuals and logits; its MoE
//! models have experts.

use super::Blueprint;
use crate::device::RopeLayout;
use crate::error::Result;
use crate::model::config::Shape;
use crate::model::keys::Keys;

pub(super) fn describe(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let blueprint = Blueprint::common(keys, shape, RopeLayout::Interleaved)?;
    Ok(Blueprint {
        attention_scale: keys
            .positive_if_any("attention.scale")?
            .unwrap_or(blueprint.attention_scale),
        embedding_scale: keys.positive_or("embedding_scale", 1.0)?,
        residual_scale: keys.positive_or("residual_scale", 1.0)?,
        // The file's divides.
        logit_scale: 1.0 / keys.positive_or("logit_scale", 1.0)?,
        ..blueprint
    })
}
