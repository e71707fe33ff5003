//! The GGUF file format: memory-mapped, validated whole before anything is used, with exact
//! dequantisation of its block types.
//!
//! The map of this crate, in the order in which a file is read:
//!
//! - [`Gguf::open`] maps a file (and, of a model split over `-00001-of-0000N.gguf` parts, all of
//!   them), parses it and checks it. What it returns can be used without further checks of sizes:
//!   every tensor lies inside its file, at a multiple of the alignment, apart from all others.
//! - [`Metadata`] holds the key-value pairs in file order, with typed getters whose errors name the
//!   key, what was found and what was expected.
//! - [`Tensor`] is a view into the map: name, dims (innermost first), [`GgmlType`] and bytes.
//! - [`Block`] and [`blocks`] give the bytes their meaning: one struct for each block type, in one
//!   file each, with `dequantize`.
//! - [`quantize()`] makes blocks of values, where the type has a quantiser.
//! - [`Writer`] makes files.
//!
//! Format: GGUF versions 2 and 3, little-endian, as described in ggml's `docs/gguf.md`.
//!
//! ```no_run
//! let file = gguf::Gguf::open("model.gguf")?;
//! let arch = file.metadata().str("general.architecture")?;
//! let embd = file.require("token_embd.weight")?;
//! let mut row = vec![0.0; embd.row_len() as usize];
//! embd.dequantize_row(0, &mut row)?;
//! println!("{arch}: {} {:?} {:?}", embd.ty(), embd.dims(), &row[..4]);
//! # Ok::<(), gguf::Error>(())
//! ```

pub mod blocks;
mod cursor;
mod error;
mod file;
mod header;
mod metadata;
mod quantize;
mod split;
mod tensor;
mod types;
mod value;
mod writer;

pub use blocks::{Block, dequantize};
pub use error::Error;
pub use file::Gguf;
pub use metadata::Metadata;
pub use quantize::{can_quantize, quantizable, quantize};
pub use tensor::Tensor;
pub use types::GgmlType;
pub use value::{Array, Value};
pub use writer::{Payload, Writer};

/// The alignment of tensor data, in bytes, in a file without `general.alignment`.
pub const DEFAULT_ALIGNMENT: u64 = 32;
