//! Whole tiny models of random weights, one or more of each architecture, on the CPU and in the emulator
//! (the GPU's kernels, run on the host), against an independent fp32 reference.

use kigo_tests::{compare, join, logits, read_json, run_model, tiny_models};
use serde::Deserialize;
use std::path::Path;

#[derive(Deserialize)]
struct Golden {
    n_vocab: usize,
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    ids: Vec<u32>,
    logits: Vec<Vec<f64>>,
    greedy: Vec<u32>,
}

/// Largest normalised mean square error of a prompt's last logits: with f32 activations, with the CPU's 15 bits
/// and cache of f16, and with the 8 bits of the GPU's kernels.
fn limit(device: &str, exact: bool) -> f64 {
    match (device, exact) {
        (_, true) => 1e-5,
        ("cpu", false) => 1e-4,
        (_, false) => 2e-2,
    }
}

/// The greatest error over the golden prompts, with further arguments for `kigo logits`.
fn worst(file: &Path, prompts: &[Prompt], device: &str, exact: bool, args: &[&str]) -> f64 {
    let mut worst = 0.0;
    for prompt in prompts {
        let ids = join(&prompt.ids);
        let mut all = vec!["--ids", &ids];
        all.extend(args);
        let output = run_model("logits", file, device, exact, &all);
        let ours: Vec<f32> =
            serde_json::from_value(output["logits"].clone()).expect("logits are numbers");
        worst = compare::nmse(&ours, &prompt.logits[0]).max(worst);
    }
    worst
}

/// Greedy ids of a prompt that differ from the reference's, each with its step: where one does, the rest is generated
/// after the reference's.
fn differing(file: &Path, device: &str, exact: bool, prompt: &Prompt) -> Vec<(usize, u32)> {
    let n = prompt.greedy.len();
    let mut differing = Vec::new();
    let mut done = 0;
    while done < n {
        let mut ids = prompt.ids.clone();
        ids.extend(&prompt.greedy[..done]);
        let (ids, count) = (join(&ids), (n - done).to_string());
        let args = ["--ids", &ids, "--max-tokens", &count, "--temperature", "0"];
        let output = run_model("generate", file, device, exact, &args);
        let ours: Vec<u32> =
            serde_json::from_value(output["ids"].clone()).expect("ids are token ids");
        assert!(!ours.is_empty(), "{}: nothing generated", file.display());
        let equal = ours
            .iter()
            .zip(&prompt.greedy[done..])
            .take_while(|(a, b)| a == b)
            .count();
        done += equal;
        // An end of generation ends ours; the reference goes on.
        if equal < ours.len() && done < n {
            differing.push((done, ours[equal]));
            done += 1;
        }
    }
    differing
}

/// The models whose names begin with `family-`: logits and greedy continuations.
fn check(family: &str, device: &str, exact: bool) {
    let prefix = format!("{family}-");
    let models = tiny_models(|name| name.starts_with(&prefix));
    assert!(!models.is_empty(), "no tiny model of {family}");
    let limit = limit(device, exact);
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
        // Decoding, past the sliding windows. The emulator takes minutes for what the CPU does in seconds: there
        // the shortest prompt; `kigo accuracy` takes them all.
        let mut prompts: Vec<&Prompt> = golden.prompts.iter().collect();
        if device == "emulated" {
            prompts.sort_by_key(|p| p.ids.len());
            prompts.truncate(1);
        }
        for prompt in prompts {
            for (step, id) in differing(&file, device, exact, prompt) {
                wrong.push(format!(
                    "{} {device} exact={exact}: id {id} instead of {} at step {step}",
                    file.display(),
                    prompt.greedy[step],
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "nmse at most {limit:.0e}, all ids equal:\n{}",
        wrong.join("\n")
    );
}

/// Tests of a family on each device, in both modes.
macro_rules! families {
    ($($module:ident: $family:literal;)*) => {$(
        mod $module {
            #[test]
            fn cpu() {
                super::check($family, "cpu", false);
            }

            #[test]
            fn cpu_exact() {
                super::check($family, "cpu", true);
            }

            #[test]
            fn emulated() {
                super::check($family, "emulated", false);
            }

            #[test]
            fn emulated_exact() {
                super::check($family, "emulated", true);
            }
        }
    )*};
}

families! {
    llama: "llama";
    llama3rope: "llama3rope";
    mixtral: "mixtral";
    qwen2: "qwen2";
    qwen3: "qwen3";
    qwen3moe: "qwen3moe";
    gemma2: "gemma2";
    gemma3: "gemma3";
    phi2: "phi2";
    phi3: "phi3";
    gpt_oss: "gpt-oss";
    olmo2: "olmo2";
    olmo3: "olmo3";
    olmoe: "olmoe";
    granite: "granite";
    granitemoe: "granitemoe";
    smollm3: "smollm3";
    stablelm: "stablelm";
    starcoder2: "starcoder2";
    command_r: "command-r";
    cohere2: "cohere2";
    exaone4: "exaone4";
    seed_oss: "seed-oss";
}

/// A cache of 8 bits costs no more than weights of 8 bits do.
#[test]
fn caches_of_eight_bits() {
    for (family, device, exact) in [
        ("qwen3-Q8_0", "cpu", true),
        ("gemma3-Q8_0", "cpu", false),
        ("gpt-oss-F16", "cpu", true),
        ("qwen3-Q8_0", "emulated", true),
        // Prompts of many rows go through tensor cores, which read an unpacked copy.
        ("gemma2-Q8_0", "emulated", false),
    ] {
        let path = kigo_tests::golden_dir().join("tiny").join(family);
        let golden: Golden = read_json(&path.with_added_extension("golden.json"));
        let file = path.with_added_extension("gguf");
        let args = ["--cache-type", "q8_0"];
        let nmse = worst(&file, &golden.prompts, device, exact, &args);
        println!("{family} {device} exact={exact}: nmse {nmse:.1e}");
        assert!(nmse > 1e-9, "{family} {device}: no cache of 8 bits");
        assert!(nmse <= 5e-3, "{family} {device}: {nmse:.1e}");
    }
}

#[derive(Deserialize)]
struct Adapted {
    cases: Vec<AdaptedCase>,
}

#[derive(Deserialize)]
struct AdaptedCase {
    scales: [f32; 2],
    prompts: Vec<Prompt>,
}

/// Two LoRA adapters at several scales, against a model into whose weights they were merged.
fn check_adapters(device: &str, exact: bool) {
    let folder = kigo_tests::golden_dir().join("lora");
    let golden: Adapted = read_json(&folder.join("golden.json"));
    assert_eq!(golden.cases.len(), 4);
    for case in &golden.cases {
        let named = ["first.gguf", "second.gguf"].map(|name| folder.join(name));
        let named: Vec<String> = named
            .iter()
            .zip(case.scales)
            .filter(|(_, scale)| *scale != 0.0)
            .map(|(path, scale)| match scale {
                1.0 => path.display().to_string(),
                _ => format!("{}:{scale}", path.display()),
            })
            .collect();
        let args: Vec<&str> = named.iter().flat_map(|name| ["--lora", name]).collect();
        let nmse = worst(
            &folder.join("base.gguf"),
            &case.prompts,
            device,
            exact,
            &args,
        );
        println!(
            "{device} exact={exact} scales {:?}: {nmse:.1e}",
            case.scales
        );
        assert!(
            nmse <= limit(device, exact),
            "{device} exact={exact}, scales {:?}: nmse {nmse:.1e}",
            case.scales
        );
    }
}

#[test]
fn adapters_cpu() {
    check_adapters("cpu", false);
    check_adapters("cpu", true);
}

#[test]
fn adapters_emulated() {
    check_adapters("emulated", false);
    check_adapters("emulated", true);
}
