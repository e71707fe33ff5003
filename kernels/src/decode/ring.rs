//! Weights on their way into shared memory.
//!
//! Every warp has a ring of *turns*. A turn is what the warp's lanes multiply at once: one group a lane of
//! each of its task's two runs. A lane copies what it will read itself, so that no more than its own
//! `cp.async` groups need be waited for, one group a turn. The ring goes through the tasks of this and the
//! coming operations in the order in which they will be computed.

use super::product::{self, Run, Task};
use super::{Current, DecodeArgs, OP_BYTES, ROWS_AT, WARPS, get};
use crate::types::{GROUP, LAYOUTS, Layout, Matrix, Plane, Planes, Quantised};
use cuda_std::memory::{cp_async_4, cp_async_8, cp_async_16, cp_async_commit, cp_async_wait};
use cuda_std::shared::{self, Scalar, SharedPtr};
use cuda_std::thread::{lane_id, thread_idx_x};

/// Most turns of a ring.
pub const MAX_TURNS: u32 = 6;

/// Bytes of each run's half of a turn: enough for every type.
pub const SLOT_BYTES: u32 = slot_bytes();
pub(super) const TURN_BYTES: u32 = 2 * SLOT_BYTES;

/// Weights of a float type come as they lie, 16 bytes a lane and copy.
pub(super) const FLOAT_COPIES: u32 = 2;

const fn slot_bytes() -> u32 {
    let mut most = FLOAT_COPIES * 32 * 16;
    let mut i = 0;
    while i < LAYOUTS.len() {
        if LAYOUTS[i].quantised {
            let bytes = offset(&LAYOUTS[i], 4);
            most = if bytes > most { bytes } else { most };
        }
        i += 1;
    }
    most.next_multiple_of(128)
}

/// Bytes that an element takes in a slot: no copy is of less than 4.
const fn element(plane: Plane) -> u32 {
    if plane.bytes == 2 {
        4
    } else {
        plane.bytes as u32
    }
}

/// Where `plane` begins in a slot.
const fn offset(layout: &Layout, plane: usize) -> u32 {
    let mut bytes = 0;
    let mut i = 0;
    while i < plane {
        bytes += 32 * element(layout.planes[i]);
        i += 1;
    }
    bytes
}

/// Groups of a row that a turn takes, of a type so laid out.
pub const fn turn_groups(layout: &Layout) -> u32 {
    if layout.quantised {
        32
    } else {
        FLOAT_COPIES * 32 * 16 / layout.planes[0].bytes as u32
    }
}

/// A quantised group of this lane in a slot.
pub(super) struct Slot<T> {
    start: u32,
    weights: core::marker::PhantomData<T>,
}

impl<T: Quantised> Slot<T> {
    const OFFSETS: [u32; 4] = [
        offset(&T::LAYOUT, 0),
        offset(&T::LAYOUT, 1),
        offset(&T::LAYOUT, 2),
        offset(&T::LAYOUT, 3),
    ];

    #[inline(always)]
    pub fn new(start: u32) -> Self {
        Self {
            start,
            weights: core::marker::PhantomData,
        }
    }

    #[inline(always)]
    fn at<E>(&self, plane: usize, bytes: u32) -> SharedPtr<E> {
        SharedPtr::from_addr(self.start + Self::OFFSETS[plane] + lane_id() * bytes)
    }
}

impl<T: Quantised> Planes for Slot<T> {
    #[inline(always)]
    unsafe fn words4(&self, plane: usize, _: usize) -> [u32; 4] {
        unsafe { self.at::<u32>(plane, 16).load_v4() }
    }

    #[inline(always)]
    unsafe fn words2(&self, plane: usize, _: usize) -> [u32; 2] {
        unsafe { self.at::<u32>(plane, 8).load_v2() }
    }

    #[inline(always)]
    unsafe fn word(&self, plane: usize, _: usize) -> u32 {
        unsafe { self.at::<u32>(plane, 4).load() }
    }

    #[inline(always)]
    unsafe fn half_word(&self, plane: usize, index: usize) -> u16 {
        // The copy was of the four bytes that it lies in.
        unsafe { self.at::<u16>(plane, 4).add(index as u32 % 2).load() }
    }
}

/// A warp's ring, and how far it has come.
pub struct Ring {
    start: u32,
    turns: u32,
    /// Turns under way or ready.
    full: u32,
    /// Places of the next turn to be taken, and to be filled.
    take: u32,
    put: u32,
    /// The operation and task that the next turn is of, and its place in the task's runs.
    op: u32,
    task: u32,
    at: u32,
    /// The task's runs, valid where `at` is not zero, and the addresses of their matrices.
    runs: [Run; 2],
    matrices: [u32; 2],
}

impl Ring {
    #[inline(always)]
    pub fn new(a: &DecodeArgs) -> Self {
        const NO_RUN: Run = Run {
            first: 0,
            at: 0,
            len: 0,
        };
        let warp = thread_idx_x() / 32;
        Self {
            start: shared::at::<u8>(ROWS_AT + 2 * a.row_bytes + warp * a.turns * TURN_BYTES).addr(),
            turns: a.turns,
            full: 0,
            take: 0,
            put: 0,
            op: 0,
            task: product::first_task(),
            at: 0,
            runs: [NO_RUN; 2],
            matrices: [0; 2],
        }
    }

    /// Starts turns, of operations up to `limit`, until the ring is full.
    #[inline(always)]
    pub unsafe fn fill(&mut self, a: &DecodeArgs, limit: u32) {
        let limit = if limit < a.count { limit } else { a.count - 1 };
        unsafe {
            while self.full < self.turns && self.seek(limit) {
                self.start_turn();
            }
        }
    }

    /// Goes to the next task of this warp; false if there is none up to `limit`.
    #[inline(always)]
    unsafe fn seek(&mut self, limit: u32) -> bool {
        while self.op <= limit {
            if self.task < unsafe { get!(Current::at(self.op), tasks) } {
                return true;
            }
            self.op += 1;
            self.task = product::first_task();
        }
        false
    }

    #[inline(always)]
    unsafe fn start_turn(&mut self) {
        let op = Current::at(self.op);
        unsafe {
            if self.at == 0 {
                let task = Task::of(op, self.task);
                self.runs = task.runs(op);
                self.matrices = [op.matrix(task.m0), op.matrix(task.m1)];
            }
            let turn = get!(op, turn);
            let slot = self.start + self.put * TURN_BYTES;
            let mut side = 0;
            while side < 2 {
                let run = if side == 0 {
                    self.runs[0]
                } else {
                    self.runs[1]
                };
                let matrix = self.matrices[if side == 0 { 0 } else { 1 }];
                if self.at < run.len {
                    let left = run.len - self.at;
                    let groups = if left < turn { left } else { turn };
                    copy(
                        matrix,
                        run.first + self.at,
                        groups,
                        slot + side * SLOT_BYTES,
                    );
                }
                side += 1;
            }
            cp_async_commit();
            self.full += 1;
            self.put = next(self.put, self.turns);
            self.at += turn;
            if self.at >= self.runs[0].len {
                self.at = 0;
                self.task += product::task_stride();
            }
        }
    }

    /// Waits for the next turn: the address of its first slot.
    #[inline(always)]
    pub unsafe fn wait(&mut self, a: &DecodeArgs, limit: u32) -> u32 {
        if self.full == 0 {
            unsafe { self.fill(a, limit) }
        }
        match self.full {
            0 | 1 => cp_async_wait::<0>(),
            2 => cp_async_wait::<1>(),
            3 => cp_async_wait::<2>(),
            4 => cp_async_wait::<3>(),
            5 => cp_async_wait::<4>(),
            _ => cp_async_wait::<5>(),
        }
        self.start + self.take * TURN_BYTES
    }

    /// Gives the place of the turn that [`Ring::wait`] returned back; this lane has read it.
    #[inline(always)]
    pub fn release(&mut self) {
        self.full -= 1;
        self.take = next(self.take, self.turns);
    }
}

#[inline(always)]
fn next(place: u32, turns: u32) -> u32 {
    if place + 1 == turns { 0 } else { place + 1 }
}

/// Starts the copy of `groups` groups from group `first` on, of the matrix described at `matrix`, to `slot`.
#[inline(always)]
unsafe fn copy(matrix: u32, first: u32, groups: u32, slot: u32) {
    let lane = lane_id();
    let field = |offset: usize| matrix + offset as u32;
    unsafe {
        let mut codes = u32::load(field(core::mem::offset_of!(Matrix, codes)));
        let planes = field(core::mem::offset_of!(Matrix, planes));
        if codes & 0x40 != 0 {
            // A float type.
            let bytes = GROUP as u32
                * if u32::load(field(core::mem::offset_of!(Matrix, ty))) == 0 {
                    4
                } else {
                    2
                };
            let from = u64::load(planes) as *const u8;
            for i in 0..FLOAT_COPIES {
                let at = 16 * (lane + 32 * i);
                if at < groups * bytes {
                    let from = from.add(first as usize * bytes as usize + at as usize);
                    cp_async_16(SharedPtr::<u8>::from_addr(slot + at), from);
                }
            }
        } else if lane < groups {
            let group = first + lane;
            let (mut plane, mut to) = (planes, slot);
            while codes != 0 {
                let bytes = codes & 0x1f;
                let index = if codes & Plane::PER_BLOCK != 0 {
                    group / 8
                } else {
                    group
                };
                let from = (u64::load(plane) as *const u8).add(index as usize * bytes as usize);
                if bytes == 16 {
                    cp_async_16(SharedPtr::<u8>::from_addr(to + 16 * lane), from);
                    to += 32 * 16;
                } else if bytes == 8 {
                    cp_async_8(SharedPtr::<u8>::from_addr(to + 8 * lane), from);
                    to += 32 * 8;
                } else {
                    let from = from.map_addr(|a| a & !3);
                    cp_async_4(SharedPtr::<u8>::from_addr(to + 4 * lane), from);
                    to += 32 * 4;
                }
                codes >>= 8;
                plane += 8;
            }
        }
    }
}

const _: () = assert!(OP_BYTES % 16 == 0 && SLOT_BYTES % 128 == 0);
const _: () = assert!(WARPS * TURN_BYTES <= 48 * 1024, "one turn fits anywhere");
