//! What a warp multiplies at a time, and where it lies.
//!
//! An operation's tasks fall into *segments*, in each of which the rows of one task follow from those of another by
//! additions: all pairs of rows of a matrix, a gate with its up, or, of queries and of keys, the pairs that rotate and then
//! those that do not. Feeders go by segments, which the host prepares; who computes goes by tasks.

use super::{Op, Source, WARPS, get, kind, matrix_at};
use crate::types::{Matrix, TILE};
use core::mem::offset_of;
use cuda_std::int::quotient;
use cuda_std::thread::block_idx_x;

/// Tasks of an operation whose runs lie regularly.
///
/// Task `t` of a segment has run `i` at `bases[i] + t * steps[i] + t / period * jump`.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub bases: [*const u8; 2],
    /// Its tasks, as the operation counts them: `first .. end`.
    pub first: u32,
    pub end: u32,
    pub steps: [u32; 2],
    pub period: u32,
    pub jump: u32,
    /// Bytes of both runs.
    pub runs: [u32; 2],
    /// Bytes of a whole tile of each.
    pub tiles: [u32; 2],
    /// The task whose second run is its first, there being no other row; of none `u32::MAX`.
    pub single: u32,
    /// Index of the operation.
    pub op: u32,
    pub shares: Shares,
    pub unused: u32,
}

const _: () = assert!(size_of::<Segment>() == 80, "a feeder loads 5 vectors");

/// Most segments of an operation.
pub const MAX_SEGMENTS: usize = 5;

impl Segment {
    pub const NONE: Segment = Segment {
        bases: [core::ptr::null(); 2],
        first: 0,
        end: 0,
        steps: [0; 2],
        period: u32::MAX,
        jump: 0,
        runs: [0; 2],
        tiles: [0; 2],
        single: u32::MAX,
        op: 0,
        shares: Shares::NONE,
        unused: 0,
    };

    /// Tasks from `first` on: all pairs of rows of `m`.
    fn pairs(m: &Matrix, first: u32) -> Segment {
        let tasks = m.rows.div_ceil(2);
        Segment {
            bases: [m.base, at(m.base, m.row_bytes)],
            first,
            end: first + tasks,
            steps: [2 * m.row_bytes; 2],
            runs: [m.row_bytes; 2],
            tiles: [m.tile_bytes; 2],
            single: if m.rows % 2 == 1 {
                first + tasks - 1
            } else {
                u32::MAX
            },
            ..Segment::NONE
        }
    }

    /// Tasks from `first` on: of each of the heads of `m`, `pairs` pairs of rows from row `row` on, neighbours or (`halves`)
    /// `pairs` apart.
    fn of_heads(
        m: &Matrix,
        first: u32,
        head_dim: u32,
        row: u32,
        pairs: u32,
        halves: bool,
    ) -> Segment {
        let heads = m.rows / head_dim;
        let (step, gap) = if halves { (1, pairs) } else { (2, 1) };
        Segment {
            bases: [row, row + gap].map(|row| at(m.base, row * m.row_bytes)),
            first,
            end: first + heads * pairs,
            steps: [step * m.row_bytes; 2],
            period: pairs.max(1),
            jump: (head_dim - pairs * step) * m.row_bytes,
            runs: [m.row_bytes; 2],
            tiles: [m.tile_bytes; 2],
            ..Segment::NONE
        }
    }
}

fn at(base: *const u8, bytes: u32) -> *const u8 {
    base.wrapping_add(bytes as usize)
}

impl Op {
    /// Its segments, if it is operation `index` of a program; those past the first without tasks are none.
    pub fn segments(&self, index: u32) -> [Segment; MAX_SEGMENTS] {
        let mut segments = [Segment::NONE; MAX_SEGMENTS];
        let [m, up, value] = &self.matrices;
        match self.kind {
            kind::PRODUCT if self.split != 0 => {
                let tile = m.tile_bytes;
                let first = (half(m.row_bytes.div_ceil(tile)) * tile).min(m.row_bytes);
                segments[0] = Segment {
                    bases: [m.base, at(m.base, first)],
                    end: m.rows,
                    steps: [m.row_bytes; 2],
                    runs: [first, m.row_bytes - first],
                    tiles: [tile; 2],
                    ..Segment::NONE
                };
            }
            kind::PRODUCT => segments[0] = Segment::pairs(m, 0),
            kind::GATE_UP => {
                segments[0] = Segment {
                    bases: [m.base, up.base],
                    end: m.rows,
                    steps: [m.row_bytes, up.row_bytes],
                    runs: [m.row_bytes, up.row_bytes],
                    tiles: [m.tile_bytes, up.tile_bytes],
                    ..Segment::NONE
                };
            }
            kind::QKV => {
                let head_dim = self.cache.head_dim;
                let rotates = self.rotation.dims;
                let halves = self.rotation.halves != 0;
                let mut first = 0;
                for (i, m) in [m, up].into_iter().enumerate() {
                    let rotated = Segment::of_heads(m, first, head_dim, 0, rotates / 2, halves);
                    let rest = (head_dim - rotates) / 2;
                    let rest = Segment::of_heads(m, rotated.end, head_dim, rotates, rest, false);
                    first = rest.end;
                    (segments[2 * i], segments[2 * i + 1]) = (rotated, rest);
                }
                segments[4] = Segment::pairs(value, first);
            }
            _ => {}
        }
        segments.map(|s| Segment {
            op: index,
            shares: self.shares,
            ..s
        })
    }
}

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

/// How an operation's tasks fall to the blocks: neighbours to the same one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// So many blocks have none: those that an attention before keeps longest.
    pub skip: u32,
    /// Tasks of each of the others.
    pub each: u32,
    /// How many of them have one more.
    pub extra: u32,
}

impl Shares {
    pub const NONE: Shares = Shares {
        skip: 0,
        each: 0,
        extra: 0,
    };

    /// Of `tasks` among `blocks`, the first `skip` of which have none.
    pub const fn of(tasks: u32, blocks: u32, skip: u32) -> Shares {
        let blocks = blocks - skip;
        Shares {
            skip,
            each: tasks / blocks,
            extra: tasks % blocks,
        }
    }
}

/// This block's tasks: `first .. end`.
#[derive(Clone, Copy)]
pub struct BlockTasks {
    pub first: u32,
    pub end: u32,
}

impl BlockTasks {
    #[inline(always)]
    pub fn of(shares: Shares) -> BlockTasks {
        let Shares { skip, each, extra } = shares;
        let block = block_idx_x();
        if block < skip {
            return BlockTasks { first: 0, end: 0 };
        }
        let block = block - skip;
        let more = if block < extra { block } else { extra };
        let first = block * each + more;
        let end = first + each + u32::from(block < extra);
        BlockTasks { first, end }
    }
}

/// The first task of a warp of a block whose tasks begin with `first`: the last warps begin, for the first ones fill
/// rows.
#[inline(always)]
pub fn first_of(first: u32, warp: u32) -> u32 {
    first + WARPS - 1 - warp
}

/// This block's tasks of an operation. Its warps take them in turn.
#[inline(always)]
pub unsafe fn block_tasks(op: impl Source) -> BlockTasks {
    unsafe {
        let shares = Shares {
            skip: get!(op, shares.skip),
            each: get!(op, shares.each),
            extra: get!(op, shares.extra),
        };
        BlockTasks::of(shares)
    }
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
                    let (mut m, mut t, mut of) = (0, index, heads);
                    while m < 2 && t >= of * pairs {
                        t -= of * pairs;
                        of = kv_heads;
                        m += 1;
                    }
                    let dims = get!(op, rotation.dims);
                    let turned = dims / 2;
                    task = Task {
                        m0: m,
                        r0: 2 * t,
                        m1: m,
                        r1: 2 * t + 1,
                        pair: 0,
                        rotates: false,
                    };
                    if m < 2 && t < of * turned {
                        let head = quotient(t, turned);
                        let pair = t - head * turned;
                        let halves = get!(op, rotation.halves) != 0;
                        let (step, gap) = if halves { (1, turned) } else { (2, 1) };
                        task.r0 = head * head_dim + step * pair;
                        task.r1 = task.r0 + gap;
                        (task.pair, task.rotates) = (pair, true);
                    } else if m < 2 {
                        t -= of * turned;
                        let rest = pairs - turned;
                        let head = quotient(t, rest);
                        task.r0 = head * head_dim + dims + 2 * (t - head * rest);
                        task.r1 = task.r0 + 1;
                    }
                }
                _ => {}
            }
        }
        task
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
const fn half(tiles: u32) -> u32 {
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
