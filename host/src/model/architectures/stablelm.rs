//! StableLM 2 (arXiv:2402.17834): LayerNorm, rotation of a part of each head; the 12B model puts both
//! parts of a block side by side and norms queries and keys head by head.

use super::{Blueprint, HeadNorms};
use crate::device::RopeLayout;
use crate::error::Result;
use crate::model::config::Shape;
use crate::model::keys::Keys;

pub(super) fn describe(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let normed = keys.has_tensor("blk.0.attn_q_norm.weight");
    Ok(Blueprint {
        parallel: keys.flag("use_parallel_residual")?,
        head_norms: normed.then_some(HeadNorms::Head),
        ..Blueprint::layer_normed(keys, shape, RopeLayout::Halves)?
    })
}
