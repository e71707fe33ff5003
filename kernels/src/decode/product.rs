//! Products with the input row: plain ones, gate and up, queries, keys and values.

use super::ring::{Rest, Tile};
use super::row::{Group, Row};
use super::seal::{Seal, pause};
use super::{AHEAD, Coming, Current, DecodeArgs, PLAIN, WARPS, Warp, get, kind, note, point};
use crate::for_each_type;
use crate::rows::{BLOCK_TOKENS, Rotation, silu};
use crate::sample::{block_max, max_u64, rank};
use crate::types::*;
use core::mem::offset_of;
use cuda_std::int::dp4a_us;
use cuda_std::memory::{
    ld_relaxed_u32, ld_relaxed_u64, ldg_f32, ldg_u32, st_relaxed_u64, threadfence_system,
};
use cuda_std::shared::{self, Scalar, SharedPtr};
use cuda_std::thread::{block_idx_x, grid_dim_x, lane_id, sync_threads, thread_idx_x};
use cuda_std::{half, warp};

/// A run of one matrix row's groups.
#[derive(Clone, Copy)]
struct Run {
    /// First group, of a whole tile.
    first: u32,
    len: u32,
}

/// Two matrix rows (the number of a matrix of the operation, and a row of it), or one twice.
#[derive(Clone, Copy)]
pub struct Task {
    pub m0: u32,
    pub r0: u32,
    pub m1: u32,
    pub r1: u32,
    /// A [`kind::QKV`]'s head and pair of elements within its matrix, and whether they rotate.
    head: u32,
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
            head: 0,
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
                        head,
                        pair,
                        rotates,
                    };
                }
                _ => {}
            }
        }
        task
    }

    /// The two runs; the second is at most as long as the first.
    #[inline(always)]
    unsafe fn runs(&self, op: Current) -> [Run; 2] {
        unsafe {
            let groups = matrix_field(op, 0, offset_of!(Matrix, cols)) / GROUP as u32;
            let whole = Run {
                first: 0,
                len: groups,
            };
            if get!(op, split) == 0 {
                return [whole, whole];
            }
            let half = half(groups.div_ceil(TILE as u32)) * TILE as u32;
            if half >= groups {
                return [whole, Run { first: 0, len: 0 }];
            }
            [
                Run {
                    first: 0,
                    len: half,
                },
                Run {
                    first: half,
                    len: groups - half,
                },
            ]
        }
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
                let bytes = half(first.bytes.div_ceil(first.tile)) * first.tile;
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

/// What a task's end needs besides the sums. The first lane of each half of the warp has its row's; the rest
/// ask for the same.
#[derive(Clone, Copy)]
struct Extras {
    bias: f32,
    /// Cosine and sine of a rotation's angle, or the word that is added to.
    turn: (f32, f32),
    before: u32,
}

impl Extras {
    #[inline(always)]
    unsafe fn load(a: &DecodeArgs, op: Current, task: &Task) -> Extras {
        unsafe {
            let low = lane_id() < 16;
            let (m, r) = if low {
                (task.m0, task.r0)
            } else {
                (task.m1, task.r1)
            };
            let mut extras = Extras {
                bias: 0.0,
                turn: (1.0, 0.0),
                before: 0,
            };
            let bias = op.bias(m);
            if !bias.is_null() {
                extras.bias = ldg_f32(bias.add(r as usize));
            }
            if task.rotates {
                let table = get!(op, rotation.table);
                let at = (a.position * (get!(op, rotation.dims) / 2) + task.pair) as usize * 2;
                extras.turn = (ldg_f32(table.add(at)), ldg_f32(table.add(at + 1)));
            } else if get!(op, add) != 0 {
                extras.before = ld_relaxed_u32(get!(op, out).add(r as usize).cast());
            }
            extras
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
    let v = if T::UNIFORM {
        a.d[0] * (first + last) as f32 + a.m[0] * (x.sums[0] + x.sums[1]) as f32
    } else {
        a.d[0] * first as f32
            + a.m[0] * x.sums[0] as f32
            + (a.d[1] * last as f32 + a.m[1] * x.sums[1] as f32)
    };
    x.d * v
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
        let mut task = Task::of(op, if index < count { index } else { 0 });
        // What the end needs is asked for first, and comes while the input is awaited.
        let mut extras = Extras::load(a, op, &task);
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
            let last = index + task_stride() >= count;
            let sums = multiply(a, op, w, &row, &task, last, limit);
            best = max_u64(best, finish(a, op, &task, &extras, sums, scale));
            index += task_stride();
            if !last {
                task = Task::of(op, index);
                extras = Extras::load(a, op, &task);
            }
        }
        if get!(op, choose) != 0 {
            choose(a, best);
        }
    }
}

/// This lane's parts of a task's two products. The place of the very last turn of an operation is not filled
/// again yet: the result goes out first.
#[inline(always)]
unsafe fn multiply(
    a: &DecodeArgs,
    op: Current,
    w: &mut Warp,
    row: &Row,
    task: &Task,
    last: bool,
    limit: u32,
) -> (f32, f32) {
    unsafe {
        let [a0, b0] = task.runs(op);
        let ty = offset_of!(Matrix, ty);
        let (ty0, ty1) = (matrix_field(op, task.m0, ty), matrix_field(op, task.m1, ty));
        let apart = get!(op, split) != 0;
        let mut sums = (0.0, 0.0);
        let mut at = 0;
        while at < a0.len {
            let tile = w.ring.wait(a, limit);
            let mut turn = Turn {
                tiles: [tile, tile + a.tile_bytes],
                groups: [groups_left(a0.len, at), groups_left(b0.len, at)],
                at: [at, b0.first + at],
                apart,
            };
            let v = turn_of(ty0, row, &turn);
            sums.0 += v.0;
            let mut second = v.1;
            if ty0 != ty1 {
                // Rare (a gate and an up of a hand-made mix): through the same code again.
                turn.tiles[0] = turn.tiles[1];
                turn.groups[0] = turn.groups[1];
                second = turn_of(ty1, row, &turn).0;
            }
            sums.1 += second;
            w.ring.release();
            at += TILE as u32;
            if !(last && at >= a0.len) {
                w.ring.fill(a, limit);
            }
        }
        sums
    }
}

/// Groups of the tile that begins at group `at` of a run.
#[inline(always)]
fn groups_left(len: u32, at: u32) -> u32 {
    let left = if at < len { len - at } else { 0 };
    if left < TILE as u32 {
        left
    } else {
        TILE as u32
    }
}

/// Adds up the lanes' parts and writes what the task is for; returns the rank of logits.
#[inline(always)]
unsafe fn finish(
    a: &DecodeArgs,
    op: Current,
    task: &Task,
    extras: &Extras,
    sums: (f32, f32),
    scale: f32,
) -> u64 {
    unsafe {
        // The lower half of the warp adds up the first product, the upper the second.
        let lane = lane_id();
        let low = lane < 16;
        let (mine, other) = if low { sums } else { (sums.1, sums.0) };
        let mut v = mine + warp::shuffle_xor(other, 16);
        v += warp::shuffle_xor(v, 8);
        v += warp::shuffle_xor(v, 4);
        v += warp::shuffle_xor(v, 2);
        v += warp::shuffle_xor(v, 1);
        v *= scale;
        let op_kind = get!(op, kind);
        let number = if get!(op, sealed) != 0 {
            get!(op, number)
        } else {
            PLAIN
        };
        let seal = Seal::of(a, number);
        let out = get!(op, out);
        let r = if low { task.r0 } else { task.r1 };
        let first = lane % 16 == 0;
        let mut best = 0;
        if op_kind == kind::PRODUCT {
            if get!(op, split) != 0 {
                v += warp::shuffle_xor(v, 16);
            }
            if first && (low || task.r1 > task.r0) {
                v += extras.bias;
                best = rank(v, r as usize);
                if get!(op, add) != 0 {
                    let before = Seal::of(a, get!(op, add_from));
                    v += before.await_word(out.add(r as usize), extras.before);
                }
                seal.write(out.add(r as usize), v);
            }
        } else {
            v += extras.bias;
            let other = warp::shuffle_xor(v, 16);
            if op_kind == kind::GATE_UP {
                if lane == 0 {
                    seal.write(out.add(r as usize), silu(v) * other);
                }
            } else if first {
                let (cos, sin) = extras.turn;
                let v = v * cos + if low { -other } else { other } * sin;
                if task.m0 == 0 {
                    seal.write(out.add(r as usize), v);
                } else {
                    write_cache(a, op, task, r, v, seal);
                }
            }
        }
        best
    }
}

/// Writes an element of the new key or value.
#[inline(always)]
unsafe fn write_cache(a: &DecodeArgs, op: Current, task: &Task, r: u32, v: f32, seal: Seal) {
    unsafe {
        let (base, which) = if task.m0 == 1 {
            (get!(op, cache.keys), 0)
        } else {
            (get!(op, cache.values), 1)
        };
        let (kv_heads, head_dim) = (get!(op, cache.kv_heads), get!(op, cache.head_dim));
        let bits = to_f16(v);
        let fresh = get!(op, fresh);
        if !fresh.is_null() {
            let at = which * kv_heads * head_dim + r;
            let rounded = half::F16::from_bits(bits).to_f32();
            seal.write(fresh.add(at as usize), rounded);
        }
        let tokens = BLOCK_TOKENS as u32;
        let block = ldg_u32(a.table.add((a.position / tokens) as usize));
        let at = (block * kv_heads + task.head) * tokens + a.position % tokens;
        let to = base.cast::<u16>().add(at as usize * head_dim as usize);
        to.add((r - task.head * head_dim) as usize).write(bits);
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
