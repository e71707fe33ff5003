//! How a product's outputs are brought to an end: by warps that do nothing else, while the others go on.
//!
//! What the warps of a team have of each row of a task lies in shared memory, for a *batch* of tasks at a time; a finisher
//! takes two of them, a row a lane, adds it up and does what the operation is for: biases, a rotation, the activation of a gate, the
//! addition to the residual, the cache, the greatest logit.

use super::product::{batch_of, parts_of};
use super::row::{norm_scale, sum_of};
use super::seal::Seal;
use super::task::{EIGHT, ROWS, TaskRow, block_tasks, rows};
use super::{
    CHOICES, Current, DecodeArgs, FINISHERS, HALVES, LATE, SCRATCH_AT, WARPS, Warp, await_op,
    blocks, cache_block, get, is_quantised, kind, lane, may_be, note, point, sync_finishers,
    thread,
};
use crate::rows::BLOCK_TOKENS;
use crate::sample::{max_u64, rank, warp_max};
use cuda_std::half::to_f16;
use cuda_std::int::quotient;
use cuda_std::memory::{ld_relaxed_u32, ld_relaxed_u64, ldg_f32, st_relaxed_u64, threadfence};
use cuda_std::shared;
use cuda_std::thread::{block_idx_x, spin};
use cuda_std::{float, half, warp};

/// An output that a lane brings to an end.
#[derive(Clone, Copy)]
struct Output {
    /// Where it goes.
    to: *mut f32,
    /// Its matrix, and what of [`Output::WRITES`] and so on is so.
    flags: u32,
    bias: f32,
    /// Cosine and sine of a rotation's angle; or the bits of the words that are added to.
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
    /// And to what lies so many words behind that.
    const ADDS_HALVES: u32 = 64;

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
    unsafe fn of(op: Current, index: u32) -> Output {
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
                    let at = (get!(op, now.position) * (get!(op, rotation.dims) / 2) + row.pair)
                        as usize
                        * 2;
                    output.turn = (ldg_f32(table.add(at)), ldg_f32(table.add(at + 1)));
                } else if get!(op, add) != 0 {
                    output.flags |= Output::ADDS;
                    output.turn.0 = f32::from_bits(ld_relaxed_u32(output.to.cast()));
                    if may_be(HALVES) && get!(op, add_halves) != 0 {
                        output.flags |= Output::ADDS_HALVES;
                        let second = output.to.add(rows(op, 0) as usize);
                        output.turn.1 = f32::from_bits(ld_relaxed_u32(second.cast()));
                    }
                }
            }
            output
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
        if get!(op, choose) != 0 {
            // The next step begins with the choice, and reads the keys and values of this one.
            threadfence();
        }
        let mut best = 0;
        // Two tasks a warp, a row a lane.
        let mine = (thread() / 32 - WARPS) * 2 + lane() / ROWS;
        let mut index = block_tasks(op).first;
        loop {
            let end = block_tasks(op).end;
            let count = if index < end { batch_of(index, end) } else { 0 };
            let mut output = Output::NONE;
            if mine < count {
                output = Output::of(op, index + mine);
            }
            let ends = Ends::of(op);
            if mine < count {
                clear_rest(w, mine, get!(op, team));
            }
            if index + count >= end {
                await_op();
            }
            w.end_step();
            if mine & !1 < count {
                best = max_u64(best, finish_two(a, op, w, &output, &ends, mine));
                note_output(a, w.index);
            }
            index += count;
            if index >= end {
                break;
            }
        }
        if get!(op, choose) != 0 {
            choose(a, op, best);
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
    /// Whether there is a norm, and what it takes.
    norm: bool,
    inverse_len: f32,
    eps: f32,
}

impl Ends {
    #[inline(always)]
    unsafe fn of(op: Current) -> Ends {
        unsafe {
            Ends {
                seal: Seal::of_output(op).here(),
                before: Seal::of(op, get!(op, add_from)).here(),
                kind: get!(op, kind),
                norm: !get!(op, input.norm).is_null(),
                inverse_len: get!(op, input.inverse_len),
                eps: get!(op, input.eps),
            }
        }
    }
}

/// Zeros in the place of parts that smaller teams leave out, of this lane's row of task `task` of the current step: so that
/// behind its barrier all are added up without a question.
#[inline(always)]
unsafe fn clear_rest(w: &Warp, task: u32, team: u32) {
    let parts = parts_of(w.step, task, lane() % ROWS);
    for warp in 1..WARPS {
        if warp >= team {
            unsafe { parts.add(warp).store(0.0) }
        }
    }
}

/// Notes the time in the block's first finisher.
#[inline(always)]
unsafe fn note_output(a: &DecodeArgs, index: u32) {
    if thread() == 32 * WARPS {
        unsafe { note(a, index, point::OUTPUT) }
    }
}

/// Adds up the warps' parts of a row of task `task` of the batch that has ended and writes what it is for; returns the
/// rank of logits.
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
        let mut v = sum_of(parts_of(w.step - 1, task, lane() % ROWS));
        let seal = ends.seal;
        // Without a branch: one goes beside the other.
        v = v * if ends.norm { scale } else { 1.0 } + output.bias;
        // One question after the other: a jump by number takes longer.
        if ends.kind == kind::GATE_UP {
            let up = warp::shuffle_xor(v, EIGHT);
            if output.is(Output::WRITES) {
                seal.write(output.to, silu(v) * up);
            }
        } else if ends.kind == kind::QKV {
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
        } else if output.is(Output::WRITES) {
            if output.is(Output::ADDS) {
                v += ends.before.await_word(output.to, output.turn.0.to_bits());
                if may_be(HALVES) && output.is(Output::ADDS_HALVES) {
                    let second = output.to.add(rows(op, 0) as usize);
                    v += ends.before.await_word(second, output.turn.1.to_bits());
                }
            }
            seal.write(output.to, v);
            if get!(op, choose) != 0 {
                let bytes = output.to as usize - get!(op, out) as usize;
                return rank(v, bytes / 4);
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
        let late = may_be(LATE) && which == 0 && get!(op, late) != 0;
        // Only the attention has whole groups of these.
        let late = late || is_quantised(op);
        if !fresh.is_null() {
            let at = which * kv_heads * head_dim + r;
            let rounded = half::F16::from_bits(bits).to_f32();
            seal.write(fresh.add(at as usize), if late { v } else { rounded });
        }
        if late {
            return;
        }
        let tokens = BLOCK_TOKENS as u32;
        let position = get!(op, now.position);
        let block = cache_block(a, position);
        let at = (block * kv_heads + head) * tokens + position % tokens;
        let to = base.cast::<u16>().add(at as usize * head_dim as usize);
        to.add((r - head * head_dim) as usize).write(bits);
    }
}

/// Publishes the greatest of all blocks' ranks: block 0 waits for those of all.
#[inline(always)]
unsafe fn choose(a: &DecodeArgs, op: Current, best: u64) {
    unsafe {
        let best = block_max(best);
        let t = thread() - 32 * WARPS;
        let sequence = get!(op, now.sequence);
        let high = u64::from(sequence) << 32;
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
                    while (v >> 32) as u32 != sequence {
                        spin();
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
                let choice = high | u64::from(id);
                st_relaxed_u64(a.choice, choice);
                a.chosen
                    .add((sequence % CHOICES) as usize)
                    .write_volatile(choice);
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
