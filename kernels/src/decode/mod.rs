//! Decode steps: one persistent kernel that carries a list of operations over one row, and over what it chooses.
//!
//! Decoding reads every weight once and computes little, so a step's time is that of the reads, plus what
//! lies between two operations. Both are kept small and apart from each other:
//!
//! - A whole step, or several, is one cooperative launch of a block per multiprocessor. Nothing but activations passes
//!   between blocks, and there is no barrier: every word carries in its low bits the number of the operation
//!   that wrote it ([`seal`]), and who needs a word looks until it is there. That costs about half of a
//!   barrier over the grid and the read behind it.
//! - Weights, and keys and values of a long sequence or of 8 bits, come through a ring in shared memory ([`ring`]). One more warp does nothing but keep it full: it knows the
//!   block's tasks of all operations to come, so that the memory never waits for an operation to end.
//!
//! In a product ([`product`]), every block brings the whole input row into shared memory, quantised to 15 bits per
//! group of 32 ([`row`]), and takes sixteen rows of weights at a time, whose columns its warps share out, on tensor cores.
//! Three warps more, the *finishers*, add up what these have and write it, while the others go on.
//!
//! Where rows of weights are long and few, a product is two, each with a half of the columns for some of the blocks: who reads its
//! outputs adds two words up ([`Input::halves`]).
//!
//! An operation is a *step* of the block, or several: a batch of tasks each. At its end there is a barrier of all warps but the
//! feeder: finishers come to it when they are through with the step before.
//!
//! A buffer is written again only by an operation that could not have begun before every reader was done:
//! each block's part of an operation needs the whole output of the one before.

pub(crate) mod attend;
mod embed;
mod finish;
mod join;
mod long;
mod merge;
mod op;
mod pieces;
mod product;
mod q8;
mod ring;
mod row;
pub(crate) mod running;
mod seal;
mod task;
mod tile;
mod window;

use crate::rows::BLOCK_TOKENS;
use crate::types::{LAYOUTS, type_bit};
use crate::unrolled;
use cuda_std::int::here;
use cuda_std::kernel;
use cuda_std::mbarrier;
use cuda_std::memory::{cp_async_4, cp_async_commit, cp_async_wait, ldg_u32};
use cuda_std::settled::settled;
use cuda_std::shared;
use cuda_std::tensor::TensorMap;
use cuda_std::thread::{
    bar_sync, block_idx_x, globaltimer, grid_dim_x, lane_id, sync_threads, thread_idx_x,
};

use ring::Place;
use window::{AHEAD, Current, WINDOW, await_op, copy_op, get, matrix_at};

pub use attend::{MAX_HEAD_DIM, NARROW_DIM, OCTET, attend_bytes, split_words};
pub use long::{LINE, TURN, turn_bytes, turns_in};
pub use merge::MAX_SPLITS;
pub use op::{INVERSE_UNIT, Input, NO_OP, Now, OP_BYTES, Op, kind};
pub use pieces::{Cutting, attend_pieces};
pub use product::BATCH;
pub use ring::MAX_TURNS;
pub use row::{parts, row_bytes};
pub use seal::{NUMBERS, PLAIN};
pub use task::{Cached, MAX_SEGMENTS, ROWS, Segment, Shares};

/// Warps of a block that compute.
pub const WARPS: u32 = 12;
/// Warps that bring outputs of products to an end.
const FINISHERS: u32 = 3;
/// Threads per block, one block per multiprocessor; the last warp brings weights.
pub const THREADS: u32 = 32 * (WARPS + FINISHERS + 1);

/// The numbers ([`settled`](cuda_std::settled::settled)) of what a module's steps may need, the lower and the upper half of a set: of the types
/// of their matrices, by [`type_bit`](crate::types::type_bit), and of what follows here. A module has no code for what its steps
/// cannot need; and the less code there is, the faster is the rest of it.
pub const NEEDS: [u32; 2] = [0, 2];

/// A gate and its up of two types.
pub const MIXED: u64 = 1 << 32;

/// A [`trace`](DecodeArgs::trace): even the question takes time on the path from one operation's output to the next one's.
pub const TRACED: u64 = 1 << 33;

/// Heads of more than [`NARROW_DIM`] elements. There is always code for narrower ones: where it was left out, the compiler gave
/// the rest such registers that products took 3% longer (8B 504 and 488 tokens/s).
pub const WIDE: u64 = 1 << 34;

/// Queries and keys that are normed head by head.
pub const LATE: u64 = 1 << 35;

/// Products of halves of a row, whose outputs are added up by who reads them.
pub const HALVES: u64 = 1 << 36;

/// Rows whose lengths are no multiples of four.
pub const UNEVEN: u64 = 1 << 37;

/// A cache of 8 bits, and one of f16.
pub const QUANTISED: u64 = 1 << 38;
pub const HALF: u64 = 1 << 39;

/// Heads in f16 of more than one box's elements, the last of which is not full.
pub const RAGGED: u64 = 1 << 40;

/// Rows that end within a tile, and within a part.
pub const TAILS: u64 = 1 << 41;
pub const ENDS: u64 = 1 << 42;

const _: () = assert!(LAYOUTS.len() <= 32, "types have the lower half");

/// The number of what steps end at: a named barrier, or, where it is zero, an `mbarrier`, which takes longer. compute-sanitizer's
/// racecheck loses count of two named barriers whose threads overlap, and reports what lies between them.
pub const STEP_BARRIER: u32 = 1;
const ALL_TYPES: u32 = u32::MAX >> (32 - LAYOUTS.len());

/// [`Op::ringed`].
#[inline(always)]
unsafe fn is_ringed(op: Current) -> bool {
    unsafe { is_quantised(op) || get!(op, splits) != 1 }
}

/// Whether a step may need any of `needs`.
#[inline(always)]
fn may_be(needs: u64) -> bool {
    let [low, high] = [needs as u32, (needs >> 32) as u32];
    low != 0 && settled::<{ NEEDS[0] }>() & low != 0
        || high != 0 && settled::<{ NEEDS[1] }>() & high != 0
}

/// Whether the cache of `op` is of 8 bits.
#[inline(always)]
unsafe fn is_quantised(op: Current) -> bool {
    may_be(QUANTISED) && (!may_be(HALF) || unsafe { get!(op, quantised) } != 0)
}

/// Whether `ty` is `T`: no question where no other may be.
#[inline(always)]
fn is_type<const T: u32>(ty: u32) -> bool {
    let bit = const { type_bit(T) };
    may_be(bit as u64) && (ty == T || settled::<{ NEEDS[0] }>() & ALL_TYPES == bit)
}

/// Arguments of [`decode`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DecodeArgs {
    pub ops: *const Op,
    /// The operations' [segments](Op::segments), those with tasks, and what of the cache [comes through the ring](Op::cached), in order;
    /// a segment without tasks after them.
    pub segments: *const Segment,
    pub segment_count: u32,
    /// Of a cache of f16, where the copy engine brings it: all layers' keys, and their values, as matrices of a row a token and head, of which a copy
    /// brings [`TURN`].
    pub maps: *const TensorMap,
    /// [`Now::tasks`] of each operation and block.
    pub tasks: *const u32,
    /// Operations that a block takes of it, a step.
    pub count: u32,
    /// How many steps there are, each with the token that the one before it has chosen; of one operation only one.
    pub steps: u32,
    /// Added to every number of the first step's operations, below [`NUMBERS`]; and by how much more to those of the next.
    pub base: u32,
    pub stride: u32,
    /// The first step's token, or [`CHOSEN`].
    pub token: u32,
    /// Of the first step; the next ones' follow.
    pub position: u32,
    /// Likewise the number that the host knows a step's choice by.
    pub sequence: u32,
    /// Bytes of the ring: room for any turn, and for all that teams wait for at the same time.
    pub ring_bytes: u32,
    /// Most bytes on their way into the ring.
    pub flying: u32,
    /// Most tiles of a row in a turn.
    pub turn_tiles: u32,
    /// Bytes of the input row, or of what attention needs; see [`shared_bytes`].
    pub row_bytes: u32,
    /// The sequence's cache blocks.
    pub table: *const u32,
    /// For every block two words: the halves of its greatest rank, each with `sequence` above it.
    pub ranks: *mut u64,
    /// Null, or where to write when each block came how far: [`globaltimer`] for each of its operations and [`point`].
    pub trace: *mut u64,
    /// Where the id that a step chooses is written, its number above it: at that number modulo [`CHOICES`], in memory that the
    /// host can read.
    pub chosen: *mut u64,
    /// Where each step leaves the same for the next one.
    pub choice: *mut u64,
}

/// Places for the choices of as many steps, before the first is overwritten.
pub const CHOICES: u32 = 32;

/// Stands for the token that the launch before has chosen.
pub const CHOSEN: u32 = u32::MAX;

/// What is timed of an operation.
pub mod point {
    /// It begins.
    pub const BEGIN: usize = 0;
    /// Its input is there.
    pub const INPUT: usize = 1;
    /// Its output is written.
    pub const OUTPUT: usize = 2;
    /// How many points there are.
    pub const COUNT: usize = 3;
}

/// Notes the time in this thread, if it is asked for.
#[inline(always)]
unsafe fn note(a: &DecodeArgs, index: u32, point: usize) {
    if !may_be(TRACED) {
        return;
    }
    // Not known beforehand, for which it would take a register: no memory of a device lies in the first four gigabytes.
    if here((a.trace as u64 >> 32) as u32) != 0 {
        let at = (here(block_idx_x()) * a.count + here(index)) as usize * point::COUNT + point;
        unsafe { a.trace.add(at).write(globaltimer()) }
    }
}

/// The same in the block's first thread.
#[inline(always)]
unsafe fn first_note(a: &DecodeArgs, index: u32, point: usize) {
    if thread() == 0 {
        unsafe { note(a, index, point) }
    }
}

/// Shared memory: sums of squares, scratch, zeros, the ring's barriers, parts of outputs, the window, the cache's table, the row, the
/// ring, and as much as a part of a row may be read past a tile's end.
const SCRATCH_AT: u32 = 2 * 4 * row::SQUARES;
/// Where steps end at an `mbarrier`, that.
const STEP_AT: u32 = SCRATCH_AT + 8 * FINISHERS;
const ZEROS_AT: u32 = (STEP_AT + 8).next_multiple_of(32) + 16;
const BARRIERS_AT: u32 = ZEROS_AT + row::ZEROS_BYTES;
const PARTS_AT: u32 = BARRIERS_AT + ring::BARRIERS_BYTES;
const WINDOW_AT: u32 = PARTS_AT + product::PARTS_BYTES;
const TABLE_AT: u32 = WINDOW_AT + WINDOW * OP_BYTES;
/// Whole lines of the memory: copies of weights that begin within one take longer.
const ROWS_AT: u32 = (TABLE_AT + 4 * TABLE).next_multiple_of(128);

/// So many of the sequence's first cache blocks are kept in shared memory: who reads keys and values would else wait for the
/// number of their block first.
const TABLE: u32 = 256;

/// Starts to copy them. A wait and a barrier must follow.
#[inline(always)]
unsafe fn copy_table(a: &DecodeArgs) {
    let blocks = (a.position + a.steps - 1) / BLOCK_TOKENS as u32 + 1;
    let i = thread_idx_x();
    if !a.table.is_null() && i < blocks && i < TABLE {
        unsafe { cp_async_4(shared::at::<u32>(TABLE_AT + 4 * i), a.table.add(i as usize)) }
    }
}

const _: () = assert!(TABLE <= THREADS, "a thread copies one");

/// The cache block of token `token` of the sequence.
#[inline(always)]
unsafe fn cache_block(a: &DecodeArgs, token: u32) -> u32 {
    let i = token / BLOCK_TOKENS as u32;
    unsafe {
        if i < TABLE {
            shared::at::<u32>(TABLE_AT + 4 * i).load()
        } else {
            ldg_u32(a.table.add(i as usize))
        }
    }
}

/// Of a launch whose operations need at most `row` bytes for a row ([`row_bytes`]) and `attend` for attention
/// ([`attend_bytes`]), with so much shared memory: what to pass as [`DecodeArgs::row_bytes`], and as
/// [`DecodeArgs::ring_bytes`], if that is any.
pub const fn rooms(row: u32, attend: u32, shared: u32) -> (u32, u32) {
    // The row's place is attention's while it lasts.
    let row = if row > attend { row } else { attend };
    let row = row.next_multiple_of(128);
    let ring = shared.saturating_sub(ROWS_AT + row);
    (row, ring - ring % 256)
}

/// What a warp carries from operation to operation.
struct Warp {
    /// Index of the current operation, of all of the launch.
    index: u32,
    /// Where the next turn of the ring comes.
    place: Place,
    /// Number of the current step.
    step: u32,
}

impl Warp {
    /// Ends a step, in all warps but the feeder: what those that compute have left for finishers is theirs, and what
    /// finishers have brought to an end makes room for the next.
    ///
    /// Nobody waits for long: finishers take less time than a step does.
    #[inline(always)]
    fn end_step(&mut self) {
        if settled::<STEP_BARRIER>() != 0 {
            bar_sync(3, STEP_THREADS);
        } else {
            let barrier = shared::at::<u64>(STEP_AT);
            unsafe {
                mbarrier::arrive(barrier);
                mbarrier::wait(barrier, self.step % 2);
            }
        }
        // A number, not whether it is odd: that would be a predicate, which takes more instructions to keep.
        self.step = here(self.step + 1);
    }

    /// Ends an operation that is no product, in the warps that compute.
    #[inline(always)]
    unsafe fn end_op(&mut self, a: &DecodeArgs) {
        unsafe { first_note(a, self.index, point::OUTPUT) }
        self.end_step();
    }
}

/// Lane and thread of the block, as numbers from which nothing is computed beforehand: what follows from them would
/// else take registers throughout the launch.
#[inline(always)]
fn lane() -> u32 {
    here(lane_id())
}

#[inline(always)]
fn thread() -> u32 {
    here(thread_idx_x())
}

/// Blocks of the grid, likewise.
#[inline(always)]
fn blocks() -> u32 {
    here(grid_dim_x())
}

/// Threads that end a step: all but the feeder's.
const STEP_THREADS: u32 = 32 * (WARPS + FINISHERS);

/// A barrier of the warps that compute.
#[inline(always)]
fn sync() {
    bar_sync(1, 32 * WARPS);
}

/// A barrier of the finishers.
#[inline(always)]
fn sync_finishers() {
    bar_sync(2, 32 * FINISHERS);
}

/// Carries `ops` in order over one row. The launch is cooperative, with the shared memory of [`rooms`]. From compute
/// capability 9.0 on the copy engine brings the weights.
#[kernel(launch_bounds(512, 1))]
pub unsafe fn decode(a: DecodeArgs) {
    unsafe { run::<{ cfg!(cuda_sm_90) }>(a) }
}

/// [`decode`] as a module for compute capability 9.0 has it, for the emulator.
#[cfg(not(target_arch = "nvptx64"))]
#[kernel(launch_bounds(512, 1))]
pub unsafe fn decode_bulk(a: DecodeArgs) {
    unsafe { run::<true>(a) }
}

#[inline(always)]
unsafe fn run<const BULK: bool>(a: DecodeArgs) {
    unsafe {
        if settled::<STEP_BARRIER>() == 0 && thread_idx_x() == 0 {
            mbarrier::init(shared::at(STEP_AT), STEP_THREADS);
        }
        if thread_idx_x() < row::ZEROS_BYTES / 4 {
            shared::at::<u32>(ZEROS_AT + 4 * thread_idx_x()).store(0);
        }
        ring::init::<BULK>(thread_idx_x());
        unrolled!(2, |i| {
            const { assert!(AHEAD == 2) };
            copy_op(&a, i as u32);
        });
        copy_table(&a);
        cp_async_commit();
        cp_async_wait::<0>();
        sync_threads();
        let mut w = Warp {
            index: 0,
            place: Place::first(),
            step: 0,
        };
        if thread_idx_x() >= 32 * (WARPS + FINISHERS) {
            ring::feed::<BULK>(&a);
        } else if thread_idx_x() >= 32 * WARPS {
            while w.index < a.count * a.steps {
                let op = Current::at(w.index);
                copy_op(&a, w.index + AHEAD);
                if is_product(get!(op, kind)) {
                    finish::finish(&a, op, &mut w);
                } else {
                    await_op();
                    w.end_step();
                }
                w.index += 1;
            }
        } else {
            while w.index < a.count * a.steps {
                let op = Current::at(w.index);
                first_note(&a, w.index, point::BEGIN);
                // One question after the other, the usual first: a jump by number takes longer.
                let kind = get!(op, kind);
                if is_product(kind) {
                    product::product(&a, op, &mut w);
                } else {
                    if kind == kind::ATTEND {
                        attend::attend(&a, op, &mut w);
                    } else {
                        embed::embed(&a, op);
                    }
                    w.end_op(&a);
                }
                w.index += 1;
            }
        }
    }
}

#[inline(always)]
fn is_product(kind: u32) -> bool {
    matches!(kind, kind::PRODUCT | kind::GATE_UP | kind::QKV)
}
