//! Whole tiny models of random weights on the CPU and in the emulator (the GPU's kernels, run on the
//! host), against an independent fp32 reference.

use kigo_tests::{compare, logits, read_json, tiny_models};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    n_vocab: usize,
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    ids: Vec<u32>,
    logits: Vec<Vec<f64>>,
}

fn check(architecture: &str, device: &str, exact: bool) {
    let prefix = format!("{architecture}-");
    let models = tiny_models(|name| name.starts_with(&prefix));
    assert!(models.len() >= 3, "{models:?}");
    let limit = if exact { 1e-5 } else { 2e-2 };
    let mut wrong = Vec::new();
    for path in models {
        let golden: Golden = read_json(&path.with_added_extension("golden.json"));
        let file = path.with_added_extension("gguf");
        assert_eq!(golden.prompts.len(), 3);
        for prompt in &golden.prompts {
            let ours = logits(&file, device, exact, &prompt.ids);
            assert_eq!(ours.len(), golden.n_vocab);
            let nmse = compare::nmse(&ours, &prompt.logits[0]);
            let line = format!(
                "{} {device} exact={exact}: {} tokens, nmse {nmse:.1e}",
                file.display(),
                prompt.ids.len()
            );
            println!("{line}");
            if nmse.is_nan() || nmse > limit {
                wrong.push(line);
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "nmse at most {limit:.0e}:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn llama_cpu() {
    check("llama", "cpu", false);
}

#[test]
fn llama_cpu_exact() {
    check("llama", "cpu", true);
}

#[test]
fn llama_emulated() {
    check("llama", "emulated", false);
}

#[test]
fn llama_emulated_exact() {
    check("llama", "emulated", true);
}

#[test]
fn qwen2_cpu() {
    check("qwen2", "cpu", false);
}

#[test]
fn qwen2_cpu_exact() {
    check("qwen2", "cpu", true);
}

#[test]
fn qwen2_emulated() {
    check("qwen2", "emulated", false);
}

#[test]
fn qwen2_emulated_exact() {
    check("qwen2", "emulated", true);
}
