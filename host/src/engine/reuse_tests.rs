//! Prompts that begin alike: what is reused, and that nobody's answer depends on it.

use super::fake::FakeRunner;
use super::tests::{answer, assert_idle, drain, request, start};
use super::*;

/// A text of `len` letters that begins as every other one does and parts from them after `shared`.
fn prompt(shared: usize, len: usize, number: usize) -> String {
    let letter = |i: usize| {
        if i < shared {
            i % 23
        } else {
            (i + number) % 25
        }
    };
    (0..len)
        .map(|i| char::from(b'a' + letter(i) as u8))
        .collect()
}

/// The answer on an engine that has seen nothing else.
fn alone(prompt: &str, max_tokens: usize) -> String {
    let engine = start(FakeRunner::hashing(4096));
    let (text, end) = answer(&drain(engine.submit(request(prompt, max_tokens)).unwrap()));
    assert_eq!(end.cached_tokens, 0);
    text
}

#[test]
fn the_beginning_of_an_earlier_prompt_is_not_computed_again() {
    let runner = FakeRunner::hashing(4096);
    let steps = runner.steps.clone();
    let engine = start(runner);
    let run = |prompt: &str| {
        let before = steps.load(Ordering::SeqCst);
        let (text, end) = answer(&drain(engine.submit(request(prompt, 20)).unwrap()));
        assert_eq!(text, alone(prompt, 20));
        let steps = steps.load(Ordering::SeqCst) - before;
        (end.cached_tokens, steps - 19)
    };
    // Steps end at 128, 256, 512, 1,024, 1,536.
    let first = prompt(600, 1200, 0);
    assert_eq!(run(&first), (0, 5));
    assert_eq!(run(&first), (1024, 1));
    assert_eq!(run(&prompt(600, 1200, 1)), (512, 2));
    assert_eq!(run(&prompt(600, 700, 2)), (512, 1));
    assert_eq!(run(&prompt(600, 512, 3)), (256, 1), "a token must be left");
    assert_eq!(run(&prompt(600, 513, 3)), (512, 1));
    assert_eq!(run(&prompt(100, 1200, 4)), (0, 5));
    // A chat goes on: its earlier prompt is reused, the answer in between is not.
    let longer = format!("{first}{}{}", alone(&first, 20), prompt(0, 500, 5));
    assert_eq!(run(&longer), (1024, 2));
    assert_idle(&engine);
    let m = engine.metrics();
    assert_eq!(m.tokens_reused.get(), 1024 + 512 + 512 + 256 + 512 + 1024);
    let blocks = m.kv_blocks_total.get();
    assert_eq!(m.kv_blocks_free.get(), blocks, "what is kept can be had");
    assert!(m.kv_blocks_cached.get() > 0 && m.kv_blocks_cached.get() < blocks);
}

#[test]
fn those_that_run_share_their_beginning() {
    // A cache of 1,024 tokens: four prompts of 600 have room for their own ends only.
    let mut runner = FakeRunner::hashing(1024);
    runner.step_time = Duration::from_millis(1);
    let engine = start(runner);
    let prompts: Vec<String> = (0..4).map(|i| prompt(550, 600, i)).collect();
    drain(engine.submit(request(&prompts[0], 1)).unwrap());
    let jobs: Vec<Job> = prompts
        .iter()
        .map(|p| engine.submit(request(p, 60)).unwrap())
        .collect();
    for (prompt, job) in prompts.iter().zip(jobs) {
        let (text, end) = answer(&drain(job));
        assert_eq!(text, alone(prompt, 60));
        assert_eq!(end.cached_tokens, 512);
    }
    assert_idle(&engine);
}

#[test]
fn what_is_kept_gives_way_to_what_comes() {
    let engine = start(FakeRunner::hashing(512));
    for round in 0..3 {
        for number in 0..5 {
            let text = prompt(200, 400, number);
            let jobs: Vec<Job> = (0..3)
                .map(|_| engine.submit(request(&text, 100)).unwrap())
                .collect();
            for job in jobs {
                let (answer, end) = answer(&drain(job));
                assert_eq!(answer, alone(&text, 100), "{number} in round {round}");
                assert!(end.cached_tokens <= 256);
            }
        }
    }
    assert_idle(&engine);
}

#[test]
fn embeddings_see_every_token() {
    let engine = start(FakeRunner::hashing(1024));
    let text = prompt(400, 400, 0);
    drain(engine.submit(request(&text, 1)).unwrap());
    let embed = |engine: &EngineHandle| {
        let mut r = request(&text, 1);
        r.embed = Some(Pooling::Mean);
        drain(engine.submit(r).unwrap()).swap_remove(1)
    };
    let fresh = start(FakeRunner::hashing(1024));
    assert_eq!(embed(&engine), embed(&fresh));
}
