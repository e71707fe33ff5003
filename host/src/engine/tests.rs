//! The engine against a model that is a function.

use super::fake::{ByteText, FakeRunner, VOCABULARY, device_failure};
use super::*;
use std::sync::Arc;
use std::time::Duration;

pub(super) fn start(runner: FakeRunner) -> EngineHandle {
    start_with(runner, EngineConfig::default())
}

pub(super) fn start_with(runner: FakeRunner, config: EngineConfig) -> EngineHandle {
    Engine::start(Box::new(runner), Arc::new(ByteText::PLAIN), config).unwrap()
}

static JOBS: AtomicUsize = AtomicUsize::new(0);

pub(super) fn request(prompt: &str, max_tokens: usize) -> Request {
    Request {
        job_id: format!("job {}", JOBS.fetch_add(1, Ordering::Relaxed)),
        prompt: prompt.bytes().map(u32::from).collect(),
        max_tokens,
        sampling: SamplingParams {
            seed: Some(7),
            ..SamplingParams::greedy()
        },
        ..Request::default()
    }
}

/// All events of a job.
pub(super) fn drain(mut job: Job) -> Vec<Event> {
    std::iter::from_fn(|| job.blocking_next()).collect()
}

/// The answer and how it ended; checks the order of events.
pub(super) fn answer(events: &[Event]) -> (String, End) {
    assert_eq!(events[0], Event::Started);
    let mut text = String::new();
    for (i, event) in events[1..events.len() - 1].iter().enumerate() {
        match event {
            Event::Token {
                index, text: piece, ..
            } => {
                assert_eq!(*index, i);
                text.push_str(piece);
            }
            other => panic!("{other:?} in the middle"),
        }
    }
    match events.last() {
        Some(Event::End(end)) => {
            assert_eq!(end.tokens_out, events.len() - 2);
            (text, end.clone())
        }
        other => panic!("{other:?} at the end"),
    }
}

/// Waits for the thread to have nothing left, then checks that it gave everything back.
pub(super) fn assert_idle(engine: &EngineHandle) {
    let m = engine.metrics();
    for _ in 0..500 {
        if m.running.get() == 0 && m.queued.get() == 0 && m.kv_blocks_used.get() == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!(
        "running {}, queued {}, blocks in use {}",
        m.running.get(),
        m.queued.get(),
        m.kv_blocks_used.get()
    );
}

#[test]
fn steps_that_began_ahead_are_not_lost_to_others() {
    let mut runner = FakeRunner::hashing(1024);
    runner.max_batch = 1;
    let (lost, ahead) = (Arc::clone(&runner.lost), Arc::clone(&runner.ahead));
    let engine = start(runner);
    let jobs: Vec<Job> = (0..4)
        .map(|i| engine.submit(request(&"ab"[..1 + i % 2], 100)).unwrap())
        .collect();
    // All at once, as their clients read.
    let drained: Vec<_> = jobs
        .into_iter()
        .map(|job| std::thread::spawn(|| drain(job)))
        .collect();
    for events in drained {
        assert_eq!(answer(&events.join().unwrap()).1.tokens_out, 100);
    }
    assert_eq!(lost.load(Ordering::SeqCst), 0);
    // Most of them did.
    assert!(ahead.load(Ordering::SeqCst) > 200);
    assert_idle(&engine);
}

#[test]
fn an_answer_ends_at_the_end_token() {
    let engine = start(FakeRunner::script(64, 2, "hello"));
    let (text, end) = answer(&drain(engine.submit(request("ab", 20)).unwrap()));
    assert_eq!(text, "hello");
    assert_eq!(end.stop_reason, StopReason::Eos);
    assert_eq!((end.tokens_out, end.prompt_tokens), (6, 2));
    assert_idle(&engine);
    let m = engine.metrics();
    assert_eq!((m.tokens_in.get(), m.tokens_out.get()), (2, 6));
}

#[test]
fn an_answer_ends_at_max_tokens_with_half_a_character_replaced() {
    let engine = start(FakeRunner::script(64, 1, "né"));
    let (text, end) = answer(&drain(engine.submit(request("x", 2)).unwrap()));
    assert_eq!(
        (text.as_str(), end.stop_reason),
        ("n\u{fffd}", StopReason::MaxTokens)
    );
}

#[test]
fn a_stop_string_is_matched_across_tokens_and_not_shown() {
    let engine = start(FakeRunner::script(64, 1, "one, two, three"));
    let mut r = request("x", 30);
    r.stop = vec!["zzz".to_owned(), ", t".to_owned()];
    let (text, end) = answer(&drain(engine.submit(r).unwrap()));
    assert_eq!(
        (text.as_str(), end.stop_reason),
        ("one", StopReason::StopSequence)
    );
    assert_eq!(end.stop_sequence.as_deref(), Some(", t"));
    assert_eq!(end.tokens_out, 6);
    assert_idle(&engine);
}

#[test]
fn text_held_back_for_a_stop_string_comes_at_the_end() {
    let engine = start(FakeRunner::script(64, 1, "one,"));
    let mut r = request("x", 30);
    r.stop = vec![", t".to_owned()];
    let (text, end) = answer(&drain(engine.submit(r).unwrap()));
    assert_eq!((text.as_str(), end.stop_reason), ("one,", StopReason::Eos));
}

#[test]
fn a_long_prompt_goes_in_chunks_over_many_blocks() {
    let prompt: String = (0..1300)
        .map(|i| char::from(b'a' + (i % 23) as u8))
        .collect();
    let runner = FakeRunner::hashing(2048);
    let steps = runner.steps.clone();
    let engine = start(runner);
    // The cache's last contents must not matter: another sequence goes first.
    drain(engine.submit(request("something else", 100)).unwrap());
    let before = steps.load(Ordering::SeqCst);
    let (text, _) = answer(&drain(engine.submit(request(&prompt, 70)).unwrap()));
    // Steps end at 128, 256, 512, 1,024 and the prompt's end.
    assert_eq!(steps.load(Ordering::SeqCst) - before, 5 + 69);

    let mut direct = Direct::new(Box::new(FakeRunner::hashing(2048)));
    let mut id_text = String::new();
    direct.feed(&request(&prompt, 1).prompt).unwrap();
    for _ in 0..70 {
        let id = direct.sample_greedy().unwrap();
        id_text.push(char::from(id as u8));
        direct.feed(&[id]).unwrap();
    }
    assert_eq!(text, id_text);
}

#[test]
fn requests_are_served_in_order_and_do_not_mix() {
    let engine = start(FakeRunner::hashing(256));
    let prompts = ["first", "second", "third"];
    let jobs: Vec<Job> = prompts
        .iter()
        .map(|p| engine.submit(request(p, 40)).unwrap())
        .collect();
    let together: Vec<String> = jobs.into_iter().map(|j| answer(&drain(j)).0).collect();
    for (prompt, text) in prompts.iter().zip(&together) {
        let alone = start(FakeRunner::hashing(256));
        assert_eq!(
            &answer(&drain(alone.submit(request(prompt, 40)).unwrap())).0,
            text
        );
    }
    assert_ne!(together[0], together[1]);
    assert_idle(&engine);
}

#[test]
fn the_same_seed_gives_the_same_tokens_and_another_seed_others() {
    let engine = start(FakeRunner::hashing(256));
    let run = |seed| {
        let mut r = request("x", 60);
        r.sampling = SamplingParams {
            seed,
            temperature: 1.0,
            ..SamplingParams::default()
        };
        let job = engine.submit(r).unwrap();
        (job.seed, answer(&drain(job)).0)
    };
    let (seed, text) = run(None);
    assert!(seed < 1 << 53);
    assert_eq!(run(Some(seed)), (seed, text.clone()));
    assert_eq!(run(Some(3)).0, 3);
    assert_ne!(run(Some(3)).1, run(Some(4)).1);
}

#[test]
fn cancelling_stops_within_a_step() {
    let mut runner = FakeRunner::hashing(4096);
    runner.step_time = Duration::from_millis(5);
    let steps = runner.steps.clone();
    let engine = start(runner);
    let mut job = engine.submit(request("x", 2000)).unwrap();
    let canceller = job.canceller();
    let mut seen = 0;
    while seen < 5 {
        if let Some(Event::Token { .. }) = job.blocking_next() {
            seen += 1;
        }
    }
    let before = steps.load(Ordering::SeqCst);
    canceller.cancel();
    let events = drain(job);
    match events.last() {
        Some(Event::End(end)) => assert_eq!(end.stop_reason, StopReason::Cancelled),
        other => panic!("{other:?}"),
    }
    assert!(steps.load(Ordering::SeqCst) - before <= 1);
    assert_idle(&engine);
}

#[test]
fn a_dropped_job_stops_within_a_step_and_the_next_one_runs() {
    let mut runner = FakeRunner::hashing(4096);
    runner.step_time = Duration::from_millis(5);
    let steps = runner.steps.clone();
    let engine = start(runner);
    let mut job = engine.submit(request("x", 2000)).unwrap();
    while !matches!(job.blocking_next(), Some(Event::Token { .. })) {}
    let before = steps.load(Ordering::SeqCst);
    drop(job);
    let next = engine.submit(request("y", 3)).unwrap();
    let (_, end) = answer(&drain(next));
    assert_eq!(end.stop_reason, StopReason::MaxTokens);
    assert!(steps.load(Ordering::SeqCst) - before <= 1 + 3);
    assert_idle(&engine);
    let cancelled = OutcomeLabel {
        outcome: Outcome::Cancelled,
    };
    assert_eq!(engine.metrics().requests.get_or_create(&cancelled).get(), 1);
}

#[test]
fn a_job_cancelled_in_the_queue_never_starts() {
    let mut runner = FakeRunner::hashing(4096);
    runner.step_time = Duration::from_millis(5);
    let engine = start_with(runner, one_at_a_time());
    let first = engine.submit(request("x", 20)).unwrap();
    let second = engine.submit(request("y", 20)).unwrap();
    second.canceller().cancel();
    let events = drain(second);
    assert!(
        matches!(
            &events[..],
            [Event::End(End {
                stop_reason: StopReason::Cancelled,
                tokens_out: 0,
                ..
            })]
        ),
        "{events:?}"
    );
    answer(&drain(first));
    assert_idle(&engine);
}

#[test]
fn a_panic_becomes_an_error_for_every_job_and_no_hang() {
    let mut runner = FakeRunner::hashing(256);
    runner.step_time = Duration::from_millis(5);
    runner.panic_at = Some(3);
    let engine = start(runner);
    let first = engine.submit(request("x", 50)).unwrap();
    let waiting = engine.submit(request("y", 50)).unwrap();
    for job in [first, waiting] {
        match drain(job).last() {
            Some(Event::Error(failure)) => {
                assert_eq!(failure.code, Code::Internal);
                assert!(failure.message.contains("asked to"), "{failure}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(engine.broken().is_some());
    assert!(engine.submit(request("z", 1)).is_err());
    assert_idle(&engine);
}

#[test]
fn a_device_failure_is_reported_and_blocks_are_given_back() {
    let mut runner = FakeRunner::hashing(256);
    runner.fail_at = Some((2, device_failure));
    let engine = start(runner);
    let events = drain(engine.submit(request("x", 50)).unwrap());
    assert!(matches!(events.last(), Some(Event::Error(_))), "{events:?}");
    assert_eq!(events.len(), 1 + 2 + 1, "Started, two tokens, Error");
    assert_idle(&engine);
}

#[test]
fn the_first_token_brings_the_top_logits_when_asked() {
    let engine = start(FakeRunner::script(64, 1, "ab"));
    let mut r = request("x", 5);
    r.top_logits = 2;
    let tops: Vec<_> = drain(engine.submit(r).unwrap())
        .into_iter()
        .filter_map(|e| match e {
            Event::Token { top, .. } => Some(top),
            _ => None,
        })
        .collect();
    let (a, b) = (u32::from(b'a'), u32::from(b'b'));
    assert_eq!(tops, [vec![(a, 1000.0), (b, 999.5)], vec![], vec![]]);
}

#[test]
fn what_cannot_be_served_is_refused_at_once() {
    let engine = start(FakeRunner::hashing(64));
    let refused = |r: Request| match engine.submit(r) {
        Err(failure) => {
            assert_eq!(failure.code, Code::InvalidRequest);
            failure.message
        }
        Ok(_) => panic!("accepted"),
    };
    assert!(refused(request("", 5)).contains("no tokens"));
    assert!(refused(request("x", 0)).contains("max_tokens"));
    assert!(refused(request("x", 64)).contains("64 tokens in all"));
    assert!(refused(request("x", usize::MAX)).contains("64 tokens in all"));
    let mut r = request("x", 5);
    r.prompt.push(VOCABULARY as u32);
    assert!(refused(r).contains("vocabulary"));
    let mut r = request("x", 5);
    r.sampling.top_p = 2.0;
    assert!(refused(r).contains("top_p"));
    assert!(engine.submit(request("x", 63)).is_ok());
}

#[test]
fn the_thread_finishes_its_work_when_the_last_handle_goes() {
    let mut runner = FakeRunner::script(64, 1, "hello");
    runner.step_time = Duration::from_millis(2);
    let engine = start(runner);
    let job = engine.submit(request("x", 20)).unwrap();
    drop(engine);
    assert_eq!(answer(&drain(job)).0, "hello");
}

pub(super) fn one_at_a_time() -> EngineConfig {
    EngineConfig {
        max_running: 1,
        ..EngineConfig::default()
    }
}

fn refusal(engine: &EngineHandle, request: Request) -> Failure {
    match engine.submit(request) {
        Err(failure) => failure,
        Ok(_) => panic!("accepted"),
    }
}

pub(super) fn wait_for_tokens(job: &mut Job, n: usize) {
    let mut seen = 0;
    while seen < n {
        match job.blocking_next() {
            Some(Event::Token { .. }) => seen += 1,
            Some(Event::Started) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_short_request_is_not_held_up_by_long_ones() {
    let mut runner = FakeRunner::hashing(8192);
    runner.step_time = Duration::from_millis(1);
    let steps = runner.steps.clone();
    let engine = start(runner);
    let mut long: Vec<Job> = (0..3)
        .map(|i| engine.submit(request(&format!("long {i}"), 250)).unwrap())
        .collect();
    for job in &mut long {
        wait_for_tokens(job, 3);
    }
    let before = steps.load(Ordering::SeqCst);
    let short = engine.submit(request("short", 5)).unwrap();
    assert_eq!(answer(&drain(short)).1.tokens_out, 5);
    let took = steps.load(Ordering::SeqCst) - before;
    // Four in turns: five steps of its own, and as many of each other's.
    assert!(took <= 4 * 5 + 8, "{took} steps for five tokens");
    drop(long);
    assert_idle(&engine);
}

#[test]
fn turns_are_even() {
    let mut runner = FakeRunner::hashing(4096);
    runner.step_time = Duration::from_millis(2);
    let engine = start(runner);
    let mut a = engine.submit(request("a", 200)).unwrap();
    let b = engine.submit(request("b", 200)).unwrap();
    wait_for_tokens(&mut a, 60);
    let (a, b) = (a.status().tokens_out(), b.status().tokens_out());
    assert!(a.abs_diff(b) <= 12, "{a} and {b} tokens");
}

#[test]
fn a_full_queue_refuses_and_says_when_to_come_back() {
    let mut runner = FakeRunner::hashing(4096);
    runner.step_time = Duration::from_millis(5);
    let config = EngineConfig {
        max_queue: 2,
        ..one_at_a_time()
    };
    let engine = start_with(runner, config);
    let mut first = engine.submit(request("a", 1000)).unwrap();
    wait_for_tokens(&mut first, 1);
    let second = engine.submit(request("b", 5)).unwrap();
    let third = engine.submit(request("c", 5)).unwrap();
    let failure = refusal(&engine, request("d", 5));
    assert_eq!(failure.code, Code::QueueFull);
    assert!(failure.retry_after >= Some(1));
    wait_for_tokens(&mut first, 2);
    assert_eq!(first.status().queue_position(), 0);
    assert_eq!(second.status().queue_position(), 1);
    assert_eq!(third.status().queue_position(), 2);
    drop(first);
    answer(&drain(second));
    answer(&drain(third));
    assert!(engine.submit(request("e", 1)).is_ok());
    let refused = OutcomeLabel {
        outcome: Outcome::Refused,
    };
    assert_eq!(engine.metrics().requests.get_or_create(&refused).get(), 1);
}

#[test]
fn an_id_is_taken_until_its_job_has_ended() {
    let mut runner = FakeRunner::hashing(4096);
    runner.step_time = Duration::from_millis(2);
    let engine = start(runner);
    let r = request("x", 500);
    let mut job = engine.submit(r.clone()).unwrap();
    wait_for_tokens(&mut job, 1);
    assert_eq!(refusal(&engine, r.clone()).code, Code::JobExists);
    assert!(engine.cancel(&r.job_id));
    assert!(!engine.cancel("no such job"));
    match drain(job).last() {
        Some(Event::End(end)) => assert_eq!(end.stop_reason, StopReason::Cancelled),
        other => panic!("{other:?}"),
    }
    // Free by the time the end was told.
    let short = Request { max_tokens: 1, ..r };
    answer(&drain(engine.submit(short).unwrap()));
    assert_eq!(engine.in_flight(), 0);
}

#[test]
fn a_deadline_ends_what_runs_and_what_waits() {
    let mut runner = FakeRunner::hashing(4096);
    runner.step_time = Duration::from_millis(5);
    let engine = start_with(runner, one_at_a_time());
    let soon = |mut r: Request| {
        r.deadline = Some(Instant::now() + Duration::from_millis(100));
        r
    };
    let running = engine.submit(soon(request("a", 2000))).unwrap();
    let waiting = engine.submit(soon(request("b", 2000))).unwrap();
    for (job, starts) in [(running, true), (waiting, false)] {
        let events = drain(job);
        assert_eq!(events[0] == Event::Started, starts);
        match events.last() {
            Some(Event::Error(failure)) => assert_eq!(failure.code, Code::InferenceTimeout),
            other => panic!("{other:?}"),
        }
    }
    assert_idle(&engine);
    let mut runner = FakeRunner::hashing(4096);
    runner.step_time = Duration::from_millis(5);
    let config = EngineConfig {
        timeout: Some(Duration::from_millis(50)),
        ..EngineConfig::default()
    };
    let engine = start_with(runner, config);
    let events = drain(engine.submit(request("a", 2000)).unwrap());
    assert!(matches!(events.last(), Some(Event::Error(_))));
}

#[test]
fn a_draining_engine_finishes_its_work_and_takes_no_more() {
    let mut runner = FakeRunner::hashing(4096);
    runner.step_time = Duration::from_millis(2);
    let engine = start(runner);
    let mut job = engine.submit(request("x", 30)).unwrap();
    wait_for_tokens(&mut job, 1);
    engine.drain();
    assert_eq!(refusal(&engine, request("y", 1)).code, Code::Draining);
    let events = drain(job);
    assert!(matches!(events.last(), Some(Event::End(end)) if end.tokens_out == 30));
}

/// What each prompt gives on an engine of its own.
pub(super) fn alone(prompt: &str, max_tokens: usize) -> String {
    let engine = start(FakeRunner::hashing(1024));
    answer(&drain(engine.submit(request(prompt, max_tokens)).unwrap())).0
}

#[test]
fn sequences_that_outgrow_the_cache_give_way_and_lose_nothing() {
    // Four of up to 210 tokens in a cache of 256: most are put back and worked on again.
    let engine = start(FakeRunner::hashing(256));
    let prompts = ["first", "second one", "third", "the fourth of them"];
    let jobs: Vec<Job> = prompts
        .iter()
        .map(|p| engine.submit(request(p, 190)).unwrap())
        .collect();
    for (prompt, job) in prompts.iter().zip(jobs) {
        let (text, end) = answer(&drain(job));
        assert_eq!(end.tokens_out, 190);
        assert_eq!(text, alone(prompt, 190), "{prompt}");
    }
    assert_idle(&engine);
    let m = engine.metrics();
    let prompt_tokens: usize = prompts.iter().map(|p| p.len()).sum();
    assert_eq!(m.tokens_in.get(), prompt_tokens as u64);
    assert_eq!(m.tokens_out.get(), 4 * 190);
}

#[test]
fn a_client_that_reads_nothing_pauses_its_own_work_only() {
    let runner = FakeRunner::hashing(4096);
    let steps = runner.steps.clone();
    let engine = start(runner);
    let lazy = engine.submit(request("lazy", 2000)).unwrap();
    let paused = || {
        let before = steps.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(50));
        before > 0 && steps.load(Ordering::SeqCst) == before
    };
    while !paused() {}
    assert!(steps.load(Ordering::SeqCst) < EVENT_BUFFER);
    answer(&drain(engine.submit(request("keen", 50)).unwrap()));
    // It goes on where it stopped once somebody reads.
    assert_eq!(answer(&drain(lazy)).1.tokens_out, 2000);
    assert_idle(&engine);
}

#[test]
fn a_client_that_reads_nothing_gives_way_to_those_who_wait() {
    let config = EngineConfig {
        stall: Duration::from_millis(50),
        ..one_at_a_time()
    };
    let engine = start_with(FakeRunner::hashing(4096), config);
    let lazy = engine.submit(request("lazy", 2000)).unwrap();
    let (_, end) = answer(&drain(engine.submit(request("keen", 50)).unwrap()));
    assert_eq!(end.tokens_out, 50);
    match drain(lazy).last() {
        Some(Event::Error(failure)) => assert_eq!(failure.code, Code::Cancelled),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_grammar_shapes_the_answer_and_ends_it() {
    let engine = start(FakeRunner::hashing(256));
    let schema = serde_json::json!({ "enum": ["yes", "no"] });
    let mut r = request("x", 50);
    r.constraint = Some(engine.compile(&Grammar::JsonSchema(schema)).unwrap());
    let (text, end) = answer(&drain(engine.submit(r).unwrap()));
    assert!(text == "\"yes\"" || text == "\"no\"", "{text}");
    assert_eq!(end.stop_reason, StopReason::Eos);
}

#[test]
fn biases_and_chains_reach_the_choice() {
    let engine = start(FakeRunner::script(64, 1, "aaaa"));
    let mut r = request("x", 3);
    r.logit_bias = vec![(u32::from(b'a'), -2000.0)];
    // The runner-up is the next letter.
    assert_eq!(answer(&drain(engine.submit(r).unwrap())).0, "bbb");
    let mut r = request("x", 4);
    r.chain.presence_penalty = 2.0;
    let (text, _) = answer(&drain(engine.submit(r).unwrap()));
    assert_eq!(
        text, "abaa",
        "a lies 0.5 above b; each loses 2 once it was there"
    );
}

#[test]
fn log_probabilities_come_with_each_token() {
    let engine = start(FakeRunner::script(64, 1, "ab"));
    let mut r = request("x", 5);
    r.logprobs = Some(2);
    let mut tokens = 0;
    for event in drain(engine.submit(r).unwrap()) {
        if let Event::Token { id, logprobs, .. } = event {
            tokens += 1;
            let logprobs = logprobs.unwrap();
            // Two logits, 1000 and 999.5, are all that counts.
            let expected = -(1.0 + (-0.5f32).exp()).ln();
            assert!((logprobs.chosen - expected).abs() < 1e-4);
            assert_eq!(logprobs.top.len(), 2);
            assert_eq!(logprobs.top[0].0, id);
            assert!((logprobs.top[1].1 - (expected - 0.5)).abs() < 1e-4);
        }
    }
    assert_eq!(tokens, 3, "a, b and the end");
}

#[test]
fn embeddings_are_pooled_over_the_whole_prompt() {
    // 1,300 tokens go in five steps; the fake's hidden state is the token and its position.
    let prompt: String = (0..1300)
        .map(|i| char::from(b'a' + (i % 23) as u8))
        .collect();
    let engine = start(FakeRunner::hashing(2048));
    let run = |pooling| {
        let mut r = request(&prompt, 1);
        r.embed = Some(pooling);
        let events = drain(engine.submit(r).unwrap());
        match &events[..] {
            [Event::Started, Event::Embedding(vector), Event::End(end)] => {
                assert_eq!((end.tokens_out, end.prompt_tokens), (0, 1300));
                vector.clone()
            }
            other => panic!("{other:?}"),
        }
    };
    let tokens: f64 = prompt.bytes().map(f64::from).sum();
    let positions = (1299 * 1300 / 2) as f64;
    for (pooling, x, y) in [
        (Pooling::Mean, tokens, positions),
        (Pooling::Last, f64::from(prompt.as_bytes()[1299]), 1299.0),
    ] {
        let length = x.hypot(y);
        let vector = run(pooling);
        assert!((f64::from(vector[0]) - x / length).abs() < 1e-6);
        assert!((f64::from(vector[1]) - y / length).abs() < 1e-6);
    }
    assert_idle(&engine);
}
