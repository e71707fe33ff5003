//! The engine's thread: takes requests in, picks whose step is next, runs it.
//!
//! One turn of the loop: receive what was submitted, end what was cancelled, abandoned or is too late,
//! admit from the queue while there is room, run one step. Requests run in turns, a step each: up to
//! [`Runner::step_rows`] rows of a prompt, or one token. A step never holds rows of two sequences: how many
//! rows a product has decides how it is summed, and nobody's tokens may depend on who else is there. A
//! prompt that begins like an earlier one finds those steps done ([`super::prefix`]).
//!
//! Whose turn it is: that of the sequence that has had the least device time since it came, where a new
//! one starts level with the one that has had least. So a long prompt or a long answer holds nobody up
//! for more than its share, and at most one step lies between a cancellation and its effect. A turn lasts
//! as long as steps of the sequence's have begun on the device already: another's step would be the loss of them.

use super::kv::BlockPool;
use super::sequence::{Sequence, end_unstarted};
use super::{Code, Failure, Outcome, Shared, Submission};
use crate::device::Batch;
use crate::error::Result;
use crate::model::Runner;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

/// How soon a client that reads again is noticed when nothing else runs.
const STALL_POLL: Duration = Duration::from_millis(5);

/// The thread's whole life.
pub(super) fn run(runner: Box<dyn Runner>, shared: &Shared, submissions: Receiver<Submission>) {
    let pool = BlockPool::new(runner.cache_blocks(), runner.ring());
    shared.metrics.kv_blocks_total.set(pool.total() as i64);
    shared.metrics.kv_blocks_free.set(pool.free() as i64);
    let mut scheduler = Scheduler {
        runner,
        shared,
        submissions,
        pool,
        queue: VecDeque::new(),
        running: Vec::new(),
        ran: true,
    };
    scheduler.publish();
    while scheduler.receive() {
        scheduler.reap();
        scheduler.admit();
        scheduler.publish();
        scheduler.ran = scheduler.step();
        scheduler.publish();
    }
}

struct Scheduler<'t> {
    runner: Box<dyn Runner>,
    shared: &'t Shared,
    submissions: Receiver<Submission>,
    pool: BlockPool,
    /// First come, first served.
    queue: VecDeque<Submission>,
    /// In the order in which they started.
    running: Vec<Sequence<'t>>,
    /// The last turn had a step to run.
    ran: bool,
}

impl<'t> Scheduler<'t> {
    /// Takes what was submitted; waits where there is nothing else to do. False when no work is left
    /// and none can come.
    fn receive(&mut self) -> bool {
        if self.queue.is_empty() && self.running.is_empty() {
            match self.submissions.recv() {
                Ok(submission) => self.enqueue(submission),
                Err(_) => return false,
            }
        } else if !self.ran {
            // Everything waits for clients to read.
            match self.submissions.recv_timeout(STALL_POLL) {
                Ok(submission) => self.enqueue(submission),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(STALL_POLL),
            }
        }
        loop {
            match self.submissions.try_recv() {
                Ok(submission) => self.enqueue(submission),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return true,
            }
        }
    }

    fn enqueue(&mut self, submission: Submission) {
        self.queue.push_back(submission);
        self.renumber();
    }

    /// Tells everybody in the queue where they stand.
    fn renumber(&self) {
        for (i, waiting) in self.queue.iter().enumerate() {
            waiting.status.position.store(i + 1, Ordering::Relaxed);
        }
    }

    fn left_queue(&self, submission: &Submission) {
        submission.status.position.store(0, Ordering::Relaxed);
        self.shared.waiting.fetch_sub(1, Ordering::SeqCst);
        self.shared.metrics.queued.dec();
    }

    /// Ends what was cancelled or is too late, forgets what nobody listens to.
    fn reap(&mut self) {
        let now = Instant::now();
        let late = |deadline: Option<Instant>| deadline.is_some_and(|d| d <= now);
        let mut i = 0;
        while i < self.running.len() {
            let sequence = &self.running[i];
            let outcome = if sequence.is_cancelled() || sequence.is_abandoned() {
                Ok(super::StopReason::Cancelled)
            } else if late(sequence.deadline()) {
                Err(too_late("the answer was whole"))
            } else {
                i += 1;
                continue;
            };
            self.running.remove(i).end(outcome, &mut self.pool);
        }
        let mut i = 0;
        while i < self.queue.len() {
            let waiting = &self.queue[i];
            let outcome = if waiting.canceller.is_cancelled() || waiting.events.is_closed() {
                Ok(())
            } else if late(waiting.request.deadline) {
                Err(too_late("its turn"))
            } else {
                i += 1;
                continue;
            };
            if let Some(waiting) = self.queue.remove(i) {
                self.left_queue(&waiting);
                end_unstarted(waiting, outcome, self.shared);
                self.renumber();
            }
        }
    }

    /// Moves requests from the queue to those that run.
    fn admit(&mut self) {
        while let Some(next) = self.queue.front() {
            if let Some(why) = self.shared.broken.get() {
                let failure = Failure::new(Code::Internal, why.clone());
                if let Some(submission) = self.queue.pop_front() {
                    self.left_queue(&submission);
                    end_unstarted(submission, Err(failure), self.shared);
                }
                continue;
            }
            let needed = (next.request.prompt.len() + 1).div_ceil(crate::device::BLOCK_TOKENS);
            // Who was put back comes first, and those that run need room to grow.
            let fits = needed + self.running.len() <= self.pool.free();
            let room = self.running.len() < self.shared.config.max_running
                && !self.running.iter().any(Sequence::is_put_back)
                && (fits || self.running.is_empty());
            if !room && !self.evict_stalled() {
                break;
            }
            if !room {
                continue;
            }
            let Some(submission) = self.queue.pop_front() else {
                break;
            };
            self.left_queue(&submission);
            let level = self.running.iter().map(|s| s.device_time).min();
            let level = level.unwrap_or_default();
            let sequence = Sequence::start(submission, self.shared, level);
            self.running.push(sequence);
            self.renumber();
        }
    }

    /// Ends the sequence whose client has read nothing for longest, if that is too long while others
    /// wait.
    fn evict_stalled(&mut self) -> bool {
        let stalled = (0..self.running.len())
            .filter_map(|i| Some((self.running[i].stalled_since()?, i)))
            .min();
        match stalled {
            Some((since, i)) if since.elapsed() >= self.shared.config.stall => {
                let failure = Failure::new(
                    Code::Cancelled,
                    "the client read nothing while other requests waited for its place",
                );
                self.running.remove(i).end(Err(failure), &mut self.pool);
                true
            }
            _ => false,
        }
    }

    fn publish(&self) {
        let m = &self.shared.metrics;
        m.running.set(self.running.len() as i64);
        m.kv_blocks_used.set(self.pool.used() as i64);
        m.kv_blocks_free.set(self.pool.free() as i64);
        m.kv_blocks_cached.set(self.pool.cached() as i64);
        // A short prompt and its growth need two blocks; the queue covers for those that need more.
        let places = self.shared.config.max_running - self.running.len();
        let room = places.min(self.pool.free().saturating_sub(self.running.len()) / 2);
        self.shared.room.store(room, Ordering::SeqCst);
    }

    /// The sequence whose turn it is, of those whose clients keep up, and whether steps of its may begin ahead: where others
    /// wait only as its turn begins.
    fn next(&mut self) -> Option<(usize, bool)> {
        let mut best: Option<usize> = None;
        let mut ready = 0;
        for i in 0..self.running.len() {
            if !self.running[i].has_room() {
                continue;
            }
            ready += 1;
            // Of those that are level the newest: its first token is what somebody waits for.
            if best.is_none_or(|b| self.running[i].device_time <= self.running[b].device_time) {
                best = Some(i);
            }
        }
        let goes_on = |i: &usize| self.running[*i].begun > 0;
        let on_turn = (0..self.running.len()).find(goes_on);
        match on_turn {
            Some(i) if self.running[i].has_room() => Some((i, ready == 1)),
            _ => best.map(|i| (i, true)),
        }
    }

    /// The next step of sequence `i` as a batch; takes blocks from younger sequences where the cache is
    /// full. `None` where it was put back itself.
    fn plan(&mut self, i: usize) -> Option<(Batch, usize)> {
        self.running[i].reuse(&*self.runner, &mut self.pool);
        loop {
            let len = self.running[i].next_len(self.runner.step_rows());
            if let Some(span) = self.running[i].span(0, len, &mut self.pool) {
                let sequence = &self.running[i];
                let tokens = sequence.pending()[..len].to_vec();
                let outputs = if len == sequence.pending().len() && !sequence.is_embedding() {
                    vec![len - 1]
                } else {
                    Vec::new()
                };
                let batch = Batch {
                    tokens,
                    spans: vec![span],
                    outputs,
                };
                return Some((batch, len));
            }
            // The youngest that holds anything goes; the oldest therefore always gets on.
            let youngest = (0..self.running.len())
                .rev()
                .find(|&j| self.running[j].holds_blocks());
            match youngest {
                Some(j) if j > i => self.running[j].put_back(&mut self.pool),
                _ if i > 0 => {
                    self.running[i].put_back(&mut self.pool);
                    return None;
                }
                _ => return None,
            }
        }
    }

    /// Runs one step, if anything can run.
    fn step(&mut self) -> bool {
        let Some((i, begin)) = self.next() else {
            return false;
        };
        let began = Instant::now();
        let Some((batch, len)) = self.plan(i) else {
            // Put back: others go on. Time passes for it, so that it is not picked again at once.
            self.running[i].device_time += STALL_POLL;
            return true;
        };
        let parent = self.running[i].tracing_span();
        let _step = tracing::debug_span!(parent: parent, "step", rows = len).entered();
        let runner = &mut self.runner;
        let sequence = &mut self.running[i];
        let result = catch_unwind(AssertUnwindSafe(|| {
            execute(&mut **runner, &batch, sequence, begin)
        }));
        let outcome = match result {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => {
                let failure = Failure::from_error(&error, self.shared.device.backend);
                if matches!(failure.code, Code::CudaError | Code::Internal) {
                    // CUDA errors stick to the context: nothing later would work either.
                    self.break_down(failure.message.clone());
                }
                self.fail_all(&failure);
                return true;
            }
            Err(panic) => {
                let what = panic
                    .downcast_ref::<&str>()
                    .map(|s| (*s).to_owned())
                    .or_else(|| panic.downcast_ref::<String>().cloned())
                    .unwrap_or_else(|| "no message".to_owned());
                // What the model's state is now, nobody knows; wrong tokens would be worse than none.
                let why = format!("the model's code panicked ({what}); the worker needs a restart");
                self.break_down(why.clone());
                self.fail_all(&Failure::new(Code::Internal, why));
                return true;
            }
        };
        let begun = self.runner.steps_begun();
        for (j, sequence) in self.running.iter_mut().enumerate() {
            sequence.begun = if j == i { begun } else { 0 };
        }
        let took = began.elapsed();
        self.shared.metrics.device_busy.inc_by(took.as_secs_f64());
        let sequence = &mut self.running[i];
        sequence.device_time += took;
        sequence.advance(len, self.runner.step_rows(), &mut self.pool);
        let ended = match outcome {
            None if sequence.is_embedding() => sequence.embedded().map(Ok),
            None => None,
            Some(Ok(token)) => sequence.take(token).map(Ok),
            Some(Err(failure)) => Some(Err(failure)),
        };
        if let Some(outcome) = ended {
            self.running.remove(i).end(outcome, &mut self.pool);
        }
        true
    }

    fn break_down(&self, why: String) {
        tracing::error!(%why, "the engine stops");
        let _ = self.shared.broken.set(why);
    }

    fn fail_all(&mut self, failure: &Failure) {
        for sequence in self.running.drain(..) {
            sequence.end(Err(failure.clone()), &mut self.pool);
        }
    }
}

fn too_late(before: &str) -> Failure {
    Failure::new(
        Code::InferenceTimeout,
        format!("the deadline came before {before}"),
    )
}

/// Runs the batch and chooses the sequence's next token, where all its pending tokens were in the batch.
/// The inner error is this sequence's own; the outer one is the device's.
fn execute(
    runner: &mut dyn Runner,
    batch: &Batch,
    sequence: &mut Sequence<'_>,
    begin: bool,
) -> Result<Option<std::result::Result<super::sequence::Chosen, Failure>>> {
    runner.forward(batch)?;
    if sequence.is_embedding() {
        sequence.gather(runner, batch.tokens.len())?;
    }
    if batch.outputs.is_empty() {
        return Ok(None);
    }
    Ok(Some(sequence.choose(runner, begin)?))
}

/// How a request ended, for the metrics.
pub(super) fn outcome_of(failure: &Failure) -> Outcome {
    match failure.code {
        Code::InferenceTimeout => Outcome::TimedOut,
        Code::Cancelled => Outcome::Cancelled,
        _ => Outcome::Failed,
    }
}
