//! The embedding of the step's token.

use super::seal::Seal;
use super::{CHOSEN, Current, DecodeArgs, blocks, get, matrix_at, thread};
use crate::types::{GROUP, Matrix, unpack_four};
use cuda_std::int::here;
use cuda_std::memory::ld_relaxed_u32;
use cuda_std::shared::SharedPtr;
use cuda_std::thread::block_idx_x;

/// [`kind::EMBED`](super::kind::EMBED): a thread for each four weights, neighbours in different blocks.
#[inline(always)]
pub unsafe fn embed(a: &DecodeArgs, op: Current) {
    unsafe {
        let table: *const Matrix = SharedPtr::<Matrix>::from_addr(op.0 + matrix_at(0)).as_ptr();
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
        let token = if here(a.token) == CHOSEN {
            ld_relaxed_u32(a.choice)
        } else {
            a.token
        };
        let mut i = thread() * blocks() + block_idx_x();
        while i < groups * (GROUP as u32 / 4) {
            let (g, word) = (i as usize / (GROUP / 4), i as usize % (GROUP / 4));
            let v = unpack_four(&*table, token as usize, g, word);
            for k in 0..4 {
                let at = 4 * i + k;
                if at < len {
                    seal.write(out.add(at as usize), v[k as usize] * scale);
                }
            }
            i += 32 * super::WARPS * blocks();
        }
    }
}
