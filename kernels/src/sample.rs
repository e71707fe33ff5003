//! The likeliest token, by the definition in the host's `sampling` module, of any number of rows: [`argmax`], then [`argmax_final`].

use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::{
    block_dim_x, block_idx_x, block_idx_y, grid_dim_x, griddepcontrol_launch_dependents,
    griddepcontrol_wait, index_1d, sync_threads, thread_idx_x,
};
use cuda_std::{kernel, warp};

/// Threads per block of [`argmax`] and [`argmax_final`].
pub const ARGMAX_THREADS: u32 = 256;
/// Blocks of [`argmax`] per row.
pub const ARGMAX_BLOCKS: u32 = 64;

/// Arguments of [`argmax`] and [`argmax_final`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ArgmaxArgs {
    /// f32 `[rows][vocabulary]`.
    pub logits: *const f32,
    pub vocabulary: u32,
    /// `[rows][ARGMAX_BLOCKS]`: the order of a logit above the complement of its id.
    pub partial: *mut u64,
    /// One per row.
    pub out: *mut u64,
}

/// A number whose order is the float's; NaN counts as minus infinity, and both zeros as one.
#[inline(always)]
pub(crate) fn order(v: f32) -> u32 {
    let v = if v.is_nan() {
        f32::NEG_INFINITY
    } else {
        v + 0.0
    };
    let bits = v.to_bits();
    bits ^ if bits >> 31 == 1 {
        u32::MAX
    } else {
        0x8000_0000
    }
}

/// Greater for a greater logit, then for a lower id.
#[inline(always)]
pub(crate) fn rank(v: f32, id: usize) -> u64 {
    (u64::from(order(v)) << 32) | u64::from(!(id as u32))
}

#[inline(always)]
pub(crate) fn max_u64(a: u64, b: u64) -> u64 {
    if a > b { a } else { b }
}

/// The greatest of a warp.
#[inline(always)]
pub(crate) fn warp_max(v: u64) -> u64 {
    lanes_max(v, 32)
}

/// The greatest of `lanes` lanes, a power of two: all of a warp's are in groups of so many.
#[inline(always)]
pub(crate) fn lanes_max(v: u64, lanes: u32) -> u64 {
    let mut v = v;
    let mut width = lanes / 2;
    while width > 0 {
        let low = warp::shuffle_xor(v as u32, width);
        let high = warp::shuffle_xor((v >> 32) as u32, width);
        v = max_u64(v, (u64::from(high) << 32) | u64::from(low));
        width /= 2;
    }
    v
}

#[inline(always)]
unsafe fn block_max(v: u64, scratch: SharedPtr<u64>) -> u64 {
    let mut v = warp_max(v);
    unsafe {
        let t = thread_idx_x() as usize;
        if t % 32 == 0 {
            scratch.add(t as u32 / 32).store(v);
        }
        sync_threads();
        for i in 0..block_dim_x() / 32 {
            v = max_u64(v, scratch.add(i).load());
        }
        sync_threads();
        v
    }
}

/// The greatest of each block's share of a row. Grid: `(ARGMAX_BLOCKS, rows)`.
#[kernel(launch_bounds(256))]
pub unsafe fn argmax(a: ArgmaxArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    let (row, n) = (block_idx_y() as usize, a.vocabulary as usize);
    let mut best = 0;
    let mut i = index_1d() as usize;
    unsafe {
        let logits = a.logits.add(row * n);
        while i < n {
            best = max_u64(best, rank(logits.add(i).read(), i));
            i += (grid_dim_x() * block_dim_x()) as usize;
        }
        let best = block_max(best, shared::at(0));
        if thread_idx_x() == 0 {
            a.partial
                .add(row * ARGMAX_BLOCKS as usize + block_idx_x() as usize)
                .write(best);
        }
    }
}

/// The greatest of a row's blocks. Grid: one block a row, of a warp.
#[kernel(launch_bounds(32))]
pub unsafe fn argmax_final(a: ArgmaxArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    let row = block_idx_x() as usize;
    let t = thread_idx_x() as usize;
    unsafe {
        let part = a.partial.add(row * ARGMAX_BLOCKS as usize);
        let best = max_u64(part.add(t).read(), part.add(t + 32).read());
        let best = block_max(best, shared::at(0));
        if t == 0 {
            a.out.add(row).write(u64::from(!(best as u32)));
        }
    }
}
