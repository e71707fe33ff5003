//! The library's one error type. Every message says what went wrong, where, what was found, what
//! was expected, and what to do.

use std::path::PathBuf;

/// What can go wrong between a file and its tokens.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is not a GGUF that can be used.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// The file is a sound GGUF, but not of a model that Kigo can run.
    #[error("{file}: {what}")]
    Model { file: PathBuf, what: String },
    /// The vocabulary or the chat template cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] crate::tokenizer::Error),
    /// A name that is no model, or a model that could not be fetched.
    #[error(transparent)]
    Catalog(#[from] crate::catalog::Error),
    /// A request that this model or device cannot serve as given.
    #[error("{0}")]
    Request(String),
    /// No such device, or a driver that cannot be used.
    #[error("{0}")]
    NoDevice(String),
    /// The device has too little memory; nothing was left allocated.
    #[error(
        "not enough memory on {device} for {what}: {required} MiB required, {free} MiB free; \
         use a smaller --ctx-size, a smaller model, or another device"
    )]
    OutOfMemory {
        device: String,
        what: String,
        required: u64,
        free: u64,
    },
    /// The device failed while it worked.
    #[error("{device}: {what}")]
    Device { device: String, what: String },
    /// The system refused a file or a socket.
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// `Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
