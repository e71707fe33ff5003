//! How the warps' parts of a piece of attention become one, and where that goes: to the row, or to the parts that splits leave.

use super::attend::{HEAD_PARTS, HEADS, OCTET, PART, Place, WIDTH, part_at, part_element};
use super::pieces::Piece;
use super::running::Running;
use super::seal::Seal;
use super::{Current, WARPS, get, sync, thread};
use crate::attention::NONE;
use cuda_std::float;
use cuda_std::int::here;
use cuda_std::shared::SharedPtr;

/// Where what comes of a piece goes, kept in shared memory: it would take registers that the tiles need.
#[derive(Clone, Copy)]
pub(super) struct Target {
    head: u32,
    heads: u32,
    element: u32,
    width: u32,
    split: u32,
    /// Warps that have tokens.
    warps: u32,
    /// What the outputs carry.
    seal: Seal,
}

/// Bytes of it there.
pub(super) const TARGET_BYTES: u32 = 32;

impl Target {
    #[inline(always)]
    pub unsafe fn new(op: Current, piece: &Piece) -> Target {
        unsafe {
            Target {
                head: piece.head,
                heads: piece.heads,
                element: piece.element,
                width: piece.width,
                split: piece.split,
                warps: piece.warps(),
                seal: Seal::of_output(op),
            }
        }
    }

    #[inline(always)]
    pub unsafe fn store(&self, place: Place) {
        let sizes = self.heads | self.width << 8 | self.warps << 16;
        let (mask, number) = self.seal.words();
        let at = place.target();
        unsafe {
            at.store_v4([sizes, self.head, self.split, self.element]);
            at.add(4).store_v2([mask, number]);
        }
    }

    #[inline(always)]
    unsafe fn load(place: Place) -> Target {
        let at = place.target();
        let [sizes, head, split, element] = unsafe { at.load_v4() };
        let [mask, number] = unsafe { at.add(4).load_v2() };
        Target {
            heads: sizes & 0xff,
            width: (sizes >> 8) & 0xff,
            warps: sizes >> 16,
            head,
            split,
            element,
            seal: Seal::from_words(mask, number),
        }
    }
}

/// Leaves what warp `warp` has found of a piece in its part; no more than that it has found nothing, where nobody looks for more.
#[inline(always)]
pub(super) unsafe fn leave<const H: usize>(running: &Running<H>, place: Place, warp: u32) {
    unsafe {
        let target = Target::load(place);
        let sums = warp < target.warps.next_multiple_of(BATCH as u32);
        running.leave(place.parts(), HEAD_PARTS, target.heads, warp, sums);
    }
}

/// Warps whose parts are merged at once: one after the other they would take as long as everything else.
const BATCH: usize = 4;
const BATCHES: usize = WARPS as usize / BATCH;

/// Threads that merge the warps' parts, four elements each, of `H` times [`WIDTH`]: the block's last, whose warps have no tokens
/// where a sequence is short. They know what goes where by the time that the others are done.
const fn joining<const H: usize>() -> u32 {
    HEADS * H as u32 * WIDTH / 4
}
const _: () = assert!(joining::<2>() <= 32 * WARPS);

/// Merges the warps' parts of a piece, once they are there, and writes what comes of it.
#[inline(always)]
pub(super) unsafe fn join<const H: usize>(op: Current, place: Place) {
    unsafe {
        let i = thread().wrapping_sub(32 * WARPS - joining::<H>());
        let place_in_part = i % (WIDTH / 4) * 4;
        let e = part_element(place_in_part);
        // All that is read is on its way before any of it is needed.
        let target = Target::load(place);
        let (splits, head_dim) = (get!(op, splits), get!(op, cache.head_dim));
        let (row, parts) = (get!(op, out), get!(op, parts));
        let part = i / (WIDTH / 4);
        // First halves of all heads, then wide ones' second: those that exist are neighbours.
        let half = u32::from(H == 2 && part >= target.heads);
        let head = part - half * target.heads;
        let exists = i < joining::<H>() && head < target.heads && half * WIDTH + e < target.width;
        let row_head = target.head + head;
        let (out, to) = if splits == 1 {
            let e = half * WIDTH + e;
            (row, row_head * head_dim + target.element + e)
        } else {
            let e = half * WIDTH + e;
            (parts, part_at(head_dim, splits, row_head, e, target.split))
        };
        let (seal, to) = (target.seal.here(), out.wrapping_add(here(to) as usize));
        let at = here(place.parts().add(part * HEAD_PARTS).addr());
        let first = half * WIDTH + e < OCTET;
        let warps = here(if exists { target.warps } else { u32::MAX });
        sync();
        if warps == u32::MAX {
            return;
        }
        let part = |w: usize| SharedPtr::<f32>::from_addr(at).add(w as u32 * PART);
        let batch = |b: usize| {
            let mut parts = [[0.0; 4]; BATCH];
            for k in 0..BATCH {
                parts[k] = part(b * BATCH + k).add(place_in_part).load_v4();
            }
            parts
        };
        let mut stats = [[[0.0; 2]; BATCH]; BATCHES];
        for b in 0..BATCHES {
            for k in 0..BATCH {
                stats[b][k] = part(b * BATCH + k).add(WIDTH).load_v2();
            }
        }
        // A batch is on its way while the one before it is added.
        let mut next = batch(0);
        let tops = stats.map(|s| s.into_iter().fold(NONE, |top, s| top.max(s[0])));
        let peak = tops.into_iter().fold(NONE, f32::max);
        // As its word will have it: what is rounded off would count as much as the peak is great.
        let peak = seal.open(seal.close(peak));
        let (mut sums, mut mass) = ([0.0; 4], 0.0);
        for b in 0..BATCHES {
            if (b * BATCH) as u32 >= warps {
                break;
            }
            let parts = next;
            let behind = ((b + 1) * BATCH) as u32;
            if behind < warps {
                next = batch(b + 1);
            }
            for k in 0..BATCH {
                let weight = float::exp2_approx(stats[b][k][0] - peak);
                mass += weight * stats[b][k][1];
                for n in 0..4 {
                    sums[n] += weight * parts[k][n];
                }
            }
        }
        if splits == 1 {
            let inverse = float::rcp_approx(mass);
            seal.write_four(to, sums.map(|s| s * inverse));
        } else {
            seal.write_four(to, sums);
            // By who has the first elements, in their order.
            if first {
                let behind = get!(op, cache.head_dim) * splits;
                seal.write_four(to.add(behind as usize), [peak, mass, 0.0, 0.0]);
            }
        }
    }
}
