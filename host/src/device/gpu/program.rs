//! What follows from a decode step's operations before they are carried out: how their tasks fall to the blocks, what they
//! need of shared memory, what the device reads of them, what they cost.

use super::Driver;
use crate::error::{Error, Result};
use kernels::decode::{self, BATCH, INVERSE_UNIT, MAX_TURNS, Op, Segment, Shares, WARPS, kind};
use kernels::types::{GROUP, Matrix, TILE};

/// Gives `ops`, which one launch carries with so much shared memory, the fields that follow from others; what that has room
/// for.
///
/// # Errors
/// Where its shared memory has not even room for one turn of the weights beside a row.
pub(super) fn plan<D: Driver>(
    driver: &D,
    ops: &mut [Op],
    blocks: u32,
    shared: usize,
) -> Result<Room> {
    let room = room(driver, ops, shared)?;
    for op in &mut *ops {
        let tasks = op.count_tasks();
        op.team = team(op, tasks.div_ceil(blocks - op.shares.skip), &room);
        op.teams = WARPS / op.team;
        op.inverse_team = INVERSE_UNIT.div_ceil(op.team);
        op.turns = turns(op, &room);
        let parts = decode::parts(op.input.len.div_ceil(GROUP as u32));
        op.alone = u32::from(op.teams == 1 && parts <= WARPS);
        op.group = op.heads / op.cache.kv_heads.max(1);
        op.shares = Shares::of(tasks, blocks, op.shares.skip);
        op.input.inverse_len = 1.0 / op.input.len as f32;
    }
    balance(ops, blocks);
    Ok(room)
}

/// Turns of a task.
fn turns(op: &Op, room: &Room) -> u32 {
    let groups = op.input.len.div_ceil(GROUP as u32);
    groups.div_ceil(TILE as u32 * room.turn_tiles)
}

/// Warps for a task where a block has so many.
fn team(op: &Op, tasks: u32, room: &Room) -> u32 {
    let groups = op.input.len.div_ceil(GROUP as u32);
    let parts = decode::parts(groups);
    let turns = turns(op, room);
    // What else there is to do for a task takes as long as a part of it.
    let takes = |warps: u32| tasks.min(BATCH).div_ceil(WARPS / warps) * (1 + parts.div_ceil(warps));
    // All teams' turns have to be there at the same time, or they wait for each other for ever; and at the ring's end
    // there may be less room than one takes.
    let fits = |warps: &u32| {
        let there = WARPS / warps * turns < room.turns;
        WARPS.is_multiple_of(*warps) && (*warps == WARPS || there)
    };
    let teams = (1..=WARPS).rev().filter(fits);
    teams.min_by_key(|warps| takes(*warps)).unwrap_or(WARPS)
}

/// Bytes of the largest turn of an operation.
pub(super) fn turn_bytes(op: &Op, turn_tiles: u32) -> u32 {
    let segments = op.segments(0);
    let turns = segments.iter().map(|s| s.turn_bytes(turn_tiles));
    turns.max().unwrap_or(0)
}

/// Turns the tasks of `ops` such that all blocks bring about as many bytes in: weights are on their way for operations to
/// come, so that a block that has fewer of one may have more of the next.
fn balance(ops: &mut [Op], blocks: u32) {
    let mut load = vec![0u64; blocks as usize];
    for op in ops {
        let bytes = product_bytes(op) / u64::from(op.count_tasks().max(1));
        let of = |shares: Shares, block: usize| {
            let tasks = shares.of_block(block as u32, blocks);
            u64::from(tasks.end - tasks.first) * bytes
        };
        let with = blocks - op.shares.skip;
        let heaviest = |shares: Shares| {
            let loads = load.iter().enumerate();
            loads.map(|(i, load)| load + of(shares, i)).max()
        };
        let turns = (0..with).map(|turn| Shares { turn, ..op.shares });
        if let Some(shares) = turns.min_by_key(|shares| heaviest(*shares))
            && op.shares.extra > 0
        {
            op.shares = shares;
        }
        for (i, load) in load.iter_mut().enumerate() {
            *load += of(op.shares, i);
        }
    }
}

/// Bytes of the weights that a product reads.
fn product_bytes(op: &Op) -> u64 {
    if !is_product(op) {
        return 0;
    }
    let bytes = |m: &Matrix| u64::from(m.rows) * u64::from(m.row_bytes);
    op.matrices.iter().map(bytes).sum()
}

fn is_product(op: &Op) -> bool {
    matches!(op.kind, kind::PRODUCT | kind::GATE_UP | kind::QKV)
}

/// What an operation takes at least, as [`OpTiming`](crate::device::OpTiming) has it.
#[derive(Clone, Copy)]
pub(super) struct Cost {
    pub(super) bytes: u64,
    pub(super) operations: u64,
    /// Whether both are for each token in the cache.
    pub(super) each_token: bool,
}

pub(super) fn cost(op: &Op) -> Cost {
    /// Keys and values are f16 wherever steps are recorded.
    const CACHED: u64 = 2;
    let len = u64::from(op.input.len);
    match op.kind {
        // One row of its matrix, scaled.
        kind::EMBED => Cost {
            bytes: u64::from(op.matrices[0].row_bytes),
            operations: len,
            each_token: false,
        },
        // Keys and values; query heads of a group share them. Scores and their sum are two products.
        kind::ATTEND => Cost {
            bytes: 2 * CACHED * u64::from(op.cache.kv_heads) * u64::from(op.cache.head_dim),
            operations: 4 * u64::from(op.heads) * u64::from(op.cache.head_dim),
            each_token: true,
        },
        _ => {
            let sum = |of: fn(&Matrix) -> u32| {
                let rows = |m: &Matrix| u64::from(m.rows) * u64::from(of(m));
                op.matrices.iter().map(rows).sum()
            };
            Cost {
                bytes: sum(|m| m.row_bytes),
                operations: sum(|_| 2) * len,
                each_token: false,
            }
        }
    }
}

/// What a launch has room for in shared memory.
#[derive(Clone, Copy)]
pub(super) struct Room {
    pub(super) ring_bytes: u32,
    /// The largest turns for which the ring has room.
    pub(super) turns: u32,
    pub(super) turn_tiles: u32,
    pub(super) row_bytes: u32,
    pub(super) shared: usize,
}

/// Most tiles of a turn.
const MAX_TILES: u32 = 2;
/// Fewer turns do not keep the memory at work.
const FEW_TURNS: u32 = 4;

/// The largest turns of which a ring has enough beside the rows of `ops`.
///
/// # Errors
/// Where not even one fits.
fn room<D: Driver>(driver: &D, ops: &[Op], shared: usize) -> Result<Room> {
    let attention = ops.iter().filter(|op| op.kind == kind::ATTEND);
    let attend = attention.map(|op| decode::attend_bytes(op.heads / op.cache.kv_heads.max(1)));
    let attend = attend.max().unwrap_or(0);
    let products = ops.iter().filter(|op| is_product(op));
    let rows = products.map(|op| {
        let cols = op.input.len.next_multiple_of(GROUP as u32);
        decode::row_bytes(cols, op.input.keep_f32 != 0)
    });
    let row = rows.max().unwrap_or(0);
    let (row_bytes, ring_bytes) = decode::rooms(row, attend, shared as u32);
    let mut turn = 0;
    for turn_tiles in (1..=MAX_TILES).rev() {
        turn = ops
            .iter()
            .map(|op| turn_bytes(op, turn_tiles))
            .max()
            .unwrap_or(0);
        let turns = if turn_tiles > 1 { FEW_TURNS } else { 1 };
        if turns * turn <= ring_bytes {
            return Ok(Room {
                ring_bytes,
                turns: MAX_TURNS.min(ring_bytes / turn.max(1)),
                turn_tiles,
                row_bytes,
                shared,
            });
        }
    }
    Err(Error::Device {
        device: driver.info().name.clone(),
        what: format!(
            "a decode step's rows take {row_bytes} bytes of shared memory, and a turn of their weights {turn}; it has \
             {shared}"
        ),
    })
}

/// Segments that lie behind operations.
#[derive(Clone, Copy)]
pub(super) struct Segments {
    /// Bytes from the first operation to them.
    pub(super) offset: usize,
    pub(super) count: u32,
}

/// What the device reads of a program: its operations, then their segments.
pub(super) fn listing(ops: &[Op]) -> (Vec<u8>, Segments) {
    let segments = ops.iter().enumerate();
    let mut segments: Vec<Segment> = segments
        .flat_map(|(i, op)| op.segments(i as u32))
        .filter(|s| s.first < s.end)
        .collect();
    let count = segments.len() as u32;
    segments.push(Segment {
        op: ops.len().saturating_sub(1) as u32,
        ..Segment::NONE
    });
    let mut listing = bytes(ops).to_vec();
    let offset = listing.len();
    listing.extend_from_slice(bytes(&segments));
    (listing, Segments { offset, count })
}

/// The bytes of plain data, as the device reads them.
fn bytes<T>(values: &[T]) -> &[u8] {
    // Only of `Op` and `Segment`, whose padding is never read.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
