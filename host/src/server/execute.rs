//! The body of `POST /execute`: read field by field, so that everything that is wrong with it is
//! said at once, and nothing of the prompt is.
//!
//! `job_id`, and `prompt` or `messages`, must be there. Everything else has a default: what the prompt
//! leaves of the context for `max_tokens`, [`SamplingParams::default`] for the sampler, a new `seed`.
//! `top_logits: N` asks for proof of work: the first `token` event then carries the N greatest logits
//! it was chosen from as `top: [[id, logit], ...]`.

use super::Config;
use crate::engine::{EngineHandle, Request};
use crate::sampling::{SamplingParams, Violation};
use serde_json::{Map, Value};

/// Characters of a prompt at most; tokens are limited by the context.
const MAX_PROMPT: usize = 32_768;
const MAX_STOPS: usize = 4;
/// Bytes of a stop string at most.
const MAX_STOP: usize = 256;
const MAX_JOB_ID: usize = 256;
const MAX_TOP_LOGITS: u64 = 64;

pub(super) const FIELDS: [&str; 12] = [
    "job_id",
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop",
    "seed",
    "top_logits",
];

/// The request that a body asks for.
///
/// # Errors
/// Every violation. `value` is null where it could hold the prompt's text.
pub(super) fn parse(
    body: &[u8],
    engine: &EngineHandle,
    config: &Config,
) -> Result<Request, Vec<Violation>> {
    let map = match serde_json::from_slice(body) {
        Ok(Value::Object(map)) => map,
        Ok(_) => {
            return Err(vec![violation(
                "body",
                "a JSON object",
                "it is none",
                Value::Null,
            )]);
        }
        Err(error) => {
            // serde_json's message could quote the text; the place cannot.
            let place = format!(
                "not JSON at line {} column {}",
                error.line(),
                error.column()
            );
            return Err(vec![violation(
                "body",
                "a JSON object",
                &place,
                Value::Null,
            )]);
        }
    };
    let mut fields = Fields {
        map,
        violations: Vec::new(),
    };
    fields.refuse_unknown();
    let vocabulary = engine.model().vocabulary;
    let job_id = fields.job_id();
    let prompt = fields.prompt(engine);
    let max_tokens = fields.max_tokens(prompt.as_deref(), engine.context(), config);
    let defaults = SamplingParams::default();
    let sampling = SamplingParams {
        temperature: fields.number("temperature", 0.0, 2.0, defaults.temperature),
        // The sampler wants a share above 0; the least there is keeps the likeliest token alone,
        // which is what 0 asks for.
        top_p: fields
            .number("top_p", 0.0, 1.0, defaults.top_p)
            .max(f32::EPSILON / 2.0),
        top_k: fields
            .integer("top_k", 0, vocabulary as u64)
            .map_or(defaults.top_k.min(vocabulary as u32), |k| k as u32),
        min_p: fields.number("min_p", 0.0, 1.0, defaults.min_p),
        repetition_penalty: fields.repetition_penalty(defaults.repetition_penalty),
        seed: fields.integer("seed", 0, u64::MAX),
    };
    let stop = fields.stop();
    let top_logits = fields.integer("top_logits", 0, MAX_TOP_LOGITS).unwrap_or(0) as usize;
    if !fields.violations.is_empty() {
        return Err(fields.violations);
    }
    Ok(Request {
        job_id,
        prompt: prompt.unwrap_or_default(),
        max_tokens,
        sampling,
        stop,
        top_logits,
        ..Request::default()
    })
}

fn violation(field: &str, constraint: &str, found: &str, value: Value) -> Violation {
    Violation {
        field: field.to_owned(),
        constraint: constraint.to_owned(),
        message: format!("{field}: {found}; expected {constraint}"),
        value,
    }
}

/// The kind of a JSON value, for messages that must not show it.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The value itself where it is a number or a boolean, else nothing: text may be the prompt's.
fn harmless(value: &Value) -> Value {
    match value {
        Value::Number(_) | Value::Bool(_) => value.clone(),
        _ => Value::Null,
    }
}

struct Fields {
    map: Map<String, Value>,
    violations: Vec<Violation>,
}

impl Fields {
    fn add(&mut self, field: &str, constraint: &str, found: &str, value: Value) {
        self.violations
            .push(violation(field, constraint, found, value));
    }

    /// A field's value; null is as good as absent.
    fn get(&self, field: &str) -> Option<Value> {
        self.map.get(field).filter(|v| !v.is_null()).cloned()
    }

    fn refuse_unknown(&mut self) {
        let unknown: Vec<String> = self
            .map
            .keys()
            .filter(|k| !FIELDS.contains(&k.as_str()))
            .cloned()
            .collect();
        let constraint = format!("one of {}", FIELDS.join(", "));
        for field in unknown {
            // A key is the client's text too; a long one is no misspelt field.
            let field: String = field.chars().take(32).collect();
            self.add(&field, &constraint, "there is no such field", Value::Null);
        }
    }

    fn job_id(&mut self) -> String {
        let constraint = format!("1 to {MAX_JOB_ID} characters, no control characters");
        match self.get("job_id") {
            Some(Value::String(id))
                if (1..=MAX_JOB_ID).contains(&id.chars().count())
                    && !id.chars().any(char::is_control) =>
            {
                return id;
            }
            Some(Value::String(id)) => {
                let found = format!("it has {} characters", id.chars().count());
                let shown: String = id.chars().take(MAX_JOB_ID).collect();
                self.add("job_id", &constraint, &found, shown.into());
            }
            Some(other) => {
                let found = format!("it is {}", kind(&other));
                self.add("job_id", &constraint, &found, harmless(&other));
            }
            None => self.add("job_id", &constraint, "it is missing", Value::Null),
        }
        String::new()
    }

    /// The prompt's ids, from `prompt` or `messages`.
    fn prompt(&mut self, engine: &EngineHandle) -> Option<Vec<u32>> {
        let (field, text) = match (self.get("prompt"), self.get("messages")) {
            (Some(_), Some(_)) => {
                let found = "both prompt and messages are there";
                self.add("prompt", "either prompt or messages", found, Value::Null);
                return None;
            }
            (None, None) => {
                let found = "neither prompt nor messages is there";
                self.add("prompt", "either prompt or messages", found, Value::Null);
                return None;
            }
            (Some(prompt), None) => ("prompt", self.prompt_text(&prompt)?),
            (None, Some(messages)) => ("messages", self.messages_text(&messages, engine)?),
        };
        match engine.text().encode(&text) {
            Ok(ids) if ids.is_empty() => {
                self.add(field, "at least one token", "it has no tokens", Value::Null);
                None
            }
            Ok(ids) if ids.len() >= engine.context() => {
                let constraint = format!("fewer than {} tokens", engine.context());
                let found = format!("it has {} tokens", ids.len());
                self.add(field, &constraint, &found, Value::Null);
                None
            }
            Ok(ids) => Some(ids),
            Err(_) => {
                // The tokenizer's message could quote the text.
                self.add(
                    field,
                    "text the vocabulary covers",
                    "it cannot be encoded",
                    Value::Null,
                );
                None
            }
        }
    }

    fn prompt_text(&mut self, prompt: &Value) -> Option<String> {
        let constraint = format!("1 to {MAX_PROMPT} characters");
        let found = match prompt {
            Value::String(text) => match text.chars().count() {
                n if (1..=MAX_PROMPT).contains(&n) => return Some(text.clone()),
                n => format!("it has {n} characters"),
            },
            other => format!("it is {}", kind(other)),
        };
        self.add("prompt", &constraint, &found, Value::Null);
        None
    }

    fn messages_text(&mut self, messages: &Value, engine: &EngineHandle) -> Option<String> {
        let constraint = "a non-empty array of {\"role\": string, \"content\": string}";
        let found = match messages.as_array() {
            None => format!("it is {}", kind(messages)),
            Some(list) if list.is_empty() => "it is empty".to_owned(),
            Some(list) => {
                let is_text = |m: &Value, key| m.get(key).is_some_and(Value::is_string);
                match list
                    .iter()
                    .position(|m| !is_text(m, "role") || !is_text(m, "content"))
                {
                    Some(i) => format!("message {i} is not of that form"),
                    None => match engine.text().render(messages) {
                        Ok(text) => return Some(text),
                        // What a template refuses it refuses in its own words: wrong roles, mostly.
                        Err(_) => "the model's chat template refuses it".to_owned(),
                    },
                }
            }
        };
        self.add("messages", constraint, &found, Value::Null);
        None
    }

    /// At least 1 where it is right; the prompt decides what is left.
    fn max_tokens(&mut self, prompt: Option<&[u32]>, context: usize, config: &Config) -> usize {
        let left = context.saturating_sub(prompt.map_or(1, <[u32]>::len));
        let most = config.max_tokens.map_or(left, |limit| limit.min(left));
        match self.integer("max_tokens", 1, most as u64) {
            Some(n) => n as usize,
            None => most,
        }
    }

    fn integer(&mut self, field: &str, min: u64, max: u64) -> Option<u64> {
        let value = self.get(field)?;
        // 3.0 is an integer in JSON Schema and to many a client.
        let whole = value.as_u64().or_else(|| {
            value
                .as_f64()
                .filter(|f| f.fract() == 0.0 && (0.0..1e15).contains(f))
                .map(|f| f as u64)
        });
        match whole {
            Some(n) if (min..=max).contains(&n) => Some(n),
            _ => {
                let constraint = format!("an integer from {min} to {max}");
                self.out_of_range(field, &constraint, &value);
                None
            }
        }
    }

    fn number(&mut self, field: &str, min: f64, max: f64, default: f32) -> f32 {
        let Some(value) = self.get(field) else {
            return default;
        };
        match value.as_f64() {
            Some(n) if (min..=max).contains(&n) => n as f32,
            _ => {
                let constraint = format!("a number from {min} to {max}");
                self.out_of_range(field, &constraint, &value);
                default
            }
        }
    }

    fn repetition_penalty(&mut self, default: f32) -> f32 {
        let field = "repetition_penalty";
        let Some(value) = self.get(field) else {
            return default;
        };
        match value.as_f64().map(|n| n as f32) {
            Some(n) if n > 0.0 && n <= 100.0 => n,
            _ => {
                self.out_of_range(field, "a number above 0, at most 100", &value);
                default
            }
        }
    }

    fn out_of_range(&mut self, field: &str, constraint: &str, value: &Value) {
        let found = match value {
            Value::Number(n) => format!("it is {n}"),
            other => format!("it is {}", kind(other)),
        };
        self.add(field, constraint, &found, harmless(value));
    }

    fn stop(&mut self) -> Vec<String> {
        let list = match self.get("stop") {
            None => return Vec::new(),
            Some(Value::String(one)) => vec![Value::String(one)],
            Some(Value::Array(list)) => list,
            Some(other) => vec![other],
        };
        let fits = |v: &Value| {
            v.as_str()
                .is_some_and(|s| (1..=MAX_STOP).contains(&s.len()))
        };
        if list.len() > MAX_STOPS || !list.iter().all(fits) {
            let constraint = format!("up to {MAX_STOPS} strings of 1 to {MAX_STOP} bytes");
            let found = format!(
                "there are {}, or one of them is not of that form",
                list.len()
            );
            self.add("stop", &constraint, &found, Value::Null);
            return Vec::new();
        }
        list.iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect()
    }
}
