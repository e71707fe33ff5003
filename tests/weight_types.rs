//! A tiny llama in every weight type, by `kigo accuracy`: on the CPU all of it; in the emulator, which takes its
//! time, one of each kind of unpacking.
//!
//! The models are in the fuller golden set: without `KIGO_GOLDEN_DIR` there is nothing to do.

use kigo_tests::{run, shared_tiny_dir};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;

/// Holds the models whose names begin with `prefix` to their references; how many there were, and the types
/// that they have.
fn check(dir: &Path, prefix: &str, device: &str) -> (usize, BTreeSet<String>) {
    let dir = dir.to_str().expect("a path in UTF-8");
    let args = [
        "accuracy", dir, "--only", prefix, "--device", device, "--json",
    ];
    let output = run(args, b"");
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"));
    let models = report["models"].as_array().expect("a list of models");
    let mut types = BTreeSet::new();
    let mut wrong = Vec::new();
    for model in models {
        types.extend(
            model["types"]
                .as_array()
                .expect("types")
                .iter()
                .map(Value::to_string),
        );
        let results = model["results"].as_array().expect("results");
        assert_eq!(results.len(), 2, "exact and not");
        for result in results {
            println!("{}: {result}", model["name"]);
            let exact = result["exact"].as_bool().expect("a bool");
            let limit = match (device, exact) {
                (_, true) => 1e-5,
                ("cpu", false) => 1e-4,
                (_, false) => 2e-2,
            };
            // The command's own limits are what is to be held.
            assert_eq!(result["limit"], limit);
            let within = result["nmse"].as_f64().is_some_and(|e| e <= limit);
            let ids = result["greedy_equal"] == result["greedy"];
            if !within || !ids || result["right"] != true {
                wrong.push(format!("{} on {device}: {result}", model["name"]));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(output.status.success(), "{said}");
    (models.len(), types)
}

#[test]
fn every_type_on_the_cpu() {
    let Some(dir) = shared_tiny_dir() else {
        return println!("KIGO_GOLDEN_DIR is not set: nothing to hold to a reference");
    };
    let (models, types) = check(&dir, "quant-llama-", "cpu");
    assert!(models >= 26, "{models}");
    let expected = gguf::blocks::SUPPORTED
        .iter()
        .filter(|ty| ty.block_len() > 1);
    for ty in expected {
        assert!(types.contains(&format!("\"{ty}\"")), "no model has {ty}");
    }
}

#[test]
fn looked_up_types_in_the_emulator() {
    let Some(dir) = shared_tiny_dir() else {
        return println!("KIGO_GOLDEN_DIR is not set: nothing to hold to a reference");
    };
    for name in ["IQ1_M", "IQ3_XXS", "MXFP4"] {
        check(&dir, &format!("quant-llama-{name}"), "emulated");
    }
}
