//! Whether the sequences that generate are served faster together or in turns, as steps are measured while the worker runs.
//!
//! A step of several rows reads the weights once for all of them. A step of one row is quicker than that, and in its turn a
//! sequence has steps begun ahead. So a few are faster in turns and many together; from how many on depends on the model and
//! the device. `n` sequences get a token each in `n` times what a token takes alone, or in one step of `n` rows:
//!
//! - alone: the last [`ALONE`] tokens, the median of the times that runs of [`RUN`] took. A step that others have begun behind
//!   takes longer than one that was begun before it was asked for, so single ones say little; and one may take a hundred times as
//!   long, as after a batch that has grown the device's memory. One right after another sequence's step has nothing begun for
//!   it: such is the price of turns, and it counts.
//! - together: the median of the last [`TOGETHER`] steps of about as many rows (products take rows in eights), so that
//!   the first, which may load kernels and take memory, has no say.
//!
//! What is not known is tried: a few steps of each, once. What is not run grows old, as contexts grow and others come, and is
//! tried again once the worker has been busy [`TRIED_AGAIN`] times as long as that takes: at most a hundredth of the time.

use std::time::Duration;

/// Steps of one sequence that an estimate is of: three runs of about as many as begin ahead.
const ALONE: usize = 3 * RUN;
const RUN: usize = 8;
/// Steps of several that a median is of.
const TOGETHER: usize = 8;
/// Numbers of rows in a group of so many take about as long.
const GROUP: usize = 8;
/// How many times as long as it took to measure an estimate holds where nothing renews it.
const TRIED_AGAIN: u32 = 100;

/// How long the last `N` steps took.
#[derive(Clone, Copy)]
struct Window<const N: usize> {
    times: [Duration; N],
    /// How many there are.
    len: usize,
    /// Where the next one goes.
    next: usize,
    /// When the last one came, in device time.
    at: Duration,
}

impl<const N: usize> Window<N> {
    const EMPTY: Self = Self {
        times: [Duration::ZERO; N],
        len: 0,
        next: 0,
        at: Duration::ZERO,
    };

    fn sum(&self) -> Duration {
        self.times.iter().sum()
    }

    /// The median of what the runs of [`RUN`] took, whichever steps they begin with.
    fn run(&self) -> Duration {
        let mut runs = [Duration::ZERO; ALONE / RUN];
        for (run, times) in runs.iter_mut().zip(self.times.chunks_exact(RUN)) {
            *run = times.iter().sum();
        }
        runs.sort_unstable();
        runs[runs.len() / 2]
    }

    fn median(&self) -> Duration {
        let mut times = self.times;
        times.sort_unstable();
        times[N / 2]
    }

    /// Whether there are enough, and not too old.
    fn is_known(&self, now: Duration) -> bool {
        self.len == N && now.saturating_sub(self.at) <= self.sum().saturating_mul(TRIED_AGAIN)
    }

    fn push(&mut self, took: Duration, now: Duration) {
        if self.len == N && !self.is_known(now) {
            self.len = 0;
        }
        self.times[self.next] = took;
        self.next = (self.next + 1) % N;
        self.len = (self.len + 1).min(N);
        self.at = now;
    }
}

/// Whether sequences that generate go together.
pub(super) struct Pace {
    /// From how many on, where somebody has said.
    min_batch: Option<usize>,
    /// Rows of one step at most.
    max_batch: usize,
    /// Device time so far: the clock by which estimates grow old.
    now: Duration,
    /// Steps of one sequence that are still to pass before any is measured: the first ones load kernels and take memory.
    warming: usize,
    alone: Window<ALONE>,
    /// Steps of 1 to [`GROUP`] rows, then of as many more, and so on up to `max_batch`.
    together: Vec<Window<TOGETHER>>,
}

impl Pace {
    pub(super) fn new(min_batch: Option<usize>, max_batch: usize) -> Self {
        Self {
            min_batch,
            max_batch,
            now: Duration::ZERO,
            warming: ALONE,
            alone: Window::EMPTY,
            together: vec![Window::EMPTY; max_batch.div_ceil(GROUP)],
        }
    }

    /// Whether `sequences` that generate go together, as many of them as a step may have, rather than in turns.
    pub(super) fn is_together(&self, sequences: usize) -> bool {
        let rows = sequences.min(self.max_batch);
        if rows < 2 {
            return false;
        }
        if let Some(least) = self.min_batch {
            return sequences >= least;
        }
        let together = &self.together[(rows - 1) / GROUP];
        if !together.is_known(self.now) {
            return true;
        }
        if !self.alone.is_known(self.now) {
            return false;
        }
        let in_turns = self.alone.run().saturating_mul(rows as u32);
        in_turns > together.median().saturating_mul(RUN as u32)
    }

    /// A generated token's step with nobody else's row took so long.
    pub(super) fn took_alone(&mut self, took: Duration) {
        if self.warming > 0 {
            self.warming -= 1;
        } else {
            self.alone.push(took, self.now);
        }
    }

    /// A step with a generated token's row of each of `rows` sequences took so long.
    pub(super) fn took_together(&mut self, rows: usize, took: Duration) {
        if let Some(window) = self.together.get_mut(rows.saturating_sub(1) / GROUP) {
            window.push(took, self.now);
        }
    }

    /// The device has worked for so long, on whatever it was.
    pub(super) fn passed(&mut self, took: Duration) {
        self.now += took;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(n: u64) -> Duration {
        Duration::from_micros(n)
    }

    fn alone(pace: &mut Pace, steps: usize, took: Duration) {
        for _ in 0..steps {
            pace.passed(took);
            pace.took_alone(took);
        }
    }

    fn together(pace: &mut Pace, steps: usize, rows: usize, took: Duration) {
        for _ in 0..steps {
            pace.passed(took);
            pace.took_together(rows, took);
        }
    }

    /// Warm, with both ways measured.
    fn measured(token: Duration, step: Duration) -> Pace {
        let mut pace = Pace::new(None, 64);
        alone(&mut pace, 2 * ALONE, token);
        together(&mut pace, TOGETHER, 2, step);
        pace
    }

    #[test]
    fn what_is_faster_is_done() {
        // 8B and 0.5B on an H100: from three and from five on.
        for (token, step, least) in [(2012, 5917, 3), (387, 1842, 5)] {
            let pace = measured(us(token), us(step));
            for n in 2..=8 {
                assert_eq!(pace.is_together(n), n >= least, "{n} of {token} us");
            }
        }
    }

    #[test]
    fn what_is_not_known_is_tried() {
        let mut pace = Pace::new(None, 64);
        assert!(pace.is_together(2));
        together(&mut pace, TOGETHER - 1, 2, us(100));
        assert!(pace.is_together(2));
        together(&mut pace, 1, 2, us(100));
        assert!(!pace.is_together(2), "now the other way");
        // The first ones take long, and do not count.
        alone(&mut pace, ALONE, us(900));
        alone(&mut pace, ALONE - 1, us(40));
        assert!(!pace.is_together(8), "one is missing");
        alone(&mut pace, 1, us(40));
        assert!(!pace.is_together(2), "80 us against 100");
        assert!(pace.is_together(3));
        // Steps of more rows have a window of their own.
        assert!(pace.is_together(9));
        together(&mut pace, TOGETHER, 16, us(1000));
        assert!(!pace.is_together(9) && pace.is_together(8));
    }

    #[test]
    fn one_goes_alone_and_so_does_everybody_with_a_batch_of_one() {
        assert!(!Pace::new(None, 64).is_together(1));
        assert!(!Pace::new(None, 64).is_together(0));
        assert!(!Pace::new(None, 1).is_together(100));
        assert!(!Pace::new(Some(1), 1).is_together(100));
    }

    #[test]
    fn a_slow_step_does_not_count_and_a_slow_turn_does() {
        let mut pace = measured(us(100), us(150));
        together(&mut pace, 3, 2, us(50_000));
        assert!(pace.is_together(2));
        let mut pace = measured(us(100), us(250));
        alone(&mut pace, 1, us(50_000));
        assert!(!pace.is_together(2), "nor one alone");
        // Of each eight steps one waits for all: 800 us for eight tokens.
        let mut pace = measured(us(1), us(150));
        for _ in 0..4 {
            alone(&mut pace, 1, us(793));
            alone(&mut pace, 7, us(1));
        }
        assert!(pace.is_together(2));
    }

    #[test]
    fn what_is_not_run_is_tried_again() {
        // In turns, until 100 times the 8 steps are over; with the new times together.
        let mut pace = measured(us(100), us(250));
        assert!(!pace.is_together(2));
        alone(&mut pace, 2000, us(100));
        assert!(!pace.is_together(2));
        alone(&mut pace, 1, us(100));
        assert!(pace.is_together(2));
        together(&mut pace, TOGETHER - 1, 2, us(260));
        assert!(pace.is_together(2), "as long as it is measured");
        together(&mut pace, 1, 2, us(260));
        assert!(!pace.is_together(2), "still slower");
        alone(&mut pace, 2081, us(100));
        together(&mut pace, TOGETHER, 2, us(150));
        assert!(pace.is_together(2), "faster by now");
        // Together, until 100 times the 24 tokens are over.
        let mut steps = 0;
        while pace.is_together(2) {
            together(&mut pace, 1, 2, us(150));
            steps += 1;
        }
        assert!((1500..1700).contains(&steps), "{steps} steps of 150 us");
        alone(&mut pace, ALONE, us(50));
        assert!(!pace.is_together(2), "100 us against 150");
    }

    #[test]
    fn a_setting_is_not_questioned() {
        let mut pace = Pace::new(Some(3), 64);
        let says = |pace: &Pace| [2, 3, 64, 100].map(|n| pace.is_together(n));
        assert_eq!(says(&pace), [false, true, true, true]);
        alone(&mut pace, 100, us(1));
        together(&mut pace, 100, 3, us(1000));
        together(&mut pace, 100, 64, us(1000));
        assert_eq!(says(&pace), [false, true, true, true]);
        // From more on than go together.
        let pace = Pace::new(Some(3), 2);
        assert_eq!(says(&pace), [false, true, true, true]);
    }
}
