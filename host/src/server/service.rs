//! What every request goes through before its route: a correlation id, its key, its origin, and whether
//! there is such a path and method at all.

use super::connection::{Activity, Answer};
use super::{State, openai, routes};
use crate::engine::{Code, Failure};
use hyper::body::Incoming;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::convert::Infallible;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::sync::Arc;
use subtle::ConstantTimeEq;
use tower_service::Service as _;
use tracing::Instrument;
use warp::filters::BoxedFilter;
use warp::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN, ALLOW,
    AUTHORIZATION, HOST, HeaderName, HeaderValue, ORIGIN, VARY, WWW_AUTHENTICATE,
};
use warp::http::{Method, Request, StatusCode};
use warp::reply::{self, Reply, Response};

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    /// On this machine.
    pub local: bool,
}

/// The keys, as digests: all of one length, so that comparing them tells nothing.
pub(super) struct Keys(Vec<[u8; 32]>);

impl Keys {
    pub fn new(keys: &[String]) -> Self {
        Self(keys.iter().map(|k| Sha256::digest(k).into()).collect())
    }

    /// No keys are asked for.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Compares with every key, in a time that does not depend on which one it is, if any.
    fn has(&self, key: &str) -> bool {
        let digest: [u8; 32] = Sha256::digest(key).into();
        let found = self.0.iter().fold(subtle::Choice::from(0), |found, key| {
            found | key.ct_eq(&digest)
        });
        found.into()
    }
}

/// A header of ours.
pub(super) const CORRELATION_ID: HeaderName = HeaderName::from_static("x-correlation-id");

/// Serves requests of any connection.
#[derive(Clone)]
pub(super) struct Service {
    state: Arc<State>,
    routes: BoxedFilter<(Response,)>,
}

/// The service of one connection.
#[derive(Clone)]
pub(super) struct OfPeer {
    service: Service,
    peer: Peer,
    activity: Activity,
}

impl Service {
    pub fn new(state: Arc<State>) -> Self {
        let routes = routes::routes(state.clone());
        Self { state, routes }
    }

    pub fn of(&self, peer: Peer, activity: Activity) -> OfPeer {
        OfPeer {
            service: self.clone(),
            peer,
            activity,
        }
    }
}

impl hyper::service::Service<Request<Incoming>> for OfPeer {
    type Response = warp::http::Response<Answer>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let Self {
            service,
            peer,
            activity,
        } = self.clone();
        let answering = activity.begin();
        let id = correlation_id(&request);
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let span =
            tracing::info_span!("request", correlation_id = %id, %method, path = %shown(&path));
        let started = std::time::Instant::now();
        let origin = service.allowed_origin(&request);
        let respond = async move {
            let mut response = match service.refuse(&request, peer, origin.is_some()) {
                Some(response) => response,
                None => {
                    let mut routes = warp::service(service.routes.clone());
                    match routes.call(request).await {
                        Ok(response) => response,
                        Err(never) => match never {},
                    }
                }
            };
            let headers = response.headers_mut();
            if let Ok(id) = HeaderValue::from_str(&id) {
                headers.insert(CORRELATION_ID, id);
            }
            headers.insert(
                "x-content-type-options",
                HeaderValue::from_static("nosniff"),
            );
            if let Some(origin) = origin {
                headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
                headers.insert(VARY, HeaderValue::from_static("origin"));
            }
            let ms = started.elapsed().as_secs_f64() * 1e3;
            tracing::info!(status = response.status().as_u16(), ms, "answered");
            Ok(response.map(|body| Answer::new(body, answering)))
        };
        Box::pin(respond.instrument(span))
    }
}

impl Service {
    /// The request's origin, where pages of it may use the API.
    fn allowed_origin(&self, request: &Request<Incoming>) -> Option<HeaderValue> {
        let origin = request.headers().get(ORIGIN)?;
        let allowed = &self.state.config.cors_origins;
        let text = origin.to_str().ok()?;
        allowed
            .iter()
            .any(|a| a == text || a == "*")
            .then(|| origin.clone())
    }

    /// The answer to a request that goes no further.
    fn refuse(&self, request: &Request<Incoming>, peer: Peer, cors: bool) -> Option<Response> {
        let path = request.uri().path();
        let method = request.method();
        let say = |code, message: &str| {
            let failure = Failure::new(code, message);
            if openai::is_path(path) {
                openai::failed(&failure, None)
            } else {
                failed(&failure)
            }
        };
        let methods = routes::methods(path);
        if methods.is_empty() {
            let what = "there is no such path; GET /openapi.json describes those there are";
            return Some(say(Code::NotFound, what));
        }
        if method == Method::OPTIONS && cors {
            return Some(preflight(&methods));
        }
        if !methods.iter().any(|m| m == method) {
            let allow = methods.join(", ");
            let mut response = say(
                Code::MethodNotAllowed,
                &format!("this path takes {allow} only"),
            );
            if let Ok(allow) = HeaderValue::from_str(&allow) {
                response.headers_mut().insert(ALLOW, allow);
            }
            return Some(response);
        }
        if !cors && is_foreign(request) {
            let what = "pages of other origins may not use this worker (see --cors-origin)";
            return Some(say(Code::Unauthorized, what));
        }
        let has_key = bearer(request).is_some_and(|key| self.state.keys.has(key));
        let open = routes::is_open(path)
            || if path == routes::SHUTDOWN {
                peer.local
            } else {
                self.state.keys.is_empty()
            };
        if open || has_key {
            return None;
        }
        let what = match (path == routes::SHUTDOWN, self.state.keys.is_empty()) {
            (true, true) => "only this machine may shut the worker down",
            _ => "a valid API key is needed: Authorization: Bearer KEY",
        };
        let mut response = say(Code::Unauthorized, what);
        let headers = response.headers_mut();
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        Some(response)
    }
}

/// The client's correlation id where it is one, else a new one.
fn correlation_id(request: &Request<Incoming>) -> String {
    let fits = |id: &&str| {
        (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    let given = request.headers().get(CORRELATION_ID);
    match given.and_then(|v| v.to_str().ok()).filter(fits) {
        Some(id) => id.to_owned(),
        None => new_id(),
    }
}

/// 24 characters that no earlier call has returned.
pub(super) fn new_id() -> String {
    // RandomState keys come from the system's randomness.
    let half = |salt: u8| RandomState::new().hash_one(salt);
    let text = format!("{:016x}{:016x}", half(0), half(1));
    text[..24].to_owned()
}

fn bearer(request: &Request<Incoming>) -> Option<&str> {
    let value = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
}

/// Whether a page of another origin sends this. Browsers send some requests without asking first, and
/// a worker on this machine must not do what any page says.
fn is_foreign(request: &Request<Incoming>) -> bool {
    let headers = request.headers();
    let Some(origin) = headers.get(ORIGIN) else {
        return false;
    };
    let host = headers.get(HOST).and_then(|v| v.to_str().ok());
    let origin = origin.to_str().ok().and_then(|o| o.split_once("://"));
    match (origin, host) {
        (Some((_, origin)), Some(host)) => origin != host,
        _ => true,
    }
}

fn preflight(methods: &[&str]) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    if let Ok(methods) = HeaderValue::from_str(&methods.join(", ")) {
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
    }
    let allowed = "authorization, content-type, x-correlation-id, x-deadline";
    headers.insert(
        ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static(allowed),
    );
    response
}

/// A path for the log, which may be anything.
fn shown(path: &str) -> String {
    path.chars().take(64).collect()
}

/// A failure in the native API's shape.
pub(super) fn failed(failure: &Failure) -> Response {
    let response = reply::json(failure).into_response();
    with_failure(response, failure)
}

/// Gives a response the status and headers of a failure.
pub(super) fn with_failure(mut response: Response, failure: &Failure) -> Response {
    *response.status_mut() =
        StatusCode::from_u16(failure.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if let Some(seconds) = failure.retry_after {
        response
            .headers_mut()
            .insert("retry-after", HeaderValue::from(seconds));
    }
    response
}

/// Every violation of a request, in the native API's shape.
pub(super) fn invalid(violations: &[crate::sampling::Violation]) -> Response {
    let body = reply::json(&json!({ "errors": violations }));
    reply::with_status(body, StatusCode::BAD_REQUEST).into_response()
}
