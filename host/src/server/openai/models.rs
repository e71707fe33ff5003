//! `/v1/models`: the one model that is here.

use super::super::fields::{Field, Kind};
use super::super::info::model_id;
use super::super::{Config, State, routes::with_status};
use super::{failed, unix_time};
use crate::engine::{Code, EngineHandle, Failure};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use warp::http::StatusCode;
use warp::reply::Response;

#[derive(Debug, Serialize, JsonSchema)]
pub(in super::super) struct Model {
    id: String,
    object: &'static str,
    /// When the worker started, in seconds since 1970.
    created: u64,
    owned_by: &'static str,
}

#[derive(Debug, Serialize, JsonSchema)]
pub(in super::super) struct Models {
    object: &'static str,
    data: Vec<Model>,
}

fn model(state: &State, engine: &EngineHandle) -> Model {
    Model {
        id: model_id(engine, &state.config),
        object: "model",
        created: unix_time().saturating_sub(state.started.elapsed().as_secs()),
        owned_by: "kigo",
    }
}

/// The names of the model that is here: its id, its own name, and what was asked for.
fn names(engine: &EngineHandle, config: &Config) -> Vec<String> {
    let mut names = vec![model_id(engine, config), engine.model().name.clone()];
    names.extend(config.model_id.clone());
    names.sort();
    names.dedup();
    names
}

/// The field that says which model is meant; [`super::check_model`] reads it.
pub(super) fn field(engine: &EngineHandle, config: &Config) -> Field {
    let kind = Kind::Own {
        constraint: "a string",
        schema: json!({ "type": "string", "enum": names(engine, config) }),
    };
    Field::new("model", kind, "The model, by its id in `/v1/models`").required()
}

pub(super) fn is_ours(asked: &str, state: &State, engine: &EngineHandle) -> bool {
    names(engine, &state.config)
        .iter()
        .any(|name| name == asked)
}

pub(in super::super) fn list(state: &State) -> Response {
    match state.engine() {
        Ok(engine) => {
            let models = Models {
                object: "list",
                data: vec![model(state, engine)],
            };
            with_status(StatusCode::OK, &json!(models))
        }
        Err(failure) => failed(&failure, None),
    }
}

pub(in super::super) fn get(state: &State, asked: &str) -> Response {
    match state.engine() {
        Ok(engine) if is_ours(asked, state, engine) => {
            with_status(StatusCode::OK, &json!(model(state, engine)))
        }
        Ok(_) => {
            let failure = Failure::new(Code::NotFound, "this worker has no such model");
            failed(&failure, Some("model"))
        }
        Err(failure) => failed(&failure, None),
    }
}
