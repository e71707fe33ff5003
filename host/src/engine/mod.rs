//! The engine: owns the model and its device, and runs requests on its own thread.
//!
//! - [`Engine::start`] moves a [`Runner`] onto the thread and returns an [`EngineHandle`], which any
//!   number of threads and tasks may clone and use;
//! - [`EngineHandle::submit`] queues a [`Request`] and returns its [`Job`], the receiving end of its
//!   [`Event`]s;
//! - [`kv`] gives each sequence its blocks of the cache; [`sequence`] is one request's state;
//!   [`scheduler`] makes a [`crate::device::Batch`] of what can run and runs it, step after step;
//! - [`direct`] drives a runner without any of this, for the commands that look at logits.
//!
//! Everything between the thread and the world goes through channels. Nobody waits for the device
//! except that thread.

pub mod direct;
mod failure;
pub mod kv;
mod metrics;
mod scheduler;
mod sequence;
mod text;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

pub use direct::Direct;
pub use failure::{Code, Failure};
pub use metrics::{Metrics, Outcome, OutcomeLabel};
pub use text::{Detokenize, ModelText, Text};

use crate::device::{BLOCK_TOKENS, DeviceInfo};
use crate::model::{ModelInfo, Runner};
use crate::sampling::SamplingParams;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc as std_mpsc};
use std::time::Instant;
use tokio::sync::mpsc;

/// What to generate.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The client's name for it; it appears in logs, and the prompt does not.
    pub job_id: String,
    /// At least one id.
    pub prompt: Vec<u32>,
    /// Tokens to generate at most, the stop token included.
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// Text at which generation ends; it is not part of the answer.
    pub stop: Vec<String>,
    /// How many of the first step's greatest logits to report with the first token; 0 for none.
    pub top_logits: usize,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum StopReason {
    MaxTokens,
    /// The model ended its turn or the text.
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
    /// From the start of work on the prompt to the first token.
    pub prefill_ms: f64,
    /// From the first token to the last: `tokens_out - 1` steps.
    pub decode_ms: f64,
    /// The stop string that was reached.
    pub stop_sequence: Option<String>,
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
    },
    End(End),
    Error(Failure),
}

/// A submitted request. Dropping it stops the work within one step.
#[derive(Debug)]
pub struct Job {
    /// The seed in use: the request's, or the one chosen for it.
    pub seed: u64,
    events: mpsc::UnboundedReceiver<Event>,
    canceller: Canceller,
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
}

/// Cancels a job: work on it stops within one step and it ends with [`StopReason::Cancelled`].
#[derive(Clone, Debug, Default)]
pub struct Canceller(Arc<AtomicBool>);

impl Canceller {
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A request on its way to the thread.
struct Submission {
    request: Request,
    seed: u64,
    submitted: Instant,
    // Unbounded, so that a client that reads slowly never holds up the device; a request's own
    // `max_tokens` bounds what can pile up.
    events: mpsc::UnboundedSender<Event>,
    canceller: Canceller,
}

/// What the thread and the handles share.
struct Shared {
    model: ModelInfo,
    device: DeviceInfo,
    cache_tokens: usize,
    text: Arc<dyn Text>,
    metrics: Metrics,
    /// Why the engine works no more, once it does not.
    broken: OnceLock<String>,
}

/// Starts engines.
pub struct Engine;

impl Engine {
    /// Moves `runner` onto a new thread. The thread ends when every handle is dropped and the work
    /// it was given is done.
    ///
    /// # Errors
    /// The system starts no thread.
    pub fn start(runner: Box<dyn Runner>, text: Arc<dyn Text>) -> std::io::Result<EngineHandle> {
        let shared = Arc::new(Shared {
            model: runner.info().clone(),
            device: runner.device().clone(),
            cache_tokens: runner.cache_blocks() * BLOCK_TOKENS,
            text,
            metrics: Metrics::default(),
            broken: OnceLock::new(),
        });
        let (submissions, receiver) = std_mpsc::channel();
        let for_thread = shared.clone();
        std::thread::Builder::new()
            .name("kigo-engine".to_owned())
            .spawn(move || scheduler::run(runner, &for_thread, receiver))?;
        Ok(EngineHandle {
            submissions,
            shared,
        })
    }
}

/// Submits requests to an engine and answers questions about it. Cheap to clone.
#[derive(Clone)]
pub struct EngineHandle {
    submissions: std_mpsc::Sender<Submission>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    pub fn model(&self) -> &ModelInfo {
        &self.shared.model
    }

    pub fn device(&self) -> &DeviceInfo {
        &self.shared.device
    }

    pub fn text(&self) -> &dyn Text {
        &*self.shared.text
    }

    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Tokens that prompt and answer together may have.
    pub fn context(&self) -> usize {
        self.shared.model.context.min(self.shared.cache_tokens)
    }

    /// Why the engine works no more, if it does not: its device failed, or its code panicked. Only
    /// a restart helps.
    pub fn broken(&self) -> Option<&str> {
        self.shared.broken.get().map(String::as_str)
    }

    /// Queues a request. Does not block.
    ///
    /// # Errors
    /// [`Code::InvalidRequest`]: an empty prompt, ids outside the vocabulary, more tokens than the
    /// context holds, sampling parameters out of range. [`Code::Internal`]: the engine is broken.
    pub fn submit(&self, request: Request) -> Result<Job, Failure> {
        if let Some(why) = self.broken() {
            return Err(Failure::new(Code::Internal, why));
        }
        self.check(&request)
            .map_err(|what| Failure::new(Code::InvalidRequest, what))?;
        let seed = request.sampling.seed.unwrap_or_else(choose_seed);
        let (events, receiver) = mpsc::unbounded_channel();
        let canceller = Canceller::default();
        let submission = Submission {
            request,
            seed,
            submitted: Instant::now(),
            events,
            canceller: canceller.clone(),
        };
        self.shared.metrics.queued.inc();
        if self.submissions.send(submission).is_err() {
            self.shared.metrics.queued.dec();
            let why = self.broken().unwrap_or("the engine's thread has ended");
            return Err(Failure::new(Code::Internal, why));
        }
        Ok(Job {
            seed,
            events: receiver,
            canceller,
        })
    }

    fn check(&self, request: &Request) -> Result<(), String> {
        let vocabulary = self.shared.model.vocabulary;
        let (prompt, max_tokens) = (request.prompt.len(), request.max_tokens);
        if prompt == 0 {
            return Err("the prompt has no tokens; at least one is needed".to_owned());
        }
        if max_tokens == 0 {
            return Err("max_tokens is 0, expected at least 1".to_owned());
        }
        if prompt.saturating_add(max_tokens) > self.context() {
            return Err(format!(
                "the prompt has {prompt} tokens and max_tokens is {max_tokens}; the context holds \
                 {} tokens in all: shorten the prompt, lower max_tokens, or use a larger --ctx-size",
                self.context()
            ));
        }
        if let Some(id) = request.prompt.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(format!(
                "token id {id} is outside the vocabulary of {vocabulary}"
            ));
        }
        request.sampling.validate(vocabulary).map_err(|violations| {
            let messages: Vec<_> = violations.into_iter().map(|v| v.message).collect();
            messages.join("; ")
        })
    }
}

/// A seed for a request that brings none. It stays below 2^53, so that clients whose JSON numbers are
/// doubles can send it back unchanged.
fn choose_seed() -> u64 {
    // RandomState keys come from the system's randomness.
    RandomState::new().hash_one(Instant::now()) >> 11
}
