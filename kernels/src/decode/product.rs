//! Products with the input row: plain ones, gate and up, queries, keys and values.

use super::ring::{Rest, Tile};
use super::row::{Group, Row};
use super::seal::{Seal, pause};
use super::{AHEAD, Coming, Current, DecodeArgs, PLAIN, WARPS, Warp, get, kind, note, point};
use crate::for_each_type;
use crate::rows::{BLOCK_TOKENS, Rotation};
use crate::sample::{block_max, max_u64, rank};
use crate::types::*;
use core::mem::offset_of;
use cuda_std::int::{dp4a_us, opaque};
use cuda_std::memory::{
    ld_relaxed_u32, ld_relaxed_u64, ldg_f32, ldg_u32, st_relaxed_u64, threadfence_system,
};
use cuda_std::shared::{self, Scalar, SharedPtr};
use cuda_std::thread::{block_idx_x, grid_dim_x, lane_id, sync_threads, thread_idx_x};
use cuda_std::{float, half, warp};

/// Two matrix rows (the number of a matrix of the operation, and a row of it), or one twice.
#[derive(Clone, Copy)]
pub struct Task {
    pub m0: u32,
    pub r0: u32,
    pub m1: u32,
    pub r1: u32,
    /// A [`kind::QKV`]'s pair of elements within its head, and whether they rotate.
    pair: u32,
    rotates: bool,
}

/// This warp's first task. Neighbouring tasks go to different blocks, so that a few keep all busy.
#[inline(always)]
pub fn first_task() -> u32 {
    thread_idx_x() / 32 * grid_dim_x() + block_idx_x()
}

/// From one of this warp's tasks to the next.
#[inline(always)]
pub fn task_stride() -> u32 {
    grid_dim_x() * WARPS
}

impl Task {
    /// Task `index` of an operation.
    #[inline(always)]
    pub unsafe fn of(op: Current, index: u32) -> Task {
        let mut task = Task {
            m0: 0,
            r0: index,
            m1: 0,
            r1: index,
            pair: 0,
            rotates: false,
        };
        unsafe {
            match get!(op, kind) {
                kind::PRODUCT if get!(op, split) == 0 => {
                    task.r0 = 2 * index;
                    let last = rows(op, 0) - 1;
                    task.r1 = if 2 * index < last {
                        2 * index + 1
                    } else {
                        2 * index
                    };
                }
                kind::GATE_UP => task.m1 = 1,
                kind::QKV => {
                    let head_dim = get!(op, cache.head_dim);
                    let (heads, kv_heads) = (get!(op, heads), get!(op, cache.kv_heads));
                    let pairs = head_dim / 2;
                    let head = index / pairs;
                    let pair = index - head * pairs;
                    let (which, head) = if head < heads {
                        (0, head)
                    } else if head < heads + kv_heads {
                        (1, head - heads)
                    } else {
                        (2, head - heads - kv_heads)
                    };
                    let rotation = Rotation {
                        table: core::ptr::null(),
                        dims: get!(op, rotation.dims),
                        halves: get!(op, rotation.halves),
                    };
                    let (e0, e1, rotates) = rotation.pair(pair as usize, which < 2);
                    task = Task {
                        m0: which,
                        r0: head * head_dim + e0 as u32,
                        m1: which,
                        r1: head * head_dim + e1 as u32,
                        pair,
                        rotates,
                    };
                }
                _ => {}
            }
        }
        task
    }

    /// The bytes of both runs.
    #[inline(always)]
    pub unsafe fn rest(&self, op: Current) -> [Rest; 2] {
        unsafe {
            let row = |m: u32, r: u32| {
                let row_bytes = matrix_field(op, m, offset_of!(Matrix, row_bytes));
                let base = u64::load(op.matrix(m) + offset_of!(Matrix, base) as u32) as *const u8;
                Rest {
                    from: base.add(r as usize * row_bytes as usize),
                    bytes: row_bytes,
                    tile: matrix_field(op, m, offset_of!(Matrix, tile_bytes)),
                }
            };
            let (mut first, mut second) = (row(self.m0, self.r0), row(self.m1, self.r1));
            if get!(op, split) != 0 {
                let tile = matrix_field(op, self.m0, offset_of!(Matrix, tile_bytes));
                let bytes = half(first.bytes.div_ceil(tile)) * tile;
                let bytes = if bytes < first.bytes {
                    bytes
                } else {
                    first.bytes
                };
                first.bytes = bytes;
                second.from = second.from.add(bytes as usize);
                second.bytes -= bytes;
            }
            [first, second]
        }
    }
}

/// Groups of both runs of a task: whole rows, or a row's halves.
#[inline(always)]
unsafe fn runs(op: Current, apart: bool) -> (u32, u32) {
    let groups = unsafe { matrix_field(op, 0, offset_of!(Matrix, cols)) } / GROUP as u32;
    if !apart {
        return (groups, groups);
    }
    let first = half(groups.div_ceil(TILE as u32)) * TILE as u32;
    if first < groups {
        (first, groups - first)
    } else {
        (groups, 0)
    }
}

/// Tiles of the first half of so many.
#[inline(always)]
fn half(tiles: u32) -> u32 {
    tiles.div_ceil(2)
}

#[inline(always)]
unsafe fn matrix_field(op: Current, m: u32, offset: usize) -> u32 {
    unsafe { u32::load(op.matrix(m) + offset as u32) }
}

#[inline(always)]
unsafe fn rows(op: Current, m: u32) -> u32 {
    unsafe { matrix_field(op, m, offset_of!(Matrix, rows)) }
}

/// Tasks that a warp brings to an end together.
const BATCH: u32 = 4;

/// An output that a lane brings to an end: of task `lane / 4 % BATCH` of a batch, the first row's in the lower
/// half of the warp, the second's in the upper. Of four neighbours with the same output the first writes it.
#[derive(Clone, Copy)]
struct Output {
    /// Its matrix and row.
    m: u32,
    r: u32,
    exists: bool,
    bias: f32,
    /// Cosine and sine of a rotation's angle; or the bits of the word that is added to.
    turn: (f32, f32),
}

impl Output {
    /// Of the batch that begins with task `index`. What it asks for comes while the input is awaited.
    #[inline(always)]
    unsafe fn of(a: &DecodeArgs, op: Current, index: u32) -> Output {
        unsafe {
            let (lane, count) = (lane_id(), get!(op, tasks));
            let index = index + lane / 4 % BATCH * task_stride();
            let exists = index < count;
            let task = Task::of(op, if exists { index } else { 0 });
            let (m, r) = if lane < 16 {
                (task.m0, task.r0)
            } else {
                (task.m1, task.r1)
            };
            let mut output = Output {
                m,
                r,
                // A matrix's last row may be without a second.
                exists: exists && (lane < 16 || (task.m0, task.r0) != (task.m1, task.r1)),
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
                    let word = ld_relaxed_u32(get!(op, out).add(r as usize).cast());
                    output.turn.0 = f32::from_bits(word);
                }
            }
            output
        }
    }
}

/// This lane's part of the product of one group.
#[inline(always)]
fn dot_group<T: Quantised>(raw: T::Raw, g: u32, x: &Group) -> f32 {
    let levels = T::levels(raw);
    let a = T::affine(raw, g as usize);
    let (mut first, mut last) = (0, 0);
    for w in 0..4 {
        first = dp4a_us(levels[w], x.low[w], first);
        last = dp4a_us(levels[w + 4], x.high[w], last);
    }
    if T::UNIFORM {
        a.d[0] * (x.d * (first + last) as f32) + a.m[0] * x.sum
    } else {
        a.d[0] * (x.d * first as f32)
            + a.d[1] * (x.d * last as f32)
            + (a.m[0] * x.sums[0] + a.m[1] * x.sums[1])
    }
}

/// A turn.
struct Turn {
    /// Addresses of the two tiles.
    tiles: [u32; 2],
    /// Their groups.
    groups: [u32; 2],
    /// Their places in the row.
    at: [u32; 2],
    /// Whether those differ.
    apart: bool,
}

/// This lane's parts of a turn's two products, of matrices of one quantised type.
#[inline(always)]
unsafe fn turn_quantised<T: Quantised>(row: &Row, turn: &Turn) -> (f32, f32) {
    unsafe {
        let lane = lane_id();
        // Lanes past the end compute with whatever is there, and are not counted.
        let tile = |i: usize| Tile::<T>::new(turn.tiles[i], turn.groups[i]);
        let w0 = T::load(&tile(0), lane as usize);
        let w1 = T::load(&tile(1), lane as usize);
        let x = row.group(turn.at[0] + lane);
        let y = if turn.apart {
            row.group(turn.at[1] + lane)
        } else {
            x
        };
        let v0 = dot_group::<T>(w0, lane, &x);
        let v1 = dot_group::<T>(w1, lane, &y);
        (
            if lane < turn.groups[0] { v0 } else { 0.0 },
            if lane < turn.groups[1] { v1 } else { 0.0 },
        )
    }
}

/// The same, one product after the other through the same code: for types that take more registers than
/// loads in flight are worth.
#[inline(always)]
unsafe fn turn_looked_up<T: Quantised>(row: &Row, turn: &Turn) -> (f32, f32) {
    unsafe {
        let lane = lane_id();
        let (mut first, mut last) = (0.0, 0.0);
        let mut i = 0;
        while i < 2 {
            let (tile, groups, at) = if i == 0 {
                (turn.tiles[0], turn.groups[0], turn.at[0])
            } else {
                (turn.tiles[1], turn.groups[1], turn.at[1])
            };
            let w = T::load(&Tile::<T>::new(tile, groups), lane as usize);
            let v = dot_group::<T>(w, lane, &row.group(at + lane));
            first = last;
            last = if lane < groups { v } else { 0.0 };
            // Not unrolled.
            i += opaque(1);
        }
        (first, last)
    }
}

/// The same with float weights and the f32 row.
#[inline(always)]
unsafe fn turn_float<T: Sixteen>(row: &Row, turn: &Turn) -> (f32, f32) {
    unsafe {
        let side = |i: usize| {
            let mut sum = 0.0;
            // 16 bytes a lane at a time.
            let mut unit = lane_id();
            while unit * (T::WEIGHTS as u32) < turn.groups[i] * GROUP as u32 {
                let w = SharedPtr::<u32>::from_addr(turn.tiles[i] + 16 * unit).load_v4();
                let w = T::unpack_sixteen(w);
                let e = turn.at[i] * GROUP as u32 + unit * T::WEIGHTS as u32;
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
        };
        (side(0), side(1))
    }
}

macro_rules! turn_by_type {
    ($($ty:literal => $name:ident, $kind:ident;)*) => {
        #[inline(always)]
        unsafe fn turn_of(ty: u32, row: &Row, turn: &Turn) -> (f32, f32) {
            unsafe {
                match ty {
                    $($ty => turn_by_type!(@$kind $name, row, turn),)*
                    _ => (f32::NAN, f32::NAN),
                }
            }
        }
    };
    (@quantised $name:ident, $($arg:expr),*) => { turn_quantised::<$name>($($arg),*) };
    (@looked_up $name:ident, $($arg:expr),*) => { turn_looked_up::<$name>($($arg),*) };
    (@float $name:ident, $($arg:expr),*) => { turn_float::<$name>($($arg),*) };
}
for_each_type!(turn_by_type);

/// [`kind::PRODUCT`], [`kind::GATE_UP`] and [`kind::QKV`].
#[inline(always)]
pub unsafe fn product(a: &DecodeArgs, op: Current, w: &mut Warp) {
    unsafe {
        let coming = Coming::load(a, w.index + AHEAD);
        let row = Row::new(a, op, w.index);
        let count = get!(op, tasks);
        let mut index = first_task();
        let mut output = Output::of(a, op, index);
        if block_idx_x() < count {
            row.fill(a, op, w);
        }
        coming.store();
        sync_threads();
        note(a, w.index, point::INPUT);
        let limit = w.index + AHEAD;
        let scale = row.scale(op);
        let mut best = 0;
        while index < count {
            // A lane's sum of each task of the batch, of its half's row.
            let mut sums = [0.0f32; BATCH as usize];
            let mut k = 0;
            while k < BATCH && index < count {
                let which = warp::shuffle_idx(output.m, 4 * k);
                index += task_stride();
                let sum = multiply(a, op, w, &row, which, index >= count, limit);
                for i in 0..BATCH as usize {
                    if i as u32 == k {
                        sums[i] = sum;
                    }
                }
                k += 1;
            }
            best = max_u64(best, finish(a, op, &output, sums, scale));
            if index < count {
                output = Output::of(a, op, index);
            }
        }
        if get!(op, choose) != 0 {
            choose(a, best);
        }
    }
}

/// This lane's sum of the products of a task, the next of the ring: of the first row in the lower half of the warp, of
/// the second in the upper. The place of the very last turn of an operation is not filled again yet: the result
/// goes out first.
#[inline(always)]
unsafe fn multiply(
    a: &DecodeArgs,
    op: Current,
    w: &mut Warp,
    row: &Row,
    which: u32,
    last: bool,
    limit: u32,
) -> f32 {
    unsafe {
        let apart = get!(op, split) != 0;
        let (first, second) = runs(op, apart);
        let ty = offset_of!(Matrix, ty);
        let other = if get!(op, kind) == kind::GATE_UP {
            1
        } else {
            which
        };
        let (ty0, ty1) = (matrix_field(op, which, ty), matrix_field(op, other, ty));
        let left = |len: u32, at: u32| {
            let left = len.saturating_sub(at);
            if left < TILE as u32 {
                left
            } else {
                TILE as u32
            }
        };
        let mut sums = (0.0, 0.0);
        let mut at = 0;
        while at < first {
            let tile = w.ring.wait(a, limit);
            let mut turn = Turn {
                tiles: [tile, tile + a.tile_bytes],
                groups: [left(first, at), left(second, at)],
                at: [at, if apart { first + at } else { at }],
                apart,
            };
            let v = turn_of(ty0, row, &turn);
            sums.0 += v.0;
            let mut v1 = v.1;
            if ty0 != ty1 {
                // Rare (a gate and an up of a hand-made mix): through the same code again.
                turn.tiles[0] = turn.tiles[1];
                turn.groups[0] = turn.groups[1];
                v1 = turn_of(ty1, row, &turn).0;
            }
            sums.1 += v1;
            w.ring.release(a);
            at += TILE as u32;
            if !(last && at >= first) {
                w.ring.fill(a, limit);
            }
        }
        let low = lane_id() < 16;
        let (mine, other) = if low { sums } else { (sums.1, sums.0) };
        mine + warp::shuffle_xor(other, 16)
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
        let lane = lane_id();
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
        let op_kind = get!(op, kind);
        let number = if get!(op, sealed) != 0 {
            get!(op, number)
        } else {
            PLAIN
        };
        let seal = Seal::of(a, number);
        let writes = output.exists && lane % 4 == 0;
        let to = get!(op, out).add(output.r as usize);
        v = v * scale + output.bias;
        let mut best = 0;
        if op_kind == kind::PRODUCT {
            let mut writes = writes;
            if get!(op, split) != 0 {
                // Both halves have the bias.
                v += warp::shuffle_xor(v, 16) - output.bias;
                writes = writes && low;
            }
            if writes {
                best = rank(v, output.r as usize);
                if get!(op, add) != 0 {
                    let before = Seal::of(a, get!(op, add_from));
                    v += before.await_word(to, output.turn.0.to_bits());
                }
                seal.write(to, v);
            }
            return best;
        }
        let other = warp::shuffle_xor(v, 16);
        if op_kind == kind::GATE_UP {
            if writes && low {
                seal.write(to, silu(v) * other);
            }
        } else if writes {
            let (cos, sin) = output.turn;
            let v = v * cos + if low { -other } else { other } * sin;
            if output.m == 0 {
                seal.write(to, v);
            } else {
                write_cache(a, op, output, v, seal);
            }
        }
        best
    }
}

/// Writes an element of the new key or value.
#[inline(always)]
unsafe fn write_cache(a: &DecodeArgs, op: Current, output: &Output, v: f32, seal: Seal) {
    unsafe {
        let r = output.r;
        let (base, which) = if output.m == 1 {
            (get!(op, cache.keys), 0)
        } else {
            (get!(op, cache.values), 1)
        };
        let (kv_heads, head_dim) = (get!(op, cache.kv_heads), get!(op, cache.head_dim));
        let head = r / head_dim;
        let bits = to_f16(v);
        let fresh = get!(op, fresh);
        if !fresh.is_null() {
            let at = which * kv_heads * head_dim + r;
            let rounded = half::F16::from_bits(bits).to_f32();
            seal.write(fresh.add(at as usize), rounded);
        }
        let tokens = BLOCK_TOKENS as u32;
        let block = ldg_u32(a.table.add((a.position / tokens) as usize));
        let at = (block * kv_heads + head) * tokens + a.position % tokens;
        let to = base.cast::<u16>().add(at as usize * head_dim as usize);
        to.add((r - head * head_dim) as usize).write(bits);
    }
}

/// Publishes the greatest of all blocks' ranks: block 0 waits for those of all.
#[inline(always)]
unsafe fn choose(a: &DecodeArgs, best: u64) {
    unsafe {
        let best = {
            // Other warps still read the scratch that this uses.
            sync_threads();
            block_max(best, shared::at(0))
        };
        let t = thread_idx_x();
        let high = u64::from(a.sequence) << 32;
        if t < 2 {
            let half = if t == 0 { best >> 32 } else { best } as u32;
            let to = a.ranks.add((2 * block_idx_x() + t) as usize);
            st_relaxed_u64(to, high | u64::from(half));
        }
        if block_idx_x() == 0 {
            let mut best = 0;
            let mut block = t;
            while block < grid_dim_x() {
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
                block += super::THREADS;
            }
            let best = block_max(best, shared::at(0));
            if t == 0 {
                let id = !(best as u32);
                threadfence_system();
                a.chosen.write_volatile(high | u64::from(id));
            }
        }
    }
}
