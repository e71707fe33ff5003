//! `kigo serve` as a process, on a tiny model: what it streams is what `kigo generate` says, a client
//! that leaves frees it, a signal ends it well. The full loads are in `load.rs`.

use kigo::engine::ModelText;
use kigo::gguf::Gguf;
use kigo_tests::worker::{Worker, events, text_of};
use kigo_tests::{golden_dir, kigo_bin, run_model};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn tiny() -> PathBuf {
    golden_dir().join("tiny/llama-F16.gguf")
}

fn start(extra: &[&str]) -> Worker {
    Worker::start_on(&tiny(), "cpu", extra)
}

#[test]
fn the_stream_is_what_generate_says() {
    let worker = start(&[]);
    let args = [
        "--prompt",
        "The old pond",
        "--max-tokens",
        "40",
        "--seed",
        "7",
    ];
    let said = run_model("generate", &tiny(), "cpu", false, &args);
    let body = json!({ "job_id": "1", "prompt": "The old pond", "max_tokens": 40, "seed": 7 });
    let first = events(worker.execute(&body));
    let again = events(worker.execute(&body));
    assert_eq!(first[0].0, "started");
    assert_eq!(first[first.len() - 1].0, "end");
    assert_eq!(text_of(&first), said["text"].as_str().expect("a text"));
    assert_eq!(text_of(&first), text_of(&again));
    let ids = said["ids"].as_array().expect("ids").len();
    assert_eq!(first[first.len() - 1].1["tokens_out"], ids);
    assert_eq!(worker.metric("tokens_out_total"), 2.0 * ids as f64);
}

/// A request that goes on for long: the penalty keeps the tiny model from ending early.
fn long(id: &str) -> Value {
    json!({ "job_id": id, "prompt": "The old pond", "temperature": 2.0, "repetition_penalty": 2.0, "seed": 3 })
}

#[test]
fn a_client_that_leaves_frees_the_worker() {
    let worker = start(&[]);
    let mut stream = worker.execute(&long("1"));
    let mut line = String::new();
    while !line.starts_with("event:token") {
        line.clear();
        assert_ne!(
            stream.read_line(&mut line).expect("a line"),
            0,
            "no token came"
        );
    }
    drop(stream);
    worker.wait_idle(Duration::from_secs(5));
}

#[test]
fn sequences_that_run_in_turns_give_the_tokens_they_give_alone() {
    // A cache of one context for five that would fill more: some are put back and go on later.
    let worker = start(&["--kv-cache-size-mb", "1", "--ctx-size", "256"]);
    let body = |i: usize| {
        json!({ "job_id": i.to_string(), "prompt": format!("Frog number {i} says"), "max_tokens": 150,
            "temperature": 0, "repetition_penalty": 1.5 })
    };
    let alone: Vec<String> = (0..5)
        .map(|i| text_of(&events(worker.execute(&body(i)))))
        .collect();
    let streams: Vec<_> = (0..5).map(|i| worker.execute(&body(i))).collect();
    for (alone, stream) in alone.iter().zip(streams) {
        assert_eq!(&text_of(&events(stream)), alone);
    }
    assert_ne!(alone[0], alone[1]);
    worker.wait_idle(Duration::from_secs(5));
}

#[test]
fn sigterm_ends_streams_with_an_event_and_the_process_with_0() {
    let mut worker = start(&["--drain-timeout", "0"]);
    // Idle connections must not hold it up either.
    let idle = TcpStream::connect(&worker.address).expect("the worker listens");
    let mut stream = worker.execute(&long("1"));
    let mut line = String::new();
    while !line.starts_with("event:token") {
        line.clear();
        stream.read_line(&mut line).expect("a line");
    }
    worker.signal("TERM");
    let events = events(stream);
    let (last, _) = events.last().expect("a last event");
    assert!(last == "end" || last == "error", "the last event is {last}");
    assert_eq!(worker.wait(Duration::from_secs(10)).code(), Some(0));
    drop(idle);
}

/// Requests that go on to the end of the context: nothing that ends an answer can be chosen.
fn endless(count: usize) -> impl Iterator<Item = Value> {
    let file = Gguf::open(tiny()).expect("a tiny model");
    let text = ModelText::from_gguf(&file).expect("a vocabulary");
    let ends = text.tokenizer.end_of_generation().iter();
    let bias: serde_json::Map<String, Value> =
        ends.map(|id| (id.to_string(), json!(-100))).collect();
    (0..count).map(move |i| {
        json!({ "job_id": i.to_string(), "prompt": "The old pond", "temperature": 0, "logit_bias": bias })
    })
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut worker = start(&["--drain-timeout", "60", "--max-queue", "1000"]);
    // A thousand tokens each, for minutes in all.
    let streams: Vec<_> = endless(400).map(|body| worker.execute(&body)).collect();
    let deadline = Instant::now() + Duration::from_secs(30);
    while worker.metric("requests_running") + worker.metric("requests_queued") < 400.0 {
        assert!(Instant::now() < deadline, "not all of them came");
        std::thread::sleep(Duration::from_millis(5));
    }
    worker.signal("TERM");
    let draining = || {
        let (status, ready) = worker.ask("GET /ready", "");
        status == 503 && ready.contains("draining")
    };
    while !draining() {
        assert!(Instant::now() < deadline, "it does not drain");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(worker.metric("requests_running") > 0.0);
    worker.signal("TERM");
    assert_eq!(worker.wait(Duration::from_secs(2)).code(), Some(130));
    drop(streams);
}

#[test]
fn an_orchestrator_is_told_and_told_again() {
    let orchestrator = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!(
        "http://{}/up",
        orchestrator.local_addr().expect("an address")
    );
    let said = std::thread::spawn(move || {
        let mut bodies = Vec::new();
        for answer in ["503 Service Unavailable", "200 OK"] {
            let (stream, _) = orchestrator.accept().expect("a call");
            let mut reader = BufReader::new(stream);
            let mut length = 0;
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).expect("a header");
                let line = line.to_ascii_lowercase();
                if let Some(n) = line.strip_prefix("content-length:") {
                    length = n.trim().parse().expect("a length");
                }
                if line.trim().is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).expect("a body");
            bodies.push(serde_json::from_slice::<Value>(&body).expect("JSON"));
            let head =
                format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            reader
                .get_mut()
                .write_all(head.as_bytes())
                .expect("an answer");
        }
        bodies
    });
    let worker = start(&["--worker-id", "w7", "--callback-url", &url]);
    let bodies = said.join().expect("two calls");
    assert_eq!(bodies[0], bodies[1]);
    let body = &bodies[0];
    assert_eq!(body["worker_id"], "w7");
    assert_eq!(body["url"], worker.url());
    assert_eq!(
        (&body["backend"], &body["memory_architecture"]),
        (&json!("cpu"), &json!("unified"))
    );
    for key in ["model_ref", "device", "memory_bytes", "capabilities"] {
        assert!(!body[key].is_null(), "{key}");
    }
}

#[test]
fn an_orchestrator_that_is_gone_is_a_failure() {
    let port = TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("an address");
    let mut process = Command::new(kigo_bin())
        .args(["serve", "--device", "cpu", "--port", "0", "--callback-url"])
        .arg(format!("http://{port}/"))
        .arg("--model")
        .arg(tiny())
        .env("KIGO_LOG", "error")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kigo starts");
    let status = process.wait().expect("it ends");
    let mut said = String::new();
    process
        .stderr
        .take()
        .expect("a pipe")
        .read_to_string(&mut said)
        .expect("text");
    assert_eq!(status.code(), Some(1));
    assert!(said.contains("--callback-url"), "{said}");
}

#[test]
fn what_cannot_be_loaded_is_said_with_a_code() {
    let output = kigo_tests::run(
        [
            "serve",
            "--json",
            "--port",
            "0",
            "--model",
            "/nonexistent.gguf",
        ],
        b"",
    );
    assert_eq!(output.status.code(), Some(1));
    let said: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(said["error"]["code"], "MODEL_LOAD_FAILED");
    let model = tiny();
    let model = model.to_str().expect("a path in UTF-8");
    // A cache of a petabyte.
    let args = [
        "serve",
        "--json",
        "--port",
        "0",
        "--kv-cache-size-mb",
        "1000000000",
        "--model",
        model,
    ];
    let output = kigo_tests::run(args, b"");
    assert_eq!(output.status.code(), Some(1));
    let said: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(said["error"]["code"], "INSUFFICIENT_VRAM");
    assert_eq!(said["error"]["retriable"], true);
}

#[test]
fn logs_are_json_where_asked_for_and_hold_no_prompt() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    let log = std::fs::File::create(&path).expect("a file");
    let worker = Worker::start_logging(&tiny(), &["--log-format", "json"], log);
    let body = json!({ "job_id": "j7", "prompt": "unspeakable pond", "max_tokens": 3, "stop": ["unspeakable stop"] });
    let body = body.to_string();
    events(worker.send_with("POST /execute", "x-correlation-id: c-42\r\n", &body));
    let (status, _) = worker.ask(
        "POST /execute",
        &body.replace("\"max_tokens\":3", "\"max_tokens\":0"),
    );
    assert_eq!(status, 400);
    drop(worker);
    let text = std::fs::read_to_string(&path).expect("the log");
    assert!(!text.contains("unspeakable"), "{text}");
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON in every line"))
        .collect();
    let ended = lines
        .iter()
        .find(|l| l["job_id"] == "j7" && l["message"] == "ended");
    let ended = ended.unwrap_or_else(|| panic!("{text}"));
    assert_eq!(ended["span"]["correlation_id"], "c-42");
}

#[test]
fn the_configuration_can_be_seen() {
    let args = [
        "serve",
        "--print-config",
        "--max-queue",
        "5",
        "--listen",
        "unix:/run/kigo.sock",
    ];
    let output = kigo_tests::run(args, b"");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(text.contains("max_queue = 5\n"), "{text}");
    assert!(text.contains("listen = \"unix:/run/kigo.sock\""), "{text}");
    let output = kigo_tests::run(["serve", "--host", "0.0.0.0"], b"");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--insecure"));
}
