//! `/v1/completions`: the older API, on plain prompts.

use super::super::State;
use super::super::execute::{MAX_PROMPT, encode, within_limits};
use super::super::fields::{Body, Field, Fields, Kind};
use super::super::generation::max_tokens;
use super::super::routes::blocking;
use super::answers::{Choices, Envelope};
use super::*;
use crate::engine::LogProbs;
use serde_json::Map;
use std::sync::Arc;

/// Prompts in one request at most.
const MAX_PROMPTS: usize = 16;
/// What this API generates where nothing is said.
const DEFAULT_MAX_TOKENS: usize = 16;

pub(in super::super) fn body(engine: &EngineHandle, config: &Config) -> Body {
    let most = config.max_tokens_out.unwrap_or(usize::MAX);
    let most = most.min(engine.context().saturating_sub(1)).max(1) as u64;
    let text = json!({ "type": "string", "minLength": 1, "maxLength": MAX_PROMPT });
    let ids = json!({ "type": "array", "minItems": 1,
        "items": { "type": "integer", "minimum": 0, "maximum": engine.model().vocabulary.saturating_sub(1) } });
    let several = |of: &Value| json!({ "type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": of });
    let prompt = Kind::Own {
        constraint: "a text, token ids, or up to 16 of either",
        schema: json!({ "anyOf": [text, ids, several(&text), several(&ids)] }),
    };
    let only = |value: Value, constraint| Kind::Own {
        constraint,
        schema: json!({ "const": value }),
    };
    let mut fields = vec![
        Field::new("prompt", prompt, "What to go on from").required(),
        Field::new(
            "max_tokens",
            Kind::Integer { min: 1, max: most },
            "Tokens to generate at most; 16 when absent",
        ),
        Field::new(
            "logprobs",
            Kind::Integer { min: 0, max: 20 },
            "Report log-probabilities, of each token and of so many of the likeliest",
        ),
        Field::new("echo", only(json!(false), "false"), "Not supported"),
        Field::new("best_of", only(json!(1), "1"), "Not supported"),
    ];
    fields.extend(shared_fields(engine, config));
    Body {
        fields,
        rules: all_of(shared_rules()),
    }
}

struct Plain {
    shared: Shared,
    prompts: Vec<Vec<u32>>,
    max_tokens: usize,
    logprobs: Option<usize>,
}

fn parse(bytes: &[u8], state: &State) -> Result<Plain, Response> {
    let engine = state.engine().map_err(|failure| failed(&failure, None))?;
    let config = &state.config;
    let mut fields = read_body(&body(engine, config), bytes)?;
    check_model(&mut fields, state, engine)?;
    let shared = read_shared(&mut fields, engine);
    for (name, value) in [("echo", json!(false)), ("best_of", json!(1))] {
        if fields.get(name).is_some_and(|v| *v != value) {
            fields.add(
                name,
                &value.to_string(),
                "it is something else",
                Value::Null,
            );
        }
    }
    let prompts = prompts(&mut fields, engine, config).unwrap_or_default();
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(1);
    let most = max_tokens(
        &mut fields,
        "max_tokens",
        longest,
        engine,
        config.max_tokens_out,
    );
    let max_tokens = if fields.has("max_tokens") {
        most
    } else {
        most.min(DEFAULT_MAX_TOKENS)
    };
    let logprobs = fields.u64("logprobs").map(|n| n as usize);
    if !fields.violations.is_empty() {
        return Err(invalid(&fields.violations));
    }
    Ok(Plain {
        shared,
        prompts,
        max_tokens,
        logprobs,
    })
}

fn prompts(fields: &mut Fields, engine: &EngineHandle, config: &Config) -> Option<Vec<Vec<u32>>> {
    let given = fields.take("prompt")?;
    let vocabulary = engine.model().vocabulary;
    let several: Vec<Value> = match &given {
        Value::String(_) => vec![given],
        Value::Array(list) if list.iter().all(Value::is_number) => vec![given],
        Value::Array(list) if list.len() <= MAX_PROMPTS => list.clone(),
        _ => Vec::new(),
    };
    let mut prompts = Vec::new();
    for one in &several {
        let prompt = match one {
            Value::String(text) if (1..=MAX_PROMPT).contains(&text.chars().count()) => {
                encode(fields, "prompt", text, engine, config)
            }
            Value::Array(_) => match super::super::text::ids(one, vocabulary) {
                Some(ids) => within_limits(fields, "prompt", ids, engine, config),
                None => {
                    let constraint = format!("token ids below {vocabulary}");
                    fields.add("prompt", &constraint, "there are others", Value::Null);
                    None
                }
            },
            _ => break,
        };
        prompts.push(prompt?);
    }
    if prompts.is_empty() || prompts.len() < several.len() {
        let constraint = "a text of 1 to 32768 characters, token ids, or up to 16 of either";
        fields.add("prompt", constraint, "it is something else", Value::Null);
        return None;
    }
    Some(prompts)
}

/// The answers as a whole, or with `stream` a piece of one.
pub(in super::super) type TextCompletion = Envelope<TextChoice>;

#[derive(Debug, Serialize, JsonSchema)]
pub(in super::super) struct TextChoice {
    index: usize,
    text: String,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
}

/// Lists of one length, an entry a token.
#[derive(Debug, Default, Serialize, JsonSchema)]
struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Map<String, Value>>,
    /// Characters of the answer before each token.
    text_offset: Vec<usize>,
}

impl TextLogprobs {
    fn push(&mut self, engine: &EngineHandle, id: u32, logprobs: &LogProbs, offset: usize) {
        self.tokens.push(token_text(engine, id).0);
        self.token_logprobs.push(finite(logprobs.chosen));
        let top = logprobs.top.iter();
        let top = top.map(|&(id, l)| (token_text(engine, id).0, json!(finite(l))));
        self.top_logprobs.push(top.collect());
        self.text_offset.push(offset);
    }
}

pub(in super::super) async fn respond(
    bytes: bytes::Bytes,
    deadline: Option<Instant>,
    state: Arc<State>,
) -> Response {
    let plain = match blocking(state.clone(), move |state| parse(&bytes, state)).await {
        Ok(plain) => plain,
        Err(response) => return response,
    };
    let engine = match state.engine() {
        Ok(engine) => engine.clone(),
        Err(failure) => return failed(&failure, None),
    };
    let choices = TextChoices {
        engine,
        offsets: vec![0; plain.prompts.len() * plain.shared.n],
    };
    let asked = Asked {
        prompts: plain.prompts,
        max_tokens: plain.max_tokens,
        constraint: None,
        logprobs: plain.logprobs,
        visible: Vec::new(),
        deadline,
    };
    answers::respond(choices, asked, plain.shared, &state).await
}

/// The answers to all prompts as they grow.
struct TextChoices {
    engine: EngineHandle,
    /// Characters of each answer so far.
    offsets: Vec<usize>,
}

impl Choices for TextChoices {
    type Piece = TextChoice;
    type Whole = TextChoice;

    const WHOLE: &'static str = "text_completion";
    const PIECE: &'static str = "text_completion";
    const ID: &'static str = "cmpl";

    fn opening(&self, _: usize) -> Option<TextChoice> {
        None
    }

    fn take(&mut self, index: usize, event: Event) -> Result<Vec<TextChoice>, Failure> {
        let mut choice = self.begin(index);
        match event {
            Event::Started | Event::Embedding(_) => return Ok(Vec::new()),
            Event::Token {
                id, text, logprobs, ..
            } => {
                choice.logprobs = logprobs.map(|l| {
                    let mut one = TextLogprobs::default();
                    one.push(&self.engine, id, &l, self.offsets[index]);
                    one
                });
                self.offsets[index] += text.chars().count();
                choice.text = text;
            }
            Event::End(end) => choice.finish_reason = Some(finish_reason(&end)?),
            Event::Error(failure) => return Err(failure),
        }
        Ok(vec![choice])
    }

    fn is_last(piece: &TextChoice) -> bool {
        piece.finish_reason.is_some()
    }

    fn begin(&self, index: usize) -> TextChoice {
        TextChoice {
            index,
            text: String::new(),
            logprobs: None,
            finish_reason: None,
        }
    }

    fn join(whole: &mut TextChoice, piece: TextChoice) {
        whole.text.push_str(&piece.text);
        if let Some(one) = piece.logprobs {
            let all = whole.logprobs.get_or_insert_default();
            all.tokens.extend(one.tokens);
            all.token_logprobs.extend(one.token_logprobs);
            all.top_logprobs.extend(one.top_logprobs);
            all.text_offset.extend(one.text_offset);
        }
        whole.finish_reason = piece.finish_reason.or(whole.finish_reason);
    }
}
