//! Choosing a sequence's next token.

use super::super::direct;
use super::super::{Code, Failure, LogProbs};
use super::Sequence;
use crate::device::SampleRow;
use crate::error::{Error, Result};
use crate::model::Runner;
use crate::sampling::{History, sample, sample_chain, uniform, uniform_pair};

/// A token chosen for a sequence.
pub(in super::super) struct Chosen {
    pub(super) id: u32,
    /// The logits that the request asked to see, `(id, logit)`, greatest first.
    pub(super) top: Vec<(u32, f32)>,
    pub(super) logprobs: Option<Box<LogProbs>>,
    /// The grammar lets nothing follow.
    pub(super) complete: bool,
}

impl Sequence<'_> {
    /// Chooses the next token from the logits of the runner's last step; steps may begin ahead where `begin` says so. The
    /// inner error is this sequence's own.
    ///
    /// # Errors
    /// The device's failure.
    pub(in super::super) fn choose(
        &mut self,
        runner: &mut dyn Runner,
        begin: bool,
    ) -> Result<std::result::Result<Chosen, Failure>> {
        let index = self.generated();
        let request = &self.submission.request;
        let (params, seed) = (&request.sampling, self.submission.seed);
        let on_device =
            request.chain.is_plain() && request.logit_bias.is_empty() && self.constraint.is_none();
        let top_wanted = if index == 0 { request.top_logits } else { 0 };
        let read = !on_device || top_wanted > 0 || request.logprobs.is_some();
        let mut logits = if read { runner.logits(0)? } else { Vec::new() };
        let top = match top_wanted {
            0 => Vec::new(),
            n => direct::top_logits(&logits, n),
        };
        let (own, wanted) = match request.logprobs {
            Some(n) if on_device => (std::mem::take(&mut logits), Some(n)),
            Some(n) => (logits.clone(), Some(n)),
            None => (Vec::new(), None),
        };
        let mut complete = false;
        let id = if on_device {
            let row = SampleRow {
                params,
                u: uniform(seed, index as u64),
                seen: &self.seen.ids,
                ahead: match request.max_tokens.saturating_sub(index + 1) {
                    _ if !begin => 0,
                    // Each step's logits are read before the next one begins.
                    left if request.logprobs.is_some() => left.min(1),
                    left => left,
                },
            };
            let ids = runner.sample(&[row])?;
            ids.first().copied().ok_or_else(|| {
                Error::Request("the device chose no token for one row of logits".to_owned())
            })?
        } else {
            for &(id, bias) in &request.logit_bias {
                if let Some(l) = logits.get_mut(id as usize) {
                    *l += bias;
                }
            }
            let own_failure = |why: String| Failure::new(Code::Internal, format!("grammar: {why}"));
            if let Some(constraint) = &mut self.constraint
                && let Err(why) = constraint.mask(&mut logits)
            {
                return Ok(Err(own_failure(why)));
            }
            let id = if self.plain {
                sample(
                    params,
                    uniform(seed, index as u64),
                    &self.seen.ids,
                    &mut logits,
                )
            } else {
                let text = &self.shared.text;
                let breakers = &request.chain.dry.breakers;
                let is_breaker = |id: u32| {
                    let bytes = text.token_bytes(id);
                    let token = String::from_utf8_lossy(&bytes);
                    breakers.iter().any(|b| token.contains(b.as_str()))
                };
                let (prompt, generated) = self.tokens.split_at(self.prompt_tokens);
                let history = History {
                    prompt,
                    generated,
                    seen: &self.seen.ids,
                    is_breaker: &is_breaker,
                };
                sample_chain(
                    params,
                    &request.chain,
                    &mut self.chain_state,
                    uniform_pair(seed, index as u64),
                    &history,
                    &mut logits,
                )
            };
            if let Some(constraint) = &mut self.constraint
                && !self.shared.text.is_end_of_generation(id)
            {
                match constraint.take(id) {
                    Ok(done) => complete = done,
                    Err(why) => return Ok(Err(own_failure(why))),
                }
            }
            id
        };
        let logprobs = wanted.map(|n| {
            let (chosen, top) = direct::log_probabilities(&own, id, n);
            Box::new(LogProbs { chosen, top })
        });
        Ok(Ok(Chosen {
            id,
            top,
            logprobs,
            complete,
        }))
    }
}
