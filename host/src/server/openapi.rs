//! `/openapi.json`, generated: request bodies from the tables that check them, responses from their types.

use super::service::failed;
use super::{Config, State, execute, info, openai, routes, stream, text};
use crate::engine::{Code, EngineHandle, Failure};
use crate::sampling::Violation;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};
use warp::http::StatusCode;
use warp::reply::Response;

pub(super) fn respond(state: &State) -> Response {
    match state.engine() {
        Ok(engine) => routes::with_status(StatusCode::OK, &document(engine, &state.config)),
        Err(failure) => failed(&failure),
    }
}

/// Everything wrong with a request: the 400 of the native API.
#[derive(serde::Serialize, JsonSchema)]
struct Violations {
    errors: Vec<ViolationSchema>,
}

#[derive(serde::Serialize, JsonSchema)]
struct ViolationSchema {
    /// The field at fault, `body` for all of it.
    field: String,
    constraint: String,
    message: String,
    /// What was given, where that is no text.
    value: Value,
}

impl From<Violation> for ViolationSchema {
    fn from(v: Violation) -> Self {
        Self {
            field: v.field,
            constraint: v.constraint,
            message: v.message,
            value: v.value,
        }
    }
}

/// A failure in the native API's shape.
#[derive(serde::Serialize, JsonSchema)]
struct NativeFailure {
    code: Code,
    message: String,
    retriable: bool,
}

/// Writes responses and keeps the schemas they name.
struct Writer {
    schemas: SchemaGenerator,
    with_keys: bool,
}

impl Writer {
    fn json<T: JsonSchema>(&mut self, description: &str) -> Value {
        let schema = self.schemas.subschema_for::<T>();
        json!({ "description": description, "content": { "application/json": { "schema": schema } } })
    }

    fn value(&self, description: &str, schema: Value) -> Value {
        json!({ "description": description, "content": { "application/json": { "schema": schema } } })
    }

    /// The responses of an operation: `ok` and the failures it may have.
    fn responses(&mut self, ok: (u16, Value), codes: &[Code], openai: bool, open: bool) -> Value {
        let mut responses = Map::new();
        responses.insert(ok.0.to_string(), ok.1);
        let mut codes = codes.to_vec();
        if !open {
            codes.push(Code::Unauthorized);
        }
        codes.push(Code::MethodNotAllowed);
        for code in codes {
            let status = code.status().to_string();
            if responses.contains_key(&status) {
                continue;
            }
            let mut response = match (openai, code) {
                (true, _) => self.json::<openai::ErrorBody>(code.meaning()),
                (false, Code::InvalidRequest) => {
                    let both = json!({ "anyOf": [
                        self.schemas.subschema_for::<Violations>(),
                        self.schemas.subschema_for::<NativeFailure>(),
                    ] });
                    self.value(code.meaning(), both)
                }
                (false, _) => self.json::<NativeFailure>(code.meaning()),
            };
            if code == Code::QueueFull {
                response["headers"] = json!({ "Retry-After": { "description": "Seconds", "schema": { "type": "integer", "minimum": 1 } } });
            }
            responses.insert(status, response);
        }
        Value::Object(responses)
    }
}

/// What work on a model may end in.
const WORK: [Code; 11] = [
    Code::InvalidRequest,
    Code::NotFound,
    Code::JobExists,
    Code::PayloadTooLarge,
    Code::QueueFull,
    Code::Cancelled,
    Code::CudaError,
    Code::Internal,
    Code::VramOom,
    Code::InferenceTimeout,
    Code::Draining,
];
/// What a request that only computes may end in.
const COMPUTE: [Code; 4] = [
    Code::InvalidRequest,
    Code::PayloadTooLarge,
    Code::Internal,
    Code::ModelLoading,
];

/// The OpenAPI 3.1 description of a worker.
pub fn document(engine: &EngineHandle, config: &Config) -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    let mut w = Writer {
        schemas: settings.into_generator(),
        with_keys: !config.api_keys.is_empty(),
    };
    let mut paths = Map::new();
    for (method, path) in routes::ROUTES {
        let operation = operation(&mut w, path, engine, config);
        paths.insert(
            path.to_owned(),
            json!({ method.to_ascii_lowercase(): operation }),
        );
    }
    let schemas = w.schemas.take_definitions(true);
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Kigo worker",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "A GPU inference worker for GGUF language models.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "paths": paths,
        "components": { "schemas": schemas },
    });
    if w.with_keys {
        document["components"]["securitySchemes"] =
            json!({ "key": { "type": "http", "scheme": "bearer" } });
    }
    document
}

/// A server-sent event as an object of its fields.
fn event(name: Option<&str>, data: Value) -> Value {
    let data =
        json!({ "type": "string", "contentMediaType": "application/json", "contentSchema": data });
    match name {
        Some(name) => json!({ "type": "object", "required": ["event", "id", "data"],
            "properties": { "event": { "const": name }, "id": { "type": "string" }, "data": data } }),
        None => {
            let done = json!({ "const": "[DONE]" });
            let of = |data: Value| json!({ "type": "object", "required": ["data"], "properties": { "data": data } });
            json!({ "anyOf": [of(data), of(done)] })
        }
    }
}

/// Text of another kind than JSON.
fn plain(description: &str, kind: &str) -> Value {
    json!({ "description": description, "content": { kind: { "schema": { "type": "string" } } } })
}

fn operation(w: &mut Writer, path: &str, engine: &EngineHandle, config: &Config) -> Value {
    let vocabulary = engine.model().vocabulary;
    let object = |properties: Value, required: &[&str]| json!({ "type": "object", "properties": properties, "required": required });
    let open = routes::is_open(path);
    // Summary, body, what comes when it goes well, what else may come, further headers.
    let (summary, body, ok, codes): (_, Option<Value>, (u16, Value), &[Code]) = match path {
        "/" => (
            "A page to chat with the model",
            None,
            (200, plain("The page", "text/html")),
            &[],
        ),
        "/health" => (
            "Whether the process is worth keeping",
            None,
            (200, w.json::<info::Health>("It loads, works or drains")),
            &[Code::ModelLoading],
        ),
        "/ready" => (
            "Whether the worker takes requests",
            None,
            (200, w.json::<info::Health>("It does")),
            &[Code::ModelLoading],
        ),
        "/metrics" => (
            "Metrics for Prometheus",
            None,
            (
                200,
                plain("OpenMetrics 1.0", "application/openmetrics-text"),
            ),
            &[Code::Internal],
        ),
        "/openapi.json" => (
            "This document",
            None,
            (200, w.value("OpenAPI 3.1", json!({ "type": "object" }))),
            &[Code::ModelLoading],
        ),
        "/execute" => {
            let started = w.schemas.subschema_for::<stream::Started>();
            let token = w.schemas.subschema_for::<stream::Token>();
            let metrics = w.schemas.subschema_for::<stream::StreamMetrics>();
            let end = w.schemas.subschema_for::<stream::Ended>();
            let error = w.schemas.subschema_for::<NativeFailure>();
            let events = [
                ("started", started),
                ("token", token),
                ("metrics", metrics),
                ("end", end),
                ("error", error),
            ];
            let events: Vec<Value> = events
                .into_iter()
                .map(|(name, data)| event(Some(name), json!(data)))
                .collect();
            let ok = json!({
                "description": "Server-sent events, numbered from 0: `started`, `token` for each token, `metrics` where asked for, then one `end` or `error`; each is described here as an object",
                "content": { "text/event-stream": { "schema": { "oneOf": events } } },
            });
            (
                "Generate, and stream the tokens",
                Some(execute::body(engine, config).schema()),
                (200, ok),
                &WORK,
            )
        }
        "/cancel" => {
            let said = object(
                json!({ "job_id": { "type": "string" }, "status": { "enum": ["cancelling", "not_running"] } }),
                &["job_id", "status"],
            );
            (
                "Cancel a job; saying so again changes nothing",
                Some(routes::cancel_body().schema()),
                (202, w.value("It does not run, or soon will not", said)),
                &COMPUTE,
            )
        }
        routes::SHUTDOWN => {
            let said = object(json!({ "status": { "const": "draining" } }), &["status"]);
            (
                "Take no more work, finish what runs, exit; from this machine or with a key",
                None,
                (202, w.value("It does", said)),
                &[],
            )
        }
        "/tokenize" => {
            let said = object(
                json!({ "tokens": { "type": "array", "items": { "type": "integer" } }, "count": { "type": "integer" } }),
                &["tokens", "count"],
            );
            (
                "The token ids of a text",
                Some(text::tokenize_body().schema()),
                (200, w.value("The ids", said)),
                &COMPUTE,
            )
        }
        "/detokenize" => {
            let said = object(json!({ "content": { "type": "string" } }), &["content"]);
            (
                "The text of token ids",
                Some(text::detokenize_body(vocabulary).schema()),
                (200, w.value("The text", said)),
                &COMPUTE,
            )
        }
        "/apply-template" => {
            let said = object(json!({ "prompt": { "type": "string" } }), &["prompt"]);
            (
                "The prompt that a chat makes",
                Some(text::template_body().schema()),
                (200, w.value("The prompt", said)),
                &COMPUTE,
            )
        }
        "/v1/worker" => (
            "What this worker is",
            None,
            (200, w.json::<info::WorkerInfo>("It")),
            &[Code::ModelLoading],
        ),
        "/v1/models" => (
            "The models here",
            None,
            (200, w.json::<openai::models::Models>("One")),
            &[Code::ModelLoading],
        ),
        "/v1/models/{model}" => (
            "A model",
            None,
            (200, w.json::<openai::models::Model>("It")),
            &[Code::NotFound, Code::ModelLoading],
        ),
        "/v1/chat/completions" => {
            let chunk = w.schemas.subschema_for::<openai::chat::Chunk>();
            let mut ok = w.json::<openai::chat::Completion>(
                "The answer; with `stream` as server-sent events, a chunk each, then `[DONE]`",
            );
            ok["content"]["text/event-stream"] = json!({ "schema": event(None, json!({ "anyOf": [chunk, w.schemas.subschema_for::<openai::ErrorBody>()] })) });
            (
                "Answer a chat",
                Some(openai::chat::body(engine, config).schema()),
                (200, ok),
                &WORK,
            )
        }
        "/v1/completions" => {
            let mut ok = w.json::<openai::completions::TextCompletion>(
                "The answer; with `stream` as server-sent events, a chunk each, then `[DONE]`",
            );
            let chunk = w
                .schemas
                .subschema_for::<openai::completions::TextCompletion>();
            ok["content"]["text/event-stream"] = json!({ "schema": event(None, json!({ "anyOf": [chunk, w.schemas.subschema_for::<openai::ErrorBody>()] })) });
            (
                "Go on from a text",
                Some(openai::completions::body(engine, config).schema()),
                (200, ok),
                &WORK,
            )
        }
        _ => (
            "Embed texts",
            Some(openai::embeddings::body(engine, config).schema()),
            (
                200,
                w.json::<openai::embeddings::Embeddings>("The embeddings"),
            ),
            &WORK,
        ),
    };
    let is_openai = openai::is_path(path);
    let mut operation = json!({ "summary": summary, "operationId": operation_id(path) });
    operation["responses"] = w.responses(ok, codes, is_openai, open);
    if path == "/health" || path == "/ready" {
        operation["responses"]["503"] = w.json::<info::Health>("It does not");
    }
    if let Some(schema) = body {
        operation["requestBody"] =
            json!({ "required": true, "content": { "application/json": { "schema": schema } } });
        let deadline =
            "When the request must be done: an RFC 3339 time, or milliseconds since 1970";
        operation["parameters"] = json!([{ "name": "X-Deadline", "in": "header", "description": deadline,
            "schema": { "type": "string", "anyOf": [{ "pattern": "^[0-9]{12,15}$" }, { "format": "date-time" }] } }]);
    }
    if path == "/v1/models/{model}" {
        operation["parameters"] = json!([{ "name": "model", "in": "path", "required": true, "schema": { "type": "string" } }]);
    }
    if w.with_keys && !open {
        operation["security"] = json!([{ "key": [] }]);
    }
    operation
}

fn operation_id(path: &str) -> String {
    let words = path.split(|c: char| !c.is_ascii_alphanumeric());
    let words: Vec<&str> = words.filter(|w| !w.is_empty()).collect();
    if words.is_empty() {
        "page".to_owned()
    } else {
        words.join("_")
    }
}

impl Failure {
    /// The shape of a failure, for the documentation's sake.
    #[cfg(test)]
    fn shape() -> Vec<String> {
        let value = json!(Failure::new(Code::Internal, ""));
        value
            .as_object()
            .into_iter()
            .flatten()
            .map(|(k, _)| k.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_what_the_document_says() {
        let documented = schemars::schema_for!(NativeFailure);
        let documented = documented.get("properties").unwrap().as_object().unwrap();
        let mut names: Vec<&String> = documented.keys().collect();
        names.sort();
        assert_eq!(names, Failure::shape().iter().collect::<Vec<_>>());
    }
}
