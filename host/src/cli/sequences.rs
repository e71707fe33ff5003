//! Several sequences that decode together, for `kigo bench --sequences`: a token of each in a step, as the worker has them.

use crate::device::{BLOCK_TOKENS, Batch, SampleRow, Span};
use crate::error::{Error, Result};
use crate::model::{MAX_OUTPUTS, Runner};
use crate::sampling::SamplingParams;
use std::time::Instant;

/// Blocks of the cache that a sequence of so many tokens takes.
fn blocks_of(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

/// Tokens that a cache has room for when it has room for `sequences` of so many.
pub(super) fn cache_tokens(sequences: usize, tokens: usize) -> usize {
    sequences * blocks_of(tokens) * BLOCK_TOKENS
}

/// Sequences on a runner, each with blocks of its own.
pub(super) struct Sequences<'r> {
    runner: &'r mut dyn Runner,
    blocks: Vec<Vec<u32>>,
    rings: Vec<Vec<u32>>,
    /// The last token of each.
    tokens: Vec<u32>,
    /// Tokens of each in the cache.
    past: usize,
    horizon: usize,
}

impl<'r> Sequences<'r> {
    /// `count` sequences of up to `tokens` tokens, the last token of each being `first`'s.
    ///
    /// # Errors
    /// More than a step takes, or more than there is room for in the cache.
    pub fn new(
        runner: &'r mut dyn Runner,
        count: usize,
        tokens: usize,
        first: Vec<u32>,
    ) -> Result<Self> {
        let each = blocks_of(tokens);
        let ring = runner.ring();
        let (rows, ringed) = (ring.map_or(0, |r| r.len), ring.map_or(0, |r| r.blocks));
        let fits = count * each <= runner.cache_blocks() && count * rows <= ringed;
        if count > MAX_OUTPUTS || !fits {
            return Err(Error::Request(format!(
                "--sequences {count}: a step takes {MAX_OUTPUTS} at most, and the cache has room for {} of {tokens} tokens",
                runner.cache_blocks() / each.max(1)
            )));
        }
        let part = |i: usize, len: usize| (i * len..(i + 1) * len).map(|b| b as u32).collect();
        Ok(Self {
            runner,
            blocks: (0..count).map(|i| part(i, each)).collect(),
            rings: (0..count).map(|i| part(i, rows)).collect(),
            tokens: first,
            past: 0,
            horizon: tokens,
        })
    }

    fn span(&self, i: usize, start: usize, len: usize, past: usize) -> Span {
        Span {
            start,
            len,
            past,
            blocks: self.blocks[i].clone(),
            ring: self.rings[i].clone(),
            horizon: self.horizon,
        }
    }

    /// Fills the cache of each with `prompt`.
    pub fn feed(&mut self, prompt: &[u32]) -> Result<()> {
        let rows = self.runner.step_rows();
        for i in 0..self.blocks.len() {
            for (n, chunk) in prompt.chunks(rows).enumerate() {
                let batch = Batch {
                    tokens: chunk.to_vec(),
                    spans: vec![self.span(i, 0, chunk.len(), n * rows)],
                    outputs: Vec::new(),
                    ..Batch::default()
                };
                self.runner.forward(&batch)?;
            }
        }
        self.past = prompt.len();
        Ok(())
    }

    /// A step: the likeliest next token of each.
    fn step(&mut self) -> Result<()> {
        let spans = (0..self.tokens.len()).map(|i| self.span(i, i, 1, self.past));
        let batch = Batch {
            tokens: self.tokens.clone(),
            spans: spans.collect(),
            outputs: (0..self.tokens.len()).collect(),
            ..Batch::default()
        };
        self.runner.forward(&batch)?;
        let params = SamplingParams::greedy();
        let row = SampleRow {
            params: &params,
            seed: 0,
            index: 0,
            seen: &[],
            ahead: 0,
        };
        self.tokens = self.runner.sample(&vec![row; self.tokens.len()])?;
        self.past += 1;
        Ok(())
    }

    /// Tokens a second, all together, of `steps` steps.
    pub fn measure(&mut self, steps: usize) -> Result<f64> {
        // The first waits for what was queued before.
        self.step()?;
        let started = Instant::now();
        for _ in 0..steps {
            self.step()?;
        }
        let tokens = steps * self.tokens.len();
        Ok(tokens as f64 / started.elapsed().as_secs_f64())
    }
}
