//! Answers as they grow, one or several at once, sent whole or in pieces: what chat and completions share.

use super::super::routes::with_status;
use super::super::{State, info};
use super::{Shared, error_body, failed, new_completion_id, unix_time};
use crate::engine::{Code, Constraint, End, EngineHandle, Event, Failure, Job, Request};
use futures_util::stream::{self, SelectAll, Stream, StreamExt};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::time::Instant;
use warp::http::StatusCode;
use warp::reply::{self, Reply, Response};
use warp::sse;

/// Choices and what they have in common.
#[derive(Debug, Serialize, JsonSchema)]
pub(in super::super) struct Envelope<C> {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
    choices: Vec<C>,
    /// In a stream in the last chunk only, where `stream_options.include_usage` asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

/// How an API says what events bring.
pub(super) trait Choices: Send + Sync + 'static {
    /// What events add to a choice.
    type Piece: Serialize + Send + Sync + 'static;
    /// A choice that is complete.
    type Whole: Serialize;

    /// What a whole answer and a piece of one call themselves, and how ids begin.
    const WHOLE: &'static str;
    const PIECE: &'static str;
    const ID: &'static str;

    /// What a stream begins with.
    fn opening(&self, index: usize) -> Option<Self::Piece>;

    /// What an event adds to answer `index`.
    ///
    /// # Errors
    /// The answer failed.
    fn take(&mut self, index: usize, event: Event) -> Result<Vec<Self::Piece>, Failure>;

    /// Whether nothing comes after a piece.
    fn is_last(piece: &Self::Piece) -> bool;

    /// An answer to which [`Choices::join`] adds pieces.
    fn begin(&self, index: usize) -> Self::Whole;

    fn join(whole: &mut Self::Whole, piece: Self::Piece);
}

/// What is asked of the engine, beside what [`Shared`] says.
pub(super) struct Asked {
    pub prompts: Vec<Vec<u32>>,
    pub max_tokens: usize,
    pub constraint: Option<Constraint>,
    pub logprobs: Option<usize>,
    /// [`Request::visible`].
    pub visible: Vec<u32>,
    pub deadline: Option<Instant>,
}

impl Asked {
    /// The engine's request for answer `index`.
    fn request(&self, shared: &Shared, id: &str, index: usize) -> Request {
        let generation = &shared.generation;
        let mut sampling = generation.sampling.clone();
        // Each answer has a seed of its own.
        sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(index as u64));
        Request {
            job_id: format!("{id}-{index}"),
            prompt: self.prompts[index / shared.n].clone(),
            max_tokens: self.max_tokens,
            sampling,
            chain: generation.chain.clone(),
            logit_bias: generation.logit_bias.clone(),
            constraint: self.constraint.clone(),
            stop: generation.stop.clone(),
            visible: self.visible.clone(),
            logprobs: self.logprobs,
            deadline: generation.deadline.into_iter().chain(self.deadline).min(),
            span: Some(tracing::Span::current()),
            ..Request::default()
        }
    }
}

/// Submits what is asked for and answers with it. Dropping the response drops the jobs.
pub(super) async fn respond<C: Choices>(
    choices: C,
    asked: Asked,
    shared: Shared,
    state: &State,
) -> Response {
    let engine = match state.engine() {
        Ok(engine) => engine,
        Err(failure) => return failed(&failure, None),
    };
    let id = new_completion_id(C::ID);
    let count = asked.prompts.len() * shared.n;
    let requests = (0..count).map(|index| asked.request(&shared, &id, index));
    // All of them, or none.
    let jobs: Result<Vec<Job>, Failure> = requests.map(|r| engine.submit(r)).collect();
    let jobs = match jobs {
        Ok(jobs) => jobs,
        Err(failure) => return failed(&failure, None),
    };
    let answers = Answers {
        events: merged(jobs),
        head: Head::new(id, engine, state),
        choices,
        n: shared.n,
        count,
        left: count,
        usage: Usage::default(),
        with_usage: shared.include_usage,
        ready: VecDeque::new(),
        ended: false,
    };
    if shared.stream {
        return event_stream(answers.chunks());
    }
    match answers.whole().await {
        Ok(whole) => with_status(StatusCode::OK, &json!(whole)),
        Err(failure) => failed(&failure, None),
    }
}

/// What all pieces of an answer have in common.
struct Head {
    id: String,
    created: u64,
    model: String,
}

impl Head {
    fn new(id: String, engine: &EngineHandle, state: &State) -> Self {
        Self {
            id,
            created: unix_time(),
            model: info::model_id(engine, &state.config),
        }
    }

    fn envelope<T>(
        &self,
        object: &'static str,
        choices: Vec<T>,
        usage: Option<Option<Usage>>,
    ) -> Envelope<T> {
        Envelope {
            id: self.id.clone(),
            object,
            created: self.created,
            model: self.model.clone(),
            system_fingerprint: format!("kigo-{}", env!("CARGO_PKG_VERSION")),
            choices,
            usage,
        }
    }
}

/// Jobs at work, and what is to be said of them.
struct Answers<C: Choices> {
    events: Events,
    head: Head,
    choices: C,
    /// Answers to each prompt.
    n: usize,
    /// Answers to all prompts.
    count: usize,
    /// Those that have not ended.
    left: usize,
    usage: Usage,
    /// Whether a stream tells it.
    with_usage: bool,
    ready: VecDeque<Value>,
    ended: bool,
}

impl<C: Choices> Answers<C> {
    /// What the next event brings.
    async fn next_pieces(&mut self) -> Result<(usize, Vec<C::Piece>), Failure> {
        let Some((index, event)) = self.events.next().await else {
            let what = "the engine's thread ended before the answer did";
            return Err(Failure::new(Code::Internal, what));
        };
        if let Event::End(end) = &event {
            self.usage.add(end, index.is_multiple_of(self.n));
        }
        let pieces = self.choices.take(index, event)?;
        self.left -= pieces.iter().filter(|p| C::is_last(p)).count();
        Ok((index, pieces))
    }

    async fn whole(mut self) -> Result<Envelope<C::Whole>, Failure> {
        let mut wholes: Vec<C::Whole> = (0..self.count).map(|i| self.choices.begin(i)).collect();
        while self.left > 0 {
            let (index, pieces) = self.next_pieces().await?;
            for piece in pieces {
                C::join(&mut wholes[index], piece);
            }
        }
        let usage = Some(Some(self.usage));
        Ok(self.head.envelope(C::WHOLE, wholes, usage))
    }

    fn say(&mut self, choices: Vec<C::Piece>, usage: Option<Usage>) {
        let usage = self.with_usage.then_some(usage);
        let chunk = self.head.envelope(C::PIECE, choices, usage);
        self.ready.push_back(json!(chunk));
    }

    fn chunks(mut self) -> impl Stream<Item = Value> + Send + Sync {
        for index in 0..self.count {
            if let Some(piece) = self.choices.opening(index) {
                self.say(vec![piece], None);
            }
        }
        stream::unfold(self, |mut answers| async move {
            let chunk = answers.next_chunk().await?;
            Some((chunk, answers))
        })
    }

    async fn next_chunk(&mut self) -> Option<Value> {
        loop {
            if let Some(chunk) = self.ready.pop_front() {
                return Some(chunk);
            }
            if self.ended {
                return None;
            }
            match self.next_pieces().await {
                Ok((_, pieces)) => {
                    for piece in pieces {
                        self.say(vec![piece], None);
                    }
                    if self.left > 0 {
                        continue;
                    }
                    if self.with_usage {
                        self.say(Vec::new(), Some(self.usage));
                    }
                    self.ready.push_back(json!("[DONE]"));
                }
                Err(failure) => self.ready.push_back(json!(error_body(&failure, None))),
            }
            self.ended = true;
        }
    }
}

type Events = SelectAll<Pin<Box<dyn Stream<Item = (usize, Event)> + Send + Sync>>>;

/// The events of several jobs as they come, each with its job's number.
fn merged(jobs: Vec<Job>) -> Events {
    let streams = jobs.into_iter().enumerate().map(|(i, job)| {
        let events = stream::unfold(job, move |mut job| async move {
            let event = job.next().await?;
            Some(((i, event), job))
        });
        Box::pin(events) as Pin<Box<dyn Stream<Item = _> + Send + Sync>>
    });
    stream::select_all(streams)
}

/// Tokens in and out.
#[derive(Clone, Copy, Debug, Default, Serialize, JsonSchema)]
pub(super) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Clone, Copy, Debug, Default, Serialize, JsonSchema)]
struct PromptTokensDetails {
    /// Of them, those whose keys and values were in the cache.
    cached_tokens: usize,
}

impl Usage {
    /// Counts an answer; `with_prompt` for one answer of each prompt.
    fn add(&mut self, end: &End, with_prompt: bool) {
        if with_prompt {
            self.prompt_tokens += end.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += end.cached_tokens;
        }
        self.completion_tokens += end.tokens_out;
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// A stream of chunks as server-sent events; the last one says `[DONE]`.
fn event_stream(chunks: impl Stream<Item = Value> + Send + Sync + 'static) -> Response {
    let data = |value: Value| match value {
        Value::String(text) => sse::Event::default().data(text),
        chunk => sse::Event::default().data(chunk.to_string()),
    };
    let events = chunks.map(move |chunk| Ok::<_, Infallible>(data(chunk)));
    let events = sse::keep_alive()
        .interval(super::super::stream::PING)
        .stream(events);
    reply::with_header(sse::reply(events), "x-accel-buffering", "no").into_response()
}
