//! Products with the input row: plain ones, gate and up, queries, keys and values.

use super::gather;
use super::ring::{Tile, turn_bytes};
use super::row::{Group, Row, ask, norm_scale};
use super::seal::{Seal, pause};
use super::task::{Task, block_tasks, first_of, first_run, matrix_field};
use super::{
    AHEAD, Current, DecodeArgs, MIXED, PLAIN, Source, TYPES, WARPS, Warp, await_op, blocks,
    copy_op, get, kind, lane, note, point, sync, thread,
};
use crate::for_each_type;
use crate::rows::BLOCK_TOKENS;
use crate::sample::{max_u64, rank, warp_max};
use crate::types::*;
use core::mem::offset_of;
use cuda_std::int::{dp4a_us, here, opaque, quotient};
use cuda_std::memory::{
    ld_relaxed_u32, ld_relaxed_u64, ldg_f32, ldg_u32, st_relaxed_u64, threadfence_system,
};
use cuda_std::settled::settled;
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::block_idx_x;
use cuda_std::{float, half, warp};

/// Tasks that a warp brings to an end together.
const BATCH: u32 = 4;

/// An output that a lane brings to an end: of task `lane / 4 % BATCH` of a batch, the first row's in the lower
/// half of the warp, the second's in the upper. Of four neighbours with the same output the first writes it.
#[derive(Clone, Copy)]
struct Output {
    /// Where it goes.
    to: *mut f32,
    /// Its matrix, and above it whether this lane writes it.
    flags: u32,
    bias: f32,
    /// Cosine and sine of a rotation's angle; or the bits of the word that is added to.
    turn: (f32, f32),
}

impl Output {
    const WRITES: u32 = 4;
    const SLOT: u32 = 8;

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

    /// Writes `v` to `to`, or leaves it for who writes the block's outputs.
    #[inline(always)]
    unsafe fn write(&self, op: Current, to: *mut f32, v: f32, seal: Seal) {
        unsafe {
            if get!(op, gathered) != 0 {
                gather::leave(self.flags / Self::SLOT, to, v, seal);
            } else {
                seal.write(to, v);
            }
        }
    }

    #[inline(always)]
    fn writes(&self) -> bool {
        self.flags & Self::WRITES != 0
    }

    /// Of the batch that begins with task `index`. What it asks for comes while the input is awaited.
    #[inline(always)]
    unsafe fn of(a: &DecodeArgs, op: Current, index: u32) -> Output {
        unsafe {
            let (lane, tasks) = (lane(), block_tasks(op));
            let index = index + lane / 4 % BATCH * WARPS;
            let exists = index < tasks.end;
            let task = Task::of(op, if exists { index } else { 0 });
            let (m, r) = if lane < 16 {
                (task.m0, task.r0)
            } else {
                (task.m1, task.r1)
            };
            // A matrix's last row may be without a second; of a split row's halves, and of a gate and its up, the first
            // writes.
            let gathered = get!(op, gathered);
            let second = gathered == 2
                || gathered == 0
                    && (task.m0, task.r0) != (task.m1, task.r1)
                    && get!(op, kind) != kind::GATE_UP;
            let slot = (index - tasks.first) * gathered + if gathered == 2 { lane / 16 } else { 0 };
            let writes = exists && lane % 4 == 0 && (lane < 16 || second);
            let mut output = Output {
                to: get!(op, out).wrapping_add(r as usize),
                flags: m | if writes { Self::WRITES } else { 0 } | (slot * Self::SLOT),
                bias: 0.0,
                turn: (1.0, 0.0),
            };
            if exists {
                let bias = op.bias(m);
                if !bias.is_null() {
                    output.bias = ldg_f32(bias.add(r as usize));
                }
                if task.rotates {
                    let table = get!(op, rotation.table);
                    let at = (a.position * (get!(op, rotation.dims) / 2) + task.pair) as usize * 2;
                    output.turn = (ldg_f32(table.add(at)), ldg_f32(table.add(at + 1)));
                } else if get!(op, add) != 0 {
                    output.turn.0 = f32::from_bits(ld_relaxed_u32(output.to.cast()));
                }
            }
            output
        }
    }
}

/// A group of weights, whatever its type: levels, and `d * level + m` for its halves.
#[derive(Clone, Copy)]
struct Unpacked {
    levels: [u32; 8],
    affine: Affine,
}

/// A turn's groups of this lane.
type Pair = [Unpacked; 2];

/// Of a warp without tasks. Registers that some path leaves undefined would be taken throughout the launch.
const NO_PAIR: Pair = [Unpacked {
    levels: [0; 8],
    affine: Affine {
        d: [0.0; 2],
        m: [0.0; 2],
    },
}; 2];

/// A turn in shared memory: addresses of the two tiles, and their groups; and the lane that reads it.
#[derive(Clone, Copy)]
struct Turn {
    lane: u32,
    tiles: [u32; 2],
    groups: [u32; 2],
}

/// The two runs of a task, in groups: the whole of a row each, or its two halves.
#[derive(Clone, Copy)]
struct Runs(u32);

impl Runs {
    #[inline(always)]
    fn of(groups: u32, split: bool) -> Runs {
        let second = if split { first_run(groups) } else { 0 };
        Runs(groups | (second << 16))
    }

    /// Groups of a row.
    #[inline(always)]
    fn groups(self) -> u32 {
        self.0 & 0xffff
    }

    /// Where the second run begins; it ends with the row.
    #[inline(always)]
    fn second(self) -> u32 {
        self.0 >> 16
    }

    /// Where the first run ends.
    #[inline(always)]
    fn first(self) -> u32 {
        if self.second() == 0 {
            self.groups()
        } else {
            self.second()
        }
    }
}

impl Turn {
    /// Tile `tile` of each run in the turn at address `turn`, with `bytes` from tile to tile; it begins at group `at` of
    /// the runs.
    #[inline(always)]
    fn new(a: &DecodeArgs, turn: u32, tile: u32, bytes: u32, runs: Runs, at: u32) -> Turn {
        let first = turn + tile * bytes;
        Turn {
            lane: lane(),
            tiles: [first, first + turn_bytes(a) / 2],
            groups: [
                left(runs.first(), at),
                left(runs.groups() - runs.second(), at),
            ],
        }
    }
}

/// Groups of a run's tile that begins at group `at`.
#[inline(always)]
fn left(groups: u32, at: u32) -> u32 {
    let left = groups.saturating_sub(at);
    if left < TILE as u32 {
        left
    } else {
        TILE as u32
    }
}

/// Lanes past the end of a tile take whatever is there, and are not counted.
#[inline(always)]
unsafe fn load<T: Quantised>(turn: &Turn, i: usize) -> T::Raw {
    unsafe {
        T::load(
            &Tile::<T>::new(turn.tiles[i], turn.groups[i]),
            turn.lane as usize,
        )
    }
}

#[inline(always)]
fn unpacked<T: Quantised>(raw: T::Raw, turn: &Turn) -> Unpacked {
    Unpacked {
        levels: T::levels(raw),
        affine: T::affine(raw, turn.lane as usize),
    }
}

/// Both groups of one quantised type.
#[inline(always)]
unsafe fn pair_quantised<T: Quantised>(turn: Turn) -> Pair {
    unsafe {
        let first = load::<T>(&turn, 0);
        let second = load::<T>(&turn, 1);
        [unpacked::<T>(first, &turn), unpacked::<T>(second, &turn)]
    }
}

/// The same, one after the other through the same code: for types that take more registers than
/// loads in flight are worth.
#[inline(always)]
unsafe fn pair_looked_up<T: Quantised>(turn: Turn) -> Pair {
    let mut turn = turn;
    let mut pair = NO_PAIR;
    let mut i = 0;
    while i < 2 {
        turn.lane = here(turn.lane);
        pair[0] = pair[1];
        pair[1] = unpacked::<T>(unsafe { load::<T>(&turn, 0) }, &turn);
        (turn.tiles[0], turn.groups[0]) = (turn.tiles[1], turn.groups[1]);
        // Not unrolled.
        i += opaque(1);
    }
    pair
}

/// This lane's part of the product of one group.
#[inline(always)]
fn dot(w: &Unpacked, x: &Group) -> f32 {
    let (mut first, mut last) = (0, 0);
    for i in 0..4 {
        first = dp4a_us(w.levels[i], x.low[i], first);
        last = dp4a_us(w.levels[i + 4], x.high[i], last);
    }
    let a = &w.affine;
    let product = a.d[0] * first as f32 + a.d[1] * last as f32;
    x.d * product + (a.m[0] * x.sums[0] + a.m[1] * x.sums[1])
}

/// This lane's parts of a turn's products of float weights with the f32 row, whose groups `at` the tiles begin with.
#[inline(always)]
unsafe fn dot_float<T: Sixteen>(row: &Row, turn: &Turn, at: [u32; 2]) -> [f32; 2] {
    unsafe {
        [0, 1].map(|i| {
            let mut sum = 0.0;
            // 16 bytes a lane at a time.
            let mut unit = turn.lane;
            while unit * (T::WEIGHTS as u32) < turn.groups[i] * GROUP as u32 {
                let w = SharedPtr::<u32>::from_addr(turn.tiles[i] + 16 * unit).load_v4();
                let w = T::unpack_sixteen(w);
                let e = at[i] * GROUP as u32 + unit * T::WEIGHTS as u32;
                let mut k = 0;
                while k < T::WEIGHTS {
                    let x = row.values().add(e + k as u32).load_v4();
                    for j in 0..4 {
                        sum += w[k + j] * x[j];
                    }
                    k += 4;
                }
                unit += 32;
            }
            sum
        })
    }
}

/// Whether a matrix may be of one of the types of a set.
#[inline(always)]
fn may_be(types: u32) -> bool {
    settled::<TYPES>() & types != 0
}

/// Whether `ty`, which is one of `kind`, is `T`: no question where no other may be.
#[inline(always)]
fn is_type<const T: u32>(ty: u32, kind: u32) -> bool {
    let bit = const { type_bit(T) } & kind;
    may_be(bit) && (ty == T || settled::<TYPES>() & kind & !MIXED == bit)
}

macro_rules! turn_by_type {
    ($($ty:literal => $name:ident, $kind:ident;)*) => {
        /// A turn's groups of quantised type `ty`.
        #[inline(always)]
        unsafe fn pair_of(ty: u32, turn: Turn) -> Pair {
            unsafe {
                // One after the other: a jump by number takes longer than the few that a settled kernel has left.
                $(if is_type::<$ty>(ty, !FLOATS) {
                    return turn_by_type!(@$kind pair $name, turn);
                })*
                NO_PAIR
            }
        }

        /// [`dot_float`] of type `ty`.
        #[inline(always)]
        unsafe fn dot_float_of(ty: u32, row: &Row, turn: &Turn, at: [u32; 2]) -> [f32; 2] {
            unsafe {
                $(if is_type::<$ty>(ty, FLOATS) {
                    return turn_by_type!(@$kind dot $name, row, turn, at);
                })*
                [f32::NAN; 2]
            }
        }
    };
    (@quantised pair $name:ident, $($arg:expr),*) => { pair_quantised::<$name>($($arg),*) };
    (@looked_up pair $name:ident, $($arg:expr),*) => { pair_looked_up::<$name>($($arg),*) };
    (@float pair $name:ident, $($arg:expr),*) => { NO_PAIR };
    (@quantised dot $name:ident, $($arg:expr),*) => { [f32::NAN; 2] };
    (@looked_up dot $name:ident, $($arg:expr),*) => { [f32::NAN; 2] };
    (@float dot $name:ident, $($arg:expr),*) => { dot_float::<$name>($($arg),*) };
}
for_each_type!(turn_by_type);

/// [`kind::PRODUCT`], [`kind::GATE_UP`] and [`kind::QKV`].
///
/// What does not need the input comes before the wait for it: the first turn's weights are unpacked by then, and
/// what the outputs need is on its way.
#[inline(always)]
pub unsafe fn product(a: &DecodeArgs, op: Current, w: &mut Warp) {
    unsafe {
        copy_op(a, w.index + AHEAD);
        let asked = ask(op);
        let end = block_tasks(op).end;
        let split = get!(op, split) != 0;
        let gate = get!(op, kind) == kind::GATE_UP;
        let groups = matrix_field(op, 0, offset_of!(Matrix, cols)) / GROUP as u32;
        let runs = Runs::of(groups, split);
        let mut index = first_of(block_tasks(op).first, thread() / 32);
        let (mut output, mut types) = (Output::NONE, Types(0));
        if index < end {
            output = Output::of(a, op, index);
            types = Types::of(op, gate, warp::shuffle_idx(output.m(), 0));
        }
        let mut waits = true;
        let mut best = 0;
        let mut scale = 1.0;
        // A lane's sum of each task of the batch, of its half's row; of the current task, of both rows.
        let mut sums = [0.0f32; BATCH as usize];
        let mut k = 0;
        let mut v = [0.0f32; 2];
        let mut at = 0;
        // The tile of the turn.
        let mut tile = 0;
        // Rows of two types (a gate and an up of a hand-made mix) take a turn twice, for one row each.
        let mut again = false;
        loop {
            let any = index < end;
            let ty = if again { types.second() } else { types.first() };
            let float = may_be(FLOATS) && (!may_be(!FLOATS & !MIXED) || is_float(ty));
            let done = again || !types.mixed();
            let last = done && (tile + 1 == a.turn_tiles || at + TILE as u32 >= runs.first());
            let mut pair = NO_PAIR;
            if any {
                if tile == 0 && !again {
                    w.ring.wait();
                }
                let bytes = types.tile_bytes(op, again);
                let mut turn = Turn::new(a, w.ring.turn(), tile, bytes, runs, at);
                // Else the addresses for every type would be computed beforehand, and kept.
                turn.lane = here(turn.lane);
                pair = pair_of(ty, turn);
                // What is unpacked needs its place no more.
                if last && !float {
                    w.ring.release(a);
                }
            }
            if waits {
                waits = false;
                if block_tasks(op).first < end {
                    Row::new(a, w.index, runs.groups() * GROUP as u32).fill(a, op, w.index, asked);
                }
                await_op();
                sync();
                note(a, w.index, point::INPUT);
                scale = norm_scale(op, w.index);
                // Said here, so that they take no registers before.
                (sums, k) = ([0.0; BATCH as usize], 0);
                (v, at) = ([0.0; 2], 0);
                best = 0;
            }
            if !any {
                break;
            }
            let row = Row::new(a, here(w.index), runs.groups() * GROUP as u32);
            let mut turn_v = [0.0; 2];
            if float {
                let bytes = types.tile_bytes(op, again);
                let turn = Turn::new(a, w.ring.turn(), tile, bytes, runs, at);
                turn_v = dot_float_of(ty, &row, &turn, [at, runs.second() + at]);
                if last {
                    w.ring.release(a);
                }
            } else {
                let first = at + lane();
                let mut x = row.group(first);
                let v0 = dot(&pair[0], &x);
                if runs.second() != 0 {
                    x = row.group(runs.second() + first);
                }
                let v1 = dot(&pair[1], &x);
                if first < runs.first() {
                    turn_v[0] = v0;
                }
                if runs.second() + first < runs.groups() {
                    turn_v[1] = v1;
                }
            }
            if types.mixed() {
                turn_v[usize::from(!again)] = 0.0;
                again = !again;
            }
            v[0] += turn_v[0];
            v[1] += turn_v[1];
            if !done {
                continue;
            }
            tile = if last { 0 } else { tile + 1 };
            at += TILE as u32;
            if at < runs.first() {
                continue;
            }
            // The task's end.
            let low = lane() < 16;
            let (mine, other) = if low { (v[0], v[1]) } else { (v[1], v[0]) };
            let sum = mine + warp::shuffle_xor(other, 16);
            for i in 0..BATCH as usize {
                if i as u32 == k {
                    sums[i] = sum;
                }
            }
            (v, at) = ([0.0; 2], 0);
            k += 1;
            index += WARPS;
            if k == BATCH || index >= end {
                best = max_u64(best, finish(a, op, &output, sums, scale));
                if index >= end {
                    break;
                }
                k = 0;
                output = Output::of(a, op, index);
            }
            types = Types::of(op, gate, warp::shuffle_idx(output.m(), 4 * k));
        }
        if get!(op, gathered) != 0 {
            gather::write(op);
        }
        if get!(op, choose) != 0 {
            choose(a, best);
        }
    }
}

/// The types of a task's two rows, of the first and the second, and the number of the first's matrix.
#[derive(Clone, Copy)]
struct Types(u32);

impl Types {
    /// Of rows of matrix `m`, or of a gate and its up.
    #[inline(always)]
    unsafe fn of(op: Current, gate: bool, m: u32) -> Types {
        let ty = |m: u32| unsafe { matrix_field(op, m, offset_of!(Matrix, ty)) };
        let first = ty(m);
        Types(first | ((if gate { ty(1) } else { first }) << 8) | (m << 16))
    }

    #[inline(always)]
    fn first(self) -> u32 {
        self.0 & 0xff
    }

    #[inline(always)]
    fn second(self) -> u32 {
        self.0 >> 8 & 0xff
    }

    #[inline(always)]
    fn mixed(self) -> bool {
        may_be(MIXED) && self.first() != self.second()
    }

    /// Bytes of a whole tile of the first row's matrix, or of an up.
    #[inline(always)]
    unsafe fn tile_bytes(self, op: Current, second: bool) -> u32 {
        let m = if second { 1 } else { self.0 >> 16 };
        unsafe { matrix_field(op, m, offset_of!(Matrix, tile_bytes)) }
    }
}

/// `x / (1 + exp(-x))` in two instructions of the hardware: far finer than the 8 bits that it is rounded to.
#[inline(always)]
fn silu(x: f32) -> f32 {
    x * float::rcp_approx(1.0 + float::exp2_approx(-x * core::f32::consts::LOG2_E))
}

/// Adds up the lanes' parts of a batch and writes what its tasks are for; returns the rank of logits.
#[inline(always)]
unsafe fn finish(
    a: &DecodeArgs,
    op: Current,
    output: &Output,
    sums: [f32; BATCH as usize],
    scale: f32,
) -> u64 {
    unsafe {
        // At each of the first two steps a lane passes on what is not of its task, and has half as many.
        let lane = lane();
        let up = lane & 8 != 0;
        let keep = |i: usize| if up { sums[i + 2] } else { sums[i] };
        let pass = |i: usize| if up { sums[i] } else { sums[i + 2] };
        let two = [
            keep(0) + warp::shuffle_xor(pass(0), 8),
            keep(1) + warp::shuffle_xor(pass(1), 8),
        ];
        let (keep, pass) = if lane & 4 != 0 {
            (two[1], two[0])
        } else {
            (two[0], two[1])
        };
        let mut v = keep + warp::shuffle_xor(pass, 4);
        v += warp::shuffle_xor(v, 2);
        v += warp::shuffle_xor(v, 1);
        let low = lane < 16;
        let number = if get!(op, sealed) != 0 {
            get!(op, number)
        } else {
            PLAIN
        };
        let seal = Seal::of(a, number);
        v = v * scale + output.bias;
        match get!(op, kind) {
            kind::PRODUCT => {
                if get!(op, split) != 0 {
                    // Both halves have the bias.
                    v += warp::shuffle_xor(v, 16) - output.bias;
                }
                if output.writes() {
                    if get!(op, add) != 0 {
                        let before = Seal::of(a, get!(op, add_from));
                        v += before.await_word(output.to, output.turn.0.to_bits());
                    }
                    output.write(op, output.to, v, seal);
                    if get!(op, choose) != 0 {
                        let bytes = output.to as usize - get!(op, out) as usize;
                        return rank(v, bytes / 4);
                    }
                }
            }
            kind::GATE_UP => {
                let up = warp::shuffle_xor(v, 16);
                if output.writes() {
                    output.write(op, output.to, silu(v) * up, seal);
                }
            }
            _ => {
                let other = warp::shuffle_xor(v, 16);
                if output.writes() {
                    let (cos, sin) = output.turn;
                    let v = v * cos + if low { -other } else { other } * sin;
                    if output.m() == 0 {
                        output.write(op, output.to, v, seal);
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
            output.write(
                op,
                fresh.add(at as usize),
                if late { v } else { rounded },
                seal,
            );
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
        // Other warps still read the scratch that this uses.
        sync();
        let best = block_max(best);
        let t = thread();
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
                block += 32 * WARPS;
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

/// The greatest of the warps that compute.
#[inline(always)]
unsafe fn block_max(best: u64) -> u64 {
    unsafe {
        let scratch = shared::at::<u64>(0);
        let mut best = warp_max(best);
        if lane() == 0 {
            scratch.add(thread() / 32).store(best);
        }
        sync();
        for i in 0..WARPS {
            best = max_u64(best, scratch.add(i).load());
        }
        sync();
        best
    }
}
