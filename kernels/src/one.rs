//! Matrix times one row, a warp for each output: steps of one row that [`crate::decode`] does not know.

use crate::types::{GROUP, Matrix, unpack};
use crate::unrolled;
use cuda_std::half::F16;
use cuda_std::int::{here, opaque};
use cuda_std::memory::{ld_v4_u32, ldg_f32};
use cuda_std::thread::{
    block_idx_x, griddepcontrol_launch_dependents, griddepcontrol_wait, thread_idx_x,
};
use cuda_std::{kernel, thread, warp};

/// Threads per block; a warp computes one output.
pub const THREADS: u32 = 256;

/// Arguments of [`linear_one`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct OneArgs {
    pub matrix: Matrix,
    pub bias: *const f32,
    /// f16 `[matrix.cols]`, 16-byte aligned.
    pub x: *const u16,
    /// f32 `[matrix rows]`.
    pub out: *mut f32,
    pub add: u32,
}

/// `out = x Wᵀ + b`, or `out += …`, of a row of f16. Grid: matrix rows / 8.
#[kernel(launch_bounds(256, 3))]
pub unsafe fn linear_one(a: OneArgs) {
    let r = block_idx_x() as usize * (THREADS as usize / 32) + thread_idx_x() as usize / 32;
    if r >= a.matrix.rows as usize {
        return;
    }
    let lane = thread::lane_id() as usize;
    let groups = a.matrix.groups();
    let mut sum = 0.0f32;
    unsafe {
        let mut g = lane;
        while g < groups {
            let w = unpack(&a.matrix, r, g);
            if g < 32 {
                // The weights do not depend on who makes the input.
                griddepcontrol_wait();
                griddepcontrol_launch_dependents();
            }
            // The input after the weights: both at once would take twice the registers.
            let x = a.x.add(here((g * GROUP) as u32) as usize);
            for i in 0..GROUP / 8 {
                let eight = ld_v4_u32(x.add(8 * i));
                let eight: [f32; 8] = unrolled!(8, |k| F16::from_bits(
                    (eight[k / 2] >> (16 * (k % 2))) as u16
                )
                .to_f32());
                for k in 0..8 {
                    sum += w[8 * i + k] * eight[k];
                }
            }
            // Not unrolled.
            g += 32 * opaque(1) as usize;
        }
        let sum = warp::reduce_sum_f32(sum);
        if lane == 0 {
            let v = if a.bias.is_null() {
                sum
            } else {
                sum + ldg_f32(a.bias.add(r))
            };
            let out = a.out.add(r);
            out.write(if a.add != 0 { out.read() + v } else { v });
        }
    }
}
