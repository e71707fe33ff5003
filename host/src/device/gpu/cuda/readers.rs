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

#[cfg(test)]
mod tests {
    use super::*;
    use gguf::{GgmlType, Gguf, Writer};

    #[test]
    fn pieces_arrive_whole_or_say_why_not() {
        let data: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let mut writer = Writer::new();
        writer
            .tensor("t", &[data.len() as u64], GgmlType::I8)
            .unwrap();
        let mut payload = writer.begin(Vec::new()).unwrap();
        payload.write(&data).unwrap();
        let file = Gguf::from_bytes("memory", payload.finish().unwrap()).unwrap();
        let file = Arc::new(file);
        let piece = |tensor: &str, range| Piece {
            file: Arc::clone(&file),
            tensor: tensor.to_owned(),
            range,
        };
        let mut out = vec![0u8; data.len()];
        let readers = Readers::new();
        // Each piece has a part of `out` of its own, and `out` outlives all.
        let outcomes: Vec<_> = (0..100)
            .map(|i| unsafe {
                let range = i * 1000..(i + 1) * 1000;
                readers.read(piece("t", range), out.as_mut_ptr().add(i * 1000))
            })
            .collect();
        for outcome in outcomes {
            outcome.recv().unwrap().unwrap();
        }
        assert_eq!(out, data);
        let absent = unsafe { readers.read(piece("absent", 0..10), out.as_mut_ptr()) };
        assert!(absent.recv().unwrap().is_err());
    }
}
