//! The choice itself. The steps' numbers are those of the [module's docs](super).

use super::SamplingParams;

/// Temperatures below this count as 0: the division would push ordinary logits out of f32's range.
pub const MIN_TEMPERATURE: f32 = 1e-5;

/// The best token's mass is `2^MASS_BITS`. Sums stay below `2^64` for vocabularies up to `2^23`.
pub const MASS_BITS: u32 = 40;

/// `round(exp(d) * 2^40)`, half to even, for `d <= 0`: the mass of a token whose logit is `d` away
/// from the greatest. 0 below -28.5; NaN counts as `-inf`, anything above 0 as 0.
///
/// `exp` is Cody-Waite reduction and a polynomial, written with correctly rounded operations and
/// explicit fused multiply-adds only: a compiler has nothing to contract, so every IEEE 754 machine
/// gives the same integer. Relative error of `exp`: below `2^-22`.
#[must_use]
pub fn mass(d: f32) -> u64 {
    // exp(-28.5) * 2^40 is 0.46: rounds to 0.
    if d.is_nan() || d <= -28.5 {
        return 0;
    }
    let d = d.min(0.0);
    let n = (d * std::f32::consts::LOG2_E).round_ties_even();
    // ln 2 in two parts; the first has 9 significant bits, so that n times it is exact.
    let r = n.mul_add(-0.693_359_4, d);
    let r = n.mul_add(2.121_944_4e-4, r);
    // Taylor coefficients suffice: |r| <= 0.347, the first one left out is r^8/40320 < 5.3e-9.
    let p = r.mul_add(1.0 / 5040.0, 1.0 / 720.0);
    let p = r.mul_add(p, 1.0 / 120.0);
    let p = r.mul_add(p, 1.0 / 24.0);
    let p = r.mul_add(p, 1.0 / 6.0);
    let p = r.mul_add(p, 0.5);
    let p = r.mul_add(p, 1.0);
    let p = r.mul_add(p, 1.0);
    // 2^(n + 40), -41 <= n <= 0: a normal number, so the product is exact.
    let scale = f32::from_bits(((n as i32 + MASS_BITS as i32 + 127) as u32) << 23);
    (p * scale).round_ties_even() as u64
}

/// The greatest logit's id, the lowest on ties; NaN counts as `-inf`. 0 for no logits at all.
#[must_use]
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &l) in logits.iter().enumerate() {
        if l > best.1 {
            best = (id as u32, l);
        }
    }
    best.0
}

/// Chooses a token, after the definition in the [module's docs](super).
///
/// `u` in `[0, 1)` decides the draw ([`uniform`](super::uniform)); `seen` are the ids of the prompt and of
/// what was generated, in any order, repeated or not; `logits` (V of them) are changed in place.
/// Parameters out of range and any logits are survived: the result is always below V (0 if V is 0).
#[must_use]
pub fn sample(params: &SamplingParams, u: f32, seen: &[u32], logits: &mut [f32]) -> u32 {
    for l in logits.iter_mut() {
        // Adding +0.0 turns -0.0 into +0.0 and changes nothing else.
        *l = if l.is_nan() { f32::NEG_INFINITY } else { *l } + 0.0;
    }
    penalize(params.repetition_penalty, seen, logits);
    let best = argmax(logits);
    let temperature = params.temperature;
    if temperature.is_nan() || temperature < MIN_TEMPERATURE || logits.is_empty() {
        return best;
    }
    for l in logits.iter_mut() {
        *l /= temperature;
    }
    let l_max = logits[best as usize];
    if l_max == f32::NEG_INFINITY {
        return best;
    }

    let mut kept = top_k(params.top_k as usize, logits, l_max);
    top_p(params.top_p, &mut kept);
    let min_mass = u64::from(fraction(params.min_p)) << (MASS_BITS - FRACTION_BITS);
    kept.retain(|c| c.mass >= min_mass);
    draw(u, &kept).unwrap_or(best)
}

/// Step 1.
fn penalize(penalty: f32, seen: &[u32], logits: &mut [f32]) {
    if penalty == 1.0 {
        return;
    }
    let mut done = vec![0u64; logits.len().div_ceil(64)];
    for &id in seen {
        let Some(l) = logits.get_mut(id as usize) else {
            continue;
        };
        let (word, bit) = (id as usize / 64, 1u64 << (id % 64));
        if done[word] & bit != 0 {
            continue;
        }
        done[word] |= bit;
        *l = penalized(*l, penalty);
    }
}

/// A seen token's logit after step 1.
pub(super) fn penalized(l: f32, penalty: f32) -> f32 {
    let penalized = if l > 0.0 { l / penalty } else { l * penalty };
    // 0 * inf, for a penalty out of range.
    if penalized.is_nan() {
        f32::NEG_INFINITY
    } else {
        penalized + 0.0
    }
}

/// A token in play. `rank` is greater for a better one and never equal.
#[derive(Clone, Copy)]
struct Candidate {
    rank: u64,
    mass: u64,
}

impl Candidate {
    fn id(self) -> u32 {
        !(self.rank as u32)
    }
}

/// Orders by logit ascending, then id descending: the reverse of the rank order, so greater is better.
fn rank(l: f32, id: u32) -> u64 {
    let bits = l.to_bits();
    // Flips f32's sign-magnitude into an unsigned order.
    let ordered = bits
        ^ if bits >> 31 == 1 {
            u32::MAX
        } else {
            0x8000_0000
        };
    u64::from(ordered) << 32 | u64::from(!id)
}

/// Steps 4 and 5: the candidates in ascending order of ids, those without mass left out.
fn top_k(k: usize, logits: &[f32], l_max: f32) -> Vec<Candidate> {
    let with_mass = |&(rank, l): &(u64, f32)| {
        // inf - inf would be NaN.
        let mass = mass(if l == l_max { 0.0 } else { l - l_max });
        (mass > 0).then_some(Candidate { rank, mass })
    };
    let ranked = logits
        .iter()
        .enumerate()
        .map(|(id, &l)| (rank(l, id as u32), l));
    if k == 0 || k >= logits.len() {
        return ranked.filter_map(|c| with_mass(&c)).collect();
    }
    let mut ranks: Vec<u64> = ranked.clone().map(|(rank, _)| rank).collect();
    let n = ranks.len();
    let (_, &mut worst, _) = ranks.select_nth_unstable(n - k);
    ranked
        .filter(|&(rank, _)| rank >= worst)
        .filter_map(|c| with_mass(&c))
        .collect()
}

/// Step 6. Bisects by rank, so that a large vocabulary is never sorted.
fn top_p(p: f32, kept: &mut Vec<Candidate>) {
    let p = fraction(p);
    if p >= 1 << FRACTION_BITS || kept.is_empty() {
        return;
    }
    let total: u64 = kept.iter().map(|c| c.mass).sum();
    let wanted = u128::from(p) * u128::from(total);
    let enough = |mass: u64| u128::from(mass) << FRACTION_BITS >= wanted;

    let mut pool = kept.clone();
    let mut pool = pool.as_mut_slice();
    let mut above = 0u64;
    // The worst token to keep is in `pool`; everything better than the pool has the mass `above`.
    while pool.len() > 1 {
        let half = pool.len() / 2;
        pool.select_nth_unstable_by(half, |a, b| b.rank.cmp(&a.rank));
        let (better, worse) = pool.split_at_mut(half);
        let mass = above + better.iter().map(|c| c.mass).sum::<u64>();
        pool = if enough(mass) {
            better
        } else {
            above = mass;
            worse
        };
    }
    let worst = pool[0].rank;
    kept.retain(|c| c.rank >= worst);
}

/// Step 8; `kept` is in ascending order of ids.
fn draw(u: f32, kept: &[Candidate]) -> Option<u32> {
    draw_from(u, kept.iter().map(|c| (c.id(), c.mass)))
}

/// Step 8 for `(id, mass)` in ascending order of ids.
pub(super) fn draw_from(u: f32, kept: impl Iterator<Item = (u32, u64)> + Clone) -> Option<u32> {
    let total: u64 = kept.clone().map(|(_, mass)| mass).sum();
    let u = fraction(u).min((1 << FRACTION_BITS) - 1);
    let target = ((u128::from(u) * u128::from(total)) >> FRACTION_BITS) as u64;
    let mut running = 0;
    let mut kept = kept;
    kept.find(|&(_, mass)| {
        running += mass;
        running > target
    })
    .map(|(id, _)| id)
}

pub(super) const FRACTION_BITS: u32 = 24;

/// `round(x * 2^24)` for `x` in `[0, 1]`; what is outside, or NaN, goes to the nearer end (NaN to 0).
pub fn fraction(x: f32) -> u32 {
    (x.clamp(0.0, 1.0) * (1 << FRACTION_BITS) as f32).round_ties_even() as u32
}

#[cfg(test)]
mod tests {
    use super::super::uniform;
    use super::*;
    use proptest::prelude::*;

    fn params(temperature: f32, top_k: u32, top_p: f32, min_p: f32, r: f32) -> SamplingParams {
        SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty: r,
            seed: None,
        }
    }

    #[test]
    fn mass_is_exp() {
        assert_eq!(mass(0.0), 1 << 40);
        assert_eq!(mass(1.0), 1 << 40);
        assert_eq!(mass(f32::NEG_INFINITY), 0);
        assert_eq!(mass(f32::NAN), 0);
        let mut last = u64::MAX;
        for i in 0..300_000 {
            let d = -(i as f32) * 1e-4;
            let exact = f64::from(d).exp() * (1u64 << 40) as f64;
            let m = mass(d);
            let error = (m as f64 - exact).abs();
            assert!(
                error <= 0.5 + exact * 2.4e-7,
                "d {d} mass {m} exact {exact}"
            );
            assert!(m <= last || m - last <= (exact * 1.2e-7) as u64 + 1);
            last = m;
        }
        // Pinned: a kernel is compared with these.
        assert_eq!(mass(-1.0), 404_487_733_248);
        assert_eq!(mass(-20.0), 2266);
    }

    #[test]
    fn greedy_takes_the_lowest_id_on_ties() {
        let p = params(0.0, 0, 1.0, 0.0, 1.0);
        assert_eq!(sample(&p, 0.9, &[], &mut [1.0, 3.0, 3.0, 2.0]), 1);
        assert_eq!(sample(&p, 0.9, &[], &mut [-0.0, 0.0]), 0);
        assert_eq!(sample(&p, 0.9, &[], &mut [f32::NAN, -5.0, f32::NAN]), 1);
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY]), 0);
    }

    #[test]
    fn the_penalty_counts_each_id_once() {
        let p = params(0.0, 0, 1.0, 0.0, 2.0);
        let mut l = [4.0, 3.0, -1.0, f32::NEG_INFINITY];
        assert_eq!(sample(&p, 0.0, &[0, 0, 2, 2, 0, 3, 99], &mut l), 1);
        assert_eq!(l, [2.0, 3.0, -2.0, f32::NEG_INFINITY]);
    }

    #[test]
    fn hostile_input_never_panics() {
        let values = [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            f32::MIN,
            0.0,
            -0.0,
            f32::MIN_POSITIVE,
            -1.0,
            1.0,
        ];
        for &a in &values {
            for &b in &values {
                for &t in &values {
                    for &q in &values {
                        let id = sample(&params(t, 1, q, q, q), q, &[0, 7], &mut [a, b, a]);
                        assert!(id < 3);
                        assert!(sample(&params(t, 0, q, q, 1.0), b, &[], &mut [a, b, a]) < 3);
                    }
                }
            }
        }
        assert_eq!(sample(&SamplingParams::default(), 0.5, &[1], &mut []), 0);
        let mut none = [f32::NEG_INFINITY; 4];
        assert_eq!(sample(&SamplingParams::default(), 0.99, &[], &mut none), 0);
    }

    #[test]
    fn infinite_logits_share_the_draw() {
        let p = params(1.0, 0, 1.0, 0.0, 1.0);
        let l = [1.0, f32::INFINITY, 2.0, f32::INFINITY];
        assert_eq!(sample(&p, 0.0, &[], &mut l.clone()), 1);
        assert_eq!(sample(&p, 0.75, &[], &mut l.clone()), 3);
    }

    /// The definition, step by step, with sorts and without any shortcut. Returns what stays in
    /// play, `(id, mass)` in ascending order of ids.
    fn reference_kept(p: &SamplingParams, seen: &[u32], logits: &[f32]) -> Vec<(usize, u64)> {
        let mut l: Vec<f32> = logits.to_vec();
        for (id, x) in l.iter_mut().enumerate() {
            if seen.contains(&(id as u32)) {
                *x = if *x > 0.0 {
                    *x / p.repetition_penalty
                } else {
                    *x * p.repetition_penalty
                };
            }
            *x /= p.temperature;
        }
        let mut order: Vec<usize> = (0..l.len()).collect();
        order.sort_by(|&a, &b| l[b].partial_cmp(&l[a]).unwrap().then(a.cmp(&b)));
        if p.top_k > 0 {
            order.truncate(p.top_k as usize);
        }
        let l_max = l[order[0]];
        let masses: Vec<u64> = order.iter().map(|&i| mass(l[i] - l_max)).collect();
        let total: u64 = masses.iter().sum();
        let share = (f64::from(p.top_p) * 16_777_216.0).round_ties_even() as u128;
        let mut cut = order.len();
        if share < 1 << 24 {
            let mut running = 0u64;
            for (i, m) in masses.iter().enumerate() {
                running += m;
                if u128::from(running) * (1 << 24) >= share * u128::from(total) {
                    cut = i + 1;
                    break;
                }
            }
        }
        let least = (f64::from(p.min_p) * 16_777_216.0).round_ties_even() as u128;
        let mut kept: Vec<(usize, u64)> = order[..cut]
            .iter()
            .copied()
            .zip(masses)
            .filter(|&(_, m)| u128::from(m) << 24 >= least << 40)
            .collect();
        kept.sort_unstable();
        kept
    }

    fn reference(p: &SamplingParams, u: f32, seen: &[u32], logits: &[f32]) -> u32 {
        let kept = reference_kept(p, seen, logits);
        let total: u64 = kept.iter().map(|k| k.1).sum();
        let target = ((f64::from(u) * 16_777_216.0) as u128 * u128::from(total)) >> 24;
        let mut running = 0u64;
        for (id, m) in kept {
            running += m;
            if u128::from(running) > target {
                return id as u32;
            }
        }
        unreachable!("u is below 1")
    }

    /// Logits with many exact ties among them.
    fn logits() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(
            prop_oneof![-30.0f32..30.0, (-8i32..8).prop_map(|x| x as f32 / 2.0)],
            1..300,
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn agrees_with_the_reference(
            l in logits(),
            temperature in prop_oneof![Just(1.0f32), 0.05f32..3.0],
            k in 0u32..320,
            top_p in prop_oneof![Just(1.0f32), 0.001f32..1.0, Just(0.5f32)],
            min_p in prop_oneof![Just(0.0f32), 0.0f32..1.0, Just(1.0f32)],
            r in prop_oneof![Just(1.0f32), 0.5f32..2.0],
            seen in prop::collection::vec(0u32..400, 0..20),
            seed: u64,
        ) {
            let p = params(temperature, k, top_p, min_p, r);
            for i in 0..8 {
                let u = uniform(seed, i);
                let got = sample(&p, u, &seen, &mut l.clone());
                prop_assert_eq!(got, reference(&p, u, &seen, &l));
            }
            let p = params(0.0, k, top_p, min_p, r);
            let greedy = sample(&p, 0.5, &seen, &mut l.clone());
            let one = SamplingParams { temperature: 1.0, top_k: 1, ..p };
            prop_assert_eq!(greedy, reference(&one, 0.0, &seen, &l));
        }
    }

    /// Drawn frequencies against the probabilities of the kept tokens, by a chi-square test.
    #[test]
    fn frequencies_follow_the_probabilities() {
        let l: Vec<f32> = (0..50u64).map(|i| 4.0 * uniform(99, i) - 2.0).collect();
        for p in [
            params(1.0, 0, 1.0, 0.0, 1.0),
            params(0.7, 20, 0.9, 0.0, 1.0),
            params(1.3, 0, 1.0, 0.2, 1.2),
        ] {
            let seen = [1, 5, 9];
            let kept = reference_kept(&p, &seen, &l);
            let total: u64 = kept.iter().map(|k| k.1).sum();
            let n = 50_000u64;
            let mut counts = vec![0u32; l.len()];
            for index in 0..n {
                counts[sample(&p, uniform(7, index), &seen, &mut l.clone()) as usize] += 1;
            }
            let mut chi2 = 0.0;
            for &(id, m) in &kept {
                let expected = n as f64 * m as f64 / total as f64;
                chi2 += (f64::from(counts[id]) - expected).powi(2) / expected;
            }
            let in_play: u32 = kept.iter().map(|k| counts[k.0]).sum();
            assert_eq!(u64::from(in_play), n, "a token out of play was drawn");
            let dof = (kept.len() - 1) as f64;
            // Four standard deviations of the chi-square distribution; the seed is fixed.
            assert!(
                chi2 < dof + 4.0 * (2.0 * dof).sqrt(),
                "chi2 {chi2} dof {dof}"
            );
            assert!(kept.len() > 5);
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let l: Vec<f32> = (0..1000u64).map(|i| 8.0 * uniform(5, i)).collect();
        let p = SamplingParams::default();
        let draw = |seed| -> Vec<u32> {
            (0..64)
                .map(|i| sample(&p, uniform(seed, i), &[], &mut l.clone()))
                .collect()
        };
        assert_eq!(draw(11), draw(11));
        assert_ne!(draw(11), draw(12));
    }
}
