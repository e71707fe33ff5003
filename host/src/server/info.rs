//! What the worker is and how it is: `/health`, `/ready`, `/metrics`, `/v1/worker`, and what an orchestrator is
//! told when the worker is up.

use super::routes::with_status;
use super::service::failed;
use super::{Config, State};
use crate::engine::{Code, EngineHandle, Failure};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use std::path::Path;
use warp::http::StatusCode;
use warp::reply::{self, Reply, Response};

/// How device and host share memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MemoryArchitecture {
    /// The device has memory of its own.
    Discrete,
    /// The device uses the host's.
    Unified,
}

/// What a worker is.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct WorkerInfo {
    pub worker_id: String,
    /// Where it listens; not in `/v1/worker`, whose reader knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The model as it was asked for.
    pub model_ref: String,
    /// `cuda`, `cpu` or `emulated`.
    pub backend: String,
    pub device: String,
    /// Of the device, all of it.
    pub memory_bytes: u64,
    pub memory_architecture: MemoryArchitecture,
    pub capabilities: Capabilities,
    pub model: ModelCard,
    pub version: String,
}

/// What a worker can do.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Capabilities {
    /// Tokens that prompt and answer together may have.
    pub context: usize,
    pub max_tokens_in: usize,
    pub max_tokens_out: usize,
    pub max_queue: usize,
    /// The model has a chat template.
    pub chat: bool,
    /// The chat template has a place for tools.
    pub tools: bool,
    pub embeddings: bool,
    /// Answers can be held to a JSON schema.
    pub json_schema: bool,
    pub streaming: bool,
    pub samplers: Vec<String>,
}

/// The model, from its metadata.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ModelCard {
    /// Its name in the OpenAI API.
    pub id: String,
    pub name: String,
    pub architecture: String,
    pub parameters: u64,
    pub file_bytes: u64,
    pub vocabulary: usize,
    pub layers: usize,
    pub trained_context: usize,
}

impl WorkerInfo {
    pub fn new(engine: &EngineHandle, config: &Config, url: Option<String>) -> Self {
        let (model, device) = (engine.model(), engine.device());
        let most = engine.context().saturating_sub(1);
        let limited = |limit: Option<usize>| limit.map_or(most, |limit| limit.min(most));
        let samplers = crate::sampling::Sampler::DEFAULT_ORDER;
        let mut samplers: Vec<String> = samplers.iter().map(|s| s.name().to_owned()).collect();
        samplers.push("mirostat".to_owned());
        Self {
            worker_id: config.worker_id.clone(),
            url,
            model_ref: model_ref(engine, config),
            backend: device.backend.to_owned(),
            device: device.name.clone(),
            memory_bytes: device.memory_bytes,
            memory_architecture: match device.backend {
                "cuda" => MemoryArchitecture::Discrete,
                _ => MemoryArchitecture::Unified,
            },
            capabilities: Capabilities {
                context: engine.context(),
                max_tokens_in: limited(config.max_tokens_in),
                max_tokens_out: limited(config.max_tokens_out),
                max_queue: engine.config().max_queue,
                chat: engine.text().template().is_some(),
                tools: super::openai::tools::are_supported(engine),
                embeddings: super::openai::embeddings::are_supported(engine),
                json_schema: true,
                streaming: true,
                samplers,
            },
            model: ModelCard {
                id: model_id(engine, config),
                name: model.name.clone(),
                architecture: model.architecture.clone(),
                parameters: model.parameters,
                file_bytes: model.file_bytes,
                vocabulary: model.vocabulary,
                layers: model.layers,
                trained_context: model.trained_context,
            },
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

fn model_ref(engine: &EngineHandle, config: &Config) -> String {
    match &config.model_id {
        Some(model) => model.clone(),
        None => engine.model().path.display().to_string(),
    }
}

/// The model's name in the OpenAI API: the last part of what was asked for, without `.gguf`.
pub(super) fn model_id(engine: &EngineHandle, config: &Config) -> String {
    let name = model_ref(engine, config);
    let name = Path::new(&name).file_name().unwrap_or_default();
    let name = name.to_string_lossy();
    name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
}

/// The body of `/health` and `/ready`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Health {
    /// `ok`, `loading`, `draining` or `broken`.
    status: &'static str,
    /// Why, where it is broken.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// How much of the model is there, 0 to 1.
    load_progress: f64,
    uptime_s: f64,
    #[serde(flatten)]
    engine: Option<EngineHealth>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct EngineHealth {
    model: String,
    device: String,
    backend: String,
    /// Tokens that prompt and answer together may have.
    context: usize,
    queued: i64,
    running: i64,
    max_queue: usize,
}

impl Health {
    fn new(state: &State) -> Self {
        let engine = state.slot.get();
        let reason = engine.and_then(|e| e.broken()).map(str::to_owned);
        let status = match engine {
            None => "loading",
            Some(_) if reason.is_some() => "broken",
            Some(engine) if engine.is_draining() => "draining",
            Some(_) => "ok",
        };
        Self {
            status,
            reason,
            load_progress: state.slot.progress(),
            uptime_s: state.started.elapsed().as_secs_f64(),
            engine: engine.map(|engine| EngineHealth {
                model: engine.model().name.clone(),
                device: engine.device().name.clone(),
                backend: engine.device().backend.to_owned(),
                context: engine.context(),
                queued: engine.metrics().queued.get(),
                running: engine.metrics().running.get(),
                max_queue: engine.config().max_queue,
            }),
        }
    }
}

/// Whether the process is worth keeping: yes while it loads, works or drains.
pub(super) fn health(state: &State) -> Response {
    let health = Health::new(state);
    let status = match health.status {
        "broken" => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::OK,
    };
    with_status(status, &json!(health))
}

/// Whether the worker takes requests.
pub(super) fn ready(state: &State) -> Response {
    let health = Health::new(state);
    let status = match health.status {
        "ok" => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    with_status(status, &json!(health))
}

pub(super) fn worker(state: &State) -> Response {
    match state.engine() {
        Ok(engine) => {
            let info = WorkerInfo::new(engine, &state.config, None);
            with_status(StatusCode::OK, &json!(info))
        }
        Err(failure) => failed(&failure),
    }
}

pub(super) fn metrics(state: &State) -> Response {
    let progress = state.slot.progress();
    let mut text = "# HELP model_load_progress How much of the model is loaded, 0 to 1.\n\
                    # TYPE model_load_progress gauge\n"
        .to_owned();
    text.push_str(&format!("model_load_progress {progress}\n"));
    let written = match state.slot.get() {
        Some(engine) => engine.metrics().encode(&mut text),
        None => {
            text.push_str("# EOF\n");
            Ok(())
        }
    };
    match written {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            reply::with_header(text, "content-type", kind).into_response()
        }
        Err(_) => failed(&Failure::new(
            Code::Internal,
            "the metrics could not be written",
        )),
    }
}
