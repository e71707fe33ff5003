//! Logits of real models against an independent fp32 reference, through `kigo logits`.
//! `KIGO_TEST_DEVICE` chooses the device (default: cpu).

use kigo_tests::{compare, device, logits, model, read_golden};
use serde::Deserialize;

#[derive(Deserialize)]
struct Prompt {
    prompt_ids: Vec<u32>,
    top: Vec<(u32, f64)>,
    logsumexp: f64,
}

/// Largest root mean square difference of log-probabilities over the reference's top 32 that is right
/// for activations of 8 bits, on any prompt and in the median.
const EIGHT_BITS: (f64, f64) = (0.6, 0.15);
/// The same for the CPU's activations of 15 bits and cache of f16.
const FIFTEEN_BITS: (f64, f64) = (0.02, 0.01);
/// The same for f32 activations and cache.
const EXACT: (f64, f64) = (2e-3, 2e-3);

fn check(name: &str, exact: bool) {
    let prompts: Vec<Prompt> = read_golden(&format!("{name}.logits.json"));
    assert_eq!(prompts.len(), 12, "{name}");
    let (file, device) = (model(name), device());
    let (each, middle) = match (device.as_str(), exact) {
        (_, true) => EXACT,
        ("cpu", false) => FIFTEEN_BITS,
        (_, false) => EIGHT_BITS,
    };
    let mut all = Vec::new();
    for prompt in &prompts {
        assert_eq!(prompt.top.len(), 32);
        let ours = logits(&file, &device, exact, &prompt.prompt_ids);
        let rms = compare::logprob_rms(&ours, &prompt.top, prompt.logsumexp);
        println!(
            "{name} {device} exact={exact}: {} tokens, rms {rms:.2e}",
            prompt.prompt_ids.len()
        );
        all.push(rms);
    }
    assert!(
        all.iter().all(|&rms| rms <= each),
        "{name}: rms {all:?}, at most {each} on each prompt"
    );
    let median = compare::median(&all);
    assert!(
        median <= middle,
        "{name}: median rms {median}, at most {middle}"
    );
}

#[test]
fn qwen_0_5b() {
    check("qwen2.5-coder-0.5b-instruct-q4_k_m", false);
}

#[test]
fn qwen_0_5b_exact() {
    check("qwen2.5-coder-0.5b-instruct-q4_k_m", true);
}

#[test]
fn smollm2_135m() {
    check("smollm2-135m-instruct-q4_1", false);
}

#[test]
fn smollm2_135m_exact() {
    check("smollm2-135m-instruct-q4_1", true);
}

#[test]
fn gemma_3_270m() {
    check("gemma-3-270m-q4_k_m", false);
}

#[test]
fn gemma_3_270m_exact() {
    check("gemma-3-270m-q4_k_m", true);
}
