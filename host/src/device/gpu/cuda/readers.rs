//! Threads that read pieces of the file into pinned memory, each a piece of its own.

use crate::device::gpu::Piece;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// One thread copies some 6 GB/s from the page cache, the bus takes 54: more threads than this find
/// no slot of the ring free.
const THREADS: usize = 12;

/// Whether a piece was read.
pub(super) type Outcome = Result<(), gguf::Error>;

struct Job {
    piece: Piece,
    to: *mut u8,
    done: SyncSender<Outcome>,
}

// The target is memory that only this job writes until it is done.
unsafe impl Send for Job {}

/// The threads; they end with this value, after the pieces that they were given.
pub(super) struct Readers {
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    pub fn new() -> Self {
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = (0..cores.min(THREADS))
            .map(|_| {
                let queue = Arc::clone(&queue);
                std::thread::spawn(move || work(&queue))
            })
            .collect();
        Readers {
            jobs: Some(jobs),
            threads,
        }
    }

    /// Begins to read a piece; what is returned tells when it is there.
    ///
    /// # Safety
    /// `to` has room for the piece, and nobody else uses it before the outcome arrives.
    pub unsafe fn read(&self, piece: Piece, to: *mut u8) -> Receiver<Outcome> {
        let (done, outcome) = sync_channel(1);
        if let Some(jobs) = &self.jobs {
            // Fails only where every thread is gone; then the outcome never arrives, which is told too.
            let _ = jobs.send(Job { piece, to, done });
        }
        outcome
    }
}

fn work(queue: &Mutex<Receiver<Job>>) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { piece, to, done }) = job else {
            return;
        };
        // The caller of `read` gave this memory for as many bytes.
        let to = unsafe { std::slice::from_raw_parts_mut(to, piece.range.len()) };
        let _ = done.send(piece.read(to));
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
