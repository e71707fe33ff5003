//! Steps with rows of several sequences: who is in them, who is not, and that each gets its own tokens.

use super::fake::{FakeRunner, device_failure};
use super::tests::{alone, answer, assert_idle, drain, request, start_with, wait_for_tokens};
use super::*;
use std::thread::JoinHandle;
use std::time::Duration;

/// Takes its time, so that requests that are submitted together meet.
fn slow(context: usize, milliseconds: u64) -> FakeRunner {
    let mut runner = FakeRunner::hashing(context);
    runner.step_time = Duration::from_millis(milliseconds);
    runner
}

/// All who can go together do, however long steps take.
fn always() -> EngineConfig {
    EngineConfig {
        min_batch: Some(2),
        ..EngineConfig::default()
    }
}

fn start(runner: FakeRunner) -> EngineHandle {
    start_with(runner, always())
}

/// Reads a job's events on a thread of its own.
fn read(job: Job) -> JoinHandle<Vec<Event>> {
    std::thread::spawn(|| drain(job))
}

fn read_all(jobs: Vec<Job>) -> Vec<Vec<Event>> {
    let threads: Vec<_> = jobs.into_iter().map(read).collect();
    threads.into_iter().map(|t| t.join().unwrap()).collect()
}

/// How many steps had rows of so many sequences, by their number.
fn steps_of(shapes: &Mutex<Vec<(usize, usize)>>, sequences: usize) -> usize {
    let shapes = shapes.lock().unwrap();
    shapes.iter().filter(|s| s.1 == sequences).count()
}

const PROMPTS: [&str; 4] = ["first", "second one", "third", "the fourth of them"];

#[test]
fn tokens_of_several_sequences_come_from_one_step() {
    let runner = slow(1024, 2);
    let (steps, shapes) = (runner.steps.clone(), runner.shapes.clone());
    let engine = start(runner);
    let jobs = PROMPTS.map(|p| engine.submit(request(p, 60)).unwrap());
    for (events, prompt) in read_all(jobs.into()).iter().zip(PROMPTS) {
        assert_eq!(answer(events).0, alone(prompt, 60));
    }
    // 240 tokens: four of a step but for the beginning and the end.
    let all = steps.load(Ordering::SeqCst);
    assert!(all < 100, "{all} steps for 4 times 60 tokens");
    assert!(steps_of(&shapes, 4) > 50);
    assert_idle(&engine);
    let m = engine.metrics();
    assert_eq!(m.tokens_out.get(), 240);
    let mut text = String::new();
    m.encode(&mut text).unwrap();
    assert!(text.contains("batch_rows_bucket{le=\"4.0\"}"), "{text}");
}

#[test]
fn no_more_go_together_than_the_setting_and_the_device_say() {
    for (device, setting, most) in [(8, Some(2), 2), (3, Some(100), 3), (8, Some(1), 1)] {
        let mut runner = slow(1024, 1);
        runner.max_batch = device;
        let shapes = runner.shapes.clone();
        let config = EngineConfig {
            max_batch: setting,
            ..always()
        };
        let engine = start_with(runner, config);
        let jobs = PROMPTS.map(|p| engine.submit(request(p, 40)).unwrap());
        for (events, prompt) in read_all(jobs.into()).iter().zip(PROMPTS) {
            assert_eq!(answer(events).0, alone(prompt, 40));
        }
        let found = shapes.lock().unwrap().iter().map(|s| s.1).max();
        assert_eq!(found, Some(most));
    }
}

#[test]
fn fewer_than_the_setting_says_take_turns() {
    for (sequences, together) in [(2, false), (3, true), (4, true)] {
        let runner = slow(1024, 1);
        let (lost, ahead) = (runner.lost.clone(), runner.ahead.clone());
        let shapes = runner.shapes.clone();
        let config = EngineConfig {
            min_batch: Some(3),
            ..EngineConfig::default()
        };
        let engine = start_with(runner, config);
        let prompts = &PROMPTS[..sequences];
        let jobs = prompts.iter().map(|p| engine.submit(request(p, 60)));
        let jobs = jobs.map(Result::unwrap).collect();
        for (events, prompt) in read_all(jobs).iter().zip(prompts) {
            assert_eq!(answer(events).0, alone(prompt, 60));
        }
        assert_eq!(steps_of(&shapes, sequences) > 50, together, "{sequences}");
        // Two that are left of three or four take turns again.
        assert_eq!(steps_of(&shapes, 2), 0, "{sequences}");
        assert_eq!(lost.load(Ordering::SeqCst), 0);
        // In turns steps begin ahead, as of one alone: all of a turn but the first.
        let ahead = ahead.load(Ordering::SeqCst);
        assert_eq!(ahead > 90, !together, "{ahead} steps of {sequences}");
        assert_idle(&engine);
    }
}

#[test]
fn what_is_faster_is_found_out() {
    // Milliseconds of a token alone and of a step of two.
    for (token, step, together) in [(1, 20, false), (2, 1, true)] {
        let mut runner = slow(1024, token);
        runner.together_time = Some(Duration::from_millis(step));
        let (lost, shapes) = (runner.lost.clone(), runner.shapes.clone());
        let engine = start_with(runner, EngineConfig::default());
        let prompts = &PROMPTS[..2];
        let jobs = prompts.iter().map(|p| engine.submit(request(p, 300)));
        let jobs = jobs.map(Result::unwrap).collect();
        for (events, prompt) in read_all(jobs).iter().zip(prompts) {
            assert_eq!(answer(events).0, alone(prompt, 300));
        }
        let found = steps_of(&shapes, 2);
        let expected = if together { 200..300 } else { 8..20 };
        assert!(expected.contains(&found), "{found} steps of both");
        assert_eq!(lost.load(Ordering::SeqCst), 0);
        assert_idle(&engine);
    }
}

#[test]
fn who_is_left_out_of_a_full_batch_comes_next() {
    let mut runner = slow(4096, 1);
    runner.max_batch = 3;
    let engine = start(runner);
    let mut jobs: Vec<Job> = (0..4)
        .map(|i| engine.submit(request(&format!("{i}"), 200)).unwrap())
        .collect();
    wait_for_tokens(&mut jobs[0], 60);
    let counts: Vec<usize> = jobs.iter().map(|j| j.status().tokens_out()).collect();
    let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
    assert!(most - least <= 12, "{counts:?}");
}

#[test]
fn nothing_begun_is_lost_as_others_join_and_leave() {
    let runner = slow(1024, 1);
    let (lost, ahead, shapes) = (
        runner.lost.clone(),
        runner.ahead.clone(),
        runner.shapes.clone(),
    );
    let engine = start(runner);
    let mut first = engine.submit(request("a", 300)).unwrap();
    wait_for_tokens(&mut first, 30);
    let alone_for = ahead.load(Ordering::SeqCst);
    assert!(
        alone_for >= 20,
        "{alone_for} steps began ahead of one alone"
    );
    let first = read(first);
    let joined = read(engine.submit(request("ab", 40)).unwrap());
    assert_eq!(answer(&joined.join().unwrap()).1.tokens_out, 40);
    assert!(steps_of(&shapes, 2) >= 38);
    let rest = first.join().unwrap();
    assert!(matches!(rest.last(), Some(Event::End(end)) if end.tokens_out == 300));
    // Alone again it goes on as before.
    assert!(ahead.load(Ordering::SeqCst) > alone_for + 100);
    assert_eq!(lost.load(Ordering::SeqCst), 0);
}

#[test]
fn a_long_prompt_and_a_batch_have_equal_shares() {
    let runner = slow(65_536, 2);
    let shapes = runner.shapes.clone();
    let engine = start(runner);
    let readers: Vec<_> = (0..4)
        .map(|i| {
            let job = engine.submit(request(&format!("{i}"), 2000)).unwrap();
            (job.canceller(), read(job))
        })
        .collect();
    while steps_of(&shapes, 4) < 5 {
        std::thread::sleep(Duration::from_millis(1));
    }
    shapes.lock().unwrap().clear();
    // 41 steps of 512 rows and less.
    let long: String = (0..20_000)
        .map(|i| char::from(b'a' + (i % 23) as u8))
        .collect();
    answer(&drain(engine.submit(request(&long, 1)).unwrap()));
    let (prompt, batch) = {
        let shapes = shapes.lock().unwrap();
        let count = |f: fn(&&(usize, usize)) -> bool| shapes.iter().filter(f).count();
        (count(|s| s.0 > s.1), count(|s| s.1 == 4))
    };
    assert!(prompt >= 40, "{prompt} steps of the prompt");
    assert!(
        batch.abs_diff(prompt) <= 8,
        "{batch} steps of the batch, {prompt} of the prompt"
    );
    for (canceller, reader) in readers {
        canceller.cancel();
        reader.join().unwrap();
    }
    assert_idle(&engine);
}

#[test]
fn batches_that_outgrow_the_cache_give_way_and_lose_nothing() {
    // Four of up to 210 tokens in a cache of 256, met by a step that takes its time.
    let runner = slow(256, 1);
    let shapes = runner.shapes.clone();
    let engine = start(runner);
    let jobs = PROMPTS.map(|p| engine.submit(request(p, 190)).unwrap());
    for (events, prompt) in read_all(jobs.into()).iter().zip(PROMPTS) {
        let (text, end) = answer(events);
        assert_eq!(end.tokens_out, 190);
        assert_eq!(text, alone(prompt, 190), "{prompt}");
    }
    assert!(steps_of(&shapes, 4) > 10, "all of them at first");
    assert!(steps_of(&shapes, 1) > 10, "then fewer");
    assert_idle(&engine);
    assert_eq!(engine.metrics().tokens_out.get(), 4 * 190);
}

#[test]
fn cancelling_one_of_several_stops_its_rows_within_a_step() {
    let runner = slow(4096, 5);
    let steps = runner.steps.clone();
    let engine = start(runner);
    let mut leaving = engine.submit(request("x", 2000)).unwrap();
    let staying = engine.submit(request("y", 40)).unwrap();
    wait_for_tokens(&mut leaving, 10);
    let before = (steps.load(Ordering::SeqCst), leaving.status().tokens_out());
    leaving.canceller().cancel();
    let status = leaving.status().tokens_out();
    let events = drain(leaving);
    match events.last() {
        Some(Event::End(end)) => {
            assert_eq!(end.stop_reason, StopReason::Cancelled);
            assert!(end.tokens_out <= status.max(before.1) + 1);
        }
        other => panic!("{other:?}"),
    }
    assert!(steps.load(Ordering::SeqCst) - before.0 <= 2);
    assert_eq!(answer(&drain(staying)).0, alone("y", 40));
    assert_idle(&engine);
}

#[test]
fn a_device_failure_ends_every_member() {
    let mut runner = slow(1024, 2);
    runner.fail_at = Some((12, device_failure));
    let engine = start(runner);
    let jobs = ["a", "b", "c"].map(|p| engine.submit(request(p, 100)).unwrap());
    for events in read_all(jobs.into()) {
        assert!(matches!(events.last(), Some(Event::Error(_))), "{events:?}");
    }
    assert_idle(&engine);
}

#[test]
fn a_member_that_fails_ends_alone() {
    let engine = start(slow(1024, 2));
    let mut bad = request("bad", 100);
    let mut constraint = engine
        .compile(&Grammar::JsonSchema(serde_json::json!({ "enum": ["a"] })))
        .unwrap();
    // It has had a token that it does not allow: the next use fails.
    let _ = constraint.take(u32::from(b'z'));
    bad.constraint = Some(constraint);
    let jobs = vec![
        engine.submit(request("first", 50)).unwrap(),
        engine.submit(bad).unwrap(),
        engine.submit(request("third", 50)).unwrap(),
    ];
    let events = read_all(jobs);
    assert!(matches!(events[1].last(), Some(Event::Error(_))));
    assert_eq!(answer(&events[0]).0, alone("first", 50));
    assert_eq!(answer(&events[2]).0, alone("third", 50));
    assert_idle(&engine);
}

/// Requests that are chosen for on the device and on the host, with and without what is reported of logits.
fn mixed(engine: &EngineHandle) -> Vec<Request> {
    let schema = serde_json::json!({
        "type": "array", "items": { "enum": ["yes", "no"] }, "minItems": 4, "maxItems": 4
    });
    let grammar = Request {
        constraint: Some(engine.compile(&Grammar::JsonSchema(schema)).unwrap()),
        ..request("grammar", 60)
    };
    let mut chain = request("chain", 60);
    chain.chain.presence_penalty = 2.0;
    let mut drawn = request("drawn", 60);
    drawn.sampling = SamplingParams {
        seed: Some(5),
        temperature: 1.0,
        ..SamplingParams::default()
    };
    vec![
        grammar,
        request("plain", 60),
        Request {
            logprobs: Some(3),
            top_logits: 2,
            ..request("logprobs", 60)
        },
        chain,
        drawn,
        Request {
            logit_bias: vec![(u32::from(b'e'), 700.0)],
            logprobs: Some(2),
            ..request("bias", 60)
        },
    ]
}

/// What came, without the times.
fn said(events: &[Event]) -> Vec<&Event> {
    let tokens = events.iter().filter(|e| matches!(e, Event::Token { .. }));
    tokens.collect()
}

#[test]
fn members_are_chosen_for_each_in_its_own_way() {
    let engine = start(slow(1024, 2));
    let alone: Vec<Vec<Event>> = mixed(&engine)
        .into_iter()
        .map(|r| drain(engine.submit(r).unwrap()))
        .collect();
    let runner = slow(1024, 2);
    let shapes = runner.shapes.clone();
    let engine = start(runner);
    let jobs = mixed(&engine);
    let jobs = jobs
        .into_iter()
        .map(|r| engine.submit(r).unwrap())
        .collect();
    for (i, (together, alone)) in read_all(jobs).iter().zip(&alone).enumerate() {
        assert_eq!(said(together), said(alone), "request {i}");
    }
    assert!(steps_of(&shapes, 6) > 10, "all of them together");
    assert_idle(&engine);
}

#[test]
fn who_reads_nothing_is_left_out() {
    let runner = slow(4096, 0);
    let shapes = runner.shapes.clone();
    let engine = start(runner);
    let lazy = engine.submit(request("lazy", 1000)).unwrap();
    let keen = read(engine.submit(request("keen", 1500)).unwrap());
    assert_eq!(
        answer(&keen.join().unwrap()).0,
        alone_in(4096, "keen", 1500)
    );
    assert!(lazy.status().tokens_out() < EVENT_BUFFER);
    assert!(steps_of(&shapes, 2) <= EVENT_BUFFER);
    // It goes on where it stopped once somebody reads.
    assert_eq!(answer(&drain(lazy)).0, alone_in(4096, "lazy", 1000));
    assert_idle(&engine);
}

fn alone_in(context: usize, prompt: &str, max_tokens: usize) -> String {
    let engine = start(FakeRunner::hashing(context));
    answer(&drain(engine.submit(request(prompt, max_tokens)).unwrap())).0
}

#[test]
fn embeddings_and_answers_do_not_mix() {
    let runner = slow(4096, 1);
    let engine = start(runner);
    let answers: Vec<_> = PROMPTS
        .iter()
        .map(|p| read(engine.submit(request(p, 60)).unwrap()))
        .collect();
    let text: String = "hidden states ".repeat(60);
    let mut r = request(&text, 1);
    r.embed = Some(Pooling::Mean);
    let together = drain(engine.submit(r.clone()).unwrap());
    for (reader, prompt) in answers.into_iter().zip(PROMPTS) {
        assert_eq!(answer(&reader.join().unwrap()).0, alone(prompt, 60));
    }
    let engine = start(FakeRunner::hashing(4096));
    let alone = drain(engine.submit(r).unwrap());
    assert_eq!(together[1], alone[1]);
    assert!(matches!(together[1], Event::Embedding(_)));
}

#[test]
fn one_member_left_is_one_alone() {
    let runner = slow(1024, 1);
    let ahead = runner.ahead.clone();
    let engine = start(runner);
    let short = read(engine.submit(request("a", 5)).unwrap());
    let long = read(engine.submit(request("b", 200)).unwrap());
    short.join().unwrap();
    assert_eq!(answer(&long.join().unwrap()).0, alone("b", 200));
    assert!(ahead.load(Ordering::SeqCst) > 100);
}
