//! The parameters of generation that every endpoint shares: their fields, and what they become.

use super::fields::{Field, Fields, Kind, integer};
use crate::engine::EngineHandle;
use crate::sampling::{Chain, Dry, Mirostat, Sampler, SamplingParams};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

pub(super) const MAX_STOPS: usize = 4;
/// Characters of a stop string at most.
pub(super) const MAX_STOP: usize = 256;
/// A day: past it, no deadline is meant.
const MAX_TIMEOUT_MS: u64 = 86_400_000;

/// Sampler fields beyond the OpenAI API's own. `vocabulary` is the number of logits.
pub(super) fn sampler_fields(vocabulary: usize) -> Vec<Field> {
    let number = |min, max| Kind::Number { min, max };
    let integer = |min, max| Kind::Integer { min, max };
    let names: Vec<&str> = Sampler::DEFAULT_ORDER.iter().map(|s| s.name()).collect();
    vec![
        Field::new(
            "top_k",
            integer(0, vocabulary as u64),
            "Only so many of the likeliest tokens stay in play; 0: all",
        ),
        Field::new(
            "min_p",
            number(0.0, 1.0),
            "Only tokens at least this fraction as likely as the likeliest stay in play",
        ),
        Field::new(
            "repetition_penalty",
            Kind::Above {
                min: 0.0,
                max: 100.0,
            },
            "Divides positive and multiplies negative logits of the tokens seen; 1: off",
        ),
        Field::new(
            "typical_p",
            Kind::Above { min: 0.0, max: 1.0 },
            "Locally typical sampling: keeps what is nearest the entropy; 1: off",
        ),
        Field::new(
            "top_n_sigma",
            number(0.0, 100.0),
            "Keeps logits within so many standard deviations of the greatest; 0: off",
        ),
        Field::new(
            "xtc_probability",
            number(0.0, 1.0),
            "How often the top choices are excluded; 0: never",
        ),
        Field::new(
            "xtc_threshold",
            number(0.0, 1.0),
            "How likely a token must be to count as a top choice",
        ),
        Field::new(
            "dry_multiplier",
            number(0.0, 100.0),
            "Penalty on what would go on with a repeat; 0: off",
        ),
        Field::new(
            "dry_base",
            number(1.0, 100.0),
            "The penalty grows by this factor with each repeated token",
        ),
        Field::new(
            "dry_allowed_length",
            integer(0, 1000),
            "Repeats up to this length cost nothing more",
        ),
        Field::new(
            "dry_penalty_last_n",
            integer(0, 1 << 20),
            "How many of the last tokens are searched for repeats; 0: all",
        ),
        Field::new(
            "dry_sequence_breakers",
            Kind::Own {
                constraint: "up to 16 strings of 1 to 40 characters",
                schema: json!({ "type": "array", "maxItems": 16,
                    "items": { "type": "string", "minLength": 1, "maxLength": 40 } }),
            },
            "No repeat reaches over a token that contains one of these",
        ),
        Field::new(
            "dynatemp_range",
            number(0.0, 100.0),
            "The temperature moves by up to this with the entropy; 0: off",
        ),
        Field::new(
            "dynatemp_exponent",
            Kind::Above {
                min: 0.0,
                max: 100.0,
            },
            "How the temperature follows the entropy",
        ),
        Field::new(
            "mirostat",
            integer(0, 2),
            "2: Mirostat version 2 in place of all that truncates; 0: off",
        ),
        Field::new(
            "mirostat_tau",
            number(0.0, 100.0),
            "The surprise to hold, in bits",
        ),
        Field::new(
            "mirostat_eta",
            number(0.0, 1.0),
            "How fast Mirostat corrects",
        ),
        Field::new(
            "samplers",
            Kind::Own {
                constraint: "distinct names out of penalties, dry, temperature, top_n_sigma, top_k, typical_p, top_p, min_p, xtc",
                schema: json!({ "type": "array", "uniqueItems": true, "items": { "type": "string", "enum": names } }),
            },
            "The samplers to run, in this order; what is not named does not run",
        ),
        Field::new(
            "timeout_ms",
            integer(1, MAX_TIMEOUT_MS),
            "The request fails when it is not done after so many milliseconds",
        ),
    ]
}

/// Fields that the OpenAI API and the native one have in common.
pub(super) fn common_fields(vocabulary: usize) -> Vec<Field> {
    vec![
        Field::new(
            "temperature",
            Kind::Number { min: 0.0, max: 2.0 },
            "Divides the logits; 0 takes the likeliest token always",
        ),
        Field::new(
            "top_p",
            Kind::Number { min: 0.0, max: 1.0 },
            "Only the likeliest tokens that together hold this share stay in play",
        ),
        Field::new(
            "presence_penalty",
            Kind::Number {
                min: -2.0,
                max: 2.0,
            },
            "Taken off the logit of what was generated before",
        ),
        Field::new(
            "frequency_penalty",
            Kind::Number {
                min: -2.0,
                max: 2.0,
            },
            "Taken off the logit for each time it was generated before",
        ),
        Field::new(
            "seed",
            Kind::Integer {
                min: 0,
                max: u64::MAX,
            },
            "The same seed gives the same answer; chosen and reported when absent",
        ),
        Field::new(
            "stop",
            Kind::Own {
                constraint: "up to 4 strings of 1 to 256 characters",
                schema: json!({ "anyOf": [
                    { "type": "string", "minLength": 1, "maxLength": MAX_STOP },
                    { "type": "array", "maxItems": MAX_STOPS, "items": { "type": "string", "minLength": 1, "maxLength": MAX_STOP } },
                ] }),
            },
            "Text at which generation ends; it is not part of the answer",
        ),
        Field::new(
            "logit_bias",
            Kind::Own {
                constraint: "an object of up to 1024 token ids with a number from -100 to 100 each",
                schema: json!({ "type": "object", "maxProperties": 1024, "propertyNames": { "pattern": below(vocabulary) },
                    "additionalProperties": { "type": "number", "minimum": -100, "maximum": 100 } }),
            },
            "Added to the logits of these token ids",
        ),
    ]
}

/// A pattern of the decimal numbers below `n`.
fn below(n: usize) -> String {
    let last = n.saturating_sub(1).to_string();
    let rest = |digits: usize| match digits {
        0 => String::new(),
        1 => "[0-9]".to_owned(),
        n => format!("[0-9]{{{n}}}"),
    };
    let mut ways = vec![last.clone()];
    for (i, digit) in last.bytes().enumerate() {
        let least = if i == 0 && last.len() > 1 { b'1' } else { b'0' };
        if digit > least {
            let (low, high) = (char::from(least), char::from(digit - 1));
            ways.push(format!(
                "{}[{low}-{high}]{}",
                &last[..i],
                rest(last.len() - i - 1)
            ));
        }
    }
    for digits in 1..last.len() {
        let first = if digits == 1 { "[0-9]" } else { "[1-9]" };
        ways.push(format!("{first}{}", rest(digits - 1)));
    }
    format!("^({})$", ways.join("|"))
}

/// What these fields ask of the engine.
pub(super) struct Generation {
    pub sampling: SamplingParams,
    pub chain: Chain,
    pub stop: Vec<String>,
    pub logit_bias: Vec<(u32, f32)>,
    pub deadline: Option<Instant>,
}

/// Reads the fields of [`common_fields`] and [`sampler_fields`]. `defaults` are the endpoint's.
pub(super) fn read(
    fields: &mut Fields,
    engine: &EngineHandle,
    defaults: SamplingParams,
) -> Generation {
    let vocabulary = engine.model().vocabulary;
    let f32 = |name: &str, default: f32| fields.f32(name).unwrap_or(default);
    let plain = Chain::default();
    let dry = Dry::default();
    let sampling = SamplingParams {
        temperature: f32("temperature", defaults.temperature),
        // The sampler wants a share above 0; the least there is keeps the likeliest token alone,
        // which is what 0 asks for.
        top_p: f32("top_p", defaults.top_p).max(f32::EPSILON / 2.0),
        top_k: fields
            .u64("top_k")
            .map_or(defaults.top_k.min(vocabulary as u32), |k| k as u32),
        min_p: f32("min_p", defaults.min_p),
        repetition_penalty: f32("repetition_penalty", defaults.repetition_penalty),
        seed: fields.u64("seed"),
    };
    let mirostat = (fields.u64("mirostat") == Some(2)).then(|| Mirostat {
        tau: f32("mirostat_tau", 5.0),
        eta: f32("mirostat_eta", 0.1),
    });
    let mut chain = Chain {
        presence_penalty: f32("presence_penalty", 0.0),
        frequency_penalty: f32("frequency_penalty", 0.0),
        typical_p: f32("typical_p", plain.typical_p),
        top_n_sigma: f32("top_n_sigma", 0.0),
        xtc_probability: f32("xtc_probability", 0.0),
        xtc_threshold: f32("xtc_threshold", plain.xtc_threshold),
        dynatemp_range: f32("dynatemp_range", 0.0),
        dynatemp_exponent: f32("dynatemp_exponent", 1.0),
        dry: Dry {
            multiplier: f32("dry_multiplier", 0.0),
            base: f32("dry_base", dry.base),
            allowed_length: fields
                .u64("dry_allowed_length")
                .map_or(dry.allowed_length, |n| n as u32),
            last_n: fields.u64("dry_penalty_last_n").unwrap_or(0) as u32,
            breakers: dry.breakers,
        },
        mirostat,
        ..plain
    };
    if fields.u64("mirostat") == Some(1) {
        fields.add("mirostat", "0 or 2", "it is 1", json!(1));
    }
    if let Some(order) = samplers(fields) {
        chain.order = order;
    }
    if let Some(breakers) = strings(fields, "dry_sequence_breakers", 16, 40) {
        chain.dry.breakers = breakers;
    }
    let timeout = fields.u64("timeout_ms").map(Duration::from_millis);
    Generation {
        sampling,
        chain,
        stop: stop(fields),
        logit_bias: logit_bias(fields, vocabulary),
        deadline: timeout.map(|timeout| Instant::now() + timeout),
    }
}

fn samplers(fields: &mut Fields) -> Option<Vec<Sampler>> {
    let value = fields.take("samplers")?;
    let order: Option<Vec<Sampler>> = serde_json::from_value(value).ok();
    let distinct = |order: &[Sampler]| {
        let mut seen = std::collections::HashSet::new();
        order.iter().all(|s| seen.insert(*s))
    };
    match order {
        Some(order) if distinct(&order) => Some(order),
        _ => {
            let names: Vec<&str> = Sampler::DEFAULT_ORDER.iter().map(|s| s.name()).collect();
            let constraint = format!("distinct names out of {}", names.join(", "));
            fields.add("samplers", &constraint, "it is something else", Value::Null);
            None
        }
    }
}

fn strings(fields: &mut Fields, name: &str, most: usize, longest: usize) -> Option<Vec<String>> {
    let value = fields.take(name)?;
    let strings: Option<Vec<String>> = serde_json::from_value(value).ok();
    match strings {
        Some(strings)
            if strings.len() <= most
                && strings
                    .iter()
                    .all(|s| (1..=longest).contains(&s.chars().count())) =>
        {
            Some(strings)
        }
        _ => {
            let constraint = format!("up to {most} strings of 1 to {longest} characters");
            fields.add(name, &constraint, "it is something else", Value::Null);
            None
        }
    }
}

fn stop(fields: &mut Fields) -> Vec<String> {
    let list = match fields.take("stop") {
        None => return Vec::new(),
        Some(Value::Array(list)) => list,
        Some(one) => vec![one],
    };
    let fits = |v: &Value| {
        v.as_str()
            .is_some_and(|s| (1..=MAX_STOP).contains(&s.chars().count()))
    };
    if list.len() > MAX_STOPS || !list.iter().all(fits) {
        let constraint = format!("up to {MAX_STOPS} strings of 1 to {MAX_STOP} characters");
        let found = format!(
            "there are {}, or one of them is not of that form",
            list.len()
        );
        fields.add("stop", &constraint, &found, Value::Null);
        return Vec::new();
    }
    list.iter()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

fn logit_bias(fields: &mut Fields, vocabulary: usize) -> Vec<(u32, f32)> {
    let Some(value) = fields.take("logit_bias") else {
        return Vec::new();
    };
    let read = |(id, bias): (&String, &Value)| {
        let text = id;
        let id: u32 = text.parse().ok().filter(|&id| (id as usize) < vocabulary)?;
        if id.to_string() != *text {
            return None;
        }
        let bias = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b))?;
        Some((id, bias as f32))
    };
    let biases: Option<Vec<(u32, f32)>> = value
        .as_object()
        .filter(|map| map.len() <= 1024)
        .and_then(|map| map.iter().map(read).collect());
    biases.unwrap_or_else(|| {
        let constraint = format!(
            "an object of up to 1024 token ids below {vocabulary} with a number from -100 to 100 each"
        );
        fields.add("logit_bias", &constraint, "it is something else", Value::Null);
        Vec::new()
    })
}

/// The tokens to generate at most: what the client asks for, within what the context and the worker allow.
pub(super) fn max_tokens(
    fields: &mut Fields,
    name: &str,
    prompt_tokens: usize,
    engine: &EngineHandle,
    limit: Option<usize>,
) -> usize {
    let left = engine.context().saturating_sub(prompt_tokens.max(1));
    let most = limit.map_or(left, |limit| limit.min(left));
    match fields.get(name).and_then(integer) {
        Some(n) if n as usize <= most => n as usize,
        Some(n) => {
            let constraint = format!("an integer from 1 to {most}");
            fields.add(name, &constraint, &format!("it is {n}"), json!(n));
            most
        }
        None => most,
    }
}

#[cfg(test)]
mod tests {
    use super::below;

    #[test]
    fn the_pattern_of_numbers_below_is_exact() {
        for n in [1, 2, 9, 10, 11, 257, 300, 1000, 49_152] {
            let pattern = regex::Regex::new(&below(n)).unwrap();
            for i in 0..(2 * n).max(120) {
                assert_eq!(pattern.is_match(&i.to_string()), i < n, "{i} below {n}");
            }
            for text in ["", "00", "01", "-1", "+1", "1x"] {
                assert!(!pattern.is_match(text), "{text} below {n}");
            }
        }
    }
}
