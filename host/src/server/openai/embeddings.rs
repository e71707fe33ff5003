//! `/v1/embeddings`.

use super::super::State;
use super::super::fields::{Body, Field, Kind};
use super::super::routes::blocking;
use super::*;
use std::sync::Arc;

/// Whether the model makes embeddings.
pub(in super::super) fn are_supported(_engine: &EngineHandle) -> bool {
    false
}

pub(in super::super) fn body() -> Body {
    let text = json!({ "type": "string", "minLength": 1 });
    let input = Kind::Own {
        constraint: "a text, or an array of texts",
        schema: json!({ "anyOf": [text, { "type": "array", "minItems": 1, "items": text }] }),
    };
    let name = Kind::Text {
        min: 0,
        max: 256,
        any: true,
    };
    Body {
        fields: vec![
            Field::new(
                "model",
                name.clone(),
                "The model, by its id in `/v1/models`",
            )
            .required(),
            Field::new("input", input, "What to embed").required(),
            Field::new(
                "encoding_format",
                Kind::OneOf(vec!["float", "base64"]),
                "How to write the numbers",
            ),
            Field::new("user", name, "The client's own name for its user; not used"),
        ],
        ..Body::default()
    }
}

pub(in super::super) async fn respond(bytes: bytes::Bytes, state: Arc<State>) -> Response {
    blocking(state, move |state| {
        let engine = match state.engine() {
            Ok(engine) => engine,
            Err(failure) => return failed(&failure, None),
        };
        let fields = match read_body(&body(), &bytes) {
            Ok(fields) => fields,
            Err(response) => return response,
        };
        if let Err(response) = check_model(&fields, state, engine) {
            return response;
        }
        if !fields.violations.is_empty() {
            return invalid(&fields.violations);
        }
        let what = "this model makes no embeddings: its file names no pooling (pooling_type)";
        failed(&Failure::new(Code::InvalidRequest, what), Some("model"))
    })
    .await
}
