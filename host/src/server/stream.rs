//! A job's events as server-sent events: `started`, `token`…, then exactly one `end` or `error`.

use super::State;
use crate::engine::{Code, Event, Failure, Job};
use futures_util::stream;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use warp::reply::{self, Reply, Response};
use warp::sse;

/// A comment goes out after this much silence, so that nobody between us and the client thinks the
/// connection dead.
const PING: Duration = Duration::from_secs(10);

/// The response that streams `job`. Dropping it, as happens when the client goes away, drops the
/// job, which stops the work.
pub(super) fn respond(job: Job, job_id: String, state: &State) -> Response {
    let stream = EventStream {
        job,
        job_id,
        model: state.engine.model().name.clone(),
        closing: state.closing.clone(),
        next_id: 0,
        ended: false,
    };
    let events = stream::unfold(stream, |mut stream| async move {
        let event = stream.next().await?;
        Some((Ok::<_, Infallible>(event), stream))
    });
    let events = sse::keep_alive().interval(PING).stream(events);
    // Proxies that buffer whole responses are told not to.
    reply::with_header(sse::reply(events), "x-accel-buffering", "no").into_response()
}

/// Waits until the worker shuts down.
async fn closed(closing: &mut watch::Receiver<bool>) {
    // An error says that the server is gone altogether.
    let _ = closing.wait_for(|&closing| closing).await;
}

struct EventStream {
    job: Job,
    job_id: String,
    model: String,
    closing: watch::Receiver<bool>,
    next_id: u64,
    ended: bool,
}

impl EventStream {
    async fn next(&mut self) -> Option<sse::Event> {
        if self.ended {
            return None;
        }
        let event = tokio::select! {
            biased;
            event = self.job.next() => event,
            () = closed(&mut self.closing) => {
                self.job.canceller().cancel();
                self.job.next().await
            }
        };
        let (name, data) = self.describe(event);
        let id = self.next_id;
        self.next_id += 1;
        // One line of JSON: no data of ours can break the framing.
        Some(
            sse::Event::default()
                .event(name)
                .id(id.to_string())
                .data(data.to_string()),
        )
    }

    fn describe(&mut self, event: Option<Event>) -> (&'static str, Value) {
        match event {
            Some(Event::Started) => {
                let now = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
                let data = json!({
                    "job_id": self.job_id,
                    "model": self.model,
                    "started_at": now,
                    "seed": self.job.seed,
                });
                ("started", data)
            }
            Some(Event::Token {
                index, text, top, ..
            }) if top.is_empty() => ("token", json!({ "t": text, "i": index })),
            Some(Event::Token {
                index, text, top, ..
            }) => ("token", json!({ "t": text, "i": index, "top": top })),
            Some(Event::End(end)) => {
                self.ended = true;
                let data = json!({
                    "tokens_out": end.tokens_out,
                    "decode_time_ms": end.decode_ms,
                    "stop_reason": end.stop_reason,
                    "stop_sequence": end.stop_sequence,
                    "prompt_tokens": end.prompt_tokens,
                    "prefill_time_ms": end.prefill_ms,
                });
                ("end", data)
            }
            Some(Event::Error(failure)) => self.fail(failure),
            None => {
                let what = "the engine's thread ended before the answer did";
                self.fail(Failure::new(Code::Internal, what))
            }
        }
    }

    fn fail(&mut self, failure: Failure) -> (&'static str, Value) {
        self.ended = true;
        ("error", json!(failure))
    }
}
