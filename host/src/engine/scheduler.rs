//! The engine's thread: takes requests in, makes batches, runs steps.
//!
//! One turn of the loop: receive what was submitted, drop what was cancelled or abandoned, admit
//! from the queue while there is room, run one step. A step carries up to [`Runner::step_rows`] rows: a row
//! for each sequence that decodes, and what is left goes to prompts, in chunks. At most one step lies
//! between a cancellation and its effect.

use super::kv::BlockPool;
use super::sequence::{Sequence, end_unstarted};
use super::{Code, Failure, Shared, Submission, direct};
use crate::device::Batch;
use crate::error::Result;
use crate::model::{MAX_OUTPUTS, Runner};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, TryRecvError};

/// Sequences worked on at once. The batch, the pool and the loop are made for any number; more than
/// one gains nothing until the kernels batch decode rows.
const MAX_RUNNING: usize = 1;

/// The thread's whole life.
pub(super) fn run(runner: Box<dyn Runner>, shared: &Shared, submissions: Receiver<Submission>) {
    let pool = BlockPool::with_ring(runner.cache_blocks(), runner.ring());
    shared.metrics.kv_blocks_total.set(pool.total() as i64);
    let mut scheduler = Scheduler {
        runner,
        shared,
        submissions,
        pool,
        queue: VecDeque::new(),
        running: Vec::new(),
    };
    while scheduler.receive() {
        scheduler.reap();
        scheduler.admit();
        scheduler.publish();
        scheduler.step();
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
    running: Vec<Sequence<'t>>,
}

/// A sequence's part of a step.
struct Part {
    /// Its place in [`Scheduler::running`].
    sequence: usize,
    len: usize,
    /// All its pending tokens are in the step, so it gets a token.
    sampled: bool,
}

impl<'t> Scheduler<'t> {
    /// Takes what was submitted; waits where there is nothing else to do. False when no work is left
    /// and none can come.
    fn receive(&mut self) -> bool {
        loop {
            if self.queue.is_empty() && self.running.is_empty() {
                match self.submissions.recv() {
                    Ok(submission) => self.queue.push_back(submission),
                    Err(_) => return false,
                }
            }
            match self.submissions.try_recv() {
                Ok(submission) => self.queue.push_back(submission),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return true,
            }
        }
    }

    /// Ends what was cancelled, forgets what nobody listens to.
    fn reap(&mut self) {
        let mut i = 0;
        while i < self.running.len() {
            let sequence = &self.running[i];
            if sequence.is_cancelled() || sequence.is_abandoned() {
                let sequence = self.running.remove(i);
                sequence.end(Ok(super::StopReason::Cancelled), &mut self.pool);
            } else {
                i += 1;
            }
        }
        let mut i = 0;
        while i < self.queue.len() {
            let waiting = &self.queue[i];
            if (waiting.canceller.is_cancelled() || waiting.events.is_closed())
                && let Some(waiting) = self.queue.remove(i)
            {
                self.shared.metrics.queued.dec();
                end_unstarted(waiting, Ok(()), self.shared);
            } else {
                i += 1;
            }
        }
    }

    /// Moves requests from the queue into the batch.
    fn admit(&mut self) {
        while self.running.len() < MAX_RUNNING
            && let Some(submission) = self.queue.pop_front()
        {
            self.shared.metrics.queued.dec();
            match self.shared.broken.get() {
                Some(why) => {
                    let failure = Failure::new(Code::Internal, why.clone());
                    end_unstarted(submission, Err(failure), self.shared);
                }
                None => self.running.push(Sequence::start(submission, self.shared)),
            }
        }
    }

    fn publish(&self) {
        self.shared.metrics.running.set(self.running.len() as i64);
        self.shared
            .metrics
            .kv_blocks_used
            .set(self.pool.used() as i64);
    }

    /// Lays out the next step. Sequences that decode come first: a long prompt must not hold up
    /// everybody's next token.
    fn plan(&mut self) -> (Batch, Vec<Part>) {
        let mut order: Vec<usize> = (0..self.running.len()).collect();
        order.sort_by_key(|&i| self.running[i].pending().len() > 1);
        let mut batch = Batch::default();
        let mut parts = Vec::new();
        for i in order {
            let sequence = &mut self.running[i];
            let start = batch.tokens.len();
            let pending = sequence.pending().len();
            let len = pending.min(self.runner.step_rows() - start);
            if len == 0 || batch.outputs.len() == MAX_OUTPUTS {
                break;
            }
            let Some(span) = sequence.span(start, len, &mut self.pool) else {
                continue;
            };
            batch.tokens.extend_from_slice(&sequence.pending()[..len]);
            batch.spans.push(span);
            let sampled = len == pending;
            if sampled {
                batch.outputs.push(start + len - 1);
            }
            parts.push(Part {
                sequence: i,
                len,
                sampled,
            });
        }
        (batch, parts)
    }

    /// Runs one step, if anything runs.
    fn step(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let (batch, parts) = self.plan();
        if parts.is_empty() {
            // Unreachable while the checks of `submit` and MAX_RUNNING hold; an answer all the same.
            self.fail_all(&Failure::new(
                Code::VramOom,
                "the KV cache has no free block",
            ));
            return;
        }
        let sampled: Vec<usize> = parts
            .iter()
            .filter(|p| p.sampled)
            .map(|p| p.sequence)
            .collect();
        let runner = &mut self.runner;
        let running = &self.running;
        let result = catch_unwind(AssertUnwindSafe(|| {
            execute(&mut **runner, &batch, running, &sampled)
        }));
        let chosen = match result {
            Ok(Ok(chosen)) => chosen,
            Ok(Err(error)) => {
                let failure = Failure::from_error(&error, self.shared.device.backend);
                if matches!(failure.code, Code::CudaError | Code::Internal) {
                    // CUDA errors stick to the context: nothing later would work either.
                    self.break_down(failure.message.clone());
                }
                self.fail_all(&failure);
                return;
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
                return;
            }
        };
        for part in &parts {
            self.running[part.sequence].advance(part.len);
        }
        let mut ended = Vec::new();
        for (&i, Chosen { id, top }) in sampled.iter().zip(chosen) {
            if let Some(reason) = self.running[i].take(id, top) {
                ended.push((i, reason));
            }
        }
        ended.sort_by_key(|&(i, _)| std::cmp::Reverse(i));
        for (i, reason) in ended {
            self.running.remove(i).end(Ok(reason), &mut self.pool);
        }
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

/// A token chosen for a sequence.
struct Chosen {
    id: u32,
    /// The logits that the request asked to see, `(id, logit)`, greatest first.
    top: Vec<(u32, f32)>,
}

/// Runs the batch and chooses a token for each sequence of `sampled`, in the order of the batch's
/// outputs.
fn execute(
    runner: &mut dyn Runner,
    batch: &Batch,
    running: &[Sequence<'_>],
    sampled: &[usize],
) -> Result<Vec<Chosen>> {
    runner.forward(batch)?;
    let rows: Vec<_> = sampled.iter().map(|&i| running[i].sample_row()).collect();
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let ids = runner.sample(&rows)?;
    let mut chosen = Vec::with_capacity(ids.len());
    for (output, (&i, id)) in sampled.iter().zip(ids).enumerate() {
        let top = match running[i].top_logits_wanted() {
            0 => Vec::new(),
            n => direct::top_logits(&runner.logits(output)?, n),
        };
        chosen.push(Chosen { id, top });
    }
    Ok(chosen)
}
