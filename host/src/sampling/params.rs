//! What a request may ask of the sampler, and what is wrong with it if something is.

use serde::{Deserialize, Serialize};

/// How to choose each token. The exact meaning of every field is in the [module's docs](super).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// Divides the logits; 0 chooses the greatest one always. 0 to 100.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens stay in play; 0: all of them.
    pub top_k: u32,
    /// Only the likeliest tokens that together hold this share of the mass stay in play. Above 0, at most 1.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the likeliest stay in play. 0 to 1.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of the tokens seen; 1 does nothing. Above 0, at most 100.
    pub repetition_penalty: f32,
    /// The same seed and logits give the same tokens. `None`: whoever starts the request picks one
    /// and reports it.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    /// Lively but coherent, the values most local runners start with.
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            repetition_penalty: 1.0,
            seed: None,
        }
    }
}

/// One parameter outside its range.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Violation {
    /// The field's name as it is written in a request.
    pub field: String,
    /// The rule, for machines: `0 <= temperature <= 100`.
    pub constraint: String,
    /// The rule and the value, for people.
    pub message: String,
    /// What was given; JSON has no NaN and no infinities, so those are text.
    pub value: serde_json::Value,
}

impl SamplingParams {
    /// Greedy decoding: the greatest logit, always.
    #[must_use]
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Checks every field against its range; `vocab` is the number of logits.
    ///
    /// # Errors
    /// All violations at once, in the order of the fields.
    pub fn validate(&self, vocab: usize) -> Result<(), Vec<Violation>> {
        let mut found = Vec::new();
        let mut check = |field: &str, value: f32, ok: bool, constraint: String| {
            if !ok {
                found.push(violation(field, float_json(value), constraint));
            }
        };
        let t = self.temperature;
        check(
            "temperature",
            t,
            (0.0..=100.0).contains(&t),
            "0 <= temperature <= 100".into(),
        );
        let p = self.top_p;
        check("top_p", p, p > 0.0 && p <= 1.0, "0 < top_p <= 1".into());
        let m = self.min_p;
        check(
            "min_p",
            m,
            (0.0..=1.0).contains(&m),
            "0 <= min_p <= 1".into(),
        );
        let r = self.repetition_penalty;
        check(
            "repetition_penalty",
            r,
            r > 0.0 && r <= 100.0,
            "0 < repetition_penalty <= 100".into(),
        );
        if self.top_k as usize > vocab {
            found.push(violation(
                "top_k",
                self.top_k.into(),
                format!("0 <= top_k <= {vocab}"),
            ));
        }
        if found.is_empty() { Ok(()) } else { Err(found) }
    }
}

fn violation(field: &str, value: serde_json::Value, constraint: String) -> Violation {
    let shown = match &value {
        serde_json::Value::String(s) => s.clone(),
        other => other.to_string(),
    };
    Violation {
        field: field.into(),
        message: format!("{field} is {shown}, but must satisfy {constraint}"),
        constraint,
        value,
    }
}

/// `value` as JSON with the digits it was written with (`1.1`, not `1.100000023841858`).
fn float_json(value: f32) -> serde_json::Value {
    match value
        .to_string()
        .parse()
        .ok()
        .and_then(serde_json::Number::from_f64)
    {
        Some(number) => number.into(),
        None => value.to_string().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_and_the_edges_are_valid() {
        assert_eq!(SamplingParams::default().validate(1000), Ok(()));
        assert_eq!(SamplingParams::greedy().validate(1000), Ok(()));
        let edge = SamplingParams {
            temperature: 100.0,
            top_k: 7,
            top_p: 1.0,
            min_p: 1.0,
            repetition_penalty: 100.0,
            seed: Some(u64::MAX),
        };
        assert_eq!(edge.validate(7), Ok(()));
    }

    #[test]
    fn every_violation_is_reported() {
        let bad = SamplingParams {
            temperature: f32::NAN,
            top_k: 8,
            top_p: 0.0,
            min_p: 1.1,
            repetition_penalty: -1.0,
            seed: None,
        };
        let found = bad.validate(7).unwrap_err();
        let fields: Vec<&str> = found.iter().map(|v| v.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "temperature",
                "top_p",
                "min_p",
                "repetition_penalty",
                "top_k"
            ]
        );
        assert_eq!(found[0].value, "NaN");
        assert_eq!(
            found[2].message,
            "min_p is 1.1, but must satisfy 0 <= min_p <= 1"
        );
        assert_eq!(found[4].value, 8);
        for nonfinite in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let p = SamplingParams {
                temperature: nonfinite,
                top_p: nonfinite,
                min_p: nonfinite,
                repetition_penalty: nonfinite,
                ..SamplingParams::default()
            };
            assert_eq!(p.validate(1000).unwrap_err().len(), 4);
        }
    }

    #[test]
    fn json_names_and_defaults() {
        let p: SamplingParams = serde_json::from_str(r#"{"temperature": 0.5, "seed": 3}"#).unwrap();
        assert_eq!(p.temperature, 0.5);
        assert_eq!(p.seed, Some(3));
        assert_eq!(p.top_k, SamplingParams::default().top_k);
    }
}
