//! Qwen 2 and 2.5 (arXiv:2407.10671, arXiv:2412.15115): biases of Q, K and V. Qwen 3 (arXiv:2505.09388):
//! queries and keys normed head by head instead; its larger models are mixtures of experts.

use super::{Blueprint, HeadNorms};
use crate::device::RopeLayout;
use crate::error::Result;
use crate::model::config::Shape;
use crate::model::keys::Keys;

pub(super) fn qwen2(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    Ok(Blueprint {
        qkv_bias: true,
        ..Blueprint::common(keys, shape, RopeLayout::Halves)?
    })
}

pub(super) fn qwen3(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    Ok(Blueprint {
        head_norms: Some(HeadNorms::Head),
        ..Blueprint::common(keys, shape, RopeLayout::Halves)?
    })
}

/// The weights of the picked experts add up to 1.
pub(super) fn qwen3moe(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let blueprint = qwen3(keys, shape)?;
    if blueprint.experts.is_none() {
        return Err(keys.bad(format!(
            "{} is missing or 0, expected the number of experts",
            keys.name("expert_count")
        )));
    }
    Ok(blueprint)
}
