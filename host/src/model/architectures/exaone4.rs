//! EXAONE 4 (arXiv:2507.11407): norms after each part, queries and keys normed head by head; the larger
//! models see a window in three layers of four, and rotate only there.

use super::{Blueprint, HeadNorms, LayerPlan, Norms};
use crate::device::RopeLayout;
use crate::error::Result;
use crate::model::config::Shape;
use crate::model::keys::Keys;

pub(super) fn describe(keys: &Keys<'_>, shape: &Shape) -> Result<Blueprint> {
    let window = keys.nonzero("attention.sliding_window", usize::MAX)?;
    let layers = (0..shape.layers).map(|i| match (window, (i + 1) % 4) {
        (None, _) => LayerPlan::FULL,
        (Some(_), 0) => LayerPlan {
            window: None,
            rotation: None,
        },
        (window, _) => LayerPlan {
            window,
            rotation: Some(0),
        },
    });
    Ok(Blueprint {
        norms: Norms::After,
        head_norms: Some(HeadNorms::Head),
        layers: layers.collect(),
        ..Blueprint::common(keys, shape, RopeLayout::Halves)?
    })
}
