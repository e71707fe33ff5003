//! The worker over real sockets, on a model that is a function.

mod access;
mod bodies;
mod connections;
mod life;
mod openai;
mod streams;

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
    serve(runner, ByteText::PLAIN, config, engine).await
}

/// A worker whose texts and template are these.
async fn start_speaking(runner: FakeRunner, text: ByteText) -> Worker {
    serve(runner, text, Config::default(), EngineConfig::default()).await
}

async fn serve(runner: FakeRunner, text: ByteText, config: Config, engine: EngineConfig) -> Worker {
    let steps = runner.steps.clone();
    let engine = Engine::start(Box::new(runner), Arc::new(text), engine).unwrap();
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
