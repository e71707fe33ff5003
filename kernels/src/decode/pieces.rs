//! How attention is cut into pieces, and which a block takes.

use super::attend::{HEADS, MAX_HEAD_DIM, TOKENS, WIDTH};
use super::{Current, WARPS, blocks, get, is_ringed};
use crate::rows::BLOCK_TOKENS;
use cuda_std::int::quotient;
use cuda_std::thread::block_idx_x;

/// Pieces of each split, where keys and values come through the ring or do not: a wide head's values are in two only where they do not.
pub const fn attend_pieces(kv_heads: u32, group: u32, head_dim: u32, ringed: bool) -> u32 {
    let halves = if ringed { 1 } else { head_dim.div_ceil(WIDTH) };
    kv_heads * group.div_ceil(HEADS) * halves
}

/// `n / d`: most often `d` is 1, and a division takes long.
#[inline(always)]
unsafe fn share(n: u32, d: u32) -> u32 {
    if d == 1 { n } else { unsafe { quotient(n, d) } }
}

/// How an attention is cut into pieces.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Cutting {
    pub kv_heads: u32,
    pub head_dim: u32,
    /// As [`Op::group`](super::Op::group), and so on.
    pub group: u32,
    pub splits: u32,
    pub inverse_splits: u32,
    pub first_block: u32,
    /// [`Op::ringed`](super::Op::ringed).
    pub ringed: bool,
}

impl Cutting {
    #[inline(always)]
    pub(super) unsafe fn of(op: Current) -> Cutting {
        unsafe {
            Cutting {
                kv_heads: get!(op, cache.kv_heads),
                head_dim: get!(op, cache.head_dim),
                group: get!(op, group),
                splits: get!(op, splits),
                inverse_splits: get!(op, inverse_splits),
                first_block: get!(op, first_block),
                ringed: is_ringed(op),
            }
        }
    }

    /// `n / splits`.
    #[inline(always)]
    fn share(&self, n: u32) -> u32 {
        if self.splits == 1 {
            n
        } else {
            // Exact up to 2^32 / splits.
            ((u64::from(n) * u64::from(self.inverse_splits)) >> 32) as u32
        }
    }

    /// How many pieces there are, of all splits.
    #[inline(always)]
    pub(super) fn pieces(&self) -> u32 {
        attend_pieces(self.kv_heads, self.group, self.head_dim, self.ringed) * self.splits
    }

    /// The block's first piece, if there is one of that number.
    #[inline(always)]
    pub(super) fn first(&self) -> u32 {
        block_idx_x().wrapping_sub(self.first_block)
    }

    /// From one of a block's pieces to its next: as many as there are blocks that take any.
    #[inline(always)]
    pub(super) fn step(&self) -> u32 {
        blocks() - self.first_block
    }
}

/// What a block takes at a time.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub kv_head: u32,
    /// Its first query head.
    pub head: u32,
    pub heads: u32,
    /// Its first element of the values, and how many.
    pub element: u32,
    pub width: u32,
    pub split: u32,
    /// Its tokens: `from .. to`.
    pub from: u32,
    pub to: u32,
}

impl Piece {
    /// Piece `index` where the row's token is number `position`.
    #[inline(always)]
    pub unsafe fn of(cutting: Cutting, index: u32, position: u32) -> Piece {
        unsafe {
            let Cutting {
                splits,
                head_dim,
                group,
                ..
            } = cutting;
            let whole = cutting.share(index);
            let split = index - whole * splits;
            let most = if cutting.ringed { MAX_HEAD_DIM } else { WIDTH };
            let (parts, pieces) = (head_dim.div_ceil(most), group.div_ceil(HEADS));
            const { assert!(MAX_HEAD_DIM == 2 * WIDTH, "one part or two") };
            let piece = whole >> (parts - 1);
            let element = (whole - piece * parts) * most;
            let kv_head = share(piece, pieces);
            let first = (piece - kv_head * pieces) * HEADS;
            // Whole blocks of the cache.
            let tokens = position + 1;
            let chunk = tokens.div_ceil(BLOCK_TOKENS as u32) + splits - 1;
            let chunk = cutting.share(chunk) * BLOCK_TOKENS as u32;
            let from = if split * chunk < tokens {
                split * chunk
            } else {
                tokens
            };
            Piece {
                kv_head,
                head: kv_head * group + first,
                heads: if group - first < HEADS {
                    group - first
                } else {
                    HEADS
                },
                element,
                width: if head_dim - element < most {
                    head_dim - element
                } else {
                    most
                },
                split,
                from,
                to: if from + chunk < tokens {
                    from + chunk
                } else {
                    tokens
                },
            }
        }
    }

    /// Warps that have tokens.
    #[inline(always)]
    pub fn warps(&self) -> u32 {
        let tiles = (self.to - self.from).div_ceil(TOKENS);
        if tiles < WARPS { tiles } else { WARPS }
    }
}
