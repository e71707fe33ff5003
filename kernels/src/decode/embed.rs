//! The embedding of the step's token.

use super::seal::Seal;
use super::{Coming, Current, DecodeArgs, Warp, get};
use crate::types::{GROUP, Matrix, unpack};
use cuda_std::shared::SharedPtr;
use cuda_std::thread::{block_idx_x, grid_dim_x, sync_threads, thread_idx_x};

/// [`kind::EMBED`](super::kind::EMBED): a thread per group, neighbours in different blocks.
#[inline(always)]
pub unsafe fn embed(a: &DecodeArgs, op: Current, w: &mut Warp) {
    unsafe {
        let coming = Coming::load(a, w.index + super::AHEAD);
        let table: *const Matrix = SharedPtr::<Matrix>::from_addr(op.matrix(0)).as_ptr();
        let groups = (*table).cols / GROUP as u32;
        let seal = Seal::of(
            a,
            if get!(op, sealed) != 0 {
                get!(op, number)
            } else {
                super::PLAIN
            },
        );
        let (len, scale, out) = (get!(op, input.len), get!(op, scale), get!(op, out));
        let mut g = thread_idx_x() * grid_dim_x() + block_idx_x();
        while g < groups {
            let v = unpack(&*table, a.token as usize, g as usize);
            for i in 0..GROUP as u32 {
                let at = g * GROUP as u32 + i;
                if at < len {
                    seal.write(out.add(at as usize), v[i as usize] * scale);
                }
            }
            g += super::THREADS * grid_dim_x();
        }
        coming.store();
        sync_threads();
    }
}
