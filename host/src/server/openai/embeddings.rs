//! `/v1/embeddings`: the hidden states of a text, pooled as the model's file says.

use super::super::State;
use super::super::execute::{encode, within_limits};
use super::super::fields::{Body, Field, Fields, Kind};
use super::super::routes::{blocking, with_status};
use super::*;
use crate::model::Pooling;
use base64::Engine as _;
use std::sync::Arc;
use warp::http::StatusCode;

/// Texts in one request at most.
const MAX_INPUTS: usize = 256;

/// Whether the model makes embeddings.
pub(in super::super) fn are_supported(engine: &EngineHandle) -> bool {
    engine.model().pooling.is_some()
}

pub(in super::super) fn body(engine: &EngineHandle, config: &Config) -> Body {
    let text = json!({ "type": "string", "minLength": 1 });
    let most = engine.model().vocabulary.saturating_sub(1);
    let ids = json!({ "type": "array", "minItems": 1, "items": { "type": "integer", "minimum": 0, "maximum": most } });
    let several =
        |of: &Value| json!({ "type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": of });
    let input = Kind::Own {
        constraint: "a text, token ids, or up to 256 of either",
        schema: json!({ "anyOf": [text, ids, several(&text), several(&ids)] }),
    };
    let name = Kind::Text {
        min: 0,
        max: 256,
        any: true,
    };
    Body {
        fields: vec![
            models::field(engine, config),
            Field::new("input", input, "What to embed").required(),
            Field::new(
                "encoding_format",
                Kind::OneOf(vec!["float", "base64"]),
                "How to write the numbers; base64 is of 32-bit floats, low byte first",
            ),
            Field::new("user", name, "The client's own name for its user; not used"),
        ],
        ..Body::default()
    }
}

struct Asked {
    inputs: Vec<Vec<u32>>,
    base64: bool,
    pooling: Pooling,
}

fn parse(bytes: &[u8], state: &State) -> Result<Asked, Response> {
    let engine = state.engine().map_err(|failure| failed(&failure, None))?;
    let mut fields = read_body(&body(engine, &state.config), bytes)?;
    check_model(&mut fields, state, engine)?;
    let inputs = inputs(&mut fields, engine, &state.config);
    if !fields.violations.is_empty() {
        return Err(invalid(&fields.violations));
    }
    let Some(pooling) = engine.model().pooling else {
        let what = "this model makes no embeddings: its file names no pooling (pooling_type)";
        return Err(failed(
            &Failure::new(Code::InvalidRequest, what),
            Some("model"),
        ));
    };
    Ok(Asked {
        inputs: inputs.unwrap_or_default(),
        base64: fields.str("encoding_format") == Some("base64"),
        pooling,
    })
}

fn inputs(fields: &mut Fields, engine: &EngineHandle, config: &Config) -> Option<Vec<Vec<u32>>> {
    let given = fields.take("input")?;
    let vocabulary = engine.model().vocabulary;
    let several: Vec<Value> = match &given {
        Value::String(_) => vec![given],
        Value::Array(list) if list.iter().all(Value::is_number) => vec![given],
        Value::Array(list) if list.len() <= MAX_INPUTS => list.clone(),
        _ => Vec::new(),
    };
    let mut inputs = Vec::new();
    for one in &several {
        let ids = match one {
            Value::String(text) if !text.is_empty() => {
                encode(fields, "input", text, engine, config)
            }
            Value::Array(_) => super::super::text::ids(one, vocabulary)
                .and_then(|ids| within_limits(fields, "input", ids, engine, config)),
            _ => None,
        };
        inputs.extend(ids);
    }
    if inputs.is_empty() || inputs.len() < several.len() {
        let constraint = "a text, token ids, or up to 256 of either";
        fields.add("input", constraint, "it is something else", Value::Null);
        return None;
    }
    Some(inputs)
}

#[derive(Debug, Serialize, JsonSchema)]
pub(in super::super) struct Embeddings {
    object: &'static str,
    data: Vec<Embedding>,
    model: String,
    usage: EmbeddingUsage,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Numbers,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
enum Numbers {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Debug, Default, Serialize, JsonSchema)]
struct EmbeddingUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// Runs one text.
async fn embed(engine: &EngineHandle, request: Request) -> Result<Vec<f32>, Failure> {
    let mut job = engine.submit(request)?;
    let mut vector = Vec::new();
    while let Some(event) = job.next().await {
        match event {
            Event::Embedding(numbers) => vector = numbers,
            Event::End(end) => {
                finish_reason(&end)?;
                return Ok(vector);
            }
            Event::Error(failure) => return Err(failure),
            Event::Started | Event::Token { .. } => {}
        }
    }
    let what = "the engine's thread ended before the answer did";
    Err(Failure::new(Code::Internal, what))
}

pub(in super::super) async fn respond(
    bytes: bytes::Bytes,
    deadline: Option<Instant>,
    state: Arc<State>,
) -> Response {
    let asked = match blocking(state.clone(), move |state| parse(&bytes, state)).await {
        Ok(asked) => asked,
        Err(response) => return response,
    };
    let engine = match state.engine() {
        Ok(engine) => engine,
        Err(failure) => return failed(&failure, None),
    };
    let id = new_completion_id("embd");
    let mut data = Vec::new();
    let mut usage = EmbeddingUsage::default();
    for (index, prompt) in asked.inputs.into_iter().enumerate() {
        usage.prompt_tokens += prompt.len();
        let request = Request {
            job_id: format!("{id}-{index}"),
            prompt,
            max_tokens: 1,
            embed: Some(asked.pooling),
            deadline,
            span: Some(tracing::Span::current()),
            ..Request::default()
        };
        let vector = match embed(engine, request).await {
            Ok(vector) => vector,
            Err(failure) => return failed(&failure, None),
        };
        let embedding = if asked.base64 {
            let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            Numbers::Base64(base64::engine::general_purpose::STANDARD.encode(bytes))
        } else {
            Numbers::Float(vector)
        };
        data.push(Embedding {
            object: "embedding",
            index,
            embedding,
        });
    }
    usage.total_tokens = usage.prompt_tokens;
    let embeddings = Embeddings {
        object: "list",
        data,
        model: super::super::info::model_id(engine, &state.config),
        usage,
    };
    with_status(StatusCode::OK, &json!(embeddings))
}
