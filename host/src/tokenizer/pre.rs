//! Pre-tokenizers: how text is cut into words before BPE, by the name in `tokenizer.ggml.pre`.
//!
//! A name stands for a list of regular expressions, applied one after the other: each cuts the
//! pieces that the one before it left into its matches and what lies between them. The expressions are
//! those of the `tokenizer.json` that each model was published with; the names are those that
//! llama.cpp's converter writes.
//!
//! All of them end in `\s+(?!\S)|\s+`: a run of spaces leaves its last one to the word that follows.
//! Written so, it needs a backtracking engine, and those give up on long runs. Here the look-ahead
//! is left out, and [`Pattern::next`] gives the last space back: linear time, any length.

use regex::Regex;

use super::Error;
use super::vocab::Vocab;

/// One pre-tokenizer, known by one or more names.
struct Known {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// A word that is a token as it stands is taken whole, whatever the merges would make of it.
    ignore_merges: bool,
    /// Whether BOS is added if the file does not say.
    adds_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+";
const SEED: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+";
const DEEPSEEK3: &str = r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+";

const KNOWN: &[Known] = &[
    Known {
        names: &[
            "gpt-2", "gpt2", "olmo", "phi-2", "mpt", "jais", "jina-es", "jina-de", "exaone4",
        ],
        patterns: &[GPT2],
        ignore_merges: false,
        adds_bos: false,
    },
    Known {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "lfm2",
        ],
        patterns: &[LLAMA3],
        ignore_merges: true,
        adds_bos: true,
    },
    Known {
        names: &["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"],
        patterns: &[LLAMA3],
        ignore_merges: false,
        adds_bos: false,
    },
    Known {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "stablelm2",
            "megrez",
            "hunyuan",
        ],
        patterns: &[QWEN2],
        ignore_merges: false,
        adds_bos: false,
    },
    Known {
        names: &["qwen35"],
        patterns: &[QWEN35],
        ignore_merges: false,
        adds_bos: false,
    },
    Known {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "codeshell",
            "command-r",
            "exaone",
        ],
        patterns: &[r"\p{N}", GPT2],
        ignore_merges: false,
        adds_bos: false,
    },
    Known {
        names: &["gpt-4o", "llama4"],
        patterns: &[GPT4O],
        ignore_merges: false,
        adds_bos: false,
    },
    Known {
        names: &["tekken"],
        patterns: &[TEKKEN],
        ignore_merges: true,
        adds_bos: false,
    },
    Known {
        names: &["deepseek-v3"],
        patterns: &[r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3],
        ignore_merges: false,
        adds_bos: false,
    },
    Known {
        names: &["deepseek-coder"],
        patterns: &[
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            r"[一-龥ࠀ-一가-퟿]+",
            r"\p{N}",
        ],
        ignore_merges: false,
        adds_bos: false,
    },
    Known {
        names: &["seed-coder"],
        patterns: &[SEED],
        ignore_merges: false,
        adds_bos: false,
    },
    Known {
        names: &["falcon"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
        ignore_merges: false,
        adds_bos: false,
    },
    Known {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ignore_merges: false,
        adds_bos: false,
    },
];

/// One expression.
struct Pattern {
    regex: Regex,
    /// Whether `(?!\S)` was left out of it.
    leaves_last_space: bool,
    /// Whether an alternative before `\s+` takes all that ends in a line break.
    breaks_lines: bool,
}

impl Pattern {
    fn new(expression: &str) -> Result<Self, regex::Error> {
        Ok(Self {
            regex: Regex::new(expression)?,
            leaves_last_space: expression.ends_with(r"|\s+"),
            breaks_lines: expression.contains(r"|\s*[\r\n]+"),
        })
    }

    /// The first match from `from` on; never empty.
    fn next(&self, text: &str, from: usize) -> Option<(usize, usize)> {
        let found = self.regex.find_at(text, from)?;
        let (start, mut end) = (found.start(), found.end());
        let matched = found.as_str();
        if self.leaves_last_space
            && end < text.len()
            && matched.chars().all(char::is_whitespace)
            && !(self.breaks_lines && matched.ends_with(['\r', '\n']))
        {
            // A single space stays: there is nothing before it to match.
            let last = matched.chars().next_back().map_or(0, char::len_utf8);
            if last < matched.len() {
                end -= last;
            }
        }
        Some((start, end))
    }
}

/// Cuts text into words.
pub(super) struct PreTokenizer {
    patterns: Vec<Pattern>,
    pub ignore_merges: bool,
    pub adds_bos: bool,
}

impl PreTokenizer {
    /// # Errors
    /// The name is unknown.
    pub fn by_name(name: &str, vocab: &Vocab<'_>) -> Result<Self, Error> {
        let Some(known) = KNOWN.iter().find(|k| k.names.contains(&name)) else {
            let names: Vec<&str> = KNOWN.iter().flat_map(|k| k.names).copied().collect();
            return Err(vocab.error(format!(
                "tokenizer.ggml.pre is {name:?}, a pre-tokenizer that is not known here, and another \
                 one would silently give wrong tokens; known are {}",
                names.join(", ")
            )));
        };
        let patterns = known
            .patterns
            .iter()
            .map(|p| Pattern::new(p))
            .collect::<Result<_, _>>()
            .map_err(|e| vocab.error(format!("pre-tokenizer {name:?}: {e}")))?;
        Ok(Self {
            patterns,
            ignore_merges: known.ignore_merges,
            adds_bos: known.adds_bos,
        })
    }

    /// The words of a text, in order; together they are the text.
    pub fn words<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut pieces = vec![text];
        for pattern in &self.patterns {
            let mut cut = Vec::with_capacity(pieces.len() * 2);
            for piece in pieces {
                let mut done = 0;
                while let Some((start, end)) = pattern.next(piece, done) {
                    if start > done {
                        cut.push(&piece[done..start]);
                    }
                    cut.push(&piece[start..end]);
                    done = end;
                }
                if done < piece.len() {
                    cut.push(&piece[done..]);
                }
            }
            pieces = cut;
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;
    use tokenizers::utils::SysRegex;

    /// The expression as published, with its look-ahead, in a backtracking engine.
    fn published(expression: &str) -> SysRegex {
        let full = match expression.strip_suffix(r"|\s+") {
            Some(start) => format!(r"{start}|\s+(?!\S)|\s+"),
            None => expression.to_owned(),
        };
        SysRegex::new(&full).unwrap()
    }

    /// Every expression, ours and as published.
    static PAIRS: LazyLock<Vec<(&str, Pattern, SysRegex)>> = LazyLock::new(|| {
        let mut all: Vec<&str> = KNOWN.iter().flat_map(|k| k.patterns).copied().collect();
        all.sort_unstable();
        all.dedup();
        all.into_iter()
            .map(|e| (e, Pattern::new(e).unwrap(), published(e)))
            .collect()
    });

    #[test]
    fn every_name_is_known_once() {
        let mut names: Vec<&str> = KNOWN.iter().flat_map(|k| k.names).copied().collect();
        let n = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), n);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn giving_the_last_space_back_is_the_look_ahead(
            text in r"([ \t\r\n\u{a0}\u{3000}]{0,4}([a-cA-C]{1,3}|[0-9]{1,5}|'s|'LL|[.,!?/_$]{1,2}|é|季語|ª|²|\u{301})?){0,8}"
        ) {
            for (expression, pattern, published) in PAIRS.iter() {
                let mut ours = Vec::new();
                let mut done = 0;
                while let Some((start, end)) = pattern.next(&text, done) {
                    ours.push((start, end));
                    done = end;
                }
                let theirs: Vec<(usize, usize)> = published.find_iter(&text).collect();
                prop_assert_eq!(ours, theirs, "{}", expression);
            }
        }
    }
}
