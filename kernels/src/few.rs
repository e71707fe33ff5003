//! Matrix times one row or a few, a warp for each output: where tiles for tensor cores would leave most of the card
//! without work.

use crate::gemm::GemmArgs;
use crate::types::{GROUP, unpack};
use crate::unrolled;
use cuda_std::half::F16;
use cuda_std::int::{here, opaque};
use cuda_std::memory::{ldg_f32, ldg_v4_u32};
use cuda_std::thread::{block_idx_x, block_idx_y, thread_idx_x};
use cuda_std::{kernel, thread, warp};

/// Threads per block; a warp computes one output column for [`ROWS`] rows.
pub const THREADS: u32 = 256;
/// Input rows that one warp multiplies with the weights it unpacked.
pub const ROWS: usize = 4;

/// `out = x Wᵀ + b`, or `out += …`, of rows of f16. Grid: `(matrix rows / 8, rows / 4)`.
#[kernel(launch_bounds(256, 3))]
pub unsafe fn linear_few(a: GemmArgs) {
    let r = block_idx_x() as usize * (THREADS as usize / 32) + thread_idx_x() as usize / 32;
    let n = a.matrix.rows as usize;
    if r >= n {
        return;
    }
    let lane = thread::lane_id() as usize;
    let (groups, rows) = (a.matrix.groups(), a.rows as usize);
    let first = block_idx_y() as usize * ROWS;
    let mut sums = [0.0f32; ROWS];
    unsafe {
        let mut g = lane;
        while g < groups {
            let w = unpack(&a.matrix, r, g);
            // The input after the weights: both at once would take twice the registers.
            let at = here((g * GROUP) as u32) as usize;
            for t in 0..ROWS {
                if first + t < rows {
                    let x = a.x.add((first + t) * a.matrix.cols as usize + at);
                    for i in 0..GROUP / 8 {
                        let eight = ldg_v4_u32(x.add(8 * i));
                        let eight: [f32; 8] = unrolled!(8, |k| F16::from_bits(
                            (eight[k / 2] >> (16 * (k % 2))) as u16
                        )
                        .to_f32());
                        for k in 0..8 {
                            sums[t] += w[8 * i + k] * eight[k];
                        }
                    }
                }
            }
            // Not unrolled.
            g += 32 * opaque(1) as usize;
        }
        for t in 0..ROWS {
            let v = warp::reduce_sum_f32(sums[t]);
            if lane == 0 && first + t < rows {
                let out = a.out.add((first + t) * n + r);
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
