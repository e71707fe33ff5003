use gguf::{Metadata, Value};

use super::bytes::char_of;
use super::{Error, Tokenizer};

/// What a small vocabulary adds to the 256 bytes: text and type.
type Extra<'a> = &'a [(&'a str, i32)];

fn metadata(entries: Vec<(&str, Value)>) -> Metadata {
    let entries = entries.into_iter().map(|(k, v)| (k.to_owned(), v));
    Metadata::new("m.gguf", entries.collect()).unwrap()
}

/// The 256 bytes (id = byte), then `extra`.
fn bpe_entries(extra: Extra<'_>, merges: &[&str]) -> Vec<(&'static str, Value)> {
    let mut tokens: Vec<String> = (0..=255).map(|b| char_of(b).to_string()).collect();
    let mut types = vec![1i32; 256];
    for (text, ty) in extra {
        tokens.push((*text).into());
        types.push(*ty);
    }
    let merges: Vec<String> = merges.iter().map(|m| (*m).to_owned()).collect();
    vec![
        ("tokenizer.ggml.model", "gpt2".into()),
        ("tokenizer.ggml.pre", "qwen2".into()),
        ("tokenizer.ggml.tokens", tokens.into()),
        ("tokenizer.ggml.token_type", types.into()),
        ("tokenizer.ggml.merges", merges.into()),
    ]
}

fn set(entries: &mut Vec<(&'static str, Value)>, key: &'static str, value: Value) {
    entries.retain(|(k, _)| *k != key);
    entries.push((key, value));
}

fn load(entries: Vec<(&'static str, Value)>) -> Result<Tokenizer, Error> {
    Tokenizer::from_metadata(&metadata(entries))
}

fn error(entries: Vec<(&'static str, Value)>) -> String {
    match load(entries) {
        Ok(t) => panic!("loaded: {t:?}"),
        Err(e) => e.to_string(),
    }
}

const EXTRA: Extra<'static> = &[
    ("he", 1),           // 256
    ("ll", 1),           // 257
    ("hell", 1),         // 258
    ("<|end|>", 3),      // 259
    ("<tool>", 4),       // 260
    ("[PAD0]", 5),       // 261
    ("<|end|><|x|>", 3), // 262
    ("", 3),             // 263
    ("<|eot_id|>", 1),   // 264: the name alone does not make it special
];
const MERGES: &[&str] = &["h e", "l l", "he ll"];

fn small() -> Tokenizer {
    let mut entries = bpe_entries(EXTRA, MERGES);
    set(&mut entries, "tokenizer.ggml.bos_token_id", 262u32.into());
    set(&mut entries, "tokenizer.ggml.eos_token_id", 260u32.into());
    set(&mut entries, "tokenizer.ggml.add_bos_token", true.into());
    set(&mut entries, "tokenizer.ggml.add_eos_token", true.into());
    load(entries).unwrap()
}

#[test]
fn merges_by_rank_and_special_tokens_whole() {
    let t = small();
    assert_eq!(t.encode("hello", false, false).unwrap(), [258, 111]);
    assert_eq!(t.encode("h", true, true).unwrap(), [262, 104, 260]);
    assert_eq!(t.encode("", true, true).unwrap(), [262, 260]);
    // Control tokens only when asked for, user-defined ones always, the longest first.
    assert_eq!(t.encode("a<|end|>b", false, true).unwrap(), [97, 259, 98]);
    assert_eq!(t.encode("<|end|><|x|>", false, true).unwrap(), [262]);
    let plain = t.encode("a<|end|>b", false, false).unwrap();
    assert_eq!(
        plain,
        "a<|end|>b".bytes().map(u32::from).collect::<Vec<_>>()
    );
    assert_eq!(t.encode("<tool>h", false, false).unwrap(), [260, 104]);
    // Text that spells a padding token is text.
    assert_eq!(t.encode("[PAD0]", false, true).unwrap().len(), 6);
}

#[test]
fn decoding_inverts_the_byte_alphabet() {
    let t = small();
    let text = "\0 \n\u{7f}é季😀\u{ad}hello<|end|><tool>";
    let ids = t.encode(text, false, true).unwrap();
    assert_eq!(t.decode(&ids), text.as_bytes());
    assert_eq!(t.decode_lossy(&[0xE5, 0xAD, 104]), "\u{fffd}h");
    assert_eq!(t.token_bytes(261), b"");
    assert_eq!(t.token_bytes(9999), b"");
    assert!(!t.is_control(9999));
    assert_eq!(t.vocab_size(), 265);
}

#[test]
fn streams_of_ids_give_whole_characters_and_no_control_text() {
    let t = small();
    let mut d = t.detokenizer();
    let shown: Vec<String> = [0xF0, 0x9F, 259, 0x98, 0x80, 258, 261, 0xE5]
        .into_iter()
        .map(|id| d.push(id))
        .collect();
    assert_eq!(shown, ["", "", "", "", "😀", "hell", "", ""]);
    assert_eq!(d.finish(), "\u{fffd}");
    assert_eq!(d.finish(), "");
}

#[test]
fn generation_ends_at_eos_eot_eom_and_known_control_tokens() {
    let t = small();
    assert_eq!(t.end_of_generation(), [259, 260]);
    assert!(t.is_end_of_generation(260) && !t.is_end_of_generation(262));
    let mut entries = bpe_entries(EXTRA, MERGES);
    set(&mut entries, "tokenizer.ggml.eot_token_id", 5u32.into());
    set(&mut entries, "tokenizer.ggml.eom_token_id", 7u32.into());
    assert_eq!(load(entries).unwrap().end_of_generation(), [5, 7, 259]);
    // A family that is not known by name: what its template puts after an answer.
    let extra: Extra<'_> = &[("[TURN]", 3), ("[TURN-END]", 3), ("[OTHER]", 3)];
    let mut entries = bpe_entries(extra, &[]);
    set(&mut entries, "tokenizer.ggml.eos_token_id", 258u32.into());
    let template = "{% for m in messages %}[TURN]{{ m.content }}\n[TURN-END]\n{% endfor %}";
    set(&mut entries, "tokenizer.chat_template", template.into());
    assert_eq!(load(entries).unwrap().end_of_generation(), [257, 258]);
    // gpt-oss: a message's end is not the answer's.
    let extra: Extra<'_> = &[("<|end|>", 3), ("<|return|>", 3), ("<|call|>", 3)];
    let t = load(bpe_entries(extra, &[])).unwrap();
    assert_eq!(t.end_of_generation(), [257, 258]);
}

/// The words that a pre-tokenizer makes of a text.
fn words(pre: &'static str, text: &str) -> Vec<String> {
    let mut entries = bpe_entries(&[], &[]);
    set(&mut entries, "tokenizer.ggml.pre", pre.into());
    let m = metadata(entries);
    let vocab = super::vocab::Vocab::read(&m).unwrap();
    let pre = super::pre::PreTokenizer::by_name(pre, &vocab).unwrap();
    pre.words(text).into_iter().map(str::to_owned).collect()
}

#[test]
fn pre_tokenizers_cut_as_their_models_do() {
    let text = "I'M it's 1234\n\n  x_y ABc";
    assert_eq!(
        words("gpt-2", text),
        [
            "I", "'", "M", " it", "'s", " 1234", "\n\n ", " x", "_", "y", " ABc"
        ]
    );
    assert_eq!(
        words("llama-bpe", text),
        [
            "I", "'M", " it", "'s", " ", "123", "4", "\n\n", " ", " x", "_y", " ABc"
        ]
    );
    assert_eq!(
        words("qwen2", text),
        [
            "I", "'M", " it", "'s", " ", "1", "2", "3", "4", "\n\n", " ", " x", "_y", " ABc"
        ]
    );
    assert_eq!(
        words("smollm", text),
        [
            "I", "'", "M", " it", "'s", " ", "1", "2", "3", "4", "\n\n ", " x", "_", "y", " ABc"
        ]
    );
    assert_eq!(
        words("gpt-4o", text),
        [
            "I'M", " it's", " ", "123", "4", "\n\n", " ", " x", "_y", " ABc"
        ]
    );
    assert_eq!(words("tekken", "ABcD 12"), ["ABc", "D", " ", "1", "2"]);
    assert_eq!(
        words("deepseek-v3", "語a 1234?x!?"),
        ["語", "a", " ", "123", "4", "?x", "!?"]
    );
    assert_eq!(
        words("default", "a.b 1234"),
        ["a", ".", "b", " ", "123", "4"]
    );
    assert_eq!(words("qwen2", ""), Vec::<String>::new());
}

/// Words are found however long the text; a limit of the regex engine would lose the rest.
#[test]
fn long_runs_are_cut_like_short_ones() {
    let t = small();
    for (run, len) in [
        (" ", 300_000),
        ("\n", 300_000),
        ("h", 300_000),
        ("he", 150_000),
        ("!", 300_000),
    ] {
        let text = format!("{}x", run.repeat(len));
        let ids = t.encode(&text, false, false).unwrap();
        assert_eq!(t.decode(&ids), text.as_bytes());
    }
    for (pre, last) in [("qwen2", 4), ("gpt-2", 3), ("gpt-4o", 4), ("default", 4)] {
        let cut = words(pre, &format!("{}x 1", " ".repeat(2_000_000)));
        assert_eq!(cut.len(), last, "{pre}");
        assert_eq!(cut[1], " x");
    }
}

#[test]
fn a_vocabulary_that_contradicts_itself_is_refused() {
    let with = |key, value: Value| {
        let mut entries = bpe_entries(EXTRA, MERGES);
        set(&mut entries, key, value);
        error(entries)
    };
    let e = with("tokenizer.ggml.pre", "klingon".into());
    assert!(
        e.contains("m.gguf: tokenizer.ggml.pre is \"klingon\"") && e.contains("qwen2"),
        "{e}"
    );
    let e = with("tokenizer.ggml.model", "quux".into());
    assert!(e.contains("tokenizer.ggml.model is \"quux\""), "{e}");
    let e = with("tokenizer.ggml.token_type", vec![1i32; 3].into());
    assert!(e.contains("3 values for the 265"), "{e}");
    let mut types = vec![1i32; 265];
    types[7] = -5;
    let e = with("tokenizer.ggml.token_type", types.into());
    assert!(e.contains("token 7 is -5"), "{e}");
    let e = with("tokenizer.ggml.bos_token_id", 100_000u32.into());
    assert!(
        e.contains("bos_token_id is 100000, but the vocabulary has 265 tokens"),
        "{e}"
    );
    assert!(with("tokenizer.ggml.eos_token_id", (-7i32).into()).contains("i32 -7"));
    assert!(with("tokenizer.ggml.merges", vec!["he".to_owned()].into()).contains("merges[0]"));
    assert!(
        with("tokenizer.ggml.merges", vec![1i32].into()).contains("expected an array of strings")
    );
    let mut missing = bpe_entries(EXTRA, MERGES);
    missing.retain(|(k, _)| *k != "tokenizer.ggml.merges");
    assert!(error(missing).contains("\"tokenizer.ggml.merges\" is missing"));
}

#[test]
fn merges_of_unknown_tokens_never_apply() {
    let t = load(bpe_entries(
        EXTRA,
        &["h e", "q u", "zz top", "l l", "he ll"],
    ))
    .unwrap();
    assert_eq!(
        t.encode("helloqu", false, false).unwrap(),
        [258, 111, 113, 117]
    );
}

#[test]
fn a_byte_without_a_token_is_an_error() {
    let mut entries = bpe_entries(&[], &[]);
    let tokens: Vec<String> = (0..=254).map(|b| char_of(b).to_string()).collect();
    set(
        &mut entries,
        "tokenizer.ggml.tokens",
        tokens[..200].to_vec().into(),
    );
    set(
        &mut entries,
        "tokenizer.ggml.token_type",
        vec![1i32; 200].into(),
    );
    let t = load(entries).unwrap();
    assert_eq!(t.encode("ok", false, false).unwrap(), [111, 107]);
    let e = t.encode("é", false, false).err().map(|e| e.to_string());
    // é is C3 A9, and C3 is byte 195: A9 is there, both are below 200.
    assert_eq!(e, None);
    let e = t.encode("季", false, false).unwrap_err().to_string();
    assert!(e.contains("0xE5"), "{e}");
}

/// `<unk>`, `<s>`, `</s>`, the bytes (id = byte + 3), then pieces by falling score.
fn spm_entries(pieces: &[&str]) -> Vec<(&'static str, Value)> {
    let mut tokens: Vec<String> = vec!["<unk>".into(), "<s>".into(), "</s>".into()];
    let mut types = vec![2i32, 3, 3];
    for b in 0..=255u8 {
        tokens.push(format!("<0x{b:02X}>"));
        types.push(6);
    }
    let mut scores = vec![0f32; 259];
    for (i, piece) in pieces.iter().enumerate() {
        tokens.push((*piece).into());
        types.push(1);
        scores.push(-(i as f32));
    }
    vec![
        ("tokenizer.ggml.model", "llama".into()),
        ("tokenizer.ggml.tokens", tokens.into()),
        ("tokenizer.ggml.token_type", types.into()),
        ("tokenizer.ggml.scores", scores.into()),
        ("tokenizer.ggml.bos_token_id", 1u32.into()),
        ("tokenizer.ggml.eos_token_id", 2u32.into()),
    ]
}

#[test]
fn sentencepiece_merges_by_score_then_from_the_left() {
    // 259 ab, 260 bc, 261 aa, 262 ▁a, 263 a, 264 b, 265 c, 266 ▁
    let pieces = ["ab", "bc", "aa", "▁a", "a", "b", "c", "▁"];
    let mut entries = spm_entries(&pieces);
    let t = load(entries.clone()).unwrap();
    // BOS and a space before the text, by default.
    assert_eq!(t.encode("abc", true, true).unwrap(), [1, 266, 259, 265]);
    assert_eq!(t.encode("a", false, false).unwrap(), [262]);
    assert_eq!(t.decode(&[262, 264]), b"ab");
    assert_eq!(t.end_of_generation(), [2]);
    // The prefix space comes again after a special token.
    assert_eq!(
        t.encode("b</s>b", false, true).unwrap(),
        [266, 264, 2, 266, 264]
    );
    set(
        &mut entries,
        "tokenizer.ggml.add_space_prefix",
        false.into(),
    );
    let t = load(entries).unwrap();
    assert_eq!(t.encode("aaa", false, false).unwrap(), [261, 263]);
    assert_eq!(t.encode("aaaa", false, false).unwrap(), [261, 261]);
    // Bytes for what has no piece.
    assert_eq!(
        t.encode("é\n", false, false).unwrap(),
        [0xC3 + 3, 0xA9 + 3, 13]
    );
    assert_eq!(t.decode(&[0xC3 + 3, 0xA9 + 3, 262]), "é a".as_bytes());
    assert_eq!(t.encode("<s>", false, true).unwrap(), [1]);
    assert_eq!(t.encode("<s>", false, false).unwrap(), [63, 118, 65]);
}

#[test]
fn sentencepiece_needs_a_score_for_each_token() {
    let mut entries = spm_entries(&["a"]);
    set(&mut entries, "tokenizer.ggml.scores", vec![0f32; 3].into());
    assert!(error(entries).contains("scores has 3 values for the 260"));
}

#[test]
fn tokenizers_are_shared_between_threads() {
    fn shared<T: Send + Sync + 'static>() {}
    shared::<Tokenizer>();
    shared::<super::Detokenizer>();
    shared::<super::ChatTemplate>();
}
