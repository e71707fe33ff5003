//! Products with the input row: plain ones, gate and up, queries, keys and values.
//!
//! A block takes tasks of sixteen rows of weights. A team of its warps, all of them or some, takes one at a time, and they share
//! the row's parts out ([`super::row`]). Weights are A's fragments of a product of bytes on tensor cores, of four groups at a time, of which
//! each of four lanes has one, as it lies in memory; B is such that every group's sums, which have scales of their own, end in the
//! lane that has it. Warps leave what they computed of each row in shared memory and go on; after a *batch* of tasks other
//! warps add it up and write what the tasks are for ([`super::finish`]).

use super::ring::Head;
use super::row::{GROUPS, Kept, PART_OF, Part, ask, fill, parts};
use super::seal::Seal;
use super::task::{BlockTasks, EIGHT, ROWS, block_tasks, matrix_field};
use super::tile::Tile;
use super::{
    Current, DecodeArgs, ENDS, FINISHERS, INVERSE_UNIT, LATE, MIXED, PARTS_AT, QUANTISED, TAILS,
    WARPS, Warp, first_note, get, is_type, lane, may_be, point, sync, thread,
};
use crate::for_each_type;
use crate::types::*;
use core::mem::offset_of;
use cuda_std::int::{here, opaque};
use cuda_std::memory::threadfence;
use cuda_std::shared::{self, SharedPtr};
use cuda_std::{mma, warp};

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
pub(super) fn parts_of(step: u32, task: u32, row: u32) -> SharedPtr<f32> {
    shared::at(PARTS_AT + step % 2 * BATCH_BYTES + task * TASK_BYTES + row * (4 * WARPS))
}

/// Tasks of a batch that begins with task `index`.
#[inline(always)]
pub(super) fn batch_of(index: u32, end: u32) -> u32 {
    if end - index < BATCH {
        end - index
    } else {
        BATCH
    }
}

/// A group of two rows, one of either eight.
#[derive(Clone, Copy)]
struct Pair {
    /// Those of the second half as many times as large as [`Quantised::RAISED`] has it.
    levels: [[u32; 8]; 2],
    affine: [Affine; 2],
}

/// Nothing: registers that some path leaves undefined would be taken throughout the launch.
const NO_PAIR: Pair = Pair {
    levels: [[0; 8]; 2],
    affine: [Affine {
        d: [0.0; 2],
        m: [0.0; 2],
    }; 2],
};

/// Which of eight rows is row `lane / 4` of a product: neighbours' lie four apart, so that eight lanes, who read at the same time, read
/// all of the banks.
#[inline(always)]
fn row_of_lane() -> u32 {
    lane() / 8 + (lane() & 4)
}

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
    fn part(&self, part: u32) -> Place {
        let mine = part * GROUPS / TILE as u32;
        let left = self.groups - mine * TILE as u32;
        let [first, mut second] = self.head.tiles().map(|bytes| (mine - self.tile) * bytes);
        if !may_be(MIXED) {
            second = first;
        }
        Place {
            starts: [
                self.start + first,
                self.start + EIGHT * here(self.head.pitch()) + second,
            ],
            groups: if may_be(TAILS) && left < TILE as u32 {
                left
            } else {
                TILE as u32
            },
            first: part * GROUPS % TILE as u32,
        }
    }
}

/// This lane's group of a part, of the row of either eight. Past the end of a row levels and scales are whatever is there.
#[inline(always)]
unsafe fn pair<T: Quantised>(place: &Place) -> Pair {
    let g = (place.first + lane() % 4) as usize;
    let load = |start| unsafe { T::load(&Tile::<T>::new(start, place.groups), g) };
    let affine = |raw| T::affine(raw, g);
    // No array of these, which would go to local memory.
    let (first, second) = (load(place.starts[0]), load(place.starts[1]));
    Pair {
        levels: [T::raised_levels(first), T::raised_levels(second)],
        affine: [affine(first), affine(second)],
    }
}

/// Adds this warp's parts of a turn's products with the row to `sums`, of rows [`row_of_lane`] of either eight; its first part behind
/// them.
#[inline(always)]
unsafe fn dot_quantised<T: Quantised>(
    op: Current,
    turn: &Turn,
    parts: Parts,
    sums: &mut [f32; 2],
) -> u32 {
    let mut part = parts.first;
    while part < parts.end {
        unsafe {
            let w = pair::<T>(&turn.part(part));
            let x = Kept::new(op, part).load();
            let products = products(&w, &x);
            for i in 0..2 {
                add::<T>(&mut sums[i], &w.affine[i], products[i], &x);
            }
        }
        part += parts.step;
    }
    part
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
    op: Current,
    turn: &Turn,
    parts: Parts,
    sums: &mut [f32; 2],
) -> u32 {
    unsafe {
        const { assert!(GROUP % T::WEIGHTS == 0) };
        let units = (GROUP / T::WEIGHTS) as u32;
        let mut part = parts.first;
        while part < parts.end {
            let place = turn.part(part);
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
        part
    }
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

        /// Adds this warp's parts of a turn's products with eights of type `ty` to `sums`; its first part behind them.
        #[inline(always)]
        unsafe fn dot_of(ty: u32, op: Current, turn: &Turn, parts: Parts, sums: &mut [f32; 2]) -> u32 {
            unsafe {
                // One after the other: a jump by number takes longer than the few that a settled kernel has left.
                $(if is_type::<$ty>(ty) {
                    return turn_by_type!(@$kind $name, op, turn, parts, sums);
                })*
                *sums = [f32::NAN; 2];
                parts.end
            }
        }
    };
    (@quantised first $name:ident, $place:ident) => {{
        let Pair { levels, affine } = pair::<$name>($place);
        First {
            ready: true,
            read: false,
            weights: Pair {
                levels,
                affine: affine.map(|Affine { d, m }| Affine {
                    d: [d[0], d[1] * (1.0 / f32::from($name::RAISED))],
                    m,
                }),
            },
        }
    }};
    (@float first $name:ident, $place:ident) => { First::NONE };
    (@quantised $name:ident, $($arg:ident),*) => { dot_quantised::<$name>($($arg),*) };
    (@float $name:ident, $($arg:ident),*) => { dot_float::<$name>($($arg),*) };
}
for_each_type!(turn_by_type);

/// Products of levels with bytes of the row: of either half of this lane's group, of the row of either eight.
type Products = [[i32; 2]; 2];

/// This lane's products: those of group `lane % 4`.
#[inline(always)]
fn products(w: &Pair, x: &Part) -> Products {
    let mut sums = [[0i32; 4]; 2];
    for j in 0..4 {
        let [a, b] = w.levels.map(|levels| [levels[2 * j], levels[2 * j + 1]]);
        let x = [x.bytes[2 * j], x.bytes[2 * j + 1]];
        let sum = &mut sums[j / 2];
        *sum = mma::m16n8k32_u8_s8([a[0], b[0], a[1], b[1]], x, *sum);
    }
    // Of columns `2 g` and `2 g + 1`, the high bytes and the low ones.
    [0, 1].map(|i| sums.map(|sum| 128 * sum[2 * i] + sum[2 * i + 1]))
}

/// Adds what `products` stand for.
#[inline(always)]
fn add<T: Quantised>(sum: &mut f32, w: &Affine, products: [i32; 2], x: &Part) {
    const { assert!(T::RAISED == 1 || T::UNIFORM && T::RAISED == PART_OF) };
    let [first, second] = x.sums;
    let before = *sum;
    if T::UNIFORM {
        let (d, whole) = if T::RAISED == 1 {
            (x.d, products[0] + products[1])
        } else {
            (x.d_part, products[0] * T::RAISED as i32 + products[1])
        };
        *sum += d * (w.d[0] * whole as f32);
        *sum += w.m[0] * (first + second);
    } else {
        add_halves(sum, w, products, x);
    }
    if may_be(ENDS) && x.d == 0.0 {
        // Past the row's end scales are whatever is there.
        *sum = before;
    }
}

/// The same where halves have scales of their own.
#[inline(always)]
fn add_halves(sum: &mut f32, w: &Affine, products: [i32; 2], x: &Part) {
    let [first, second] = products.map(|p| p as f32);
    *sum += x.d * (w.d[0] * first + w.d[1] * second);
    *sum += w.m[0] * x.sums[0] + w.m[1] * x.sums[1];
}

/// Products of all kinds: what the warps that compute do of them.
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
            w.end_step();
            return;
        }
        if may_be(LATE | QUANTISED) && get!(op, choose) != 0 {
            // As finishers do of what they have written.
            threadfence();
        }
        let alone = here(get!(op, alone)) != 0;
        let asked = ask(op, thread() / 32);
        let team = Team::of(op);
        let mut count = batch_of(index, end);
        // What is not this team's passes by.
        let mut task = team.pass(w, 0, team.number, count);
        let mut first = First::NONE;
        if task < count {
            first = team.first(a, w);
        }
        let seal = Seal::of(op, get!(op, input.from));
        fill(op, seal, w.index, team.groups, asked);
        if alone {
            warp::sync_warp();
        } else {
            sync();
        }
        first_note(a, w.index, point::INPUT);
        loop {
            // Tasks before it are done, or have passed by.
            let mut done = task;
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
                    let row = row_of_lane() + if odd { EIGHT } else { 0 };
                    parts_of(w.step, task, row).add(team.warp).store(sum);
                }
                done = task + 1;
                task += team.teams;
                if task < count {
                    done = team.pass(w, done, team.teams - 1, count);
                }
            }
            index += count;
            let last = index >= end;
            w.end_step();
            // What else there is to do comes when nobody waits for it any more.
            team.pass(w, done, count - done, count);
            if last {
                break;
            }
            count = batch_of(index, end);
            task = team.pass(w, 0, team.number, count);
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

/// The weights of a warp's first part, as halves that have scales of their own.
#[derive(Clone, Copy)]
struct First {
    ready: bool,
    /// Whether the first turn has been given back, its other parts being other warps'.
    read: bool,
    weights: Pair,
}

impl First {
    const NONE: First = First {
        ready: false,
        read: false,
        weights: NO_PAIR,
    };
}

impl Team {
    #[inline(always)]
    unsafe fn of(op: Current) -> Team {
        unsafe {
            let (warps, teams, divisor) = (get!(op, team), get!(op, teams), get!(op, divisor));
            let whole = thread() / 32 * get!(op, inverse) / INVERSE_UNIT;
            let rest = thread() / 32 - whole * divisor;
            let (number, warp) = if divisor == teams {
                (rest, whole)
            } else {
                (whole, rest)
            };
            let groups = matrix_field(op, 0, offset_of!(Matrix, cols)) / GROUP as u32;
            Team {
                number,
                teams,
                warp,
                warps,
                groups,
                turns: get!(op, turns),
            }
        }
    }

    /// Lets the turns of `tasks` tasks from `task` on pass by, those before `end`; the task behind them.
    #[inline(always)]
    unsafe fn pass(&self, w: &mut Warp, task: u32, tasks: u32, end: u32) -> u32 {
        let behind = task + tasks;
        let behind = if behind < end { behind } else { end };
        let mut turns = behind.saturating_sub(task) * self.turns;
        while turns > 0 {
            unsafe { w.place.pass() }
            turns -= 1;
        }
        behind
    }

    /// The next turn, which begins with tile `tile`.
    #[inline(always)]
    unsafe fn turn(&self, w: &Warp, tile: u32) -> Turn {
        let head = unsafe { w.place.wait() };
        Turn {
            start: head.start + row_of_lane() * here(head.pitch()),
            head,
            tile,
            groups: self.groups,
        }
    }

    /// Unpacks this warp's first part of the next task, where that is of one quantised type and in its first turn.
    #[inline(always)]
    unsafe fn first(&self, a: &DecodeArgs, w: &mut Warp) -> First {
        unsafe {
            let turn = self.turn(w, 0);
            let ty = turn.head.first();
            if self.warp >= self.end(a, 0) || may_be(MIXED) && ty != turn.head.second() {
                return First::NONE;
            }
            let mut first = first_of(ty, &turn.part(self.warp));
            if first.ready && self.warp + self.warps >= self.end(a, 0) {
                first.read = true;
                w.place.release();
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
                let (w, x) = (&first.weights, Kept::new(op, part).load());
                let products = products(w, &x);
                for i in 0..2 {
                    add_halves(&mut sums[i], &w.affine[i], products[i], &x);
                }
                if may_be(ENDS) && x.d == 0.0 {
                    sums = [0.0; 2];
                }
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
                    let turn = self.turn(w, tile);
                    let parts = Parts {
                        first: part,
                        end,
                        step: self.warps,
                    };
                    let (ty, second) = (turn.head.first(), turn.head.second());
                    let before = sums;
                    part = dot_of(ty, op, &turn, parts, &mut sums);
                    if may_be(MIXED) && ty != second {
                        let mut of_second = before;
                        dot_of(second, op, &turn, parts, &mut of_second);
                        sums[1] = of_second[1];
                    }
                    w.place.release();
                } else {
                    w.place.pass();
                }
                tile += a.turn_tiles;
                turns -= 1;
            }
            sums
        }
    }
}
