//! Kigo: a GPU inference worker for GGUF language models.
//!
//! Data flows one way: a file goes through [`gguf`] and [`model`] to a [`device`]; a request goes through
//! [`server`] to [`engine`], which runs the model and [`sampling`], and back as a stream.

pub mod cache;
pub mod catalog;
pub mod cli;
pub mod device;
pub mod engine;
pub mod error;
pub mod haiku;
pub mod model;
pub mod sampling;
pub mod server;
pub mod tokenizer;

pub use error::{Error, Result};
pub use gguf;
