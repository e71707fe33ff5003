//! What can be wrong with a vocabulary, a text or a chat template.

use std::path::PathBuf;

/// An error of this module. Messages name the file, the key or token, what was found and what was
/// expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A metadata key is missing or of a wrong type.
    #[error(transparent)]
    Gguf(#[from] gguf::Error),
    /// The vocabulary contradicts itself or is of an unknown kind.
    #[error("{}: {what}", file.display())]
    Vocabulary {
        /// The model file.
        file: PathBuf,
        /// The key, what was found, what was expected.
        what: String,
    },
    /// The text cannot be written in this vocabulary.
    #[error("cannot tokenize: {0}")]
    Encode(String),
    /// The chat template is malformed, fails on the messages, or exceeds its limits.
    #[error("chat template: {0}")]
    Template(String),
    /// The chat template does not take these messages, in its own words (`raise_exception`).
    #[error("the chat template refuses these messages: {0}")]
    TemplateRefused(String),
}
