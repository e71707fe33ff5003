//! The OpenAI API: `/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`.
//!
//! A parameter that is not supported is an error. Fields of the native API's samplers are understood here
//! too. Defaults are that API's: temperature 1, everything in play.

mod answers;
pub(super) mod chat;
pub(super) mod completions;
pub(super) mod embeddings;
pub(super) mod messages;
pub(super) mod models;
pub(super) mod tools;

use super::fields::{Body, Field, Fields, Kind};
use super::generation::{self, Generation, common_fields, sampler_fields};
use super::service::{new_id, with_failure};
use super::{Config, State};
use crate::engine::{Code, Constraint, End, EngineHandle, Event, Failure, Request, StopReason};
use crate::sampling::{SamplingParams, Violation};
use answers::Asked;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use warp::reply::{self, Reply, Response};

/// Answers to one prompt at most.
const MAX_N: u64 = 16;

/// Whether a path is of this API, and its errors of this API's shape.
pub(super) fn is_path(path: &str) -> bool {
    path.starts_with("/v1/") && path != "/v1/worker"
}

/// An error in this API's shape.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct ErrorBody {
    error: ErrorDetail,
}

#[derive(Debug, Serialize, JsonSchema)]
struct ErrorDetail {
    message: String,
    r#type: &'static str,
    /// The field at fault.
    param: Option<String>,
    code: Option<String>,
}

pub(super) fn error_body(failure: &Failure, param: Option<&str>) -> ErrorBody {
    let r#type = match failure.code.status() {
        401 => "authentication_error",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        _ => "server_error",
    };
    let code = match failure.code {
        Code::Unauthorized => "invalid_api_key".to_owned(),
        Code::NotFound if param == Some("model") => "model_not_found".to_owned(),
        code => code.name().to_ascii_lowercase(),
    };
    ErrorBody {
        error: ErrorDetail {
            message: failure.message.clone(),
            r#type,
            param: param.map(str::to_owned),
            code: Some(code),
        },
    }
}

pub(super) fn failed(failure: &Failure, param: Option<&str>) -> Response {
    let response = reply::json(&error_body(failure, param)).into_response();
    with_failure(response, failure)
}

/// Every violation in one error.
fn invalid(violations: &[Violation]) -> Response {
    let messages: Vec<&str> = violations.iter().map(|v| v.message.as_str()).collect();
    let failure = Failure::new(Code::InvalidRequest, messages.join("; "));
    failed(&failure, violations.first().map(|v| v.field.as_str()))
}

/// Fields that chat and completions share.
fn shared_fields(engine: &EngineHandle, config: &Config) -> Vec<Field> {
    let text = |max| Kind::Text {
        min: 0,
        max,
        any: true,
    };
    let mut fields = vec![
        models::field(engine, config),
        Field::new(
            "n",
            Kind::Integer { min: 1, max: MAX_N },
            "How many answers to give",
        ),
        Field::new("stream", Kind::Bool, "Send the answer as it comes"),
        Field::new(
            "stream_options",
            Kind::Own {
                constraint: "{\"include_usage\": boolean}",
                schema: json!({ "type": "object", "properties": { "include_usage": { "type": "boolean" } },
                    "additionalProperties": false }),
            },
            "`include_usage`: send the usage as the last chunk; with `stream` only",
        ),
        Field::new(
            "user",
            text(256),
            "The client's own name for its user; not used",
        ),
    ];
    fields.extend(common_fields(engine.model().vocabulary));
    fields.extend(sampler_fields(engine.model().vocabulary));
    fields
}

/// A rule, in JSON Schema: the first field only where the second one is true.
fn needs(field: &str, other: &str) -> Value {
    json!({ "anyOf": [
        { "properties": { field: { "type": "null" } } },
        { "properties": { other: { "const": true } }, "required": [other] },
    ] })
}

/// Rules that chat and completions share.
fn shared_rules() -> Vec<Value> {
    vec![needs("stream_options", "stream")]
}

fn all_of(rules: Vec<Value>) -> serde_json::Map<String, Value> {
    [("allOf".to_owned(), Value::Array(rules))]
        .into_iter()
        .collect()
}

/// What the shared fields ask for.
struct Shared {
    n: usize,
    stream: bool,
    include_usage: bool,
    generation: Generation,
}

fn read_shared(fields: &mut Fields, engine: &EngineHandle) -> Shared {
    let defaults = SamplingParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: None,
    };
    let generation = generation::read(fields, engine, defaults);
    let stream = fields.bool("stream");
    let mut include_usage = false;
    if let Some(options) = fields.take("stream_options") {
        let known = |map: &serde_json::Map<String, Value>| {
            map.iter().all(|(key, value)| {
                key == "include_usage" && (value.is_boolean() || value.is_null())
            })
        };
        if !options.as_object().is_some_and(known) {
            let constraint = "{\"include_usage\": boolean}";
            fields.add(
                "stream_options",
                constraint,
                "it is something else",
                Value::Null,
            );
        } else if !stream {
            let constraint = "stream to be true as well";
            fields.add(
                "stream_options",
                constraint,
                "stream is not true",
                Value::Null,
            );
        }
        include_usage = options["include_usage"].as_bool().unwrap_or(false);
    }
    Shared {
        n: fields.u64("n").unwrap_or(1) as usize,
        stream,
        include_usage,
        generation,
    }
}

/// Whether the request is for the model that is here.
fn check_model(fields: &mut Fields, state: &State, engine: &EngineHandle) -> Result<(), Response> {
    match fields.get("model") {
        Some(Value::String(asked)) if !models::is_ours(asked, state, engine) => {}
        Some(Value::String(_)) => return Ok(()),
        Some(_) => {
            fields.add("model", "a string", "it is something else", Value::Null);
            return Ok(());
        }
        // Missing: a violation already.
        None => return Ok(()),
    }
    let id = super::info::model_id(engine, &state.config);
    let what = format!("this worker has no such model; it has {id}");
    Err(failed(&Failure::new(Code::NotFound, what), Some("model")))
}

/// Reads a body of this shape: an object with known fields. What else is wrong is in the result.
fn read_body(body: &Body, bytes: &[u8]) -> Result<Fields, Response> {
    body.read(bytes).map_err(|violation| invalid(&[violation]))
}

/// How an answer's end is called here. A job that was cancelled has no answer.
fn finish_reason(end: &End) -> Result<&'static str, Failure> {
    match end.stop_reason {
        StopReason::Eos | StopReason::StopSequence => Ok("stop"),
        StopReason::MaxTokens => Ok("length"),
        StopReason::Cancelled => Err(Failure::new(Code::Cancelled, "the request was cancelled")),
        StopReason::Error => Err(Failure::new(Code::Internal, "the request failed")),
    }
}

/// A log-probability that JSON can say.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// A token's text; what is not UTF-8 is replaced, and the bytes stand beside it.
fn token_text(engine: &EngineHandle, id: u32) -> (String, Vec<u8>) {
    let bytes = engine.text().token_bytes(id);
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}

fn new_completion_id(prefix: &str) -> String {
    format!("{prefix}-{}", new_id())
}

fn unix_time() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}
