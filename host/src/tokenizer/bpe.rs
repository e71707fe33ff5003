//! Byte-level BPE (Sennrich et al. 2016; over bytes, Radford et al. 2019) on the `tokenizers` crate.

use tokenizers::Model as _;
use tokenizers::models::bpe::{BPE, Merges, Vocab as Ids};

use super::Error;
use super::bytes::{byte_of, char_of};
use super::pre::PreTokenizer;
use super::vocab::{TokenType, Vocab};

pub(super) struct Bpe {
    pre: PreTokenizer,
    bpe: BPE,
    /// Bytes without a token of their own. Real vocabularies have all 256.
    missing: Vec<u8>,
}

/// The merges of the file, as they are written there.
pub(super) fn merges(metadata: &gguf::Metadata) -> Result<&[String], Error> {
    Ok(metadata.strings("tokenizer.ggml.merges")?)
}

/// How the file's text is cut into words.
pub(super) fn pre_tokenizer(
    metadata: &gguf::Metadata,
    vocab: &Vocab<'_>,
) -> Result<PreTokenizer, Error> {
    let name = metadata.opt_str("tokenizer.ggml.pre")?.unwrap_or_else(|| {
        tracing::warn!(
            "{}: tokenizer.ggml.pre is missing; \"default\" is used, as for all files from before \
                 the key existed, and may give tokens that the model was not trained on",
            vocab.file.display()
        );
        "default"
    });
    PreTokenizer::by_name(name, vocab)
}

impl Bpe {
    pub fn new(metadata: &gguf::Metadata, vocab: &Vocab<'_>) -> Result<Self, Error> {
        let pre = pre_tokenizer(metadata, vocab)?;
        let merges = merges(metadata)?;
        let ids = ids(vocab);
        let missing = (0..=255)
            .filter(|&b| !ids.contains_key(char_of(b).encode_utf8(&mut [0; 4]) as &str))
            .collect();
        let build = |ids, pairs| {
            BPE::builder()
                .vocab_and_merges::<Ids>(ids, pairs)
                .ignore_merges(pre.ignore_merges)
                .build()
        };
        let bpe = match build(ids, pairs(merges, vocab)?) {
            Ok(bpe) => bpe,
            // Merges of tokens that the vocabulary lacks can never apply. They are rare: looked
            // for only when the crate refuses them.
            Err(_) => {
                let ids = self::ids(vocab);
                let mut pairs = pairs(merges, vocab)?;
                pairs.retain(|(a, b)| {
                    ids.contains_key(a)
                        && ids.contains_key(b)
                        && ids.contains_key(&format!("{a}{b}"))
                });
                tracing::warn!(
                    "{}: {} of {} merges are of tokens that the vocabulary lacks",
                    vocab.file.display(),
                    merges.len() - pairs.len(),
                    merges.len()
                );
                build(ids, pairs).map_err(|e| vocab.error(format!("tokenizer.ggml.merges: {e}")))?
            }
        };
        Ok(Self { pre, bpe, missing })
    }

    /// Whether BOS is added if the file does not say.
    pub fn adds_bos(&self) -> bool {
        self.pre.adds_bos
    }

    /// Appends the ids of plain text.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        if let Some(byte) = text.bytes().find(|b| self.missing.contains(b)) {
            return Err(Error::Encode(format!(
                "the vocabulary has no token for the byte 0x{byte:02X}"
            )));
        }
        let mut spelled = String::new();
        for word in self.pre.words(text) {
            spelled.clear();
            spelled.extend(word.bytes().map(char_of));
            let tokens = self
                .bpe
                .tokenize(&spelled)
                .map_err(|e| Error::Encode(e.to_string()))?;
            ids.extend(tokens.iter().map(|t| t.id));
        }
        Ok(())
    }
}

/// The tokens that plain text can become: control tokens and unused ids cannot come out of it.
fn ids(vocab: &Vocab<'_>) -> Ids {
    let mut ids = Ids::with_capacity(vocab.len());
    for (id, text, ty) in vocab.iter() {
        if matches!(
            ty,
            TokenType::Normal | TokenType::UserDefined | TokenType::Byte
        ) {
            // Of two tokens with the same text the first counts.
            ids.entry(text.to_owned()).or_insert(id);
        }
    }
    ids
}

/// The merges, `"left right"` each, by falling priority.
fn pairs(merges: &[String], vocab: &Vocab<'_>) -> Result<Merges, Error> {
    merges
        .iter()
        .enumerate()
        .map(|(i, merge)| match merge.split_once(' ') {
            Some((a, b)) if !a.is_empty() && !b.is_empty() => Ok((a.to_owned(), b.to_owned())),
            _ => Err(vocab.error(format!(
                "tokenizer.ggml.merges[{i}] is {merge:?}, expected two tokens with a space between"
            ))),
        })
        .collect()
}

/// What each token stands for. Special tokens are written as themselves, others in the byte alphabet.
pub(super) fn token_bytes(vocab: &Vocab<'_>) -> Vec<Box<[u8]>> {
    vocab
        .iter()
        .map(|(_, text, ty)| match ty {
            TokenType::Unused => Box::default(),
            TokenType::Control | TokenType::Unknown | TokenType::UserDefined => {
                text.as_bytes().into()
            }
            // Text with characters outside the alphabet was never spelled in it.
            TokenType::Normal | TokenType::Byte => text
                .chars()
                .map(byte_of)
                .collect::<Option<_>>()
                .unwrap_or_else(|| text.as_bytes().into()),
        })
        .collect()
}
