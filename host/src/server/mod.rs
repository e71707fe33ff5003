//! The HTTP worker: warp's routes, served from an accept loop of our own.
//!
//! - [`Server`] listens and accepts;
//! - [`routes`] says what is at which path, and how everything else is refused;
//! - [`execute`] turns the body of `POST /execute` into a request, or into a list of all that is wrong
//!   with it;
//! - [`stream`] turns a job's events into server-sent events.
//!
//! The server waits on channels only: the engine's thread waits for the device, and prompts are
//! tokenized on the blocking pool.

mod execute;
mod routes;
mod stream;

#[cfg(test)]
mod tests;

use crate::engine::EngineHandle;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// How a worker behaves.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Tokens that one request may generate at most; `None` for what its prompt leaves of the
    /// context.
    pub max_tokens: Option<usize>,
}

/// What every request handler needs.
struct State {
    engine: EngineHandle,
    config: Config,
    /// Turns true when the worker shuts down: running jobs are then cancelled.
    closing: watch::Receiver<bool>,
}

/// A worker that listens. Connections wait until [`Server::run`].
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    engine: EngineHandle,
    config: Config,
}

/// How long a client may take to send a request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

impl Server {
    /// Listens on `address`; port 0 picks a free one.
    ///
    /// # Errors
    /// The system's: address in use, not this machine's, not permitted.
    pub async fn bind(
        address: SocketAddr,
        engine: EngineHandle,
        config: Config,
    ) -> io::Result<Server> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok(Server {
            listener,
            address,
            engine,
            config,
        })
    }

    /// The address in use.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://ADDRESS:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Serves until `stop` is done. Then accepts nothing more, cancels what runs, and returns when
    /// every stream has had its last event.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let (close, closing) = watch::channel(false);
        let state = State {
            engine: self.engine,
            config: self.config,
            closing,
        };
        let routes = routes::routes(std::sync::Arc::new(state));
        let connections = GracefulShutdown::new();
        tokio::pin!(stop);
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = &mut stop => break,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, mostly: it passes when a connection ends.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            // A token is a small write, and the next one must not wait for its acknowledgement.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "TCP_NODELAY");
            }
            let service = TowerToHyperService::new(warp::service(routes.clone()));
            let mut builder = auto::Builder::new(TokioExecutor::new());
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT);
            let connection = builder
                .serve_connection_with_upgrades(TokioIo::new(stream), service)
                .into_owned();
            let connection = connections.watch(connection);
            tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "connection");
                }
            });
        }
        drop(self.listener);
        // Fails where no handler was ever made, and then nothing runs.
        let _ = close.send(true);
        connections.shutdown().await;
    }
}
