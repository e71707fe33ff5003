//! A block's outputs of an operation, written together.
//!
//! Every block waits for every word of a row. Single words from many warps meet in the same lines of the L2 cache: 896 of
//! them take 3,700 cycles to be everywhere on an H100, and 1,500 where neighbours are written by one store. So a block's
//! tasks are neighbours, its warps leave what they computed in shared memory, and one that fills no rows writes it all.

use super::seal::Seal;
use super::task::block_tasks;
use super::{Current, GATHER_AT, WARPS, get, lane, thread};
use cuda_std::memory::st_relaxed_u32;
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::bar_sync;

/// The warp that writes: the one with a block's first task.
pub const WRITER: u32 = WARPS - 1;

/// The block's barrier of the warps that have tasks.
const BARRIER: u32 = 2;

/// Outputs that a block may gather.
pub const SLOTS: u32 = 128;

/// Of each an address, in two halves, and the word.
const SLOT_BYTES: u32 = 16;
pub const BYTES: u32 = SLOTS * SLOT_BYTES;

#[inline(always)]
fn slot(index: u32) -> SharedPtr<u32> {
    shared::at(GATHER_AT + index * SLOT_BYTES)
}

/// Leaves `v` for `to` in slot `index`.
#[inline(always)]
pub unsafe fn leave(index: u32, to: *mut f32, v: f32, seal: Seal) {
    let at = to as u64;
    unsafe { slot(index).store_v4([at as u32, (at >> 32) as u32, seal.close(v), 0]) }
}

/// What every warp does after its last task, or without any.
#[inline(always)]
pub unsafe fn write(op: Current) {
    unsafe {
        let tasks = block_tasks(op);
        let count = tasks.end - tasks.first;
        let warp = thread() / 32;
        let warps = if count < WARPS { count } else { WARPS };
        if warp < WARPS - warps {
            return;
        }
        bar_sync(BARRIER, 32 * warps);
        if warp != WRITER {
            return;
        }
        let mut i = lane();
        while i < count * get!(op, gathered) {
            let [low, high, word, _] = slot(i).load_v4();
            let to = (u64::from(low) | (u64::from(high) << 32)) as *mut u32;
            st_relaxed_u32(to, word);
            i += 32;
        }
    }
}
