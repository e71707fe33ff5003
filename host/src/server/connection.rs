//! One connection, and how long it may take for what it does: for a request's headers, for doing nothing between
//! two requests, for reading what is sent to it. Bodies are timed where they are read.

use super::accept::Limits;
use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http_body::{Body, Frame, SizeHint};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What a connection waits for from its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    /// The rest of a request's headers, or of the first one's all of them.
    Headers,
    /// The next request, if any.
    Idle,
    /// Nothing: a request is being answered.
    Busy,
}

/// The phase of a connection, which its stream and its service both know a part of.
#[derive(Clone, Debug, Default)]
pub(super) struct Activity(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// A [`Phase`]; [`Phase::Headers`] at first.
    phase: AtomicU8,
    /// Who waits for the client while a request is being answered. When the answer ends, the wait is another
    /// one, and its time begins.
    reader: AtomicWaker,
}

impl Activity {
    fn phase(&self) -> Phase {
        match self.0.phase.load(Ordering::SeqCst) {
            0 => Phase::Headers,
            1 => Phase::Idle,
            _ => Phase::Busy,
        }
    }

    fn set(&self, phase: Phase) {
        self.0.phase.store(phase as u8, Ordering::SeqCst);
    }

    /// A request is there; it is being answered until the result is dropped.
    pub fn begin(&self) -> Answering {
        self.set(Phase::Busy);
        Answering(self.clone())
    }
}

/// Lasts as long as the answer to a request.
#[derive(Debug)]
pub(super) struct Answering(Activity);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.set(Phase::Idle);
        self.0.0.reader.wake();
    }
}

/// The body of an answer, which ends the answer when it ends.
pub(super) struct Answer {
    body: Pin<Box<dyn Body<Data = Bytes, Error = warp::Error> + Send>>,
    _answering: Answering,
}

impl Answer {
    pub fn new(
        body: impl Body<Data = Bytes, Error = warp::Error> + Send + 'static,
        answering: Answering,
    ) -> Self {
        Self {
            body: Box::pin(body),
            _answering: answering,
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = warp::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, warp::Error>>> {
        self.body.as_mut().poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A stream that fails once its client has taken too long.
pub(super) struct Watched {
    stream: Box<dyn Stream>,
    activity: Activity,
    header_timeout: Duration,
    idle_timeout: Duration,
    write_timeout: Duration,
    /// Runs while a read waits, for one phase.
    reading: Option<(Phase, Pin<Box<Sleep>>)>,
    /// Runs while a write waits.
    writing: Option<Pin<Box<Sleep>>>,
}

impl Watched {
    pub fn new(stream: Box<dyn Stream>, activity: Activity, limits: &Limits) -> Self {
        let first = Box::pin(sleep(limits.header_timeout));
        Self {
            stream,
            activity,
            header_timeout: limits.header_timeout,
            idle_timeout: limits.idle_timeout,
            write_timeout: limits.write_timeout,
            reading: Some((Phase::Headers, first)),
            writing: None,
        }
    }

    fn watch_write<T>(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.writing = None;
            return result;
        }
        let limit = self.write_timeout;
        let timer = self.writing.get_or_insert_with(|| Box::pin(sleep(limit)));
        match timer.as_mut().poll(cx) {
            Poll::Ready(()) => too_slow("the client takes nothing of what is sent to it"),
            Poll::Pending => Poll::Pending,
        }
    }
}

fn too_slow<T>(what: &'static str) -> Poll<io::Result<T>> {
    Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, what)))
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        // Before the phase is looked at, which may change at any moment.
        self.activity.0.reader.register(cx.waker());
        let phase = self.activity.phase();
        if result.is_ready() {
            if phase == Phase::Idle && buf.filled().len() > before {
                self.activity.set(Phase::Headers);
                let timer = Box::pin(sleep(self.header_timeout));
                self.reading = Some((Phase::Headers, timer));
            }
            return result;
        }
        let limit = match phase {
            Phase::Headers => self.header_timeout,
            Phase::Idle => self.idle_timeout,
            Phase::Busy => {
                self.reading = None;
                return Poll::Pending;
            }
        };
        if self.reading.as_ref().is_none_or(|(of, _)| *of != phase) {
            self.reading = Some((phase, Box::pin(sleep(limit))));
        }
        let timer = self.reading.as_mut().map(|(_, timer)| timer.as_mut());
        match timer.map(|timer| timer.poll(cx)) {
            Some(Poll::Ready(())) => too_slow("the client is too slow with its request"),
            _ => Poll::Pending,
        }
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch_write(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch_write(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        self.watch_write(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.watch_write(cx, result)
    }
}
