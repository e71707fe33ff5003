//! Weights on their way into shared memory.
//!
//! Every warp that computes has a ring of *turns*. A turn is a tile or a few of each of its task's two runs. Two feeder
//! warps go through the tasks of all operations in the order in which they will be computed, and copy a turn wherever
//! a ring has room. Each turn has two barriers in shared
//! memory ([`mbarrier`]): one says that it has come, the other that it has been read.

use super::task::{BlockTasks, Segment, first_of};
use super::{BARRIERS_AT, DecodeArgs, FEEDERS, Listed, ROWS_AT, Source, WARPS, get, matrix_at};
use crate::types::{Matrix, Planes, Quantised, TILE, Weights};
use crate::unrolled;
use core::marker::PhantomData;
use core::mem::offset_of;
use cuda_std::int::{opaque, quotient};
use cuda_std::mbarrier;
use cuda_std::memory::{cp_async_16_if, cp_async_wait_all, ldg_v4_u32_here, prefetch_l2};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::{block_idx_x, grid_dim_x, lane_id, nanosleep, thread_idx_x};
use cuda_std::warp;

/// How many turns a ring may have.
pub const MAX_TURNS: u32 = 8;

/// Bytes of a turn's two barriers: that it has come, which takes an arrival of every lane of a team, and that
/// it has been read, which takes one of every lane of the warp.
const TURN_BARRIERS: u32 = 16;
const READ_AT: u32 = 8;
/// Bytes of all barriers.
pub(super) const BARRIERS_BYTES: u32 = WARPS * MAX_TURNS * TURN_BARRIERS;

/// Warps that a feeder feeds, and its lanes for each where it copies itself.
const FED: u32 = WARPS / FEEDERS;
const TEAM: u32 = 4;
const _: () = assert!(FED * FEEDERS == WARPS && FED * TEAM <= 32);

/// The barriers of a warp's first turn.
#[inline(always)]
fn barriers(warp: u32) -> u32 {
    shared::at::<u64>(BARRIERS_AT + warp * MAX_TURNS * TURN_BARRIERS).addr()
}

/// Makes the barriers; one of the block must follow.
#[inline(always)]
pub unsafe fn init<const BULK: bool>() {
    let t = thread_idx_x();
    if t < WARPS * MAX_TURNS {
        let barrier = shared::at::<u64>(BARRIERS_AT + t * TURN_BARRIERS);
        unsafe {
            mbarrier::init(barrier, if BULK { 1 } else { TEAM });
            mbarrier::init(barrier.byte_add(READ_AT), 32);
        }
    }
    #[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
    mbarrier::show_to_copies();
}

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

/// Bytes of a turn.
#[inline(always)]
pub fn turn_bytes(a: &DecodeArgs) -> u32 {
    2 * a.turn_tiles * a.tile_bytes
}

/// A place in a warp's ring. Warp and feeder walk it alike.
#[derive(Clone, Copy)]
struct Place {
    /// Address of the turn there, and of its barriers.
    turn: u32,
    barriers: u32,
    /// Of the barriers' phase.
    parity: u32,
    /// Places from this on to the ring's end.
    left: u32,
}

impl Place {
    #[inline(always)]
    fn first(a: &DecodeArgs, warp: u32) -> Place {
        let start = ROWS_AT + 2 * a.row_bytes + warp * a.turns * turn_bytes(a);
        Place {
            turn: shared::at::<u8>(start).addr(),
            barriers: barriers(warp),
            parity: 0,
            left: a.turns,
        }
    }

    /// The one after it.
    #[inline(always)]
    fn next(mut self, a: &DecodeArgs) -> Place {
        self.turn += turn_bytes(a);
        self.barriers += TURN_BARRIERS;
        self.left -= 1;
        if self.left == 0 {
            self.turn -= a.turns * turn_bytes(a);
            self.barriers -= a.turns * TURN_BARRIERS;
            self.left = a.turns;
            self.parity ^= 1;
        }
        self
    }

    #[inline(always)]
    fn come(self) -> SharedPtr<u64> {
        SharedPtr::from_addr(self.barriers)
    }

    #[inline(always)]
    fn read(self) -> SharedPtr<u64> {
        SharedPtr::from_addr(self.barriers + READ_AT)
    }
}

/// A warp's ring.
pub struct Ring {
    place: Place,
}

impl Ring {
    #[inline(always)]
    pub fn new(a: &DecodeArgs) -> Self {
        Self {
            place: Place::first(a, thread_idx_x() / 32),
        }
    }

    /// Waits for the next turn: the address of the first run's tiles; the second's follow in its second half.
    #[inline(always)]
    pub unsafe fn wait(&self) -> u32 {
        unsafe { mbarrier::wait(self.place.come(), self.place.parity) }
        self.place.turn
    }

    /// The turn that [`Ring::wait`] returned.
    #[inline(always)]
    pub fn turn(&self) -> u32 {
        self.place.turn
    }

    /// Gives the place of the turn that [`Ring::wait`] returned back, once all lanes have read it: each says so for
    /// itself.
    #[inline(always)]
    pub unsafe fn release(&mut self, a: &DecodeArgs) {
        unsafe { mbarrier::arrive(self.place.read()) }
        self.place = self.place.next(a);
    }
}

/// What is still to be copied of a run.
#[derive(Clone, Copy)]
struct Rest {
    from: *const u8,
    bytes: u32,
}

impl Rest {
    const NOTHING: Rest = Rest {
        from: core::ptr::null(),
        bytes: 0,
    };

    /// Bytes of the next tile.
    #[inline(always)]
    fn next(&self, tile: u32) -> u32 {
        if self.bytes < tile { self.bytes } else { tile }
    }

    #[inline(always)]
    unsafe fn advance(&mut self, tile: u32) {
        let bytes = self.next(tile);
        self.from = unsafe { self.from.add(bytes as usize) };
        self.bytes -= bytes;
    }
}

/// A segment, loaded ahead: no field is looked at before its time.
type Coming = [[u32; 4]; 5];

/// How far the feeding of a warp has come.
struct Feed {
    warp: u32,
    /// The current segment, and the next on its way.
    segment: Segment,
    coming: Coming,
    /// Index of the next.
    next: u32,
    /// The task after the one that is being copied, where its runs begin, and its place in the period.
    task: u32,
    from: [*const u8; 2],
    place_in_period: u32,
    /// Where this block's tasks of the segment end.
    end: u32,
    /// From a task to the next: bytes of each run, and places in the period.
    strides: [usize; 2],
    places: u32,
    /// What is not copied yet of the task's runs.
    rest: [Rest; 2],
    place: Place,
}

impl Feed {
    #[inline(always)]
    unsafe fn load(a: &DecodeArgs, index: u32) -> Coming {
        // The list ends with a segment that has no tasks.
        let index = if index < a.segment_count {
            index
        } else {
            a.segment_count
        };
        let p = unsafe { a.segments.add(index as usize).cast::<u8>() };
        unrolled!(5, |i| unsafe { ldg_v4_u32_here(p.add(16 * i)) })
    }

    /// Enters the next segment.
    #[inline(always)]
    unsafe fn enter(&mut self, a: &DecodeArgs) {
        let before = self.segment.op;
        // Twenty words, as the host wrote them.
        self.segment = unsafe { core::mem::transmute::<Coming, Segment>(self.coming) };
        self.next += 1;
        self.coming = unsafe { Feed::load(a, self.next) };
        let s = &self.segment;
        let tasks = BlockTasks::of(s.shares);
        if s.op != before {
            self.task = first_of(tasks.first, self.warp);
        }
        self.end = if tasks.end < s.end { tasks.end } else { s.end };
        let bytes = |tasks: u32, step: u32, periods: u32| {
            tasks as usize * step as usize + periods as usize * s.jump as usize
        };
        unsafe {
            let t = self.task.wrapping_sub(s.first);
            let periods = quotient(t, s.period);
            self.place_in_period = t - periods * s.period;
            self.from = [0, 1].map(|i| s.bases[i].wrapping_add(bytes(t, s.steps[i], periods)));
            let periods = quotient(WARPS, s.period);
            self.places = WARPS - periods * s.period;
            self.strides = s.steps.map(|step| bytes(WARPS, step, periods));
        }
    }

    /// Goes on to the warp's next task if it is through with one. One step at a time: where a warp has no tasks for
    /// many operations, the others that this feeder feeds do not wait for the whole way.
    #[inline(always)]
    unsafe fn seek(&mut self, a: &DecodeArgs) -> Found {
        if self.rest[0].bytes != 0 {
            return Found::Runs;
        }
        if self.task < self.end {
            let s = &self.segment;
            let second = if self.task == s.single { 0 } else { 1 };
            let from = [self.from[0], self.from[second]];
            self.rest = [0, 1].map(|i| Rest {
                from: from[i],
                bytes: s.runs[i],
            });
            self.task += WARPS;
            self.from = [0, 1].map(|i| self.from[i].wrapping_add(self.strides[i]));
            self.place_in_period += self.places;
            if self.place_in_period >= s.period {
                self.place_in_period -= s.period;
                self.from = self.from.map(|from| from.wrapping_add(s.jump as usize));
            }
            return Found::Runs;
        }
        if self.next > a.segment_count {
            return Found::End;
        }
        unsafe { self.enter(a) }
        Found::Segment
    }
}

/// Where [`Feed::seek`] has come to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    /// What is to be copied is in `rest`.
    Runs,
    /// Another segment, not looked into yet.
    Segment,
    End,
}

/// Starts the copy of so many bytes, by a team.
#[inline(always)]
unsafe fn copy(to: u32, from: *const u8, bytes: u32) {
    /// Bytes that a team copies at once.
    const STEP: u32 = 16 * TEAM;
    let at = 16 * (lane_id() % TEAM);
    let mut to = SharedPtr::<u8>::from_addr(to + at);
    unsafe {
        let mut from = from.add(at as usize);
        let mut done = at;
        while done < bytes {
            cp_async_16_if::<0, _, _>(true, to, from);
            cp_async_16_if::<{ STEP }, _, _>(done + STEP < bytes, to, from);
            cp_async_16_if::<{ 2 * STEP }, _, _>(done + 2 * STEP < bytes, to, from);
            cp_async_16_if::<{ 3 * STEP }, _, _>(done + 3 * STEP < bytes, to, from);
            (to, from) = (to.byte_add(4 * STEP), from.wrapping_add(4 * STEP as usize));
            done += 4 * STEP;
        }
    }
}

/// What a feeder warp does. Its lanes form a team for each warp that it feeds, and each copies 16 bytes at a time; with
/// `BULK` a lane feeds a warp by itself, and the copy engine does the work.
#[inline(always)]
pub unsafe fn feed<const BULK: bool>(a: &DecodeArgs) {
    unsafe {
        let team = if BULK { 1 } else { TEAM };
        let place = lane_id() / team;
        let warp = (thread_idx_x() / 32 - WARPS) * FED + place;
        let mut f = Feed {
            warp,
            segment: Segment {
                op: u32::MAX,
                ..Segment::NONE
            },
            coming: Feed::load(a, 0),
            next: if place < FED { 0 } else { a.segment_count + 1 },
            task: 0,
            end: 0,
            from: [core::ptr::null(); 2],
            place_in_period: 0,
            strides: [0; 2],
            places: 0,
            rest: [Rest::NOTHING; 2],
            place: Place::first(a, warp),
        };
        let mut prefetched = 0;
        loop {
            let found = f.seek(a);
            // The place's last turn was of the phase before.
            let empty = found == Found::Runs && mbarrier::test(f.place.read(), f.place.parity ^ 1);
            let mask = warp::ballot(empty);
            // A team's first lane says it for all, who might have looked at different times.
            if mask >> (place * team) & 1 != 0 {
                let tiles = f.segment.tiles.map(|bytes| bytes * a.turn_tiles);
                let bytes = [0, 1].map(|i| f.rest[i].next(tiles[i]));
                let to = [f.place.turn, f.place.turn + turn_bytes(a) / 2];
                if BULK {
                    #[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
                    copy_bulk(to, [f.rest[0].from, f.rest[1].from], bytes, f.place.come());
                } else {
                    copy(to[0], f.rest[0].from, bytes[0]);
                    copy(to[1], f.rest[1].from, bytes[1]);
                    mbarrier::arrive_after_copies(f.place.come());
                }
                f.rest[0].advance(tiles[0]);
                f.rest[1].advance(tiles[1]);
                f.place = f.place.next(a);
            }
            if mask == 0 {
                if warp::all(found == Found::End) {
                    break;
                }
                if !warp::any(found == Found::Segment) {
                    nanosleep(PAUSE);
                }
            }
            let reached = warp::shuffle_idx(
                if f.segment.op == u32::MAX {
                    0
                } else {
                    f.segment.op
                },
                0,
            );
            while prefetched < reached {
                prefetched += 1;
                prefetch(Listed(a.ops.add(prefetched as usize)));
            }
        }
        if !BULK {
            cp_async_wait_all();
        }
    }
}

/// Starts the copies of a turn's two tiles, the second of which may be empty.
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
#[inline(always)]
unsafe fn copy_bulk(to: [u32; 2], from: [*const u8; 2], bytes: [u32; 2], come: SharedPtr<u64>) {
    unsafe {
        mbarrier::fence_copies();
        mbarrier::arrive_expecting(come, bytes[0] + bytes[1]);
        for i in 0..2 {
            if bytes[i] != 0 {
                mbarrier::copy_bulk(SharedPtr::from_addr(to[i]), from[i], bytes[i], come);
            }
        }
    }
}

/// Nanoseconds between two looks for room: a warp that looks takes time from those that compute.
const PAUSE: u32 = 400;

/// Asks for what an operation reads that neither the rings nor another operation bring: norm weights and biases.
#[inline(always)]
unsafe fn prefetch(op: Listed) {
    const LINE: u32 = 128;
    let line = block_idx_x() + grid_dim_x() * lane_id();
    unsafe {
        let ask = |p: *const f32, len: u32| {
            if !p.is_null() && line * (LINE / 4) < len {
                prefetch_l2(p.add((line * (LINE / 4)) as usize));
            }
        };
        ask(get!(op, input.norm), get!(op, input.len));
        let mut m = 0;
        while m < 3 {
            let rows = matrix_at(m) + offset_of!(Matrix, rows) as u32;
            ask(op.bias(m), op.word(rows));
            m += opaque(1);
        }
    }
}

const _: () = assert!(TILE == 32, "a lane takes a group of a tile");
