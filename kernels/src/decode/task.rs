//! What a block multiplies at a time, and where it lies.
//!
//! A *task* is up to sixteen rows of weights in two *eights*, neighbours each: of one matrix, or of a gate and its up, or
//! such that the second eight rotate with the first. An operation's tasks fall into *segments*, in each of which the rows of
//! one task follow from those of another by additions. The feeder goes by segments, which the host prepares; who brings
//! outputs to an end goes by tasks.

use super::ring::{RAGGED_TURN, piece_bytes, turn_bytes};
use super::row::GROUPS;
use super::{Current, Cutting, Op, get, kind, matrix_at};
use crate::types::{self, GROUP, Matrix};
use core::mem::offset_of;
use cuda_std::int::quotient;

/// Rows of half a task.
pub const EIGHT: u32 = types::EIGHT as u32;
/// Rows of a task.
pub const ROWS: u32 = 2 * EIGHT;

/// Tasks of an operation whose rows lie regularly.
///
/// Of task `first + t` both eights are those of step `t % period` of repeat `t / period`; a repeat has `span` rows for
/// the first eights, and as many less `second` for the second ones.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The matrices of either eight.
    pub bases: [*const u8; 2],
    /// Its tasks, as the operation counts them: `first .. end`.
    pub first: u32,
    pub end: u32,
    pub period: u32,
    /// Rows from repeat to repeat.
    pub jump: u32,
    /// As the matrices have them: [`Matrix::row_bytes`] and so on.
    pub row_bytes: [u32; 2],
    pub tail_bytes: [u32; 2],
    pub eight_bytes: [u32; 2],
    /// Bytes of a whole tile of either.
    pub tiles: [u32; 2],
    /// Whole strips of a row.
    pub whole: u32,
    /// The first row of the first task's first eight, and how many rows there are from a task's first to its second one.
    pub start: u32,
    pub apart: u32,
    pub unused: u32,
    /// Rows of a repeat, and how many before the second eight of the first step.
    pub span: u32,
    pub second: u32,
    /// Types of either eight, a byte each, and [`RAGGED_TURN`].
    pub types: u32,
    pub rest: u32,
    pub shares: Shares,
}

/// Vectors of a segment.
pub const SEGMENT_VECTORS: usize = 7;
const _: () = assert!(size_of::<Segment>() == 16 * SEGMENT_VECTORS);

/// Keys and values of an attention over a long sequence, among the segments.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub struct Cached {
    /// Where keys and values begin.
    pub bases: [*const u8; 2],
    pub cutting: Cutting,
    /// As [`Op::row_bytes`].
    pub row_bytes: u32,
    pub quantised: u32,
    /// Of f16, the layer's first row in the matrices of [`DecodeArgs::maps`](super::DecodeArgs::maps).
    pub first_row: u32,
    pub unused: [u32; 8],
    /// [`Cached::MARK`], where a segment has its types.
    pub mark: u32,
    pub rest: [u32; 5],
}

const _: () = assert!(size_of::<Cached>() == size_of::<Segment>());
const _: () = assert!(offset_of!(Cached, mark) == offset_of!(Segment, types));

impl Cached {
    /// No segment's types.
    pub const MARK: u32 = u32::MAX;

    /// As it lies among segments.
    pub fn segment(self) -> Segment {
        // Plain numbers and addresses both.
        unsafe { core::mem::transmute::<Cached, Segment>(self) }
    }
}

/// Most segments of an operation.
pub const MAX_SEGMENTS: usize = 5;

impl Segment {
    pub const NONE: Segment = Segment {
        bases: [core::ptr::null(); 2],
        first: 0,
        end: 0,
        period: u32::MAX,
        jump: 0,
        row_bytes: [0; 2],
        tail_bytes: [0; 2],
        eight_bytes: [0; 2],
        tiles: [0; 2],
        whole: 0,
        start: 0,
        apart: 0,
        unused: 0,
        span: 0,
        second: 0,
        types: 0,
        rest: 0,
        shares: Shares::NONE,
    };

    /// Bytes from row to row of either eight in strip `strip`; nothing behind the last.
    #[inline(always)]
    pub fn strides(&self, strip: u32) -> [u32; 2] {
        if strip < self.whole {
            self.row_bytes
        } else {
            self.tail_bytes
        }
    }

    /// Bytes of its largest turn, which has so many tiles of a row at most.
    pub fn turn_bytes(&self, turn_tiles: u32) -> u32 {
        let strides = self.strides(0);
        let pieces = [0, 1].map(|i| piece_bytes(strides[i], self.tiles[i], turn_tiles));
        turn_bytes(pieces, self.types)
    }

    /// Rows from step to step.
    #[inline(always)]
    pub fn step(&self) -> u32 {
        if self.second == EIGHT { ROWS } else { EIGHT }
    }

    /// Tasks from `first` on: all rows of `m`.
    fn rows(m: &Matrix, first: u32) -> Segment {
        Segment {
            first,
            end: first + m.rows.div_ceil(ROWS),
            apart: EIGHT,
            span: m.rows,
            second: EIGHT,
            ..Segment::of(m, m)
        }
    }

    /// What follows from the matrices of either eight.
    fn of(m: &Matrix, second: &Matrix) -> Segment {
        let both = [m, second];
        Segment {
            bases: both.map(|m| m.base),
            row_bytes: both.map(|m| m.row_bytes),
            tail_bytes: both.map(|m| m.tail_bytes),
            eight_bytes: both.map(|m| m.eight_bytes),
            tiles: both.map(|m| m.tile_bytes),
            whole: m.whole_strips(),
            types: types(m, second),
            ..Segment::NONE
        }
    }

    /// Tasks from `first` on: of each of the heads of `m`, `pairs` pairs of rows that lie `pairs` apart.
    fn pairs(m: &Matrix, first: u32, head_dim: u32, pairs: u32) -> Segment {
        let period = pairs.div_ceil(EIGHT);
        Segment {
            first,
            end: first + m.rows / head_dim * period,
            period: period.max(1),
            jump: head_dim,
            apart: pairs,
            span: pairs,
            second: 0,
            ..Segment::of(m, m)
        }
    }

    /// Tasks from `first` on: of each head the rows from row `row` on.
    fn rest(m: &Matrix, first: u32, head_dim: u32, row: u32) -> Segment {
        let period = (head_dim - row).div_ceil(ROWS);
        Segment {
            start: row,
            end: first + m.rows / head_dim * period,
            period: period.max(1),
            jump: head_dim,
            span: head_dim - row,
            ..Segment::rows(m, first)
        }
    }
}

fn types(first: &Matrix, second: &Matrix) -> u32 {
    let ragged = !first.cols.is_multiple_of(GROUPS * GROUP as u32);
    first.ty | (second.ty << 8) | if ragged { RAGGED_TURN } else { 0 }
}

impl Op {
    /// Whether queries and keys rotate in pairs of rows that lie apart.
    #[inline(always)]
    const fn pairs_apart(&self) -> bool {
        self.rotation.halves != 0 && self.rotation.dims != 0
    }

    /// Its segments; those without tasks are none.
    pub fn segments(&self) -> [Segment; MAX_SEGMENTS] {
        let mut segments = [Segment::NONE; MAX_SEGMENTS];
        let [m, up, value] = &self.matrices;
        match self.kind {
            kind::PRODUCT => segments[0] = Segment::rows(m, 0),
            kind::GATE_UP => {
                segments[0] = Segment {
                    end: m.rows.div_ceil(EIGHT),
                    span: m.rows,
                    ..Segment::of(m, up)
                };
            }
            kind::QKV => {
                let head_dim = self.cache.head_dim;
                let dims = self.rotation.dims;
                let mut first = 0;
                for (i, m) in [m, up].into_iter().enumerate() {
                    let (rows, rest) = if self.pairs_apart() {
                        let turned = Segment::pairs(m, first, head_dim, dims / 2);
                        (turned, Segment::rest(m, turned.end, head_dim, dims))
                    } else {
                        let rows = Segment::rows(m, first);
                        (
                            rows,
                            Segment {
                                first: rows.end,
                                end: rows.end,
                                ..Segment::NONE
                            },
                        )
                    };
                    first = rest.end;
                    (segments[2 * i], segments[2 * i + 1]) = (rows, rest);
                }
                segments[4] = Segment::rows(value, first);
            }
            _ => {}
        }
        segments.map(|s| Segment {
            shares: self.shares,
            ..s
        })
    }

    /// What of the cache comes through the ring; of f16 `first` is where the matrix of all layers' keys begins.
    pub fn cached(&self, first: Option<*const u8>) -> Option<Cached> {
        let keys = self.cache.keys as u64;
        let before = keys - first.map_or(keys, |first| first as u64).min(keys);
        (self.kind == kind::ATTEND && self.ringed()).then(|| Cached {
            bases: [self.cache.keys, self.cache.values].map(|p| p.cast_const()),
            cutting: Cutting {
                kv_heads: self.cache.kv_heads,
                head_dim: self.cache.head_dim,
                group: self.group,
                splits: self.splits,
                inverse_splits: self.inverse_splits,
                first_block: self.first_block,
                ringed: true,
            },
            row_bytes: self.row_bytes,
            quantised: self.quantised,
            first_row: (before / u64::from(self.row_bytes.max(1))) as u32,
            unused: [0; 8],
            mark: Cached::MARK,
            rest: [0; 5],
        })
    }

    /// Tasks of a product, one per block at a time.
    pub fn count_tasks(&self) -> u32 {
        let segments = self.segments();
        segments.iter().map(|s| s.end).max().unwrap_or(0)
    }
}

/// Of a task the row of a lane: of its first eight in lanes 0 to 7, of its second in the next eight, and the
/// same in the upper half of the warp.
#[derive(Clone, Copy)]
pub struct TaskRow {
    /// Number of its matrix, and the row there.
    pub m: u32,
    pub r: u32,
    pub exists: bool,
    /// Whether it rotates, and the number of its pair within the head.
    pub rotates: bool,
    pub pair: u32,
    /// Whether it is the second of its pair.
    pub second: bool,
}

impl TaskRow {
    /// Of a lane of task `index`.
    #[inline(always)]
    pub unsafe fn of(op: Current, index: u32, lane: u32) -> TaskRow {
        unsafe {
            let (late, i) = (lane / EIGHT % 2, lane % EIGHT);
            let plain = |m: u32, t: u32| TaskRow {
                m,
                r: t * ROWS + late * EIGHT + i,
                exists: t * ROWS + late * EIGHT + i < rows(op, m),
                rotates: false,
                pair: 0,
                second: false,
            };
            match get!(op, kind) {
                kind::PRODUCT => plain(0, index),
                kind::GATE_UP => TaskRow {
                    m: late,
                    r: index * EIGHT + i,
                    exists: index * EIGHT + i < rows(op, 0),
                    rotates: false,
                    pair: 0,
                    second: false,
                },
                _ => {
                    let head_dim = get!(op, cache.head_dim);
                    let dims = get!(op, rotation.dims);
                    let apart = get!(op, rotation.halves) != 0 && dims != 0;
                    let (mut m, mut t) = (0, index);
                    // In order: queries, keys, values.
                    loop {
                        let rows = rows(op, m);
                        if m == 2 || !apart {
                            let tasks = rows.div_ceil(ROWS);
                            if m < 2 && t >= tasks {
                                t -= tasks;
                                m += 1;
                                continue;
                            }
                            let mut row = plain(m, t);
                            let e = row.r - quotient(row.r, head_dim) * head_dim;
                            row.rotates = m < 2 && e < dims;
                            (row.pair, row.second) = (e / 2, e % 2 != 0);
                            return row;
                        }
                        let heads = quotient(rows, head_dim);
                        let (turned, rest) = (dims / 2, head_dim - dims);
                        let period = turned.div_ceil(EIGHT);
                        if t < heads * period {
                            let head = quotient(t, period);
                            let pair = (t - head * period) * EIGHT + i;
                            return TaskRow {
                                m,
                                r: head * head_dim + late * turned + pair,
                                exists: pair < turned,
                                rotates: true,
                                pair,
                                second: late != 0,
                            };
                        }
                        t -= heads * period;
                        let period = rest.div_ceil(ROWS);
                        if t < heads * period {
                            let head = quotient(t, period);
                            let e = (t - head * period) * ROWS + late * EIGHT + i;
                            return TaskRow {
                                m,
                                r: head * head_dim + dims + e,
                                exists: e < rest,
                                rotates: false,
                                pair: 0,
                                second: false,
                            };
                        }
                        t -= heads * period;
                        m += 1;
                    }
                }
            }
        }
    }
}

/// How an operation's tasks fall to the blocks: neighbours to the same one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// The first block that has any, and above it, from bit [`Shares::SHIFT`] on, how many do: around an attention not those that have
    /// its pieces, or merge them.
    pub span: u32,
    /// Tasks of each of them.
    pub each: u32,
    /// How many of them have one more.
    pub extra: u32,
    /// How far these are from the first of those that have any: less than their number.
    pub turn: u32,
}

impl Shares {
    pub const NONE: Shares = Shares {
        span: 0,
        each: 0,
        extra: 0,
        turn: 0,
    };

    pub const SHIFT: u32 = 16;

    /// Of `tasks` among `blocks` blocks from block `first` on.
    pub const fn of(tasks: u32, first: u32, blocks: u32) -> Shares {
        Shares {
            span: first | (blocks << Self::SHIFT),
            each: tasks / blocks,
            extra: tasks % blocks,
            turn: 0,
        }
    }

    /// The first block that has tasks.
    #[inline(always)]
    pub const fn first(self) -> u32 {
        self.span % (1 << Self::SHIFT)
    }

    /// How many blocks have.
    #[inline(always)]
    pub const fn blocks(self) -> u32 {
        self.span >> Self::SHIFT
    }

    /// Tasks of block `block`: `first .. end`.
    #[inline(always)]
    pub const fn of_block(self, block: u32) -> BlockTasks {
        let (first, with) = (self.first(), self.blocks());
        if block < first || block >= first + with {
            return BlockTasks { first: 0, end: 0 };
        }
        let mut block = block - first + with - self.turn;
        if block >= with {
            block -= with;
        }
        let more = if block < self.extra {
            block
        } else {
            self.extra
        };
        let first = block * self.each + more;
        BlockTasks {
            first,
            end: first + self.each + (block < self.extra) as u32,
        }
    }
}

/// A block's tasks: `first .. end`, of fewer than 2^16.
#[derive(Clone, Copy)]
pub struct BlockTasks {
    pub first: u32,
    pub end: u32,
}

impl BlockTasks {
    /// As [`Now::tasks`](super::Now::tasks) has them.
    pub const fn word(self) -> u32 {
        self.first | (self.end << 16)
    }
}

/// This block's tasks of an operation.
#[inline(always)]
pub unsafe fn block_tasks(op: Current) -> BlockTasks {
    let word = unsafe { get!(op, now.tasks) };
    BlockTasks {
        first: word & 0xffff,
        end: word >> 16,
    }
}

#[inline(always)]
pub unsafe fn matrix_field(op: Current, m: u32, offset: usize) -> u32 {
    unsafe { op.word(matrix_at(m) + offset as u32) }
}

#[inline(always)]
pub unsafe fn rows(op: Current, m: u32) -> u32 {
    unsafe { matrix_field(op, m, offset_of!(Matrix, rows)) }
}
