//! Merging the parts that attention's splits have left of a row.

use super::attend::{PART, WIDTH};
use super::seal::Seal;
use super::{Current, WARPS, blocks, get, lane, thread};
use crate::attention::NONE;
use cuda_std::int::quotient;
use cuda_std::memory::ld_relaxed_v4_u32;
use cuda_std::thread::{block_idx_x, spin};
use cuda_std::{float, warp};

/// Most splits of a head's tokens: a lane merges so many times as many as a warp has lanes.
pub const MAX_SPLITS: u32 = 32 * EACH as u32;
const EACH: usize = 3;

/// [`kind::MERGE`](super::kind::MERGE): a warp for each four elements, a lane for every 32nd split.
///
/// `Σ 2^(pₛ - p) sumₛ / Σ 2^(pₛ - p) massₛ`, with `p` the greatest of the peaks `pₛ` (arXiv:2205.14135, section 3.1).
#[inline(always)]
pub unsafe fn merge(op: Current) {
    unsafe {
        let (head_dim, splits) = (get!(op, cache.head_dim), get!(op, splits));
        let seal = Seal::of(op, get!(op, input.from));
        // Neighbours in different blocks.
        let mut task = block_idx_x() + thread() / 32 * blocks();
        while task < get!(op, heads) * (head_dim / 4) {
            let head = quotient(task, head_dim / 4);
            let element = 4 * (task - head * (head_dim / 4));
            let part = head * head_dim.div_ceil(WIDTH) + element / WIDTH;
            let parts = get!(op, input.x).add((part * splits * PART) as usize);
            let exists = |i: usize| lane() + 32 * (i as u32) < splits;
            let mut stats = [[0u32; 4]; EACH];
            let mut values = [[0u32; 4]; EACH];
            loop {
                let mut all = true;
                for i in 0..EACH {
                    if exists(i) {
                        let split = lane() + 32 * i as u32;
                        let part = parts.add((split * PART) as usize);
                        stats[i] = ld_relaxed_v4_u32(part.add(WIDTH as usize));
                        values[i] = ld_relaxed_v4_u32(part.add((element % WIDTH) as usize));
                        all &= seal.on(stats[i][0]) && seal.on(stats[i][1]);
                        all &= seal.all_on(values[i]);
                    }
                }
                if warp::all(all) {
                    break;
                }
                spin();
            }
            let mut peak = NONE;
            for i in 0..EACH {
                if exists(i) {
                    peak = peak.max(seal.open(stats[i][0]));
                }
            }
            peak = warp::reduce_max_f32(peak);
            let (mut mass, mut sums) = (0.0, [0.0f32; 4]);
            for i in 0..EACH {
                if exists(i) {
                    let weight = float::exp2_approx(seal.open(stats[i][0]) - peak);
                    mass += weight * seal.open(stats[i][1]);
                    for k in 0..4 {
                        sums[k] += weight * seal.open(values[i][k]);
                    }
                }
            }
            mass = warp::reduce_sum_f32(mass);
            let inverse = float::rcp_approx(mass);
            let mut mine = 0.0;
            for k in 0..4 {
                let sum = warp::reduce_sum_f32(sums[k]);
                if lane() == k as u32 {
                    mine = sum * inverse;
                }
            }
            if lane() < 4 {
                let to = get!(op, out).add((head * head_dim + element + lane()) as usize);
                Seal::of(op, get!(op, number)).write(to, mine);
            }
            task += blocks() * WARPS;
        }
    }
}
