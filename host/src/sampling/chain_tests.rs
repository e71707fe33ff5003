//! Every sampler against a plain reference: softmax in f64, full sorts, no shortcuts.

use super::super::{sample, uniform, uniform_pair};
use super::*;
use proptest::prelude::*;

/// 40 logits without ties, somewhat peaked.
fn logits() -> Vec<f32> {
    (0..40u64).map(|i| 9.0 * uniform(41, i) - 3.0).collect()
}

fn no_history() -> History<'static> {
    History {
        prompt: &[],
        generated: &[],
        seen: &[],
        is_breaker: &|_| false,
    }
}

fn softmax(l: &[f32]) -> Vec<f64> {
    let max = l.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let w: Vec<f64> = l.iter().map(|&x| f64::from(x - max).exp()).collect();
    let total: f64 = w.iter().sum();
    w.into_iter().map(|x| x / total).collect()
}

/// Neutral parameters: everything in play, temperature 1.
fn neutral() -> SamplingParams {
    SamplingParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: None,
    }
}

/// The ids that a chain ever draws, over many draws.
fn drawn(
    params: &SamplingParams,
    chain: &Chain,
    logits: &[f32],
    history: &History<'_>,
) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..20_000)
        .map(|i| {
            let u = uniform_pair(9, i);
            sample_chain(
                params,
                chain,
                &mut ChainState::default(),
                u,
                history,
                &mut logits.to_vec(),
            )
        })
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Ids with a probability that 20,000 draws cannot miss; the draws may have others of these sets.
fn assert_in_play(drawn: &[u32], reference: &[u32], p: &[f64]) {
    assert!(
        drawn.iter().all(|id| reference.contains(id)),
        "{drawn:?} of {reference:?}"
    );
    let total: f64 = reference.iter().map(|&id| p[id as usize]).sum();
    for &id in reference {
        if p[id as usize] / total > 1e-3 {
            assert!(drawn.contains(&id), "{id} of {reference:?} never came");
        }
    }
}

#[test]
fn typical_p_keeps_what_is_nearest_the_entropy() {
    let l = logits();
    let p = softmax(&l);
    let entropy: f64 = p.iter().map(|p| -p * p.ln()).sum();
    for share in [0.2f32, 0.5, 0.9] {
        let mut order: Vec<u32> = (0..l.len() as u32).collect();
        let distance = |id: u32| (-p[id as usize].ln() - entropy).abs();
        order.sort_by(|&a, &b| distance(a).partial_cmp(&distance(b)).unwrap());
        let mut reference = Vec::new();
        let mut sum = 0.0;
        for id in order {
            reference.push(id);
            sum += p[id as usize];
            if sum >= f64::from(share) {
                break;
            }
        }
        let chain = Chain {
            typical_p: share,
            ..Chain::default()
        };
        assert_in_play(
            &drawn(&neutral(), &chain, &l, &no_history()),
            &reference,
            &p,
        );
        assert!(reference.len() < l.len());
    }
}

#[test]
fn top_n_sigma_keeps_what_is_near_the_greatest() {
    let l = logits();
    let n = l.len() as f64;
    let mean = l.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let sigma = (l
        .iter()
        .map(|&x| (f64::from(x) - mean).powi(2))
        .sum::<f64>()
        / n)
        .sqrt();
    let max = l.iter().copied().fold(f32::MIN, f32::max);
    for n in [0.3f32, 1.0, 1.7] {
        let least = f64::from(max) - f64::from(n) * sigma;
        let reference: Vec<u32> = (0..l.len() as u32)
            .filter(|&id| f64::from(l[id as usize]) >= least)
            .collect();
        let chain = Chain {
            top_n_sigma: n,
            ..Chain::default()
        };
        assert_in_play(
            &drawn(&neutral(), &chain, &l, &no_history()),
            &reference,
            &softmax(&l),
        );
        // The temperature changes the deviation as much as the logits: the set stays.
        let warm = SamplingParams {
            temperature: 1.5,
            ..neutral()
        };
        let ids = drawn(&warm, &chain, &l, &no_history());
        assert!(ids.iter().all(|id| reference.contains(id)));
    }
}

#[test]
fn xtc_leaves_the_least_likely_of_the_likely() {
    let l = logits();
    let p = softmax(&l);
    let threshold = 0.05f32;
    let mut likely: Vec<u32> = (0..l.len() as u32)
        .filter(|&id| p[id as usize] >= f64::from(threshold))
        .collect();
    likely.sort_by(|&a, &b| p[b as usize].partial_cmp(&p[a as usize]).unwrap());
    assert!(likely.len() > 2, "{p:?}");
    let excluded = &likely[..likely.len() - 1];
    let reference: Vec<u32> = (0..l.len() as u32)
        .filter(|id| !excluded.contains(id))
        .collect();
    let always = Chain {
        xtc_probability: 1.0,
        xtc_threshold: threshold,
        ..Chain::default()
    };
    assert_in_play(
        &drawn(&neutral(), &always, &l, &no_history()),
        &reference,
        &p,
    );
    // With one likely token there is nothing to exclude.
    let alone = Chain {
        xtc_threshold: 0.45,
        ..always.clone()
    };
    assert!(drawn(&neutral(), &alone, &l, &no_history()).contains(&likely[0]));
    // It acts as often as asked.
    let half = Chain {
        xtc_probability: 0.5,
        ..always
    };
    let hits = (0..4000)
        .filter(|&i| {
            let mut state = ChainState::default();
            let u = [0.0, uniform_pair(3, i)[1]];
            let only_best = SamplingParams {
                top_k: 1,
                ..neutral()
            };
            let chain = Chain {
                order: vec![Sampler::Xtc, Sampler::TopK],
                ..half.clone()
            };
            sample_chain(
                &only_best,
                &chain,
                &mut state,
                u,
                &no_history(),
                &mut logits(),
            ) != likely[0]
        })
        .count();
    assert!((1850..2150).contains(&hits), "{hits} of 4000");
}

#[test]
fn dry_lowers_what_would_go_on_with_a_repeat() {
    // 7 8 9 5 ... 7 8 9: 5 would make a repeat of four; 6 followed 8 9 once, a repeat of three.
    let prompt = [7, 8, 9, 5, 1, 8, 9, 6, 2];
    let generated = [7, 8, 9];
    let dry = Dry {
        multiplier: 0.8,
        base: 1.75,
        allowed_length: 2,
        ..Dry::default()
    };
    let chain = Chain {
        dry,
        ..Chain::default()
    };
    let is_breaker = |id| id == 3;
    let history = History {
        prompt: &prompt,
        generated: &generated,
        seen: &[],
        is_breaker: &is_breaker,
    };
    let mut set = Candidates((0..10).map(|id| (id, 1.0)).collect());
    set.dry(&chain.dry, &history);
    for (id, l) in &set.0 {
        let expected = match id {
            5 => 1.0 - 0.8 * 1.75,
            6 => 1.0 - 0.8,
            _ => 1.0,
        };
        assert!(
            (l - expected).abs() < 1e-6,
            "{id}: {l}, expected {expected}"
        );
    }
    // A breaker inside the repeat ends it: what follows counts only from there.
    let is_breaker = |id| id == 8;
    let history = History {
        prompt: &prompt,
        generated: &generated,
        seen: &[],
        is_breaker: &is_breaker,
    };
    let mut set = Candidates((0..10).map(|id| (id, 1.0)).collect());
    set.dry(&chain.dry, &history);
    assert!(set.0.iter().all(|c| c.1 == 1.0));
    // Only the last tokens count.
    let mut set = Candidates((0..10).map(|id| (id, 1.0)).collect());
    let short = Dry {
        last_n: 8,
        ..chain.dry.clone()
    };
    let history = History {
        prompt: &prompt,
        generated: &generated,
        seen: &[],
        is_breaker: &|_| false,
    };
    set.dry(&short, &history);
    assert_eq!((set.0[5].1, set.0[6].1 < 1.0), (1.0, true));
}

#[test]
fn presence_and_frequency_penalties_count_what_was_generated() {
    let generated = [4, 4, 4, 2];
    let history = History {
        prompt: &[1, 1],
        generated: &generated,
        seen: &[1, 4, 2],
        is_breaker: &|_| false,
    };
    let chain = Chain {
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        ..Chain::default()
    };
    let mut set = Candidates((0..6).map(|id| (id, 1.0)).collect());
    set.penalties(&neutral(), &chain, &history);
    let l: Vec<f32> = set.0.iter().map(|c| c.1).collect();
    assert_eq!(l, [1.0, 1.0, 0.25, 1.0, -0.25, 1.0]);
}

#[test]
fn dynamic_temperature_follows_the_entropy() {
    for (l, exponent) in [(logits(), 1.0f32), (logits(), 2.0), (vec![0.0; 40], 1.0)] {
        let p = softmax(&l);
        let entropy: f64 = p.iter().map(|p| -p * p.ln()).sum();
        let share = (entropy / 40f64.ln()).powf(f64::from(exponent));
        let t = 0.5 + (1.5 - 0.5) * share;
        let chain = Chain {
            dynatemp_range: 0.5,
            dynatemp_exponent: exponent,
            ..Chain::default()
        };
        let mut set = Candidates((0..).zip(l.iter().copied()).collect());
        set.temperature(1.0, &chain);
        for ((_, got), l) in set.0.iter().zip(&l) {
            assert!((f64::from(*got) - f64::from(*l) / t).abs() < 1e-4);
        }
    }
}

#[test]
fn mirostat_holds_the_surprise_near_tau() {
    let l: Vec<f32> = (0..2000).map(|i| -1.2 * ((i + 1) as f32).ln()).collect();
    let p = softmax(&l);
    for tau in [2.0f32, 4.0] {
        let mirostat = Mirostat { tau, eta: 0.1 };
        let chain = Chain {
            mirostat: Some(mirostat),
            ..Chain::default()
        };
        let mut state = ChainState::default();
        let mut mu = 2.0 * f64::from(tau);
        let mut surprise = 0.0;
        for i in 0..600 {
            let u = uniform_pair(5, i);
            let id = sample_chain(
                &neutral(),
                &chain,
                &mut state,
                u,
                &no_history(),
                &mut l.clone(),
            );
            // The reference: keep what is at most mu bits surprising, renormalise, observe, correct.
            let kept: Vec<f64> = p.iter().copied().take_while(|p| -p.log2() <= mu).collect();
            let kept = if kept.is_empty() { vec![p[0]] } else { kept };
            assert!((id as usize) < kept.len());
            let e = -(kept[id as usize] / kept.iter().sum::<f64>()).log2();
            mu -= 0.1 * (e - f64::from(tau));
            assert!((f64::from(state.mu.unwrap()) - mu).abs() < 1e-2);
            if i >= 100 {
                surprise += e / 500.0;
            }
        }
        assert!(
            (surprise - f64::from(tau)).abs() < 0.3,
            "{surprise} for {tau}"
        );
    }
}

#[test]
fn the_order_of_samplers_is_the_request_s() {
    // Top-p before or after the temperature keeps different sets.
    let l = logits();
    let params = SamplingParams {
        temperature: 3.0,
        top_p: 0.5,
        ..neutral()
    };
    let order = |order: &[Sampler]| Chain {
        order: order.to_vec(),
        ..Chain::default()
    };
    let hot_first = drawn(
        &params,
        &order(&[Sampler::Temperature, Sampler::TopP]),
        &l,
        &no_history(),
    );
    let cut_first = drawn(
        &params,
        &order(&[Sampler::TopP, Sampler::Temperature]),
        &l,
        &no_history(),
    );
    let reference = |l: &[f32]| {
        let p = softmax(l);
        let mut ids: Vec<u32> = (0..l.len() as u32).collect();
        ids.sort_by(|&a, &b| p[b as usize].partial_cmp(&p[a as usize]).unwrap());
        let mut sum = 0.0;
        let n = ids
            .iter()
            .position(|&id| {
                sum += p[id as usize];
                sum >= 0.5
            })
            .unwrap();
        ids.truncate(n + 1);
        ids.sort_unstable();
        ids
    };
    let hot: Vec<f32> = l.iter().map(|x| x / 3.0).collect();
    assert_eq!(hot_first, reference(&hot));
    assert_eq!(cut_first, reference(&l));
    assert!(cut_first.len() < hot_first.len());
    // What is not in the order does not happen.
    assert_eq!(
        drawn(&params, &order(&[]), &[0.0, 5.0], &no_history()),
        [0, 1]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn a_plain_chain_chooses_as_the_plain_definition_does(
        l in prop::collection::vec(prop_oneof![-30.0f32..30.0, (-8i32..8).prop_map(|x| x as f32 / 2.0)], 1..200),
        temperature in prop_oneof![Just(0.0f32), Just(1.0f32), 0.05f32..3.0],
        top_k in 0u32..220,
        top_p in prop_oneof![Just(1.0f32), 0.001f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.0f32..1.0],
        r in prop_oneof![Just(1.0f32), 0.5f32..2.0],
        seen in prop::collection::hash_set(0u32..200, 0..20),
        seed: u64,
    ) {
        let params = SamplingParams { temperature, top_k, top_p, min_p, repetition_penalty: r, seed: None };
        let seen: Vec<u32> = seen.into_iter().collect();
        let history = History { seen: &seen, ..no_history() };
        for i in 0..4 {
            let plain = sample(&params, uniform(seed, i), &seen, &mut l.clone());
            let u = uniform_pair(seed, i);
            let got = sample_chain(&params, &Chain::default(), &mut ChainState::default(), u, &history, &mut l.clone());
            prop_assert_eq!(got, plain);
        }
    }
}
