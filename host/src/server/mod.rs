//! The HTTP worker: warp's routes, served from an accept loop of our own.
//!
//! - [`Server`] listens, and ends well; [`accept`] takes connections, [`connection`] watches each;
//! - [`service`] is what every request goes through: keys, origins, correlation ids, unknown paths;
//! - [`routes`] says what is at which path;
//! - [`fields`] checks bodies, [`generation`] reads what all endpoints share;
//! - [`execute`] and [`stream`] are the native API, [`openai`] the other one, [`text`] the tokenizer's;
//! - [`info`] says what the worker is and how it is; [`openapi`] describes all of it.
//!
//! The server waits on channels only: the engine's thread waits for the device, and prompts are
//! tokenized on the blocking pool.

// A response is the error of what reads a request: made once for each, its size costs nothing.
#![allow(clippy::result_large_err)]

mod accept;
mod connection;
mod execute;
mod fields;
mod generation;
mod info;
mod openai;
mod openapi;
mod routes;
mod service;
mod stream;
mod text;

#[cfg(test)]
mod tests;

pub use accept::Limits;
pub use info::{MemoryArchitecture, WorkerInfo};
pub use openapi::document;

use crate::engine::{Code, EngineHandle, Failure};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

/// How a worker behaves.
#[derive(Clone, Debug)]
pub struct Config {
    /// The worker's name among others.
    pub worker_id: String,
    /// What was asked for as the model: a catalog name or a path; its last part names the model in the
    /// OpenAI API.
    pub model_id: Option<String>,
    /// Tokens that a prompt may have; `None` for what the context holds.
    pub max_tokens_in: Option<usize>,
    /// Tokens that one request may generate at most; `None` for what its prompt leaves of the
    /// context.
    pub max_tokens_out: Option<usize>,
    /// Keys of which each request must bring one; empty for no keys at all.
    pub api_keys: Vec<String>,
    /// Origins whose pages may use the API, beside the worker's own.
    pub cors_origins: Vec<String>,
    /// How long running requests may go on once the worker shuts down.
    pub drain_timeout: Duration,
    pub limits: Limits,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            worker_id: "kigo".to_owned(),
            model_id: None,
            max_tokens_in: None,
            max_tokens_out: None,
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            drain_timeout: Duration::from_secs(30),
            limits: Limits::default(),
        }
    }
}

/// The place of an engine that may still have to be loaded.
#[derive(Clone, Default)]
pub struct EngineSlot(Arc<Slot>);

#[derive(Default)]
struct Slot {
    engine: OnceLock<EngineHandle>,
    bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl From<EngineHandle> for EngineSlot {
    fn from(engine: EngineHandle) -> Self {
        let slot = Self::default();
        slot.fill(engine);
        slot
    }
}

impl EngineSlot {
    /// The model is there. Only the first one counts.
    pub fn fill(&self, engine: EngineHandle) {
        let _ = self.0.engine.set(engine);
    }

    /// How far loading has come.
    pub fn loaded(&self, bytes: u64, total_bytes: u64) {
        self.0.bytes.store(bytes, Ordering::Relaxed);
        self.0.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    pub fn get(&self) -> Option<&EngineHandle> {
        self.0.engine.get()
    }

    /// 0 to 1.
    fn progress(&self) -> f64 {
        if self.get().is_some() {
            return 1.0;
        }
        let total = self.0.total_bytes.load(Ordering::Relaxed);
        if total == 0 {
            return 0.0;
        }
        self.0.bytes.load(Ordering::Relaxed) as f64 / total as f64
    }
}

/// What every request handler needs.
struct State {
    slot: EngineSlot,
    config: Config,
    keys: service::Keys,
    started: Instant,
    /// Turns true when `POST /shutdown` asks for the end.
    shutdown: watch::Sender<bool>,
}

impl State {
    fn engine(&self) -> Result<&EngineHandle, Failure> {
        self.slot.get().ok_or_else(|| {
            let percent = 100.0 * self.slot.progress();
            let mut failure = Failure::new(
                Code::ModelLoading,
                format!("the model is being loaded ({percent:.0}%)"),
            );
            failure.retry_after = Some(1);
            failure
        })
    }
}

/// Where a worker listens.
enum Listener {
    Tcp(TcpListener, SocketAddr),
    Unix(UnixListener, PathBuf),
}

/// A worker that listens. Connections wait until [`Server::run`].
pub struct Server {
    listener: Listener,
    slot: EngineSlot,
    config: Config,
}

/// How long connections may take to close once nothing runs any more.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

impl Server {
    /// Listens on `address`; port 0 picks a free one.
    ///
    /// # Errors
    /// The system's: address in use, not this machine's, not permitted.
    pub async fn bind(address: SocketAddr, slot: EngineSlot, config: Config) -> io::Result<Server> {
        let listener = accept::listen(address)?;
        let address = listener.local_addr()?;
        Ok(Server {
            listener: Listener::Tcp(listener, address),
            slot,
            config,
        })
    }

    /// Listens on a Unix socket at `path`. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// The system's; `AddrInUse` where somebody listens there.
    pub async fn bind_unix(path: &Path, slot: EngineSlot, config: Config) -> io::Result<Server> {
        let listener = accept::listen_unix(path).await?;
        Ok(Server {
            listener: Listener::Unix(listener, path.to_owned()),
            slot,
            config,
        })
    }

    /// `http://ADDRESS:PORT`, or `unix:PATH`.
    pub fn url(&self) -> String {
        match &self.listener {
            Listener::Tcp(_, address) => format!("http://{address}"),
            Listener::Unix(_, path) => format!("unix:{}", path.display()),
        }
    }

    /// Serves until `stop` is done or `POST /shutdown` comes. Then takes no new work, lets what runs go
    /// on for the drain timeout, cancels what is left, and returns when every stream has had its last
    /// event.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let (shutdown, mut asked) = watch::channel(false);
        let state = Arc::new(State {
            slot: self.slot,
            keys: service::Keys::new(&self.config.api_keys),
            config: self.config,
            started: Instant::now(),
            shutdown,
        });
        let accepting = accept::Accepting::start(self.listener, state.clone());
        tokio::select! {
            () = stop => {}
            _ = asked.wait_for(|&asked| asked) => {}
        }
        drain(&state).await;
        accepting.close(CLOSE_TIMEOUT).await;
    }
}

/// Lets what runs come to its end, or cancels it when the time is over.
async fn drain(state: &State) {
    let Some(engine) = state.slot.get() else {
        return;
    };
    engine.drain();
    tracing::info!(in_flight = engine.in_flight(), "draining");
    let deadline = Instant::now() + state.config.drain_timeout;
    while engine.in_flight() > 0 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let deadline = Instant::now() + CLOSE_TIMEOUT;
    while engine.in_flight() > 0 && Instant::now() < deadline {
        engine.cancel_all();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
