//! A block's part of a row, and how a row's blocks meet.

use super::{BINS, BLOCKS, DrawArgs, DrawRow, SUMS_AT, THREADS};
use cuda_std::int::opaque;
use cuda_std::thread::{block_idx_x, lane_id, spin, sync_threads, thread_idx_x};
use cuda_std::{atomic, shared, warp};

/// Logits that are on their way to a thread at a time. A thread has no more of the usual vocabularies': what is unrolled is instructions that
/// come from memory, each launch again.
pub(super) const AT_ONCE: usize = 5;

/// Sums over a block's threads.
pub(super) struct Sums {
    /// Of the threads before this one.
    pub(super) before: u64,
    pub(super) all: u64,
}

/// A block at work on its part of a row.
pub(super) struct Block {
    pub(super) row: DrawRow,
    /// Which one of so many.
    pub(super) index: u32,
    pub(super) blocks: u32,
    /// Its ids.
    pub(super) first: usize,
    pub(super) end: usize,
    /// How many have arrived once all have met again.
    met: u32,
    /// Totals and histograms so far.
    totals: u32,
    pub(super) histograms: u32,
}

impl Block {
    #[inline(always)]
    pub(super) unsafe fn of(a: &DrawArgs) -> Self {
        let (number, index) = (block_idx_x() / a.blocks, block_idx_x() % a.blocks);
        let row = unsafe { a.rows.add(number as usize).read() };
        // Whole sectors.
        let each = row.vocabulary.div_ceil(a.blocks).next_multiple_of(32);
        let bound = |i: u32| {
            let id = i * each;
            if id < row.vocabulary {
                id
            } else {
                row.vocabulary
            }
        };
        Self {
            row,
            index,
            blocks: a.blocks,
            first: bound(index) as usize,
            end: bound(index + 1) as usize,
            met: 0,
            totals: 0,
            histograms: 0,
        }
    }

    /// Waits for all of the row's blocks: each sees what all have written.
    #[inline(always)]
    pub(super) unsafe fn meet(&mut self) {
        sync_threads();
        if self.blocks == 1 {
            return;
        }
        self.met += self.blocks;
        unsafe {
            if thread_idx_x() == 0 {
                atomic::red_release_add_u32(self.row.arrived, 1);
                while atomic::load_acquire_u32(self.row.arrived) < self.met {
                    spin();
                }
            }
        }
        sync_threads();
    }

    #[inline(always)]
    pub(super) unsafe fn maxima(&self) -> *mut u64 {
        unsafe { (&raw mut (*self.row.common).maxima).cast() }
    }

    /// Where total `n` is made.
    #[inline(always)]
    unsafe fn sums(&self, n: u32) -> *mut u64 {
        unsafe {
            let first = (&raw mut (*self.row.common).sums).cast::<u64>();
            first.add((n % 2 * BLOCKS) as usize)
        }
    }

    /// Where histogram `n` is made.
    #[inline(always)]
    pub(super) unsafe fn histogram(&self, n: u32) -> *mut u64 {
        unsafe {
            let first = (&raw mut (*self.row.common).histograms).cast::<u64>();
            first.add((n % 3 * BINS) as usize)
        }
    }

    /// Every scaled logit of the block with its id, this thread's share.
    #[inline(always)]
    pub(super) unsafe fn each(&self, mut f: impl FnMut(usize, f32)) {
        unsafe {
            self.each_in_step(|i, v| {
                if i < self.end {
                    f(i, v);
                }
            });
        }
    }

    /// The same for all of a warp's lanes at once, some perhaps with an id past the block's end.
    #[inline(always)]
    pub(super) unsafe fn each_in_step(&self, mut f: impl FnMut(usize, f32)) {
        let mut first = self.first + thread_idx_x() as usize;
        while first - (lane_id() as usize) < self.end {
            let mut v = [0.0; AT_ONCE];
            for k in 0..AT_ONCE {
                let i = first + k * THREADS as usize;
                if i < self.end {
                    v[k] = unsafe { self.row.work.add(i).read() };
                }
            }
            for k in 0..AT_ONCE {
                f(first + k * THREADS as usize, v[k]);
            }
            first += AT_ONCE * THREADS as usize;
        }
    }

    /// Sums over the block.
    #[inline(always)]
    pub(super) unsafe fn scan(&self, v: u64) -> Sums {
        let (sums, t) = (shared::at::<u64>(SUMS_AT), thread_idx_x());
        let mut upto = v;
        let mut width = 1;
        while width < opaque(32) {
            let low = warp::shuffle_up(upto as u32, width);
            let high = warp::shuffle_up((upto >> 32) as u32, width);
            if lane_id() >= width {
                upto += (u64::from(high) << 32) | u64::from(low);
            }
            width *= 2;
        }
        unsafe {
            if lane_id() == 31 {
                sums.add(t / 32).store(upto);
            }
            sync_threads();
            let mut found = Sums {
                before: upto - v,
                all: 0,
            };
            for i in 0..opaque(THREADS / 32) {
                let sum = sums.add(i).load();
                if i < t / 32 {
                    found.before += sum;
                }
                found.all += sum;
            }
            sync_threads();
            found
        }
    }

    /// Sums over all blocks of each one's `v`, and of those before this one. All meet.
    #[inline(always)]
    pub(super) unsafe fn total(&mut self, v: u64) -> Sums {
        let t = thread_idx_x();
        unsafe {
            // Others may still read the last one's.
            let sums = self.sums(self.totals);
            self.totals += 1;
            if t == 0 {
                sums.add(self.index as usize).write(v);
            }
            self.meet();
            let own = if t < self.blocks {
                sums.add(t as usize).read()
            } else {
                0
            };
            let all = self.scan(own).all;
            let before = self.scan(if t < self.index { own } else { 0 }).all;
            Sums { before, all }
        }
    }
}
