//! The embedding of the step's token.

use super::seal::Seal;
use super::{CHOSEN, Current, DecodeArgs, blocks, get, is_type, matrix_at, thread};
use crate::for_each_type;
use crate::types::*;
use cuda_std::int::here;
use cuda_std::memory::ld_relaxed_u64;
use cuda_std::shared::SharedPtr;
use cuda_std::thread::{block_idx_x, spin};

/// [`kind::EMBED`](super::kind::EMBED): a thread for each four weights, neighbours in different blocks.
#[inline(always)]
pub unsafe fn embed(a: &DecodeArgs, op: Current) {
    unsafe {
        let table: *const Matrix = SharedPtr::<Matrix>::from_addr(op.0 + matrix_at(0)).as_ptr();
        let groups = (*table).cols / GROUP as u32;
        let seal = Seal::of_output(op);
        let (len, scale, out) = (get!(op, input.len), get!(op, scale), get!(op, out));
        let token = token(a, op);
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

/// The step's token.
#[inline(always)]
unsafe fn token(a: &DecodeArgs, op: Current) -> u32 {
    let later = unsafe { get!(op, now.sequence) } - here(a.sequence);
    if later == 0 && here(a.token) != CHOSEN {
        return a.token;
    }
    loop {
        let choice = unsafe { ld_relaxed_u64(a.choice) };
        // Of the launch before, if that is what it is.
        if later == 0 || (choice >> 32) as u32 == a.sequence + later - 1 {
            return choice as u32;
        }
        spin();
    }
}

macro_rules! four_by_type {
    ($($ty:literal => $name:ident, $kind:ident;)*) => {
        /// Weights `4 w .. 4 w + 4` of group `g` of row `r`, of the types that a step may have.
        #[inline(always)]
        unsafe fn unpack_four(m: &Matrix, r: usize, g: usize, w: usize) -> [f32; 4] {
            unsafe {
                $(if is_type::<$ty>(m.ty) {
                    return four_by_type!(@$kind $name, m, r, g, w);
                })*
                [f32::NAN; 4]
            }
        }
    };
    (@float $name:ident, $m:expr, $r:expr, $g:expr, $w:expr) => { $name::unpack_four($m, $r, $g, $w) };
    (@quantised $name:ident, $m:expr, $r:expr, $g:expr, $w:expr) => {{
        let raw = $name::load(&$m.row::<$name>($r), $g);
        four_weights($name::levels(raw), $name::affine(raw, $g), $w)
    }};
}
for_each_type!(four_by_type);
