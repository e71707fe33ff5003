//! One request that runs: its state, its steps, its events. How it [chooses](choose) a token and what it
//! [pools](pooling) for an embedding have files of their own.

mod choose;
mod pooling;

pub(super) use choose::{Chosen, choose};

use super::kv::{BlockPool, BlockTable};
use super::prefix::{root, step_end};
use super::scheduler::outcome_of;
use super::{Constraint, Detokenize, End, Event, Failure, Outcome, Shared, StopReason, Submission};
use crate::device::Span;
use crate::model::Runner;
use crate::sampling::{ChainState, StopMatcher};
use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A request whose turn has come: its tokens, its cache blocks, its text on the way out.
pub(super) struct Sequence<'t> {
    submission: Submission,
    shared: &'t Shared,
    /// The prompt, then what was generated.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// How many of `tokens` are in the cache.
    cached: usize,
    /// How many prompt tokens were counted; work that is done again counts once.
    counted: usize,
    /// How many prompt tokens were in the cache when its first turn came, once that came.
    reused: Option<usize>,
    table: BlockTable,
    /// Its blocks went to an older sequence; what was in them is computed again, step by step.
    put_back: bool,
    /// Device time it has had, from the level it started at.
    pub(super) device_time: Duration,
    /// Steps of its own that have begun already.
    pub(super) begun: usize,
    seen: Seen,
    constraint: Option<Constraint>,
    /// [`crate::sampling::Chain::is_plain`].
    plain: bool,
    chain_state: ChainState,
    detokenizer: Box<dyn Detokenize + 't>,
    stops: StopMatcher,
    /// The sum of hidden states so far, or the last one.
    pooled: Vec<f64>,
    started: Instant,
    /// When the first and the latest token came.
    token_times: Option<(Instant, Instant)>,
    /// Since when there has been no room for events.
    stalled: Option<Instant>,
    stop_sequence: Option<String>,
}

/// Distinct ids in order of first appearance.
#[derive(Default)]
struct Seen {
    ids: Vec<u32>,
    set: HashSet<u32>,
}

impl Seen {
    fn add(&mut self, id: u32) {
        if self.set.insert(id) {
            self.ids.push(id);
        }
    }
}

impl<'t> Sequence<'t> {
    /// Starts work on a request and tells the client. `level` is the device time it starts with.
    pub(super) fn start(mut submission: Submission, shared: &'t Shared, level: Duration) -> Self {
        let tokens = std::mem::take(&mut submission.request.prompt);
        let mut seen = Seen::default();
        tokens.iter().for_each(|&id| seen.add(id));
        let sequence = Self {
            shared,
            prompt_tokens: tokens.len(),
            tokens,
            cached: 0,
            counted: 0,
            reused: None,
            table: BlockTable::default(),
            put_back: false,
            device_time: level,
            begun: 0,
            seen,
            constraint: submission.request.constraint.take(),
            plain: submission.request.chain.is_plain(),
            chain_state: ChainState::default(),
            detokenizer: shared.text.detokenizer(),
            stops: StopMatcher::new(submission.request.stop.iter().cloned()),
            pooled: Vec::new(),
            started: Instant::now(),
            token_times: None,
            stalled: None,
            stop_sequence: None,
            submission,
        };
        let waited = sequence.started - sequence.submission.submitted;
        shared.metrics.queue_time.observe(waited.as_secs_f64());
        tracing::debug!(
            job_id = %sequence.submission.request.job_id,
            prompt_tokens = sequence.prompt_tokens,
            "started"
        );
        sequence.send(Event::Started);
        sequence
    }

    fn send(&self, event: Event) {
        // There is room (see `has_room`); a client that is gone is noticed before the next step.
        let _ = self.submission.events.try_send(event);
    }

    /// Whether the client has read enough: there is room for a token and for the last event.
    pub(super) fn has_room(&mut self) -> bool {
        if self.submission.events.capacity() >= 2 {
            self.stalled = None;
            return true;
        }
        self.stalled.get_or_insert_with(Instant::now);
        false
    }

    pub(super) fn stalled_since(&self) -> Option<Instant> {
        self.stalled
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.submission.canceller.is_cancelled()
    }

    /// The client no longer listens.
    pub(super) fn is_abandoned(&self) -> bool {
        self.submission.events.is_closed()
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.submission.request.deadline
    }

    pub(super) fn tracing_span(&self) -> Option<tracing::Id> {
        self.submission.request.span.as_ref()?.id()
    }

    pub(super) fn is_put_back(&self) -> bool {
        self.put_back
    }

    pub(super) fn holds_blocks(&self) -> bool {
        !self.table.is_empty()
    }

    /// Gives its blocks up. What they held is computed again later: the prompt in the very same steps, generated tokens one
    /// by one, each alone or beside others.
    pub(super) fn put_back(&mut self, pool: &mut BlockPool) {
        self.table.release(pool);
        self.cached = 0;
        self.put_back = true;
    }

    /// Tokens that are not in the cache yet: the rest of the prompt, or the last one generated, or
    /// after [`Sequence::put_back`] all of them.
    pub(super) fn pending(&self) -> &[u32] {
        &self.tokens[self.cached..]
    }

    /// Rows of the next step: those of the prompt up to where steps end, or one generated token.
    pub(super) fn next_len(&self, step_rows: usize) -> usize {
        match self.prompt_tokens.saturating_sub(self.cached) {
            0 => 1,
            left => left.min(step_end(self.cached, step_rows) - self.cached),
        }
    }

    /// Whether its next step is a generated token's row: its whole prompt is in the cache.
    pub(super) fn decodes(&self) -> bool {
        !self.is_embedding() && self.cached >= self.prompt_tokens
    }

    /// Whether a step of its next `len` tokens is followed by a choice.
    pub(super) fn chooses_after(&self, len: usize) -> bool {
        !self.is_embedding() && len == self.pending().len()
    }

    /// Tokens that prompt and answer may come to.
    fn horizon(&self) -> usize {
        self.prompt_tokens + self.submission.request.max_tokens
    }

    /// Before its first step, and after [`Sequence::put_back`]: takes over what the cache holds of the prompt.
    pub(super) fn reuse(&mut self, runner: &dyn Runner, pool: &mut BlockPool) {
        if self.cached > 0 || self.holds_blocks() {
            return;
        }
        // An embedding is made of every token's hidden state, and the cache holds none.
        let tokens = match self.is_embedding() {
            true => &[],
            false => &self.tokens[..self.prompt_tokens],
        };
        let long = runner.long_above().is_some_and(|n| self.horizon() > n);
        self.cached = self
            .table
            .reuse(root(long), tokens, runner.step_rows(), pool);
        if self.reused.is_none() {
            self.reused = Some(self.cached);
            let metrics = &self.shared.metrics;
            metrics.tokens_reused.inc_by(self.cached as u64);
        }
        self.count_prompt();
    }

    /// The next `len` pending tokens as rows from `start`, with blocks for them; `None` where the
    /// pool has too few.
    pub(super) fn span(&mut self, start: usize, len: usize, pool: &mut BlockPool) -> Option<Span> {
        let end = self.cached + len;
        if !self.table.grow(end, pool) {
            return None;
        }
        self.put_back = false;
        let blocks = self.table.covering(end).to_vec();
        Some(Span {
            start,
            len,
            past: self.cached,
            blocks,
            ring: self.table.ring().to_vec(),
            horizon: self.horizon(),
        })
    }

    /// `len` more tokens are in the cache; where they end a step of the prompt, they stay for others.
    pub(super) fn advance(&mut self, len: usize, step_rows: usize, pool: &mut BlockPool) {
        self.cached += len;
        let end = self.cached;
        if end <= self.prompt_tokens && step_end(end - 1, step_rows) == end {
            self.table.keep(&self.tokens[..end], pool);
        }
        self.count_prompt();
    }

    fn count_prompt(&mut self) {
        let prompt = self.cached.min(self.prompt_tokens);
        let new = prompt.saturating_sub(self.counted);
        self.counted += new;
        self.shared.metrics.tokens_in.inc_by(new as u64);
    }

    fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Takes a generated token, tells the client, and says whether it was the last one.
    pub(super) fn take(&mut self, chosen: Chosen) -> Option<StopReason> {
        let Chosen {
            id,
            top,
            logprobs,
            complete,
        } = chosen;
        let now = Instant::now();
        let metrics = &self.shared.metrics;
        match &mut self.token_times {
            None => {
                metrics
                    .first_token
                    .observe((now - self.submission.submitted).as_secs_f64());
                self.token_times = Some((now, now));
            }
            Some((_, latest)) => {
                metrics
                    .between_tokens
                    .observe((now - *latest).as_secs_f64());
                *latest = now;
            }
        }
        let index = self.generated();
        self.tokens.push(id);
        self.seen.add(id);

        let mut reason = None;
        let mut piece = String::new();
        if self.shared.text.is_end_of_generation(id) {
            reason = Some(StopReason::Eos);
        } else {
            piece = if self.submission.request.visible.contains(&id) {
                // What is half a character before it stays one.
                let name = self.shared.text.token_bytes(id);
                self.detokenizer.finish() + &String::from_utf8_lossy(&name)
            } else {
                self.detokenizer.push(id)
            };
            if complete {
                reason = Some(StopReason::Eos);
            } else if self.generated() == self.submission.request.max_tokens {
                reason = Some(StopReason::MaxTokens);
            }
        }
        if reason.is_some() {
            piece.push_str(&self.detokenizer.finish());
        }
        let emit = self.stops.push(&piece);
        let mut text = emit.text;
        if let Some(i) = emit.stopped {
            reason = Some(StopReason::StopSequence);
            self.stop_sequence = self.submission.request.stop.get(i).cloned();
        } else if reason.is_some() {
            text.push_str(&self.stops.finish());
        }
        // Counted before the client can know of it: whoever has seen n tokens finds n counted.
        metrics.tokens_out.inc();
        let generated = self.generated();
        self.submission
            .status
            .tokens
            .store(generated, Ordering::Relaxed);
        self.send(Event::Token {
            index,
            id,
            text,
            top,
            logprobs,
        });
        reason
    }

    /// Gives the blocks back and sends the last event.
    pub(super) fn end(
        mut self,
        outcome: std::result::Result<StopReason, Failure>,
        pool: &mut BlockPool,
    ) {
        self.table.release(pool);
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        let now = Instant::now();
        let (first, latest) = self.token_times.unwrap_or((now, now));
        let span = self.submission.request.span.clone();
        let _span = span.as_ref().map(tracing::Span::enter);
        let job_id = &self.submission.request.job_id;
        let tokens_out = self.generated();
        let (outcome, event) = match outcome {
            Ok(stop_reason) => {
                tracing::info!(%job_id, ?stop_reason, tokens_out, "ended");
                let end = End {
                    stop_reason,
                    tokens_out,
                    prompt_tokens: self.prompt_tokens,
                    cached_tokens: self.reused.unwrap_or(0),
                    queue_ms: ms(self.submission.submitted, self.started),
                    prefill_ms: ms(self.started, first),
                    decode_ms: ms(first, latest),
                    stop_sequence: self.stop_sequence.take(),
                };
                let outcome = match stop_reason {
                    StopReason::Cancelled => Outcome::Cancelled,
                    _ => Outcome::Completed,
                };
                (outcome, Event::End(end))
            }
            Err(failure) => {
                tracing::error!(%job_id, code = failure.code.name(), %failure, tokens_out, "failed");
                (outcome_of(&failure), Event::Error(failure))
            }
        };
        let worked = (now - self.started).as_millis() as u64;
        let mean = &self.shared.mean_ms;
        mean.store(
            (7 * mean.load(Ordering::Relaxed) + worked) / 8,
            Ordering::Relaxed,
        );
        finish(self.submission, outcome, event, self.shared);
    }
}

/// Frees the job's id, counts it, and sends its last event.
fn finish(submission: Submission, outcome: Outcome, event: Event, shared: &Shared) {
    let Submission {
        events,
        registration,
        submitted,
        ..
    } = submission;
    // Before the client can know of the end: it may use the id again at once.
    drop(registration);
    shared.metrics.count(outcome);
    shared
        .metrics
        .end_to_end
        .observe(submitted.elapsed().as_secs_f64());
    let _ = events.try_send(event);
}

/// Ends a request that never had its turn.
pub(super) fn end_unstarted(
    submission: Submission,
    outcome: std::result::Result<(), Failure>,
    shared: &Shared,
) {
    let span = submission.request.span.clone();
    let _span = span.as_ref().map(tracing::Span::enter);
    let job_id = &submission.request.job_id;
    let (outcome, event) = match outcome {
        Ok(()) => {
            tracing::info!(%job_id, "cancelled before its turn");
            let end = End {
                stop_reason: StopReason::Cancelled,
                tokens_out: 0,
                prompt_tokens: submission.request.prompt.len(),
                cached_tokens: 0,
                queue_ms: submission.submitted.elapsed().as_secs_f64() * 1e3,
                prefill_ms: 0.0,
                decode_ms: 0.0,
                stop_sequence: None,
            };
            (Outcome::Cancelled, Event::End(end))
        }
        Err(failure) => {
            tracing::error!(%job_id, code = failure.code.name(), %failure, "failed before its turn");
            (outcome_of(&failure), Event::Error(failure))
        }
    };
    finish(submission, outcome, event, shared);
}
