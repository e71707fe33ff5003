//! One sequence on a runner, driven by hand: for commands and checks that look at logits.

use super::prefix::step_end;
use crate::device::{Batch, HandOff, OpTiming, SampleRow, Span};
use crate::error::{Error, Result};
use crate::model::{MAX_OUTPUTS, Runner};
use crate::sampling::SamplingParams;

/// A runner whose whole cache belongs to one sequence.
pub struct Direct {
    runner: Box<dyn Runner>,
    blocks: Vec<u32>,
    ring: Vec<u32>,
    /// Tokens in the cache.
    past: usize,
    /// Tokens that the sequence is to come to, as far as is known.
    horizon: usize,
    /// Steps may have begun ahead.
    began: bool,
}

impl Direct {
    pub fn new(runner: Box<dyn Runner>) -> Self {
        let blocks = (0..runner.cache_blocks() as u32).collect();
        let ring = runner.ring().map_or(0, |ring| ring.len);
        Self {
            runner,
            blocks,
            ring: (0..ring as u32).collect(),
            past: 0,
            horizon: 0,
            began: false,
        }
    }

    pub fn runner(&self) -> &dyn Runner {
        &*self.runner
    }

    /// For steps that are not this sequence's, which must be [reset](Direct::reset) after them.
    pub fn runner_mut(&mut self) -> &mut dyn Runner {
        &mut *self.runner
    }

    /// As [`Runner::profile`].
    ///
    /// # Errors
    /// The device's failure.
    pub fn profile(&mut self) -> Result<Vec<OpTiming>> {
        self.runner.profile()
    }

    /// As [`Runner::hand_offs`].
    ///
    /// # Errors
    /// The device's failure.
    pub fn hand_offs(&mut self) -> Result<Vec<HandOff>> {
        self.runner.hand_offs()
    }

    /// Tokens in the cache.
    pub fn past(&self) -> usize {
        self.past
    }

    /// Starts a new sequence; the cache's contents are forgotten.
    pub fn reset(&mut self) {
        self.past = 0;
        self.horizon = 0;
        self.began = false;
    }

    /// Says that the sequence will come to so many tokens: see [`Span::horizon`].
    pub fn expect(&mut self, tokens: usize) {
        self.horizon = tokens;
    }

    /// Says how many tokens there are in all, before the first chunk of them costs any work.
    fn check(&self, tokens: &[u32]) -> Result<()> {
        let (end, context) = (self.past + tokens.len(), self.runner.info().context);
        if end > context {
            return Err(Error::Request(format!(
                "{end} tokens do not fit in the context of {context}; use a larger --ctx-size"
            )));
        }
        Ok(())
    }

    fn step(&mut self, tokens: &[u32], outputs: Vec<usize>) -> Result<()> {
        let span = Span {
            start: 0,
            len: tokens.len(),
            past: self.past,
            blocks: self.blocks.clone(),
            ring: self.ring.clone(),
            horizon: self.horizon,
        };
        self.runner.forward(&Batch {
            tokens: tokens.to_vec(),
            spans: vec![span],
            outputs,
            goes_on: std::mem::take(&mut self.began),
        })?;
        self.past += tokens.len();
        Ok(())
    }

    /// Appends tokens, in as few steps as may be; the logits of the last one can then be read or sampled from.
    ///
    /// # Errors
    /// As [`Runner::forward`].
    pub fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        self.feed_in_steps(tokens, |position, step_rows| position + step_rows)
    }

    /// As [`Direct::feed`], in the steps in which the engine does a prompt, so that the same device computes the
    /// same logits.
    ///
    /// # Errors
    /// As [`Runner::forward`].
    pub fn feed_prompt(&mut self, tokens: &[u32]) -> Result<()> {
        self.feed_in_steps(tokens, step_end)
    }

    /// `end` says where the step ends that begins at a position, given the rows of one.
    fn feed_in_steps(&mut self, tokens: &[u32], end: fn(usize, usize) -> usize) -> Result<()> {
        self.check(tokens)?;
        self.horizon = self.horizon.max(self.past + tokens.len());
        let mut left = tokens;
        while !left.is_empty() {
            let len = end(self.past, self.runner.step_rows()) - self.past;
            let (chunk, rest) = left.split_at(len.min(left.len()));
            let outputs = if rest.is_empty() {
                vec![chunk.len() - 1]
            } else {
                Vec::new()
            };
            self.step(chunk, outputs)?;
            left = rest;
        }
        Ok(())
    }

    /// Appends tokens and hands over the logits of each, in order.
    ///
    /// # Errors
    /// As [`Runner::forward`].
    pub fn feed_each(&mut self, tokens: &[u32], mut each: impl FnMut(Vec<f32>)) -> Result<()> {
        self.check(tokens)?;
        self.horizon = self.horizon.max(self.past + tokens.len());
        for chunk in tokens.chunks(MAX_OUTPUTS) {
            self.step(chunk, (0..chunk.len()).collect())?;
            for output in 0..chunk.len() {
                each(self.runner.logits(output)?);
            }
        }
        Ok(())
    }

    /// The last token's logits, `vocabulary` long.
    ///
    /// # Errors
    /// The device's failure.
    pub fn logits(&mut self) -> Result<Vec<f32>> {
        self.runner.logits(0)
    }

    /// The likeliest next token, chosen where the engine's tokens are chosen.
    ///
    /// # Errors
    /// The device's failure.
    pub fn sample_greedy(&mut self) -> Result<u32> {
        self.sample_ahead(&SamplingParams::greedy(), 0)
    }

    /// As [`Direct::sample_greedy`], for a token that will be fed next, as will be those that follow from it for `steps` steps:
    /// the device need not wait for that. The logits are not to be read after it.
    ///
    /// # Errors
    /// The device's failure.
    pub fn sample_greedy_ahead(&mut self, steps: usize) -> Result<u32> {
        self.sample_ahead(&SamplingParams::greedy(), steps)
    }

    /// As [`Direct::sample_greedy_ahead`], for any parameters without a repetition penalty: which tokens there were is not kept here. The
    /// seed, if there is none, is 0, and a token's index its place in the sequence.
    ///
    /// # Errors
    /// A repetition penalty; the device's failure.
    pub fn sample_ahead(&mut self, params: &SamplingParams, steps: usize) -> Result<u32> {
        if params.repetition_penalty != 1.0 {
            return Err(Error::Request(format!(
                "a repetition penalty of {} for a sequence driven by hand, whose tokens nobody keeps; found in `SamplingParams`, expected 1",
                params.repetition_penalty
            )));
        }
        self.began = steps > 0;
        let ids = self.runner.sample(&[SampleRow {
            params,
            seed: params.seed.unwrap_or(0),
            index: self.past as u64,
            seen: &[],
            ahead: steps,
        }])?;
        ids.first().copied().ok_or_else(|| {
            Error::Request("the device chose no token for one row of logits".to_owned())
        })
    }
}

/// The `n` greatest logits as `(id, logit)`, greatest first, the lower id first among equals.
pub fn top_logits(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let n = n.min(all.len());
    if n < all.len() && n > 0 {
        all.select_nth_unstable_by(n - 1, order);
    }
    all.truncate(n);
    all.sort_by(order);
    all
}

/// `ln(sum(exp(logits)))`, computed in f64.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return f64::from(max);
    }
    let max = f64::from(max);
    max + logits
        .iter()
        .map(|&l| (f64::from(l) - max).exp())
        .sum::<f64>()
        .ln()
}

/// `ln softmax(logits)` at `id`, and at the `n` likeliest tokens, likeliest first.
pub fn log_probabilities(logits: &[f32], id: u32, n: usize) -> (f32, Vec<(u32, f32)>) {
    let norm = log_sum_exp(logits);
    let of = |l: f32| (f64::from(l) - norm) as f32;
    let chosen = logits
        .get(id as usize)
        .copied()
        .unwrap_or(f32::NEG_INFINITY);
    let top = top_logits(logits, n);
    let top = top.into_iter().map(|(id, l)| (id, of(l))).collect();
    (of(chosen), top)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_a_softmax() {
        let logits: Vec<f32> = (0..50).map(|i| ((i * 37) % 50) as f32 / 7.0).collect();
        let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let (chosen, top) = log_probabilities(&logits, 7, 5);
        assert!((f64::from(chosen) - (f64::from(logits[7]).exp() / total).ln()).abs() < 1e-5);
        assert_eq!(top.len(), 5);
        assert!(top.is_sorted_by(|a, b| a.1 >= b.1));
        for (id, l) in top {
            let exact = (f64::from(logits[id as usize]).exp() / total).ln();
            assert!((f64::from(l) - exact).abs() < 1e-5);
        }
    }

    #[test]
    fn top_logits_are_ordered_and_break_ties_by_id() {
        let logits = [1.0, 3.0, f32::NEG_INFINITY, 3.0, 2.0];
        assert_eq!(top_logits(&logits, 3), [(1, 3.0), (3, 3.0), (4, 2.0)]);
        assert_eq!(top_logits(&logits, 0), []);
        assert_eq!(top_logits(&logits, 9).len(), 5);
    }

    #[test]
    fn log_sum_exp_of_large_logits_does_not_overflow() {
        let l = log_sum_exp(&[1000.0, 1000.0]);
        assert!((l - (1000.0 + 2f64.ln())).abs() < 1e-9);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY; 3]), f64::NEG_INFINITY);
    }
}
