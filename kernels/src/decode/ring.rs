//! Weights on their way into shared memory.
//!
//! Every warp has a ring of *turns*. A turn is what the warp's lanes multiply at once: a tile of each of its
//! task's two runs, a group a lane. The ring goes through the tasks of this and the coming operations in the
//! order in which they will be computed; the copies of a turn are one `cp.async` group.

use super::product::{self, Task};
use super::{Current, DecodeArgs, ROWS_AT, get};
use crate::types::{Planes, Quantised, TILE, Weights};
use core::marker::PhantomData;
use cuda_std::memory::{cp_async_16_if, cp_async_commit, cp_async_wait};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::{lane_id, thread_idx_x};
use cuda_std::warp;

/// How many turns a ring may have: what [`Ring::wait`] knows to wait for.
pub const TURNS: [u32; 6] = [8, 6, 4, 3, 2, 1];

/// A quantised tile in shared memory.
pub(super) struct Tile<T> {
    start: u32,
    groups: u32,
    weights: PhantomData<T>,
}

impl<T: Weights> Tile<T> {
    /// The tile at address `start`, of so many groups.
    #[inline(always)]
    pub fn new(start: u32, groups: u32) -> Self {
        Self {
            start,
            groups,
            weights: PhantomData,
        }
    }

    #[inline(always)]
    fn at<E>(&self, plane: usize, index: usize) -> SharedPtr<E> {
        let layout = T::LAYOUT;
        let offset = layout.plane_offset(plane, self.groups as usize);
        let element = index % layout.tile_elements(plane) * layout.planes[plane].bytes;
        SharedPtr::from_addr(self.start + offset as u32 + element as u32)
    }
}

impl<T: Quantised> Planes for Tile<T> {
    #[inline(always)]
    unsafe fn words4(&self, plane: usize, index: usize) -> [u32; 4] {
        unsafe { self.at::<u32>(plane, index).load_v4() }
    }

    #[inline(always)]
    unsafe fn words2(&self, plane: usize, index: usize) -> [u32; 2] {
        unsafe { self.at::<u32>(plane, index).load_v2() }
    }

    #[inline(always)]
    unsafe fn word(&self, plane: usize, index: usize) -> u32 {
        unsafe { self.at::<u32>(plane, index).load() }
    }

    #[inline(always)]
    unsafe fn half_word(&self, plane: usize, index: usize) -> u16 {
        unsafe { self.at::<u16>(plane, index).load() }
    }

    #[inline(always)]
    unsafe fn single(&self, plane: usize, index: usize) -> u8 {
        unsafe { self.at::<u8>(plane, index).load() }
    }
}

/// What is still to be copied of a run.
#[derive(Clone, Copy)]
pub struct Rest {
    pub from: *const u8,
    pub bytes: u32,
    /// Of a whole tile.
    pub tile: u32,
}

impl Rest {
    /// Starts the copy of the next tile to `slot`.
    #[inline(always)]
    unsafe fn copy_tile(&mut self, slot: u32) {
        let bytes = if self.bytes < self.tile {
            self.bytes
        } else {
            self.tile
        };
        let at = 16 * lane_id();
        let to = SharedPtr::<u8>::from_addr(slot + at);
        unsafe {
            let from = self.from.add(at as usize);
            cp_async_16_if::<0, _, _>(at < bytes, to, from);
            cp_async_16_if::<512, _, _>(at + 512 < bytes, to, from);
            cp_async_16_if::<1024, _, _>(at + 1024 < bytes, to, from);
            cp_async_16_if::<1536, _, _>(at + 1536 < bytes, to, from);
            // Only f32.
            let mut more = 2048;
            while more < bytes {
                let inside = at + more < bytes;
                cp_async_16_if::<0, _, _>(inside, to.byte_add(more), from.add(more as usize));
                more += 512;
            }
            self.from = self.from.add(bytes as usize);
        }
        self.bytes -= bytes;
    }
}

/// A warp's ring, and how far it has come.
pub struct Ring {
    start: u32,
    /// Turns under way or ready.
    full: u32,
    /// Addresses of the next turn to be taken, and to be filled.
    take: u32,
    put: u32,
    /// The operation and task that the next turn is of, and what it has not copied of the task's runs yet.
    op: u32,
    task: u32,
    rest: [Rest; 2],
}

impl Ring {
    #[inline(always)]
    pub fn new(a: &DecodeArgs) -> Self {
        const NOTHING: Rest = Rest {
            from: core::ptr::null(),
            bytes: 0,
            tile: 0,
        };
        let warp = thread_idx_x() / 32;
        let start = ROWS_AT + 2 * a.row_bytes + warp * a.turns * turn_bytes(a);
        let start = shared::at::<u8>(start).addr();
        Self {
            start,
            full: 0,
            take: start,
            put: start,
            op: 0,
            task: product::first_task(),
            rest: [NOTHING; 2],
        }
    }

    /// Starts turns, of operations up to `limit`, until the ring is full.
    #[inline(always)]
    pub unsafe fn fill(&mut self, a: &DecodeArgs, limit: u32) {
        let limit = if limit < a.count { limit } else { a.count - 1 };
        unsafe {
            while self.full < a.turns && self.seek(limit) {
                self.rest[0].copy_tile(self.put);
                self.rest[1].copy_tile(self.put + a.tile_bytes);
                cp_async_commit();
                self.full += 1;
                self.put = self.next(a, self.put);
            }
        }
    }

    /// Goes to the next task of this warp if it is through with one; false if there is none up to `limit`.
    #[inline(always)]
    unsafe fn seek(&mut self, limit: u32) -> bool {
        if self.rest[0].bytes != 0 {
            return true;
        }
        while self.op <= limit {
            let op = Current::at(self.op);
            unsafe {
                if self.task < get!(op, tasks) {
                    self.rest = Task::of(op, self.task).rest(op);
                    self.task += product::task_stride();
                    return true;
                }
            }
            self.op += 1;
            self.task = product::first_task();
        }
        false
    }

    #[inline(always)]
    fn next(&self, a: &DecodeArgs, place: u32) -> u32 {
        let next = place + turn_bytes(a);
        if next == self.start + a.turns * turn_bytes(a) {
            self.start
        } else {
            next
        }
    }

    /// Waits for the next turn: the address of its first tile; the second run's is [`DecodeArgs::tile_bytes`] behind.
    #[inline(always)]
    pub unsafe fn wait(&mut self, a: &DecodeArgs, limit: u32) -> u32 {
        if self.full == 0 {
            unsafe { self.fill(a, limit) }
        }
        if self.full >= 8 {
            cp_async_wait::<7>();
        } else if self.full >= 6 {
            cp_async_wait::<5>();
        } else if self.full >= 4 {
            cp_async_wait::<3>();
        } else if self.full == 3 {
            cp_async_wait::<2>();
        } else if self.full == 2 {
            cp_async_wait::<1>();
        } else {
            cp_async_wait::<0>();
        }
        // Each lane has waited for its own copies, and reads those of others.
        warp::sync_warp();
        self.take
    }

    /// Gives the place of the turn that [`Ring::wait`] returned back, once all lanes have read it.
    #[inline(always)]
    pub fn release(&mut self, a: &DecodeArgs) {
        warp::sync_warp();
        self.full -= 1;
        self.take = self.next(a, self.take);
    }
}

/// Bytes of a turn.
#[inline(always)]
fn turn_bytes(a: &DecodeArgs) -> u32 {
    2 * a.tile_bytes
}

const _: () = assert!(TILE == 32, "a lane takes a group of a tile");
