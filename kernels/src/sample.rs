//! Choosing a token on the device, by the definition in the host's `sampling` module.
//!
//! [`argmax`] then [`argmax_final`] for temperature 0; else [`scale_logits`], [`penalise`] and
//! [`draw`]. Each takes any number of rows. Every sum that decides is of integers, so the order of threads never
//! shows, nor what other rows there are.

use cuda_std::memory::{ldg_f32, ldg_u32};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::{
    block_dim_x, block_idx_x, block_idx_y, grid_dim_x, index_1d, sync_threads, thread_idx_x,
};
use cuda_std::{atomic, float, kernel, warp};

/// Threads per block of [`argmax`] and [`argmax_final`].
pub const ARGMAX_THREADS: u32 = 256;
/// Blocks of [`argmax`] per row.
pub const ARGMAX_BLOCKS: u32 = 64;
/// Threads of [`draw`].
pub const DRAW_THREADS: u32 = 512;
/// Most of a row's greatest logits that [`draw`] looks at one by one.
const CANDIDATES: u32 = 1024;
/// Shared memory of [`draw`]: a histogram of 256 sums, the threads' sums, scalars, candidates' ranks and masses.
pub const DRAW_SHARED: usize = LISTED_AT as usize + CANDIDATES as usize * 16;
const SUMS_AT: u32 = 256 * 8;
const FOUND_AT: u32 = SUMS_AT + DRAW_THREADS * 8;
const LISTED_AT: u32 = FOUND_AT + 64;

/// Arguments of [`argmax`] and [`argmax_final`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ArgmaxArgs {
    /// f32 `[rows][vocabulary]`.
    pub logits: *const f32,
    pub vocabulary: u32,
    /// `[rows][ARGMAX_BLOCKS]`: the order of a logit above the complement of its id.
    pub partial: *mut u64,
    /// One per row.
    pub out: *mut u32,
}

/// A number whose order is the float's; NaN counts as minus infinity, and both zeros as one.
#[inline(always)]
fn order(v: f32) -> u32 {
    let v = if v.is_nan() {
        f32::NEG_INFINITY
    } else {
        v + 0.0
    };
    let bits = v.to_bits();
    bits ^ if bits >> 31 == 1 {
        u32::MAX
    } else {
        0x8000_0000
    }
}

/// Greater for a greater logit, then for a lower id.
#[inline(always)]
pub(crate) fn rank(v: f32, id: usize) -> u64 {
    (u64::from(order(v)) << 32) | u64::from(!(id as u32))
}

#[inline(always)]
pub(crate) fn max_u64(a: u64, b: u64) -> u64 {
    if a > b { a } else { b }
}

/// The greatest of a warp.
#[inline(always)]
pub(crate) fn warp_max(v: u64) -> u64 {
    let mut v = v;
    let mut width = 16;
    while width > 0 {
        let low = warp::shuffle_xor(v as u32, width);
        let high = warp::shuffle_xor((v >> 32) as u32, width);
        v = max_u64(v, (u64::from(high) << 32) | u64::from(low));
        width /= 2;
    }
    v
}

#[inline(always)]
unsafe fn block_max(v: u64, scratch: SharedPtr<u64>) -> u64 {
    let mut v = warp_max(v);
    unsafe {
        let t = thread_idx_x() as usize;
        if t % 32 == 0 {
            scratch.add(t as u32 / 32).store(v);
        }
        sync_threads();
        for i in 0..block_dim_x() / 32 {
            v = max_u64(v, scratch.add(i).load());
        }
        sync_threads();
        v
    }
}

/// The greatest of each block's share of a row. Grid: `(ARGMAX_BLOCKS, rows)`.
#[kernel(launch_bounds(256))]
pub unsafe fn argmax(a: ArgmaxArgs) {
    let (row, n) = (block_idx_y() as usize, a.vocabulary as usize);
    let mut best = 0;
    let mut i = index_1d() as usize;
    unsafe {
        let logits = a.logits.add(row * n);
        while i < n {
            best = max_u64(best, rank(ldg_f32(logits.add(i)), i));
            i += (grid_dim_x() * block_dim_x()) as usize;
        }
        let best = block_max(best, shared::at(0));
        if thread_idx_x() == 0 {
            a.partial
                .add(row * ARGMAX_BLOCKS as usize + block_idx_x() as usize)
                .write(best);
        }
    }
}

/// The greatest of a row's blocks. Grid: one block a row, of a warp.
#[kernel(launch_bounds(32))]
pub unsafe fn argmax_final(a: ArgmaxArgs) {
    let row = block_idx_x() as usize;
    let t = thread_idx_x() as usize;
    unsafe {
        let part = a.partial.add(row * ARGMAX_BLOCKS as usize);
        let best = max_u64(part.add(t).read(), part.add(t + 32).read());
        let best = block_max(best, shared::at(0));
        if t == 0 {
            a.out.add(row).write(!(best as u32));
        }
    }
}

/// Arguments of [`scale_logits`], [`penalise`] and [`draw`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DrawArgs {
    /// One for each row of the grid.
    pub rows: *const DrawRow,
}

/// A row that a token is drawn for.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DrawRow {
    pub logits: *const f32,
    /// Scratch, as long as the vocabulary.
    pub work: *mut f32,
    /// Distinct ids that the penalty applies to.
    pub seen: *const u32,
    pub out: *mut u32,
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

impl DrawArgs {
    /// The row of this block.
    #[inline(always)]
    unsafe fn row(&self) -> DrawRow {
        unsafe { self.rows.add(block_idx_y() as usize).read() }
    }
}

/// One in units of 2^-24.
const ONE: u64 = 1 << 24;

/// What the sampler makes of a logit: no NaN, one zero, divided by the temperature.
#[inline(always)]
fn scaled(v: f32, temperature: f32) -> f32 {
    let v = if v.is_nan() {
        f32::NEG_INFINITY
    } else {
        v + 0.0
    };
    if temperature > 0.0 {
        v / temperature
    } else {
        v
    }
}

/// `work = logits / temperature`. Grid: blocks for the vocabulary, rows.
#[kernel]
pub unsafe fn scale_logits(a: DrawArgs) {
    let a = unsafe { a.row() };
    let i = index_1d() as usize;
    if i < a.vocabulary as usize {
        unsafe {
            a.work
                .add(i)
                .write(scaled(ldg_f32(a.logits.add(i)), a.temperature))
        };
    }
}

/// The penalty, and the temperature, at the ids seen: a positive logit is divided, another multiplied.
/// Grid: blocks for the most ids of a row, rows.
#[kernel]
pub unsafe fn penalise(a: DrawArgs) {
    let a = unsafe { a.row() };
    let i = index_1d() as usize;
    if i < a.seen_len as usize {
        unsafe {
            let id = ldg_u32(a.seen.add(i)) as usize;
            if id < a.vocabulary as usize {
                let v = scaled(ldg_f32(a.logits.add(id)), 0.0);
                let v = if v > 0.0 {
                    v / a.penalty
                } else {
                    v * a.penalty
                };
                a.work.add(id).write(scaled(v, a.temperature));
            }
        }
    }
}

/// The nearest whole number, ties to even, of a number below 2^31 or whole already.
#[inline(always)]
fn round_ties_even(x: f32) -> f32 {
    if x < 8_388_608.0 {
        float::round_to_i32(x) as f32
    } else {
        x
    }
}

/// `round(exp(v - peak) * 2^40)`: the very operations of the host's `sampling::mass`.
#[inline(always)]
fn mass(v: f32, peak: f32) -> u64 {
    use float::fma;
    let d = if v == peak { 0.0 } else { v - peak };
    if d.is_nan() || d <= -28.5 {
        return 0;
    }
    let d = if d > 0.0 { 0.0 } else { d };
    let n = round_ties_even(d * core::f32::consts::LOG2_E);
    let r = fma(n, -0.693_359_4, d);
    let r = fma(n, 2.121_944_4e-4, r);
    let p = fma(r, 1.0 / 5040.0, 1.0 / 720.0);
    let p = fma(r, p, 1.0 / 120.0);
    let p = fma(r, p, 1.0 / 24.0);
    let p = fma(r, p, 1.0 / 6.0);
    let p = fma(r, p, 0.5);
    let p = fma(r, p, 1.0);
    let p = fma(r, p, 1.0);
    let scale = f32::from_bits(((n as i32 + 40 + 127) as u32) << 23);
    round_ties_even(p * scale) as u64
}

/// `fraction / 2^24` of `total`, rounded down, and whether anything was cut.
#[inline(always)]
fn share(fraction: u32, total: u64) -> (u64, bool) {
    let high = (total >> 24) * u64::from(fraction);
    let low = (total & (ONE - 1)) * u64::from(fraction);
    (high + (low >> 24), low & (ONE - 1) != 0)
}

/// Shared memory of [`draw`].
struct Scratch {
    histogram: SharedPtr<u64>,
    sums: SharedPtr<u64>,
    found: SharedPtr<u64>,
    ranks: SharedPtr<u64>,
    masses: SharedPtr<u64>,
}

/// Every logit of a row, with its id, this thread's share: several are on their way at a time.
#[inline(always)]
unsafe fn each(a: &DrawRow, mut f: impl FnMut(usize, f32)) {
    const AT_ONCE: usize = 8;
    let (threads, n) = (block_dim_x() as usize, a.vocabulary as usize);
    let mut first = thread_idx_x() as usize;
    while first < n {
        let mut v = [0.0; AT_ONCE];
        for k in 0..AT_ONCE {
            let i = first + k * threads;
            if i < n {
                v[k] = unsafe { a.work.add(i).read() };
            }
        }
        for k in 0..AT_ONCE {
            let i = first + k * threads;
            if i < n {
                f(i, v[k]);
            }
        }
        first += AT_ONCE * threads;
    }
}

/// Who is drawn, where the choice is among few: `None` where that is not known, and [`select`] must find it.
///
/// `own` is the greatest rank among this thread's logits. The `K` greatest of all threads' are `K` logits, so that the row's
/// `K` greatest are not below the least of these: they are among its *candidates*, all that are not.
/// The block's threads all come, and all get the same answer.
#[inline(always)]
unsafe fn draw_of_few(a: &DrawRow, s: &Scratch, own: u64, peak: f32) -> Option<u32> {
    /// As many where no number is asked for.
    const MOST: u32 = 256;
    let (t, threads) = (thread_idx_x(), block_dim_x());
    let by_count = a.top_k > 0 && a.top_k < a.vocabulary;
    let by_share = u64::from(a.top_p) < ONE;
    let least = u64::from(a.min_p) << (40 - 24);
    if by_count && a.top_k > MOST || !by_count && !by_share && least == 0 {
        return None;
    }
    let most = if by_count { a.top_k } else { MOST };
    unsafe {
        s.sums.add(t).store(own);
        if t == 0 {
            s.found.store(0);
            s.found.add(1).store(0);
        }
        sync_threads();
        let mut above = 0;
        for i in 0..threads {
            above += u32::from(s.sums.add(i).load() > own);
        }
        // Of threads without a logit there may be several; then all logits are candidates.
        if above == most - 1 && own > 0 {
            s.found.store(own);
        }
        sync_threads();
        let floor = s.found.load();
        let mut sum = 0;
        each(a, |i, v| {
            if by_share && !by_count {
                sum += mass(v, peak);
            }
            let r = rank(v, i);
            if r >= floor {
                let place = atomic::shared_add_u64(s.found.add(1), 1) as u32;
                if place < CANDIDATES {
                    s.ranks.add(place).store(r);
                    s.masses.add(place).store(mass(v, peak));
                }
            }
        });
        let mut total = block_sum(sum, s);
        let count = s.found.add(1).load();
        if count > u64::from(CANDIDATES) {
            return None;
        }
        let count = count as u32;
        // What the others have to be below.
        let complete = floor == 0;
        const EACH: usize = (CANDIDATES / DRAW_THREADS) as usize;
        let mut kept = [0u64; EACH];
        let mut before = [0u64; EACH];
        let (mut in_count, mut all) = (0, 0);
        for k in 0..EACH {
            let c = t + k as u32 * threads;
            if c < count {
                let own = s.ranks.add(c).load();
                let mut above = 0;
                for j in 0..count {
                    if s.ranks.add(j).load() > own {
                        above += 1;
                        before[k] += s.masses.add(j).load();
                    }
                }
                let m = s.masses.add(c).load();
                all += m;
                if !by_count || above < a.top_k {
                    kept[k] = m;
                    in_count += m;
                }
            }
        }
        if by_count {
            total = block_sum(in_count, s);
        }
        let all = block_sum(all, s);
        if by_share {
            let (goal, cut) = share(a.top_p, total);
            let goal = goal + u64::from(cut);
            let goal = if goal == 0 { 1 } else { goal };
            if !by_count && !complete && all < goal {
                return None;
            }
            for k in 0..EACH {
                if before[k] >= goal {
                    kept[k] = 0;
                }
            }
        } else if !by_count && !complete {
            // Then the least candidate must be less likely than any that may be drawn.
            let id = !(floor as u32) as usize;
            if mass(a.work.add(id).read(), peak) >= least {
                return None;
            }
        }
        let mut sum = 0;
        for k in 0..EACH {
            if kept[k] < least {
                kept[k] = 0;
            }
            sum += kept[k];
        }
        let (goal, _) = share(a.u, block_sum(sum, s));
        for k in 0..EACH {
            let c = t + k as u32 * threads;
            if c < count {
                s.masses.add(c).store(kept[k]);
            }
        }
        sync_threads();
        for k in 0..EACH {
            let c = t + k as u32 * threads;
            if c < count && kept[k] > 0 {
                // In the order of ids: a lower one has the greater complement.
                let own = s.ranks.add(c).load() as u32;
                let mut before = 0;
                for j in 0..count {
                    if s.ranks.add(j).load() as u32 > own {
                        before += s.masses.add(j).load();
                    }
                }
                if before <= goal && goal < before + kept[k] {
                    s.found.store(u64::from(!own));
                }
            }
        }
        sync_threads();
        Some(s.found.load() as u32)
    }
}

/// Finds the rank at which the running sum of `weigh`, from the greatest rank down, first reaches
/// `goal`, by eight bits of the rank at a time. Ranks below `floor` do not count.
#[inline(always)]
unsafe fn select(
    a: &DrawRow,
    s: &Scratch,
    floor: u64,
    goal: u64,
    weigh: impl Fn(f32) -> u64,
) -> u64 {
    let (t, threads, n) = (
        thread_idx_x() as usize,
        block_dim_x() as usize,
        a.vocabulary as usize,
    );
    let (mut prefix, mut above) = (0u64, 0u64);
    let mut shift = 64;
    unsafe {
        while shift > 0 {
            shift -= 8;
            if t < 256 {
                s.histogram.add(t as u32).store(0);
            }
            sync_threads();
            let mut i = t;
            while i < n {
                let v = a.work.add(i).read();
                let r = rank(v, i);
                let known = if shift == 56 { 0 } else { r >> (shift + 8) };
                if r >= floor && known == prefix {
                    let m = weigh(v);
                    if m > 0 {
                        let bin = (r >> shift) as u32 & 255;
                        atomic::shared_add_u64(s.histogram.add(bin), m);
                    }
                }
                i += threads;
            }
            sync_threads();
            if t == 0 {
                let (mut bin, mut sum) = (255, above);
                loop {
                    let next = sum + s.histogram.add(bin).load();
                    if next >= goal || bin == 0 {
                        break;
                    }
                    sum = next;
                    bin -= 1;
                }
                s.found.store((prefix << 8) | bin as u64);
                s.found.add(1).store(sum);
            }
            sync_threads();
            prefix = s.found.load();
            above = s.found.add(1).load();
            sync_threads();
        }
    }
    prefix
}

/// Sum over the block of each thread's `v`.
#[inline(always)]
unsafe fn block_sum(v: u64, s: &Scratch) -> u64 {
    let t = thread_idx_x() as usize;
    unsafe {
        s.sums.add(t as u32).store(v);
        sync_threads();
        let mut width = block_dim_x() as usize / 2;
        while width > 0 {
            if t < width {
                let at = s.sums.add(t as u32);
                at.store(at.load() + at.add(width as u32).load());
            }
            sync_threads();
            width /= 2;
        }
        let sum = s.sums.load();
        sync_threads();
        sum
    }
}

/// Top-k, top-p, min-p and the draw. Grid: one block a row, `(1, rows)`.
#[kernel(launch_bounds(512, 1))]
pub unsafe fn draw(a: DrawArgs) {
    let a = unsafe { a.row() };
    let (t, threads, n) = (
        thread_idx_x() as usize,
        block_dim_x() as usize,
        a.vocabulary as usize,
    );
    let s = Scratch {
        histogram: shared::at(0),
        sums: shared::at(SUMS_AT),
        found: shared::at(FOUND_AT),
        ranks: shared::at(LISTED_AT),
        masses: shared::at(LISTED_AT + CANDIDATES * 8),
    };
    unsafe {
        let mut own = 0;
        each(&a, |i, v| own = max_u64(own, rank(v, i)));
        let best = block_max(own, s.sums);
        let best_id = !(best as u32) as usize;
        if a.temperature <= 0.0 {
            if t == 0 {
                a.out.write(best_id as u32);
            }
            return;
        }
        let peak = a.work.add(best_id).read();
        if peak == f32::NEG_INFINITY {
            if t == 0 {
                a.out.write(best_id as u32);
            }
            return;
        }
        if let Some(id) = draw_of_few(&a, &s, own, peak) {
            if t == 0 {
                a.out.write(id);
            }
            return;
        }
        let mut floor = 0;
        if a.top_k > 0 && (a.top_k as usize) < n {
            floor = select(&a, &s, 0, u64::from(a.top_k), |_| 1);
        }
        if u64::from(a.top_p) < ONE {
            let mut sum = 0;
            let mut i = t;
            while i < n {
                let v = a.work.add(i).read();
                if rank(v, i) >= floor {
                    sum += mass(v, peak);
                }
                i += threads;
            }
            let (goal, cut) = share(a.top_p, block_sum(sum, &s));
            let goal = goal + u64::from(cut);
            let goal = if goal == 0 { 1 } else { goal };
            floor = max_u64(floor, select(&a, &s, floor, goal, |v| mass(v, peak)));
        }
        let least = u64::from(a.min_p) << (40 - 24);
        let keeps = |v: f32, i: usize| -> u64 {
            let m = mass(v, peak);
            if rank(v, i) >= floor && m >= least {
                m
            } else {
                0
            }
        };
        // Each thread sums a run of consecutive ids, so that the walk below is in order of ids.
        let run = n.div_ceil(threads);
        let (start, end) = (t * run, if (t + 1) * run < n { (t + 1) * run } else { n });
        let mut sum = 0;
        for i in start..end {
            sum += keeps(a.work.add(i).read(), i);
        }
        let total = block_sum(sum, &s);
        s.sums.add(t as u32).store(sum);
        sync_threads();
        let (goal, _) = share(a.u, total);
        let mut before = 0;
        for i in 0..t {
            before += s.sums.add(i as u32).load();
        }
        if before <= goal && goal < before + sum {
            let mut running = before;
            for i in start..end {
                running += keeps(a.work.add(i).read(), i);
                if running > goal {
                    a.out.write(i as u32);
                    break;
                }
            }
        }
    }
}
