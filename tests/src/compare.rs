//! How far an output is from its reference.

/// `ln Σ exp(logits)`, in f64.
pub fn logsumexp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    max + logits
        .iter()
        .map(|&x| (x as f64 - max).exp())
        .sum::<f64>()
        .ln()
}

/// Root mean square difference of log-probabilities over the reference's `top` (id, logit) pairs:
/// log-softmax on both sides, the reference's with its own `logsumexp`.
///
/// # Panics
/// When an id of the reference lies outside the vocabulary.
pub fn logprob_rms(logits: &[f32], top: &[(u32, f64)], reference_logsumexp: f64) -> f64 {
    let ours = logsumexp(logits);
    let squares: f64 = top
        .iter()
        .map(|&(id, reference)| {
            let difference =
                (logits[id as usize] as f64 - ours) - (reference - reference_logsumexp);
            difference * difference
        })
        .sum();
    (squares / top.len() as f64).sqrt()
}

/// Normalised mean square error, `Σ(a − b)² / Σb²` with b the reference.
///
/// # Panics
/// When the lengths differ.
pub fn nmse(logits: &[f32], reference: &[f64]) -> f64 {
    assert_eq!(logits.len(), reference.len(), "as many logits as reference");
    let error: f64 = logits
        .iter()
        .zip(reference)
        .map(|(&a, &b)| (a as f64 - b).powi(2))
        .sum();
    error / reference.iter().map(|b| b * b).sum::<f64>()
}

/// The middle value; between two, the mean. NaN anywhere makes it NaN.
///
/// # Panics
/// When there are no values.
pub fn median(values: &[f64]) -> f64 {
    assert!(!values.is_empty(), "a median of something");
    if values.iter().any(|v| v.is_nan()) {
        return f64::NAN;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        (sorted[middle - 1] + sorted[middle]) / 2.0
    }
}

/// Compares a greedy continuation with the reference's, up to the first step whose margin (gap
/// between the reference's two largest logits) is under `tolerance`: past it, another choice is
/// no mistake. Without such a step the lengths must agree too. Returns the number of steps compared.
///
/// # Errors
/// Names the first step that differs.
pub fn greedy_steps(
    ids: &[u32],
    reference: &[u32],
    margins: &[f64],
    tolerance: f64,
) -> Result<usize, String> {
    if reference.len() != margins.len() {
        return Err(format!(
            "{} ids but {} margins in the reference",
            reference.len(),
            margins.len()
        ));
    }
    let sure = margins
        .iter()
        .position(|&margin| margin < tolerance)
        .unwrap_or(margins.len());
    for step in 0..sure {
        if ids.get(step) != Some(&reference[step]) {
            return Err(format!(
                "step {step}: {:?} instead of {} (margin {})",
                ids.get(step),
                reference[step],
                margins[step]
            ));
        }
    }
    if sure == reference.len() && ids.len() != reference.len() {
        return Err(format!(
            "{} tokens instead of {}",
            ids.len(),
            reference.len()
        ));
    }
    Ok(sure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logsumexp_of_large_and_equal_values() {
        assert!((logsumexp(&[0.0; 8]) - 8f64.ln()).abs() < 1e-12);
        assert!((logsumexp(&[1000.0, 1000.0]) - (1000.0 + 2f64.ln())).abs() < 1e-9);
    }

    #[test]
    fn logprob_rms_ignores_a_shift_and_sees_a_difference() {
        let reference = [1.0f32, 3.0, -2.0, 0.5];
        let lse = logsumexp(&reference);
        let top = [(1, 3.0), (0, 1.0)];
        assert!(logprob_rms(&reference, &top, lse) < 1e-12);
        let shifted = reference.map(|x| x + 7.0);
        assert!(logprob_rms(&shifted, &top, lse) < 1e-6);

        // Probabilities 1/2, 1/2 against 1/4, 3/4.
        let top = [(0, 0.25f64.ln()), (1, 0.75f64.ln())];
        let rms = logprob_rms(&[0.0, 0.0], &top, 0.0);
        let expected = ((2f64.ln().powi(2) + 1.5f64.ln().powi(2)) / 2.0).sqrt();
        assert!((rms - expected).abs() < 1e-12, "{rms} {expected}");

        // The listed ids agree but mass moved to one that is not listed.
        let mut other = reference;
        other[3] = 4.0;
        assert!(logprob_rms(&other, &[(1, 3.0), (0, 1.0)], lse) > 1.0);
        assert!(logprob_rms(&[f32::NAN, 0.0], &top, 0.0).is_nan());
    }

    #[test]
    fn nmse_is_relative_to_the_reference() {
        assert_eq!(nmse(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(nmse(&[0.0, 0.0], &[3.0, 4.0]), 1.0);
        assert_eq!(nmse(&[4.0, 4.0], &[3.0, 4.0]), 0.04);
    }

    #[test]
    #[should_panic(expected = "as many logits")]
    fn nmse_of_different_lengths() {
        nmse(&[1.0], &[1.0, 2.0]);
    }

    #[test]
    fn median_of_odd_and_even() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[1.0, f64::NAN, 1.0]).is_nan());
    }

    #[test]
    fn greedy_stops_at_the_first_unsure_step() {
        let reference = [5, 6, 7, 8];
        let margins = [2.0, 1.0, 0.1, 3.0];
        assert_eq!(
            greedy_steps(&[5, 6, 7, 8], &reference, &margins, 0.7),
            Ok(2)
        );
        assert_eq!(greedy_steps(&[5, 6, 9], &reference, &margins, 0.7), Ok(2));
        assert!(greedy_steps(&[5, 9, 7, 8], &reference, &margins, 0.7).is_err());
        assert!(greedy_steps(&[5], &reference, &margins, 0.7).is_err());
        assert!(greedy_steps(&[5, 6, 9, 8], &reference, &margins, 0.01).is_err());
        assert_eq!(greedy_steps(&reference, &reference, &margins, 0.01), Ok(4));
        assert!(greedy_steps(&[5, 6, 7, 8, 9], &reference, &margins, 0.01).is_err());
        assert!(greedy_steps(&[5], &[5], &[], 0.01).is_err());
    }
}
