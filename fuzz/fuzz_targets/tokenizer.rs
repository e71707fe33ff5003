//! Any text through any vocabulary: nothing panics, ids are inside the vocabulary, and byte-level BPE of
//! plain tokens gives back the text it was given.
//!
//! An input is a byte of flags, then the text. With flag 16 there is a vocabulary too, in parts with 0xff before
//! them: tokens, a line each; merges, a line each; a byte for each token's type; one for its score; and SentencePiece's
//! character map.

#![no_main]

use gguf::{Array, Metadata, Value};
use kigo::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;

const PRE: [&str; 8] = [
    "default",
    "llama-bpe",
    "qwen2",
    "gpt-2",
    "smollm",
    "gpt-4o",
    "refact",
    "deepseek-llm",
];

/// GPT-2's byte alphabet: printable bytes stand for themselves, the others for what follows 255.
fn byte_char(byte: u8) -> char {
    let plain = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if plain(&byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !plain(b)).count() as u32;
    char::from_u32(256 + before).expect("a letter")
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Bpe,
    Spm,
    Unigram,
    WordPiece,
}

impl Kind {
    /// By flag 1 and the number of the pre-tokenizer, which only BPE has.
    fn of(pieces: bool, pre: usize) -> Self {
        match (pieces, pre % 3) {
            (false, _) => Self::Bpe,
            (true, 0) => Self::Spm,
            (true, 1) => Self::Unigram,
            (true, _) => Self::WordPiece,
        }
    }
}

/// What a vocabulary is made of, beside the 256 bytes.
struct Vocabulary {
    pieces: bool,
    pre: usize,
    space_prefix: bool,
    tokens: Vec<String>,
    merges: Vec<String>,
    kinds: Vec<u8>,
    scores: Vec<u8>,
    charsmap: Vec<u8>,
}

impl Vocabulary {
    /// None where it is refused.
    fn build(self) -> Option<Tokenizer> {
        let (pieces, pre) = (self.pieces, self.pre);
        let model = Kind::of(pieces, pre);
        let bytes = (0..=255u8).map(|b| {
            if pieces {
                format!("<0x{b:02X}>")
            } else {
                byte_char(b).to_string()
            }
        });
        let tokens: Vec<String> = bytes.chain(self.tokens).collect();
        let of = |bytes: &[u8], i: usize| bytes.get(i.wrapping_sub(256)).copied();
        let kind = |i: usize| match of(&self.kinds, i) {
            // Some unigram vocabularies spell what they lack in bytes, others have one unknown token.
            _ if pieces && i < 256 => {
                if pre < 4 {
                    6
                } else {
                    5
                }
            }
            Some(kind) => i32::from(kind % 8),
            None => 1,
        };
        let score = |i: usize| of(&self.scores, i).map_or(0.0, |s| f32::from(s) - 128.0);
        let ids = 0..tokens.len();
        let name = match model {
            Kind::Bpe => "gpt2",
            Kind::Spm => "llama",
            Kind::Unigram => "t5",
            Kind::WordPiece => "bert",
        };
        let entries: [(&str, Value); 15] = [
            ("tokenizer.ggml.model", name.into()),
            ("tokenizer.ggml.pre", PRE[pre].into()),
            ("tokenizer.ggml.unknown_token_id", 3u32.into()),
            ("tokenizer.ggml.cls_token_id", 4u32.into()),
            ("tokenizer.ggml.seperator_token_id", 5u32.into()),
            ("tokenizer.ggml.remove_extra_whitespaces", (pre != 7).into()),
            ("tokenizer.ggml.normalizer.lowercase", (pre == 2).into()),
            (
                "tokenizer.ggml.precompiled_charsmap",
                Value::Array(Array::U8(self.charsmap)),
            ),
            (
                "tokenizer.ggml.token_type",
                Value::Array(Array::I32(ids.clone().map(kind).collect())),
            ),
            (
                "tokenizer.ggml.scores",
                Value::Array(Array::F32(ids.map(score).collect())),
            ),
            ("tokenizer.ggml.tokens", Value::Array(Array::String(tokens))),
            (
                "tokenizer.ggml.merges",
                Value::Array(Array::String(self.merges)),
            ),
            ("tokenizer.ggml.bos_token_id", 1u32.into()),
            ("tokenizer.ggml.eos_token_id", 2u32.into()),
            ("tokenizer.ggml.add_space_prefix", self.space_prefix.into()),
        ];
        let entries = entries.map(|(key, value)| (key.to_owned(), value));
        let metadata = Metadata::new("fuzz.gguf", entries.into()).expect("no key twice");
        let _ = kigo::tokenizer::check(&metadata);
        Tokenizer::from_metadata(&metadata).ok()
    }
}

fn lines(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    text.split('\n')
        .filter(|l| !l.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Some words, a control token and a user's: kept, as a tokenizer takes longer to build than to use.
fn kept(pieces: bool, pre: usize, space_prefix: bool) -> Option<&'static Tokenizer> {
    static KEPT: [OnceLock<Option<Tokenizer>>; 32] = [const { OnceLock::new() }; 32];
    let at = usize::from(pieces) + 2 * usize::from(space_prefix) + 4 * pre;
    let space = if pieces { "\u{2581}" } else { "\u{120}" };
    let words = ["he", "ll", "hell", "o", space, "<|end|>", "<tool>"];
    let make = || Vocabulary {
        pieces,
        pre,
        space_prefix,
        tokens: words.map(str::to_owned).to_vec(),
        merges: lines(b"h e\nl l\nhe ll"),
        kinds: vec![1, 1, 1, 1, 1, 3, 4],
        scores: vec![130, 130, 132, 129, 127, 128, 128],
        charsmap: Vec::new(),
    };
    KEPT[at].get_or_init(|| make().build()).as_ref()
}

fuzz_target!(|data: &[u8]| {
    let Some((&flags, rest)) = data.split_first() else {
        return;
    };
    let flag = |bit: u8| flags & bit != 0;
    let (pieces, add, parse, space_prefix) = (flag(1), flag(2), flag(4), flag(8));
    let pre = usize::from(flags >> 5);
    let mut parts = rest.split(|&b| b == 0xff);
    let mut part = || parts.next().unwrap_or_default();
    let text = String::from_utf8_lossy(part());
    let (own, plain);
    let tokenizer = if flag(16) {
        let vocabulary = Vocabulary {
            pieces,
            pre,
            space_prefix,
            tokens: lines(part()),
            merges: lines(part()),
            kinds: part().to_vec(),
            scores: part().to_vec(),
            charsmap: part().to_vec(),
        };
        plain = !pieces && vocabulary.kinds.iter().all(|kind| kind % 8 == 1);
        own = vocabulary.build();
        own.as_ref()
    } else {
        plain = !pieces;
        kept(pieces, pre, space_prefix)
    };
    let Some(tokenizer) = tokenizer else {
        return;
    };
    let Ok(ids) = tokenizer.encode(&text, add, parse) else {
        return;
    };
    assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
    let back = tokenizer.decode(&ids);
    // A token that merges make but that is no plain text stands for its own letters.
    if plain && !add {
        assert_eq!(String::from_utf8_lossy(&back), text, "{ids:?}");
    }
    let mut detokenizer = tokenizer.detokenizer();
    let mut streamed: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
    streamed.push_str(&detokenizer.finish());
    assert!(streamed.len() <= 3 * back.len() + 3);
});
