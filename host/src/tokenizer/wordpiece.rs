//! WordPiece (Schuster and Nakajima 2012) as BERT uses it, on the `tokenizers` crate: words at spaces
//! and punctuation, each cut from the left into the longest pieces there are.
//!
//! BERT marks pieces that continue a word (`##ing`). GGUF files mark those that begin one, as
//! SentencePiece would: `▁play`, `ing`.

use tokenizers::models::bpe::Vocab as Ids;
use tokenizers::models::wordpiece::WordPiece as Model;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{
    Model as _, NormalizedString, Normalizer as _, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer as _,
};

use super::Error;
use super::spm::SPACE;
use super::vocab::{TokenType, Vocab};

/// What marks a piece that continues a word, in the crate.
const CONTINUES: &str = "##";

pub(super) struct WordPiece {
    normalizer: BertNormalizer,
    model: Model,
}

/// The token of words that no pieces make.
pub(super) fn unknown(metadata: &gguf::Metadata, vocab: &Vocab<'_>) -> Result<u32, Error> {
    let named = || vocab.iter().find(|&(_, text, _)| text == "[UNK]");
    let unknown = vocab.unknown(metadata)?;
    unknown
        .or_else(|| named().map(|(id, ..)| id))
        .ok_or_else(|| {
            vocab.error(
                "tokenizer.ggml.unknown_token_id is missing and there is no token \"[UNK]\", but a \
                 WordPiece vocabulary needs one"
                    .into(),
            )
        })
}

impl WordPiece {
    pub fn new(metadata: &gguf::Metadata, vocab: &Vocab<'_>) -> Result<Self, Error> {
        let unknown = unknown(metadata, vocab)?;
        let mut pieces = Ids::with_capacity(vocab.len());
        for (id, text, ty) in vocab.iter() {
            if ty == TokenType::Normal && id != unknown {
                let piece = match text.strip_prefix(SPACE) {
                    Some(word) => word.to_owned(),
                    None => format!("{CONTINUES}{text}"),
                };
                // Of two tokens with the same text the first counts.
                pieces.entry(piece).or_insert(id);
            }
        }
        let unknown_text = vocab.tokens[unknown as usize].clone();
        pieces.insert(unknown_text.clone(), unknown);
        let model = Model::builder()
            .vocab(pieces)
            .unk_token(unknown_text)
            .continuing_subword_prefix(CONTINUES.to_owned())
            .build()
            .map_err(|e| vocab.error(format!("tokenizer.ggml.tokens: {e}")))?;
        let lowercase = metadata
            .opt_bool("tokenizer.ggml.normalizer.lowercase")?
            .unwrap_or(true);
        let strip_accents = metadata.opt_bool("tokenizer.ggml.normalizer.strip_accents")?;
        Ok(Self {
            normalizer: BertNormalizer::new(true, true, strip_accents, lowercase),
            model,
        })
    }

    /// Appends the ids of plain text.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        let failed = |e: tokenizers::Error| Error::Encode(e.to_string());
        let mut normal = NormalizedString::from(text);
        self.normalizer.normalize(&mut normal).map_err(failed)?;
        let mut words = PreTokenizedString::from(normal);
        BertPreTokenizer.pre_tokenize(&mut words).map_err(failed)?;
        for (word, ..) in words.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
            let tokens = self.model.tokenize(word).map_err(failed)?;
            ids.extend(tokens.iter().map(|t| t.id));
        }
        Ok(())
    }
}
