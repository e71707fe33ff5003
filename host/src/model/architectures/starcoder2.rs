//! StarCoder 2 (arXiv:2402.19173): LayerNorm, biases everywhere, GELU without a gate.

use super::{Blueprint, Gate, LayerPlan};
use crate::device::{Activation, RopeLayout};
use crate::error::Result;
use crate::model::config::Shape;
use crate::model::keys::Keys;

pub(super) fn describe(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let window = keys.nonzero("attention.sliding_window", usize::MAX)?;
    Ok(Blueprint {
        qkv_bias: true,
        gate: Gate::None,
        activation: Activation::Gelu,
        layers: vec![
            LayerPlan {
                window,
                ..LayerPlan::FULL
            };
            shape.layers
        ],
        ..Blueprint::layer_normed(keys, shape, RopeLayout::Halves)?
    })
}
