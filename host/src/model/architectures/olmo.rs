//! OLMo 2 (arXiv:2501.00656): norms after each part, queries and keys normed over all heads together.
//! OLMo 3 is the same with a sliding window in three layers of four. OLMoE (arXiv:2409.02060): norms before
//! each part, experts whose weights are not scaled to add up to 1.

use super::{Blueprint, ExpertPlan, HeadNorms, LayerPlan, Norms, alternating};
use crate::device::RopeLayout;
use crate::error::Result;
use crate::model::config::Shape;
use crate::model::keys::Keys;
use crate::model::rope::Rotation;

pub(super) fn olmo2(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let mut blueprint = Blueprint {
        norms: Norms::After,
        head_norms: Some(HeadNorms::Row),
        ..Blueprint::common(keys, shape, RopeLayout::Halves)?
    };
    if let Some(window) = keys.nonzero("attention.sliding_window", usize::MAX)? {
        // What stretches full attention over longer contexts leaves the windows as they were.
        blueprint
            .rotations
            .push(Rotation::plain(blueprint.rotations[0].base));
        let local = LayerPlan {
            window: Some(window),
            rotation: Some(1),
        };
        blueprint.layers = alternating(shape.layers, local, |i| (i + 1) % 4 != 0);
    }
    Ok(blueprint)
}

pub(super) fn olmoe(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let blueprint = Blueprint::common(keys, shape, RopeLayout::Halves)?;
    Ok(Blueprint {
        head_norms: Some(HeadNorms::Row),
        experts: blueprint.experts.map(|plan| ExpertPlan {
            renormalise: false,
            ..plan
        }),
        ..blueprint
    })
}
