//! `kigo serve` as a process, and what a test asks of it over plain sockets.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A worker on a free port of this machine; killed when dropped.
pub struct Worker {
    process: Child,
    /// `IP:PORT`.
    pub address: String,
}

impl Worker {
    /// Starts a worker on a model and waits until it is ready.
    ///
    /// # Panics
    /// When it does not say where it listens.
    pub fn start(model: &Path, extra: &[&str]) -> Worker {
        Self::start_on(model, &crate::device(), extra)
    }

    /// As [`Worker::start`], on a device.
    ///
    /// # Panics
    /// When it does not say where it listens.
    pub fn start_on(model: &Path, device: &str, extra: &[&str]) -> Worker {
        let mut command = Command::new(crate::kigo_bin());
        command.env("KIGO_LOG", "warn");
        Self::run(command, model, device, extra)
    }

    /// As [`Worker::start`], on the CPU, with its log in a file.
    ///
    /// # Panics
    /// When it does not say where it listens.
    pub fn start_logging(model: &Path, extra: &[&str], log: std::fs::File) -> Worker {
        let mut command = Command::new(crate::kigo_bin());
        command.env("KIGO_LOG", "debug").stderr(log);
        Self::run(command, model, "cpu", extra)
    }

    /// As [`Worker::start`], on the CPU, with variables in its environment.
    ///
    /// # Panics
    /// When it does not say where it listens.
    pub fn start_with(model: &Path, variables: &[(&str, &str)]) -> Worker {
        let mut command = Command::new(crate::kigo_bin());
        command
            .env("KIGO_LOG", "warn")
            .envs(variables.iter().copied());
        Self::run(command, model, "cpu", &[])
    }

    fn run(mut command: Command, model: &Path, device: &str, extra: &[&str]) -> Worker {
        let mut process = command
            .args([
                "serve", "--port", "0", "--json", "--device", device, "--model",
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

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Sends a request and returns the connection, unread.
    ///
    /// # Panics
    /// When the worker does not listen.
    pub fn send(&self, request: &str, body: &str) -> BufReader<TcpStream> {
        self.send_with(request, "", body)
    }

    /// As [`Worker::send`], with further header lines.
    ///
    /// # Panics
    /// When the worker does not listen.
    pub fn send_with(&self, request: &str, headers: &str, body: &str) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(&self.address).expect("the worker listens");
        let n = body.len();
        write!(
            stream,
            "{request} HTTP/1.1\r\nhost: kigo\r\nconnection: close\r\n{headers}content-length: {n}\r\n\r\n{body}"
        )
        .expect("the worker reads");
        BufReader::new(stream)
    }

    pub fn execute(&self, body: &Value) -> BufReader<TcpStream> {
        self.send("POST /execute", &body.to_string())
    }

    /// The status line and headers, then the body.
    ///
    /// # Panics
    /// When the answer is no HTTP.
    pub fn ask(&self, request: &str, body: &str) -> (u16, String) {
        let mut text = String::new();
        self.send(request, body)
            .read_to_string(&mut text)
            .expect("an answer in UTF-8");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
        (status.expect("a status"), body.to_owned())
    }

    /// A sample of `GET /metrics`.
    ///
    /// # Panics
    /// When it is no number.
    pub fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.ask("GET /metrics", "");
        let value = text
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0.0, |v| v.trim().parse().expect("a number"))
    }

    /// Waits until nothing runs or waits and every block of the cache is free.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub fn wait_idle(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let names = ["requests_running", "requests_queued", "kv_blocks_used"];
        while names.iter().map(|n| self.metric(n)).sum::<f64>() > 0.0 {
            assert!(Instant::now() < deadline, "the worker is still busy");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Bytes of memory that the process has in use.
    ///
    /// # Panics
    /// Without `/proc`.
    pub fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.process.id());
        let text = std::fs::read_to_string(path).expect("/proc is there");
        let anonymous = text.lines().find_map(|l| l.strip_prefix("RssAnon:"));
        let kb = anonymous.and_then(|v| v.trim().strip_suffix("kB"));
        1024 * kb
            .and_then(|v| v.trim().parse::<u64>().ok())
            .expect("RssAnon in kB")
    }

    /// Sends a signal: `TERM`, `KILL`.
    ///
    /// # Panics
    /// When it cannot be sent.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([format!("-{name}"), self.process.id().to_string()])
            .status()
            .expect("kill is there");
        assert!(sent.success());
    }

    /// Waits for the process to end.
    ///
    /// # Panics
    /// When it runs longer than `limit`.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(status) = self.process.try_wait().expect("a child of ours") {
                return status;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the worker still runs after {limit:?}");
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The data of every event until the end, with the events' names.
///
/// # Panics
/// When the stream breaks off, or an event carries no JSON.
pub fn events(stream: impl BufRead) -> Vec<(String, Value)> {
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

/// The text that the tokens among these events make.
pub fn text_of(events: &[(String, Value)]) -> String {
    events
        .iter()
        .filter_map(|(_, data)| data["t"].as_str())
        .collect()
}
