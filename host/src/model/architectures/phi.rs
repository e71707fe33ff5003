//! Phi-2 (LayerNorm, both parts of a block side by side) and Phi-3 (arXiv:2404.14219: the common block
//! with joined matrices and, for long contexts, LongRoPE).

use super::{Blueprint, Gate, LayerPlan, Matrices};
use crate::device::{Activation, RopeLayout};
use crate::error::Result;
use crate::model::config::Shape;
use crate::model::keys::Keys;

pub(super) fn phi2(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let joined = keys.has_tensor("blk.0.attn_qkv.weight");
    Ok(Blueprint {
        parallel: true,
        qkv: if joined {
            Matrices::Joined
        } else {
            Matrices::Separate
        },
        gate: Gate::None,
        activation: Activation::Gelu,
        ..Blueprint::layer_normed(keys, shape, RopeLayout::Halves)?
    })
}

pub(super) fn phi3(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let joined = keys.has_tensor("blk.0.attn_qkv.weight");
    let window = keys.nonzero("attention.sliding_window", usize::MAX)?;
    Ok(Blueprint {
        qkv: if joined {
            Matrices::Joined
        } else {
            Matrices::Separate
        },
        gate: Gate::Present(Matrices::Joined),
        layers: vec![
            LayerPlan {
                // One that holds the whole context hides nothing.
                window: window.filter(|&w| w < shape.context),
                ..LayerPlan::FULL
            };
            shape.layers
        ],
        ..Blueprint::common(keys, shape, RopeLayout::Halves)?
    })
}
