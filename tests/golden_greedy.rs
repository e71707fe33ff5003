//! Greedy continuations of real models against an independent fp32 reference, through
//! `kigo generate`. `KIGO_TEST_DEVICE` chooses the device (default: cpu).

use kigo_tests::{compare, device, join, model, read_golden, run_model};
use serde::Deserialize;

#[derive(Deserialize)]
struct Continuation {
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    margin: Vec<f64>,
}

/// The reference stops after as many tokens.
const MAX_TOKENS: &str = "64";

fn check(name: &str, exact: bool) {
    let continuations: Vec<Continuation> = read_golden(&format!("{name}.greedy.json"));
    assert_eq!(continuations.len(), 6, "{name}");
    let (file, device) = (model(name), device());
    // Below this gap between the two best logits, the error that is allowed may swap them.
    let tolerance = match (device.as_str(), exact) {
        (_, true) => 0.01,
        ("cpu", false) => 0.05,
        (_, false) => 0.7,
    };
    let mut wrong = Vec::new();
    for (i, c) in continuations.iter().enumerate() {
        let prompt = join(&c.prompt_ids);
        let args = [
            "--ids",
            &prompt,
            "--max-tokens",
            MAX_TOKENS,
            "--temperature",
            "0",
        ];
        let output = run_model("generate", &file, &device, exact, &args);
        let ids: Vec<u32> =
            serde_json::from_value(output["ids"].clone()).expect("ids are token ids");
        assert_eq!(output["prompt_tokens"], c.prompt_ids.len());
        match compare::greedy_steps(&ids, &c.ids, &c.margin, tolerance) {
            Ok(steps) => println!(
                "{name} {device} exact={exact}: continuation {i}, {steps} of {} steps sure and equal",
                c.ids.len()
            ),
            Err(e) => wrong.push(format!("continuation {i}: {e}")),
        }
    }
    assert!(
        wrong.is_empty(),
        "{name} {device} exact={exact}:\n{}",
        wrong.join("\n")
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
