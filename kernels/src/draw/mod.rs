//! Drawing tokens on the device, by the definition in the host's `sampling` module: one launch for any number of rows.
//!
//! A row's logits are shared out among blocks, each with consecutive ids. What decides is found together: each block leaves what it
//! has found of its own in global memory, all [meet](Block::meet), and each looks at what all have left. Every sum that decides is
//! of integers, so the order of threads never shows, nor how many blocks there are, nor what other rows.
//!
//! A launch goes through the code once, and each time its instructions come from memory. So loops of few rounds end at
//! [`opaque`](cuda_std::int::opaque) numbers: they would else be unrolled.

mod block;
mod few;
mod mass;
mod select;

use crate::sample::{max_u64, rank};
use block::{AT_ONCE, Block};
use cuda_std::kernel;
use cuda_std::memory::{ldg_f32, ldg_u32};
use cuda_std::thread::{sync_threads, thread_idx_x};
use mass::{ONE, least_mass, least_sum, mass, of_order, scaled, share};

/// Threads per block.
pub const THREADS: u32 = 512;
/// Most blocks of a row.
pub const BLOCKS: u32 = 64;
/// Shared memory of a block.
pub const SHARED: usize = SHARED_BYTES as usize;

/// The greatest logits are looked for among the greatest of so many groups, or as many as there are threads.
const GROUPS: u32 = BLOCKS * THREADS / 32;
/// Most of a row's greatest logits that are looked at one by one.
const CANDIDATES: u32 = 1024;
/// A bin for each thread, though a rank's eight bits are only of 256: where some threads had none, these would come to a barrier by another
/// way, which compute-sanitizer's synccheck takes for divergence.
const BINS: u32 = THREADS;

/// Arguments of [`draw`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DrawArgs {
    pub rows: *const DrawRow,
    /// Blocks of each row: a power of two, [`BLOCKS`] at most.
    pub blocks: u32,
}

/// A row that a token is drawn for.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DrawRow {
    pub logits: *const f32,
    /// Scratch, as long as the vocabulary.
    pub work: *mut f32,
    pub common: *mut Common,
    /// Zero, and this launch's alone.
    pub arrived: *mut u32,
    /// Ids that the penalty applies to, each once or more often.
    pub seen: *mut u32,
    /// Null, or where one more lies, as `out` has it; it is then added to `seen`, for launches to come.
    pub last: *const u64,
    /// The id, with `number` above it.
    pub out: *mut u64,
    /// Null, or two more places for the same: one for a decode step, which leaves the likeliest there, and one for the next draw.
    pub next: *mut u64,
    pub number: u32,
    pub vocabulary: u32,
    pub seen_len: u32,
    pub penalty: f32,
    /// 0 for greedy choice after the penalty.
    pub temperature: f32,
    pub top_k: u32,
    /// `top_p`, `min_p` and `u` in units of 2^-24.
    pub top_p: u32,
    pub min_p: u32,
    pub u: u32,
}

/// What a row's blocks leave for each other; whatever it was before.
#[repr(C)]
pub struct Common {
    maxima: [u64; GROUPS as usize],
    sums: [[u64; BLOCKS as usize]; 2],
    histograms: [[u64; BINS as usize]; 3],
    ranks: [u64; CANDIDATES as usize],
    masses: [u64; CANDIDATES as usize],
    listed: u32,
}

/// Shared memory: a histogram, sums of warps, scalars, the groups' greatest, candidates.
const SUMS_AT: u32 = 8 * BINS;
const FOUND_AT: u32 = SUMS_AT + 8 * (THREADS / 32);
const ORDERS_AT: u32 = FOUND_AT + 16;
const RANKS_AT: u32 = ORDERS_AT + 4 * GROUPS;
const MASSES_AT: u32 = RANKS_AT + 8 * CANDIDATES;
const SHARED_BYTES: u32 = MASSES_AT + 8 * CANDIDATES;

impl Block {
    /// `work = logits / temperature`, with the penalty at the ids seen: a positive logit is divided, another multiplied. The greatest
    /// rank of this thread's.
    #[inline(always)]
    unsafe fn scale(&self) -> u64 {
        let mut own = 0;
        let row = &self.row;
        unsafe {
            let mut first = self.first + thread_idx_x() as usize;
            while first < self.end {
                let mut v = [0.0; AT_ONCE];
                for k in 0..AT_ONCE {
                    let i = first + k * THREADS as usize;
                    if i < self.end {
                        v[k] = ldg_f32(row.logits.add(i));
                    }
                }
                for k in 0..AT_ONCE {
                    let i = first + k * THREADS as usize;
                    if i < self.end {
                        let v = scaled(v[k], row.temperature);
                        row.work.add(i).write(v);
                        own = max_u64(own, rank(v, i));
                    }
                }
                first += AT_ONCE * THREADS as usize;
            }
            if row.penalty == 1.0 {
                return own;
            }
            sync_threads();
            let mut i = thread_idx_x();
            while i < row.seen_len {
                self.penalise(ldg_u32(row.seen.add(i as usize)) as usize);
                i += THREADS;
            }
            if thread_idx_x() == 0 && !row.last.is_null() {
                let id = row.last.read() as u32;
                self.penalise(id as usize);
                if self.index == 0 {
                    row.seen.add(row.seen_len as usize).write(id);
                }
            }
            sync_threads();
            own = 0;
            self.each(|i, v| own = max_u64(own, rank(v, i)));
            own
        }
    }

    #[inline(always)]
    unsafe fn penalise(&self, id: usize) {
        let row = &self.row;
        if id >= self.first && id < self.end {
            unsafe {
                let v = scaled(ldg_f32(row.logits.add(id)), 0.0);
                let v = if v > 0.0 {
                    v / row.penalty
                } else {
                    v * row.penalty
                };
                row.work.add(id).write(scaled(v, row.temperature));
            }
        }
    }

    /// Draws one of what is not below `floor`, nor too unlikely.
    #[inline(always)]
    unsafe fn draw(&mut self, floor: u64, peak: f32) {
        let row = self.row;
        let least = least_mass(&row);
        let keeps = |i: usize, v: f32| -> u64 {
            let m = mass(v, peak);
            if rank(v, i) >= floor && m >= least {
                m
            } else {
                0
            }
        };
        // Each thread sums a run of consecutive ids, so that the walk below is in order of ids.
        let run = (self.end - self.first).div_ceil(THREADS as usize);
        let bound = |t: u32| {
            let id = self.first + t as usize * run;
            if id < self.end { id } else { self.end }
        };
        let (start, end) = (bound(thread_idx_x()), bound(thread_idx_x() + 1));
        let mut sum = 0;
        unsafe {
            let mut first = start;
            while first < end {
                let mut v = [0.0; AT_ONCE];
                for k in 0..AT_ONCE {
                    if first + k < end {
                        v[k] = row.work.add(first + k).read();
                    }
                }
                for k in 0..AT_ONCE {
                    if first + k < end {
                        sum += keeps(first + k, v[k]);
                    }
                }
                first += AT_ONCE;
            }
            let threads = self.scan(sum);
            let blocks = self.total(threads.all);
            let (goal, _) = share(row.u, blocks.all);
            let mut running = blocks.before + threads.before;
            if running <= goal && goal < running + sum {
                for i in start..end {
                    running += keeps(i, row.work.add(i).read());
                    if running > goal {
                        self.answer(i as u32);
                        break;
                    }
                }
            }
        }
    }

    /// Leaves the choice where it is awaited, in one thread.
    #[inline(always)]
    unsafe fn answer(&self, id: u32) {
        let choice = (u64::from(self.row.number) << 32) | u64::from(id);
        unsafe {
            if !self.row.next.is_null() {
                self.row.next.write(choice);
                self.row.next.add(1).write(choice);
            }
            self.row.out.write_volatile(choice);
        }
    }
}

/// Penalty, temperature, top-k, top-p, min-p and the draw, of each row. A cooperative launch of [`DrawArgs::blocks`] a row, with
/// [`SHARED`] bytes.
#[kernel(launch_bounds(512, 1))]
pub unsafe fn draw(a: DrawArgs) {
    unsafe {
        let mut b = Block::of(&a);
        let first = thread_idx_x() == 0 && b.index == 0;
        let row = b.row;
        let own = b.scale();
        let best = b.greatest(own);
        let peak = of_order((best >> 32) as u32);
        if row.temperature <= 0.0 || peak == f32::NEG_INFINITY {
            if first {
                b.answer(!(best as u32));
            }
            return;
        }
        if let Some(id) = b.draw_of_few(peak) {
            if first {
                b.answer(id);
            }
            return;
        }
        let mut floor = 0;
        if row.top_k > 0 && row.top_k < row.vocabulary {
            floor = b.select(0, u64::from(row.top_k), |_| 1);
        }
        if u64::from(row.top_p) < ONE {
            let mut sum = 0;
            b.each(|i, v| {
                if rank(v, i) >= floor {
                    sum += mass(v, peak);
                }
            });
            let own = b.scan(sum).all;
            let goal = least_sum(row.top_p, b.total(own).all);
            floor = max_u64(floor, b.select(floor, goal, |v| mass(v, peak)));
        }
        b.draw(floor, peak);
    }
}
