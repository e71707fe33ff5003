//! The engine's thread: takes requests in, picks whose rows the next step has, runs it.
//!
//! One turn of the loop: receive what was submitted, end what was cancelled, abandoned or is too late,
//! admit from the queue while there is room, run one step. A step is up to [`Runner::step_rows`] rows of one
//! sequence's prompt, or a generated token's row of one sequence, or of each that generates, up to
//! [`Runner::max_batch`]: reading the weights is most of such a step, and they are read once for all. Which of these two is
//! faster, [`super::pace`] knows. A prompt that begins like an earlier one finds its steps done ([`super::prefix`]).
//!
//! Whose turn it is: that of the sequence that has had the least device time since it came, where a new
//! one starts level with the one that has had least. If it generates, and together is faster, all others that do come along,
//! or those of them that have had least. A step counts in full for everyone in it, so that together they have one share beside
//! those that work on prompts. So a long prompt or a long answer holds nobody up for more than its share, and at most one step
//! lies between a cancellation and its effect. A turn of a sequence that generates by itself lasts as long as steps of
//! its own have begun on the device already: another's step would be the loss of them.
//!
//! How many rows a product has decides how it is summed. Rows of prompts are never mixed with others', so what a
//! prompt leaves in the cache depends on it alone. A generated token's row is summed in one way where it is alone and in
//! another beside others, whoever and however many they are ([`crate::device::Device::MAX_BATCH`]).

use super::kv::BlockPool;
use super::pace::Pace;
use super::sequence::{Chosen, Sequence, choose, end_unstarted};
use super::{Code, Failure, Outcome, Shared, Submission};
use crate::device::{Batch, Span};
use crate::error::Result;
use crate::model::Runner;
use std::cmp::Reverse;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

/// How soon a client that reads again is noticed when nothing else runs.
const STALL_POLL: Duration = Duration::from_millis(5);

/// The thread's whole life.
pub(super) fn run(runner: Box<dyn Runner>, shared: &Shared, submissions: Receiver<Submission>) {
    let most = shared.config.max_batch.unwrap_or(usize::MAX);
    let max_batch = runner.max_batch().min(most).max(1);
    let pool = BlockPool::new(runner.cache_blocks(), runner.ring());
    shared.metrics.kv_blocks_total.set(pool.total() as i64);
    shared.metrics.kv_blocks_free.set(pool.free() as i64);
    let mut scheduler = Scheduler {
        runner,
        shared,
        submissions,
        pool,
        max_batch,
        pace: Pace::new(shared.config.min_batch, max_batch),
        unfinished: false,
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

/// Whose rows the next step has.
enum Turn {
    /// Those of one sequence; steps of its may begin ahead where the second says so.
    One(usize, bool),
    /// A generated token's row of each of these, the oldest first.
    Together(Vec<usize>),
}

/// A step about to run.
struct Step {
    batch: Batch,
    /// Whose rows, in ascending order of `index`.
    members: Vec<Member>,
    begin: bool,
    /// It was to be of several sequences.
    together: bool,
    /// It begins as the device has nothing else to do.
    at_once: bool,
}

/// A sequence's part of a step.
struct Member {
    /// Its place among those that run.
    index: usize,
    /// Rows.
    len: usize,
    /// Whether it generates.
    decodes: bool,
    /// Which of the step's logits its next token is chosen from, where one is.
    output: Option<usize>,
}

struct Scheduler<'t> {
    runner: Box<dyn Runner>,
    shared: &'t Shared,
    submissions: Receiver<Submission>,
    pool: BlockPool,
    /// Sequences whose generated tokens' rows go together at most.
    max_batch: usize,
    pace: Pace,
    /// The last step had rows that no next token was chosen from, so that the device may still be at it.
    unfinished: bool,
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

    /// Whose turn it is, of those whose clients keep up.
    fn next(&mut self) -> Option<Turn> {
        let running = &mut self.running;
        let ready: Vec<usize> = (0..running.len())
            .filter(|&i| running[i].has_room())
            .collect();
        // Of those that are level the newest: its first token is what somebody waits for.
        let by_time = |i: &usize| (running[*i].device_time, Reverse(*i));
        let first = *ready.iter().min_by_key(|i| by_time(i))?;
        if let Some(&i) = ready.iter().find(|&&i| running[i].begun > 0) {
            return Some(Turn::One(i, ready.len() == 1));
        }
        let mut decoding: Vec<usize> = ready
            .into_iter()
            .filter(|&i| running[i].decodes())
            .collect();
        // One whose prompt is about to end is one more that generates.
        let prompt = !running[first].decodes();
        let together = self.pace.is_together(decoding.len() + usize::from(prompt));
        if !together || prompt {
            // What is about to go together with others begins nothing of its own.
            return Some(Turn::One(first, !together));
        }
        decoding.sort_by_key(by_time);
        decoding.truncate(self.max_batch);
        decoding.sort_unstable();
        Some(Turn::Together(decoding))
    }

    /// The next rows of sequence `i`, from row `start` of the step on; takes blocks from younger sequences where the cache is
    /// full. `None` where it was put back itself.
    fn place(&mut self, i: usize, start: usize) -> Option<Span> {
        self.running[i].reuse(&*self.runner, &mut self.pool);
        loop {
            let len = self.running[i].next_len(self.runner.step_rows());
            if let Some(span) = self.running[i].span(start, len, &mut self.pool) {
                return Some(span);
            }
            // The youngest that holds anything goes; the oldest therefore always gets on.
            let youngest = (0..self.running.len())
                .rev()
                .find(|&j| self.running[j].holds_blocks());
            match youngest {
                Some(j) if j > i => self.running[j].put_back(&mut self.pool),
                _ => {
                    if i > 0 {
                        self.running[i].put_back(&mut self.pool);
                    }
                    // Others go on. Time passes for it, so that it is not picked again at once.
                    self.running[i].device_time += STALL_POLL;
                    return None;
                }
            }
        }
    }

    /// The step of a turn; `None` where the cache has no room for any row of it.
    fn plan(&mut self, turn: Turn) -> Option<Step> {
        let goes_on = matches!(turn, Turn::One(i, _) if self.running[i].begun > 0);
        // Steps that a sequence leaves behind as it ends run all the same.
        let at_once = !self.unfinished && (goes_on || self.runner.steps_begun() == 0);
        let (indices, begin, together) = match turn {
            Turn::One(i, begin) => (vec![i], begin, false),
            Turn::Together(indices) => (indices, false, true),
        };
        let mut batch = Batch {
            goes_on,
            ..Batch::default()
        };
        let mut members: Vec<Member> = Vec::with_capacity(indices.len());
        for index in indices {
            // One that an older one has just taken its blocks from has its prompt to do again.
            if together && !self.running[index].decodes() {
                continue;
            }
            let Some(span) = self.place(index, batch.tokens.len()) else {
                continue;
            };
            let sequence = &self.running[index];
            batch
                .tokens
                .extend_from_slice(&sequence.pending()[..span.len]);
            members.push(Member {
                index,
                len: span.len,
                decodes: sequence.decodes(),
                output: None,
            });
            batch.spans.push(span);
        }
        // The logits that the device chooses from come first.
        for on_device in [true, false] {
            for (member, span) in members.iter_mut().zip(&batch.spans) {
                let sequence = &self.running[member.index];
                if sequence.chooses_after(span.len) && sequence.chooses_on_device() == on_device {
                    member.output = Some(batch.outputs.len());
                    batch.outputs.push(span.start + span.len - 1);
                }
            }
        }
        if members.len() > 1 {
            // As many logits as rows, so that the product that makes them is always of several rows.
            let rest = members.iter().zip(&batch.spans);
            let rest = rest.filter(|(member, _)| member.output.is_none());
            batch.outputs.extend(rest.map(|(_, span)| span.start));
        }
        (!members.is_empty()).then_some(Step {
            batch,
            members,
            begin,
            together,
            at_once,
        })
    }

    /// Runs one step, if anything can run.
    fn step(&mut self) -> bool {
        let Some(turn) = self.next() else {
            return false;
        };
        let began = Instant::now();
        let Some(step) = self.plan(turn) else {
            return true;
        };
        let rows = step.batch.tokens.len();
        // One in each request's trace.
        let spans: Vec<tracing::Span> = step
            .members
            .iter()
            .map(|member| {
                let parent = self.running[member.index].tracing_span();
                tracing::debug_span!(parent: parent, "step", rows)
            })
            .collect();
        let _step = spans.first().map(tracing::Span::enter);
        let Self {
            runner, running, ..
        } = self;
        let result = catch_unwind(AssertUnwindSafe(|| execute(&mut **runner, &step, running)));
        let choices = match result {
            Ok(Ok(choices)) => choices,
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
        self.finish(&step, choices, began.elapsed());
        true
    }

    /// What follows from a step that took so long.
    fn finish(&mut self, step: &Step, choices: Vec<Choice>, took: Duration) {
        let metrics = &self.shared.metrics;
        metrics.device_busy.inc_by(took.as_secs_f64());
        let members = &step.members;
        if members.iter().any(|member| member.decodes) {
            metrics.batch_rows.observe(members.len() as f64);
        }
        self.measure(step, took);
        for sequence in &mut self.running {
            sequence.begun = 0;
        }
        if let [member] = &members[..] {
            self.running[member.index].begun = self.runner.steps_begun();
        }
        let step_rows = self.runner.step_rows();
        let mut choices: Vec<Option<Choice>> = choices.into_iter().map(Some).collect();
        // The last one first, so that who ends changes no place that is still to come.
        for member in members.iter().rev() {
            let sequence = &mut self.running[member.index];
            sequence.device_time += took;
            sequence.advance(member.len, step_rows, &mut self.pool);
            let choice = member.output.and_then(|i| choices.get_mut(i)?.take());
            let ended = match choice {
                None if sequence.is_embedding() => sequence.embedded().map(Ok),
                None => None,
                Some(Ok(token)) => sequence.take(token).map(Ok),
                Some(Err(failure)) => Some(Err(failure)),
            };
            if let Some(outcome) = ended {
                let sequence = self.running.remove(member.index);
                sequence.end(outcome, &mut self.pool);
            }
        }
    }

    /// What a step's time says about going together or in turns.
    fn measure(&mut self, step: &Step, took: Duration) {
        let members = &step.members;
        self.pace.passed(took);
        self.unfinished = members.iter().any(|member| member.output.is_none());
        let decodes = members.iter().all(|member| member.decodes);
        if !decodes || self.unfinished || !step.at_once {
            return;
        }
        match members.len() {
            // What is left of those that were to go together is not what a turn is.
            1 if step.together => {}
            1 => self.pace.took_alone(took),
            rows => self.pace.took_together(rows, took),
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

fn too_late(before: &str) -> Failure {
    Failure::new(
        Code::InferenceTimeout,
        format!("the deadline came before {before}"),
    )
}

/// A token, or why its sequence ends without one.
type Choice = std::result::Result<Chosen, Failure>;

/// Runs the step and chooses the next token of each member that has one to come, in the order of their outputs. The inner
/// errors are the members' own; the outer one is the device's.
fn execute(
    runner: &mut dyn Runner,
    step: &Step,
    running: &mut [Sequence<'_>],
) -> Result<Vec<Choice>> {
    runner.forward(&step.batch)?;
    let mut choosing = Vec::with_capacity(step.members.len());
    let mut members = step.members.iter().peekable();
    for (i, sequence) in running.iter_mut().enumerate() {
        let Some(member) = members.next_if(|member| member.index == i) else {
            continue;
        };
        if sequence.is_embedding() {
            sequence.gather(runner, member.len)?;
        }
        if let Some(output) = member.output {
            choosing.push((output, sequence));
        }
    }
    choosing.sort_by_key(|(output, _)| *output);
    let mut choosing: Vec<&mut Sequence<'_>> = choosing.into_iter().map(|(_, s)| s).collect();
    choose(runner, &mut choosing, step.begin)
}

/// How a request ended, for the metrics.
pub(super) fn outcome_of(failure: &Failure) -> Outcome {
    match failure.code {
        Code::InferenceTimeout => Outcome::TimedOut,
        Code::Cancelled => Outcome::Cancelled,
        _ => Outcome::Failed,
    }
}
