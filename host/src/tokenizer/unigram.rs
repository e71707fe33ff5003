//! SentencePiece's unigram model (Kudo 2018): of all ways to cut a text into pieces, the one whose
//! scores, logarithms of probabilities, have the greatest sum. T5, XLM-R and their kin.
//!
//! Own code: the `tokenizers` crate holds its pieces in a hash map for each byte of each piece, hundreds
//! of megabytes for a vocabulary of 250,000. An Aho-Corasick automaton finds the same pieces in one
//! pass; a test compares the two.

use aho_corasick::{AhoCorasick, AhoCorasickKind};

use super::Error;
use super::charsmap::Charsmap;
use super::spm::{SPACE, byte_token, scores};
use super::vocab::{TokenType, Vocab};

/// How much less likely than the least likely piece a character without one is.
const UNKNOWN_PENALTY: f64 = 10.0;

pub(super) struct Unigram {
    /// None without pieces.
    pieces: Option<AhoCorasick>,
    /// Id and score of each piece.
    tokens: Vec<(u32, f64)>,
    unknown: u32,
    unknown_score: f64,
    /// The tokens of all bytes, for vocabularies that spell what they lack.
    bytes: Option<Box<[u32; 256]>>,
    charsmap: Option<Charsmap>,
    adds_prefix_space: bool,
    /// Spaces at the ends are removed, and runs of them become one.
    squeezes_spaces: bool,
}

/// The character map of the file.
pub(super) fn charsmap(
    metadata: &gguf::Metadata,
    vocab: &Vocab<'_>,
) -> Result<Option<Charsmap>, Error> {
    const KEY: &str = "tokenizer.ggml.precompiled_charsmap";
    let Some(bytes) = metadata.opt_u8s(KEY)? else {
        return Ok(None);
    };
    // Models without normalisation have an empty one.
    if bytes.is_empty() {
        return Ok(None);
    }
    Charsmap::read(&bytes)
        .map(Some)
        .map_err(|what| vocab.error(format!("{KEY} {what}")))
}

/// The best way to a place in the text.
#[derive(Clone, Copy)]
struct Best {
    score: f64,
    /// Where its last piece begins, and its token.
    from: usize,
    id: u32,
}

impl Unigram {
    pub fn new(metadata: &gguf::Metadata, vocab: &Vocab<'_>) -> Result<Self, Error> {
        let scores = scores(metadata, vocab)?;
        if let Some(id) = scores.iter().position(|s| !s.is_finite()) {
            return Err(vocab.error(format!(
                "tokenizer.ggml.scores of token {id} is {}, expected a finite number",
                scores[id]
            )));
        }
        let unknown = vocab.unknown(metadata)?.ok_or_else(|| {
            vocab.error(
                "tokenizer.ggml.unknown_token_id is missing and no token is of type unknown (2), \
                 but a unigram vocabulary needs one"
                    .into(),
            )
        })?;
        let (mut texts, mut tokens) = (Vec::new(), Vec::new());
        let mut bytes = [None; 256];
        for (id, text, ty) in vocab.iter() {
            match ty {
                // User-defined ones are found before.
                TokenType::Normal if !text.is_empty() && id != unknown => {
                    texts.push(text);
                    tokens.push((id, f64::from(scores[id as usize])));
                }
                TokenType::Byte => {
                    if let Some(byte) = byte_token(text) {
                        bytes[usize::from(byte)] = Some(id);
                    }
                }
                _ => {}
            }
        }
        let least = tokens.iter().map(|&(_, score)| score).reduce(f64::min);
        let pieces = match texts.as_slice() {
            [] => None,
            texts => Some(
                AhoCorasick::builder()
                    .kind(Some(AhoCorasickKind::ContiguousNFA))
                    .build(texts)
                    .map_err(|e| vocab.error(format!("tokenizer.ggml.tokens: {e}")))?,
            ),
        };
        let all_bytes: Option<Vec<u32>> = bytes.into_iter().collect();
        Ok(Self {
            pieces,
            tokens,
            unknown,
            unknown_score: least.unwrap_or(0.0) - UNKNOWN_PENALTY,
            bytes: all_bytes.and_then(|ids| ids.try_into().ok()),
            charsmap: charsmap(metadata, vocab)?,
            adds_prefix_space: metadata
                .opt_bool("tokenizer.ggml.add_space_prefix")?
                .unwrap_or(true),
            squeezes_spaces: metadata
                .opt_bool("tokenizer.ggml.remove_extra_whitespaces")?
                .unwrap_or(true),
        })
    }

    /// Whether text is encoded as if a space stood before it.
    pub fn adds_prefix_space(&self) -> bool {
        self.adds_prefix_space
    }

    /// The text as pieces spell it.
    fn spell(&self, text: &str, prefix: bool) -> String {
        let normal = match &self.charsmap {
            Some(map) => map.normalise(text),
            None => text.to_owned(),
        };
        let mut spelled = String::with_capacity(normal.len() + 8);
        if prefix && self.adds_prefix_space {
            spelled.push_str(SPACE);
        }
        let empty = spelled.len();
        if self.squeezes_spaces {
            for word in normal.split(' ').filter(|word| !word.is_empty()) {
                if spelled.len() > empty {
                    spelled.push_str(SPACE);
                }
                spelled.push_str(word);
            }
        } else {
            spelled.push_str(&normal.replace(' ', SPACE));
        }
        if spelled.len() == empty {
            spelled.clear();
        }
        spelled
    }

    /// Appends the ids of plain text; `prefix` where the prefix space belongs.
    pub fn encode(&self, text: &str, prefix: bool, ids: &mut Vec<u32>) {
        let spelled = self.spell(text, prefix);
        let first = ids.len();
        // From the end, as each place knows only how one comes to it.
        let best = self.best(&spelled);
        let mut end = spelled.len();
        let mut after_unknown = false;
        while end > 0 {
            let Best { from, id, .. } = best[end];
            match &self.bytes {
                Some(bytes) if id == self.unknown => {
                    let spelled = &spelled.as_bytes()[from..end];
                    ids.extend(spelled.iter().rev().map(|&b| bytes[usize::from(b)]));
                }
                // Neighbours without a piece are one unknown token.
                None if id == self.unknown && after_unknown => {}
                _ => ids.push(id),
            }
            after_unknown = id == self.unknown;
            end = from;
        }
        ids[first..].reverse();
    }

    /// The best way to each place in the text, by the Viterbi algorithm; of equals the one with
    /// the longer last piece.
    fn best(&self, text: &str) -> Vec<Best> {
        let start = Best {
            score: f64::NEG_INFINITY,
            from: 0,
            id: self.unknown,
        };
        let mut best = vec![start; text.len() + 1];
        best[0].score = 0.0;
        // In the order of their ends, so that the way to a match's beginning is known.
        let mut matches = self
            .pieces
            .iter()
            .flat_map(|pieces| pieces.find_overlapping_iter(text))
            .peekable();
        for (at, c) in text.char_indices() {
            let end = at + c.len_utf8();
            let mut has_piece = false;
            let mut to = start;
            while let Some(found) = matches.next_if(|m| m.end() <= end) {
                let (id, score) = self.tokens[found.pattern().as_usize()];
                let score = best[found.start()].score + score;
                has_piece |= found.start() == at;
                if score > to.score {
                    to = Best {
                        score,
                        from: found.start(),
                        id,
                    };
                }
            }
            if !has_piece {
                let score = best[at].score + self.unknown_score;
                if score > to.score {
                    to = Best {
                        score,
                        from: at,
                        id: self.unknown,
                    };
                }
            }
            best[end] = to;
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gguf::{Metadata, Value};
    use proptest::prelude::*;
    use tokenizers::Model as _;
    use tokenizers::models::unigram::Unigram as Reference;

    /// Pieces, with the unknown token before them; bytes behind them if wanted.
    fn unigram(pieces: &[(&str, f32)], with_bytes: bool) -> Unigram {
        let mut tokens = vec!["<unk>".to_owned()];
        let (mut types, mut scores) = (vec![2], vec![0.0]);
        for &(text, score) in pieces {
            tokens.push(text.to_owned());
            types.push(1);
            scores.push(score);
        }
        for byte in (0..=255u8).filter(|_| with_bytes) {
            tokens.push(format!("<0x{byte:02X}>"));
            types.push(6);
            scores.push(0.0);
        }
        let entries: [(&str, Value); 3] = [
            ("tokenizer.ggml.tokens", tokens.into()),
            ("tokenizer.ggml.token_type", types.into()),
            ("tokenizer.ggml.scores", scores.into()),
        ];
        let entries = entries.map(|(key, value)| (key.to_owned(), value));
        let metadata = Metadata::new("m.gguf", entries.into()).unwrap();
        let vocab = Vocab::read(&metadata).unwrap();
        Unigram::new(&metadata, &vocab).unwrap()
    }

    fn ids(unigram: &Unigram, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        unigram.encode(text, true, &mut ids);
        ids
    }

    #[test]
    fn the_likeliest_pieces_and_unknown_ones() {
        // 1 ▁, 2 a, 3 b, 4 ab, 5 ▁abc
        let pieces = [
            ("▁", -2.0),
            ("a", -1.0),
            ("b", -1.0),
            ("ab", -2.5),
            ("▁abc", -9.0),
        ];
        let plain = unigram(&pieces, false);
        assert_eq!(ids(&plain, "ab"), [1, 2, 3]);
        // Neighbours without a piece are one unknown token.
        assert_eq!(ids(&plain, "a季語b"), [1, 2, 0, 3]);
        assert_eq!(ids(&plain, "abc"), [5]);
        assert_eq!(ids(&plain, "  a   b "), [1, 2, 1, 3]);
        assert_eq!(ids(&plain, "  "), [0u32; 0]);
        assert_eq!(ids(&plain, ""), [0u32; 0]);
        let bytes = unigram(&pieces, true);
        assert_eq!(ids(&bytes, "aé"), [1, 2, 6 + 0xC3, 6 + 0xA9]);
        assert_eq!(ids(&unigram(&[], false), "ab"), [0]);
    }

    #[test]
    fn long_texts_take_a_time_in_proportion() {
        let run = "a".repeat(300);
        let pieces: Vec<(&str, f32)> = (1..=300).map(|n| (&run[..n], -1.0)).collect();
        let unigram = unigram(&pieces, false);
        assert_eq!(ids(&unigram, &"a".repeat(300_000)).len(), 1001);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn as_the_tokenizers_crate_has_it(
            pieces in prop::collection::btree_map("[ab▁é季]{1,4}", -8i8..0, 1..20),
            text in "[abé季x😀 ]{0,30}",
        ) {
            let pieces: Vec<(&str, f32)> = pieces
                .iter()
                .map(|(text, &score)| (text.as_str(), f32::from(score)))
                .collect();
            let ours = unigram(&pieces, false);
            // Its unknown token's text and score must not count.
            let mut vocab = vec![("\u{10ffff}".to_owned(), f64::INFINITY)];
            vocab.extend(pieces.iter().map(|&(t, s)| (t.to_owned(), f64::from(s))));
            let reference = Reference::from(vocab, Some(0), false).unwrap();
            let tokens = reference.tokenize(&ours.spell(&text, true)).unwrap();
            let theirs: Vec<u32> = tokens.iter().map(|t| t.id).collect();
            prop_assert_eq!(ids(&ours, &text), theirs);
        }
    }
}
