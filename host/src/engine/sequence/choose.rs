//! Choosing the next tokens of the sequences that were in a step.

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

/// Chooses the next token of each of `sequences`, from the first rows of the runner's logits in this order: first those of
/// sequences that are [chosen for on the device](Sequence::chooses_on_device), all in one call, then those of the others.
/// Steps of a single sequence may begin ahead where `begin` says so. The inner errors are the sequences' own.
///
/// # Errors
/// The device's failure.
pub(in super::super) fn choose(
    runner: &mut dyn Runner,
    sequences: &mut [&mut Sequence<'_>],
    begin: bool,
) -> Result<Vec<std::result::Result<Chosen, Failure>>> {
    let on_device = sequences
        .iter()
        .take_while(|sequence| sequence.chooses_on_device())
        .count();
    let (on_device, on_host) = sequences.split_at_mut(on_device);
    // Before other steps begin behind this one, and nobody can read them again.
    let mut reported = Vec::with_capacity(on_device.len());
    for (i, sequence) in on_device.iter().enumerate() {
        reported.push(match sequence.reports_logits() {
            true => runner.logits(i)?,
            false => Vec::new(),
        });
    }
    let rows: Vec<SampleRow<'_>> = on_device.iter().map(|s| s.sample_row(begin)).collect();
    let ids = match rows.is_empty() {
        true => Vec::new(),
        false => runner.sample(&rows)?,
    };
    if ids.len() != rows.len() {
        let (found, wanted) = (ids.len(), rows.len());
        return Err(Error::Request(format!(
            "the device chose {found} tokens for {wanted} rows of logits"
        )));
    }
    drop(rows);
    let mut chosen: Vec<_> = on_device
        .iter()
        .zip(ids)
        .zip(&reported)
        .map(|((sequence, id), logits)| Ok(sequence.report(id, logits)))
        .collect();
    for (i, sequence) in on_host.iter_mut().enumerate() {
        let logits = runner.logits(on_device.len() + i)?;
        chosen.push(sequence.choose_from(logits));
    }
    Ok(chosen)
}

impl Sequence<'_> {
    /// Whether the device can choose its tokens.
    pub(in super::super) fn chooses_on_device(&self) -> bool {
        let request = &self.submission.request;
        request.chain.is_plain() && request.logit_bias.is_empty() && self.constraint.is_none()
    }

    /// How many of the greatest logits are to be reported with the next token.
    fn top_wanted(&self) -> usize {
        match self.generated() {
            0 => self.submission.request.top_logits,
            _ => 0,
        }
    }

    fn reports_logits(&self) -> bool {
        self.top_wanted() > 0 || self.submission.request.logprobs.is_some()
    }

    /// How the device is to choose the next token.
    fn sample_row(&self, begin: bool) -> SampleRow<'_> {
        let index = self.generated();
        let request = &self.submission.request;
        SampleRow {
            params: &request.sampling,
            seed: self.submission.seed,
            index: index as u64,
            seen: &self.seen.ids,
            ahead: match request.max_tokens.saturating_sub(index + 1) {
                _ if !begin => 0,
                // Each step's logits are read before the next one begins.
                left if request.logprobs.is_some() => left.min(1),
                left => left,
            },
        }
    }

    /// The chosen token `id` with what is to be reported of the model's logits.
    fn report(&self, id: u32, logits: &[f32]) -> Chosen {
        let top = match self.top_wanted() {
            0 => Vec::new(),
            n => direct::top_logits(logits, n),
        };
        let logprobs = self.submission.request.logprobs.map(|n| {
            let (chosen, top) = direct::log_probabilities(logits, id, n);
            Box::new(LogProbs { chosen, top })
        });
        Chosen {
            id,
            top,
            logprobs,
            complete: false,
        }
    }

    /// Chooses the next token on the host.
    fn choose_from(&mut self, mut logits: Vec<f32>) -> std::result::Result<Chosen, Failure> {
        let own = match self.reports_logits() {
            true => logits.clone(),
            false => Vec::new(),
        };
        let index = self.generated();
        let request = &self.submission.request;
        let (params, seed) = (&request.sampling, self.submission.seed);
        for &(id, bias) in &request.logit_bias {
            if let Some(l) = logits.get_mut(id as usize) {
                *l += bias;
            }
        }
        let own_failure = |why: String| Failure::new(Code::Internal, format!("grammar: {why}"));
        if let Some(constraint) = &mut self.constraint {
            constraint.mask(&mut logits).map_err(own_failure)?;
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
        let mut complete = false;
        if let Some(constraint) = &mut self.constraint
            && !self.shared.text.is_end_of_generation(id)
        {
            complete = constraint.take(id).map_err(own_failure)?;
        }
        Ok(Chosen {
            complete,
            ..self.report(id, &own)
        })
    }
}
