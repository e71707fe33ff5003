//! The worker over real sockets, on a model that is a function.

use super::{Config, Server};
use crate::engine::fake::{ByteText, FakeRunner};
use crate::engine::{Engine, EngineConfig};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

struct Worker {
    address: SocketAddr,
    steps: Arc<AtomicUsize>,
    engine: crate::engine::EngineHandle,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

async fn start(runner: FakeRunner, step_ms: u64, config: Config) -> Worker {
    start_with(runner, step_ms, config, EngineConfig::default()).await
}

async fn start_with(
    mut runner: FakeRunner,
    step_ms: u64,
    config: Config,
    engine: EngineConfig,
) -> Worker {
    runner.step_time = Duration::from_millis(step_ms);
    let steps = runner.steps.clone();
    let engine = Engine::start(Box::new(runner), Arc::new(ByteText), engine).unwrap();
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = Server::bind(any_port, engine.clone().into(), config)
        .await
        .unwrap();
    let url = server.url();
    let address: SocketAddr = url.strip_prefix("http://").unwrap().parse().unwrap();
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(server.run(async {
        let _ = stopped.await;
    }));
    Worker {
        address,
        steps,
        engine,
        stop,
        task,
    }
}

impl Worker {
    /// Sends a request and returns the connection, unread.
    async fn send(&self, method: &str, path: &str, body: &str) -> BufReader<TcpStream> {
        self.send_with(method, path, "", body).await
    }

    /// [`Worker::send`] with further header lines.
    async fn send_with(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: &str,
    ) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: kigo\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        BufReader::new(stream)
    }

    async fn execute(&self, body: &Value) -> BufReader<TcpStream> {
        self.send("POST", "/execute", &body.to_string()).await
    }

    /// Status and body.
    async fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        self.ask_with(method, path, "", body).await
    }

    async fn ask_with(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
        let mut text = String::new();
        self.send_with(method, path, headers, body)
            .await
            .read_to_string(&mut text)
            .await
            .unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (
            head.split(' ').nth(1).unwrap().parse().unwrap(),
            body.to_owned(),
        )
    }

    async fn idle(&self) {
        let m = self.engine.metrics();
        for _ in 0..500 {
            if m.running.get() == 0 && m.queued.get() == 0 && m.kv_blocks_used.get() == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        panic!("the engine is still busy");
    }
}

/// An event as it came over the wire, and how many steps the model had done by then.
#[derive(Debug)]
struct Seen {
    name: String,
    id: u64,
    data: Value,
    at_step: usize,
}

/// The next event, `None` at the end of the stream. Fails on anything that is not the framing of
/// server-sent events in chunks.
async fn next_event(stream: &mut BufReader<TcpStream>, steps: &AtomicUsize) -> Option<Seen> {
    let (mut name, mut id, mut data) = (None, None, None);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.unwrap() == 0 {
            assert!(
                name.is_none() && data.is_none(),
                "the stream ended inside an event"
            );
            return None;
        }
        let line = line.trim_end();
        if let Some(value) = line.strip_prefix("event:") {
            name = Some(value.trim().to_owned());
        } else if let Some(value) = line.strip_prefix("id:") {
            id = Some(value.trim().parse().unwrap());
        } else if let Some(value) = line.strip_prefix("data:") {
            data = Some(serde_json::from_str(value).unwrap());
        } else if line.is_empty()
            && let (Some(name), Some(id), Some(data)) = (name.take(), id.take(), data.take())
        {
            return Some(Seen {
                name,
                id,
                data,
                at_step: steps.load(Ordering::SeqCst),
            });
        }
        // Else headers, chunk sizes and pings.
    }
}

async fn all_events(mut stream: BufReader<TcpStream>, steps: &AtomicUsize) -> Vec<Seen> {
    let mut events = Vec::new();
    while let Some(event) = next_event(&mut stream, steps).await {
        events.push(event);
    }
    events
}

fn text_of(events: &[Seen]) -> String {
    let tokens = events.iter().filter(|e| e.name == "token");
    tokens.map(|e| e.data["t"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_has_started_then_tokens_then_one_end() {
    let worker = start(
        FakeRunner::script(64, 2, "né\n\nevent: end\n"),
        0,
        Config::default(),
    )
    .await;
    let body =
        json!({ "job_id": "a", "prompt": "hi", "max_tokens": 40, "temperature": 0, "seed": 5 });
    let mut response = worker.execute(&body).await;
    let mut status = String::new();
    response.read_line(&mut status).await.unwrap();
    assert_eq!(status, "HTTP/1.1 200 OK\r\n");
    let events = all_events(response, &worker.steps).await;
    let names: Vec<&str> = events.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names[0], "started");
    assert_eq!(names[names.len() - 1], "end");
    assert!(
        names[1..names.len() - 1].iter().all(|&n| n == "token"),
        "{names:?}"
    );
    assert!(events.iter().enumerate().all(|(i, e)| e.id == i as u64));
    assert_eq!(text_of(&events), "né\n\nevent: end\n");
    let started = &events[0].data;
    assert_eq!(
        (&started["job_id"], &started["model"]),
        (&json!("a"), &json!("fake"))
    );
    assert_eq!(started["seed"], 5);
    assert!(started["started_at"].as_str().unwrap().ends_with('Z'));
    let end = &events[events.len() - 1].data;
    assert_eq!(
        (&end["stop_reason"], &end["tokens_out"]),
        (&json!("EOS"), &json!(names.len() - 2))
    );
    assert!(end["decode_time_ms"].is_number());
    for (i, event) in events[1..events.len() - 1].iter().enumerate() {
        assert_eq!(event.data["i"], i);
    }

    let (status, metrics) = worker.ask("GET", "/metrics", "").await;
    assert_eq!(status, 200);
    let line = format!("tokens_out_total {}", names.len() - 2);
    assert!(metrics.lines().any(|l| l == line), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_arrive_one_by_one_while_later_ones_are_still_to_come() {
    let worker = start(FakeRunner::hashing(256), 20, Config::default()).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 25 });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    let tokens: Vec<&Seen> = events.iter().filter(|e| e.name == "token").collect();
    assert_eq!(tokens.len(), 25);
    assert!(
        tokens[0].at_step < 10,
        "the first token came at step {}",
        tokens[0].at_step
    );
    // Each token is here before the one after the next is made, give or take a busy machine.
    let late = tokens
        .iter()
        .enumerate()
        .filter(|(i, t)| t.at_step > i + 3)
        .count();
    assert!(late < 8, "{tokens:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_stops_the_work_within_a_token() {
    let worker = start(FakeRunner::hashing(4096), 30, Config::default()).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 1000 });
    let mut stream = worker.execute(&body).await;
    loop {
        let event = next_event(&mut stream, &worker.steps).await.unwrap();
        if event.name == "token" && event.data["i"] == 2 {
            break;
        }
    }
    let before = worker.steps.load(Ordering::SeqCst);
    drop(stream);
    worker.idle().await;
    let after = worker.steps.load(Ordering::SeqCst);
    assert!(
        after - before <= 2,
        "{} steps after the client left",
        after - before
    );
    let body = json!({ "job_id": "b", "prompt": "hi", "max_tokens": 3 });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["stop_reason"], "MAX_TOKENS");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_in_the_queue_is_forgotten() {
    let one = EngineConfig {
        max_running: 1,
        ..EngineConfig::default()
    };
    let worker = start_with(FakeRunner::hashing(4096), 10, Config::default(), one).await;
    let long = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 60 });
    let first = worker.execute(&long).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut other = long.clone();
    other["job_id"] = json!("b");
    let second = worker.execute(&other).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(second);
    let events = all_events(first, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["tokens_out"], 60);
    worker.idle().await;
    assert_eq!(worker.steps.load(Ordering::SeqCst), 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_violation_is_named_and_no_prompt_is_echoed() {
    let worker = start(
        FakeRunner::hashing(64),
        0,
        Config {
            max_tokens_out: Some(20),
            ..Config::default()
        },
    )
    .await;
    let body = json!({
        "job_id": "", "prompt": 7, "max_tokens": 0, "temperature": 2.5, "top_p": -1, "top_k": 9999,
        "min_p": "secret", "repetition_penalty": 0, "stop": ["a", "b", "c", "d", "secret"],
        "seed": -1, "top_logits": 1000, "colour": "secret", "presence_penalty": 3, "frequency_penalty": "secret",
        "logit_bias": { "secret": 1 }, "samplers": ["secret"], "typical_p": 0, "top_n_sigma": -1,
        "xtc_probability": 2, "xtc_threshold": 2, "dry_multiplier": -1, "dry_base": 0, "dry_allowed_length": -1,
        "dry_penalty_last_n": 0.5, "dry_sequence_breakers": "secret", "dynatemp_range": -1, "dynatemp_exponent": 0,
        "mirostat": 3, "mirostat_tau": -1, "mirostat_eta": -1, "timeout_ms": 0, "metrics_interval_ms": 1,
    });
    let (status, text) = worker.ask("POST", "/execute", &body.to_string()).await;
    assert_eq!(status, 400);
    assert!(!text.contains("secret"), "{text}");
    let errors: Value = serde_json::from_str(&text).unwrap();
    let errors = errors["errors"].as_array().unwrap();
    let mut fields: Vec<&str> = errors
        .iter()
        .map(|e| e["field"].as_str().unwrap())
        .collect();
    fields.sort_unstable();
    let shape = super::execute::body(&worker.engine, &Config::default());
    let mut expected: Vec<&str> = shape.fields.iter().map(|f| f.name).collect();
    expected.retain(|f| *f != "messages");
    expected.push("colour");
    expected.sort_unstable();
    assert_eq!(fields, expected);
    for error in errors {
        let keys: Vec<&String> = error.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["field", "constraint", "message", "value"]);
    }
    assert_eq!(worker.steps.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_bodies_are_400_with_a_reason() {
    let worker = start(
        FakeRunner::hashing(64),
        0,
        Config {
            max_tokens_out: Some(20),
            ..Config::default()
        },
    )
    .await;
    let long = "x".repeat(64);
    let huge = "x".repeat(40_000);
    for (body, field) in [
        ("{\"prompt\": \"secret".to_owned(), "body"),
        ("[1]".to_owned(), "body"),
        (json!({ "job_id": "a" }).to_string(), "prompt"),
        (json!({ "job_id": "a", "prompt": "" }).to_string(), "prompt"),
        (
            json!({ "job_id": "a", "prompt": long }).to_string(),
            "prompt",
        ),
        (
            json!({ "job_id": "a", "prompt": huge }).to_string(),
            "prompt",
        ),
        (
            json!({ "job_id": "a", "prompt": "a", "messages": [] }).to_string(),
            "prompt",
        ),
        (
            json!({ "job_id": "a", "messages": [] }).to_string(),
            "messages",
        ),
        (
            json!({ "job_id": "a", "messages": [{ "role": "user" }] }).to_string(),
            "messages",
        ),
        (
            json!({ "job_id": "a\n", "prompt": "a" }).to_string(),
            "job_id",
        ),
        (
            json!({ "job_id": "a", "prompt": "a", "max_tokens": 21 }).to_string(),
            "max_tokens",
        ),
        (
            json!({ "job_id": "a", "prompt": "a", "max_tokens": 1.5 }).to_string(),
            "max_tokens",
        ),
        (
            json!({ "job_id": "a", "prompt": "a", "stop": [""] }).to_string(),
            "stop",
        ),
    ] {
        let (status, text) = worker.ask("POST", "/execute", &body).await;
        let errors: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(status, 400, "{text}");
        assert_eq!(errors["errors"][0]["field"], field, "{text}");
        assert_eq!(errors["errors"].as_array().unwrap().len(), 1, "{text}");
        assert!(!text.contains("secret") && !text.contains("xxx"), "{text}");
    }
    let body = json!({ "job_id": "a", "messages": [{ "role": "user", "content": "hi" }], "top_p": 0,
        "max_tokens": 2.0, "stop": "zz", "seed": u64::MAX, "min_p": null });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    assert_eq!(events[0].data["seed"], u64::MAX);
    assert_eq!(events.last().unwrap().data["tokens_out"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_paths_methods_and_sizes_are_refused_in_json() {
    let worker = start(FakeRunner::hashing(64), 0, Config::default()).await;
    let big = " ".repeat(5 << 20);
    for (method, path, body, status, code) in [
        ("GET", "/nothing", "", 404, "NOT_FOUND"),
        ("GET", "/execute", "", 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/execute", big.as_str(), 413, "PAYLOAD_TOO_LARGE"),
    ] {
        let (found, text) = worker.ask(method, path, body).await;
        let failure: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((found, &failure["code"]), (status, &json!(code)), "{text}");
        assert_eq!(failure["retriable"], false);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_a_working_engine_from_a_broken_one() {
    let mut runner = FakeRunner::hashing(64);
    runner.panic_at = Some(1);
    let worker = start(runner, 0, Config::default()).await;
    let (status, health) = worker.ask("GET", "/health", "").await;
    let health: Value = serde_json::from_str(&health).unwrap();
    assert_eq!(
        (status, &health["status"], &health["model"]),
        (200, &json!("ok"), &json!("fake"))
    );

    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 10 });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    let last = events.last().unwrap();
    assert_eq!(
        (last.name.as_str(), &last.data["code"]),
        ("error", &json!("INTERNAL"))
    );
    assert_eq!(last.data["retriable"], true);
    assert_eq!(
        events
            .iter()
            .filter(|e| matches!(e.name.as_str(), "end" | "error"))
            .count(),
        1
    );
    assert_eq!(worker.ask("GET", "/health", "").await.0, 503);
    assert_eq!(
        worker.ask("POST", "/execute", &body.to_string()).await.0,
        500
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_token_carries_the_top_logits_asked_for() {
    let worker = start(FakeRunner::script(64, 2, "ok"), 0, Config::default()).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "temperature": 0, "top_logits": 2 });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    assert_eq!(events[1].data["top"], json!([[111, 1000.0], [112, 999.5]]));
    assert!(events[2].data.get("top").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_lets_streams_end_and_refuses_new_work() {
    let worker = start(FakeRunner::hashing(4096), 10, Config::default()).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 60 });
    let mut stream = worker.execute(&body).await;
    while next_event(&mut stream, &worker.steps).await.unwrap().name != "token" {}
    let (status, _) = worker.ask("POST", "/shutdown", "").await;
    assert_eq!(status, 202);
    tokio::time::sleep(Duration::from_millis(30)).await;
    let other = json!({ "job_id": "b", "prompt": "hi", "max_tokens": 1 });
    let (status, refused) = worker.ask("POST", "/execute", &other.to_string()).await;
    assert_eq!(status, 503);
    assert!(refused.contains("DRAINING"), "{refused}");
    let (status, ready) = worker.ask("GET", "/ready", "").await;
    assert_eq!(status, 503);
    assert!(ready.contains("draining"));
    assert_eq!(worker.ask("GET", "/health", "").await.0, 200);
    let events = all_events(stream, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["tokens_out"], 60);
    tokio::time::timeout(Duration::from_secs(5), worker.task)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_outlasts_the_drain_timeout_is_cancelled_with_an_event() {
    let config = Config {
        drain_timeout: Duration::from_millis(100),
        ..Config::default()
    };
    let worker = start(FakeRunner::hashing(4096), 10, config).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 2000 });
    let mut stream = worker.execute(&body).await;
    while next_event(&mut stream, &worker.steps).await.unwrap().name != "token" {}
    worker.stop.send(()).unwrap();
    let events = all_events(stream, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["stop_reason"], "CANCELLED");
    tokio::time::timeout(Duration::from_secs(5), worker.task)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_ends_a_job_by_its_id_and_may_be_said_twice() {
    let worker = start(FakeRunner::hashing(4096), 5, Config::default()).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 2000 });
    let mut stream = worker.execute(&body).await;
    while next_event(&mut stream, &worker.steps).await.unwrap().name != "token" {}
    let (status, text) = worker.ask("POST", "/execute", &body.to_string()).await;
    assert_eq!(status, 409, "{text}");
    let cancel = json!({ "job_id": "a" }).to_string();
    let (status, text) = worker.ask("POST", "/cancel", &cancel).await;
    assert_eq!(status, 202);
    assert!(text.contains("cancelling"), "{text}");
    let events = all_events(stream, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["stop_reason"], "CANCELLED");
    let (status, text) = worker.ask("POST", "/cancel", &cancel).await;
    assert_eq!(status, 202);
    assert!(text.contains("not_running"), "{text}");
    assert_eq!(worker.ask("POST", "/cancel", "{}").await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_events_tell_the_place_in_the_queue() {
    let one = EngineConfig {
        max_running: 1,
        ..EngineConfig::default()
    };
    let worker = start_with(FakeRunner::hashing(4096), 10, Config::default(), one).await;
    let first = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 60 });
    let first = worker.execute(&first).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let second =
        json!({ "job_id": "b", "prompt": "hi", "max_tokens": 60, "metrics_interval_ms": 250 });
    let events = all_events(worker.execute(&second).await, &worker.steps).await;
    assert!(events.iter().enumerate().all(|(i, e)| e.id == i as u64));
    let metrics: Vec<&Seen> = events.iter().filter(|e| e.name == "metrics").collect();
    assert!((3..8).contains(&metrics.len()), "{}", metrics.len());
    assert_eq!(metrics[0].data["queue_position"], 1);
    let last = metrics.last().unwrap();
    assert_eq!(last.data["queue_position"], 0);
    assert!(last.data["tokens_out"].as_u64() > Some(5));
    drop(first);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_429_with_retry_after() {
    let small = EngineConfig {
        max_running: 1,
        max_queue: 1,
        ..EngineConfig::default()
    };
    let worker = start_with(FakeRunner::hashing(4096), 10, Config::default(), small).await;
    let body = |id: &str| json!({ "job_id": id, "prompt": "hi", "max_tokens": 500 });
    let _first = worker.execute(&body("a")).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let _second = worker.execute(&body("b")).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut text = String::new();
    let mut third = worker.execute(&body("c")).await;
    third.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 429"), "{text}");
    assert!(text.to_lowercase().contains("\r\nretry-after: "), "{text}");
    assert!(text.contains("QUEUE_FULL") && text.contains("\"retriable\":true"));
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_come_from_the_body_and_from_a_header() {
    let worker = start(FakeRunner::hashing(4096), 10, Config::default()).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 500, "timeout_ms": 80 });
    let events = all_events(worker.execute(&body).await, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["code"], "INFERENCE_TIMEOUT");
    let now = std::time::SystemTime::now() + Duration::from_millis(80);
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 500 }).to_string();
    let at = humantime::format_rfc3339_millis(now);
    let stream = worker
        .send_with("POST", "/execute", &format!("x-deadline: {at}\r\n"), &body)
        .await;
    let events = all_events(stream, &worker.steps).await;
    assert_eq!(events.last().unwrap().data["code"], "INFERENCE_TIMEOUT");
    let (status, text) = worker
        .ask_with("POST", "/execute", "x-deadline: soon\r\n", &body)
        .await;
    assert_eq!(status, 400, "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_asked_for_except_by_probes_and_the_page() {
    let config = Config {
        api_keys: vec!["first".to_owned(), "second".to_owned()],
        ..Config::default()
    };
    let worker = start(FakeRunner::hashing(64), 0, config).await;
    for path in ["/", "/health", "/ready"] {
        assert_eq!(worker.ask("GET", path, "").await.0, 200, "{path}");
    }
    let body = json!({ "content": "hi" }).to_string();
    for (header, status) in [
        ("", 401),
        ("authorization: Bearer firs\r\n", 401),
        ("authorization: first\r\n", 401),
        ("authorization: Bearer first\r\n", 200),
        ("authorization: bearer second\r\n", 200),
    ] {
        let (found, text) = worker.ask_with("POST", "/tokenize", header, &body).await;
        assert_eq!(found, status, "{header}: {text}");
    }
    let (status, text) = worker.ask("GET", "/v1/models", "").await;
    assert_eq!(status, 401);
    let error: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(error["error"]["code"], "invalid_api_key");
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_origins_are_refused_unless_allowed() {
    let config = Config {
        cors_origins: vec!["https://ours.example".to_owned()],
        ..Config::default()
    };
    let worker = start(FakeRunner::hashing(64), 0, config).await;
    let ask = async |origin: &str| {
        let header = format!("origin: {origin}\r\n");
        let mut text = String::new();
        let mut stream = worker.send_with("GET", "/v1/worker", &header, "").await;
        stream.read_to_string(&mut text).await.unwrap();
        text.to_lowercase()
    };
    assert!(
        ask("https://theirs.example")
            .await
            .starts_with("http/1.1 401")
    );
    assert!(ask("null").await.starts_with("http/1.1 401"));
    let same = ask("http://kigo").await;
    assert!(same.starts_with("http/1.1 200") && !same.contains("access-control"));
    let ours = ask("https://ours.example").await;
    assert!(ours.starts_with("http/1.1 200"));
    assert!(ours.contains("access-control-allow-origin: https://ours.example"));
}

#[tokio::test(flavor = "multi_thread")]
async fn correlation_ids_are_returned_or_made() {
    let worker = start(FakeRunner::hashing(64), 0, Config::default()).await;
    let ask = async |header: &str| {
        let mut text = String::new();
        let mut stream = worker.send_with("GET", "/health", header, "").await;
        stream.read_to_string(&mut text).await.unwrap();
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix("x-correlation-id: "));
        line.unwrap().to_owned()
    };
    assert_eq!(ask("x-correlation-id: Order-66\r\n").await, "Order-66");
    let made = ask("").await;
    assert_eq!(made.len(), 24);
    assert_ne!(made, ask("").await);
    assert_eq!(ask("x-correlation-id: a b\r\n").await.len(), 24);
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_headers_and_slow_bodies_are_cut_off() {
    let limits = super::Limits {
        header_timeout: Duration::from_millis(200),
        body_timeout: Duration::from_millis(200),
        ..super::Limits::default()
    };
    let config = Config {
        limits,
        ..Config::default()
    };
    let worker = start(FakeRunner::hashing(64), 0, config).await;
    let mut answers = Vec::new();
    for beginning in [
        "",
        "GET /health HTTP/1.1\r\nhost:",
        "POST /execute HTTP/1.1\r\nhost: kigo\r\nconnection: close\r\ncontent-length: 50\r\n\r\n{",
        "GET /health HTTP/1.1\r\nhost: kigo\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(worker.address).await.unwrap();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut text = String::new();
        let end = stream.read_to_string(&mut text);
        let end = tokio::time::timeout(Duration::from_secs(3), end).await;
        end.unwrap().unwrap();
        answers.push(text);
    }
    assert!(answers[2].starts_with("HTTP/1.1 400"), "{answers:?}");
    assert!(answers[3].starts_with("HTTP/1.1 200"), "{answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_takes_nothing_is_cut_off() {
    let limits = super::Limits {
        write_timeout: Duration::from_millis(300),
        ..super::Limits::default()
    };
    let config = Config {
        limits,
        ..Config::default()
    };
    let worker = start(FakeRunner::hashing(1 << 17), 0, config).await;
    let body = json!({ "job_id": "a", "prompt": "hi", "max_tokens": 100_000 });
    let stream = worker.execute(&body).await;
    // The connection stays open here, unread.
    worker.idle().await;
    assert!(worker.steps.load(Ordering::SeqCst) < 100_000);
    drop(stream);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_serves_and_a_dead_one_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kigo.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let engine = Engine::start(
        Box::new(FakeRunner::hashing(64)),
        Arc::new(ByteText),
        EngineConfig::default(),
    );
    let engine = engine.unwrap();
    let server = Server::bind_unix(&path, engine.clone().into(), Config::default())
        .await
        .unwrap();
    assert_eq!(server.url(), format!("unix:{}", path.display()));
    let task = tokio::spawn(server.run(std::future::pending()));
    let ask = async |request: &str| {
        let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    };
    let health = ask("GET /health HTTP/1.1\r\nhost: kigo\r\nconnection: close\r\n\r\n").await;
    assert!(health.starts_with("HTTP/1.1 200"), "{health}");
    let again = Server::bind_unix(&path, engine.into(), Config::default()).await;
    assert!(again.is_err(), "somebody listens there");
    let bye = ask(
        "POST /shutdown HTTP/1.1\r\nhost: kigo\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
    )
    .await;
    assert!(bye.starts_with("HTTP/1.1 202"), "{bye}");
    tokio::time::timeout(Duration::from_secs(5), task)
        .await
        .unwrap()
        .unwrap();
    assert!(!path.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_loads_is_healthy_and_not_ready() {
    let slot = super::EngineSlot::default();
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = Server::bind(any_port, slot.clone(), Config::default())
        .await
        .unwrap();
    let url = server.url();
    let task = tokio::spawn(server.run(std::future::pending()));
    let get = async |path: &str| {
        let response = reqwest::Client::builder().no_proxy().build().unwrap();
        let response = response.get(format!("{url}{path}")).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    slot.loaded(25, 100);
    let (status, health) = get("/health").await;
    assert_eq!(status, 200);
    assert!(
        health.contains("\"loading\"") && health.contains("0.25"),
        "{health}"
    );
    assert_eq!(get("/ready").await.0, 503);
    let (status, failure) = get("/v1/worker").await;
    assert!(
        status == 503 && failure.contains("MODEL_LOADING"),
        "{failure}"
    );
    assert!(get("/metrics").await.1.contains("model_load_progress 0.25"));
    let engine = Engine::start(
        Box::new(FakeRunner::hashing(64)),
        Arc::new(ByteText),
        EngineConfig::default(),
    );
    slot.fill(engine.unwrap());
    assert_eq!(get("/ready").await.0, 200);
    let (status, metrics) = get("/metrics").await;
    assert_eq!(status, 200);
    assert!(
        metrics.contains("model_load_progress 1\n") && metrics.ends_with("# EOF\n"),
        "{metrics}"
    );
    task.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings_come_as_numbers_or_as_base64() {
    use base64::Engine as _;
    let worker = start(FakeRunner::hashing(64), 0, Config::default()).await;
    let ask = async |body: Value| {
        let (status, text) = worker
            .ask("POST", "/v1/embeddings", &body.to_string())
            .await;
        assert_eq!(status, 200, "{text}");
        serde_json::from_str::<Value>(&text).unwrap()
    };
    let floats = ask(json!({ "model": "fake", "input": ["ab", "c"] })).await;
    assert_eq!(floats["usage"]["prompt_tokens"], 3);
    assert_eq!(floats["data"][1]["index"], 1);
    let x = floats["data"][0]["embedding"][0].as_f64().unwrap();
    let expected = 195.0 / 195f64.hypot(1.0);
    assert!((x - expected).abs() < 1e-6, "{floats}");
    let coded =
        ask(json!({ "model": "fake", "input": [97, 98], "encoding_format": "base64" })).await;
    let text = coded["data"][0]["embedding"].as_str().unwrap();
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text)
        .unwrap();
    assert_eq!(bytes.len(), 8);
    assert_eq!(f32::from_le_bytes(bytes[..4].try_into().unwrap()), x as f32);
    let (status, _) = worker
        .ask(
            "POST",
            "/v1/embeddings",
            "{\"model\": \"fake\", \"input\": []}",
        )
        .await;
    assert_eq!(status, 400);
}
