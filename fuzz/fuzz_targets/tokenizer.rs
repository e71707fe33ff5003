//! Any text through any vocabulary: nothing panics, ids are inside the vocabulary, and byte-level BPE of
//! plain tokens gives back the text it was given.
//!
//! An input is a byte of flags, then parts with 0xff between them: the text; tokens, a line each; merges, a
//! line each; a byte for each token's type; and one for its score.

#![no_main]

use gguf::{Array, Metadata, Value};
use kigo::tokenizer::Tokenizer;
use libfuzzer_sys::fuzz_target;

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

fuzz_target!(|data: &[u8]| {
    let Some((&flags, rest)) = data.split_first() else {
        return;
    };
    let mut parts = rest.split(|&b| b == 0xff);
    let mut part = || parts.next().unwrap_or_default();
    let text = String::from_utf8_lossy(part());
    let lines = |bytes: &[u8]| -> Vec<String> {
        let text = String::from_utf8_lossy(bytes);
        text.split('\n')
            .filter(|l| !l.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let (spm, add, parse) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
    let mut tokens: Vec<String> = (0..=255u8)
        .map(|b| {
            if spm {
                format!("<0x{b:02X}>")
            } else {
                byte_char(b).to_string()
            }
        })
        .collect();
    tokens.extend(lines(part()));
    let merges = lines(part());
    let kinds = part();
    let scores = part();
    let of = |bytes: &[u8], i: usize| bytes.get(i.wrapping_sub(256)).copied();
    let types = (0..tokens.len()).map(|i| match (of(kinds, i), spm && i < 256) {
        (_, true) => 6,
        (Some(kind), _) => i32::from(kind % 8),
        _ => 1,
    });
    let types: Vec<i32> = types.collect();
    let plain = types.iter().all(|&ty| ty == 1);
    let scores: Vec<f32> = (0..tokens.len())
        .map(|i| of(scores, i).map_or(0.0, |s| f32::from(s) - 128.0))
        .collect();
    let entries: [(&str, Value); 9] = [
        (
            "tokenizer.ggml.model",
            (if spm { "llama" } else { "gpt2" }).into(),
        ),
        ("tokenizer.ggml.pre", PRE[usize::from(flags >> 5)].into()),
        ("tokenizer.ggml.tokens", Value::Array(Array::String(tokens))),
        ("tokenizer.ggml.token_type", Value::Array(Array::I32(types))),
        ("tokenizer.ggml.scores", Value::Array(Array::F32(scores))),
        ("tokenizer.ggml.merges", Value::Array(Array::String(merges))),
        ("tokenizer.ggml.bos_token_id", 1u32.into()),
        ("tokenizer.ggml.eos_token_id", 2u32.into()),
        ("tokenizer.ggml.add_space_prefix", (flags & 8 != 0).into()),
    ];
    let entries = entries.map(|(key, value)| (key.to_owned(), value));
    let metadata = Metadata::new("fuzz.gguf", entries.into()).expect("no key twice");
    let _ = kigo::tokenizer::check(&metadata);
    let Ok(tokenizer) = Tokenizer::from_metadata(&metadata) else {
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
