//! The beginning of a prompt that an earlier one had is reused, and what comes is, bit for bit, what a fresh
//! engine says: on models that see everything, that see windows, and that rotate long texts otherwise.

use kigo::engine::prefix::step_end;
use kigo::engine::{Engine, EngineConfig, EngineHandle, Event, ModelText, Request};
use kigo::gguf::Gguf;
use kigo::model::{CacheSize, DeviceChoice, LoadOptions, load};
use kigo::sampling::SamplingParams;
use kigo_tests::{golden_dir, model};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn engine(path: &Path, device: DeviceChoice, context: usize) -> EngineHandle {
    let file = Arc::new(Gguf::open(path).expect("a model"));
    let options = LoadOptions {
        device,
        context: Some(context),
        cache: CacheSize::UpTo(4 * context),
        ..LoadOptions::default()
    };
    let text = ModelText::from_gguf(&file).expect("a vocabulary");
    let runner = load(&file, &options, &mut |_| {}).expect("a runner");
    Engine::start(runner, Arc::new(text), EngineConfig::default()).expect("a thread")
}

/// Ids that begin as every other text's and part from them after `shared`.
fn prompt(shared: usize, len: usize, number: usize) -> Vec<u32> {
    (0..len)
        .map(|i| {
            let salt = if i < shared { 0 } else { number + 1 };
            (5 + (i * 31 + i / 7 + salt * 53) % 250) as u32
        })
        .collect()
}

/// What an engine says: ids, the first step's greatest logits, and how many tokens it found in its cache.
#[derive(Debug, PartialEq)]
struct Said {
    ids: Vec<u32>,
    top: Vec<(u32, u32)>,
    cached: usize,
}

fn ask(engine: &EngineHandle, prompt: &[u32], max_tokens: usize) -> Said {
    let request = Request {
        job_id: format!("{} {max_tokens}", prompt.len()),
        prompt: prompt.to_vec(),
        max_tokens,
        sampling: SamplingParams::greedy(),
        top_logits: 16,
        ..Request::default()
    };
    let mut job = engine.submit(request).expect("a job");
    let mut said = Said {
        ids: Vec::new(),
        top: Vec::new(),
        cached: 0,
    };
    while let Some(event) = job.blocking_next() {
        match event {
            Event::Token { id, top, .. } => {
                said.ids.push(id);
                let bits = top.into_iter().map(|(id, logit)| (id, logit.to_bits()));
                said.top.extend(bits);
            }
            Event::End(end) => said.cached = end.cached_tokens,
            Event::Error(failure) => panic!("{failure}"),
            Event::Started | Event::Embedding(_) => {}
        }
    }
    said
}

/// Rows of a step.
fn step_rows(device: DeviceChoice) -> usize {
    match device {
        DeviceChoice::Cpu => 512,
        _ => 2048,
    }
}

/// Asks one engine for prompts in turn, each given as a text, how much of it an earlier one shares, and how long
/// its answer may be. Every answer must be a fresh engine's, and as much must be reused as steps end within what
/// is shared.
fn check(path: &Path, device: DeviceChoice, context: usize, asked: &[(Vec<u32>, usize, usize)]) {
    let name = path.display();
    let used = engine(path, device, context);
    for (i, (prompt, shared, max_tokens)) in asked.iter().enumerate() {
        let said = ask(&used, prompt, *max_tokens);
        let fresh = ask(&engine(path, device, context), prompt, *max_tokens);
        assert_eq!(fresh.cached, 0);
        assert_eq!(said.ids, fresh.ids, "{name}, prompt {i}");
        assert_eq!(said.top, fresh.top, "{name}, prompt {i}");
        let most = *shared.min(&(prompt.len() - 1));
        let ends = std::iter::successors(Some(0), |&end| Some(step_end(end, step_rows(device))));
        let cached = ends.take_while(|&end| end <= most).last();
        assert_eq!(Some(said.cached), cached, "{name}, prompt {i}");
    }
}

fn tiny(name: &str) -> PathBuf {
    golden_dir().join("tiny").join(name)
}

fn device() -> DeviceChoice {
    kigo_tests::device().parse().expect("a device")
}

#[test]
fn every_token_is_that_of_a_fresh_run() {
    let asked = [
        (prompt(700, 700, 0), 0, 12),
        (prompt(700, 700, 0), 700, 12),
        (prompt(300, 600, 1), 300, 12),
        (prompt(300, 301, 2), 300, 12),
        (prompt(130, 900, 3), 130, 12),
        (prompt(100, 600, 4), 100, 12),
        (prompt(700, 800, 5), 700, 12),
    ];
    for name in ["llama-F16.gguf", "qwen2-256-Q4_K_M.gguf"] {
        check(&tiny(name), device(), 1024, &asked);
    }
}

#[test]
fn windows_are_kept_too() {
    // Of 4,096 tokens, layers that see 512 keep 1,056 on the CPU and 2,592 on a GPU.
    let asked = [
        (prompt(2700, 2700, 0), 0, 12),
        (prompt(2700, 2700, 0), 2700, 12),
        (prompt(1100, 1400, 1), 1100, 12),
        (prompt(600, 1700, 2), 600, 12),
        (prompt(2600, 2650, 3), 2600, 12),
    ];
    check(&model("gemma-3-270m-q4_k_m"), device(), 4096, &asked);
}

#[test]
fn texts_that_are_to_be_long_share_nothing_with_short_ones() {
    let path = tiny("phi3-longrope-F16.gguf");
    let file = Gguf::open(&path).expect("a model");
    let number = |key: &str| {
        let number = file.metadata().opt_u64(key).expect("a number");
        number.expect("a number") as usize
    };
    let original = number("phi3.rope.scaling.original_context_length");
    let context = number("phi3.context_length");
    let text = prompt(original - 20, original - 20, 0);
    // Ten more tokens stay within the original context, forty do not.
    let asked = [
        (text.clone(), 0, 10),
        (text.clone(), 0, 40),
        (text.clone(), text.len(), 40),
        (text.clone(), text.len(), 10),
    ];
    assert!(original + 20 <= context, "{original} of {context}");
    check(&path, DeviceChoice::Cpu, context, &asked);
}

#[test]
fn the_kernels_find_what_was_kept() {
    let asked = [(prompt(520, 520, 0), 0, 3), (prompt(520, 530, 1), 520, 3)];
    check(
        &tiny("llama-F16.gguf"),
        DeviceChoice::Emulated,
        1024,
        &asked,
    );
}
