//! `/tokenize`, `/detokenize` and `/apply-template`.

use super::State;
use super::execute::MAX_PROMPT;
use super::fields::{Body, Field, Fields, Kind};
use super::routes::with_status;
use super::service::{failed, invalid};
use crate::engine::EngineHandle;
use serde_json::{Value, json};
use warp::http::StatusCode;
use warp::reply::Response;

/// Text that is only tokenized may be longer than a prompt.
const MAX_TEXT: usize = 8 * MAX_PROMPT;
const MAX_IDS: usize = 1 << 18;

pub(super) fn tokenize_body() -> Body {
    let text = Kind::Text {
        min: 0,
        max: MAX_TEXT,
        any: true,
    };
    Body {
        fields: vec![
            Field::new("content", text, "The text").required(),
            Field::new(
                "add_special",
                Kind::Bool,
                "Put the opening token in front where the vocabulary asks for one",
            ),
            Field::new(
                "parse_special",
                Kind::Bool,
                "Take names of special tokens for those tokens; true when absent",
            ),
        ],
        ..Body::default()
    }
}

pub(super) fn detokenize_body(vocabulary: usize) -> Body {
    let ids = Kind::Own {
        constraint: "an array of token ids within the vocabulary",
        schema: json!({ "type": "array", "maxItems": MAX_IDS,
            "items": { "type": "integer", "minimum": 0, "maximum": vocabulary.saturating_sub(1) } }),
    };
    Body {
        fields: vec![Field::new("tokens", ids, "The ids").required()],
        ..Body::default()
    }
}

pub(super) fn template_body() -> Body {
    Body {
        fields: vec![
            Field::new("messages", super::openai::messages::kind(), "The chat").required(),
            Field::new(
                "tools",
                super::openai::tools::kind(),
                "Tools, as in the OpenAI API",
            ),
            Field::new(
                "add_generation_prompt",
                Kind::Bool,
                "End with the opening of the assistant's answer; true when absent",
            ),
        ],
        ..Body::default()
    }
}

/// Reads a body, or makes the response that says what is wrong with it.
fn read(shape: &Body, body: &[u8]) -> Result<Fields, Response> {
    match shape.read(body) {
        Ok(fields) if fields.violations.is_empty() => Ok(fields),
        Ok(fields) => Err(invalid(&fields.violations)),
        Err(violation) => Err(invalid(&[violation])),
    }
}

fn wrong(mut fields: Fields, field: &str, constraint: &str, found: &str) -> Response {
    fields.add(field, constraint, found, Value::Null);
    invalid(&fields.violations)
}

fn with_engine(state: &State, then: impl FnOnce(&EngineHandle) -> Response) -> Response {
    match state.engine() {
        Ok(engine) => then(engine),
        Err(failure) => failed(&failure),
    }
}

pub(super) fn tokenize(body: &[u8], state: &State) -> Response {
    with_engine(state, |engine| {
        let fields = match read(&tokenize_body(), body) {
            Ok(fields) => fields,
            Err(response) => return response,
        };
        let parse_special = !fields.has("parse_special") || fields.bool("parse_special");
        let add_special = fields.bool("add_special");
        let content = fields.str("content").unwrap_or_default();
        match engine.text().tokenize(content, add_special, parse_special) {
            Ok(ids) => with_status(
                StatusCode::OK,
                &json!({ "tokens": ids, "count": ids.len() }),
            ),
            Err(_) => wrong(
                fields,
                "content",
                "text the vocabulary covers",
                "it cannot be encoded",
            ),
        }
    })
}

pub(super) fn detokenize(body: &[u8], state: &State) -> Response {
    with_engine(state, |engine| {
        let vocabulary = engine.model().vocabulary;
        let mut fields = match read(&detokenize_body(vocabulary), body) {
            Ok(fields) => fields,
            Err(response) => return response,
        };
        let ids = fields.take("tokens").and_then(|v| ids(&v, vocabulary));
        let Some(ids) = ids.filter(|ids| ids.len() <= MAX_IDS) else {
            let constraint = format!("an array of up to {MAX_IDS} token ids below {vocabulary}");
            return wrong(fields, "tokens", &constraint, "it is something else");
        };
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|&id| engine.text().token_bytes(id))
            .collect();
        let content = String::from_utf8_lossy(&bytes);
        with_status(StatusCode::OK, &json!({ "content": content }))
    })
}

/// Token ids out of JSON, each within the vocabulary.
pub(super) fn ids(value: &Value, vocabulary: usize) -> Option<Vec<u32>> {
    let id = |v: &Value| {
        super::fields::integer(v)
            .filter(|&id| id < vocabulary as u64)
            .map(|id| id as u32)
    };
    value.as_array()?.iter().map(id).collect()
}

pub(super) fn apply_template(body: &[u8], state: &State) -> Response {
    with_engine(state, |engine| {
        let mut fields = match read(&template_body(), body) {
            Ok(fields) => fields,
            Err(response) => return response,
        };
        let constraint = "messages the model's chat template takes";
        if engine.text().template().is_none() {
            return wrong(
                fields,
                "messages",
                constraint,
                "the model's file has no chat template",
            );
        }
        let tools = super::openai::tools::read(&mut fields, engine);
        let opening = !fields.has("add_generation_prompt") || fields.bool("add_generation_prompt");
        let messages = fields.take("messages").unwrap_or_default();
        let messages = super::openai::messages::for_template(&mut fields, &messages);
        if !fields.violations.is_empty() {
            return invalid(&fields.violations);
        }
        let tools = tools.map(|t| t.for_template());
        match engine
            .text()
            .render_with(&messages, tools.as_ref(), opening)
        {
            Ok(prompt) => with_status(StatusCode::OK, &json!({ "prompt": prompt })),
            Err(_) => wrong(fields, "messages", constraint, "the template refuses them"),
        }
    })
}
