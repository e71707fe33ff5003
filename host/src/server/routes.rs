//! What is at which path.

use super::fields::{Body, Field, Kind};
use super::service::{failed, invalid};
use super::{State, execute, info, openai, openapi, stream, text};
use crate::engine::{Code, Failure};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use warp::http::{HeaderMap, StatusCode};
use warp::reject::Rejection;
use warp::reply::{self, Reply, Response};
use warp::{Filter, filters::BoxedFilter};

pub(super) const SHUTDOWN: &str = "/shutdown";

/// Every path with its method. The documentation has exactly these.
pub(super) const ROUTES: [(&str, &str); 17] = [
    ("GET", "/"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("POST", "/execute"),
    ("POST", "/cancel"),
    ("POST", SHUTDOWN),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/apply-template"),
    ("GET", "/v1/worker"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
];

/// The methods that a path takes; empty where there is no such path.
pub(super) fn methods(path: &str) -> Vec<&'static str> {
    let matches = |pattern: &str| match pattern.strip_suffix("{model}") {
        Some(prefix) => path
            .strip_prefix(prefix)
            .is_some_and(|rest| !rest.is_empty() && !rest.contains('/')),
        None => path == pattern,
    };
    let found = ROUTES.iter().filter(|(_, pattern)| matches(pattern));
    found.map(|(method, _)| *method).collect()
}

/// Whether a path needs no key: probes, and the page, which asks for the key itself.
pub(super) fn is_open(path: &str) -> bool {
    matches!(path, "/" | "/health" | "/ready")
}

/// Every route of the worker. [`super::service`] has refused unknown paths and methods by now.
pub(super) fn routes(state: Arc<State>) -> BoxedFilter<(Response,)> {
    warp::path::full()
        .and(warp::header::headers_cloned())
        .and(warp::body::stream())
        .then(move |path: warp::path::FullPath, headers, body| {
            let state = state.clone();
            async move { dispatch(path.as_str(), &headers, body, state).await }
        })
        .recover(refuse)
        .unify()
        .boxed()
}

async fn dispatch<B: Buf>(
    path: &str,
    headers: &HeaderMap,
    body: impl Stream<Item = Result<B, warp::Error>> + Send,
    state: Arc<State>,
) -> Response {
    match path {
        "/" => return page(),
        "/health" => return info::health(&state),
        "/ready" => return info::ready(&state),
        "/metrics" => return info::metrics(&state),
        "/openapi.json" => return openapi::respond(&state),
        "/v1/worker" => return info::worker(&state),
        "/v1/models" => return openai::models::list(&state),
        SHUTDOWN => {
            state.shutdown.send_replace(true);
            return with_status(StatusCode::ACCEPTED, &json!({ "status": "draining" }));
        }
        _ => {}
    }
    if let Some(model) = path.strip_prefix("/v1/models/") {
        return openai::models::get(&state, model);
    }
    let refused = |failure: &Failure| {
        if openai::is_path(path) {
            openai::failed(failure, None)
        } else {
            failed(failure)
        }
    };
    let body = match collect(body, &state).await {
        Ok(body) => body,
        Err(failure) => return refused(&failure),
    };
    if let Err(failure) = state.engine() {
        return refused(&failure);
    }
    let deadline = match deadline(headers) {
        Ok(deadline) => deadline,
        Err(failure) => return refused(&failure),
    };
    match path {
        "/execute" => execute(body, deadline, state).await,
        "/cancel" => cancel(&body, &state),
        "/tokenize" => blocking(state, move |state| text::tokenize(&body, state)).await,
        "/detokenize" => text::detokenize(&body, &state),
        "/apply-template" => blocking(state, move |state| text::apply_template(&body, state)).await,
        "/v1/chat/completions" => openai::chat::respond(body, deadline, state).await,
        "/v1/completions" => openai::completions::respond(body, deadline, state).await,
        "/v1/embeddings" => openai::embeddings::respond(body, deadline, state).await,
        _ => failed(&Failure::new(Code::NotFound, "there is no such path")),
    }
}

/// Runs what takes milliseconds of computing elsewhere than on the threads that carry the streams.
pub(super) async fn blocking<T: Send + 'static>(
    state: Arc<State>,
    work: impl FnOnce(&State) -> T + Send + 'static,
) -> T {
    let span = tracing::Span::current();
    let task = tokio::task::spawn_blocking(move || span.in_scope(|| work(&state)));
    match task.await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

async fn execute(body: Bytes, deadline: Option<Instant>, state: Arc<State>) -> Response {
    let parsed = blocking(state.clone(), move |state| {
        let engine = state.engine().map_err(|failure| failed(&failure))?;
        execute::parse(&body, engine, &state.config).map_err(|violations| invalid(&violations))
    })
    .await;
    let execute::Execute {
        mut request,
        metrics_interval,
    } = match parsed {
        Ok(request) => request,
        Err(response) => return response,
    };
    request.deadline = request.deadline.into_iter().chain(deadline).min();
    request.span = Some(tracing::Span::current());
    let job_id = request.job_id.clone();
    match state.engine().and_then(|engine| engine.submit(request)) {
        Ok(job) => stream::respond(job, job_id, metrics_interval, &state),
        Err(failure) => failed(&failure),
    }
}

/// The body of `POST /cancel`.
pub(super) fn cancel_body() -> Body {
    let kind = Kind::Text {
        min: 1,
        max: 256,
        any: false,
    };
    Body {
        fields: vec![Field::new("job_id", kind, "The job to cancel").required()],
        ..Body::default()
    }
}

fn cancel(body: &Bytes, state: &State) -> Response {
    let fields = match cancel_body().read(body) {
        Ok(fields) if fields.violations.is_empty() => fields,
        Ok(fields) => return invalid(&fields.violations),
        Err(violation) => return invalid(&[violation]),
    };
    let job_id = fields.str("job_id").unwrap_or_default();
    let found = state.engine().is_ok_and(|engine| engine.cancel(job_id));
    // Whether it ended just now or never was, it does not run: cancelling again says the same.
    let body =
        json!({ "job_id": job_id, "status": if found { "cancelling" } else { "not_running" } });
    with_status(StatusCode::ACCEPTED, &body)
}

/// When a request that says `X-Deadline` must be done: an RFC 3339 time, or milliseconds since 1970.
fn deadline(headers: &HeaderMap) -> Result<Option<Instant>, Failure> {
    let Some(value) = headers.get("x-deadline") else {
        return Ok(None);
    };
    let ms = |text: &str| {
        let digits = (12..=15).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        text.parse().ok().filter(|_| digits)
    };
    let time = value.to_str().ok().and_then(|text| match ms(text) {
        Some(ms) => SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms)),
        None => text.parse::<jiff::Timestamp>().ok().map(SystemTime::from),
    });
    let Some(time) = time else {
        let what = "X-Deadline is neither an RFC 3339 time nor milliseconds since 1970";
        return Err(Failure::new(Code::InvalidRequest, what));
    };
    let left = time.duration_since(SystemTime::now()).unwrap_or_default();
    Ok(Instant::now().checked_add(left))
}

async fn collect<B: Buf>(
    body: impl Stream<Item = Result<B, warp::Error>>,
    state: &State,
) -> Result<Bytes, Failure> {
    let limits = &state.config.limits;
    let most = limits.max_body;
    let whole = async {
        let mut bytes = BytesMut::new();
        let mut body = std::pin::pin!(body);
        while let Some(part) = body.next().await {
            let mut part = part.map_err(|error| {
                let what = format!("the body did not arrive whole: {error}");
                Failure::new(Code::InvalidRequest, what)
            })?;
            if bytes.len() + part.remaining() > most {
                let what = format!("the body has more than {most} bytes");
                return Err(Failure::new(Code::PayloadTooLarge, what));
            }
            let n = part.remaining();
            bytes.extend_from_slice(&part.copy_to_bytes(n));
        }
        Ok(bytes.freeze())
    };
    match tokio::time::timeout(limits.body_timeout, whole).await {
        Ok(result) => result,
        Err(_) => {
            let what = format!("the body did not arrive within {:?}", limits.body_timeout);
            Err(Failure::new(Code::InvalidRequest, what))
        }
    }
}

/// The page, which loads nothing else and talks to this worker only.
fn page() -> Response {
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
                  connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let response = reply::html(include_str!("page.html"));
    let response = reply::with_header(response, "content-security-policy", policy);
    reply::with_header(response, "cache-control", "no-cache").into_response()
}

pub(super) fn with_status(status: StatusCode, body: &Value) -> Response {
    reply::with_status(reply::json(body), status).into_response()
}

/// What no route takes.
async fn refuse(rejection: Rejection) -> Result<Response, Infallible> {
    tracing::debug!(?rejection, "rejected");
    let failure = Failure::new(Code::InvalidRequest, "the request cannot be read");
    Ok(failed(&failure))
}
