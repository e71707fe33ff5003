//! The plain product: f32 activations, f32 arithmetic, any number of rows. It is what `--exact` runs
//! on and what the fast products are held against.

use crate::types::{GROUP, Matrix, unpack};
use cuda_std::memory::{ld_v4_u32, ldg_f32};
use cuda_std::thread::{block_idx_x, block_idx_y, thread_idx_x};
use cuda_std::{kernel, thread, warp};

/// Threads per block; a warp computes one output column for [`ROWS`] rows.
pub const THREADS: u32 = 256;
/// Input rows that one warp multiplies with the weights it unpacked.
pub const ROWS: usize = 8;

/// Arguments of [`linear_exact`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LinearArgs {
    pub matrix: Matrix,
    pub bias: *const f32,
    /// f32 `[rows][len]`.
    pub x: *const f32,
    pub len: u32,
    pub rows: u32,
    /// f32 `[rows][matrix rows]`.
    pub out: *mut f32,
    pub add: u32,
}

/// The product of a group of weights and the values at `x`, of which `left` are there.
#[inline(always)]
pub(crate) unsafe fn dot(w: &[f32; GROUP], x: *const f32, left: usize) -> f32 {
    let mut sum = 0.0;
    unsafe {
        // Four at a time where they can be: lanes read side by side what would else be a line for each.
        if left >= GROUP && x as usize % 16 == 0 {
            for i in 0..GROUP / 4 {
                let four = ld_v4_u32(x.add(4 * i)).map(f32::from_bits);
                for k in 0..4 {
                    sum += w[4 * i + k] * four[k];
                }
            }
        } else {
            for i in 0..GROUP {
                if i < left {
                    sum += w[i] * x.add(i).read();
                }
            }
        }
    }
    sum
}

/// `out = x Wᵀ + b`, or `out += …`. Grid: `(matrix rows / 8, rows / 8)`.
#[kernel(launch_bounds(256))]
pub unsafe fn linear_exact(a: LinearArgs) {
    let r = block_idx_x() as usize * (THREADS as usize / 32) + thread_idx_x() as usize / 32;
    if r >= a.matrix.rows as usize {
        return;
    }
    let lane = thread::lane_id() as usize;
    let groups = a.matrix.groups();
    let (len, rows) = (a.len as usize, a.rows as usize);
    let first = block_idx_y() as usize * ROWS;
    let mut sums = [0.0f32; ROWS];
    unsafe {
        let mut g = lane;
        while g < groups {
            let w = unpack(&a.matrix, r, g);
            for t in 0..ROWS {
                if first + t < rows {
                    let x = a.x.add((first + t) * len + g * GROUP);
                    sums[t] += dot(&w, x, len - g * GROUP);
                }
            }
            g += 32;
        }
        for t in 0..ROWS {
            let v = warp::reduce_sum_f32(sums[t]);
            if lane == 0 && first + t < rows {
                let out = a.out.add((first + t) * a.matrix.rows as usize + r);
                let v = if a.bias.is_null() {
                    v
                } else {
                    v + ldg_f32(a.bias.add(r))
                };
                out.write(if a.add != 0 { out.read() + v } else { v });
            }
        }
    }
}
