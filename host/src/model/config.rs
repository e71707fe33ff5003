//! A model's shape and constants, read from metadata and checked before anything is allocated.

use crate::device::RopeLayout;
use crate::error::{Error, Result};
use gguf::Gguf;

/// What an architecture's name decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Architecture {
    /// `general.architecture`.
    pub name: &'static str,
    pub rope_layout: RopeLayout,
    /// Q, K and V products carry biases.
    pub qkv_bias: bool,
}

/// The architectures that can run.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "llama",
        rope_layout: RopeLayout::Interleaved,
        qkv_bias: false,
    },
    Architecture {
        name: "qwen2",
        rope_layout: RopeLayout::Halves,
        qkv_bias: true,
    },
];

/// Shape and constants of a decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub architecture: Architecture,
    pub layers: usize,
    /// Tokens the model was trained to attend over.
    pub context: usize,
    pub embedding: usize,
    pub feed_forward: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_eps: f32,
    /// Elements of each head that rotate.
    pub rope_dims: usize,
    pub rope_base: f32,
    /// Positions are divided by this (linear scaling); 1 for none.
    pub rope_scale: f32,
    /// Rows of the embedding table: logits per position, padding included.
    pub vocabulary: usize,
}

/// No real model comes near these; a value past one is a damaged file.
const MAX_LAYERS: usize = 1024;
const MAX_WIDTH: usize = 1 << 20;
const MAX_CONTEXT: usize = 1 << 28;

impl Config {
    /// # Errors
    /// Unknown architecture, a missing or malformed key, or values that contradict each other; the
    /// message names the key, the value and the limit.
    pub fn from_gguf(file: &Gguf) -> Result<Config> {
        let meta = file.metadata();
        let bad = |what: String| Error::Model {
            file: file.path().to_owned(),
            what,
        };
        let name = meta.str("general.architecture")?;
        let architecture = *ARCHITECTURES
            .iter()
            .find(|a| a.name == name)
            .ok_or_else(|| {
                let known: Vec<_> = ARCHITECTURES.iter().map(|a| a.name).collect();
                bad(format!(
                    "general.architecture is {name:?}, which Kigo cannot run; it runs {}",
                    known.join(", ")
                ))
            })?;
        let name = architecture.name;
        let key = |suffix: &str| format!("{name}.{suffix}");
        let ranged = |suffix: &str, value: u64, max: usize| -> Result<usize> {
            match usize::try_from(value) {
                Ok(v) if v >= 1 && v <= max => Ok(v),
                _ => Err(bad(format!(
                    "{} is {value}, expected 1 to {max}",
                    key(suffix)
                ))),
            }
        };
        let required = |suffix: &str, max: usize| -> Result<usize> {
            ranged(suffix, meta.u64(&key(suffix))?, max)
        };
        let optional = |suffix: &str, default: usize, max: usize| -> Result<usize> {
            match meta.opt_u64(&key(suffix))? {
                Some(v) => ranged(suffix, v, max),
                None => Ok(default),
            }
        };
        let layers = required("block_count", MAX_LAYERS)?;
        let context = required("context_length", MAX_CONTEXT)?;
        let embedding = required("embedding_length", MAX_WIDTH)?;
        let feed_forward = required("feed_forward_length", MAX_WIDTH)?;
        let heads = required("attention.head_count", embedding)?;
        let kv_heads = optional("attention.head_count_kv", heads, MAX_WIDTH)?;
        if kv_heads > heads || !heads.is_multiple_of(kv_heads) {
            return Err(bad(format!(
                "{} is {kv_heads}, expected a divisor of {} ({heads})",
                key("attention.head_count_kv"),
                key("attention.head_count")
            )));
        }
        let head_dim = optional("attention.key_length", embedding / heads, 1024)?;
        let value_dim = optional("attention.value_length", head_dim, 1024)?;
        if value_dim != head_dim {
            return Err(bad(format!(
                "{} is {value_dim} and {} is {head_dim}; heads whose keys and values differ in \
                 length are not supported",
                key("attention.value_length"),
                key("attention.key_length")
            )));
        }
        if !head_dim.is_multiple_of(2) || head_dim > 256 {
            return Err(bad(format!(
                "a head is {head_dim} wide, expected an even number up to 256"
            )));
        }
        let rope_dims = optional("rope.dimension_count", head_dim, head_dim)?;
        if !rope_dims.is_multiple_of(2) {
            return Err(bad(format!(
                "{} is {rope_dims}, expected an even number",
                key("rope.dimension_count")
            )));
        }
        let finite = |suffix: &str, value: f32| -> Result<f32> {
            if value.is_finite() && value > 0.0 {
                Ok(value)
            } else {
                Err(bad(format!(
                    "{} is {value}, expected a positive finite number",
                    key(suffix)
                )))
            }
        };
        let eps_key = "attention.layer_norm_rms_epsilon";
        let rms_eps = finite(eps_key, meta.f32(&key(eps_key))?)?;
        let rope_base = match meta.opt_f32(&key("rope.freq_base"))? {
            Some(v) => finite("rope.freq_base", v)?,
            None => 10_000.0,
        };
        let scaling = meta.opt_str(&key("rope.scaling.type"))?.unwrap_or("none");
        let rope_scale = match scaling {
            "none" => 1.0,
            "linear" => finite(
                "rope.scaling.factor",
                meta.f32(&key("rope.scaling.factor"))?,
            )?,
            other => {
                return Err(bad(format!(
                    "{} is {other:?}, expected none or linear",
                    key("rope.scaling.type")
                )));
            }
        };
        let table = file.require("token_embd.weight")?;
        if table.dims().len() != 2 || table.row_len() != embedding as u64 {
            return Err(bad(format!(
                "tensor token_embd.weight has dimensions {:?}, expected [{embedding}, vocabulary] \
                 ({} is {embedding})",
                table.dims(),
                key("embedding_length")
            )));
        }
        let vocabulary = table.rows() as usize;
        if let Some(size) = meta.opt_u64(&key("vocab_size"))?
            && size > vocabulary as u64
        {
            return Err(bad(format!(
                "{} is {size}, but token_embd.weight has {vocabulary} rows",
                key("vocab_size")
            )));
        }
        Ok(Config {
            architecture,
            layers,
            context,
            embedding,
            feed_forward,
            heads,
            kv_heads,
            head_dim,
            rms_eps,
            rope_dims,
            rope_base,
            rope_scale,
            vocabulary,
        })
    }

    /// `(cos, sin)` pairs, `[context][rope_dims / 2][2]`: the angle of pair `i` at position `p` is
    /// `p / (scale * factors[i]) * base^(-2i / dims)` (RoFormer, arXiv:2104.09864; `factors` are the
    /// per-frequency divisors of llama-3 files, `rope_freqs.weight`).
    pub fn rope_table(&self, context: usize, factors: Option<&[f32]>) -> Vec<f32> {
        let half = self.rope_dims / 2;
        let frequencies: Vec<f64> = (0..half)
            .map(|i| {
                let f = f64::from(self.rope_base).powf(-2.0 * i as f64 / self.rope_dims as f64);
                f / f64::from(self.rope_scale) / factors.map_or(1.0, |f| f64::from(f[i]))
            })
            .collect();
        let mut table = Vec::with_capacity(context * half * 2);
        for position in 0..context {
            for f in &frequencies {
                let (sin, cos) = (position as f64 * f).sin_cos();
                table.extend([cos as f32, sin as f32]);
            }
        }
        table
    }
}
