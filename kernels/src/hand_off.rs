//! What it takes until all blocks have what each has written: the floor of what lies between two operations of a decode step
//! ([`decode`](crate::decode)), each of which needs the whole output of the one before.
//!
//! Each block writes a piece of a row, and looks at the whole row until all of it is there; then comes the next round. Meanwhile a warp more
//! brings bytes from memory, so many on their way at a time: a look waits behind them.

use cuda_std::kernel;
use cuda_std::memory::{
    cp_async_16, cp_async_commit, cp_async_wait, cp_async_wait_all, ld_relaxed_u32,
    ld_relaxed_v4_u32, st_relaxed_u32, st_relaxed_v4_u32,
};
use cuda_std::shared;
use cuda_std::thread::{
    bar_sync, block_idx_x, globaltimer, grid_dim_x, lane_id, spin, thread_idx_x,
};
use cuda_std::warp;

/// Threads per block: those that look, and a warp that brings bytes.
pub const THREADS: u32 = READERS + 32;
const READERS: u32 = 256;

/// Words of a block's piece: a sector of the memory.
pub const WORDS: u32 = 8;

/// Rows, so that none is written before all have read it.
pub const ROWS: u32 = 3;

/// Bytes on their way are in so many groups.
pub const GROUPS: u32 = 8;
/// And a multiple of this.
pub const FLYING_UNIT: u32 = GROUPS * 16 * 32;

/// Arguments of [`hand_off`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HandOffArgs {
    /// u32 `[ROWS][blocks][WORDS]`, zero.
    pub rows: *mut u32,
    pub rounds: u32,
    /// Bytes on their way to each block, as many as it has shared memory: a multiple of [`FLYING_UNIT`], or none.
    pub flying: u32,
    /// `stream_bytes` of each block, which are brought again and again: a multiple of `flying`.
    pub stream: *const u8,
    pub stream_bytes: u32,
    /// u32 `[blocks][2]`, zero: nanoseconds from the first round's end to the last one's, at least 1, and groups of bytes that came until
    /// then, about.
    pub out: *mut u32,
}

/// A cooperative launch of any number of blocks, with shared memory for what is on its way.
#[kernel(launch_bounds(288, 1))]
pub unsafe fn hand_off(a: HandOffArgs) {
    unsafe {
        let out = a.out.add(2 * block_idx_x() as usize);
        if thread_idx_x() >= READERS {
            if a.flying > 0 {
                bring(&a, out);
            }
            return;
        }
        let (thread, words) = (thread_idx_x(), grid_dim_x() * WORDS);
        let mut started = 0;
        let mut round = 1;
        while round <= a.rounds {
            let row = a.rows.add((round % ROWS * words) as usize);
            if thread < WORDS / 4 {
                let mine = block_idx_x() * WORDS + 4 * thread;
                st_relaxed_v4_u32(row.add(mine as usize), [round; 4]);
            }
            // The lanes stay together.
            let mut first = thread / 32 * 128;
            while first < words {
                let at = first + 4 * lane_id();
                loop {
                    let there = at >= words
                        || ld_relaxed_v4_u32(row.add(at as usize)).map(|w| w == round) == [true; 4];
                    if warp::all(there) {
                        break;
                    }
                    spin();
                }
                first += 4 * READERS;
            }
            bar_sync(1, READERS);
            if round == 1 {
                started = globaltimer();
            }
            round += 1;
        }
        if thread == 0 {
            let ns = (globaltimer() - started) as u32;
            st_relaxed_u32(out, if ns > 0 { ns } else { 1 });
        }
    }
}

/// Brings bytes until the block's rounds are through.
#[inline(always)]
unsafe fn bring(a: &HandOffArgs, out: *mut u32) {
    unsafe {
        let group = a.flying / GROUPS;
        let from = a
            .stream
            .wrapping_add(block_idx_x() as usize * a.stream_bytes as usize);
        let (mut at, mut slot, mut count) = (0, 0, 0);
        // Not asked each time: that takes longer than a group.
        while count % 32 != 0 || ld_relaxed_u32(out) == 0 {
            let mut byte = 16 * lane_id();
            while byte < group {
                let to = shared::at::<u8>(slot * group + byte);
                cp_async_16(to, from.wrapping_add((at + byte) as usize));
                byte += 16 * 32;
            }
            cp_async_commit();
            // The one that has this place next.
            cp_async_wait::<{ GROUPS - 1 }>();
            slot = (slot + 1) % GROUPS;
            at += group;
            if at >= a.stream_bytes {
                at = 0;
            }
            count += 1;
            spin();
        }
        cp_async_wait_all();
        if lane_id() == 0 {
            st_relaxed_u32(out.add(1), count);
        }
    }
}
