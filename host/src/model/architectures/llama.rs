//! LLaMA (arXiv:2302.13971), and what is published in its form: Llama 2 and 3 (arXiv:2407.21783, whose
//! longer contexts come as the tensor `rope_freqs`), Mistral, TinyLlama, SmolLM, and Mixtral
//! (arXiv:2401.04088), whose feed-forward parts are experts.

use super::{Blueprint, LayerPlan};
use crate::device::RopeLayout;
use crate::error::Result;
use crate::model::config::Shape;
use crate::model::keys::Keys;

/// Converters permute the rows of Q and K, so that adjacent elements are a pair.
pub(super) fn describe(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let window = keys.nonzero("attention.sliding_window", usize::MAX)?;
    Ok(Blueprint {
        layers: vec![
            LayerPlan {
                window,
                ..LayerPlan::FULL
            };
            shape.layers
        ],
        ..Blueprint::common(keys, shape, RopeLayout::Interleaved)?
    })
}

/// Seed-OSS: LLaMA with biases of Q, K and V and rows as they were. What stands before its feed-forward
/// part is named as if it stood after attention.
pub(super) fn seed_oss(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    Ok(Blueprint {
        qkv_bias: true,
        feed_forward_norm: "post_attention_norm",
        ..Blueprint::common(keys, shape, RopeLayout::Halves)?
    })
}
