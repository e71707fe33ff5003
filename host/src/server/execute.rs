//! The body of `POST /execute`.
//!
//! `job_id`, and `prompt` or `messages`, must be there. Everything else has a default: what the prompt
//! leaves of the context for `max_tokens`, [`SamplingParams::default`] for the sampler, a new `seed`.
//! `top_logits: N` asks for proof of work: the first `token` event then carries the N greatest logits
//! it was chosen from as `top: [[id, logit], ...]`.

use super::Config;
use super::fields::{Body, Field, Fields, Kind, kind};
use super::generation::{self, common_fields, max_tokens, sampler_fields};
use crate::engine::{EngineHandle, Request};
use crate::sampling::{SamplingParams, Violation};
use serde_json::{Value, json};
use std::time::Duration;

/// Characters of a prompt at most; tokens are limited by the context.
pub(super) const MAX_PROMPT: usize = 32_768;
const MAX_JOB_ID: usize = 256;
const MAX_TOP_LOGITS: u64 = 64;

/// The fields of the body.
pub(super) fn body(engine: &EngineHandle, config: &Config) -> Body {
    let most = config.max_tokens_out.unwrap_or(usize::MAX);
    let most = most.min(engine.context().saturating_sub(1)).max(1);
    let mut fields = vec![
        Field::new(
            "job_id",
            Kind::Text {
                min: 1,
                max: MAX_JOB_ID,
                any: false,
            },
            "The client's name for the job, unlike every other that waits or runs",
        )
        .required(),
        Field::new(
            "prompt",
            Kind::Text {
                min: 1,
                max: MAX_PROMPT,
                any: true,
            },
            "The text to go on from; names of special tokens in it stand for those tokens",
        ),
        Field::new(
            "messages",
            messages_kind(),
            "A chat, for the model's own template; in place of `prompt`",
        ),
        Field::new(
            "max_tokens",
            Kind::Integer {
                min: 1,
                max: most as u64,
            },
            "Tokens to generate at most; what the prompt leaves of the context when absent",
        ),
        Field::new(
            "top_logits",
            Kind::Integer {
                min: 0,
                max: MAX_TOP_LOGITS,
            },
            "How many of the first step's greatest logits to report",
        ),
        Field::new(
            "metrics_interval_ms",
            Kind::Integer {
                min: 250,
                max: 1000,
            },
            "Send a `metrics` event this often; none when absent",
        ),
    ];
    fields.extend(common_fields(engine.model().vocabulary));
    fields.extend(sampler_fields(engine.model().vocabulary));
    let present = |name: &str, other: &str| json!({ "required": [name], "properties": { name: { "not": { "type": "null" } }, other: { "type": "null" } } });
    let rules = json!({ "oneOf": [present("prompt", "messages"), present("messages", "prompt")] });
    let rules = rules.as_object().cloned().unwrap_or_default();
    Body { fields, rules }
}

/// Plain messages: `{role, content}` with text each.
pub(super) fn messages_kind() -> Kind {
    Kind::Own {
        constraint: "a non-empty array of {\"role\": string, \"content\": string}",
        schema: json!({ "type": "array", "minItems": 1, "items": { "type": "object", "required": ["role", "content"],
            "properties": { "role": { "type": "string" }, "content": { "type": "string" } } } }),
    }
}

/// What a body asks for.
#[derive(Debug)]
pub(super) struct Execute {
    pub request: Request,
    pub metrics_interval: Option<Duration>,
}

/// The request that a body asks for.
///
/// # Errors
/// Every violation. `value` is null where it could hold the prompt's text.
pub(super) fn parse(
    body_bytes: &[u8],
    engine: &EngineHandle,
    config: &Config,
) -> Result<Execute, Vec<Violation>> {
    let mut fields = body(engine, config)
        .read(body_bytes)
        .map_err(|violation| vec![violation])?;
    let prompt = prompt(&mut fields, engine, config);
    let tokens = prompt.as_ref().map_or(1, Vec::len);
    let max_tokens = max_tokens(
        &mut fields,
        "max_tokens",
        tokens,
        engine,
        config.max_tokens_out,
    );
    let generation = generation::read(&mut fields, engine, SamplingParams::default());
    let top_logits = fields.u64("top_logits").unwrap_or(0) as usize;
    let metrics_interval = fields.u64("metrics_interval_ms").map(Duration::from_millis);
    let job_id = fields.str("job_id").unwrap_or_default().to_owned();
    if !fields.violations.is_empty() {
        return Err(fields.violations);
    }
    Ok(Execute {
        request: Request {
            job_id,
            prompt: prompt.unwrap_or_default(),
            max_tokens,
            sampling: generation.sampling,
            chain: generation.chain,
            logit_bias: generation.logit_bias,
            stop: generation.stop,
            deadline: generation.deadline,
            top_logits,
            ..Request::default()
        },
        metrics_interval,
    })
}

/// The prompt's ids, from `prompt` or `messages`.
fn prompt(fields: &mut Fields, engine: &EngineHandle, config: &Config) -> Option<Vec<u32>> {
    let either = "either prompt or messages";
    // A prompt of the wrong kind was named already.
    let named = |fields: &Fields| fields.violations.iter().any(|v| v.field == "prompt");
    let (field, text) = match (fields.take("prompt"), fields.take("messages")) {
        (Some(_), Some(_)) => {
            fields.add(
                "prompt",
                either,
                "both prompt and messages are there",
                Value::Null,
            );
            return None;
        }
        (None, None) if named(fields) => return None,
        (None, None) => {
            fields.add(
                "prompt",
                either,
                "neither prompt nor messages is there",
                Value::Null,
            );
            return None;
        }
        (Some(prompt), None) => ("prompt", prompt.as_str()?.to_owned()),
        (None, Some(messages)) => ("messages", messages_text(fields, &messages, engine)?),
    };
    encode(fields, field, &text, engine, config)
}

/// The ids of a text that is to be a prompt, within the limits of prompts.
pub(super) fn encode(
    fields: &mut Fields,
    field: &str,
    text: &str,
    engine: &EngineHandle,
    config: &Config,
) -> Option<Vec<u32>> {
    // The tokenizer's message could quote the text.
    let Ok(ids) = engine.text().encode(text) else {
        let constraint = "text the vocabulary covers";
        fields.add(field, constraint, "it cannot be encoded", Value::Null);
        return None;
    };
    within_limits(fields, field, ids, engine, config)
}

/// The ids, where they are neither too many nor none.
pub(super) fn within_limits(
    fields: &mut Fields,
    field: &str,
    ids: Vec<u32>,
    engine: &EngineHandle,
    config: &Config,
) -> Option<Vec<u32>> {
    let most = engine.context().saturating_sub(1);
    let most = config.max_tokens_in.map_or(most, |limit| limit.min(most));
    if ids.is_empty() {
        fields.add(field, "at least one token", "it has no tokens", Value::Null);
        return None;
    }
    if ids.len() > most {
        let constraint = format!("at most {most} tokens");
        let found = format!("it has {} tokens", ids.len());
        fields.add(field, &constraint, &found, Value::Null);
        return None;
    }
    Some(ids)
}

fn messages_text(fields: &mut Fields, messages: &Value, engine: &EngineHandle) -> Option<String> {
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
    fields.add("messages", constraint, &found, Value::Null);
    None
}
