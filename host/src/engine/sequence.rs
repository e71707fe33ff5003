//! One request in the running batch.

use super::kv::{BlockPool, BlockTable};
use super::{Detokenize, End, Event, Failure, Outcome, Shared, StopReason, Submission};
use crate::device::{SampleRow, Span};
use crate::sampling::{StopMatcher, uniform};
use std::collections::HashSet;
use std::time::Instant;

/// A request whose turn has come: its tokens, its cache blocks, its text on the way out.
pub(super) struct Sequence<'t> {
    submission: Submission,
    shared: &'t Shared,
    /// The prompt, then what was generated.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// How many of `tokens` are in the cache.
    cached: usize,
    table: BlockTable,
    seen: Seen,
    detokenizer: Box<dyn Detokenize + 't>,
    stops: StopMatcher,
    started: Instant,
    /// When the first and the latest token came.
    token_times: Option<(Instant, Instant)>,
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
    /// Starts work on a request and tells the client.
    pub(super) fn start(mut submission: Submission, shared: &'t Shared) -> Self {
        let tokens = std::mem::take(&mut submission.request.prompt);
        let mut seen = Seen::default();
        tokens.iter().for_each(|&id| seen.add(id));
        let sequence = Self {
            shared,
            prompt_tokens: tokens.len(),
            tokens,
            cached: 0,
            table: BlockTable::default(),
            seen,
            detokenizer: shared.text.detokenizer(),
            stops: StopMatcher::new(submission.request.stop.iter().cloned()),
            started: Instant::now(),
            token_times: None,
            stop_sequence: None,
            submission,
        };
        tracing::debug!(
            job_id = %sequence.submission.request.job_id,
            prompt_tokens = sequence.prompt_tokens,
            "started"
        );
        sequence.send(Event::Started);
        sequence
    }

    fn send(&self, event: Event) {
        // A client that is gone is noticed before the next step.
        let _ = self.submission.events.send(event);
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.submission.canceller.is_cancelled()
    }

    /// The client no longer listens.
    pub(super) fn is_abandoned(&self) -> bool {
        self.submission.events.is_closed()
    }

    /// Tokens that are not in the cache yet: the rest of the prompt, or the last one generated.
    pub(super) fn pending(&self) -> &[u32] {
        &self.tokens[self.cached..]
    }

    /// The next `len` pending tokens as rows from `start`, with blocks for them; `None` where the
    /// pool has too few.
    pub(super) fn span(&mut self, start: usize, len: usize, pool: &mut BlockPool) -> Option<Span> {
        let end = self.cached + len;
        if !self.table.grow(end, pool) {
            return None;
        }
        let blocks = self.table.covering(end).to_vec();
        Some(Span {
            start,
            len,
            past: self.cached,
            blocks,
            ring: self.table.ring().to_vec(),
            horizon: self.prompt_tokens + self.submission.request.max_tokens,
        })
    }

    /// `len` more tokens are in the cache.
    pub(super) fn advance(&mut self, len: usize) {
        let prompt_left = self.prompt_tokens.saturating_sub(self.cached);
        self.shared
            .metrics
            .tokens_in
            .inc_by(len.min(prompt_left) as u64);
        self.cached += len;
    }

    fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// How the next token is to be chosen.
    pub(super) fn sample_row(&self) -> SampleRow<'_> {
        SampleRow {
            params: &self.submission.request.sampling,
            u: uniform(self.submission.seed, self.generated() as u64),
            seen: &self.seen.ids,
        }
    }

    /// How many of the coming token's logits the client wants to see.
    pub(super) fn top_logits_wanted(&self) -> usize {
        if self.generated() == 0 {
            self.submission.request.top_logits
        } else {
            0
        }
    }

    /// Takes a generated token, tells the client, and says whether it was the last one.
    pub(super) fn take(&mut self, id: u32, top: Vec<(u32, f32)>) -> Option<StopReason> {
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
            piece = self.detokenizer.push(id);
            if self.generated() == self.submission.request.max_tokens {
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
        self.send(Event::Token {
            index,
            id,
            text,
            top,
        });
        reason
    }

    /// Gives the blocks back and sends the last event.
    pub(super) fn end(mut self, outcome: Result<StopReason, Failure>, pool: &mut BlockPool) {
        self.table.release(pool);
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        let (first, latest) = self.token_times.unwrap_or_else(|| {
            let now = Instant::now();
            (now, now)
        });
        let job_id = &self.submission.request.job_id;
        let tokens_out = self.generated();
        let (outcome, event) = match outcome {
            Ok(stop_reason) => {
                tracing::info!(%job_id, ?stop_reason, tokens_out, "ended");
                let end = End {
                    stop_reason,
                    tokens_out,
                    prompt_tokens: self.prompt_tokens,
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
                tracing::error!(%job_id, code = ?failure.code, %failure, tokens_out, "failed");
                (Outcome::Failed, Event::Error(failure))
            }
        };
        self.shared.metrics.count(outcome);
        self.send(event);
    }
}

/// Ends a request that never had its turn.
pub(super) fn end_unstarted(submission: Submission, outcome: Result<(), Failure>, shared: &Shared) {
    let job_id = &submission.request.job_id;
    let (outcome, event) = match outcome {
        Ok(()) => {
            tracing::info!(%job_id, "cancelled before its turn");
            let end = End {
                stop_reason: StopReason::Cancelled,
                tokens_out: 0,
                prompt_tokens: submission.request.prompt.len(),
                prefill_ms: 0.0,
                decode_ms: 0.0,
                stop_sequence: None,
            };
            (Outcome::Cancelled, Event::End(end))
        }
        Err(failure) => {
            tracing::error!(%job_id, code = ?failure.code, %failure, "failed before its turn");
            (Outcome::Failed, Event::Error(failure))
        }
    };
    shared.metrics.count(outcome);
    let _ = submission.events.send(event);
}
