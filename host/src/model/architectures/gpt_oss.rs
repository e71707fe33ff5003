//! gpt-oss (arXiv:2508.10925): experts with biases and a clamped activation, attention sinks, a sliding
//! window in every other layer, YaRN.

use super::{Blueprint, LayerPlan, alternating};
use crate::device::{Activation, RopeLayout};
use crate::error::Result;
use crate::model::config::Shape;
use crate::model::keys::Keys;
use crate::model::rope::Scaling;

pub(super) fn describe(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let local = LayerPlan {
        window: Some(keys.required("attention.sliding_window", usize::MAX)?),
        ..LayerPlan::FULL
    };
    let mut blueprint = Blueprint {
        qkv_bias: true,
        // Before the experts, whatever its name.
        feed_forward_norm: "post_attention_norm",
        sinks: true,
        activation: Activation::ClampedSwish,
        layers: alternating(shape.layers, local, |i| i % 2 == 0),
        ..Blueprint::common(keys, shape, RopeLayout::Halves)?
    };
    // The published model's ramp does not end at whole pairs; files do not say so.
    if let Scaling::Yarn { truncate, .. } = &mut blueprint.rotations[0].scaling {
        *truncate = false;
    }
    if blueprint.experts.is_none() {
        return Err(keys.bad(format!(
            "{} is missing or 0, expected the number of experts",
            keys.name("expert_count")
        )));
    }
    Ok(blueprint)
}
