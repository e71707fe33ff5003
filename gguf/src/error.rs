//! One error type for the crate: each variant says which file and which field or tensor.

use std::path::PathBuf;

use crate::GgmlType;

/// What can go wrong with a GGUF file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        path: PathBuf,
        /// What was tried: "open", "map", "open part 3 of 5", ...
        action: String,
        source: std::io::Error,
    },
    /// The file breaks the format. `detail` names the field or tensor, the value and the limit.
    #[error("{}: {detail}", path.display())]
    Malformed { path: PathBuf, detail: String },
    /// A metadata key is missing or holds something else than the caller needs.
    #[error("{}: metadata key {key:?} {detail}", path.display())]
    Key {
        path: PathBuf,
        key: String,
        /// What was found and what was expected.
        detail: String,
    },
    /// No tensor of that name is in the file.
    #[error("{}: tensor {tensor:?} is missing", path.display())]
    MissingTensor { path: PathBuf, tensor: String },
    /// A tensor was asked for something that it cannot give: another type, elements past its end.
    #[error("{}: tensor {tensor:?}: {detail}", path.display())]
    Tensor {
        path: PathBuf,
        tensor: String,
        detail: String,
    },
    /// Blocks of this type are known to the format but have no dequantisation here.
    #[error(
        "no dequantisation for type {ty}; there is one for {}",
        crate::blocks::supported_names()
    )]
    UnsupportedType { ty: GgmlType },
    /// The type has no quantiser here.
    #[error(
        "no quantiser for type {ty}; there is one for {}",
        crate::quantize::names()
    )]
    NoQuantizer { ty: GgmlType },
    /// A buffer does not fit the blocks it is to be filled from.
    #[error("{detail}")]
    Buffer { detail: String },
    /// A [`crate::Writer`] was given something that the format cannot hold.
    #[error("cannot write GGUF: {detail}")]
    Write { detail: String },
}

/// A string from a file, fit for one line of an error message: escaped, shortened.
pub(crate) fn quote(s: &str) -> String {
    const MAX: usize = 80;
    match s.char_indices().nth(MAX) {
        None => format!("{s:?}"),
        Some((cut, _)) => format!("{:?}... ({} bytes)", &s[..cut], s.len()),
    }
}
