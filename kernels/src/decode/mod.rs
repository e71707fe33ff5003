//! Decode steps: one persistent kernel that carries a list of operations over one row, and over what it chooses.
//!
//! Decoding reads every weight once and computes little, so a step's time is that of the reads, plus what
//! lies between two operations. Both are kept small and apart from each other:
//!
//! - A whole step, or several, is one cooperative launch of a block per multiprocessor. Nothing but activations passes
//!   between blocks, and there is no barrier: every word carries in its low bits the number of the operation
//!   that wrote it ([`seal`]), and who needs a word looks until it is there. That costs about half of a
//!   barrier over the grid and the read behind it.
//! - Weights come through a ring in shared memory ([`ring`]). One more warp does nothing but keep it full: it knows the
//!   block's tasks of all operations to come, so that the memory never waits for an operation to end.
//!
//! In a product ([`product`]), every block brings the whole input row into shared memory, quantised to 15 bits per
//! group of 32 ([`row`]), and takes sixteen rows of weights at a time, whose columns its warps share out, on tensor cores.
//! Three warps more, the *finishers*, add up what these have and write it, while the others go on.
//!
//! An operation is a *step* of the block, or several: a batch of tasks each. At its end there is a barrier of all warps but the
//! feeder: finishers come to it when they are through with the step before.
//!
//! A buffer is written again only by an operation that could not have begun before every reader was done:
//! each block's part of an operation needs the whole output of the one before.

mod attend;
mod embed;
mod finish;
mod product;
mod ring;
mod row;
mod seal;
mod task;

use crate::rows::{BLOCK_TOKENS, CacheLayer, Rotation};
use crate::types::{LAYOUTS, Matrix, NO_MATRIX, type_bit};
use crate::unrolled;
use cuda_std::int::here;
use cuda_std::kernel;
use cuda_std::memory::{
    cp_async_4, cp_async_16, cp_async_commit, cp_async_wait, ldg_u32, ldg_v2_u32,
};
use cuda_std::settled::settled;
use cuda_std::shared::{self, Scalar, SharedPtr};
use cuda_std::thread::{
    bar_sync, block_idx_x, globaltimer, grid_dim_x, lane_id, sync_threads, thread_idx_x,
};

use ring::Place;

pub use attend::{MAX_HEAD_DIM, MAX_SPLITS, NARROW_DIM, PART, WIDTH, attend_bytes, attend_pieces};
pub use product::BATCH;
pub use ring::MAX_TURNS;
pub use row::{parts, row_bytes};
pub use seal::{NUMBERS, PLAIN};
pub use task::{MAX_SEGMENTS, MOST_CUT, ROWS, Segment, Shares};

/// Warps of a block that compute.
pub const WARPS: u32 = 12;
/// Warps that bring outputs of products to an end.
const FINISHERS: u32 = 3;
/// Threads per block, one block per multiprocessor; the last warp brings weights.
pub const THREADS: u32 = 32 * (WARPS + FINISHERS + 1);

/// The number ([`settled`](cuda_std::settled::settled)) of what a module's steps may need: the set of the types of their
/// matrices, by [`type_bit`](crate::types::type_bit), and what follows here. A module has no code for what its steps
/// cannot need; and the less code there is, the faster is the rest of it.
pub const NEEDS: u32 = 0;

/// A gate and its up of two types.
pub const MIXED: u32 = 1 << 31;

/// A [`trace`](DecodeArgs::trace): even the question takes time on the path from one operation's output to the next one's.
pub const TRACED: u32 = 1 << 30;

/// Heads of more than [`NARROW_DIM`] elements. There is always code for narrower ones: where it was left out, the compiler gave
/// the rest such registers that products took 3% longer (8B 504 and 488 tokens/s).
pub const WIDE: u32 = 1 << 29;

/// Queries and keys that are normed head by head.
pub const LATE: u32 = 1 << 27;

/// Products of halves of a row, whose outputs are added up by who reads them.
pub const HALVES: u32 = 1 << 28;

/// Rows whose lengths are no multiples of four.
pub const UNEVEN: u32 = 1 << 26;

const _: () = assert!(LAYOUTS.len() < 26, "types have the bits below");
const ALL_TYPES: u32 = (1 << LAYOUTS.len()) - 1;

/// Whether a step may need any of `needs`.
#[inline(always)]
fn may_be(needs: u32) -> bool {
    settled::<NEEDS>() & needs != 0
}

/// Whether `ty` is `T`: no question where no other may be.
#[inline(always)]
fn is_type<const T: u32>(ty: u32) -> bool {
    let bit = const { type_bit(T) };
    may_be(bit) && (ty == T || settled::<NEEDS>() & ALL_TYPES == bit)
}

/// What an [`Op`] does.
pub mod kind {
    /// `out = W norm(x) + b`, or `out += …`.
    pub const PRODUCT: u32 = 0;
    /// `out = silu(Wg norm(x) + bg) * (Wu norm(x) + bu)`.
    pub const GATE_UP: u32 = 1;
    /// `out = rope(Wq norm(x) + bq)`; keys, rotated, and values go to the f16 cache and to `fresh`. With `late` nothing
    /// rotates, and keys go to `fresh` alone.
    pub const QKV: u32 = 2;
    /// Attention of the row over the cache, `input.x` being the queries. With `late`, the heads of these and the keys in
    /// `fresh` are normed and rotated first, and the keys go to the cache. `out` is a row of heads or, in several
    /// splits, f32 `[heads][head_dim / WIDTH][splits][PART]`: sums not yet normalised, their peak and mass, two unused.
    pub const ATTEND: u32 = 3;
    /// A row of heads from what an attention in several splits left at `input.x`.
    pub const MERGE: u32 = 4;
    /// `out = table[token] * scale`.
    pub const EMBED: u32 = 5;
}

/// The input row of an operation.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Input {
    /// f32, `len` long.
    pub x: *const f32,
    /// RMS norm's weight; null for no norm. Of an attention, that of each query head.
    pub norm: *const f32,
    /// [`Op::number`] of the operation that writes `x`; [`PLAIN`] where an earlier launch did.
    pub from: u32,
    pub eps: f32,
    pub len: u32,
    /// `1 / len`, for the norm.
    pub inverse_len: f32,
    /// Whether f32 values are kept too, for matrices of float types.
    pub keep_f32: u32,
    /// Whether each value is the sum of two words, the second `len` behind the first: what a product that is cut in two leaves.
    pub halves: u32,
}

/// What an operation in the window knows of the step that it belongs to; in the program it is anything.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub struct Now {
    /// The token's position in the sequence.
    pub position: u32,
    /// See [`DecodeArgs::base`].
    pub base: u32,
    /// The number that the host knows the step's choice by.
    pub sequence: u32,
    /// The operation's index in the program.
    pub index: u32,
    /// The block's tasks: the first, and from bit 16 on the one behind the last.
    pub tasks: u32,
    pub unused: [u32; 3],
}

/// One operation. What its `kind` has no use for may be anything.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub struct Op {
    pub now: Now,
    pub kind: u32,
    /// Its place among a program's operations, modulo [`NUMBERS`].
    pub number: u32,
    /// Whether `out` is read in this launch, and its words carry `number`.
    pub sealed: u32,
    /// Whether to add to `out` instead of overwriting it.
    pub add: u32,
    /// The number that the words of `out` carry before the addition, or [`PLAIN`]; and whether that is to two words, as
    /// [`Input::halves`] has it.
    pub add_from: u32,
    pub add_halves: u32,
    /// The index in the program of the operation after the next one, 0 for the next step's first; and the block from which on it is
    /// another, the one behind it there: of two products with halves of a row, a block takes one. The first two of a program are
    /// not of these.
    pub after: u32,
    pub after_second: u32,
    /// Warps that share a task out, a *team*; how many teams there are.
    pub team: u32,
    pub teams: u32,
    /// By what a warp's number is divided: by the former for the number of its team, or by the latter for that which it has in its
    /// team; the rest is the other. And its inverse, in [`INVERSE_UNIT`]s.
    pub divisor: u32,
    pub inverse: u32,
    /// Turns of a task.
    pub turns: u32,
    /// Whether a warp multiplies with no other part of the row than the one that it has brought: there is one team, and a part
    /// at most for each of its warps.
    pub alone: u32,
    /// Whether `out` are logits, the greatest of which is the step's choice.
    pub choose: u32,
    pub heads: u32,
    /// Query heads of each key-value head.
    pub group: u32,
    /// Parts that the tokens are cut into, at most [`MAX_SPLITS`]: a block takes one at a time.
    pub splits: u32,
    /// Of the attention scores, or of the embedding.
    pub scale: f32,
    pub input: Input,
    /// The one; gate and up; Q, K and V.
    pub matrices: [Matrix; 3],
    /// f32, null for none.
    pub biases: [*const f32; 3],
    pub rotation: Rotation,
    /// Whether queries and keys are normed head by head: only the attention has whole heads.
    pub late: u32,
    /// RMS norm's weight of each key head, where they are.
    pub key_norm: *const f32,
    pub cache: CacheLayer,
    /// f32 `[2][kv_heads * head_dim]`: this step's keys and values, sealed, as the cache holds them; null for
    /// an attention whose last token is in the cache.
    pub fresh: *mut f32,
    /// f32.
    pub out: *mut f32,
    /// Tiles of the row that are a product of their own, for so many blocks, from bit 16 on; the rest is for the others. Zero where
    /// it is not cut, and where it has been.
    pub cut: u32,
    /// How the tasks fall to the blocks.
    pub shares: Shares,
}

impl Op {
    /// What of [`NEEDS`] it is.
    pub fn needs(&self) -> u32 {
        let [first, second, _] = self.matrices;
        let flag = |is: bool, flag: u32| if is { flag } else { 0 };
        let attends = self.kind == kind::ATTEND;
        let late = self.late != 0;
        // An absent one's type is a number like any other.
        let matrices = self.matrices.iter().filter(|m| m.rows > 0);
        let types = matrices.fold(0, |all, m| all | type_bit(m.ty));
        types
            | flag(self.kind == kind::GATE_UP && first.ty != second.ty, MIXED)
            | flag(attends && self.cache.head_dim > NARROW_DIM, WIDE)
            | flag(late, LATE)
            | flag(self.input.halves | self.add_halves != 0, HALVES)
            | flag(!self.input.len.is_multiple_of(4), UNEVEN)
    }
}

/// See [`Op::inverse`].
pub const INVERSE_UNIT: u32 = 256;

/// Bytes of an [`Op`].
pub const OP_BYTES: u32 = size_of::<Op>() as u32;
const _: () = assert!(
    OP_BYTES / 16 <= 32,
    "a warp copies an operation, 16 bytes a lane"
);

/// Arguments of [`decode`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DecodeArgs {
    pub ops: *const Op,
    /// The operations' [segments](Op::segments), those with tasks, in order; one without after them.
    pub segments: *const Segment,
    pub segment_count: u32,
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
    /// Most tiles of a row in a turn.
    pub turn_tiles: u32,
    /// Bytes of the input row, or of what attention needs; see [`shared_bytes`].
    pub row_bytes: u32,
    /// The sequence's cache blocks.
    pub table: *const u32,
    /// For every block two words: the halves of its greatest rank, each with `sequence` above it.
    pub ranks: *mut u64,
    /// Null, or where to write when block 0 came how far: [`globaltimer`] for each operation and [`point`].
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

/// Notes the time in this thread of block 0, if it is asked for.
#[inline(always)]
unsafe fn note(a: &DecodeArgs, index: u32, point: usize) {
    if !may_be(TRACED) {
        return;
    }
    // Not known beforehand, for which it would take a register: no memory of a device lies in the first four gigabytes.
    if here(block_idx_x()) == 0 && here((a.trace as u64 >> 32) as u32) != 0 {
        let at = here(index) as usize * point::COUNT + point;
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

/// Operations in shared memory: the one before, which slow warps still read, the current one, and those to come.
const WINDOW: u32 = 4;
/// How far the window reaches beyond the current operation: its last is on its way, and shown by the next one's barrier.
const AHEAD: u32 = WINDOW - 2;

/// Shared memory: sums of squares, scratch, the ring's barriers, parts of outputs, the window, the cache's table, the row, the
/// ring, and as much as a part of a row may be read past a tile's end.
const SCRATCH_AT: u32 = 2 * 4 * row::SQUARES;
const BARRIERS_AT: u32 = (SCRATCH_AT + 8 * FINISHERS).next_multiple_of(16);
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

/// Where the fields of an operation are read.
trait Source: Copy {
    unsafe fn word(self, offset: u32) -> u32;
    unsafe fn long(self, offset: u32) -> u64;

    /// The field at `offset`; `_type` only says its type.
    #[inline(always)]
    unsafe fn read<T: Field>(self, offset: u32, _type: impl Fn(*const Op) -> *const T) -> T {
        unsafe { T::of(self, offset) }
    }

    /// Biases of matrix `m`; null for none.
    #[inline(always)]
    unsafe fn bias(self, m: u32) -> *const f32 {
        unsafe { Field::of(self, core::mem::offset_of!(Op, biases) as u32 + 8 * m) }
    }
}

/// Reads a field of an operation from a [`Source`].
macro_rules! get {
    ($op:expr, $($field:tt)+) => {
        $crate::decode::Source::read(
            $op,
            core::mem::offset_of!($crate::decode::Op, $($field)+) as u32,
            |op| &raw const (*op).$($field)+,
        )
    };
}
use get;

/// Where matrix `m` lies in an operation.
#[inline(always)]
fn matrix_at(m: u32) -> u32 {
    core::mem::offset_of!(Op, matrices) as u32 + m * size_of::<Matrix>() as u32
}

/// An operation in the window: its address there.
#[derive(Clone, Copy)]
struct Current(u32);

impl Current {
    #[inline(always)]
    fn at(index: u32) -> Current {
        Current(shared::at::<u8>(WINDOW_AT + index % WINDOW * OP_BYTES).addr())
    }
}

impl Source for Current {
    #[inline(always)]
    unsafe fn word(self, offset: u32) -> u32 {
        unsafe { u32::load(self.0 + offset) }
    }

    #[inline(always)]
    unsafe fn long(self, offset: u32) -> u64 {
        unsafe { u64::load(self.0 + offset) }
    }
}

/// An operation in the program, in global memory.
#[derive(Clone, Copy)]
struct Listed(*const Op);

impl Source for Listed {
    #[inline(always)]
    unsafe fn word(self, offset: u32) -> u32 {
        unsafe { ldg_u32(self.0.cast::<u8>().add(offset as usize).cast()) }
    }

    #[inline(always)]
    unsafe fn long(self, offset: u32) -> u64 {
        let [low, high] = unsafe { ldg_v2_u32(self.0.cast::<u8>().add(offset as usize)) };
        u64::from(low) | (u64::from(high) << 32)
    }
}

/// What an operation's fields are.
trait Field {
    unsafe fn of(op: impl Source, offset: u32) -> Self;
}

impl Field for u32 {
    #[inline(always)]
    unsafe fn of(op: impl Source, offset: u32) -> Self {
        unsafe { op.word(offset) }
    }
}

impl Field for f32 {
    #[inline(always)]
    unsafe fn of(op: impl Source, offset: u32) -> Self {
        f32::from_bits(unsafe { op.word(offset) })
    }
}

impl<T> Field for *const T {
    #[inline(always)]
    unsafe fn of(op: impl Source, offset: u32) -> Self {
        unsafe { op.long(offset) as *const T }
    }
}

impl<T> Field for *mut T {
    #[inline(always)]
    unsafe fn of(op: impl Source, offset: u32) -> Self {
        unsafe { op.long(offset) as *mut T }
    }
}

/// Starts to copy operation `index` of the launch into the window, by the last finisher, which has the least to do.
/// [`await_op`] in the operation after this one, and a barrier, must follow.
#[inline(always)]
unsafe fn copy_op(a: &DecodeArgs, index: u32) {
    if thread() / 32 == COPIER && index < a.count * a.steps {
        unsafe {
            let now = if index < AHEAD {
                Now {
                    position: a.position,
                    base: a.base,
                    sequence: a.sequence,
                    index,
                    ..NO_OP.now
                }
            } else {
                Now::after(Current::at(index - AHEAD), Current::at(index - 1), a)
            };
            let to = SharedPtr::<u8>::from_addr(Current::at(index).0);
            let at = 16 * lane();
            if at == NOW_AT {
                let words = [now.position, now.base, now.sequence, now.index];
                SharedPtr::<u32>::from_addr(to.addr() + at).store_v4(words);
            } else if at == NOW_AT + 16 {
                let place = now.index * grid_dim_x() + block_idx_x();
                let to = SharedPtr::<u32>::from_addr(to.addr() + at);
                cp_async_4(to, a.tasks.add(place as usize));
            } else if at < OP_BYTES {
                let from = a.ops.add(now.index as usize).cast::<u8>();
                cp_async_16(
                    SharedPtr::<u8>::from_addr(to.addr() + at),
                    from.add(at as usize),
                );
            }
        }
    }
    cp_async_commit();
}

/// Where an operation's [`Op::now`] is, and the second vector of that, which has [`Now::tasks`].
const NOW_AT: u32 = core::mem::offset_of!(Op, now) as u32;
const _: () = assert!(core::mem::offset_of!(Now, tasks) == 16 && size_of::<Now>() == 32);

impl Now {
    /// That of the operation behind the neighbours `op` and `next`. Of the latter no more may be there.
    #[inline(always)]
    unsafe fn after(op: Current, next: Current, a: &DecodeArgs) -> Now {
        unsafe {
            let after = get!(op, after);
            let second = block_idx_x() >= get!(op, after_second);
            let now = Now {
                position: get!(next, now.position),
                base: get!(next, now.base),
                sequence: get!(next, now.sequence),
                index: after + u32::from(second),
                ..NO_OP.now
            };
            if after != 0 {
                return now;
            }
            let base = now.base + a.stride;
            Now {
                position: now.position + 1,
                base: if base < NUMBERS { base } else { base - NUMBERS },
                sequence: now.sequence + 1,
                index: 0,
                ..NO_OP.now
            }
        }
    }
}

const COPIER: u32 = WARPS + FINISHERS - 1;

/// Waits for what [`copy_op`] began in the operation before this one.
#[inline(always)]
fn await_op() {
    cp_async_wait::<1>();
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
        bar_sync(3, 32 * (WARPS + FINISHERS));
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
                        attend::attend(&a, op);
                    } else if kind == kind::MERGE {
                        attend::merge(op);
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

/// An operation of no kind, for the fields that a kind has no use for.
pub const NO_OP: Op = Op {
    now: Now {
        position: 0,
        base: 0,
        sequence: 0,
        index: 0,
        tasks: 0,
        unused: [0; 3],
    },
    kind: u32::MAX,
    number: 0,
    sealed: 0,
    add: 0,
    add_from: PLAIN,
    add_halves: 0,
    after: 0,
    after_second: u32::MAX,
    team: WARPS,
    teams: 1,
    divisor: WARPS,
    inverse: 0,
    turns: 0,
    alone: 0,
    choose: 0,
    heads: 0,
    group: 0,
    splits: 0,
    scale: 0.0,
    input: Input {
        x: core::ptr::null(),
        norm: core::ptr::null(),
        from: PLAIN,
        eps: 0.0,
        len: 0,
        inverse_len: 0.0,
        keep_f32: 0,
        halves: 0,
    },
    matrices: [NO_MATRIX; 3],
    biases: [core::ptr::null(); 3],
    rotation: Rotation {
        table: core::ptr::null(),
        dims: 0,
        halves: 0,
    },
    late: 0,
    key_norm: core::ptr::null(),
    cache: CacheLayer {
        keys: core::ptr::null_mut(),
        values: core::ptr::null_mut(),
        kv_heads: 0,
        head_dim: 0,
    },
    fresh: core::ptr::null_mut(),
    out: core::ptr::null_mut(),
    cut: 0,
    shares: Shares::NONE,
};
