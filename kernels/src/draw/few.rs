//! A choice among a row's greatest logits, few enough to be looked at one by one.

use super::block::Block;
use super::mass::{ONE, least_mass, least_sum, mass, share};
use super::{CANDIDATES, FOUND_AT, GROUPS, MASSES_AT, ORDERS_AT, RANKS_AT, SUMS_AT, THREADS};
use crate::sample::{lanes_max, max_u64, order, rank, warp_max};
use cuda_std::int::opaque;
use cuda_std::thread::{lane_id, sync_threads, thread_idx_x};
use cuda_std::{atomic, shared, warp};

/// Most that may be kept.
const FEW: u32 = 256;

impl Block {
    /// Groups of logits of each block.
    #[inline(always)]
    fn groups(&self) -> u32 {
        let groups = GROUPS / self.blocks;
        if groups < THREADS { groups } else { THREADS }
    }

    /// The greatest rank of the row, of this thread's own ones. All meet, and then the order of each group's greatest lies in the place
    /// for that.
    #[inline(always)]
    pub(super) unsafe fn greatest(&mut self, own: u64) -> u64 {
        let (t, groups) = (thread_idx_x(), self.groups());
        let threads = THREADS / groups;
        unsafe {
            // Lanes with consecutive numbers are a group.
            let own = lanes_max(own, threads);
            if t % threads == 0 {
                let at = self.index * groups + t / threads;
                self.maxima().add(at as usize).write(own);
            }
            if self.index == 0 {
                for n in 0..3 {
                    self.histogram(n).add(t as usize).write(0);
                }
                if t == 0 {
                    (&raw mut (*self.row.common).listed).write(0);
                }
            }
            self.meet();
            let orders = shared::at::<u32>(ORDERS_AT);
            let mut best = 0;
            let mut i = t;
            while i < groups * self.blocks {
                let v = self.maxima().add(i as usize).read();
                orders.add(i).store((v >> 32) as u32);
                best = max_u64(best, v);
                i += THREADS;
            }
            let best = warp_max(best);
            let warps = shared::at::<u64>(SUMS_AT);
            if lane_id() == 0 {
                warps.add(t / 32).store(best);
            }
            sync_threads();
            let mut best = best;
            for i in 0..opaque(THREADS / 32) {
                best = max_u64(best, warps.add(i).load());
            }
            sync_threads();
            best
        }
    }

    /// The greatest order that at least `most` groups' greatest have or exceed; 0 where there are not as many.
    #[inline(always)]
    unsafe fn floor_of_groups(&self, most: u32) -> u32 {
        const EACH: usize = GROUPS as usize / 32;
        let (t, all) = (thread_idx_x(), self.groups() * self.blocks);
        let orders = shared::at::<u32>(ORDERS_AT);
        let found = shared::at::<u32>(FOUND_AT);
        unsafe {
            // One warp looks, bit by bit.
            if t < 32 {
                let mut own = [0; EACH];
                for k in 0..EACH {
                    let i = t + 32 * k as u32;
                    if i < all {
                        own[k] = orders.add(i).load();
                    }
                }
                let (mut floor, mut bit) = (0, 1 << 31);
                while bit > opaque(0) {
                    let mut count = 0;
                    for k in 0..EACH {
                        count += u32::from(own[k] >= floor | bit);
                    }
                    if warp::reduce_sum_u32(count) >= most {
                        floor |= bit;
                    }
                    bit >>= 1;
                }
                if t == 0 {
                    found.store(floor);
                }
            }
            sync_threads();
            let floor = found.load();
            sync_threads();
            floor
        }
    }

    /// Who is drawn, where the choice is among few: `None` where that is not known, and [`Block::select`] must find it.
    ///
    /// The `K` greatest of all groups' greatest are `K` logits, so that the row's `K` greatest are not below the least of these:
    /// they are among its *candidates*, all that are not. All blocks come, and all get the same answer.
    #[inline(always)]
    pub(super) unsafe fn draw_of_few(&mut self, peak: f32) -> Option<u32> {
        const EACH: usize = (CANDIDATES / THREADS) as usize;
        let (t, row) = (thread_idx_x(), self.row);
        let by_count = row.top_k > 0 && row.top_k < row.vocabulary;
        let by_share = u64::from(row.top_p) < ONE;
        if by_count && row.top_k > FEW || !by_count && !by_share {
            return None;
        }
        let ranks = shared::at::<u64>(RANKS_AT);
        let masses = shared::at::<u64>(MASSES_AT);
        unsafe {
            let floor = self.floor_of_groups(if by_count { row.top_k } else { FEW });
            let (listed, common) = (&raw mut (*row.common).listed, row.common);
            let ranks_of_all = (&raw mut (*common).ranks).cast::<u64>();
            let masses_of_all = (&raw mut (*common).masses).cast::<u64>();
            let mut sum = 0;
            self.each(|i, v| {
                if by_share && !by_count {
                    sum += mass(v, peak);
                }
                if order(v) >= floor {
                    let place = atomic::add_u32(listed, 1);
                    if place < CANDIDATES {
                        ranks_of_all.add(place as usize).write(rank(v, i));
                        masses_of_all.add(place as usize).write(mass(v, peak));
                    }
                }
            });
            let mut total = 0;
            if by_count {
                self.meet();
            } else {
                let own = self.scan(sum).all;
                total = self.total(own).all;
            }
            let count = listed.read();
            if count > CANDIDATES {
                return None;
            }
            for k in 0..EACH {
                let c = t + k as u32 * THREADS;
                if c < count {
                    ranks.add(c).store(ranks_of_all.add(c as usize).read());
                    masses.add(c).store(masses_of_all.add(c as usize).read());
                }
            }
            sync_threads();
            let mut kept = [0u64; EACH];
            let mut before = [0u64; EACH];
            let (mut in_count, mut all) = (0, 0);
            for k in 0..EACH {
                let c = t + k as u32 * THREADS;
                if c < count {
                    let own = ranks.add(c).load();
                    let mut above = 0;
                    for j in 0..count {
                        // Both at once.
                        let (rank, m) = (ranks.add(j).load(), masses.add(j).load());
                        above += u32::from(rank > own);
                        before[k] += if rank > own { m } else { 0 };
                    }
                    let m = masses.add(c).load();
                    all += m;
                    if !by_count || above < row.top_k {
                        kept[k] = m;
                        in_count += m;
                    }
                }
            }
            if by_count {
                total = self.scan(in_count).all;
            }
            if by_share {
                let goal = least_sum(row.top_p, total);
                // Where not all logits are candidates, there may be more to keep.
                if !by_count && floor > 0 && self.scan(all).all < goal {
                    return None;
                }
                for k in 0..EACH {
                    if before[k] >= goal {
                        kept[k] = 0;
                    }
                }
            }
            let mut sum = 0;
            for k in 0..EACH {
                if kept[k] < least_mass(&row) {
                    kept[k] = 0;
                }
                sum += kept[k];
            }
            let (goal, _) = share(row.u, self.scan(sum).all);
            for k in 0..EACH {
                let c = t + k as u32 * THREADS;
                if c < count {
                    masses.add(c).store(kept[k]);
                }
            }
            sync_threads();
            let found = shared::at::<u32>(FOUND_AT);
            for k in 0..EACH {
                let c = t + k as u32 * THREADS;
                if c < count && kept[k] > 0 {
                    // In the order of ids: a lower one has the greater complement.
                    let own = ranks.add(c).load() as u32;
                    let mut before = 0;
                    for j in 0..count {
                        let (rank, m) = (ranks.add(j).load() as u32, masses.add(j).load());
                        before += if rank > own { m } else { 0 };
                    }
                    if before <= goal && goal < before + kept[k] {
                        found.store(!own);
                    }
                }
            }
            sync_threads();
            Some(found.load())
        }
    }
}
