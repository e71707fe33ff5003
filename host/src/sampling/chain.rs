//! Samplers beyond the plain ones, and their order. They run on the host, on logits read back from the
//! device; the plain parameters alone are sampled on the device (see the [module's docs](super)).
//!
//! A chain is a list of [`Sampler`]s that narrow or change a set of candidates, then one draw. Masses and
//! the draw are those of the plain definition, so a chain of plain samplers in the default order makes
//! the same choice as [`sample`](super::sample).

use super::sample::{FRACTION_BITS, draw_from, fraction, mass, penalized};
use super::{MASS_BITS, MIN_TEMPERATURE, SamplingParams};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// One step of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sampler {
    /// Repetition, presence and frequency penalties.
    Penalties,
    /// Don't repeat yourself: lowers what would extend a repeat of earlier text.
    Dry,
    /// Divides the logits by the temperature, or by one between two bounds, by the entropy.
    Temperature,
    /// Keeps logits within `n` standard deviations of the greatest (Tang et al. 2024).
    TopNSigma,
    TopK,
    /// Locally typical sampling (Meister et al. 2022).
    TypicalP,
    TopP,
    MinP,
    /// Exclude top choices: now and then drops all but the least likely of the likely.
    Xtc,
}

impl Sampler {
    /// The order where a request names none.
    pub const DEFAULT_ORDER: [Sampler; 9] = [
        Self::Penalties,
        Self::Dry,
        Self::Temperature,
        Self::TopNSigma,
        Self::TopK,
        Self::TypicalP,
        Self::TopP,
        Self::MinP,
        Self::Xtc,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Penalties => "penalties",
            Self::Dry => "dry",
            Self::Temperature => "temperature",
            Self::TopNSigma => "top_n_sigma",
            Self::TopK => "top_k",
            Self::TypicalP => "typical_p",
            Self::TopP => "top_p",
            Self::MinP => "min_p",
            Self::Xtc => "xtc",
        }
    }
}

/// DRY: a token that would make the last `n` tokens a repeat of earlier ones, with `n` at least
/// `allowed_length`, loses `multiplier * base^(n - allowed_length)`. No repeat reaches over a breaker.
#[derive(Clone, Debug, PartialEq)]
pub struct Dry {
    /// 0: off.
    pub multiplier: f32,
    pub base: f32,
    pub allowed_length: u32,
    /// How many of the last tokens count; 0: all.
    pub last_n: u32,
    /// A token whose text contains one of these is a breaker.
    pub breakers: Vec<String>,
}

impl Default for Dry {
    fn default() -> Self {
        Self {
            multiplier: 0.0,
            base: 1.75,
            allowed_length: 2,
            last_n: 0,
            breakers: ["\n", ":", "\"", "*"].map(str::to_owned).to_vec(),
        }
    }
}

/// Mirostat version 2 (Basu et al. 2021): keeps the surprise of each token near `tau` bits. It takes
/// the place of everything that truncates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mirostat {
    pub tau: f32,
    pub eta: f32,
}

/// What a request asks of the samplers beyond [`SamplingParams`]. The default asks for nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    pub order: Vec<Sampler>,
    /// Taken off a token that was generated before; 0: off.
    pub presence_penalty: f32,
    /// Taken off for each time a token was generated before; 0: off.
    pub frequency_penalty: f32,
    /// 1: off.
    pub typical_p: f32,
    /// 0: off.
    pub top_n_sigma: f32,
    /// How often XTC acts; 0: never.
    pub xtc_probability: f32,
    /// What counts as likely for XTC; above 0.5 it never acts.
    pub xtc_threshold: f32,
    /// The temperature lies within this of the one asked for; 0: off.
    pub dynatemp_range: f32,
    pub dynatemp_exponent: f32,
    pub dry: Dry,
    pub mirostat: Option<Mirostat>,
}

impl Default for Chain {
    fn default() -> Self {
        Self {
            order: Sampler::DEFAULT_ORDER.to_vec(),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            typical_p: 1.0,
            top_n_sigma: 0.0,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            dynatemp_range: 0.0,
            dynatemp_exponent: 1.0,
            dry: Dry::default(),
            mirostat: None,
        }
    }
}

impl Chain {
    /// Asks for nothing that the plain definition does not do.
    pub fn is_plain(&self) -> bool {
        let off = Self {
            // What steers samplers that are off changes nothing.
            xtc_threshold: self.xtc_threshold,
            dynatemp_exponent: self.dynatemp_exponent,
            dry: Dry {
                multiplier: 0.0,
                ..self.dry.clone()
            },
            ..Self::default()
        };
        *self == off
    }
}

/// What a chain remembers from token to token.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChainState {
    /// Mirostat's bound on surprise, in bits; `2 * tau` at the start.
    mu: Option<f32>,
}

/// The sequence so far.
pub struct History<'a> {
    pub prompt: &'a [u32],
    pub generated: &'a [u32],
    /// Distinct ids of both.
    pub seen: &'a [u32],
    /// Whether a token ends what DRY may call a repeat.
    pub is_breaker: &'a dyn Fn(u32) -> bool,
}

/// Chooses a token. `u` are two uniform numbers in `[0, 1)` (see [`uniform_pair`](super::uniform_pair)): one for
/// the draw, one for XTC. `logits` are changed in place.
pub fn sample_chain(
    params: &SamplingParams,
    chain: &Chain,
    state: &mut ChainState,
    u: [f32; 2],
    history: &History<'_>,
    logits: &mut [f32],
) -> u32 {
    for l in logits.iter_mut() {
        *l = if l.is_nan() { f32::NEG_INFINITY } else { *l } + 0.0;
    }
    let greedy = params.temperature.is_nan() || params.temperature < MIN_TEMPERATURE;
    let all = logits.iter().enumerate().map(|(id, &l)| (id as u32, l));
    let mut set = Candidates(all.collect());
    for &sampler in &chain.order {
        let truncates = !matches!(
            sampler,
            Sampler::Penalties | Sampler::Dry | Sampler::Temperature
        );
        // The greatest logit survives all that truncates, XTC apart, which is not for greedy answers.
        if truncates && (greedy || chain.mirostat.is_some()) {
            continue;
        }
        match sampler {
            Sampler::Penalties => set.penalties(params, chain, history),
            Sampler::Dry => set.dry(&chain.dry, history),
            Sampler::Temperature if greedy => {}
            Sampler::Temperature => set.temperature(params.temperature, chain),
            Sampler::TopNSigma => set.top_n_sigma(chain.top_n_sigma),
            Sampler::TopK => set.top_k(params.top_k as usize),
            Sampler::TypicalP => set.typical_p(chain.typical_p),
            Sampler::TopP => set.top_p(params.top_p),
            Sampler::MinP => set.min_p(params.min_p),
            Sampler::Xtc => set.xtc(chain.xtc_probability, chain.xtc_threshold, u[1]),
        }
    }
    if greedy || set.max() == f32::NEG_INFINITY {
        return set.best();
    }
    match chain.mirostat {
        Some(mirostat) => set.mirostat(mirostat, state, u[0]),
        None => set.draw(u[0]),
    }
}

/// Ids and logits still in play. Never empty once it was not.
struct Candidates(Vec<(u32, f32)>);

impl Candidates {
    fn max(&self) -> f32 {
        self.0.iter().fold(f32::NEG_INFINITY, |m, c| m.max(c.1))
    }

    /// The greatest logit's id, the lowest on ties.
    fn best(&self) -> u32 {
        let mut best = (0, f32::NEG_INFINITY);
        for &(id, l) in &self.0 {
            if l > best.1 || (l == best.1 && id < best.0) {
                best = (id, l);
            }
        }
        best.0
    }

    /// Likeliest first, lower ids first among equals.
    fn sort(&mut self) {
        self.0
            .sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    }

    /// The mass of each candidate, in their order.
    fn masses(&self) -> Vec<u64> {
        let max = self.max();
        let of = |l: f32| mass(if l == max { 0.0 } else { l - max });
        self.0.iter().map(|c| of(c.1)).collect()
    }

    /// Probabilities, in the candidates' order.
    fn probabilities(&self) -> Vec<f64> {
        let max = f64::from(self.max());
        let weights: Vec<f64> = self
            .0
            .iter()
            .map(|c| {
                let d = f64::from(c.1) - max;
                // inf - inf
                if d.is_nan() { 1.0 } else { d.exp() }
            })
            .collect();
        let total: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / total).collect()
    }

    fn keep(&mut self, keep: &[bool]) {
        let mut flags = keep.iter();
        self.0.retain(|_| flags.next().copied().unwrap_or(false));
    }

    fn penalties(&mut self, params: &SamplingParams, chain: &Chain, history: &History<'_>) {
        let r = params.repetition_penalty;
        let (presence, frequency) = (chain.presence_penalty, chain.frequency_penalty);
        let mut at: HashMap<u32, usize> = HashMap::new();
        if r != 1.0 || presence != 0.0 || frequency != 0.0 {
            at = self.0.iter().enumerate().map(|(i, c)| (c.0, i)).collect();
        }
        if r != 1.0 {
            for id in history.seen {
                if let Some(&i) = at.get(id) {
                    self.0[i].1 = penalized(self.0[i].1, r);
                }
            }
        }
        if presence != 0.0 || frequency != 0.0 {
            let mut counts: HashMap<u32, u32> = HashMap::new();
            for &id in history.generated {
                *counts.entry(id).or_default() += 1;
            }
            for (id, count) in counts {
                if let Some(&i) = at.get(&id) {
                    self.0[i].1 -= presence + frequency * count as f32;
                }
            }
        }
    }

    fn dry(&mut self, dry: &Dry, history: &History<'_>) {
        if dry.multiplier == 0.0 {
            return;
        }
        let mut tokens: Vec<u32> = [history.prompt, history.generated].concat();
        if dry.last_n > 0 {
            let skip = tokens.len().saturating_sub(dry.last_n as usize);
            tokens.drain(..skip);
        }
        // How long a repeat each next token would go on with.
        let mut lengths: HashMap<u32, usize> = HashMap::new();
        let n = tokens.len();
        for end in 1..n {
            // tokens[end] came after tokens[..end]; how much of its end is also the text's end?
            let common = (0..end)
                .take_while(|&i| {
                    let (a, b) = (tokens[end - 1 - i], tokens[n - 1 - i]);
                    a == b && !(history.is_breaker)(a)
                })
                .count();
            if common >= dry.allowed_length.max(1) as usize && !(history.is_breaker)(tokens[end]) {
                let longest = lengths.entry(tokens[end]).or_default();
                *longest = common.max(*longest);
            }
        }
        for (id, l) in &mut self.0 {
            if let Some(&length) = lengths.get(id) {
                let over = length as f32 - dry.allowed_length as f32;
                // Past this, the power is infinite and the token out of play all the same.
                *l -= dry.multiplier * dry.base.powf(over.min(200.0)).min(1e30);
            }
        }
    }

    fn temperature(&mut self, temperature: f32, chain: &Chain) {
        let mut t = temperature;
        if chain.dynatemp_range > 0.0 && self.0.len() > 1 {
            let entropy: f64 = self
                .probabilities()
                .iter()
                .filter(|p| **p > 0.0)
                .map(|p| -p * p.ln())
                .sum();
            let share = (entropy / (self.0.len() as f64).ln()).clamp(0.0, 1.0);
            let low = (temperature - chain.dynatemp_range).max(0.0);
            let high = temperature + chain.dynatemp_range;
            let share = share.powf(f64::from(chain.dynatemp_exponent)) as f32;
            t = (low + (high - low) * share).max(MIN_TEMPERATURE);
        }
        self.0.iter_mut().for_each(|c| c.1 /= t);
    }

    fn top_n_sigma(&mut self, n: f32) {
        if n <= 0.0 {
            return;
        }
        let finite: Vec<f64> = self
            .0
            .iter()
            .map(|c| f64::from(c.1))
            .filter(|l| l.is_finite())
            .collect();
        if finite.is_empty() {
            return;
        }
        let mean = finite.iter().sum::<f64>() / finite.len() as f64;
        let variance = finite.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / finite.len() as f64;
        let least = f64::from(self.max()) - f64::from(n) * variance.sqrt();
        self.0.retain(|c| f64::from(c.1) >= least);
    }

    fn top_k(&mut self, k: usize) {
        if k == 0 || k >= self.0.len() {
            return;
        }
        self.0
            .select_nth_unstable_by(k - 1, |a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        self.0.truncate(k);
    }

    fn typical_p(&mut self, p: f32) {
        if p >= 1.0 {
            return;
        }
        self.sort();
        let probabilities = self.probabilities();
        let surprise = |p: f64| if p > 0.0 { -p.ln() } else { f64::INFINITY };
        let entropy: f64 = probabilities
            .iter()
            .filter(|p| **p > 0.0)
            .map(|&p| p * surprise(p))
            .sum();
        let mut order: Vec<usize> = (0..probabilities.len()).collect();
        let distance = |i: usize| (surprise(probabilities[i]) - entropy).abs();
        order.sort_by(|&a, &b| distance(a).total_cmp(&distance(b)));
        let mut keep = vec![false; order.len()];
        let mut sum = 0.0;
        for i in order {
            keep[i] = true;
            sum += probabilities[i];
            if sum >= f64::from(p) {
                break;
            }
        }
        self.keep(&keep);
    }

    fn top_p(&mut self, p: f32) {
        let share = u128::from(fraction(p));
        if share >= 1 << FRACTION_BITS {
            return;
        }
        self.sort();
        let masses = self.masses();
        let total: u64 = masses.iter().sum();
        let mut running = 0u64;
        let kept = masses.iter().position(|m| {
            running += m;
            u128::from(running) << FRACTION_BITS >= share * u128::from(total)
        });
        self.0.truncate(kept.map_or(self.0.len(), |i| i + 1));
    }

    fn min_p(&mut self, p: f32) {
        let least = u64::from(fraction(p)) << (MASS_BITS - FRACTION_BITS);
        let keep: Vec<bool> = self.masses().iter().map(|&m| m >= least).collect();
        self.keep(&keep);
    }

    fn xtc(&mut self, probability: f32, threshold: f32, u: f32) {
        if probability <= 0.0 || u >= probability || threshold > 0.5 {
            return;
        }
        self.sort();
        let likely = self
            .probabilities()
            .iter()
            .take_while(|p| **p >= f64::from(threshold))
            .count();
        if likely >= 2 {
            self.0.drain(..likely - 1);
        }
    }

    /// The plain definition's draw.
    fn draw(&mut self, u: f32) -> u32 {
        self.0.sort_unstable_by_key(|c| c.0);
        let masses = self.masses();
        let pairs = self.0.iter().map(|c| c.0).zip(masses);
        draw_from(u, pairs).unwrap_or_else(|| self.best())
    }

    fn mirostat(&mut self, mirostat: Mirostat, state: &mut ChainState, u: f32) -> u32 {
        let mu = state.mu.unwrap_or(2.0 * mirostat.tau);
        self.sort();
        let surprising = |p: f64| -p.log2() > f64::from(mu);
        let kept = self
            .probabilities()
            .iter()
            .take_while(|p| !surprising(**p))
            .count();
        self.0.truncate(kept.max(1));
        let id = self.draw(u);
        let at = self.0.iter().position(|c| c.0 == id).unwrap_or(0);
        let surprise = -self.probabilities()[at].log2() as f32;
        state.mu = Some(mu - mirostat.eta * (surprise - mirostat.tau));
        id
    }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
