//! A job's events as server-sent events: `started`, `token`…, `metrics` now and then where asked for, then
//! exactly one `end` or `error`.

use super::State;
use crate::engine::{Code, EngineHandle, Event, Failure, Job, StopReason};
use futures_util::stream;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::time::{Duration, Instant, SystemTime};
use tokio::time::{Interval, MissedTickBehavior, interval};
use warp::reply::{self, Reply, Response};
use warp::sse;

/// A comment goes out after this much silence, so that nobody between us and the client thinks the
/// connection dead.
pub(super) const PING: Duration = Duration::from_secs(10);

/// The data of `started`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Started {
    job_id: String,
    model: String,
    /// RFC 3339, UTC.
    started_at: String,
    /// The request's seed, or the one chosen for it.
    seed: u64,
}

/// The data of `token`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Token {
    /// Its text; empty where it is held back or stands for nothing.
    t: String,
    /// Counts from 0.
    i: usize,
    /// With the first token, where `top_logits` asks for it: `[id, logit]`, greatest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    top: Vec<(u32, f32)>,
}

/// The data of `metrics`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct StreamMetrics {
    /// The job's place in the queue, 1 for the next; 0 once it runs.
    queue_position: usize,
    /// Requests waiting.
    queued: i64,
    /// Requests being worked on.
    running: i64,
    /// Tokens of this job.
    tokens_out: usize,
    /// Tokens of this job since its first one, per second.
    tokens_per_s: f64,
    kv_blocks_used: i64,
    kv_blocks: i64,
}

/// The data of `end`.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Ended {
    tokens_out: usize,
    decode_time_ms: f64,
    stop_reason: StopReason,
    /// The stop string that was reached.
    stop_sequence: Option<String>,
    prompt_tokens: usize,
    /// Prompt tokens that were in the cache already.
    cached_tokens: usize,
    prefill_time_ms: f64,
    queue_time_ms: f64,
}

/// The response that streams `job`. Dropping it, as happens when the client goes away, drops the
/// job, which stops the work.
pub(super) fn respond(
    job: Job,
    job_id: String,
    metrics_interval: Option<Duration>,
    state: &State,
) -> Response {
    let Ok(engine) = state.engine() else {
        return super::service::failed(&Failure::new(Code::Internal, "the engine is gone"));
    };
    let ticks = metrics_interval.map(|every| {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    });
    let stream = EventStream {
        job,
        job_id,
        engine: engine.clone(),
        ticks,
        first_token: None,
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

/// The next tick, or never.
async fn tick(ticks: &mut Option<Interval>) {
    match ticks {
        Some(ticks) => {
            ticks.tick().await;
        }
        None => std::future::pending().await,
    }
}

struct EventStream {
    job: Job,
    job_id: String,
    engine: EngineHandle,
    ticks: Option<Interval>,
    first_token: Option<Instant>,
    next_id: u64,
    ended: bool,
}

impl EventStream {
    async fn next(&mut self) -> Option<sse::Event> {
        if self.ended {
            return None;
        }
        let (name, data) = tokio::select! {
            biased;
            event = self.job.next() => self.describe(event),
            () = tick(&mut self.ticks) => ("metrics", json!(self.metrics())),
        };
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

    fn metrics(&self) -> StreamMetrics {
        let m = self.engine.metrics();
        let status = self.job.status();
        let tokens_out = status.tokens_out();
        let seconds = self.first_token.map_or(0.0, |t| t.elapsed().as_secs_f64());
        let tokens_per_s = if seconds > 0.0 {
            tokens_out.saturating_sub(1) as f64 / seconds
        } else {
            0.0
        };
        StreamMetrics {
            queue_position: status.queue_position(),
            queued: m.queued.get(),
            running: m.running.get(),
            tokens_out,
            tokens_per_s,
            kv_blocks_used: m.kv_blocks_used.get(),
            kv_blocks: m.kv_blocks_total.get(),
        }
    }

    fn describe(&mut self, event: Option<Event>) -> (&'static str, Value) {
        match event {
            Some(Event::Started) => {
                let data = Started {
                    job_id: self.job_id.clone(),
                    model: self.engine.model().name.clone(),
                    started_at: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
                    seed: self.job.seed,
                };
                ("started", json!(data))
            }
            Some(Event::Token {
                index: i,
                text: t,
                top,
                ..
            }) => {
                self.first_token.get_or_insert_with(Instant::now);
                ("token", json!(Token { t, i, top }))
            }
            Some(Event::End(end)) => {
                self.ended = true;
                let data = Ended {
                    tokens_out: end.tokens_out,
                    decode_time_ms: end.decode_ms,
                    stop_reason: end.stop_reason,
                    stop_sequence: end.stop_sequence,
                    prompt_tokens: end.prompt_tokens,
                    cached_tokens: end.cached_tokens,
                    prefill_time_ms: end.prefill_ms,
                    queue_time_ms: end.queue_ms,
                };
                ("end", json!(data))
            }
            Some(Event::Error(failure)) => self.fail(failure),
            Some(Event::Embedding(_)) => {
                let what = "an embedding came where tokens were asked for";
                self.fail(Failure::new(Code::Internal, what))
            }
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
