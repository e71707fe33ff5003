//! A model's shape and constants, read from metadata and checked before anything is allocated.

use super::architectures::{self, Blueprint};
use super::keys::Keys;
use crate::error::{Error, Result};
use gguf::Gguf;

/// Sizes that every decoder-only transformer has.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub layers: usize,
    /// Tokens the model was trained to attend over.
    pub context: usize,
    pub embedding: usize,
    /// Of a block without experts.
    pub feed_forward: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Elements of each head that rotate.
    pub rope_dims: usize,
    /// Rows of the embedding table: logits per position, padding included.
    pub vocabulary: usize,
}

/// What a model is: its sizes, and what its blocks are made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `general.architecture`.
    pub architecture: &'static str,
    pub shape: Shape,
    pub blueprint: Blueprint,
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
        let name = file.metadata().str("general.architecture")?;
        let Some(&(architecture, describe)) = architectures::ALL.iter().find(|a| a.0 == name)
        else {
            let known: Vec<_> = architectures::ALL.iter().map(|a| a.0).collect();
            return Err(Error::Model {
                file: file.path().to_owned(),
                what: format!(
                    "general.architecture is {name:?}, which Kigo cannot run; it runs {}",
                    known.join(", ")
                ),
            });
        };
        let keys = Keys::new(file, architecture);
        let shape = Shape::read(file, &keys)?;
        let blueprint = describe(&keys, &shape)?;
        Ok(Config {
            architecture,
            shape,
            blueprint,
        })
    }
}

impl Shape {
    fn read(file: &Gguf, keys: &Keys<'_>) -> Result<Shape> {
        let layers = keys.required("block_count", MAX_LAYERS)?;
        let context = keys.required("context_length", MAX_CONTEXT)?;
        let embedding = keys.required("embedding_length", MAX_WIDTH)?;
        let feed_forward = keys.required("feed_forward_length", MAX_WIDTH)?;
        let heads = keys.required("attention.head_count", embedding)?;
        let kv_heads = keys
            .optional("attention.head_count_kv", MAX_WIDTH)?
            .unwrap_or(heads);
        if kv_heads > heads || !heads.is_multiple_of(kv_heads) {
            return Err(keys.bad(format!(
                "{} is {kv_heads}, expected a divisor of {} ({heads})",
                keys.name("attention.head_count_kv"),
                keys.name("attention.head_count")
            )));
        }
        let head_dim = keys
            .optional("attention.key_length", 1024)?
            .unwrap_or(embedding / heads);
        let value_dim = keys
            .optional("attention.value_length", 1024)?
            .unwrap_or(head_dim);
        if value_dim != head_dim {
            return Err(keys.bad(format!(
                "{} is {value_dim} and {} is {head_dim}; heads whose keys and values differ in \
                 length are not supported",
                keys.name("attention.value_length"),
                keys.name("attention.key_length")
            )));
        }
        if !head_dim.is_multiple_of(2) || head_dim > 256 {
            return Err(keys.bad(format!(
                "a head is {head_dim} wide, expected an even number up to 256"
            )));
        }
        let rope_dims = keys
            .optional("rope.dimension_count", head_dim)?
            .unwrap_or(head_dim);
        if !rope_dims.is_multiple_of(2) {
            return Err(keys.bad(format!(
                "{} is {rope_dims}, expected an even number",
                keys.name("rope.dimension_count")
            )));
        }
        let table = file.require("token_embd.weight")?;
        if table.dims().len() != 2 || table.row_len() != embedding as u64 {
            return Err(keys.bad(format!(
                "tensor token_embd.weight has dimensions {:?}, expected [{embedding}, vocabulary] \
                 ({} is {embedding})",
                table.dims(),
                keys.name("embedding_length")
            )));
        }
        let vocabulary = table.rows() as usize;
        if let Some(size) = file.metadata().opt_u64(&keys.name("vocab_size"))?
            && size > vocabulary as u64
        {
            return Err(keys.bad(format!(
                "{} is {size}, but token_embd.weight has {vocabulary} rows",
                keys.name("vocab_size")
            )));
        }
        Ok(Shape {
            layers,
            context,
            embedding,
            feed_forward,
            heads,
            kv_heads,
            head_dim,
            rope_dims,
            vocabulary,
        })
    }
}
