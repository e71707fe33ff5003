//! Perplexity of real models against an independent fp32 reference, through `kigo perplexity`.
//! `KIGO_TEST_DEVICE` chooses the device (default: cpu).

use std::io::Write;

use kigo_tests::{device, model, read_golden, run_model};
use serde::Deserialize;

#[derive(Deserialize)]
struct Text {
    ids: Vec<u32>,
    nll_sum: f64,
    n: u64,
}

fn check(name: &str, exact: bool) {
    let text: Text = read_golden(&format!("{name}.ppl.json"));
    assert_eq!(text.n, text.ids.len() as u64 - 1);
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    serde_json::to_writer(&mut file, &text.ids).expect("writes the ids");
    file.flush().expect("writes the ids");
    let path = file.path().to_str().expect("a path in UTF-8");
    let device = device();
    let output = run_model(
        "perplexity",
        &model(name),
        &device,
        exact,
        &["--ids-file", path],
    );
    assert_eq!(
        output["n"], text.n,
        "every token but the first is predicted"
    );
    let nll_sum = output["nll_sum"].as_f64().expect("nll_sum is a number");
    let perplexity = (nll_sum / text.n as f64).exp();
    let reference = (text.nll_sum / text.n as f64).exp();
    let off = (perplexity / reference - 1.0).abs();
    println!(
        "{name} {device} exact={exact}: perplexity {perplexity:.4}, reference {reference:.4}, off {off:.1e}"
    );
    let limit = match (device.as_str(), exact) {
        (_, true) | ("cpu", false) => 0.001,
        (_, false) => 0.01,
    };
    assert!(
        off <= limit,
        "{name}: perplexity {perplexity}, reference {reference}: off by {off}, at most {limit}"
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
