//! The rank at which a running sum over all logits, from the greatest down, reaches a goal.

use super::block::Block;
use super::{BINS, FOUND_AT};
use crate::sample::rank;
use cuda_std::int::opaque;
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::{lane_id, sync_threads, thread_idx_x};
use cuda_std::{atomic, warp};

impl Block {
    /// Finds the rank at which the running sum of `weigh`, from the greatest rank down, first reaches
    /// `goal`, by eight bits of the rank at a time. Ranks below `floor` do not count.
    #[inline(always)]
    pub(super) unsafe fn select(
        &mut self,
        floor: u64,
        goal: u64,
        weigh: impl Fn(f32) -> u64,
    ) -> u64 {
        let t = thread_idx_x();
        let bins = shared::at::<u64>(0);
        let found = shared::at::<u64>(FOUND_AT);
        let (mut prefix, mut above) = (0u64, 0u64);
        let mut pass = 0;
        unsafe {
            while pass < opaque(8) {
                let shift = 56 - 8 * pass;
                bins.add(t).store(0);
                sync_threads();
                self.each_in_step(|i, v| {
                    let (mut bin, mut m) = (0, 0);
                    let r = rank(v, i);
                    let known = if pass == 0 { 0 } else { r >> (shift + 8) };
                    if i < self.end && r >= floor && known == prefix {
                        m = weigh(v);
                        bin = (r >> shift) as u32 & 255;
                    }
                    add_to_bins(bins, bin, m);
                });
                sync_threads();
                let histogram = self.histogram(self.histograms);
                let own = bins.add(t).load();
                if own > 0 {
                    atomic::add_u64(histogram.add(t as usize), own);
                }
                self.meet();
                if self.index == 0 {
                    // All have read the last one, in whose place nobody adds before all have met again.
                    let last = self.histogram(self.histograms + 2);
                    last.add(t as usize).write(0);
                }
                self.histograms += 1;
                // From the greatest down.
                let bin = BINS - 1 - t;
                let own = histogram.add(bin as usize).read();
                let before = above + self.scan(own).before;
                let reached = before + own >= goal;
                if before < goal && (reached || bin == 0) {
                    found.store((prefix << 8) | u64::from(bin));
                    found.add(1).store(before);
                }
                sync_threads();
                prefix = found.load();
                above = found.add(1).load();
                sync_threads();
                pass += 1;
            }
        }
        prefix
    }
}

/// `bins[bin] += m`, of each lane. Where many lanes have the same, one adds for them: additions to the same place come one after the
/// other.
#[inline(always)]
unsafe fn add_to_bins(bins: SharedPtr<u64>, bin: u32, m: u64) {
    const TOGETHER: u32 = 4;
    let mut left = m > 0;
    unsafe {
        for _ in 0..opaque(TOGETHER) {
            let lanes = warp::ballot(left);
            if lanes == 0 {
                return;
            }
            let leader = lanes.trailing_zeros();
            let first = warp::shuffle_idx(bin, leader);
            let mine = left && bin == first;
            // At most 2^40, in parts of which 32 have a sum of 32 bits.
            let m = if mine { m } else { 0 };
            let low = warp::reduce_sum_u32(m as u32 & 0xff_ffff);
            let high = warp::reduce_sum_u32((m >> 24) as u32);
            if lane_id() == leader {
                let sum = u64::from(low) + (u64::from(high) << 24);
                atomic::shared_add_u64(bins.add(bin), sum);
            }
            left = left && !mine;
        }
        if left {
            atomic::shared_add_u64(bins.add(bin), m);
        }
    }
}
