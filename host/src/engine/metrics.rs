//! Counters of the engine, in Prometheus' terms.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use std::fmt;
use std::sync::atomic::AtomicU64;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    Completed,
    Cancelled,
    /// Past its deadline.
    TimedOut,
    Failed,
    /// Refused because the queue was full.
    Refused,
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        let name = match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::TimedOut => "timed_out",
            Self::Failed => "failed",
            Self::Refused => "refused",
        };
        name.encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OutcomeLabel {
    pub outcome: Outcome,
}

/// What the engine counts. The registry that [`Metrics::encode`] writes shares these cells.
pub struct Metrics {
    registry: Registry,
    pub tokens_in: Counter,
    /// Of them, those that were in the cache.
    pub tokens_reused: Counter,
    pub tokens_out: Counter,
    pub requests: Family<OutcomeLabel, Counter>,
    /// Requests waiting.
    pub queued: Gauge,
    /// Sequences being worked on.
    pub running: Gauge,
    pub kv_blocks_used: Gauge,
    pub kv_blocks_free: Gauge,
    /// Of those that are free, those that hold the beginning of a prompt.
    pub kv_blocks_cached: Gauge,
    pub kv_blocks_total: Gauge,
    /// Seconds in which the device worked; its rate is the utilisation.
    pub device_busy: Counter<f64, AtomicU64>,
    pub device_memory: Gauge,
    /// From submission to the start of work.
    pub queue_time: Histogram,
    /// From submission to the last event.
    pub end_to_end: Histogram,
    /// From submission to the first token.
    pub first_token: Histogram,
    /// From one token of a sequence to its next.
    pub between_tokens: Histogram,
    /// Rows of each step of generated tokens, one for each sequence in it.
    pub batch_rows: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        // 0.1 ms to 100 s: an emulator and a fast card both fall inside.
        let seconds = || Histogram::new(exponential_buckets(1e-4, 2.0, 21));
        let mut m = Self {
            registry: Registry::default(),
            tokens_in: Counter::default(),
            tokens_reused: Counter::default(),
            tokens_out: Counter::default(),
            requests: Family::default(),
            queued: Gauge::default(),
            running: Gauge::default(),
            kv_blocks_used: Gauge::default(),
            kv_blocks_free: Gauge::default(),
            kv_blocks_cached: Gauge::default(),
            kv_blocks_total: Gauge::default(),
            device_busy: Counter::default(),
            device_memory: Gauge::default(),
            queue_time: seconds(),
            end_to_end: seconds(),
            first_token: seconds(),
            between_tokens: seconds(),
            batch_rows: Histogram::new(exponential_buckets(1.0, 2.0, 7)),
        };
        let r = &mut m.registry;
        // The encoder appends `_total` to counters and the unit to what has one.
        r.register("tokens_in", "Prompt tokens processed", m.tokens_in.clone());
        r.register(
            "tokens_in_cached",
            "Prompt tokens that were in the cache already",
            m.tokens_reused.clone(),
        );
        r.register("tokens_out", "Tokens generated", m.tokens_out.clone());
        r.register("requests", "Requests ended, by outcome", m.requests.clone());
        r.register("requests_queued", "Requests waiting", m.queued.clone());
        r.register(
            "requests_running",
            "Requests being worked on",
            m.running.clone(),
        );
        r.register(
            "kv_blocks_used",
            "Blocks of the KV cache in use",
            m.kv_blocks_used.clone(),
        );
        r.register(
            "kv_blocks_free",
            "Blocks of the KV cache that are free",
            m.kv_blocks_free.clone(),
        );
        r.register(
            "kv_blocks_cached",
            "Free blocks of the KV cache that hold the beginning of a prompt until they are needed",
            m.kv_blocks_cached.clone(),
        );
        r.register(
            "kv_blocks",
            "Blocks of the KV cache",
            m.kv_blocks_total.clone(),
        );
        r.register_with_unit(
            "device_busy",
            "Time in which the device worked; its rate is the utilisation",
            Unit::Seconds,
            m.device_busy.clone(),
        );
        r.register_with_unit(
            "device_memory",
            "Memory of the device, all of it",
            Unit::Bytes,
            m.device_memory.clone(),
        );
        r.register_with_unit(
            "queue_time",
            "From submission to the start of work",
            Unit::Seconds,
            m.queue_time.clone(),
        );
        r.register_with_unit(
            "end_to_end",
            "From submission to the last event",
            Unit::Seconds,
            m.end_to_end.clone(),
        );
        r.register_with_unit(
            "time_to_first_token",
            "From submission to the first token",
            Unit::Seconds,
            m.first_token.clone(),
        );
        r.register_with_unit(
            "inter_token_latency",
            "From one token of a request to its next",
            Unit::Seconds,
            m.between_tokens.clone(),
        );
        r.register(
            "batch_rows",
            "Requests whose next tokens a step computed together",
            m.batch_rows.clone(),
        );
        m
    }
}

impl Metrics {
    pub fn count(&self, outcome: Outcome) {
        self.requests.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// Writes everything in the OpenMetrics text format.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn encode(&self, out: &mut impl fmt::Write) -> fmt::Result {
        prometheus_client::encoding::text::encode(out, &self.registry)
    }
}
