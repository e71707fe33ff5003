//! Mixtures of experts: rows are routed on the device, and only the experts that a row picked are read.
//!
//! A *slot* is one pick of one row, `[rows][used]`.

use crate::exact::dot;
use crate::types::{GROUP, Matrix, unpack};
use cuda_std::int::{here, opaque};
use cuda_std::memory::ldg_f32;
use cuda_std::thread::{
    block_idx_x, block_idx_y, griddepcontrol_launch_dependents, griddepcontrol_wait, index_1d,
    thread_idx_x,
};
use cuda_std::{float, kernel, thread, warp};

/// Threads per block of [`route`] and [`expert_linear`]: a warp to a row, or to an output.
pub const THREADS: u32 = 256;

/// Arguments of [`route`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RouteArgs {
    /// f32 `[rows][count]`.
    pub scores: *const f32,
    pub rows: u32,
    pub count: u32,
    pub used: u32,
    /// Whether the weights of a row add up to 1.
    pub renormalise: u32,
    /// `[rows][used]`.
    pub ids: *mut u32,
    /// f32 `[rows][used]`.
    pub weights: *mut f32,
}

/// Picks each row's experts, those with the greatest scores, the lower number first among equals, and
/// weighs them by softmax. A warp per row.
#[kernel(launch_bounds(256))]
pub unsafe fn route(a: RouteArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    let row = block_idx_x() as usize * (THREADS as usize / 32) + thread_idx_x() as usize / 32;
    if row >= a.rows as usize {
        return;
    }
    let lane = thread::lane_id();
    let (count, used) = (a.count, a.used as usize);
    unsafe {
        let scores = a.scores.add(row * count as usize);
        let (ids, weights) = (a.ids.add(row * used), a.weights.add(row * used));
        // The pick before, after which the next comes.
        let (mut last, mut last_id) = (f32::INFINITY, 0);
        let (mut top, mut mass) = (0.0, 0.0);
        for slot in 0..used {
            let (mut best, mut best_id) = (f32::NEG_INFINITY, u32::MAX);
            let mut e = lane;
            while e < count {
                let s = scores.add(e as usize).read();
                let after = s < last || (s == last && slot > 0 && e > last_id);
                if after && (s > best || best_id == u32::MAX) {
                    (best, best_id) = (s, e);
                }
                e += 32;
            }
            let mut width = 16;
            while width > 0 {
                let (s, id) = (
                    warp::shuffle_xor(best, width),
                    warp::shuffle_xor(best_id, width),
                );
                let better = id != u32::MAX
                    && (best_id == u32::MAX || s > best || (s == best && id < best_id));
                if better {
                    (best, best_id) = (s, id);
                }
                width /= 2;
            }
            // Scores that are no numbers are never picked; some expert must be.
            let id = if best_id < count { best_id } else { 0 };
            if slot == 0 {
                top = best;
            }
            let weight = float::exp(best - top);
            mass += weight;
            (last, last_id) = (best, best_id);
            if lane == 0 {
                ids.add(slot).write(id);
                weights.add(slot).write(weight);
            }
        }
        if a.renormalise == 0 {
            let mut sum = 0.0;
            let mut e = lane;
            while e < count {
                sum += float::exp(scores.add(e as usize).read() - top);
                e += 32;
            }
            mass = warp::reduce_sum_f32(sum);
        }
        warp::sync_warp();
        let mut slot = lane as usize;
        while slot < used {
            let at = weights.add(slot);
            at.write(at.read() / mass);
            slot += 32;
        }
    }
}

/// Arguments of [`expert_linear`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ExpertArgs {
    /// The experts' matrices, one after the other.
    pub matrix: Matrix,
    /// f32, the experts' biases, one after the other; or null.
    pub bias: *const f32,
    /// `[slots]`.
    pub ids: *const u32,
    /// f32 `[slots / slots_per_row][len]`.
    pub x: *const f32,
    pub slots_per_row: u32,
    pub len: u32,
    /// Matrix rows of one expert.
    pub rows: u32,
    /// f32 `[slots][rows]`.
    pub out: *mut f32,
}

/// `out = W x + b` with the matrix of each slot's expert: a warp for each output. Grid:
/// `(rows / 8, slots)`.
#[kernel(launch_bounds(256, 2))]
pub unsafe fn expert_linear(a: ExpertArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    let r = block_idx_x() as usize * (THREADS as usize / 32) + thread_idx_x() as usize / 32;
    let rows = a.rows as usize;
    if r >= rows {
        return;
    }
    let slot = block_idx_y() as usize;
    let lane = thread::lane_id() as usize;
    let (groups, len) = (a.matrix.groups(), a.len as usize);
    unsafe {
        let at = a.ids.add(slot).read() as usize * rows + r;
        let x = a.x.add(slot / (a.slots_per_row as usize).max(1) * len);
        let mut sum = 0.0;
        let mut g = lane;
        while g < groups {
            let w = unpack(&a.matrix, at, g);
            // The input after the weights: both at once would take twice the registers.
            let from = here((g * GROUP) as u32) as usize;
            sum += dot(&w, x.add(from), len - from);
            // Not unrolled.
            g += 32 * opaque(1) as usize;
        }
        let mut sum = warp::reduce_sum_f32(sum);
        if lane == 0 {
            if !a.bias.is_null() {
                sum += ldg_f32(a.bias.add(at));
            }
            a.out.add(slot * rows + r).write(sum);
        }
    }
}

/// Arguments of [`combine`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CombineArgs {
    /// f32 `[rows][used][len]`.
    pub x: *const f32,
    /// f32 `[rows][used]`.
    pub weights: *const f32,
    pub used: u32,
    pub len: u32,
    /// f32 `[rows][len]`.
    pub out: *mut f32,
    /// Whether to add to what `out` holds.
    pub add: u32,
}

/// `out = sum of weight * x` over a row's slots, or `out += …`. Block `y` is a row.
#[kernel]
pub unsafe fn combine(a: CombineArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    let (row, i) = (block_idx_y() as usize, index_1d() as usize);
    let len = a.len as usize;
    if i < len {
        unsafe {
            let mut sum = 0.0;
            for slot in row * a.used as usize..(row + 1) * a.used as usize {
                sum += a.weights.add(slot).read() * a.x.add(slot * len + i).read();
            }
            let out = a.out.add(row * len + i);
            out.write(if a.add != 0 { out.read() + sum } else { sum });
        }
    }
}
