//! Weights on their way into shared memory, and [keys and values](super::long) of long sequences and of 8 bits.
//!
//! A block has a ring of *turns*. A turn is up to sixteen rows of a task, of each a tile or two, or a block of the cache, and
//! takes no more room than these, with rows of f16 filled up to whole [lines](long::LINE). A feeder warp goes through the block's tasks of
//! all operations in the order in which they will be computed, and copies a turn wherever the ring has room, eight rows at a time. Each turn has a place among [`MAX_TURNS`] with two
//! barriers in shared memory ([`mbarrier`]): one says that it has come, the other that every warp has read its part.

use super::long;
use super::task::{Cached, EIGHT, ROWS, SEGMENT_VECTORS, Segment};
use super::{BARRIERS_AT, DecodeArgs, ROWS_AT, WARPS};
use crate::types::{GROUP, PAD, TILE};
use crate::unrolled;
use cuda_std::int::{opaque, quotient};
use cuda_std::mbarrier;
#[cfg(any(not(target_arch = "nvptx64"), not(cuda_sm_90)))]
use cuda_std::memory::cp_async_16;
use cuda_std::memory::{cp_async_wait_all, ldg_v4_u32_here};
use cuda_std::shared::{self, SharedPtr};
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
use cuda_std::tensor::copy_rows;
use cuda_std::thread::{block_idx_x, lane_id};
use cuda_std::warp;

/// How many turns may be in a ring.
pub const MAX_TURNS: u32 = 16;

/// Bytes of a turn's two barriers and its head: that it has come, that it has been read, which takes an arrival of every
/// lane that computes, and what is in it.
const TURN_BARRIERS: u32 = 32;
const READ_AT: u32 = 8;
const HEAD_AT: u32 = 16;
/// Bytes of all of them.
pub(super) const BARRIERS_BYTES: u32 = MAX_TURNS * TURN_BARRIERS;

/// Makes the barriers; one of the block must follow.
#[inline(always)]
pub unsafe fn init<const BULK: bool>(thread: u32) {
    if thread < MAX_TURNS {
        let barrier = shared::at::<u64>(BARRIERS_AT + thread * TURN_BARRIERS);
        unsafe {
            mbarrier::init(barrier, if BULK { 1 } else { 32 });
            mbarrier::init(barrier.byte_add(READ_AT), 32 * WARPS);
        }
    }
    #[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
    mbarrier::show_to_copies();
}

/// Bytes from row to row of a turn whose rows take up to `bytes`: an odd number of 16 bytes, so that rows are in different banks.
const fn pitch(bytes: u32) -> u32 {
    bytes | 16
}

/// Above the types of a turn's eights: its rows end within a part, which is read as a whole.
pub const RAGGED_TURN: u32 = 1 << 17;

/// How much is read past a row's end then: three groups of one more tile.
const PAST_END: u32 = 512;

/// Bytes from row to row of a turn of which rows of either eight take `pieces` bytes.
#[inline(always)]
const fn turn_pitch([first, second]: [u32; 2]) -> u32 {
    pitch(if first > second { first } else { second })
}

/// Bytes of that turn.
#[inline(always)]
pub const fn turn_bytes(pieces: [u32; 2], types: u32) -> u32 {
    let past_end = if types & RAGGED_TURN != 0 {
        PAST_END
    } else {
        0
    };
    ROWS * turn_pitch(pieces) + past_end
}

/// Bytes of a matrix's row in a turn of up to `tiles` tiles, with its padding if that is all that follows.
#[inline(always)]
pub const fn piece_bytes(row_bytes: u32, tile_bytes: u32, tiles: u32) -> u32 {
    if row_bytes <= tiles * tile_bytes + PAD {
        row_bytes
    } else {
        tiles * tile_bytes
    }
}

/// What is in a turn.
#[derive(Clone, Copy)]
pub struct Head {
    /// Types of either eight, a byte each, and above them the bytes from row to row.
    types: u32,
    /// Bytes of a whole tile of either, 16 bits each.
    tiles: u32,
    /// Address of the first row.
    pub start: u32,
}

/// Where in a head these bytes begin.
const PITCH_SHIFT: u32 = 16;

impl Head {
    #[inline(always)]
    pub fn first(self) -> u32 {
        self.types & 0xff
    }

    #[inline(always)]
    pub fn second(self) -> u32 {
        (self.types >> 8) & 0xff
    }

    /// Bytes from row to row.
    #[inline(always)]
    pub fn pitch(self) -> u32 {
        self.types >> PITCH_SHIFT
    }

    /// Bytes of a whole tile of either.
    #[inline(always)]
    pub fn tiles(self) -> [u32; 2] {
        [self.tiles & 0xffff, self.tiles >> 16]
    }
}

/// A place in the ring. Warps and feeder walk it alike: the parity of the barriers' phase and the place's number are the highest
/// bits of one that is counted up.
#[derive(Clone, Copy)]
pub struct Place(u32);

const _: () = assert!(MAX_TURNS == 1 << 4, "a place's number has four bits");

impl Place {
    #[inline(always)]
    pub fn first() -> Place {
        Place(0)
    }

    /// The one after it.
    #[inline(always)]
    fn next(self) -> Place {
        Place(self.0.wrapping_add(1 << 27))
    }

    #[inline(always)]
    fn parity(self) -> u32 {
        self.0 >> 31
    }

    /// Address of its barriers.
    #[inline(always)]
    fn barriers(self) -> u32 {
        let before = (self.0 >> 27) % MAX_TURNS * TURN_BARRIERS;
        shared::at::<u64>(BARRIERS_AT).addr() + before
    }

    #[inline(always)]
    fn come(self) -> SharedPtr<u64> {
        SharedPtr::from_addr(self.barriers())
    }

    #[inline(always)]
    fn read(self) -> SharedPtr<u64> {
        SharedPtr::from_addr(self.barriers() + READ_AT)
    }

    #[inline(always)]
    fn head(self) -> SharedPtr<u32> {
        SharedPtr::from_addr(self.barriers() + HEAD_AT)
    }

    /// Waits for the turn; what is in it.
    #[inline(always)]
    pub unsafe fn wait(&self) -> Head {
        unsafe {
            mbarrier::wait(self.come(), self.parity());
            let [types, tiles, start, _] = self.head().load_v4();
            Head {
                types,
                tiles,
                start,
            }
        }
    }

    /// Passes over the turn, which is another team's.
    #[inline(always)]
    pub unsafe fn pass(&mut self) {
        unsafe {
            mbarrier::wait(self.come(), self.parity());
            self.release();
        }
    }

    /// Gives the turn's place back, as all other lanes do that read it, and goes on.
    #[inline(always)]
    pub unsafe fn release(&mut self) {
        unsafe { mbarrier::arrive(self.read()) }
        *self = self.next();
    }
}

/// Where the feeder is in the ring.
pub(super) struct Ring {
    /// The next turn's place, and where it would begin.
    next: Place,
    at: u32,
    /// The oldest turn that may not have been read, where it begins, and how many there are from it on.
    oldest: Place,
    start: u32,
    count: u32,
    /// The oldest turn that may not have come, and how many bytes are on their way from it on.
    coming: Place,
    flying: u32,
}

impl Ring {
    #[inline(always)]
    fn new(a: &DecodeArgs) -> Ring {
        let first = shared::at::<u8>(ROWS_AT + a.row_bytes).addr();
        Ring {
            next: Place::first(),
            at: first,
            oldest: Place::first(),
            start: first,
            count: 0,
            coming: Place::first(),
            flying: 0,
        }
    }

    /// The oldest turn that may not have come has.
    #[inline(always)]
    unsafe fn arrived(&mut self) {
        unsafe { self.flying -= self.coming.head().add(3).load() }
        self.coming = self.coming.next();
    }

    /// Waits until a place is free, and so many bytes from where the next turn begins on, at a multiple of `align`: there, or at the ring's start.
    #[inline(always)]
    unsafe fn make_room(&mut self, a: &DecodeArgs, bytes: u32, align: u32) {
        let first = shared::at::<u8>(ROWS_AT + a.row_bytes).addr();
        let end = first + a.ring_bytes;
        let first = first.next_multiple_of(align);
        while self.flying > 0 && self.flying + bytes > a.flying {
            unsafe {
                mbarrier::wait(self.coming.come(), self.coming.parity());
                self.arrived();
            }
        }
        loop {
            if self.count < MAX_TURNS {
                // Turns lie from `start` on to `at`, or to the ring's end and on from its first byte.
                let around = self.count > 0 && self.at <= self.start;
                let at = self.at.next_multiple_of(align);
                if at + bytes <= if around { self.start } else { end } {
                    self.at = at;
                    break;
                }
                if !around && (self.count == 0 || first + bytes <= self.start) {
                    self.at = first;
                    break;
                }
            }
            unsafe {
                mbarrier::wait(self.oldest.read(), self.oldest.parity());
                if self.oldest.0 == self.coming.0 {
                    self.arrived();
                }
                self.oldest = self.oldest.next();
                self.count -= 1;
                if self.count > 0 {
                    self.start = self.oldest.head().add(2).load();
                }
            }
        }
        // Of the turn whose place this will be, all lanes have read the head.
        warp::sync_warp();
    }

    /// Brings a turn of rows of 8 bits: two pieces of so many bytes, a multiple of 16, the second behind the first, into one of `all` bytes.
    #[inline(always)]
    pub unsafe fn bring_quantised<const BULK: bool>(
        &mut self,
        a: &DecodeArgs,
        from: [*const u8; 2],
        bytes: u32,
        all: u32,
    ) {
        unsafe {
            self.make_room(a, all, 16);
            let place = self.next;
            let head = [0, 0, self.at, all];
            if BULK {
                #[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
                if warp::elect() {
                    place.head().store_v4(head);
                    mbarrier::arrive_expecting(place.come(), 2 * bytes);
                    for i in 0..2 {
                        let to = SharedPtr::from_addr(self.at + i as u32 * bytes);
                        mbarrier::copy_bulk(to, from[i], bytes, place.come());
                    }
                }
            } else {
                #[cfg(any(not(target_arch = "nvptx64"), not(cuda_sm_90)))]
                {
                    if lane_id() == 0 {
                        place.head().store_v4(head);
                    }
                    for i in 0..2 {
                        let mut at = 16 * lane_id();
                        while at < bytes {
                            let to = self.at + i as u32 * bytes + at;
                            let to = SharedPtr::<u8>::from_addr(to);
                            cp_async_16(to, from[i].wrapping_add(at as usize));
                            at += 16 * 32;
                        }
                    }
                    mbarrier::arrive_after_copies(place.come());
                }
            }
            self.push(all);
        }
    }

    /// Brings a turn of rows of f16, from number `row` of the matrices of keys and values on, which lie at `from`: `all` bytes of boxes.
    #[inline(always)]
    pub unsafe fn bring_half<const BULK: bool>(
        &mut self,
        a: &DecodeArgs,
        from: [*const u8; 2],
        row: u32,
        head_dim: u32,
        all: u32,
    ) {
        unsafe {
            self.make_room(a, all, long::ALIGN);
            let place = self.next;
            let head = [0, 0, self.at, all];
            if BULK {
                #[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
                if warp::elect() {
                    place.head().store_v4(head);
                    mbarrier::arrive_expecting(place.come(), all);
                    for kind in 0..2 {
                        let map = a.maps.wrapping_add(kind as usize);
                        let to = self.at + kind * (all / 2);
                        copy_rows(SharedPtr::from_addr(to), map, row, place.come());
                    }
                }
            } else {
                #[cfg(any(not(target_arch = "nvptx64"), not(cuda_sm_90)))]
                {
                    if lane_id() == 0 {
                        place.head().store_v4(head);
                    }
                    // A lane brings a piece of 16 bytes to where the copy engine would; past a row's end some other one.
                    let row_bytes = 2 * head_dim;
                    let lines = all / 2 / long::TURN / long::LINE;
                    let mut i = lane_id();
                    while i < all / 16 {
                        let (line, place) = (i / long::PIECES, i % long::PIECES);
                        let values = line >= lines * long::TURN;
                        let (row, line_of_row) = (line / lines % long::TURN, line % lines);
                        let piece = line_of_row * long::PIECES + (place ^ (line % long::PIECES));
                        let at = if 16 * piece < row_bytes {
                            16 * piece
                        } else {
                            0
                        };
                        let from =
                            of_two(values, from).wrapping_add((row * row_bytes + at) as usize);
                        cp_async_16(SharedPtr::<u8>::from_addr(self.at + 16 * i), from);
                        i += 32;
                    }
                    mbarrier::arrive_after_copies(place.come());
                }
            }
            self.push(all);
        }
    }

    /// Brings a turn of weights. With `BULK` the copy engine does, else two lanes copy a row 16 bytes at a time.
    #[inline(always)]
    unsafe fn bring_rows<const BULK: bool>(&mut self, a: &DecodeArgs, s: &Segment, e: &Eights) {
        unsafe {
            let pieces = e.pieces;
            let pitch = turn_pitch(pieces);
            let size = turn_bytes(pieces, s.types);
            self.make_room(a, size, 16);
            let place = self.next;
            let head = [
                (s.types & 0xffff) | (pitch << PITCH_SHIFT),
                s.tiles[0] | (s.tiles[1] << 16),
                self.at,
                size,
            ];
            if BULK {
                #[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
                if warp::elect() {
                    place.head().store_v4(head);
                    let all = e.rows[0] * pieces[0] + e.rows[1] * pieces[1];
                    mbarrier::arrive_expecting(place.come(), all);
                    for i in 0..2 {
                        let to = self.at + i as u32 * EIGHT * pitch;
                        let rows = Rows {
                            count: e.rows[i],
                            within: e.within[i],
                            bytes: pieces[i],
                            stride: e.strides[i],
                            pitch,
                            eight_bytes: s.eight_bytes[i],
                        };
                        rows.copy(to, e.from[i], place.come());
                    }
                }
            } else {
                #[cfg(any(not(target_arch = "nvptx64"), not(cuda_sm_90)))]
                {
                    let lane = lane_id();
                    let late = lane / EIGHT % 2 != 0;
                    if lane == 0 {
                        place.head().store_v4(head);
                    }
                    let row = lane % EIGHT;
                    let exists = row < of_two(late, e.rows);
                    let (stride, eight) = (of_two(late, e.strides), of_two(late, s.eight_bytes));
                    let skipped = row_at(row + of_two(late, e.within), stride, eight);
                    let from = of_two(late, e.from).wrapping_add(skipped);
                    let mut at = lane / ROWS * 16;
                    while exists && at < of_two(late, pieces) {
                        let to = self.at + lane % ROWS * pitch + at;
                        let to = SharedPtr::<u8>::from_addr(to);
                        cp_async_16(to, from.add(at as usize));
                        at += 32;
                    }
                    mbarrier::arrive_after_copies(place.come());
                }
            }
            self.push(size);
        }
    }

    /// A turn of so many bytes lies there.
    #[inline(always)]
    unsafe fn push(&mut self, bytes: u32) {
        // All lanes will read its head.
        warp::sync_warp();
        if self.count == 0 {
            self.start = self.at;
        }
        self.count += 1;
        self.flying += bytes;
        self.at += bytes;
        self.next = self.next.next();
    }
}

/// What a turn has of either eight.
struct Eights {
    rows: [u32; 2],
    /// The first one's number in the eight that it lies in.
    within: [u32; 2],
    /// Where that begins.
    from: [*const u8; 2],
    /// Bytes from row to row there.
    strides: [u32; 2],
    /// Of a row.
    pieces: [u32; 2],
}

/// A segment, loaded ahead: no field is looked at before its time.
type Coming = [[u32; 4]; SEGMENT_VECTORS];

#[inline(always)]
unsafe fn load(a: &DecodeArgs, index: u32) -> Coming {
    let p = unsafe { a.segments.add(index as usize).cast::<u8>() };
    unrolled!(7, |i| unsafe { ldg_v4_u32_here(p.add(16 * i)) })
}

/// An eight's rows on their way.
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
struct Rows {
    count: u32,
    /// The first one's number in the eight that it lies in.
    within: u32,
    /// Of a row.
    bytes: u32,
    /// From row to row, there and here; and there from eight to eight.
    stride: u32,
    pitch: u32,
    eight_bytes: u32,
}

#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
impl Rows {
    /// Asks the copy engine for them, of what begins with an eight at `from`. It takes what several lanes ask one after the other, in a loop
    /// that takes longer than the copies; and so do branches.
    #[inline(always)]
    unsafe fn copy(&self, to: u32, from: *const u8, come: SharedPtr<u64>) {
        // They lie there as they will here. For a copy it takes as long as for the bytes of a row, some 50 ns.
        if self.within == 0 && self.bytes == self.stride && self.stride == self.pitch {
            if self.count > 0 {
                let all = self.count * self.bytes;
                unsafe { mbarrier::copy_bulk(SharedPtr::from_addr(to), from, all, come) }
            }
            return;
        }
        let mut i = 0;
        while i < self.count {
            let to = SharedPtr::from_addr(to + i * self.pitch);
            let from = from.wrapping_add(row_at(self.within + i, self.stride, self.eight_bytes));
            unsafe { mbarrier::copy_bulk(to, from, self.bytes, come) }
            i += opaque(1);
        }
    }
}

/// Where row `row` from an eight's first on begins in a strip.
#[inline(always)]
fn row_at(row: u32, stride: u32, eight_bytes: u32) -> usize {
    (row / EIGHT * eight_bytes + row % EIGHT * stride) as usize
}

/// What the feeder warp does: it brings turn after turn.
#[inline(always)]
pub unsafe fn feed<const BULK: bool>(a: &DecodeArgs) {
    unsafe {
        let mut ring = Ring::new(a);
        let mut coming = load(a, 0);
        let mut left = a.steps * a.segment_count;
        let mut index = 0;
        let mut position = a.position;
        while left > 0 {
            left -= 1;
            let (this, now) = (coming, position);
            index += 1;
            if index == a.segment_count {
                // The next step's first.
                index = 0;
                position += 1;
            }
            coming = load(a, index);
            // Words as the host wrote them.
            let s = core::mem::transmute::<Coming, Segment>(this);
            if s.types == Cached::MARK {
                let cached = core::mem::transmute::<Coming, Cached>(this);
                long::feed::<BULK>(a, cached, now, &mut ring);
                continue;
            }
            let tasks = s.shares.of_block(block_idx_x());
            let mut task = if tasks.first > s.first {
                tasks.first
            } else {
                s.first
            };
            let end = if tasks.end < s.end { tasks.end } else { s.end };
            while task < end {
                let repeat = quotient(task - s.first, s.period);
                let first = (task - s.first - repeat * s.period) * s.step();
                let rows = [0, s.second].map(|before| {
                    let rows = s.span.saturating_sub(first.saturating_add(before));
                    if rows < EIGHT { rows } else { EIGHT }
                });
                let first = s.start + repeat * s.jump + first;
                let firsts = [first, first + s.apart];
                let mut eights = [0, 1].map(|i| {
                    let before = u64::from(firsts[i] / EIGHT) * u64::from(s.eight_bytes[i]);
                    s.bases[i].wrapping_add(before as usize)
                });
                let mut strip = 0;
                // Of every strip as much as a turn takes.
                while strip <= s.whole {
                    let strides = s.strides(strip);
                    let mut left = strides;
                    let mut from = eights;
                    while left[0] != 0 {
                        let pieces = [0, 1].map(|i| piece_bytes(left[i], s.tiles[i], a.turn_tiles));
                        let eights = Eights {
                            rows,
                            within: firsts.map(|row| row % EIGHT),
                            from,
                            strides,
                            pieces,
                        };
                        ring.bring_rows::<BULK>(a, &s, &eights);
                        for i in 0..2 {
                            from[i] = from[i].wrapping_add(pieces[i] as usize);
                            left[i] -= pieces[i];
                        }
                    }
                    for i in 0..2 {
                        eights[i] = eights[i].wrapping_add((EIGHT * strides[i]) as usize);
                    }
                    strip += 1;
                }
                task += 1;
            }
        }
        if !BULK {
            cp_async_wait_all();
        }
    }
}

/// The second of two, or the first.
#[cfg(any(not(target_arch = "nvptx64"), not(cuda_sm_90)))]
#[inline(always)]
fn of_two<T: Copy>(second: bool, two: [T; 2]) -> T {
    if second { two[1] } else { two[0] }
}

const _: () = assert!(TILE == 32 && GROUP == 32, "the tiles of `types`");
