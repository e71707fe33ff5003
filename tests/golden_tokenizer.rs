//! Tokenizers and chat templates of real models against reference data.

use gguf::{Gguf, Metadata};
use kigo::tokenizer::{ChatTemplate, Tokenizer};
use kigo_tests::{model, read_golden as golden};
use serde::Deserialize;
use serde_json::Value;

const QWEN: &str = "qwen2.5-coder-0.5b-instruct-q4_k_m";
const SMOLLM: &str = "smollm2-135m-instruct-q4_1";
const GEMMA: &str = "gemma-3-270m-q4_k_m";

#[derive(Deserialize)]
struct TokenizerCase {
    text: String,
    ids: Vec<u32>,
    add_special: bool,
    parse_special: bool,
}

#[derive(Deserialize)]
struct ChatCase {
    messages: Value,
    tools: Option<Value>,
    add_generation_prompt: bool,
    rendered: String,
}

fn tokenizer(name: &str) -> Tokenizer {
    let gguf = Gguf::open(model(name)).expect("the model file opens");
    Tokenizer::from_gguf(&gguf).expect("the model's tokenizer loads")
}

/// Every case: the ids exactly, and back to the text, whole and as a stream.
///
/// `spelling` is what the vocabulary makes of a text: SentencePiece cannot tell U+2581 from a space.
fn check_tokenizer(name: &str, spelling: fn(&str) -> String) {
    let cases: Vec<TokenizerCase> = golden(&format!("{name}.tokenizer.json"));
    assert!(cases.len() >= 90, "{} cases", cases.len());
    let tokenizer = tokenizer(name);
    let mut wrong = Vec::new();
    for case in &cases {
        let ids = tokenizer
            .encode(&case.text, case.add_special, case.parse_special)
            .unwrap_or_else(|e| panic!("{:?}: {e}", case.text));
        if ids != case.ids {
            wrong.push(format!(
                "{:?} (add_special {}, parse_special {})\n  expected {:?}\n  got      {ids:?}",
                case.text, case.add_special, case.parse_special, case.ids
            ));
            continue;
        }
        let text = spelling(&case.text);
        let begins_with_bos = case.add_special && tokenizer.adds_bos();
        let text_ids = &ids[usize::from(begins_with_bos)..];
        assert_eq!(
            String::from_utf8(tokenizer.decode(text_ids)).as_ref(),
            Ok(&text)
        );
        if !text_ids.iter().any(|&id| tokenizer.is_control(id)) {
            let mut detokenizer = tokenizer.detokenizer();
            let streamed: String = text_ids.iter().map(|&id| detokenizer.push(id)).collect();
            assert_eq!(streamed, text);
            assert_eq!(detokenizer.finish(), "");
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {} cases differ:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

#[test]
fn qwen_tokenizer() {
    check_tokenizer(QWEN, str::to_owned);
    let tokenizer = tokenizer(QWEN);
    assert_eq!(tokenizer.vocab_size(), 151_936);
    assert_eq!(tokenizer.bos(), Some(151_643));
    assert_eq!(tokenizer.eos(), Some(151_645));
    assert_eq!(tokenizer.end_of_generation(), [151_643, 151_645]);
    assert!(!tokenizer.adds_bos());
    // Padding up to a round number of rows is no text.
    assert_eq!(tokenizer.token_bytes(151_935), b"");
    assert_eq!(tokenizer.token_bytes(200_000), b"");
}

#[test]
fn smollm_tokenizer() {
    check_tokenizer(SMOLLM, str::to_owned);
    assert_eq!(tokenizer(SMOLLM).end_of_generation(), [0, 2]);
}

#[test]
fn gemma_tokenizer() {
    check_tokenizer(GEMMA, |text| text.replace('\u{2581}', " "));
    assert_eq!(tokenizer(GEMMA).end_of_generation(), [1, 106]);
}

fn check_chat(name: &str) {
    let cases: Vec<ChatCase> = golden(&format!("{name}.chat.json"));
    assert!(cases.len() >= 10, "{} cases", cases.len());
    let gguf = Gguf::open(model(name)).expect("the model file opens");
    let template = ChatTemplate::from_gguf(&gguf)
        .expect("the template is a string")
        .expect("the model has a chat template");
    for case in &cases {
        let rendered = template
            .render(
                &case.messages,
                case.tools.as_ref(),
                case.add_generation_prompt,
            )
            .unwrap_or_else(|e| panic!("{}: {e}", case.messages));
        assert_eq!(rendered, case.rendered, "{}", case.messages);
    }
}

#[test]
fn qwen_chat_template() {
    check_chat(QWEN);
}

#[test]
fn smollm_chat_template() {
    check_chat(SMOLLM);
}

/// Templates against Jinja2 itself, in the environment that transformers sets up.
#[test]
fn templates_render_as_in_jinja2() {
    #[derive(Deserialize)]
    struct File {
        messages: Value,
        tools: Value,
        cases: Vec<Case>,
    }
    #[derive(Deserialize)]
    struct Case {
        template: String,
        rendered: String,
    }
    let file: File = golden("jinja2.json");
    assert!(file.cases.len() >= 20);
    for case in file.cases {
        let rendered = ChatTemplate::new(&case.template, "<s>", "</s>")
            .render(&file.messages, Some(&file.tools), true)
            .unwrap_or_else(|e| panic!("{}: {e}", case.template));
        assert_eq!(rendered, case.rendered, "{}", case.template);
    }
}

/// Unigram and WordPiece vocabularies, from metadata as GGUF files have it, against SentencePiece and BERT's own
/// tokenizer.
#[test]
fn unigram_and_wordpiece_tokenizers() {
    #[derive(Deserialize)]
    struct Made {
        name: String,
        metadata: serde_json::Map<String, Value>,
        cases: Vec<Case>,
    }
    #[derive(Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
    }
    let made: Vec<Made> = golden("tokenizers.json");
    assert_eq!(made.len(), 6);
    for Made {
        name,
        metadata,
        cases,
    } in made
    {
        let entries = metadata.iter().map(|(key, v)| (key.clone(), value(key, v)));
        let metadata = Metadata::new(&name, entries.collect()).expect("no key twice");
        kigo::tokenizer::check(&metadata).expect("the vocabulary is whole");
        let tokenizer = Tokenizer::from_metadata(&metadata).expect("the tokenizer loads");
        assert!(cases.len() >= 35);
        for Case { text, ids } in &cases {
            let found = tokenizer.encode(text, false, true).expect("it encodes");
            assert_eq!(&found, ids, "{name}: {text:?}");
            let around = tokenizer.encode(text, true, true).expect("it encodes");
            let (before, after) = match metadata.str("tokenizer.ggml.model") {
                Ok("bert") => (
                    tokenizer.bos(),
                    metadata.opt_u32("tokenizer.ggml.seperator_token_id"),
                ),
                _ => (None, Ok(tokenizer.eos())),
            };
            let after = after.expect("an id");
            let expected: Vec<u32> = before
                .into_iter()
                .chain(ids.iter().copied())
                .chain(after)
                .collect();
            assert_eq!(around, expected, "{name}: {text:?}");
        }
    }
}

/// A value of a GGUF file from JSON.
fn value(key: &str, json: &Value) -> gguf::Value {
    let numbers =
        |array: &[Value]| -> Vec<f64> { array.iter().filter_map(Value::as_f64).collect() };
    match json {
        Value::Bool(b) => (*b).into(),
        Value::String(s) => s.as_str().into(),
        Value::Array(a) if a.first().is_some_and(Value::is_string) => {
            let strings = a.iter().filter_map(Value::as_str).map(str::to_owned);
            strings.collect::<Vec<_>>().into()
        }
        Value::Array(a) => match key {
            "tokenizer.ggml.scores" => numbers(a)
                .into_iter()
                .map(|x| x as f32)
                .collect::<Vec<_>>()
                .into(),
            "tokenizer.ggml.token_type" => numbers(a)
                .into_iter()
                .map(|x| x as i32)
                .collect::<Vec<_>>()
                .into(),
            _ => numbers(a)
                .into_iter()
                .map(|x| x as u8)
                .collect::<Vec<_>>()
                .into(),
        },
        other => (other.as_u64().expect("an id") as u32).into(),
    }
}
