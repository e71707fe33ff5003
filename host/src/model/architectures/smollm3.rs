//! SmolLM3: the common block; every fourth layer has no rotation (NoPE, arXiv:2501.18795).

use super::{Blueprint, LayerPlan, alternating};
use crate::device::RopeLayout;
use crate::error::Result;
use crate::model::config::Shape;
use crate::model::keys::Keys;

pub(super) fn describe(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let unturned = LayerPlan {
        window: None,
        rotation: None,
    };
    Ok(Blueprint {
        layers: alternating(shape.layers, unturned, |i| (i + 1) % 4 == 0),
        ..Blueprint::common(keys, shape, RopeLayout::Interleaved)?
    })
}
