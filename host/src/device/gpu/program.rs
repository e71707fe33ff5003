//! What follows from a decode step's operations before they are carried out: how their tasks fall to the blocks, what they
//! need of shared memory, what the device reads of them, what they cost.

use super::attending::share_attention;
use super::{Address, Driver};
use crate::error::{Error, Result};
use cuda_std::tensor::{Copied, Tiling};
use kernels::decode::{
    self, BATCH, Cached, INVERSE_UNIT, MAX_TURNS, Op, ROWS, Segment, Shares, WARPS, kind,
};
use kernels::types::{FLOATS, GROUP, Matrix, STRIP, TILE, type_bit};

/// What one launch carries, and with what shared memory.
pub(super) struct Plan {
    /// Those of a block follow from each other's [`Op::after`].
    pub(super) ops: Vec<Op>,
    /// How many a block takes.
    pub(super) count: u32,
    pub(super) room: Room,
}

/// Plans a launch of `ops`, one after the other: gives them the fields that follow from others, and cuts products in two.
///
/// # Errors
/// Where the shared memory has not even room for one turn of the weights beside a row, or a matrix is too tall.
pub(super) fn plan<D: Driver>(driver: &D, ops: &[Op], blocks: u32, shared: usize) -> Result<Plan> {
    let mut ops = ops.to_vec();
    share_attention(&mut ops, blocks);
    let mut groups = cut(&ops, blocks);
    let count = groups.len() as u32;
    let mut firsts = Vec::new();
    let mut index = 0;
    for group in &groups {
        let second = group.get(1).map(|op| op.shares);
        firsts.push((index, second.map_or(u32::MAX, Shares::first)));
        index += group.len() as u32;
    }
    for (i, group) in groups.iter_mut().enumerate() {
        let after = firsts.get((i + 2) % firsts.len());
        for op in group {
            (op.after, op.after_second) = after.copied().unwrap_or_default();
        }
    }
    let mut ops = groups.concat();
    let room = room(driver, &ops, shared)?;
    for op in &mut ops {
        let tasks = op.count_tasks();
        if tasks >= 1 << 16 {
            return Err(Error::Device {
                device: driver.info().name.clone(),
                what: format!(
                    "a matrix of {} rows in a decode step, too many",
                    op.matrices[0].rows
                ),
            });
        }
        let shares = op.shares;
        let most = tasks.div_ceil(shares.blocks());
        op.team = team(op, most, &room);
        op.teams = WARPS / op.team;
        op.divisor = divisor(op, most);
        op.inverse = INVERSE_UNIT.div_ceil(op.divisor);
        op.turns = turns(op, &room);
        let parts = parts(op.input.len);
        op.alone = u32::from(op.teams == 1 && parts <= WARPS);
        op.group = op.heads / op.cache.kv_heads.max(1);
        op.shares = Shares::of(tasks, shares.first(), shares.blocks());
        if op.kind == kind::ATTEND && op.ringed() {
            op.room = decode::turns_in(room.ring_bytes, cached_bytes(op));
        }
        op.input.inverse_len = 1.0 / op.input.len as f32;
    }
    balance(&mut ops, blocks);
    Ok(Plan { ops, count, room })
}

/// Most bytes of weights on their way to a multiprocessor: as many keep the memory at work. Where more wait for it, whoever looks for
/// another block's words waits behind them.
pub(super) const FLYING: u32 = 64 << 10;

/// Parts of a row of so many values.
fn parts(len: u32) -> u32 {
    decode::parts(len.div_ceil(GROUP as u32))
}

/// `ops`, those with a [`Op::cut`] in two, each for some of the blocks; and which blocks the others are for.
fn cut(ops: &[Op], blocks: u32) -> Vec<Vec<Op>> {
    // Buffers whose words are halves.
    let mut halved: Vec<*mut f32> = Vec::new();
    let mut groups = Vec::new();
    for op in ops {
        let mut op = *op;
        let is_halved = |x: *const f32| halved.iter().any(|h| h.cast_const() == x);
        op.input.halves = u32::from(is_halved(op.input.x));
        op.add_halves = u32::from(op.add != 0 && is_halved(op.out));
        if op.shares == Shares::NONE {
            op.shares = Shares::of(0, 0, blocks);
        }
        halved.retain(|h| *h != op.out);
        if op.cut == 0 {
            groups.push(vec![op]);
        } else {
            halved.push(op.out);
            groups.push(halves(&op, blocks).to_vec());
        }
    }
    groups
}

/// How a product is cut: so many strips of the row for so many blocks, the rest for the others.
#[derive(Clone, Copy)]
struct Cut {
    strips: u32,
    blocks: u32,
}

/// How a product without a norm that is added to its outputs is best cut in two, as [`Op::cut`] has it.
///
/// Where its tasks are long and few, a row takes longer to come than weights take to be multiplied: several looks for each warp, one
/// after the other. A half takes fewer, and two are for twice as many blocks.
pub(super) fn cut_of(matrix: &Matrix, blocks: u32) -> u32 {
    /// A look takes as long as so many parts.
    const LOOK: f64 = 3.0;
    let strip = (STRIP * GROUP) as u32;
    let (cols, tasks) = (matrix.cols, matrix.rows.div_ceil(ROWS));
    let warps = f64::from(WARPS);
    // Of a block that has most: how long from the input to the output, and parts of weights; and the latter of all blocks.
    let takes = |cols: u32, blocks: u32| {
        let parts = parts(cols);
        // Two parts at a time.
        let looks = parts.div_ceil(2 * WARPS);
        let most = f64::from(tasks.div_ceil(blocks) * parts) / warps;
        let mean = f64::from(tasks * parts) / f64::from(blocks) / warps;
        [LOOK * f64::from(looks) + most, most, mean]
    };
    // Weights that a block has more of than others hold all of them up, if later.
    let cost = |[path, most, mean]: [f64; 3]| path + most + 0.01 * mean;
    let cut_cost = |cut: &Cut| {
        let first = takes(cut.strips * strip, cut.blocks);
        let second = takes(cols - cut.strips * strip, blocks - cut.blocks);
        cost([0, 1, 2].map(|i| first[i].max(second[i])))
    };
    // Who reads the outputs looks at two words; of long rows at one part at a time.
    let long = parts(matrix.rows) > WARPS;
    let reads = 1.0 + if long { LOOK } else { 0.0 };
    let cuts = (1..cols.div_ceil(strip))
        .flat_map(|strips| (1..blocks).map(move |blocks| Cut { strips, blocks }));
    let best = cuts.min_by(|a, b| cut_cost(a).total_cmp(&cut_cost(b)));
    // Floats are many bytes, and hold up who multiplies them.
    let quantised = type_bit(matrix.ty) & FLOATS == 0;
    let fits = quantised && matrix.rows.is_multiple_of(4);
    let better = |cut: &Cut| fits && cut_cost(cut) + reads < cost(takes(cols, blocks));
    best.filter(better)
        .map_or(0, |cut| cut.strips | (cut.blocks << 16))
}

/// Both halves of a product: the first is added to its outputs, the second left behind them.
fn halves(op: &Op, blocks: u32) -> [Op; 2] {
    let [matrix, ..] = op.matrices;
    let cut = Cut {
        strips: op.cut & 0xffff,
        blocks: op.cut >> 16,
    };
    let op = Op { cut: 0, ..*op };
    let (mut first, mut second) = (op, op);
    first.matrices[0] = matrix.columns(0, Some(cut.strips));
    let cols = first.matrices[0].cols;
    first.input.len = cols;
    first.shares = Shares::of(0, 0, cut.blocks);
    second.matrices[0] = matrix.columns(cut.strips, None);
    second.input.x = op.input.x.wrapping_add(cols as usize);
    second.input.len -= cols;
    second.shares = Shares::of(0, cut.blocks, blocks - cut.blocks);
    second.add = 0;
    second.biases = [std::ptr::null(); 3];
    second.out = op.out.wrapping_add(matrix.rows as usize);
    [first, second]
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

/// Whether neighbours are in one team or in different ones, as [`Op::divisor`] has it, where a block has so many tasks: what leaves
/// the busiest of a multiprocessor's schedulers, each with every fourth warp, the least to do.
fn divisor(op: &Op, tasks: u32) -> u32 {
    const SCHEDULERS: u32 = 4;
    let parts = parts(op.input.len);
    let busiest = |divisor: &u32| {
        let mut loads = [0; SCHEDULERS as usize];
        for warp in 0..WARPS {
            let (whole, rest) = (warp / divisor, warp % divisor);
            let (number, member) = if *divisor == op.team {
                (whole, rest)
            } else {
                (rest, whole)
            };
            let own = tasks.min(BATCH).saturating_sub(number).div_ceil(op.teams);
            let each = parts.saturating_sub(member).div_ceil(op.team);
            loads[(warp % SCHEDULERS) as usize] += own * each;
        }
        loads.into_iter().max()
    };
    let either = [op.team, op.teams];
    either.into_iter().min_by_key(busiest).unwrap_or(op.team)
}

/// Bytes of the largest turn of an operation.
pub(super) fn turn_bytes(op: &Op, turn_tiles: u32) -> u32 {
    let segments = op.segments();
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
            let tasks = shares.of_block(block as u32);
            u64::from(tasks.end - tasks.first) * bytes
        };
        let with = op.shares.blocks();
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
    // Of a half, its columns' share.
    let bytes = |m: &Matrix| u64::from(m.rows) * u64::from(m.length());
    op.matrices.iter().map(bytes).sum()
}

pub(super) fn is_product(op: &Op) -> bool {
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
    let len = u64::from(op.input.len);
    match op.kind {
        // One row of its matrix, scaled.
        kind::EMBED => Cost {
            bytes: u64::from(op.matrices[0].length()),
            operations: len,
            each_token: false,
        },
        // Keys and values; query heads of a group share them. Scores and their sum are two products.
        kind::ATTEND => Cost {
            bytes: 2 * u64::from(op.cache.kv_heads) * u64::from(op.row_bytes),
            operations: 4 * u64::from(op.heads) * u64::from(op.cache.head_dim),
            each_token: true,
        },
        _ => {
            let sum = |of: fn(&Matrix) -> u32| {
                let rows = |m: &Matrix| u64::from(m.rows) * u64::from(of(m));
                op.matrices.iter().map(rows).sum()
            };
            Cost {
                bytes: sum(Matrix::length),
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
    let attention = || ops.iter().filter(|op| op.kind == kind::ATTEND);
    let attend = attention().map(|op| {
        let group = op.heads / op.cache.kv_heads.max(1);
        decode::attend_bytes(group, op.cache.head_dim, op.ringed())
    });
    let attend = attend.max().unwrap_or(0);
    // Keys and values that come through the ring.
    let ringed = attention().filter(|op| op.ringed());
    let cached = ringed.map(cached_bytes).max();
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
        let cached_fits = cached.is_none_or(|bytes| decode::turns_in(ring_bytes, bytes) > 0);
        if turns * turn <= ring_bytes && cached_fits {
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
            "a decode step's rows take {row_bytes} bytes of shared memory, a turn of their weights {turn}, and one of keys \
             and values {}; it has {shared}",
            cached.unwrap_or(0)
        ),
    })
}

/// Bytes of a turn of an attention's keys and values.
fn cached_bytes(op: &Op) -> u32 {
    decode::turn_bytes(op.cache.head_dim, op.row_bytes, op.quantised != 0)
}

/// What lies behind operations, in bytes from the first of these on.
#[derive(Clone, Copy)]
pub(super) struct Behind {
    /// Each block's tasks of each.
    pub(super) tasks: usize,
    /// Their segments, and how many.
    pub(super) segments: usize,
    pub(super) segment_count: u32,
    /// [`DecodeArgs::maps`](decode::DecodeArgs::maps), if there are any.
    pub(super) maps: Option<usize>,
}

/// What the device reads of a program: its operations, each block's tasks, segments, and what the copy engine knows of the cache.
///
/// # Errors
/// Those of the driver.
pub(super) fn listing<D: Driver>(
    driver: &mut D,
    ops: &[Op],
    blocks: u32,
) -> Result<(Vec<u8>, Behind)> {
    // Values of a layer are as far from the first ones as its keys are: a layer's rows have one number for both.
    let boxed = |op: &&Op| op.kind == kind::ATTEND && op.ringed() && op.quantised == 0;
    let boxed = ops.iter().filter(boxed).map(|op| op.cache);
    let keys = boxed.clone().map(|cache| cache.keys.cast_const()).min();
    let values = boxed.clone().map(|cache| cache.values.cast_const()).min();
    let mut segments = Vec::new();
    for op in ops {
        segments.extend(op.segments().into_iter().filter(|s| s.first < s.end));
        segments.extend(op.cached(keys).map(Cached::segment));
    }
    let segment_count = segments.len() as u32;
    segments.push(Segment::NONE);
    let tasks: Vec<u32> = ops
        .iter()
        .flat_map(|op| (0..blocks).map(|block| op.shares.of_block(block).word()))
        .collect();
    let mut listing = bytes(ops).to_vec();
    let mut append = |bytes: &[u8], align: usize| {
        listing.resize(listing.len().next_multiple_of(align), 0);
        let at = listing.len();
        listing.extend_from_slice(bytes);
        at
    };
    let tasks = append(bytes(&tasks), align_of::<u32>());
    let segments = append(bytes(&segments), align_of::<Segment>());
    let mut maps = None;
    if let (Some(keys), Some(values), Some(cache)) = (keys, values, boxed.clone().next())
        && driver.copy_engine()
    {
        let mut map = |first: *const u8| {
            driver.tensor_map(&Tiling {
                address: first as Address,
                // How many there are says only what lies outside of it.
                rows: i32::MAX as u32,
                cols: cache.head_dim,
                stride: 2 * u64::from(cache.head_dim),
                box_rows: decode::TURN,
                copy: Copied::Rows,
            })
        };
        maps = Some(append(bytes(&[map(keys)?, map(values)?]), TENSOR_MAP_ALIGN));
    }
    let behind = Behind {
        tasks,
        segments,
        segment_count,
        maps,
    };
    Ok((listing, behind))
}

/// The copy engine wants its maps at multiples of this.
const TENSOR_MAP_ALIGN: usize = 64;

/// The bytes of plain data, as the device reads them.
pub(super) fn bytes<T: Copy>(values: &[T]) -> &[u8] {
    // Only of `Op`, `Segment`, `TensorMap`, `DrawRow` and numbers, whose padding is never read.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use gguf::GgmlType;
    use kernels::types::LAYOUTS;

    /// An H100's.
    pub(in super::super) const BLOCKS: u32 = 132;

    pub(in super::super) fn matrix(ty: GgmlType, rows: u32, cols: u32) -> Matrix {
        let layout = LAYOUTS.iter().find(|l| l.ty == ty as u32).unwrap();
        layout.matrix(rows as usize, cols as usize, 0x10000 as *const u8)
    }

    #[test]
    fn long_products_of_few_rows_are_cut_and_others_are_not() {
        let cut = |ty, rows, cols| cut_of(&matrix(ty, rows, cols), BLOCKS);
        // The last products of a layer of Qwen 2.5 0.5B and 1.5B, and Qwen 3 8B.
        for (rows, cols) in [(896, 4864), (1536, 8960), (4096, 12288)] {
            assert_ne!(cut(GgmlType::Q4_K, rows, cols), 0, "{rows}×{cols}");
        }
        // SmolLM2 135M's, of less than two looks; Llama 3 8B's, whose seven strips have no middle; attention's, which others read;
        // gates; floats.
        assert_eq!(cut(GgmlType::Q4_1, 576, 1536), 0);
        assert_eq!(cut(GgmlType::Q4_K, 4096, 14336), 0);
        assert_eq!(cut(GgmlType::Q4_K, 4096, 4096), 0);
        assert_eq!(cut(GgmlType::Q4_K, 14336, 4096), 0);
        assert_eq!(cut(GgmlType::F16, 2048, 8192), 0);
    }

    #[test]
    fn turns_lie_in_memory_as_they_do_in_shared_memory() {
        for ty in [
            GgmlType::Q4_1,
            GgmlType::Q5_0,
            GgmlType::Q8_0,
            GgmlType::Q4_K,
            GgmlType::Q6_K,
        ] {
            for cols in [256, 768, 1024, 1536, 2048, 2304, 4096, 14336] {
                let m = matrix(ty, 64, cols);
                let op = Op {
                    kind: kind::PRODUCT,
                    matrices: [m, kernels::types::NO_MATRIX, kernels::types::NO_MATRIX],
                    ..decode::NO_OP
                };
                let segment = op.segments()[0];
                assert_eq!(segment.whole, cols / 2048, "{ty:?} {cols}");
                assert_eq!(segment.tail_bytes[0] == 0, cols % 2048 == 0);
                for strip in 0..cols.div_ceil(2048) {
                    // An odd number of 16 bytes, which a turn of two tiles has all of.
                    let [stride, second] = segment.strides(strip);
                    assert_eq!((stride % 32, second), (16, stride), "{ty:?} {cols}");
                    let first = segment.turn_bytes(2) == 16 * stride;
                    assert!(first || strip > 0, "{ty:?} {cols}");
                }
            }
        }
    }

    #[test]
    fn halves_cover_all_columns_and_every_task_once() {
        for (rows, cols) in [(896, 4864), (1536, 8960), (4096, 12288)] {
            let whole = matrix(GgmlType::Q6_K, rows, cols);
            let op = Op {
                kind: kind::PRODUCT,
                add: 1,
                matrices: [whole, kernels::types::NO_MATRIX, kernels::types::NO_MATRIX],
                cut: cut_of(&whole, BLOCKS),
                ..decode::NO_OP
            };
            let op = Op {
                input: decode::Input {
                    len: cols,
                    ..op.input
                },
                ..op
            };
            let [first, second] = halves(&op, BLOCKS);
            assert_eq!(first.input.len + second.input.len, cols);
            let [a, b] = [first, second].map(|op| op.matrices[0]);
            assert_eq!(a.length() + b.length(), whole.length());
            let strips = a.cols as usize / (STRIP * GROUP);
            let before = strips * 8 * whole.row_bytes as usize;
            assert_eq!(b.base as usize - a.base as usize, before);
            assert_eq!((a.tail_bytes, b.tail_bytes), (0, whole.tail_bytes));
            assert_eq!((first.add, second.add), (1, 0));
            let mut seen = [vec![0; first.count_tasks() as usize], vec![]];
            seen[1] = seen[0].clone();
            for block in 0..BLOCKS {
                let mine = [first, second].map(|op| {
                    let shares = op.shares;
                    let shares = Shares::of(op.count_tasks(), shares.first(), shares.blocks());
                    shares.of_block(block)
                });
                assert!(
                    mine.iter().any(|tasks| tasks.first == tasks.end),
                    "one half a block"
                );
                for (seen, tasks) in seen.iter_mut().zip(mine) {
                    (tasks.first..tasks.end).for_each(|t| seen[t as usize] += 1);
                }
            }
            assert!(seen.iter().flatten().all(|n| *n == 1), "{rows}×{cols}");
        }
    }
}
