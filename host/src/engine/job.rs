//! A request that was submitted, from both sides: what the client holds of it, and what the thread does.

use super::{Failure, Request, Shared};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;
use tokio::sync::mpsc;

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum StopReason {
    MaxTokens,
    /// The model ended its turn or the text, or nothing more may follow.
    Eos,
    StopSequence,
    Cancelled,
    /// The request failed; only in reports that sum a request up. The stream itself ends with
    /// [`Event::Error`].
    Error,
}

/// How a request went.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    pub stop_reason: StopReason,
    /// Tokens generated, the stop token included: as many as there were [`Event::Token`]s.
    pub tokens_out: usize,
    pub prompt_tokens: usize,
    /// Prompt tokens whose keys and values were in the cache already; see [`prefix`].
    pub cached_tokens: usize,
    /// From submission to the start of work.
    pub queue_ms: f64,
    /// From the start of work on the prompt to the first token.
    pub prefill_ms: f64,
    /// From the first token to the last: `tokens_out - 1` steps, and what others had in between.
    pub decode_ms: f64,
    /// The stop string that was reached.
    pub stop_sequence: Option<String>,
}

/// A token's log-probability in the model's own distribution, and that of the likeliest.
#[derive(Clone, Debug, PartialEq)]
pub struct LogProbs {
    pub chosen: f32,
    /// `(id, log-probability)`, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// What a job reports: `Started`, then `Token`s, then exactly one `End` or `Error`. A job that is
/// cancelled or fails before its turn has no `Started`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Work on the request begins.
    Started,
    /// One for each token generated. Its text may be empty: half a character, a possible beginning
    /// of a stop string, a stop token. The next token's text brings what was held back.
    Token {
        /// Counts from 0.
        index: usize,
        id: u32,
        text: String,
        /// With the first token, where [`Request::top_logits`] asks for it: `(id, logit)`, greatest
        /// first.
        top: Vec<(u32, f32)>,
        /// Where [`Request::logprobs`] asks for it.
        logprobs: Option<Box<LogProbs>>,
    },
    /// Where [`Request::embed`] asks for it, in place of tokens: a vector of length 1.
    Embedding(Vec<f32>),
    End(End),
    Error(Failure),
}

/// Events that a client may leave unread before work for it pauses.
pub const EVENT_BUFFER: usize = 256;

/// A submitted request. Dropping it stops the work within one step.
#[derive(Debug)]
pub struct Job {
    /// The seed in use: the request's, or the one chosen for it.
    pub seed: u64,
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) canceller: Canceller,
    pub(super) status: Arc<JobStatus>,
}

impl Job {
    /// The next event, `None` after `End` or `Error`, or where the engine is gone.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// [`Job::next`] for threads outside an async runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }

    /// What cancels this job, to keep where the job itself is not.
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Where the job stands.
    pub fn status(&self) -> &JobStatus {
        &self.status
    }
}

/// Where a job stands, for who asks between its events.
#[derive(Debug, Default)]
pub struct JobStatus {
    pub(super) position: AtomicUsize,
    pub(super) tokens: AtomicUsize,
}

impl JobStatus {
    /// Its place in the queue, 1 for the next; 0 once it runs.
    pub fn queue_position(&self) -> usize {
        self.position.load(Ordering::Relaxed)
    }

    /// Tokens generated so far.
    pub fn tokens_out(&self) -> usize {
        self.tokens.load(Ordering::Relaxed)
    }
}

/// Cancels a job: work on it stops within one step and it ends with [`StopReason::Cancelled`].
#[derive(Clone, Debug, Default)]
pub struct Canceller(Arc<AtomicBool>);

impl Canceller {
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A request on its way to the thread.
pub(super) struct Submission {
    pub(super) request: Request,
    pub(super) seed: u64,
    pub(super) submitted: Instant,
    // Never blocks the thread: a sequence with no room left here is not worked on.
    pub(super) events: mpsc::Sender<Event>,
    pub(super) canceller: Canceller,
    pub(super) status: Arc<JobStatus>,
    pub(super) registration: Registration,
}

/// A job's entry among those that wait or run; the id is free again when this goes.
pub(super) struct Registration {
    pub(super) shared: Arc<Shared>,
    pub(super) job_id: String,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.shared.jobs().remove(&self.job_id);
    }
}
