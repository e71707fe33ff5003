//! Steps that begin before the host knows their tokens: the same tokens come of them as where the host chooses each from the logits
//! of a step of its own. In the emulator (the GPU's kernels, run on the host), or with `KIGO_TEST_DEVICE=cuda` on a GPU.

use kigo::device::{Batch, SampleRow, Span};
use kigo::gguf::Gguf;
use kigo::model::{CacheSize, DeviceChoice, LoadOptions, Runner, load};
use kigo::sampling::{SamplingParams, sample};
use kigo_tests::golden_dir;
use std::sync::Arc;

const CONTEXT: usize = 96;
const PROMPT: usize = 13;
const TOKENS: usize = 26;

/// The CPU begins none.
fn device() -> DeviceChoice {
    match kigo_tests::device().parse().expect("a device") {
        DeviceChoice::Cpu => DeviceChoice::Emulated,
        device => device,
    }
}

fn runner(name: &str) -> Box<dyn Runner> {
    let path = golden_dir().join("tiny").join(name);
    let file = Arc::new(Gguf::open(&path).expect("a model"));
    let options = LoadOptions {
        device: device(),
        context: Some(CONTEXT),
        cache: CacheSize::UpTo(CONTEXT),
        ..LoadOptions::default()
    };
    load(&file, &options, &mut |_| {}).expect("a runner")
}

/// A step of the last of `tokens` that are not in the cache yet.
fn forward(runner: &mut dyn Runner, tokens: &[u32], past: usize, goes_on: bool) {
    let len = tokens.len() - past;
    let batch = Batch {
        tokens: tokens[past..].to_vec(),
        spans: vec![Span {
            start: 0,
            len,
            past,
            blocks: (0..runner.cache_blocks() as u32).collect(),
            ..Span::default()
        }],
        outputs: vec![len - 1],
        goes_on,
    };
    runner.forward(&batch).expect("a step");
}

fn prompt() -> Vec<u32> {
    (0..PROMPT as u32).map(|i| 5 + 31 * i % 200).collect()
}

/// Distinct ids.
fn seen(tokens: &[u32]) -> Vec<u32> {
    let mut seen = tokens.to_vec();
    seen.sort_unstable();
    seen.dedup();
    seen
}

/// The tokens that the host chooses, each from the logits of its step, and these.
fn one_by_one(
    runner: &mut dyn Runner,
    params: &SamplingParams,
    seed: u64,
) -> (Vec<u32>, Vec<Vec<f32>>) {
    let (mut tokens, mut past) = (prompt(), 0);
    let mut all_logits = Vec::new();
    for index in 0..TOKENS as u64 {
        forward(runner, &tokens, past, false);
        past = tokens.len();
        let mut logits = runner.logits(0).expect("logits");
        all_logits.push(logits.clone());
        let row = SampleRow {
            params,
            seed,
            index,
            seen: &[],
            ahead: 0,
        };
        tokens.push(sample(params, row.u(), &seen(&tokens), &mut logits));
    }
    (tokens, all_logits)
}

fn next(
    runner: &mut dyn Runner,
    params: &SamplingParams,
    seed: u64,
    tokens: &[u32],
    ahead: usize,
) -> kigo::Result<Vec<u32>> {
    runner.sample(&[SampleRow {
        params,
        seed,
        index: (tokens.len() - PROMPT) as u64,
        seen: &seen(tokens),
        ahead,
    }])
}

/// As [`one_by_one`], with steps ahead; of each token from `left_at` on none. And how many steps had begun before they were asked for.
fn ahead(
    runner: &mut dyn Runner,
    params: &SamplingParams,
    seed: u64,
    left_at: usize,
) -> (Vec<u32>, usize) {
    let (mut tokens, mut past, mut begun) = (prompt(), 0, 0);
    while tokens.len() < PROMPT + TOKENS {
        begun += usize::from(runner.steps_begun() > 0);
        forward(runner, &tokens, past, past > 0);
        past = tokens.len();
        let left = left_at.saturating_sub(tokens.len() - PROMPT + 1);
        let ids = next(runner, params, seed, &tokens, left).expect("a token");
        tokens.extend(ids);
    }
    (tokens, begun)
}

fn params() -> [SamplingParams; 5] {
    let drawn = SamplingParams {
        temperature: 0.9,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        ..SamplingParams::default()
    };
    [
        SamplingParams::greedy(),
        SamplingParams::default(),
        drawn.clone(),
        SamplingParams {
            temperature: 2.0,
            top_p: 0.9,
            repetition_penalty: 1.6,
            ..drawn
        },
        SamplingParams {
            repetition_penalty: 1.3,
            ..SamplingParams::greedy()
        },
    ]
}

fn check(name: &str) {
    let mut runner = runner(name);
    let runner = &mut *runner;
    for (seed, params) in (1..).zip(params()) {
        let (expected, _) = one_by_one(runner, &params, seed);
        for left_at in [TOKENS, 11] {
            let (tokens, begun) = ahead(runner, &params, seed, left_at);
            assert_eq!(
                tokens, expected,
                "{name}, {params:?}, ahead until {left_at}"
            );
            // The first one goes on from a prompt, behind which none begins.
            let least = left_at - 2;
            assert!(begun >= least, "{name}, {params:?}: {begun} of {least}");
        }
    }
}

#[test]
fn tokens_are_those_of_steps_one_by_one() {
    check("llama-Q8_0.gguf");
    check("qwen2-256-Q4_K_M.gguf");
}

/// The next step may be one that has begun, of the same token at the same place, and be nobody's who knows of that.
#[test]
fn a_step_that_does_not_go_on_has_its_own_logits() {
    let mut runner = runner("llama-Q8_0.gguf");
    let runner = &mut *runner;
    let params = SamplingParams::default();
    let (expected, logits) = one_by_one(runner, &params, 3);
    let last = PROMPT + 9;
    let mut past = 0;
    for end in [PROMPT, PROMPT + 1, PROMPT + 2] {
        forward(runner, &expected[..end], past, past > 0);
        past = end;
        let id = next(runner, &params, 3, &expected[..end], TOKENS).expect("a token");
        assert_eq!(id, expected[end..=end]);
    }
    assert!(runner.steps_begun() > 1, "what this is about");
    for end in PROMPT + 3..=last {
        forward(runner, &expected[..end], past, false);
        past = end;
        assert_eq!(runner.logits(0).expect("logits"), logits[end - PROMPT]);
        // By other parameters: a choice of its own.
        let greedy = SamplingParams::greedy();
        let mut own = logits[end - PROMPT].clone();
        let id = next(runner, &greedy, 3, &expected[..end], 0).expect("a token");
        assert_eq!(id, [sample(&greedy, 0.0, &[], &mut own)]);
    }
}

#[test]
fn a_step_that_has_begun_chooses_by_the_parameters_it_began_with() {
    let mut runner = runner("llama-Q8_0.gguf");
    let runner = &mut *runner;
    let params = SamplingParams::default();
    let mut tokens = prompt();
    for _ in 0..2 {
        let past = if tokens.len() > PROMPT {
            tokens.len() - 1
        } else {
            0
        };
        forward(runner, &tokens, past, past > 0);
        let id = next(runner, &params, 3, &tokens, TOKENS).expect("a token");
        tokens.extend(id);
    }
    forward(runner, &tokens, tokens.len() - 1, true);
    for (params, seed) in [(SamplingParams::greedy(), 3), (params.clone(), 4)] {
        let error = next(runner, &params, seed, &tokens, 0).expect_err("other parameters");
        assert!(error.to_string().contains("other parameters"), "{error}");
    }
    next(runner, &params, 3, &tokens, 0).expect("its own");
}
