//! What is at which path.

use super::{State, execute, stream};
use crate::engine::{Code, Failure};
use crate::sampling::Violation;
use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use serde_json::json;
use std::convert::Infallible;
use std::sync::Arc;
use warp::http::StatusCode;
use warp::reject::Rejection;
use warp::reply::{self, Reply, Response};
use warp::{Filter, filters::BoxedFilter};

/// Bytes of a request's body at most. A prompt of 32,768 characters, every one of them escaped, has
/// less than a tenth of it.
const MAX_BODY: usize = 4 << 20;

/// Every route of the worker.
pub(super) fn routes(state: Arc<State>) -> BoxedFilter<(Response,)> {
    let with_state = warp::any().map(move || state.clone());
    let execute = warp::path!("execute")
        .and(warp::post())
        .and(warp::body::stream())
        .and(with_state.clone())
        .then(|body, state| async move { execute(body, state).await });
    let health = warp::path!("health")
        .and(warp::get())
        .and(with_state.clone())
        .map(health);
    let metrics = warp::path!("metrics")
        .and(warp::get())
        .and(with_state)
        .map(metrics);
    execute
        .or(health)
        .unify()
        .or(metrics)
        .unify()
        .recover(refuse)
        .unify()
        .boxed()
}

async fn execute<B: Buf>(
    body: impl Stream<Item = Result<B, warp::Error>> + Send,
    state: Arc<State>,
) -> Response {
    let body = match collect(body).await {
        Ok(body) => body,
        Err(failure) => return failed(&failure),
    };
    // A long prompt takes milliseconds to tokenize: not on the threads that carry the streams.
    let for_parsing = state.clone();
    let parsed = tokio::task::spawn_blocking(move || {
        execute::parse(&body, &for_parsing.engine, &for_parsing.config)
    })
    .await;
    let request = match parsed {
        Ok(Ok(request)) => request,
        Ok(Err(violations)) => return invalid(&violations),
        Err(_) => {
            return failed(&Failure::new(
                Code::Internal,
                "the request's parser panicked",
            ));
        }
    };
    let job_id = request.job_id.clone();
    match state.engine.submit(request) {
        Ok(job) => stream::respond(job, job_id, &state),
        Err(failure) => failed(&failure),
    }
}

async fn collect<B: Buf>(
    body: impl Stream<Item = Result<B, warp::Error>>,
) -> Result<Bytes, Failure> {
    let mut bytes = BytesMut::new();
    let mut body = std::pin::pin!(body);
    while let Some(part) = body.next().await {
        let part = part.map_err(|error| {
            Failure::new(
                Code::InvalidRequest,
                format!("the body did not arrive whole: {error}"),
            )
        })?;
        if bytes.len() + part.remaining() > MAX_BODY {
            let what = format!("the body has more than {MAX_BODY} bytes");
            return Err(Failure::new(Code::PayloadTooLarge, what));
        }
        let mut part = part;
        let n = part.remaining();
        bytes.extend_from_slice(&part.copy_to_bytes(n));
    }
    Ok(bytes.freeze())
}

fn health(state: Arc<State>) -> Response {
    let engine = &state.engine;
    let (model, device) = (engine.model(), engine.device());
    match engine.broken() {
        None => with_status(
            StatusCode::OK,
            &json!({
                "status": "ok",
                "model": model.name,
                "device": device.name,
                "backend": device.backend,
                "context": engine.context(),
                "queued": engine.metrics().queued.get(),
                "running": engine.metrics().running.get(),
            }),
        ),
        Some(reason) => with_status(
            StatusCode::SERVICE_UNAVAILABLE,
            &json!({ "status": "broken", "reason": reason, "model": model.name }),
        ),
    }
}

fn metrics(state: Arc<State>) -> Response {
    let mut text = String::new();
    match state.engine.metrics().encode(&mut text) {
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

fn with_status(status: StatusCode, body: &serde_json::Value) -> Response {
    reply::with_status(reply::json(body), status).into_response()
}

fn invalid(violations: &[Violation]) -> Response {
    with_status(StatusCode::BAD_REQUEST, &json!({ "errors": violations }))
}

fn failed(failure: &Failure) -> Response {
    let status =
        StatusCode::from_u16(failure.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    reply::with_status(reply::json(failure), status).into_response()
}

/// What no route takes.
async fn refuse(rejection: Rejection) -> Result<Response, Infallible> {
    let failure = if rejection.is_not_found() {
        let what = "no such path; there are POST /execute, GET /health and GET /metrics";
        Failure::new(Code::NotFound, what)
    } else if rejection.find::<warp::reject::MethodNotAllowed>().is_some() {
        let what = "wrong method; there are POST /execute, GET /health and GET /metrics";
        Failure::new(Code::MethodNotAllowed, what)
    } else {
        Failure::new(Code::InvalidRequest, "the request cannot be read")
    };
    Ok(failed(&failure))
}
