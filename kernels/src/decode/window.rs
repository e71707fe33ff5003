//! Operations on their way into shared memory, where all warps of a block read them, and what they know of the step that they belong
//! to.

use super::op::{NO_OP, Now, OP_BYTES, Op};
use super::{DecodeArgs, FINISHERS, NUMBERS, WARPS, WINDOW_AT, lane, thread};
use crate::types::Matrix;
use cuda_std::memory::{cp_async_4, cp_async_16, cp_async_commit, cp_async_wait};
use cuda_std::shared::{self, Scalar, SharedPtr};
use cuda_std::thread::{block_idx_x, grid_dim_x};

/// Operations in shared memory: the one before, which slow warps still read, the current one, and those to come.
pub(super) const WINDOW: u32 = 4;
/// How far the window reaches beyond the current operation: its last is on its way, and shown by the next one's barrier.
pub(super) const AHEAD: u32 = WINDOW - 2;

/// Reads a field of an operation.
macro_rules! get {
    ($op:expr, $($field:tt)+) => {
        $crate::decode::Current::read(
            $op,
            core::mem::offset_of!($crate::decode::Op, $($field)+) as u32,
            |op| &raw const (*op).$($field)+,
        )
    };
}
pub(super) use get;

/// Where matrix `m` lies in an operation.
#[inline(always)]
pub(super) fn matrix_at(m: u32) -> u32 {
    core::mem::offset_of!(Op, matrices) as u32 + m * size_of::<Matrix>() as u32
}

/// An operation in the window: its address there.
#[derive(Clone, Copy)]
pub(super) struct Current(pub(super) u32);

impl Current {
    #[inline(always)]
    pub fn at(index: u32) -> Current {
        Current(shared::at::<u8>(WINDOW_AT + index % WINDOW * OP_BYTES).addr())
    }

    #[inline(always)]
    pub unsafe fn word(self, offset: u32) -> u32 {
        unsafe { u32::load(self.0 + offset) }
    }

    #[inline(always)]
    unsafe fn long(self, offset: u32) -> u64 {
        unsafe { u64::load(self.0 + offset) }
    }

    /// The field at `offset`; `_type` only says its type.
    #[inline(always)]
    pub unsafe fn read<T: Field>(self, offset: u32, _type: impl Fn(*const Op) -> *const T) -> T {
        unsafe { T::of(self, offset) }
    }

    /// Biases of matrix `m`; null for none.
    #[inline(always)]
    pub unsafe fn bias(self, m: u32) -> *const f32 {
        unsafe { Field::of(self, core::mem::offset_of!(Op, biases) as u32 + 8 * m) }
    }
}

/// What an operation's fields are.
pub(super) trait Field {
    unsafe fn of(op: Current, offset: u32) -> Self;
}

impl Field for u32 {
    #[inline(always)]
    unsafe fn of(op: Current, offset: u32) -> Self {
        unsafe { op.word(offset) }
    }
}

impl Field for f32 {
    #[inline(always)]
    unsafe fn of(op: Current, offset: u32) -> Self {
        f32::from_bits(unsafe { op.word(offset) })
    }
}

impl<T> Field for *const T {
    #[inline(always)]
    unsafe fn of(op: Current, offset: u32) -> Self {
        unsafe { op.long(offset) as *const T }
    }
}

impl<T> Field for *mut T {
    #[inline(always)]
    unsafe fn of(op: Current, offset: u32) -> Self {
        unsafe { op.long(offset) as *mut T }
    }
}

/// Starts to copy operation `index` of the launch into the window, by the last finisher, which has the least to do.
/// [`await_op`] in the operation after this one, and a barrier, must follow.
#[inline(always)]
pub(super) unsafe fn copy_op(a: &DecodeArgs, index: u32) {
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
pub(super) fn await_op() {
    cp_async_wait::<1>();
}
