//! Runs kernels on the host: one fiber per GPU thread.
//!
//! A block's threads run one after another on one OS thread; a fiber gives way only where a GPU
//! thread must wait for others (a barrier, a warp's exchange, a spin). Blocks run in order, or
//! several at a time over OS threads; a cooperative launch keeps all blocks alive together.
//!
//! What the hardware leaves undefined is an [`Error`] here wherever it can be seen: a barrier that
//! an exited thread will never reach, lanes of a warp in different exchanges, an address outside
//! shared memory, a missing `cp_async_wait` (the copy lands only there), reading shared memory
//! before writing it (it is filled with `0xFF`, which is NaN in every float format).
//! Blocks of odd index run their threads in reverse order, so that a missing barrier shows.
//!
//! Each result depends on the arguments alone, with one exception: `f32` atomic additions from
//! several blocks round in the order they happen; [`Options::threads`] = 1 fixes that order too.

mod block;
mod guard;
mod launch;
mod shared_memory;
mod thread;
mod warp;

pub use guard::{GuardViolation, GuardedBuffer};
pub use launch::{Error, Kernel, Options, launch, launch_cooperative, launch_with};
pub use shared_memory::SHARED_LIMIT;

pub(crate) use block::BarrierKind;
pub(crate) use shared_memory::{DYNAMIC_START, access as shared_access};
pub(crate) use thread::{
    barrier, block_dim, block_idx, commit_copies, copy_async, dynamic_shared_bytes, fail, grid_dim,
    lane, settled, shared_pointer, shared_to_pointer, spin, thread_idx, wait_copies,
};
pub(crate) use warp::exchange;

#[doc(hidden)]
pub use shared_memory::static_shared;

/// Three dimensions of a grid, a block or an index: x, y, z.
pub type Dim3 = (u32, u32, u32);

/// The parameter array of a launch: `params![a, b]` holds a pointer to each value.
///
/// Use it inside the call of a launch: the values live until the end of that statement.
#[macro_export]
macro_rules! params {
    ($($value:expr),* $(,)?) => {
        [$(::core::ptr::from_ref(&$value).cast::<::core::ffi::c_void>()),*]
    };
}
