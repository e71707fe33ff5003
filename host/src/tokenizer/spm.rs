//! SentencePiece BPE (Kudo and Richardson 2018): merges by the score of the merged token, the
//! leftmost first among equals, no words, bytes for what the vocabulary cannot write.
//!
//! Own code: the `tokenizers` crate would need an explicit list of all pairs of tokens that make
//! a token, with ties in another order than SentencePiece's, and takes seconds to build it.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::Error;
use super::vocab::{TokenType, Vocab};

/// SentencePiece writes a space as U+2581.
pub(super) const SPACE: &str = "\u{2581}";

pub(super) struct Spm {
    pieces: HashMap<Box<str>, u32>,
    scores: Vec<f32>,
    /// The token of each byte.
    bytes: [Option<u32>; 256],
    unknown: Option<u32>,
    adds_prefix_space: bool,
}

/// A run of the text that is one token so far, or one character without a token; a list in `Vec`.
struct Symbol {
    start: usize,
    /// Empty when merged into its left neighbour.
    end: usize,
    prev: Option<usize>,
    next: Option<usize>,
}

/// A possible merge of two neighbours.
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    /// Length in bytes when it was found: another one now means that a part was merged elsewhere.
    len: usize,
}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .total_cmp(&other.score)
            .then(other.left.cmp(&self.left))
    }
}
impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Merge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Merge {}

/// The score of each token.
pub(super) fn scores<'a>(
    metadata: &'a gguf::Metadata,
    vocab: &Vocab<'_>,
) -> Result<Cow<'a, [f32]>, Error> {
    let scores = metadata.f32s("tokenizer.ggml.scores")?;
    if scores.len() != vocab.len() {
        return Err(vocab.error(format!(
            "tokenizer.ggml.scores has {} values for the {} of tokenizer.ggml.tokens",
            scores.len(),
            vocab.len()
        )));
    }
    Ok(scores)
}

impl Spm {
    pub fn new(metadata: &gguf::Metadata, vocab: &Vocab<'_>) -> Result<Self, Error> {
        let scores = scores(metadata, vocab)?;
        let mut pieces = HashMap::with_capacity(vocab.len());
        let mut bytes = [None; 256];
        for (id, text, ty) in vocab.iter() {
            match ty {
                TokenType::Normal | TokenType::UserDefined => {
                    // Of two tokens with the same text the first counts.
                    pieces.entry(text.into()).or_insert(id);
                }
                TokenType::Byte => {
                    let byte = byte_token(text).ok_or_else(|| {
                        vocab.error(format!(
                            "token {id} is of type byte, but is written {text:?} rather than like \"<0x0A>\""
                        ))
                    })?;
                    bytes[usize::from(byte)] = Some(id);
                }
                TokenType::Unknown | TokenType::Control | TokenType::Unused => {}
            }
        }
        Ok(Self {
            pieces,
            scores: scores.into_owned(),
            bytes,
            unknown: vocab.unknown(metadata)?,
            adds_prefix_space: metadata
                .opt_bool("tokenizer.ggml.add_space_prefix")?
                .unwrap_or(true),
        })
    }

    /// Whether text is encoded as if a space stood before it.
    pub fn adds_prefix_space(&self) -> bool {
        self.adds_prefix_space
    }

    /// Appends the ids of plain text; `prefix` where the prefix space belongs.
    pub fn encode(&self, text: &str, prefix: bool, ids: &mut Vec<u32>) -> Result<(), Error> {
        let mut spelled = String::with_capacity(text.len() + 8);
        if prefix && self.adds_prefix_space {
            spelled.push_str(SPACE);
        }
        spelled.push_str(&text.replace(' ', SPACE));
        let symbols = self.merge(&spelled);
        let mut at = (!symbols.is_empty()).then_some(0);
        while let Some(i) = at {
            let symbol = &symbols[i];
            let piece = &spelled[symbol.start..symbol.end];
            match self.pieces.get(piece) {
                Some(&id) => ids.push(id),
                None => self.encode_bytes(piece, ids)?,
            }
            at = symbol.next;
        }
        Ok(())
    }

    /// A character that has no token.
    fn encode_bytes(&self, piece: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        for byte in piece.bytes() {
            let id = self.bytes[usize::from(byte)].or(self.unknown);
            ids.push(id.ok_or_else(|| {
                Error::Encode(format!(
                    "the vocabulary has no token for {piece:?}, none for the byte 0x{byte:02X} and no unknown token"
                ))
            })?);
        }
        Ok(())
    }

    /// Merges until nothing can be merged. The first symbol is the head of the list.
    fn merge(&self, text: &str) -> Vec<Symbol> {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol {
                start,
                end: start + c.len_utf8(),
                prev: i.checked_sub(1),
                next: Some(i + 1),
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        let mut queue = BinaryHeap::new();
        for right in 1..symbols.len() {
            queue.extend(self.candidate(text, &symbols, right - 1, right));
        }
        while let Some(merge) = queue.pop() {
            let (left, right) = (&symbols[merge.left], &symbols[merge.right]);
            // A part that was merged away is empty; one that grew makes the pair longer.
            let stale = left.start == left.end
                || right.start == right.end
                || right.end - left.start != merge.len;
            if stale {
                continue;
            }
            let next = right.next;
            symbols[merge.left].end = right.end;
            symbols[merge.left].next = next;
            let gone = &mut symbols[merge.right];
            gone.start = gone.end;
            if let Some(next) = next {
                symbols[next].prev = Some(merge.left);
                queue.extend(self.candidate(text, &symbols, merge.left, next));
            }
            if let Some(prev) = symbols[merge.left].prev {
                queue.extend(self.candidate(text, &symbols, prev, merge.left));
            }
        }
        symbols
    }

    fn candidate(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: usize,
        right: usize,
    ) -> Option<Merge> {
        let merged = &text[symbols[left].start..symbols[right].end];
        let &id = self.pieces.get(merged)?;
        Some(Merge {
            score: self.scores[id as usize],
            left,
            right,
            len: merged.len(),
        })
    }
}

/// The byte of a token like `<0x0A>`.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2)
        .then(|| u8::from_str_radix(hex, 16).ok())
        .flatten()
}

/// What each token stands for.
pub(super) fn token_bytes(vocab: &Vocab<'_>) -> Vec<Box<[u8]>> {
    vocab
        .iter()
        .map(|(_, text, ty)| match ty {
            TokenType::Unused => Box::default(),
            TokenType::Control | TokenType::Unknown => text.as_bytes().into(),
            TokenType::Byte => byte_token(text).into_iter().collect(),
            TokenType::Normal | TokenType::UserDefined => {
                text.replace(SPACE, " ").into_bytes().into()
            }
        })
        .collect()
}
