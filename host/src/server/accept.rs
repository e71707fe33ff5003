//! The accept loop: no connection is one too many, and each is watched ([`super::connection`]).
//!
//! warp 0.4's own server gives hyper no timer, so that nothing there would ever be too slow.

use super::connection::{Activity, Stream, Watched};
use super::service::{self, Peer};
use super::{Listener, State};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::GracefulShutdown;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle;

/// What a connection may cost.
#[derive(Clone, Debug)]
pub struct Limits {
    /// For a request's headers, from the opening of the connection or their first byte.
    pub header_timeout: Duration,
    /// How long a connection may lie idle between two requests.
    pub idle_timeout: Duration,
    /// For a request's body.
    pub body_timeout: Duration,
    /// How long a client may take nothing of what is sent to it.
    pub write_timeout: Duration,
    /// Connections at once; more of them wait to be accepted.
    pub max_connections: usize,
    /// Bytes of a request's body.
    pub max_body: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(90),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            max_connections: 4096,
            // A prompt of 32,768 characters, every one of them escaped, has less than a tenth of it.
            max_body: 4 << 20,
        }
    }
}

/// Connections that the system may hold until they are accepted.
const BACKLOG: i32 = 4096;

/// Bytes that the system may hold for a client that does not read: enough for hundreds of events, little
/// enough that who reads nothing is soon known.
const SEND_BUFFER: usize = 32 << 10;

pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    use socket2::{Domain, Socket, Type};
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

pub(super) async fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            // A worker that was killed leaves its socket behind; a worker that lives answers.
            if UnixStream::connect(path).await.is_ok() {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        other => other,
    }
}

/// The loop, as a task.
pub(super) struct Accepting {
    stop: oneshot::Sender<()>,
    task: JoinHandle<GracefulShutdown>,
}

impl Accepting {
    pub fn start(listener: Listener, state: Arc<State>) -> Self {
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(accept(listener, state, stopped));
        Self { stop, task }
    }

    /// Accepts nothing more, and waits for the connections to end.
    pub async fn close(self, limit: Duration) {
        drop(self.stop);
        let Ok(connections) = self.task.await else {
            tracing::error!("the accept loop panicked");
            return;
        };
        if tokio::time::timeout(limit, connections.shutdown())
            .await
            .is_err()
        {
            tracing::warn!("connections were cut that did not end in time");
        }
    }
}

async fn accept(
    listener: Listener,
    state: Arc<State>,
    mut stopped: oneshot::Receiver<()>,
) -> GracefulShutdown {
    let connections = GracefulShutdown::new();
    let service = service::Service::new(state.clone());
    let room = Arc::new(Semaphore::new(state.config.limits.max_connections));
    loop {
        let permit = tokio::select! {
            permit = room.clone().acquire_owned() => permit,
            _ = &mut stopped => break,
        };
        let accepted = tokio::select! {
            accepted = accept_one(&listener) => accepted,
            _ = &mut stopped => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, mostly: it passes when a connection ends.
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let limits = &state.config.limits;
        // Not hyper-util's builder for several versions: it waits for the first bytes without a timer.
        let mut builder = http1::Builder::new();
        // The stream keeps the time, all of it.
        builder.header_read_timeout(None);
        let activity = Activity::default();
        let service = service.of(peer, activity.clone());
        let stream = TokioIo::new(Watched::new(stream, activity, limits));
        let connection = builder.serve_connection(stream, service);
        let connection = connections.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection");
            }
            drop(permit);
        });
    }
    if let Listener::Unix(_, path) = &listener {
        let _ = std::fs::remove_file(path);
    }
    connections
}

async fn accept_one(listener: &Listener) -> io::Result<(Box<dyn Stream>, Peer)> {
    match listener {
        Listener::Tcp(listener, _) => {
            let (stream, address) = listener.accept().await?;
            // A token is a small write, and the next one must not wait for its acknowledgement.
            stream.set_nodelay(true)?;
            socket2::SockRef::from(&stream).set_send_buffer_size(SEND_BUFFER)?;
            let local = address.ip().to_canonical().is_loopback();
            Ok((Box::new(stream), Peer { local }))
        }
        Listener::Unix(listener, _) => {
            let (stream, _) = listener.accept().await?;
            Ok((Box::new(stream), Peer { local: true }))
        }
    }
}
