//! A worker under loads that have broken others: many clients, clients that stall, clients that leave,
//! signals in the middle. Small numbers here; `make test-load` runs the full ones, on a real model.

use kigo_tests::worker::{Worker, events, text_of};
use kigo_tests::{golden_dir, model};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How much of everything.
struct Size {
    model: PathBuf,
    streaming: usize,
    waves: usize,
    stalled: usize,
    leaving: usize,
    /// Tokens of an answer that goes on for long, within the model's context.
    long: usize,
}

fn small() -> Size {
    Size {
        model: golden_dir().join("tiny/llama-F16.gguf"),
        streaming: 60,
        waves: 2,
        stalled: 60,
        leaving: 100,
        long: 900,
    }
}

fn full() -> Size {
    Size {
        model: model("smollm2-135m-instruct-q4_1"),
        streaming: 200,
        waves: 4,
        stalled: 500,
        leaving: 1000,
        long: 1500,
    }
}

fn start(size: &Size, extra: &[&str]) -> Worker {
    Worker::start(&size.model, extra)
}

/// Twenty beginnings that models go on from in different ways.
const ABOUT: [&str; 20] = [
    "frogs",
    "the moon",
    "Paris",
    "arithmetic",
    "snow",
    "trains",
    "bread",
    "my sister",
    "copper",
    "jazz",
    "the sea",
    "chess",
    "old age",
    "Sunday",
    "tigers",
    "paper",
    "electric light",
    "war",
    "a small house",
    "the colour red",
];

fn body(id: &str, number: usize, max_tokens: usize) -> Value {
    json!({ "job_id": id, "prompt": format!("All I know of {}:", ABOUT[number % ABOUT.len()]),
        "max_tokens": max_tokens, "temperature": 0, "repetition_penalty": 1.3 })
}

/// A thread with a small stack: there are many.
fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let builder = thread::Builder::new().stack_size(256 << 10);
    builder.spawn(work).expect("a thread")
}

fn connect(address: &str) -> TcpStream {
    TcpStream::connect(address).expect("the worker listens")
}

fn send(stream: &mut TcpStream, body: &Value) {
    let body = body.to_string();
    let n = body.len();
    let head = "POST /execute HTTP/1.1\r\nhost: kigo\r\nconnection: close\r\ncontent-length:";
    write!(stream, "{head} {n}\r\n\r\n{body}").expect("the worker reads");
}

/// What a client got.
#[derive(Debug, PartialEq)]
enum Got {
    Text(String),
    /// 429, with a `Retry-After`.
    Refused,
}

/// Reads a whole answer; fails on anything but a complete stream or a proper refusal.
fn read(stream: TcpStream) -> Got {
    let mut reader = BufReader::new(stream);
    let mut status = String::new();
    reader.read_line(&mut status).expect("a status line");
    if status.starts_with("HTTP/1.1 429") {
        let mut rest = String::new();
        reader.read_to_string(&mut rest).expect("a body");
        assert!(rest.to_lowercase().contains("retry-after: "), "{rest}");
        assert!(rest.contains("QUEUE_FULL"), "{rest}");
        return Got::Refused;
    }
    assert!(status.starts_with("HTTP/1.1 200"), "{status}");
    let events = events(reader);
    let names: Vec<&str> = events.iter().map(|e| e.0.as_str()).collect();
    assert_eq!(names[0], "started");
    assert_eq!(names[names.len() - 1], "end", "{events:?}");
    assert!(names[1..names.len() - 1].iter().all(|n| *n == "token"));
    for (i, (_, data)) in events[1..events.len() - 1].iter().enumerate() {
        assert_eq!(data["i"], i);
    }
    Got::Text(text_of(&events))
}

const PROMPTS: usize = ABOUT.len();

/// `refusals`: whether there must be some; `None` where it depends on how fast they come.
fn many_clients(size: &Size, extra: &[&str], refusals: Option<bool>) {
    let worker = start(size, extra);
    let alone: Vec<String> = (0..PROMPTS)
        .map(|i| text_of(&events(worker.execute(&body("alone", i, 24)))))
        .collect();
    assert!(alone.iter().any(|text| *text != alone[0]));
    let mut memory = 0;
    let (mut complete, mut refused) = (0, 0);
    for wave in 0..size.waves {
        let clients: Vec<_> = (0..size.streaming)
            .map(|i| {
                let address = worker.address.clone();
                let body = body(&format!("{wave}-{i}"), i % PROMPTS, 24);
                spawn(move || {
                    let mut stream = connect(&address);
                    send(&mut stream, &body);
                    read(stream)
                })
            })
            .collect();
        for (i, client) in clients.into_iter().enumerate() {
            match client.join().expect("a complete stream or a refusal") {
                Got::Text(text) => {
                    assert_eq!(text, alone[i % PROMPTS], "client {i}");
                    complete += 1;
                }
                Got::Refused => refused += 1,
            }
        }
        worker.wait_idle(Duration::from_secs(10));
        let now = worker.resident_bytes();
        if wave == 0 {
            memory = now;
        }
        println!(
            "wave {wave}: {complete} complete, {refused} refused, {} MB",
            now >> 20
        );
        // The first wave touched what there is to touch; what follows leaves nothing behind.
        assert!(now < memory + (32 << 20), "{memory} bytes became {now}");
    }
    assert_eq!(complete + refused, size.streaming * size.waves);
    assert!(complete > 0);
    assert!(
        refusals.is_none_or(|some| some == (refused > 0)),
        "{refused} refused"
    );
    assert_eq!(worker.metric("requests_running"), 0.0);
}

/// Seconds from a request to its first token.
fn first_token(worker: &Worker, id: &str) -> f64 {
    let began = Instant::now();
    let mut stream = worker.execute(&body(id, 3, 4));
    let mut line = String::new();
    while !line.starts_with("event:token") {
        line.clear();
        assert_ne!(
            stream.read_line(&mut line).expect("a line"),
            0,
            "no token came"
        );
    }
    // The client leaves here: beside hundreds, the rest is a small share's matter.
    began.elapsed().as_secs_f64()
}

fn stalled_clients(size: &Size) {
    let worker = start(size, &[]);
    println!(
        "first token after {:.3} s alone",
        first_token(&worker, "alone")
    );
    let mut held = Vec::new();
    for i in 0..size.stalled {
        let mut slow = connect(&worker.address);
        slow.write_all(b"POST /execute HTTP/1.1\r\nhost: ki")
            .expect("half a head");
        held.push(slow);
        let mut stalled = connect(&worker.address);
        send(&mut stalled, &body(&format!("stalled {i}"), i, size.long));
        held.push(stalled);
    }
    for round in 0..5 {
        let seconds = first_token(&worker, &format!("normal {round}"));
        let running = worker.metric("requests_running");
        println!("first token after {seconds:.3} s beside {running} that run");
        assert!(seconds < 2.0, "{seconds} s");
        thread::sleep(Duration::from_millis(300));
    }
    drop(held);
    worker.wait_idle(Duration::from_secs(20));
}

/// A number below `n`, from a sequence that is the same in every run.
fn random(n: u64) -> u64 {
    static STATE: AtomicU64 = AtomicU64::new(0);
    // SplitMix64 (Steele et al. 2014).
    let mut z = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) % n
}

fn leaving_clients(size: &Size) {
    let worker = start(size, &[]);
    let alone = text_of(&events(worker.execute(&body("alone", 1, 20))));
    let mut left = 0;
    while left < size.leaving {
        let clients: Vec<_> = (0..50)
            .map(|i| {
                let address = worker.address.clone();
                let body = body(&format!("{left}-{i}"), i, 400);
                let (cut, pause) = (random(4), random(300));
                spawn(move || {
                    let mut stream = connect(&address);
                    if cut == 0 {
                        // In the middle of the request.
                        let _ = stream
                            .write_all(b"POST /execute HTTP/1.1\r\ncontent-length: 99\r\n\r\n{");
                    } else {
                        send(&mut stream, &body);
                    }
                    thread::sleep(Duration::from_millis(pause));
                    if cut == 1 {
                        let mut some = [0; 500];
                        let _ = stream.read(&mut some);
                    }
                })
            })
            .collect();
        left += clients.len();
        clients
            .into_iter()
            .for_each(|c| c.join().expect("a client"));
    }
    worker.wait_idle(Duration::from_secs(20));
    let again = text_of(&events(worker.execute(&body("again", 1, 20))));
    assert_eq!(again, alone);
    worker.wait_idle(Duration::from_secs(5));
}

/// Streams that go on for long, being read on threads.
fn loaded(worker: &Worker, clients: usize, max_tokens: usize) -> Vec<JoinHandle<Option<String>>> {
    let last_event = |stream: TcpStream| {
        let mut last = None;
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { break };
            if let Some(name) = line.strip_prefix("event:") {
                last = Some(name.trim().to_owned());
            }
        }
        last
    };
    (0..clients)
        .map(|i| {
            let mut stream = connect(&worker.address);
            send(&mut stream, &body(&format!("load {i}"), i, max_tokens));
            spawn(move || last_event(stream))
        })
        .collect()
}

fn wait_for_load(worker: &Worker) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while worker.metric("requests_running") < 2.0 {
        assert!(Instant::now() < deadline, "nothing runs");
        thread::sleep(Duration::from_millis(5));
    }
}

fn terminated_under_load(size: &Size) {
    let mut worker = start(size, &["--drain-timeout", "2"]);
    let streams = loaded(&worker, 40, size.long);
    wait_for_load(&worker);
    let began = Instant::now();
    worker.signal("TERM");
    let status = worker.wait(Duration::from_secs(10));
    let seconds = began.elapsed().as_secs_f64();
    assert_eq!(status.code(), Some(0));
    assert!(seconds < 4.0, "{seconds} s with a drain timeout of 2 s");
    for stream in streams {
        // Those whose request was not yet read when the listener closed have no stream.
        if let Some(last) = stream.join().expect("a client") {
            assert!(last == "end" || last == "error", "the last event is {last}");
        }
    }
}

fn killed_under_load(size: &Size) {
    let mut worker = start(size, &[]);
    let alone = text_of(&events(worker.execute(&body("alone", 2, 16))));
    let streams = loaded(&worker, 20, size.long);
    wait_for_load(&worker);
    worker.signal("KILL");
    worker.wait(Duration::from_secs(5));
    for stream in streams {
        stream.join().expect("a client that was cut off");
    }
    let worker = start(size, &[]);
    assert_eq!(worker.ask("GET /ready", "").0, 200);
    let again = text_of(&events(worker.execute(&body("again", 2, 16))));
    assert_eq!(again, alone);
}

#[test]
fn many_clients_get_their_own_tokens() {
    many_clients(&small(), &["--max-queue", "64"], Some(false));
}

#[test]
fn too_many_clients_get_their_own_tokens_or_are_refused() {
    many_clients(
        &small(),
        &["--max-queue", "8", "--max-running", "4"],
        Some(true),
    );
}

#[test]
fn stalled_clients_hold_nobody_up() {
    stalled_clients(&small());
}

#[test]
fn leaving_clients_leave_nothing_behind() {
    leaving_clients(&small());
}

#[test]
fn sigterm_under_load_ends_every_stream() {
    terminated_under_load(&small());
}

#[test]
fn a_killed_worker_starts_again() {
    killed_under_load(&small());
}

#[test]
#[ignore = "minutes; make test-load"]
fn full_many_clients() {
    many_clients(&full(), &["--max-queue", "64"], None);
}

#[test]
#[ignore = "minutes; make test-load"]
fn full_too_many_clients() {
    many_clients(
        &full(),
        &["--max-queue", "64", "--max-running", "8"],
        Some(true),
    );
}

#[test]
#[ignore = "minutes; make test-load"]
fn full_stalled_clients() {
    stalled_clients(&full());
}

#[test]
#[ignore = "minutes; make test-load"]
fn full_leaving_clients() {
    leaving_clients(&full());
}

#[test]
#[ignore = "minutes; make test-load"]
fn full_signals_under_load() {
    terminated_under_load(&full());
    killed_under_load(&full());
}
