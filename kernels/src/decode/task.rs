//! What a warp multiplies at a time.

use super::{Source, WARPS, get, kind, matrix_at};
use crate::rows::Rotation;
use crate::types::{Matrix, TILE};
use core::mem::offset_of;
use cuda_std::int::quotient;
use cuda_std::thread::{block_idx_x, grid_dim_x};

/// Two matrix rows (the number of a matrix of the operation, and a row of it), or one twice.
#[derive(Clone, Copy)]
pub struct Task {
    pub m0: u32,
    pub r0: u32,
    pub m1: u32,
    pub r1: u32,
    /// A [`kind::QKV`]'s pair of elements within its head, and whether they rotate.
    pub pair: u32,
    pub rotates: bool,
}

/// The first task of a warp of this block. Neighbouring tasks go to different blocks, so that a few keep all busy.
#[inline(always)]
pub fn first_task(warp: u32) -> u32 {
    warp * grid_dim_x() + block_idx_x()
}

/// From one of a warp's tasks to the next.
#[inline(always)]
pub fn task_stride() -> u32 {
    grid_dim_x() * WARPS
}

impl Task {
    /// Task `index` of an operation.
    #[inline(always)]
    pub unsafe fn of(op: impl Source, index: u32) -> Task {
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
                    let head = quotient(index, pairs);
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
    pub unsafe fn rest(&self, op: impl Source) -> [Rest; 2] {
        unsafe {
            let row = |m: u32, r: u32| {
                let row_bytes = matrix_field(op, m, offset_of!(Matrix, row_bytes));
                let base = op.long(matrix_at(m) + offset_of!(Matrix, base) as u32) as *const u8;
                Rest {
                    from: base.add(r as usize * row_bytes as usize),
                    bytes: row_bytes,
                    tile: matrix_field(op, m, offset_of!(Matrix, tile_bytes)),
                }
            };
            let (mut first, mut second) = (row(self.m0, self.r0), row(self.m1, self.r1));
            if get!(op, split) != 0 {
                let tile = matrix_field(op, self.m0, offset_of!(Matrix, tile_bytes));
                let bytes = half(quotient(first.bytes + tile - 1, tile)) * tile;
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

/// Groups of the first of a row's two runs, which is of whole tiles.
#[inline(always)]
pub fn first_run(groups: u32) -> u32 {
    let first = half(groups.div_ceil(TILE as u32)) * TILE as u32;
    if first < groups { first } else { groups }
}

/// Tiles of the first half of so many.
#[inline(always)]
fn half(tiles: u32) -> u32 {
    tiles.div_ceil(2)
}

#[inline(always)]
pub unsafe fn matrix_field(op: impl Source, m: u32, offset: usize) -> u32 {
    unsafe { op.word(matrix_at(m) + offset as u32) }
}

#[inline(always)]
unsafe fn rows(op: impl Source, m: u32) -> u32 {
    unsafe { matrix_field(op, m, offset_of!(Matrix, rows)) }
}


/// What is still to be copied of a run.
#[derive(Clone, Copy)]
pub struct Rest {
    pub from: *const u8,
    pub bytes: u32,
    /// Of a whole tile.
    pub tile: u32,
}
