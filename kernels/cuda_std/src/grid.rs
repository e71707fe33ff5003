//! A barrier over all blocks of a cooperative launch.

use crate::{atomic, thread};

/// Waits until every block of the grid has come here; global writes before it are visible to the
/// whole grid after it. The launch must be cooperative.
///
/// `counter` is one word of global memory, zero before its first use; it may be used again for
/// any number of barriers and of launches, also of other grid sizes, so long as each launch
/// brings every block to each barrier. Block 0 adds what makes the count's top bit flip when the
/// last block has come, and everybody waits for that flip.
///
/// # Safety
/// `counter` is valid, aligned, in global memory, and used by this grid's barriers alone.
#[inline(always)]
pub unsafe fn sync(counter: *mut u32) {
    thread::sync_threads();
    let first =
        thread::thread_idx_x() == 0 && thread::thread_idx_y() == 0 && thread::thread_idx_z() == 0;
    if first {
        let blocks = thread::grid_dim_x() * thread::grid_dim_y() * thread::grid_dim_z();
        let block_zero =
            thread::block_idx_x() == 0 && thread::block_idx_y() == 0 && thread::block_idx_z() == 0;
        let arrive = if block_zero {
            0x8000_0000 - (blocks - 1)
        } else {
            1
        };
        unsafe {
            let old = atomic::add_acq_rel_u32(counter, arrive);
            while (atomic::load_acquire_u32(counter) ^ old) & 0x8000_0000 == 0 {
                #[cfg(not(target_arch = "nvptx64"))]
                crate::emulator::spin();
            }
        }
    }
    thread::sync_threads();
}
