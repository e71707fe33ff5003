//! The engine: owns the model and its device, and runs requests on its own thread.
//!
//! - [`Engine::start`] moves a [`Runner`] onto the thread and returns an [`EngineHandle`], which any
//!   number of threads and tasks may clone and use;
//! - [`EngineHandle::submit`] queues a [`Request`] and returns its [`Job`], the receiving end of its
//!   [`Event`]s;
//! - [`kv`] gives each sequence its blocks of the cache, and [`prefix`] keeps the beginnings of prompts there;
//!   [`sequence`] is one request's state; [`scheduler`] picks whose rows the next step has and runs it, and
//!   [`pace`] tells it what is faster; [`grammar`] constrains answers;
//! - [`direct`] drives a runner without any of this, for the commands that look at logits.
//!
//! Everything between the thread and the world goes through channels. Nobody waits for the device
//! except that thread.

pub mod direct;
mod failure;
pub mod grammar;
mod job;
pub mod kv;
mod metrics;
mod pace;
pub mod prefix;
mod scheduler;
mod sequence;
mod text;

#[cfg(test)]
mod batch_tests;
#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod reuse_tests;
#[cfg(test)]
mod tests;

pub use direct::Direct;
pub use failure::{Code, Failure};
pub use grammar::{Constraint, Grammar, Grammars};
pub use job::{Canceller, EVENT_BUFFER, End, Event, Job, JobStatus, LogProbs, StopReason};
pub use metrics::{Metrics, Outcome, OutcomeLabel};
pub use text::{Detokenize, ModelText, Text, render_chat};

use crate::device::{BLOCK_TOKENS, DeviceInfo};
use crate::model::{ModelInfo, Pooling, Runner};
use crate::sampling::{Chain, SamplingParams};
use job::{Registration, Submission};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc as std_mpsc};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// What to generate.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The client's name for it, unlike every other that waits or runs; it appears in logs, and the
    /// prompt does not.
    pub job_id: String,
    /// At least one id.
    pub prompt: Vec<u32>,
    /// Tokens to generate at most, the stop token included.
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// Samplers beyond the plain ones.
    pub chain: Chain,
    /// Added to the logits of these ids before anything else.
    pub logit_bias: Vec<(u32, f32)>,
    /// What the answer must be.
    pub constraint: Option<Constraint>,
    /// Text at which generation ends; it is not part of the answer.
    pub stop: Vec<String>,
    /// Control tokens whose names are to be part of the answer's text; those of all others never are.
    pub visible: Vec<u32>,
    /// How many of the first step's greatest logits to report with the first token; 0 for none.
    pub top_logits: usize,
    /// Report each token's log-probability, and that of so many of the likeliest.
    pub logprobs: Option<usize>,
    /// Pool the prompt's hidden states instead of generating.
    pub embed: Option<Pooling>,
    /// When the request fails with [`Code::InferenceTimeout`], wherever it is by then.
    pub deadline: Option<Instant>,
    /// What the engine's log lines about it lie in.
    pub span: Option<tracing::Span>,
}

/// How an engine treats its requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EngineConfig {
    /// Requests that may wait beside those that there is room for; one more is refused with
    /// [`Code::QueueFull`].
    pub max_queue: usize,
    /// Requests worked on at once, in turns or together.
    pub max_running: usize,
    /// Requests whose next tokens one step computes together at most; `None` for as many as the device does well, which are
    /// never exceeded. With 1 every token is, bit for bit, what it would be alone.
    pub max_batch: Option<usize>,
    /// Requests from which on their next tokens are computed together; fewer take turns. `None` for what is faster, measured
    /// as the engine runs.
    pub min_batch: Option<usize>,
    /// How long a request may take from submission to its end.
    pub timeout: Option<Duration>,
    /// How long a client may leave its events unread while others wait for its place.
    pub stall: Duration,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_queue: 256,
            max_running: 1024,
            max_batch: None,
            min_batch: None,
            timeout: None,
            stall: Duration::from_secs(1),
        }
    }
}

/// What the thread and the handles share.
struct Shared {
    model: ModelInfo,
    device: DeviceInfo,
    cache_tokens: usize,
    config: EngineConfig,
    text: Arc<dyn Text>,
    metrics: Metrics,
    /// Why the engine works no more, once it does not.
    broken: OnceLock<String>,
    draining: AtomicBool,
    jobs: Mutex<HashMap<String, Canceller>>,
    /// Requests that no step was done for yet.
    waiting: AtomicUsize,
    /// How many more requests could start at once; told after each step.
    room: AtomicUsize,
    /// Mean milliseconds of work on a request, the latest ones weighing most.
    mean_ms: AtomicU64,
    grammars: OnceLock<Result<Grammars, String>>,
}

impl Shared {
    fn jobs(&self) -> MutexGuard<'_, HashMap<String, Canceller>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts engines.
pub struct Engine;

impl Engine {
    /// Moves `runner` onto a new thread. The thread ends when every handle is dropped and the work
    /// it was given is done.
    ///
    /// # Errors
    /// The system starts no thread.
    pub fn start(
        runner: Box<dyn Runner>,
        text: Arc<dyn Text>,
        config: EngineConfig,
    ) -> std::io::Result<EngineHandle> {
        let shared = Arc::new(Shared {
            model: runner.info().clone(),
            device: runner.device().clone(),
            cache_tokens: runner.cache_blocks() * BLOCK_TOKENS,
            config,
            text,
            metrics: Metrics::default(),
            broken: OnceLock::new(),
            draining: AtomicBool::new(false),
            jobs: Mutex::default(),
            waiting: AtomicUsize::new(0),
            room: AtomicUsize::new(0),
            mean_ms: AtomicU64::new(0),
            grammars: OnceLock::new(),
        });
        let memory = shared.device.memory_bytes;
        shared.metrics.device_memory.set(memory as i64);
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

    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
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

    /// Takes no new requests from now on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
    }

    pub fn is_draining(&self) -> bool {
        self.shared.draining.load(Ordering::SeqCst)
    }

    /// Jobs that wait or run.
    pub fn in_flight(&self) -> usize {
        self.shared.jobs().len()
    }

    /// Cancels the job of this id; false where there is none.
    pub fn cancel(&self, job_id: &str) -> bool {
        let canceller = self.shared.jobs().get(job_id).cloned();
        canceller.map(|c| c.cancel()).is_some()
    }

    /// Cancels everything.
    pub fn cancel_all(&self) {
        self.shared.jobs().values().for_each(Canceller::cancel);
    }

    /// A constraint for one request; the first call builds what all share, which takes a while.
    ///
    /// # Errors
    /// What is wrong with the grammar.
    pub fn compile(&self, grammar: &Grammar) -> Result<Constraint, String> {
        let shared = &self.shared;
        let build = || Grammars::new(&*shared.text, shared.model.vocabulary);
        match shared.grammars.get_or_init(build) {
            Ok(grammars) => grammars.compile(grammar),
            Err(why) => Err(why.clone()),
        }
    }

    /// Queues a request. Does not block.
    ///
    /// # Errors
    /// [`Code::InvalidRequest`]: an empty prompt, ids outside the vocabulary, more tokens than the
    /// context holds, sampling parameters out of range. [`Code::JobExists`], [`Code::QueueFull`],
    /// [`Code::Draining`]. [`Code::Internal`]: the engine is broken.
    pub fn submit(&self, request: Request) -> Result<Job, Failure> {
        let shared = &self.shared;
        if let Some(why) = self.broken() {
            return Err(Failure::new(Code::Internal, why));
        }
        self.check(&request)
            .map_err(|what| Failure::new(Code::InvalidRequest, what))?;
        if self.is_draining() {
            let what = "the worker is shutting down and takes no new work";
            return Err(Failure::new(Code::Draining, what));
        }
        let canceller = Canceller::default();
        let registration = self.register(&request.job_id, &canceller)?;
        let most = shared.config.max_queue + shared.room.load(Ordering::SeqCst);
        let take = |n| (n < most).then_some(n + 1);
        let waiting = &shared.waiting;
        let place = waiting
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take)
            .map_err(|_| self.queue_full())?;
        let seed = request.sampling.seed.unwrap_or_else(choose_seed);
        let now = Instant::now();
        let timeout = shared.config.timeout.map(|timeout| now + timeout);
        let mut request = request;
        request.deadline = request.deadline.into_iter().chain(timeout).min();
        let (events, receiver) = mpsc::channel(EVENT_BUFFER);
        let status = Arc::new(JobStatus::default());
        status.position.store(place + 1, Ordering::Relaxed);
        let submission = Submission {
            request,
            seed,
            submitted: now,
            events,
            canceller: canceller.clone(),
            status: status.clone(),
            registration,
        };
        shared.metrics.queued.inc();
        if self.submissions.send(submission).is_err() {
            shared.metrics.queued.dec();
            waiting.fetch_sub(1, Ordering::SeqCst);
            let why = self.broken().unwrap_or("the engine's thread has ended");
            return Err(Failure::new(Code::Internal, why));
        }
        Ok(Job {
            seed,
            events: receiver,
            canceller,
            status,
        })
    }

    fn register(&self, job_id: &str, canceller: &Canceller) -> Result<Registration, Failure> {
        let mut jobs = self.shared.jobs();
        if jobs.contains_key(job_id) {
            let what = "a job of this job_id waits or runs; wait for its end or choose another id";
            return Err(Failure::new(Code::JobExists, what));
        }
        jobs.insert(job_id.to_owned(), canceller.clone());
        Ok(Registration {
            shared: self.shared.clone(),
            job_id: job_id.to_owned(),
        })
    }

    fn queue_full(&self) -> Failure {
        self.shared.metrics.count(Outcome::Refused);
        let most = self.shared.config.max_queue;
        let mean_ms = self.shared.mean_ms.load(Ordering::Relaxed);
        let mut failure = Failure::new(
            Code::QueueFull,
            format!("{most} requests wait already (--max-queue)"),
        );
        // One place in the queue is free after about one request's time.
        failure.retry_after = Some(mean_ms.div_ceil(1000).clamp(1, 60));
        failure
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
