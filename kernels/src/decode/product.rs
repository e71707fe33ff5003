//! Products with the input row: plain ones, gate and up, queries, keys and values.
//!
//! A block takes tasks of sixteen rows of weights. A team of its warps, all of them or some, takes one at a time, and they share
//! the row's parts out ([`super::row`]). Weights are A's fragments of a product of bytes on tensor cores, a group at a time; of B all
//! but the group's two columns are zero, so that several groups' sums, which have scales of their own, come to lie beside
//! each other. Warps leave what they computed of each row in shared memory and go on; after a *batch* of tasks other
//! warps add it up and write what the tasks are for ([`finish`]).

use super::ring::{Head, Tile, TwoWords};
use super::row::{GROUPS, Kept, Part, ask, fill, norm_scale, parts, sum_of};
use super::seal::{Seal, pause};
use super::task::{BlockTasks, EIGHT, ROWS, TaskRow, block_tasks, matrix_field};
use super::{
    Current, DecodeArgs, FINISHERS, MIXED, PARTS_AT, PLAIN, SCRATCH_AT, Source, TYPES, WARPS, Warp,
    blocks, first_note, get, kind, lane, note, point, sync, sync_finishers, thread,
};
use crate::rows::BLOCK_TOKENS;
use crate::sample::{max_u64, rank, warp_max};
use crate::types::*;
use crate::{for_each_type, unrolled};
use core::mem::offset_of;
use cuda_std::int::{here, opaque, quotient};
use cuda_std::memory::{
    ld_relaxed_u32, ld_relaxed_u64, ldg_f32, ldg_u32, st_relaxed_u64, threadfence_system,
};
use cuda_std::settled::settled;
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::block_idx_x;
use cuda_std::{float, half, mma, warp};

/// Tasks that a block brings to an end together, two for each warp that does.
pub const BATCH: u32 = 2 * FINISHERS;

/// Bytes of what the warps of a team computed of a task: for each row a word of each. Rows that lanes read side by side are in
/// different banks.
const TASK_BYTES: u32 = ROWS * WARPS * 4;
const _: () = assert!(WARPS / 4 % 2 == 1);
/// Bytes of a batch's.
const BATCH_BYTES: u32 = BATCH * TASK_BYTES;
/// Bytes of all: a batch's are read while the next one's are written.
pub(super) const PARTS_BYTES: u32 = 2 * BATCH_BYTES;

/// Where the warps of a team leave their parts of row `row` of task `task` of step `step`.
#[inline(always)]
fn parts_of(step: u32, task: u32, row: u32) -> SharedPtr<f32> {
    shared::at(PARTS_AT + step % 2 * BATCH_BYTES + task * TASK_BYTES + row * (4 * WARPS))
}

/// Tasks of a batch that begins with task `index`.
#[inline(always)]
fn batch_of(index: u32, end: u32) -> u32 {
    if end - index < BATCH {
        end - index
    } else {
        BATCH
    }
}

/// An output that a lane brings to an end.
#[derive(Clone, Copy)]
struct Output {
    /// Where it goes.
    to: *mut f32,
    /// Its matrix, and what of [`Output::WRITES`] and so on is so.
    flags: u32,
    bias: f32,
    /// Cosine and sine of a rotation's angle; or the bits of the word that is added to.
    turn: (f32, f32),
}

impl Output {
    /// This lane writes it.
    const WRITES: u32 = 4;
    /// It is of a pair that rotates, and the second.
    const ROTATES: u32 = 8;
    const SECOND: u32 = 16;
    /// It is added to what is there.
    const ADDS: u32 = 32;

    const NONE: Output = Output {
        to: core::ptr::null_mut(),
        flags: 0,
        bias: 0.0,
        turn: (1.0, 0.0),
    };

    /// Its matrix.
    #[inline(always)]
    fn m(&self) -> u32 {
        self.flags % Self::WRITES
    }

    #[inline(always)]
    fn is(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Of this lane's row of task `index`. What it asks for comes while the input is awaited.
    #[inline(always)]
    unsafe fn of(a: &DecodeArgs, op: Current, index: u32) -> Output {
        unsafe {
            let row = TaskRow::of(op, index, lane());
            // Of a gate and its up the first writes.
            let most = if get!(op, kind) == kind::GATE_UP {
                EIGHT
            } else {
                ROWS
            };
            let flag = |is: bool, flag: u32| if is { flag } else { 0 };
            let mut output = Output {
                to: get!(op, out).wrapping_add(row.r as usize),
                flags: row.m
                    | flag(row.exists && lane() % ROWS < most, Self::WRITES)
                    | flag(row.rotates, Self::ROTATES)
                    | flag(row.second, Self::SECOND),
                bias: 0.0,
                turn: (1.0, 0.0),
            };
            if row.exists {
                let bias = op.bias(row.m);
                if !bias.is_null() {
                    output.bias = ldg_f32(bias.add(row.r as usize));
                }
                if row.rotates {
                    let table = get!(op, rotation.table);
                    let at =
                        (here(a.position) * (get!(op, rotation.dims) / 2) + row.pair) as usize * 2;
                    output.turn = (ldg_f32(table.add(at)), ldg_f32(table.add(at + 1)));
                } else if get!(op, add) != 0 {
                    output.flags |= Output::ADDS;
                    output.turn.0 = f32::from_bits(ld_relaxed_u32(output.to.cast()));
                }
            }
            output
        }
    }
}

/// Groups of eight rows, a row for four lanes: of each group two words of levels, and scales of that which is this
/// lane's.
#[derive(Clone, Copy)]
struct Eight {
    levels: [[u32; 2]; GROUPS as usize],
    affine: Affine,
}

/// Nothing: registers that some path leaves undefined would be taken throughout the launch.
const NO_EIGHT: Eight = Eight {
    levels: [[0; 2]; GROUPS as usize],
    affine: Affine {
        d: [0.0; 2],
        m: [0.0; 2],
    },
};

/// A task's tiles in a turn.
#[derive(Clone, Copy)]
struct Turn {
    /// Where this lane's row of the first eight begins.
    start: u32,
    head: Head,
    /// The first tile.
    tile: u32,
    /// Groups of the row.
    groups: u32,
}

/// A part of it.
#[derive(Clone, Copy)]
struct Place {
    /// Where the tile of this lane's row of either eight begins.
    starts: [u32; 2],
    /// Groups of the tile, and the part's first.
    groups: u32,
    first: u32,
}

impl Turn {
    #[inline(always)]
    fn part(&self, a: &DecodeArgs, part: u32) -> Place {
        let mine = part * GROUPS / TILE as u32;
        let left = self.groups - mine * TILE as u32;
        let [first, second] = self.head.tiles.map(|bytes| (mine - self.tile) * bytes);
        Place {
            starts: [
                self.start + first,
                self.start + EIGHT * here(a.pitch) + second,
            ],
            groups: if left < TILE as u32 {
                left
            } else {
                TILE as u32
            },
            first: part * GROUPS % TILE as u32,
        }
    }
}

/// Eight rows of a quantised type. Past the end of a row levels and scales are whatever is there.
#[inline(always)]
unsafe fn eight<T: Quantised>(place: &Place, start: u32) -> Eight {
    unsafe {
        let tile = Tile::<T>::new(start, place.groups);
        let words = TwoWords {
            tile,
            word: lane() % 4,
        };
        let first = place.first as usize;
        Eight {
            levels: unrolled!(4, |g| {
                let levels = T::levels(T::load(&words, first + g));
                [levels[0], levels[4]]
            }),
            affine: affine::<T>(place, &words.tile),
        }
    }
}

/// The scales of this lane's group.
#[inline(always)]
unsafe fn affine<T: Quantised>(place: &Place, tile: &Tile<T>) -> Affine {
    let g = (place.first + lane() % 4) as usize;
    T::affine(unsafe { T::load(tile, g) }, g)
}

/// The same of a type whose levels come of whole groups.
#[inline(always)]
unsafe fn eight_looked_up<T: Quantised>(place: &Place, start: u32) -> Eight {
    unsafe {
        let tile = Tile::<T>::new(start, place.groups);
        let word = lane() % 4;
        let mut all = [[0; 2]; GROUPS as usize];
        let mut g = 0;
        while g < GROUPS {
            let levels = T::levels(T::load(&tile, (place.first + g) as usize));
            // Not indexed, for which they would go to local memory.
            let pick = |from: usize| {
                let near = [levels[from], levels[from + 1]];
                let far = [levels[from + 2], levels[from + 3]];
                let two = if word & 2 != 0 { far } else { near };
                if word & 1 != 0 { two[1] } else { two[0] }
            };
            let mine = [pick(0), pick(4)];
            for i in 0..GROUPS {
                if i == g {
                    all[i as usize] = mine;
                }
            }
            // Not unrolled.
            g += opaque(1);
        }
        Eight {
            levels: all,
            affine: affine::<T>(place, &tile),
        }
    }
}

/// This warp's parts of a turn's products with the row: of rows `lane / 4` of either eight.
#[inline(always)]
unsafe fn dot_quantised<T: Quantised>(
    a: &DecodeArgs,
    op: Current,
    turn: &Turn,
    parts: Parts,
) -> [f32; 2] {
    let mut sums = [0.0; 2];
    let mut part = parts.first;
    while part < parts.end {
        unsafe {
            let place = turn.part(a, part);
            let x = Kept::new(op, part).load();
            let [first, second] = place.starts;
            let w = [eight::<T>(&place, first), eight::<T>(&place, second)];
            let products = dot(&w, &x, T::UNIFORM);
            sums[0] += products[0];
            sums[1] += products[1];
        }
        part += parts.step;
    }
    sums
}

/// The same of a type whose levels come of whole groups, one eight after the other through the same code: both would take
/// more registers than there are.
#[inline(always)]
unsafe fn dot_looked_up<T: Quantised>(
    a: &DecodeArgs,
    op: Current,
    turn: &Turn,
    parts: Parts,
) -> [f32; 2] {
    let mut sums = [0.0; 2];
    let mut i = 0;
    while i < 2 {
        let mut sum = 0.0;
        let mut part = parts.first;
        while part < parts.end {
            unsafe {
                let place = turn.part(a, part);
                let x = Kept::new(op, part).load();
                let [first, second] = place.starts;
                let start = if i == 0 { first } else { second };
                let w = [eight_looked_up::<T>(&place, start), NO_EIGHT];
                sum += dot(&w, &x, T::UNIFORM)[0];
            }
            part += parts.step;
        }
        sums = [sums[1], sum];
        // Not unrolled.
        i += opaque(1);
    }
    sums
}

/// Parts `first`, `first + step` and so on before `end`.
#[derive(Clone, Copy)]
struct Parts {
    first: u32,
    end: u32,
    step: u32,
}

/// The same of float weights with the f32 row.
#[inline(always)]
unsafe fn dot_float<T: Sixteen>(
    a: &DecodeArgs,
    op: Current,
    turn: &Turn,
    parts: Parts,
) -> [f32; 2] {
    unsafe {
        const { assert!(GROUP % T::WEIGHTS == 0) };
        let units = (GROUP / T::WEIGHTS) as u32;
        let mut sums = [0.0f32; 2];
        let mut part = parts.first;
        while part < parts.end {
            let place = turn.part(a, part);
            let values = Kept::new(op, part).values();
            let groups = place.groups - place.first;
            let groups = if groups < GROUPS { groups } else { GROUPS };
            let mut unit = lane() % 4;
            while unit < groups * units {
                let x = values.add(unit * T::WEIGHTS as u32);
                for i in 0..2 {
                    let at = place.starts[i] + 16 * (place.first * units + unit);
                    let w = T::unpack_sixteen(SharedPtr::<u32>::from_addr(at).load_v4());
                    let mut k = 0;
                    while k < T::WEIGHTS {
                        let x = x.add(k as u32).load_v4();
                        for j in 0..4 {
                            sums[i] += w[k + j] * x[j];
                        }
                        k += 4;
                    }
                }
                unit += 4;
            }
            part += parts.step;
        }
        sums
    }
}

/// Whether a matrix may be of one of the types of a set.
#[inline(always)]
fn may_be(types: u32) -> bool {
    settled::<TYPES>() & types != 0
}

/// Whether `ty` is `T`: no question where no other may be.
#[inline(always)]
fn is_type<const T: u32>(ty: u32) -> bool {
    let bit = const { type_bit(T) };
    may_be(bit) && (ty == T || settled::<TYPES>() & !MIXED == bit)
}

macro_rules! turn_by_type {
    ($($ty:literal => $name:ident, $kind:ident;)*) => {
        /// A warp's first part: both eights, if its type is such that these are quickly unpacked.
        #[inline(always)]
        unsafe fn first_of(ty: u32, place: &Place) -> First {
            unsafe {
                $(if is_type::<$ty>(ty) {
                    return turn_by_type!(@$kind first $name, place);
                })*
                First::NONE
            }
        }

        /// This warp's parts of a turn's products with eights of type `ty`.
        #[inline(always)]
        unsafe fn dot_of(ty: u32, a: &DecodeArgs, op: Current, turn: &Turn, parts: Parts) -> [f32; 2] {
            unsafe {
                // One after the other: a jump by number takes longer than the few that a settled kernel has left.
                $(if is_type::<$ty>(ty) {
                    return turn_by_type!(@$kind $name, a, op, turn, parts);
                })*
                [f32::NAN; 2]
            }
        }
    };
    (@quantised first $name:ident, $place:ident) => {
        First {
            ready: true,
            read: false,
            uniform: $name::UNIFORM,
            eights: [
                eight::<$name>($place, $place.starts[0]),
                eight::<$name>($place, $place.starts[1]),
            ],
        }
    };
    (@looked_up first $name:ident, $place:ident) => { First::NONE };
    (@float first $name:ident, $place:ident) => { First::NONE };
    (@quantised $name:ident, $a:ident, $op:ident, $turn:ident, $parts:ident) => {
        dot_quantised::<$name>($a, $op, $turn, $parts)
    };
    (@looked_up $name:ident, $a:ident, $op:ident, $turn:ident, $parts:ident) => {
        dot_looked_up::<$name>($a, $op, $turn, $parts)
    };
    (@float $name:ident, $a:ident, $op:ident, $turn:ident, $parts:ident) => {
        dot_float::<$name>($a, $op, $turn, $parts)
    };
}
for_each_type!(turn_by_type);

/// This lane's parts of the products of rows `lane / 4` of either eight: those of group `lane % 4`.
#[inline(always)]
fn dot(w: &[Eight; 2], x: &Part, uniform: bool) -> [f32; 2] {
    // Of B all but the group's columns are zero.
    let column = lane() / 8;
    let of = |g: u32, i: usize| if column == g { x.bytes[i] } else { 0 };
    // Several sums, so that one product does not wait for the last: of even and of odd groups, and of either half.
    let mut sums = [[[0i32; 4]; 2]; 2];
    for g in 0..GROUPS as usize {
        let [a, b] = [w[0].levels[g], w[1].levels[g]];
        let x = [of(g as u32, 0), of(g as u32, 1)];
        let [first, second] = &mut sums[g % 2];
        if uniform {
            *first = mma::m16n8k32_u8_s8([a[0], b[0], a[1], b[1]], x, *first);
        } else {
            *first = mma::m16n8k16_u8_s8([a[0], b[0]], x[0], *first);
            *second = mma::m16n8k16_u8_s8([a[1], b[1]], x[1], *second);
        }
    }
    unrolled!(2, |i| {
        let whole = |half: usize| {
            let [even, odd] = [sums[0][half], sums[1][half]];
            let (high, low) = (even[2 * i] + odd[2 * i], even[2 * i + 1] + odd[2 * i + 1]);
            (128 * high + low) as f32
        };
        let w = &w[i].affine;
        let [first, second] = x.sums;
        let product = if uniform {
            x.d * (w.d[0] * whole(0)) + w.m[0] * (first + second)
        } else {
            x.d * (w.d[0] * whole(0) + w.d[1] * whole(1)) + (w.m[0] * first + w.m[1] * second)
        };
        // Past the row's end scales are whatever is there.
        if x.d == 0.0 { 0.0 } else { product }
    })
}

/// [`kind::PRODUCT`], [`kind::GATE_UP`] and [`kind::QKV`].
///
/// What does not need the input comes before the wait for it: the weights of a warp's first part are unpacked by then.
#[inline(always)]
pub unsafe fn product(a: &DecodeArgs, op: Current, w: &mut Warp) {
    unsafe {
        let BlockTasks {
            first: mut index,
            end,
        } = block_tasks(op);
        if index >= end {
            return;
        }
        let asked = ask(op, thread() / 32);
        let team = Team::of(a, op);
        let mut count = batch_of(index, end);
        // What is not this team's passes by.
        let mut task = team.pass(a, w, 0, team.number, count);
        let mut first = First::NONE;
        if task < count {
            first = team.first(a, w);
        }
        let seal = Seal::of(a, get!(op, input.from));
        fill(op, seal, w.index, team.groups, asked);
        sync();
        first_note(a, w.index, point::INPUT);
        loop {
            while task < count {
                let sums = team.dot(a, op, w, &first);
                first.ready = false;
                // Of four lanes the first two have either eight's row in the end.
                let odd = lane() & 1 != 0;
                let bits = sums.map(f32::to_bits);
                let [keep, pass] = if odd { [bits[1], bits[0]] } else { bits };
                // As one number each: else either half of the lanes would get an exchange of its own.
                let other = warp::shuffle_xor(opaque(pass), 1);
                let mut sum = f32::from_bits(keep) + f32::from_bits(other);
                sum += warp::shuffle_xor(sum, 2);
                if lane() & 2 == 0 {
                    let row = lane() / 4 + if odd { EIGHT } else { 0 };
                    parts_of(w.step, task, row).add(team.warp).store(sum);
                }
                task = team.pass(a, w, task + 1, team.teams - 1, count);
            }
            index += count;
            if index >= end {
                break;
            }
            w.end_step();
            w.begin_step();
            count = batch_of(index, end);
            task = team.pass(a, w, 0, team.number, count);
        }
    }
}

/// The warps that take a task.
#[derive(Clone, Copy)]
struct Team {
    /// Its number, of so many.
    number: u32,
    teams: u32,
    /// This warp's number in it, of so many.
    warp: u32,
    warps: u32,
    /// Groups of a row.
    groups: u32,
    /// Turns of a task.
    turns: u32,
}

/// The weights of a warp's first part.
#[derive(Clone, Copy)]
struct First {
    ready: bool,
    /// Whether the first turn has been given back, its other parts being other warps'.
    read: bool,
    uniform: bool,
    eights: [Eight; 2],
}

impl First {
    const NONE: First = First {
        ready: false,
        read: false,
        uniform: true,
        eights: [NO_EIGHT; 2],
    };
}

impl Team {
    #[inline(always)]
    unsafe fn of(a: &DecodeArgs, op: Current) -> Team {
        unsafe {
            let warps = get!(op, team);
            let number = quotient(thread() / 32, warps);
            let groups = matrix_field(op, 0, offset_of!(Matrix, cols)) / GROUP as u32;
            Team {
                number,
                teams: quotient(WARPS, warps),
                warp: thread() / 32 - number * warps,
                warps,
                groups,
                turns: quotient(
                    groups.div_ceil(TILE as u32) + a.turn_tiles - 1,
                    a.turn_tiles,
                ),
            }
        }
    }

    /// Lets the turns of `tasks` tasks from `task` on pass by, those before `end`; the task behind them.
    #[inline(always)]
    unsafe fn pass(&self, a: &DecodeArgs, w: &mut Warp, task: u32, tasks: u32, end: u32) -> u32 {
        let behind = task + tasks;
        let behind = if behind < end { behind } else { end };
        let mut turns = behind.saturating_sub(task) * self.turns;
        while turns > 0 {
            unsafe { w.place.pass(a) }
            turns -= 1;
        }
        behind
    }

    /// The next turn, which begins with tile `tile`.
    #[inline(always)]
    unsafe fn turn(&self, a: &DecodeArgs, w: &Warp, tile: u32) -> Turn {
        let (start, head) = unsafe { w.place.wait(a) };
        Turn {
            start: start + here(lane()) / 4 * here(a.pitch),
            head,
            tile,
            groups: self.groups,
        }
    }

    /// Unpacks this warp's first part of the next task, where that is of one quantised type and in its first turn.
    #[inline(always)]
    unsafe fn first(&self, a: &DecodeArgs, w: &mut Warp) -> First {
        unsafe {
            let turn = self.turn(a, w, 0);
            let ty = turn.head.first();
            if self.warp >= self.end(a, 0) || may_be(MIXED) && ty != turn.head.second() {
                return First::NONE;
            }
            let mut first = first_of(ty, &turn.part(a, self.warp));
            if first.ready && self.warp + self.warps >= self.end(a, 0) {
                first.read = true;
                w.place.release(a);
            }
            first
        }
    }

    /// The part behind those of the turn that begins with tile `tile`.
    #[inline(always)]
    fn end(&self, a: &DecodeArgs, tile: u32) -> u32 {
        let end = (tile + a.turn_tiles) * (TILE as u32 / GROUPS);
        let all = parts(self.groups);
        if end < all { end } else { all }
    }

    /// This warp's part of the next task's products.
    #[inline(always)]
    unsafe fn dot(&self, a: &DecodeArgs, op: Current, w: &mut Warp, first: &First) -> [f32; 2] {
        unsafe {
            let mut sums = [0.0f32; 2];
            let mut part = self.warp;
            if first.ready {
                sums = dot(&first.eights, &Kept::new(op, part).load(), first.uniform);
                part += self.warps;
            }
            let mut tile = 0;
            let mut turns = self.turns;
            if first.ready && first.read {
                tile += a.turn_tiles;
                turns -= 1;
            }
            while turns > 0 {
                let end = self.end(a, tile);
                if part < end {
                    let turn = self.turn(a, w, tile);
                    let parts = Parts {
                        first: part,
                        end,
                        step: self.warps,
                    };
                    let (ty, second) = (turn.head.first(), turn.head.second());
                    let products = dot_of(ty, a, op, &turn, parts);
                    sums[0] += products[0];
                    sums[1] += if may_be(MIXED) && ty != second {
                        dot_of(second, a, op, &turn, parts)[1]
                    } else {
                        products[1]
                    };
                    while part < end {
                        part += self.warps;
                    }
                    w.place.release(a);
                } else {
                    w.place.pass(a);
                }
                tile += a.turn_tiles;
                turns -= 1;
            }
            sums
        }
    }
}

/// `x / (1 + exp(-x))` in two instructions of the hardware: far finer than the bits that it is rounded to.
#[inline(always)]
fn silu(x: f32) -> f32 {
    x * float::rcp_approx(1.0 + float::exp2_approx(-x * core::f32::consts::LOG2_E))
}

/// What a finisher does of an operation: those that are no products pass by.
#[inline(always)]
pub unsafe fn finish(a: &DecodeArgs, op: Current, w: &mut Warp) {
    unsafe {
        let mut best = 0;
        // Two tasks a warp, a row a lane.
        let mine = (thread() / 32 - WARPS) * 2 + lane() / ROWS;
        let mut index = block_tasks(op).first;
        loop {
            let end = block_tasks(op).end;
            let count = if index < end { batch_of(index, end) } else { 0 };
            let mut output = Output::NONE;
            if mine < count {
                output = Output::of(a, op, index + mine);
            }
            let ends = Ends::of(a, op);
            w.await_step();
            if mine & !1 < count {
                best = max_u64(best, finish_two(a, op, w, &output, &ends, mine));
                note_output(a, w.index);
            }
            w.finish_step();
            index += count;
            if index >= end {
                break;
            }
        }
        if get!(op, choose) != 0 {
            choose(a, best);
            note_output(a, w.index);
        }
    }
}

/// What finishers know of an operation before they wait.
#[derive(Clone, Copy)]
struct Ends {
    seal: Seal,
    before: Seal,
    kind: u32,
    team: u32,
    /// Whether there is a norm, and what it takes.
    norm: bool,
    inverse_len: f32,
    eps: f32,
}

impl Ends {
    #[inline(always)]
    unsafe fn of(a: &DecodeArgs, op: Current) -> Ends {
        unsafe {
            let number = if get!(op, sealed) != 0 {
                get!(op, number)
            } else {
                PLAIN
            };
            Ends {
                seal: Seal::of(a, number).here(),
                before: Seal::of(a, get!(op, add_from)).here(),
                kind: get!(op, kind),
                team: get!(op, team),
                norm: !get!(op, input.norm).is_null(),
                inverse_len: get!(op, input.inverse_len),
                eps: get!(op, input.eps),
            }
        }
    }
}

/// Notes the time in the first finisher of block 0.
#[inline(always)]
unsafe fn note_output(a: &DecodeArgs, index: u32) {
    if thread() == 32 * WARPS {
        unsafe { note(a, index, point::OUTPUT) }
    }
}

/// Adds up the warps' parts of a row of task `task` of the batch and writes what it is for; returns the rank of logits.
#[inline(always)]
unsafe fn finish_two(
    a: &DecodeArgs,
    op: Current,
    w: &Warp,
    output: &Output,
    ends: &Ends,
    task: u32,
) -> u64 {
    unsafe {
        let scale = norm_scale(w.index, ends.inverse_len, ends.eps);
        let mut v = sum_of(parts_of(w.step, task, lane() % ROWS), ends.team);
        let seal = ends.seal;
        // Without a branch: one goes beside the other.
        v = v * if ends.norm { scale } else { 1.0 } + output.bias;
        match ends.kind {
            kind::PRODUCT => {
                if output.is(Output::WRITES) {
                    if output.is(Output::ADDS) {
                        v += ends.before.await_word(output.to, output.turn.0.to_bits());
                    }
                    seal.write(output.to, v);
                    if get!(op, choose) != 0 {
                        let bytes = output.to as usize - get!(op, out) as usize;
                        return rank(v, bytes / 4);
                    }
                }
            }
            kind::GATE_UP => {
                let up = warp::shuffle_xor(v, EIGHT);
                if output.is(Output::WRITES) {
                    seal.write(output.to, silu(v) * up);
                }
            }
            _ => {
                let apart = get!(op, rotation.halves) != 0;
                let other = warp::shuffle_idx(v, lane() ^ if apart { EIGHT } else { 1 });
                if output.is(Output::WRITES) {
                    if output.is(Output::ROTATES) {
                        let (cos, sin) = output.turn;
                        let sin = if output.is(Output::SECOND) { sin } else { -sin };
                        v = v * cos + other * sin;
                    }
                    if output.m() == 0 {
                        seal.write(output.to, v);
                    } else {
                        write_cache(a, op, output, v, seal);
                    }
                }
            }
        }
        0
    }
}

/// Writes an element of the new key or value.
#[inline(always)]
unsafe fn write_cache(a: &DecodeArgs, op: Current, output: &Output, v: f32, seal: Seal) {
    unsafe {
        let r = ((output.to as usize - get!(op, out) as usize) / 4) as u32;
        let (base, which) = if output.m() == 1 {
            (get!(op, cache.keys), 0)
        } else {
            (get!(op, cache.values), 1)
        };
        let (kv_heads, head_dim) = (get!(op, cache.kv_heads), get!(op, cache.head_dim));
        let head = quotient(r, head_dim);
        let bits = to_f16(v);
        let fresh = get!(op, fresh);
        let late = which == 0 && get!(op, late) != 0;
        if !fresh.is_null() {
            let at = which * kv_heads * head_dim + r;
            let rounded = half::F16::from_bits(bits).to_f32();
            seal.write(fresh.add(at as usize), if late { v } else { rounded });
        }
        if late {
            return;
        }
        let tokens = BLOCK_TOKENS as u32;
        let position = here(a.position);
        let block = ldg_u32(a.table.add((position / tokens) as usize));
        let at = (block * kv_heads + head) * tokens + position % tokens;
        let to = base.cast::<u16>().add(at as usize * head_dim as usize);
        to.add((r - head * head_dim) as usize).write(bits);
    }
}

/// Publishes the greatest of all blocks' ranks: block 0 waits for those of all.
#[inline(always)]
unsafe fn choose(a: &DecodeArgs, best: u64) {
    unsafe {
        let best = block_max(best);
        let t = thread() - 32 * WARPS;
        let high = u64::from(a.sequence) << 32;
        if t < 2 {
            let half = if t == 0 { best >> 32 } else { best } as u32;
            let to = a.ranks.add((2 * block_idx_x() + t) as usize);
            st_relaxed_u64(to, high | u64::from(half));
        }
        if block_idx_x() == 0 {
            let mut best = 0;
            let mut block = t;
            while block < blocks() {
                let read = |half: u32| {
                    let p = a.ranks.add((2 * block + half) as usize);
                    let mut v = ld_relaxed_u64(p);
                    while v >> 32 != u64::from(a.sequence) {
                        pause();
                        v = ld_relaxed_u64(p);
                    }
                    u64::from(v as u32)
                };
                best = max_u64(best, (read(0) << 32) | read(1));
                block += 32 * FINISHERS;
            }
            let best = block_max(best);
            if t == 0 {
                let id = !(best as u32);
                a.choice.write(id);
                threadfence_system();
                a.chosen.write_volatile(high | u64::from(id));
            }
        }
    }
}

/// The greatest of the finishers.
#[inline(always)]
unsafe fn block_max(best: u64) -> u64 {
    unsafe {
        let scratch = shared::at::<u64>(SCRATCH_AT);
        let mut best = warp_max(best);
        if lane() == 0 {
            scratch.add(thread() / 32 - WARPS).store(best);
        }
        sync_finishers();
        for i in 0..FINISHERS {
            best = max_u64(best, scratch.add(i).load());
        }
        sync_finishers();
        best
    }
}
