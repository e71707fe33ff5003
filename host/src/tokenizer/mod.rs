//! Text to token ids and back, from the vocabulary in a GGUF file, and the chat template beside it.
//!
//! [`Tokenizer`] splits text in three steps. Special tokens are cut out first, so that no later step
//! can split them or make them out of plain text (`special`). What is between them is cut into words
//! by the pre-tokenizer that the file names (`pre`), and words into tokens by byte-level BPE (`bpe`);
//! SentencePiece vocabularies go without words (`spm`, `unigram`); BERT's have words of their own
//! (`wordpiece`). [`Detokenizer`] turns a stream of ids into
//! whole characters. [`ChatTemplate`] turns messages into a prompt.

mod bpe;
mod bytes;
mod charsmap;
pub mod chat;
mod detokenizer;
mod eog;
mod error;
mod pre;
mod special;
mod spm;
mod unigram;
mod vocab;
mod wordpiece;

use std::collections::BTreeSet;
use std::sync::Arc;

pub(crate) use bytes::char_of as byte_char;
pub use chat::ChatTemplate;
pub use detokenizer::Detokenizer;
pub use error::Error;

use bpe::Bpe;
use special::{Piece, Specials};
use spm::Spm;
use unigram::Unigram;
use vocab::{TokenType, Vocab};
use wordpiece::WordPiece;

/// The tokenizer of one model. Immutable, and shared freely between threads.
pub struct Tokenizer {
    model: Model,
    specials: Specials,
    table: Arc<Table>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    /// What goes after the text, where something does: EOS, or BERT's separator.
    closing: Option<u32>,
    end_of_generation: Vec<u32>,
}

/// What each id stands for; shared with the detokenizers.
struct Table {
    /// Empty for ids that stand for nothing.
    bytes: Vec<Box<[u8]>>,
    types: Vec<TokenType>,
}

impl Table {
    fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |b| b)
    }

    fn is_control(&self, id: u32) -> bool {
        matches!(
            self.types.get(id as usize),
            Some(TokenType::Control | TokenType::Unknown)
        )
    }
}

enum Model {
    Bpe(Box<Bpe>),
    Spm(Box<Spm>),
    Unigram(Box<Unigram>),
    WordPiece(Box<WordPiece>),
}

impl Model {
    /// Whether text is encoded as if a space stood before it, which is then no part of it.
    fn adds_prefix_space(&self) -> bool {
        match self {
            Self::Bpe(_) => false,
            Self::Spm(spm) => spm.adds_prefix_space(),
            Self::Unigram(unigram) => unigram.adds_prefix_space(),
            // Its tokens say where a word begins, the first one's too.
            Self::WordPiece(_) => true,
        }
    }
}

/// Kinds of tokenizers, by `tokenizer.ggml.model`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bpe,
    Spm,
    Unigram,
    WordPiece,
}

impl Kind {
    fn read(metadata: &gguf::Metadata, vocab: &Vocab<'_>) -> Result<Self, Error> {
        match metadata.str("tokenizer.ggml.model")? {
            "gpt2" => Ok(Self::Bpe),
            "llama" => Ok(Self::Spm),
            "t5" => Ok(Self::Unigram),
            "bert" => Ok(Self::WordPiece),
            other => Err(vocab.error(format!(
                "tokenizer.ggml.model is {other:?}; known are \"gpt2\" (byte-level BPE), \
                 \"llama\" (SentencePiece BPE), \"t5\" (SentencePiece unigram) and \"bert\" (WordPiece)"
            ))),
        }
    }
}

/// The ids that the file names, each within its vocabulary.
struct NamedIds {
    bos: Option<u32>,
    eos: Option<u32>,
    /// BERT's begin and end of a text.
    class: Option<u32>,
    separator: Option<u32>,
    /// End of turn and of message.
    ends: [Option<u32>; 2],
}

impl NamedIds {
    fn read(metadata: &gguf::Metadata, vocab: &Vocab<'_>) -> Result<Self, Error> {
        let id = |key: &str| -> Result<Option<u32>, Error> {
            let id = metadata.opt_u32(key)?;
            match id {
                Some(id) if id as usize >= vocab.len() => Err(vocab.error(format!(
                    "{key} is {id}, but the vocabulary has {} tokens",
                    vocab.len()
                ))),
                _ => Ok(id),
            }
        };
        Ok(Self {
            bos: id("tokenizer.ggml.bos_token_id")?,
            eos: id("tokenizer.ggml.eos_token_id")?,
            class: id("tokenizer.ggml.cls_token_id")?,
            // So it is spelled in files.
            separator: id("tokenizer.ggml.seperator_token_id")?,
            ends: [
                id("tokenizer.ggml.eot_token_id")?,
                id("tokenizer.ggml.eom_token_id")?,
            ],
        })
    }
}

/// Checks that a file's vocabulary is whole, without the work of building a tokenizer from it: what
/// takes ids rather than text refuses a damaged file too.
///
/// # Errors
/// As [`Tokenizer::from_gguf`], except that the pre-tokenizer may have any name.
pub fn check(metadata: &gguf::Metadata) -> Result<(), Error> {
    let vocab = Vocab::read(metadata)?;
    match Kind::read(metadata, &vocab)? {
        Kind::Bpe => drop(bpe::merges(metadata)?),
        Kind::Spm => drop(spm::scores(metadata, &vocab)?),
        Kind::Unigram => {
            spm::scores(metadata, &vocab)?;
            drop(unigram::charsmap(metadata, &vocab)?);
        }
        Kind::WordPiece => drop(wordpiece::unknown(metadata, &vocab)?),
    }
    NamedIds::read(metadata, &vocab).map(drop)
}

/// [`check`], and that text can be cut into words.
///
/// # Errors
/// As [`Tokenizer::from_gguf`].
pub fn check_text(metadata: &gguf::Metadata) -> Result<(), Error> {
    check(metadata)?;
    let vocab = Vocab::read(metadata)?;
    match Kind::read(metadata, &vocab)? {
        Kind::Bpe => bpe::pre_tokenizer(metadata, &vocab).map(drop),
        Kind::Spm | Kind::Unigram | Kind::WordPiece => Ok(()),
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("end_of_generation", &self.end_of_generation)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// The tokenizer of a model file.
    ///
    /// # Errors
    /// A `tokenizer.ggml.*` key is missing or makes no sense, or names a tokenizer or pre-tokenizer
    /// that is not known here.
    pub fn from_gguf(gguf: &gguf::Gguf) -> Result<Self, Error> {
        Self::from_metadata(gguf.metadata())
    }

    /// As [`Tokenizer::from_gguf`], from metadata alone.
    ///
    /// # Errors
    /// See [`Tokenizer::from_gguf`].
    pub fn from_metadata(metadata: &gguf::Metadata) -> Result<Self, Error> {
        let vocab = Vocab::read(metadata)?;
        let kind = Kind::read(metadata, &vocab)?;
        let (model, adds_bos) = match kind {
            Kind::Bpe => {
                let bpe = Bpe::new(metadata, &vocab)?;
                let adds_bos = bpe.adds_bos();
                (Model::Bpe(Box::new(bpe)), adds_bos)
            }
            Kind::Spm => (Model::Spm(Box::new(Spm::new(metadata, &vocab)?)), true),
            Kind::Unigram => {
                let unigram = Unigram::new(metadata, &vocab)?;
                (Model::Unigram(Box::new(unigram)), false)
            }
            Kind::WordPiece => {
                let pieces = WordPiece::new(metadata, &vocab)?;
                (Model::WordPiece(Box::new(pieces)), true)
            }
        };
        let NamedIds {
            bos,
            eos,
            class,
            separator,
            ends,
        } = NamedIds::read(metadata, &vocab)?;
        // BERT has a class token before a text and a separator after it in their places.
        let bos = bos.or(class);
        let adds = |key: &str, default: bool| {
            let adds = metadata.opt_bool(key);
            adds.map(|adds| adds.unwrap_or(default))
        };
        let add_sep = adds("tokenizer.ggml.add_sep_token", kind == Kind::WordPiece)?;
        let add_eos = adds("tokenizer.ggml.add_eos_token", kind == Kind::Unigram)?;
        let closing = match (add_sep, add_eos) {
            (true, _) => separator.or(eos),
            (_, true) => eos,
            _ => None,
        };
        let mut ends: BTreeSet<u32> = ends.into_iter().chain([eos]).flatten().collect();
        eog::extend_by_name(&mut ends, &vocab);
        if ends.len() < 2 {
            eog::extend_by_template(&mut ends, metadata, &vocab);
        }

        let specials = Specials::new(&vocab)?;
        let bytes = match &model {
            Model::Bpe(_) => bpe::token_bytes(&vocab),
            Model::Spm(_) | Model::Unigram(_) | Model::WordPiece(_) => spm::token_bytes(&vocab),
        };
        Ok(Self {
            model,
            specials,
            table: Arc::new(Table {
                bytes,
                types: vocab.types,
            }),
            bos,
            eos,
            add_bos: adds("tokenizer.ggml.add_bos_token", adds_bos)?,
            closing,
            end_of_generation: ends.into_iter().collect(),
        })
    }

    /// The ids of a text.
    ///
    /// `add_special` puts BOS before and EOS after it where the file says so, or BERT's `[CLS]` and `[SEP]`. `parse_special` finds
    /// control tokens by their text (`<|im_start|>`), as a rendered chat template needs; without
    /// it their text is plain text, as a user's message needs. User-defined tokens are found always.
    ///
    /// # Errors
    /// The vocabulary has no token for some byte of the text.
    pub fn encode(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if add_special && self.add_bos {
            ids.extend(self.bos);
        }
        // A SentencePiece prefix space goes before text at the start and after a special token.
        let mut after_special = true;
        for piece in self.specials.split(text, parse_special) {
            match piece {
                Piece::Special(id) => {
                    ids.push(id);
                    after_special = true;
                }
                Piece::Text(text) => {
                    match &self.model {
                        Model::Bpe(bpe) => bpe.encode(text, &mut ids)?,
                        Model::Spm(spm) => spm.encode(text, after_special, &mut ids)?,
                        Model::Unigram(unigram) => unigram.encode(text, after_special, &mut ids),
                        Model::WordPiece(pieces) => pieces.encode(text, &mut ids)?,
                    }
                    after_special = false;
                }
            }
        }
        if add_special {
            ids.extend(self.closing);
        }
        Ok(ids)
    }

    /// The bytes that ids stand for, control tokens with their text; not necessarily valid UTF-8.
    /// Ids outside the vocabulary stand for nothing.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        let mut bytes: Vec<u8> = ids
            .iter()
            .flat_map(|&id| self.token_bytes(id))
            .copied()
            .collect();
        // What `encode` put before the text is not part of it.
        let prefixed = self.model.adds_prefix_space();
        let first_is_text = ids.first().is_some_and(|&id| !self.is_control(id));
        if prefixed && first_is_text && bytes.first() == Some(&b' ') {
            bytes.remove(0);
        }
        bytes
    }

    /// [`Tokenizer::decode`] as text; bytes that are not UTF-8 become U+FFFD.
    #[must_use]
    pub fn decode_lossy(&self, ids: &[u32]) -> String {
        String::from_utf8_lossy(&self.decode(ids)).into_owned()
    }

    /// The bytes of one token: a control token's text too, nothing for an unused id.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.table.bytes(id)
    }

    /// Number of ids in the file's vocabulary, padding included. A model's logits may be wider still.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.table.bytes.len()
    }

    /// The beginning-of-sequence token.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-sequence token.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether `encode` with `add_special` begins with BOS.
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        self.add_bos && self.bos.is_some()
    }

    /// Whether generation ends with this token: end of sequence, of turn or of message.
    #[must_use]
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        self.end_of_generation.binary_search(&id).is_ok()
    }

    /// All tokens that end a generation, ascending.
    #[must_use]
    pub fn end_of_generation(&self) -> &[u32] {
        &self.end_of_generation
    }

    /// Whether a token steers the model rather than being text: control and unknown tokens.
    #[must_use]
    pub fn is_control(&self, id: u32) -> bool {
        self.table.is_control(id)
    }

    /// A streaming decoder, independent of the tokenizer's lifetime.
    #[must_use]
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.table))
    }
}

#[cfg(test)]
mod tests;
