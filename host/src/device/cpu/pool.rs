//! A pool of threads for work that is over in microseconds.
//!
//! A forward pass of one token forks and joins a hundred times or more, with some ten microseconds
//! of work each. Workers therefore watch for work for a while before they sleep, and a job is closed
//! rather than joined: the caller takes pieces of the workers' shares when its own is done, and when
//! none are left it waits for those workers only that are at one. A worker that the system did not
//! schedule in time costs nothing.

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Work for all threads; the argument is the thread's number.
type Job = dyn Fn(usize) + Sync;

/// Bits of `Shared::state`: the job's number in the upper half, below it whether it is closed to
/// workers, below that how many workers are in it.
const CLOSED: u64 = 1 << 31;
const ACTIVE: u64 = CLOSED - 1;

/// Turns of the watching loop before a worker sleeps: some 100 microseconds, longer than the gaps
/// between the operations of a pass.
const SPINS: u32 = 4_000;

/// Turns after which the caller lets others run while it waits for a worker.
const SPINS_BEFORE_YIELD: u32 = 2_000;

struct Shared {
    state: AtomicU64,
    /// The job of the state's number. Written by the caller while no worker is in a job, read by
    /// workers that have entered it.
    job: UnsafeCell<Option<*const Job>>,
    sleepers: AtomicUsize,
    mutex: Mutex<()>,
    condition: std::sync::Condvar,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
}

// SAFETY: `job` is the one field that is not Sync; `state` orders its accesses (see its comment).
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` leads to a Sync closure and is used only while that lives.
unsafe impl Send for Shared {}

/// Threads that run closures together with their caller.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// The next index of each thread's share of a job.
    shares: Vec<Share>,
}

/// A counter with a cache line, and the one that is fetched beside it, to itself.
#[repr(align(128))]
struct Share(AtomicUsize);

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    pub fn new(threads: usize) -> std::io::Result<Pool> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(CLOSED),
            job: UnsafeCell::new(None),
            sleepers: AtomicUsize::new(0),
            mutex: Mutex::new(()),
            condition: std::sync::Condvar::new(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let shares = (0..threads).map(|_| Share(AtomicUsize::new(0))).collect();
        let mut pool = Pool {
            shared,
            workers: Vec::new(),
            shares,
        };
        for thread in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let name = format!("kigo-cpu-{thread}");
            pool.workers.push(
                std::thread::Builder::new()
                    .name(name)
                    .spawn(move || shared.work(thread))?,
            );
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(thread, range)` for ranges that cover `0..n`, each up to `grain` long, on all
    /// threads; returns when all are done.
    ///
    /// Each thread goes through its own share of `0..n` in order, so that it reads memory in order,
    /// and then through what others have left of theirs.
    pub fn for_ranges(
        &mut self,
        n: usize,
        grain: usize,
        body: impl Fn(usize, Range<usize>) + Sync,
    ) {
        let grain = grain.max(1);
        if n <= grain || self.workers.is_empty() {
            let mut start = 0;
            while start < n {
                let end = n.min(start + grain);
                body(0, start..end);
                start = end;
            }
            return;
        }
        let shares = &self.shares;
        let count = shares.len();
        let bound = |share: usize| n * share / count;
        for (i, share) in shares.iter().enumerate() {
            share.0.store(bound(i), Ordering::Relaxed);
        }
        self.run(&|thread| {
            for i in 0..count {
                let share = (thread + i) % count;
                let end = bound(share + 1);
                loop {
                    let start = shares[share].0.fetch_add(grain, Ordering::Relaxed);
                    if start >= end {
                        break;
                    }
                    body(thread, start..end.min(start + grain));
                }
            }
        });
    }

    /// Runs `job` on the caller's thread and on those workers that are there in time; `job` must do
    /// what is left of the work on whichever thread it runs.
    /// One at a time: `for_ranges` has the pool to itself.
    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        let number = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1) & 0xffff_ffff;
        // SAFETY: the last job is closed and no worker is in it, so nobody else touches `job`. The
        // lifetime is cut off here and upheld below: this function does not return, nor unwind,
        // before the job is closed and empty.
        unsafe {
            *shared.job.get() = Some(std::mem::transmute::<
                *const (dyn Fn(usize) + Sync),
                *const Job,
            >(job));
        }
        shared.state.store(number << 32, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = shared.mutex.lock().unwrap_or_else(|e| e.into_inner());
            shared.condition.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        shared.state.fetch_or(CLOSED, Ordering::AcqRel);
        let mut turns = 0u32;
        while shared.state.load(Ordering::Acquire) & ACTIVE != 0 {
            turns += 1;
            if turns > SPINS_BEFORE_YIELD {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        let workers = shared
            .panic
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .take();
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        if let Some(panic) = workers {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _guard = self.shared.mutex.lock().unwrap_or_else(|e| e.into_inner());
            self.shared.condition.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker's panic was handed to the caller of `run` already.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self, thread: usize) {
        let mut last = 0;
        loop {
            let Some(number) = self.next(last) else {
                return;
            };
            last = number;
            if !self.enter(number) {
                continue;
            }
            // SAFETY: this worker is counted in the job's state, so `run` has not returned and the
            // closure lives; the pointer was written before the state that `enter` acquired.
            let job = unsafe { (*self.job.get()).map(|job| &*job) };
            let done = catch_unwind(AssertUnwindSafe(|| {
                if let Some(job) = job {
                    job(thread);
                }
            }));
            if let Err(panic) = done {
                *self.panic.lock().unwrap_or_else(|e| e.into_inner()) = Some(panic);
            }
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Waits for a job after `last`: none when the pool ends.
    fn next(&self, last: u64) -> Option<u64> {
        let new = || {
            let state = self.state.load(Ordering::SeqCst);
            (state >> 32 != last && state & CLOSED == 0).then_some(state >> 32)
        };
        for _ in 0..SPINS {
            if let Some(number) = new() {
                return Some(number);
            }
            std::hint::spin_loop();
        }
        let mut guard = self.mutex.lock().unwrap_or_else(|e| e.into_inner());
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        // A job that began before this worker was counted as asleep is seen here; one that begins
        // later finds it counted and takes the mutex to wake it.
        let found = loop {
            if self.stop.load(Ordering::SeqCst) {
                break None;
            }
            if let Some(number) = new() {
                break Some(number);
            }
            guard = self
                .condition
                .wait(guard)
                .unwrap_or_else(|e| e.into_inner());
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        found
    }

    /// Joins job `number`, unless it is closed or over.
    fn enter(&self, number: u64) -> bool {
        let mut state = self.state.load(Ordering::Relaxed);
        loop {
            if state >> 32 != number || state & CLOSED != 0 {
                return false;
            }
            match self.state.compare_exchange_weak(
                state,
                state + 1,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }
}

/// A slice whose parts several threads write at once.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: `get` makes its callers take disjoint ranges; T goes to other threads as through `&mut`.
unsafe impl<T: Send> Sync for Parts<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Parts {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            life: PhantomData,
        }
    }

    /// The range as a slice.
    ///
    /// # Safety
    /// Ranges that are in use at the same time must not overlap.
    ///
    /// # Panics
    /// The range ends past the slice's end.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn get(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {}",
            self.len
        );
        // SAFETY: inside the slice that `new` was given; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covers_every_index_once_over_many_jobs() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for n in [0, 1, 7, 64, 1001] {
                for grain in [0, 1, 3, 64] {
                    let hits: Vec<_> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                    pool.for_ranges(n, grain, |thread, range| {
                        assert!(thread < threads);
                        for i in range {
                            hits[i].fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    assert!(
                        hits.iter().all(|h| h.load(Ordering::Relaxed) == 1),
                        "{n} {grain}"
                    );
                }
            }
        }
    }

    #[test]
    fn wakes_workers_that_sleep() {
        let mut pool = Pool::new(3).unwrap();
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(3));
            let met = AtomicUsize::new(0);
            // Each piece waits for another thread's, so this ends only if workers come.
            pool.for_ranges(2, 1, |_, _| {
                met.fetch_add(1, Ordering::SeqCst);
                while met.load(Ordering::SeqCst) < 2 {
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn hands_a_panic_to_the_caller_and_goes_on() {
        let mut pool = Pool::new(2).unwrap();
        for bad in [0, 99] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.for_ranges(100, 1, |_, range| {
                    assert!(range.start != bad, "piece {bad}")
                });
            }));
            assert!(result.is_err());
            let sum = AtomicUsize::new(0);
            pool.for_ranges(100, 1, |_, range| {
                sum.fetch_add(range.start, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }
}
