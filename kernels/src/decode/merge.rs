//! Merging the parts that attention's splits have left of a row.

use super::attend::{OCTET, part_at};
use super::seal::Seal;
use super::{Current, WARPS, get, lane, thread};
use crate::attention::NONE;
use cuda_std::int::quotient;
use cuda_std::memory::ld_relaxed_v4_u32;
use cuda_std::thread::block_idx_x;
use cuda_std::{float, warp};

/// Most splits of a head's tokens: a lane merges so many times as many as a warp has lanes.
pub const MAX_SPLITS: u32 = 32 * EACH as u32;
const EACH: usize = 3;

const WORDS: usize = OCTET as usize;

/// In the blocks that merge, a warp for each eight elements of the row, a lane for every 32nd split.
///
/// `Σ 2^(pₛ - p) sumₛ / Σ 2^(pₛ - p) massₛ`, with `p` the greatest of the peaks `pₛ` (arXiv:2205.14135, section 3.1).
#[inline(always)]
pub unsafe fn merge(op: Current) {
    unsafe {
        let (head_dim, splits) = (get!(op, cache.head_dim), get!(op, splits));
        // Parts and the row they become are of one operation.
        let seal = Seal::of(op, get!(op, number)).here();
        // Of a task's elements every fourth lane has one, in the end.
        let own = lane() / 16 * 4 + lane() / 8 % 2 * 2 + lane() / 4 % 2;
        // Neighbours in different blocks.
        let mut task = block_idx_x() + thread() / 32 * get!(op, mergers);
        while task < get!(op, heads) * (head_dim / OCTET) {
            let head = quotient(task, head_dim / OCTET);
            let element = OCTET * (task - head * (head_dim / OCTET));
            let to = get!(op, out).add((head * head_dim + element + own) as usize);
            let exists = |i: usize| lane() + 32 * (i as u32) < splits;
            // Peak and mass, and the elements' sums, of each.
            let of = |i: usize| {
                // Behind the last that is as good as any.
                let split = if exists(i) {
                    lane() + 32 * i as u32
                } else {
                    splits - 1
                };
                let of = |element: u32| {
                    let at = part_at(head_dim, splits, head, element, split);
                    get!(op, parts).cast_const().add(at as usize)
                };
                let values = of(element);
                [of(head_dim), values, values.add(4)]
            };
            let mut words = [[[0u32; 4]; 3]; EACH];
            words[0] = seal.await_all(of(0));
            // The others are there by then, most often: one look at all of them.
            for i in 1..EACH {
                if 32 * (i as u32) < splits {
                    words[i] = of(i).map(|from| ld_relaxed_v4_u32(from));
                }
            }
            for i in 1..EACH {
                if 32 * (i as u32) < splits {
                    let there = words[i].iter().all(|words| seal.all_on(*words));
                    if !warp::all(there) {
                        words[i] = seal.await_all(of(i));
                    }
                }
            }
            let stats = words.map(|[stats, ..]| [stats[0], stats[1]]);
            let mut peak = NONE;
            for i in 0..EACH {
                if exists(i) {
                    peak = peak.max(seal.open(stats[i][0]));
                }
            }
            peak = warp::reduce_max_f32(peak);
            let (mut mass, mut sums) = (0.0, [0.0f32; WORDS]);
            for i in 0..EACH {
                if exists(i) {
                    let weight = float::exp2_approx(seal.open(stats[i][0]) - peak);
                    mass += weight * seal.open(stats[i][1]);
                    for k in 0..WORDS {
                        sums[k] += weight * seal.open(words[i][1 + k / 4][k % 4]);
                    }
                }
            }
            // Halves of the lanes take halves of the elements, and so on: fewer exchanges than of all elements among all lanes.
            let four: [f32; 4] = halved(&sums, 16);
            let two: [f32; 2] = halved(&four, 8);
            let [mut sum] = halved(&two, 4);
            for width in [2, 1] {
                sum += warp::shuffle_xor(sum, width);
            }
            let mass = warp::reduce_sum_f32(mass);
            if lane() % 4 == 0 {
                seal.write(to, sum * float::rcp_approx(mass));
            }
            task += get!(op, mergers) * WARPS;
        }
    }
}

/// Of two lanes `width` apart the first gets the sums of both of the first half of their elements, the other those of the second.
#[inline(always)]
fn halved<const N: usize, const H: usize>(sums: &[f32; N], width: u32) -> [f32; H] {
    const { assert!(N == 2 * H) };
    let upper = lane() & width != 0;
    let mut half = [0.0; H];
    for k in 0..H {
        let (keep, pass) = if upper {
            (sums[k + H], sums[k])
        } else {
            (sums[k], sums[k + H])
        };
        half[k] = keep + warp::shuffle_xor(pass, width);
    }
    half
}
