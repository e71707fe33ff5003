//! The tokens of a file as they are written there.

use std::path::PathBuf;

use super::Error;

/// `tokenizer.ggml.token_type`, numbered as in llama.cpp's `llama_token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenType {
    /// Plain text, in the model's own spelling.
    Normal,
    /// Stands for what cannot be written otherwise.
    Unknown,
    /// Steers the model; never text.
    Control,
    /// Text that is always one token.
    UserDefined,
    /// An id without a meaning, such as padding up to a round number.
    Unused,
    /// One byte, `<0x0A>`.
    Byte,
}

/// Texts and types, by id.
pub(super) struct Vocab<'a> {
    pub file: PathBuf,
    pub tokens: &'a [String],
    pub types: Vec<TokenType>,
}

impl<'a> Vocab<'a> {
    pub fn read(metadata: &'a gguf::Metadata) -> Result<Self, Error> {
        let mut vocab = Self {
            file: metadata.path().to_owned(),
            tokens: metadata.strings("tokenizer.ggml.tokens")?,
            types: Vec::new(),
        };
        let n = vocab.tokens.len();
        if n == 0 {
            return Err(vocab.error("tokenizer.ggml.tokens is empty".into()));
        }
        vocab.types = match metadata.opt_i32s("tokenizer.ggml.token_type")? {
            None => vec![TokenType::Normal; n],
            Some(types) if types.len() != n => {
                return Err(vocab.error(format!(
                    "tokenizer.ggml.token_type has {} values for the {n} of tokenizer.ggml.tokens",
                    types.len()
                )));
            }
            Some(types) => types
                .iter()
                .enumerate()
                .map(|(id, &t)| vocab.token_type(id, t))
                .collect::<Result<_, _>>()?,
        };
        Ok(vocab)
    }

    fn token_type(&self, id: usize, number: i32) -> Result<TokenType, Error> {
        Ok(match number {
            // 0 is "undefined": writers that know no better.
            0 | 1 => TokenType::Normal,
            2 => TokenType::Unknown,
            3 => TokenType::Control,
            4 => TokenType::UserDefined,
            5 => TokenType::Unused,
            6 => TokenType::Byte,
            _ => {
                return Err(self.error(format!(
                    "tokenizer.ggml.token_type of token {id} is {number}, expected 0 to 6"
                )));
            }
        })
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Id, text and type of every token.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &'a str, TokenType)> {
        self.tokens
            .iter()
            .zip(&self.types)
            .enumerate()
            .map(|(id, (text, &ty))| (id as u32, text.as_str(), ty))
    }

    /// The token for what cannot be written otherwise: the one that the file names, else the first of
    /// that type.
    ///
    /// # Errors
    /// `tokenizer.ggml.unknown_token_id` is no integer of 32 bits.
    pub fn unknown(&self, metadata: &gguf::Metadata) -> Result<Option<u32>, Error> {
        let named = metadata.opt_u32("tokenizer.ggml.unknown_token_id")?;
        let first = || self.iter().find(|&(.., ty)| ty == TokenType::Unknown);
        Ok(named
            .filter(|&id| (id as usize) < self.len())
            .or_else(|| first().map(|(id, ..)| id)))
    }

    pub fn error(&self, what: String) -> Error {
        Error::Vocabulary {
            file: self.file.clone(),
            what,
        }
    }
}
