//! `kigo serve` as a process, on a tiny model: what it streams is what `kigo generate` says, a client
//! that leaves frees it, a signal ends it well.

use kigo_tests::{golden_dir, kigo_bin, run_model};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Worker {
    process: Child,
    address: String,
}

impl Worker {
    fn start(extra: &[&str]) -> Worker {
        let model = golden_dir().join("tiny/llama-F16.gguf");
        let mut process = Command::new(kigo_bin())
            .args([
                "serve", "--device", "cpu", "--port", "0", "--json", "--model",
            ])
            .arg(model)
            .args(extra)
            .stdout(Stdio::piped())
            .spawn()
            .expect("kigo starts");
        let mut line = String::new();
        let stdout = process.stdout.take().expect("stdout is a pipe");
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("a line on stdout");
        let ready: Value = serde_json::from_str(&line).expect("one JSON object");
        let url = ready["url"].as_str().expect("a url");
        let address = url.strip_prefix("http://").expect("an http url").to_owned();
        Worker { process, address }
    }

    fn send(&self, request: &str, body: &str) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(&self.address).expect("the worker listens");
        let n = body.len();
        write!(stream, "{request} HTTP/1.1\r\nhost: kigo\r\nconnection: close\r\ncontent-length: {n}\r\n\r\n{body}")
            .expect("the worker reads");
        BufReader::new(stream)
    }

    fn execute(&self, body: &Value) -> BufReader<TcpStream> {
        self.send("POST /execute", &body.to_string())
    }

    /// A sample of `GET /metrics`.
    fn metric(&self, name: &str) -> f64 {
        let mut text = String::new();
        self.send("GET /metrics", "")
            .read_to_string(&mut text)
            .expect("an answer in UTF-8");
        let value = text
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0.0, |v| v.trim().parse().expect("a number"))
    }

    /// Sends SIGTERM and waits for the end; the exit code.
    fn terminate(&mut self) -> Option<i32> {
        let pid = self.process.id().to_string();
        let sent = Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .expect("kill is there");
        assert!(sent.success());
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if let Some(status) = self.process.try_wait().expect("a child of ours") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the worker still runs 10 s after SIGTERM");
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The data of every event until the end, with the events' names.
fn events(stream: BufReader<TcpStream>) -> Vec<(String, Value)> {
    let mut events = Vec::new();
    let mut name = String::new();
    for line in stream.lines() {
        let line = line.expect("the stream ends well");
        if let Some(event) = line.strip_prefix("event:") {
            event.trim().clone_into(&mut name);
        } else if let Some(data) = line.strip_prefix("data:") {
            let data = serde_json::from_str(data).expect("JSON in every event");
            events.push((name.clone(), data));
        }
    }
    events
}

fn text_of(events: &[(String, Value)]) -> String {
    events
        .iter()
        .filter_map(|(_, data)| data["t"].as_str())
        .collect()
}

#[test]
fn the_stream_is_what_generate_says() {
    let worker = Worker::start(&[]);
    let model = golden_dir().join("tiny/llama-F16.gguf");
    let args = [
        "--prompt",
        "The old pond",
        "--max-tokens",
        "40",
        "--seed",
        "7",
    ];
    let said = run_model("generate", &model, "cpu", false, &args);
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

#[test]
fn a_client_that_leaves_frees_the_worker() {
    let worker = Worker::start(&[]);
    // The penalty keeps the tiny model from ending early.
    let body = json!({ "job_id": "1", "prompt": "The old pond", "temperature": 2.0,
        "repetition_penalty": 2.0, "seed": 3 });
    let mut stream = worker.execute(&body);
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
    let deadline = Instant::now() + Duration::from_secs(5);
    while worker.metric("requests_running") + worker.metric("kv_blocks_used") > 0.0 {
        assert!(Instant::now() < deadline, "the worker is still busy");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn sigterm_ends_streams_with_an_event_and_the_process_with_0() {
    let mut worker = Worker::start(&[]);
    // Idle connections must not hold it up either.
    let idle = TcpStream::connect(&worker.address).expect("the worker listens");
    let body = json!({ "job_id": "1", "prompt": "The old pond", "temperature": 2.0,
        "repetition_penalty": 2.0 });
    let stream = worker.execute(&body);
    assert_eq!(worker.terminate(), Some(0));
    let events = events(stream);
    if let Some((last, _)) = events.last() {
        assert!(last == "end" || last == "error", "the last event is {last}");
    }
    drop(idle);
}
