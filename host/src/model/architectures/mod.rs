//! What each architecture's blocks are made of, a file each. The parts are shared: a [`Blueprint`] says
//! which of them a model uses, and [`super::transformer`] runs any blueprint.
//!
//! A new architecture is one file here, and its names in [`ALL`].

mod cohere;
mod exaone4;
mod gemma;
mod gpt_oss;
mod granite;
mod llama;
mod olmo;
mod phi;
mod qwen;
mod smollm3;
mod stablelm;
mod starcoder2;

use super::config::Shape;
use super::keys::Keys;
use super::rope::Rotation;
use crate::device::{Activation, NormKind, RopeLayout};
use crate::error::Result;

/// Reads a blueprint from metadata.
pub(super) type Describe = fn(&Keys<'_>, &Shape) -> Result<Blueprint>;

/// The architectures that can run, by `general.architecture`.
pub(super) const ALL: &[(&str, Describe)] = &[
    ("llama", llama::describe),
    ("qwen2", qwen::qwen2),
    ("qwen3", qwen::qwen3),
    ("qwen3moe", qwen::qwen3moe),
    ("gemma2", gemma::gemma2),
    ("gemma3", gemma::gemma3),
    ("phi2", phi::phi2),
    ("phi3", phi::phi3),
    ("gpt-oss", gpt_oss::describe),
    ("olmo2", olmo::olmo2),
    ("olmoe", olmo::olmoe),
    ("granite", granite::describe),
    ("granitemoe", granite::describe),
    ("smollm3", smollm3::describe),
    ("stablelm", stablelm::describe),
    ("starcoder2", starcoder2::describe),
    ("command-r", cohere::command_r),
    ("cohere2", cohere::cohere2),
    ("exaone4", exaone4::describe),
    ("seed_oss", llama::seed_oss),
];

/// Where a block's norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// Before attention and before the feed-forward part: `x + f(norm(x))`.
    Before,
    /// After them: `x + norm(f(x))`.
    After,
    /// Both.
    Around,
}

/// How Q, K and V, or gate and up, lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Matrices {
    /// A tensor each.
    Separate,
    /// One after the other in one tensor.
    Joined,
}

/// What queries and keys are normed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadNorms {
    /// Each head by itself.
    Head,
    /// All heads of a row together.
    Row,
}

/// The feed-forward part without experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `down(activation(up(x)))`.
    None,
    /// `down(activation(gate(x), up(x)))`.
    Present(Matrices),
}

/// A feed-forward part of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertPlan {
    pub count: usize,
    pub used: usize,
    pub feed_forward: usize,
    /// See [`crate::device::Experts::renormalise`].
    pub renormalise: bool,
}

/// What layers differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerPlan {
    /// See [`crate::device::Attention::window`].
    pub window: Option<usize>,
    /// Which of [`Blueprint::rotations`]; `None` where nothing rotates.
    pub rotation: Option<usize>,
}

/// What a model's blocks are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Blueprint {
    pub norm: NormKind,
    pub eps: f32,
    pub norms: Norms,
    /// Attention and feed-forward part both read the block's input: `x + f(norm(x)) + g(norm(x))`. With
    /// one norm in the file, they share it.
    pub parallel: bool,
    /// The feed-forward part's first norm, by its name in the file.
    pub feed_forward_norm: &'static str,
    pub qkv: Matrices,
    /// Biases of Q, K and V must be there. Any bias in the file counts, whether it must or not.
    pub qkv_bias: bool,
    /// The norms of queries and keys; they must be there.
    pub head_norms: Option<HeadNorms>,
    pub rope_layout: RopeLayout,
    pub rotations: Vec<Rotation>,
    /// Multiplies the scores.
    pub attention_scale: f32,
    pub soft_cap: Option<f32>,
    pub sinks: bool,
    pub gate: Gate,
    pub activation: Activation,
    pub experts: Option<ExpertPlan>,
    pub layers: Vec<LayerPlan>,
    pub embedding_scale: f32,
    /// Multiplies what attention and feed-forward part add.
    pub residual_scale: f32,
    pub logit_scale: f32,
    pub logit_cap: Option<f32>,
}

impl Blueprint {
    /// The block that most models vary (LLaMA, arXiv:2302.13971): RMS norms before each part, rotation,
    /// grouped queries, gated SiLU; experts where the file has them.
    fn common(keys: &Keys<'_>, shape: &Shape, layout: RopeLayout) -> Result<Blueprint> {
        let eps = keys.positive("attention.layer_norm_rms_epsilon")?;
        Self::with_norm(keys, shape, layout, NormKind::Rms, eps)
    }

    /// [`Blueprint::common`] with LayerNorm in place of RMS norm.
    fn layer_normed(keys: &Keys<'_>, shape: &Shape, layout: RopeLayout) -> Result<Blueprint> {
        let eps = keys.positive("attention.layer_norm_epsilon")?;
        Self::with_norm(keys, shape, layout, NormKind::Layer, eps)
    }

    fn with_norm(
        keys: &Keys<'_>,
        shape: &Shape,
        layout: RopeLayout,
        norm: NormKind,
        eps: f32,
    ) -> Result<Blueprint> {
        let experts = match keys.nonzero("expert_count", 4096)? {
            None => None,
            Some(count) => Some(ExpertPlan {
                count,
                used: keys.required("expert_used_count", count)?,
                feed_forward: keys
                    .optional("expert_feed_forward_length", 1 << 20)?
                    .unwrap_or(shape.feed_forward),
                renormalise: true,
            }),
        };
        Ok(Blueprint {
            norm,
            eps,
            norms: Norms::Before,
            parallel: false,
            feed_forward_norm: "ffn_norm",
            qkv: Matrices::Separate,
            qkv_bias: false,
            head_norms: None,
            rope_layout: layout,
            rotations: vec![Rotation::read(keys)?],
            attention_scale: 1.0 / (shape.head_dim as f32).sqrt(),
            soft_cap: None,
            sinks: false,
            gate: Gate::Present(Matrices::Separate),
            activation: Activation::Silu,
            experts,
            layers: vec![LayerPlan::FULL; shape.layers],
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            logit_cap: None,
        })
    }

    /// Whether this is the common block and nothing else, which a device may have a shorter way for.
    pub fn is_plain(&self) -> bool {
        self.norm == NormKind::Rms
            && self.norms == Norms::Before
            && !self.parallel
            && self.head_norms != Some(HeadNorms::Row)
            && self.soft_cap.is_none()
            && !self.sinks
            && matches!(self.gate, Gate::Present(_))
            && self.activation == Activation::Silu
            && self.experts.is_none()
            && self.layers.iter().all(|l| *l == LayerPlan::FULL)
            && !matches!(self.rotations[0].scaling, super::rope::Scaling::Long { .. })
            && self.residual_scale == 1.0
            && self.logit_scale == 1.0
            && self.logit_cap.is_none()
    }
}

impl LayerPlan {
    /// Sees everything, turned by the first rotation.
    pub const FULL: LayerPlan = LayerPlan {
        window: None,
        rotation: Some(0),
    };
}

/// Layers of which those that `is_local` names by number are `local`, the others full.
fn alternating(
    layers: usize,
    local: LayerPlan,
    is_local: impl Fn(usize) -> bool,
) -> Vec<LayerPlan> {
    (0..layers)
        .map(|i| if is_local(i) { local } else { LayerPlan::FULL })
        .collect()
}
