//! Matrix times 2 to 64 rows: what a step of several sequences, or a short prompt, consists of.
//!
//! Weights go from memory to tensor cores once, through registers alone: a lane loads a group of 32 weights of each of
//! four rows, and unpacks them to f16; so unpacked they *are* fragments of `mma.sync` m16n8k16, since which
//! column is which of a product's summands is free, as long as the input's fragments have the same order. The input
//! lies in shared memory in that order, brought by `cp.async` some steps ahead; weights are asked for in the second-level
//! cache as far ahead.
//!
//! Work is cut into *units* of [`BN`] matrix rows by [`BK`] columns, tile of rows by tile of rows, and each block takes
//! an equal run of them ("stream-K", arXiv:2301.03598), so that every multiprocessor has work whatever the matrix's
//! shape. A block leaves its sums of each tile, and [`skinny_join`] adds those up in the order of the columns.

use crate::dense::Part;
use crate::epilogue::silu;
use crate::types::{
    GROUP, Halves, Layout, Matrix, Quantised, Sixteen, TILE, for_each_type, without_files,
};
use crate::unrolled;
use core::marker::PhantomData;
use cuda_std::half::to_f16;
use cuda_std::int::quotient;
use cuda_std::memory::{
    cp_async_16_zfill, cp_async_commit, cp_async_wait, ld_v4_u32, ldg_f32, prefetch_l2,
    st_global_v4,
};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::{
    block_idx_x, griddepcontrol_launch_dependents, griddepcontrol_wait, sync_threads, thread_idx_x,
};
use cuda_std::{kernel, mma};

/// Threads per block, of the products and of [`skinny_join`].
pub const THREADS: u32 = 256;
/// Matrix rows of a unit: 32 a warp, so that two products share a fragment of the input.
pub const BN: u32 = THREADS;
/// Columns of a unit: four lanes' groups.
pub const BK: u32 = 4 * GROUP as u32;
/// Units whose input is in shared memory or on its way there.
const STAGES: u32 = 4;
/// Most input rows.
pub const ROWS: u32 = 64;
/// Input rows of a product.
const EIGHT: u32 = 8;

/// Eights of input rows.
const EIGHTS: usize = (ROWS / EIGHT) as usize;

/// Shared memory of a block for so many input rows.
pub const fn shared_bytes(rows: u32) -> usize {
    (STAGES * rows.div_ceil(EIGHT) * EIGHT * BK * 2) as usize
}

/// How a product is cut into units.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Units {
    /// Blocks that share them, no more than there are units.
    pub blocks: u32,
    /// Units of a tile of [`BN`] matrix rows.
    pub per_tile: u32,
    /// Of all tiles.
    pub count: u32,
    /// Eights of input rows.
    pub eights: u32,
}

impl Units {
    /// Of `parts` with `cols` columns each, times `rows` input rows, for `blocks` blocks at most.
    pub fn of(parts: &[Part], cols: u32, rows: u32, blocks: u32) -> Units {
        let per_tile = cols.div_ceil(BK);
        let tiles: u32 = parts.iter().map(tiles).sum();
        let count = tiles * per_tile;
        Units {
            blocks: if blocks < count { blocks } else { count },
            per_tile,
            count,
            eights: rows.div_ceil(EIGHT),
        }
    }

    /// The first unit of a block.
    #[inline(always)]
    fn start(&self, block: u32) -> u32 {
        // Whoever launches a kernel for nothing launches no block.
        unsafe { core::hint::assert_unchecked(self.blocks != 0) }
        (u64::from(block) * u64::from(self.count) / u64::from(self.blocks)) as u32
    }

    /// The block that has unit `unit`.
    #[inline(always)]
    fn block_of(&self, unit: u32) -> u32 {
        unsafe { core::hint::assert_unchecked(self.count != 0) }
        let past = u64::from(unit + 1) * u64::from(self.blocks) - 1;
        (past / u64::from(self.count)) as u32
    }

    /// Values of a block's sums of a tile.
    const fn slot(&self) -> usize {
        (BN * EIGHT * self.eights) as usize
    }

    /// f32 values of all sums: from a block's sums of a tile to the next sums either the block or the tile is another.
    pub const fn values(&self) -> usize {
        (self.count / self.per_tile + self.blocks) as usize * self.slot()
    }
}

/// Tiles of [`BN`] rows of a part.
#[inline(always)]
pub fn tiles(part: &Part) -> u32 {
    part.rows.div_ceil(BN)
}

/// Arguments of the products.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SkinnyArgs {
    /// Matrices of equally many columns, the last of them again where there are fewer than three.
    pub parts: [Part; 3],
    pub units: Units,
    /// f16 `[rows][cols]`, 16-byte aligned; `cols` is a multiple of 32.
    pub x: *const u16,
    pub rows: u32,
    pub cols: u32,
    /// f32, [`Units::values`] of them.
    pub sums: *mut f32,
}

/// How a type's groups become f16. Loading is apart, so that it is done by the time that a group is needed.
trait Fragments {
    const LAYOUT: Layout;
    type Raw: Copy;
    type Group: Copy;

    /// Group `g` of row `r` as it lies in memory.
    unsafe fn load(m: &Matrix, r: usize, g: usize) -> Self::Raw;

    fn group(raw: Self::Raw, g: usize) -> Self::Group;

    /// A quarter of the group.
    unsafe fn quarter(
        group: &Self::Group,
        quarter: usize,
        m: &Matrix,
        r: usize,
        g: usize,
    ) -> [u32; 4];
}

struct OfLevels<T>(PhantomData<T>);

impl<T: Quantised> Fragments for OfLevels<T> {
    const LAYOUT: Layout = T::LAYOUT;
    type Raw = T::Raw;
    type Group = Halves;

    #[inline(always)]
    unsafe fn load(m: &Matrix, r: usize, g: usize) -> T::Raw {
        unsafe { T::load(&m.row::<T>(r), g) }
    }

    #[inline(always)]
    fn group(raw: T::Raw, g: usize) -> Halves {
        Halves::of(T::levels(raw), T::affine(raw, g))
    }

    #[inline(always)]
    unsafe fn quarter(
        group: &Halves,
        quarter: usize,
        _m: &Matrix,
        _r: usize,
        _g: usize,
    ) -> [u32; 4] {
        unrolled!(4, |i| group.pair(4 * quarter + i))
    }
}

/// Floats come a quarter at a time: whole groups ahead would take more registers than there are.
struct OfFloats<T>(PhantomData<T>);

impl<T: Sixteen> Fragments for OfFloats<T> {
    const LAYOUT: Layout = T::LAYOUT;
    type Raw = ();
    type Group = ();

    #[inline(always)]
    unsafe fn load(_m: &Matrix, _r: usize, _g: usize) {}

    #[inline(always)]
    fn group(_raw: (), _g: usize) {}

    #[inline(always)]
    unsafe fn quarter(_group: &(), quarter: usize, m: &Matrix, r: usize, g: usize) -> [u32; 4] {
        unsafe { T::eight_f16(m, r, 4 * g + quarter) }
    }
}

/// The input's way into shared memory, [`STAGES`] units deep.
#[derive(Clone, Copy)]
struct Input {
    x: *const u16,
    rows: u32,
    cols: u32,
    /// Eights of rows.
    eights: u32,
    /// The stage that holds the next unit's.
    stage: u32,
    /// The next unit to ask for, as its tile counts them, of so many, and how many are left.
    unit: u32,
    per_tile: u32,
    left: u32,
    /// Whether the first have been asked for.
    begun: bool,
}

impl Input {
    /// Where the piece of 16 bytes is that a lane takes of eight input rows; `quarter` of a group.
    ///
    /// Pieces change places by quarter: threads that bring a row's in order write to different banks.
    #[inline(always)]
    fn piece(&self, stage: u32, eight: u32, quarter: u32, lane: u32) -> SharedPtr<u32> {
        let index = ((stage * self.eights + eight) * 4 + quarter) * 32 + (lane ^ (2 * quarter));
        shared::at(index * 16)
    }

    /// Asks for a unit's input, to lie in stage `stage`.
    #[inline(always)]
    unsafe fn ask(&mut self, stage: u32) {
        if self.left > 0 {
            let t = thread_idx_x();
            let (group, quarter) = (t / 4 % 4, t % 4);
            let column = self.unit * BK + t % 16 * 8;
            let mut row = t / 16;
            // Sixteen rows at a time.
            while row < self.eights * EIGHT {
                let inside = row < self.rows && column < self.cols;
                let to = self.piece(stage, row / EIGHT, quarter, row % EIGHT * 4 + group);
                unsafe {
                    // Outside nothing is read: the size of the source is zero, its address any.
                    let from = self.x.wrapping_add((row * self.cols + column) as usize);
                    let from = if inside { from } else { self.x };
                    cp_async_16_zfill(to, from, if inside { 16 } else { 0 });
                }
                row += THREADS / 16;
            }
            self.left -= 1;
            self.unit += 1;
            if self.unit == self.per_tile {
                self.unit = 0;
            }
        }
        cp_async_commit();
    }

    /// Asks for the first units', once, as soon as who makes the input is done.
    #[inline(always)]
    unsafe fn begin(&mut self) {
        if !self.begun {
            self.begun = true;
            griddepcontrol_wait();
            for stage in 0..STAGES - 1 {
                unsafe { self.ask(stage) };
            }
        }
    }

    /// Waits for the next unit's, and asks for one more in the place of the last.
    #[inline(always)]
    unsafe fn next(&mut self) -> u32 {
        cp_async_wait::<{ STAGES - 2 }>();
        // All have come, and all have left the stage before.
        sync_threads();
        let now = self.stage;
        let free = if now == 0 { STAGES - 1 } else { now - 1 };
        unsafe { self.ask(free) };
        self.stage = if now + 1 == STAGES { 0 } else { now + 1 };
        now
    }
}

/// A warp's sums: eights of input rows by two tiles of 16 matrix rows.
type Sums = [[[f32; 4]; 2]; EIGHTS];

/// Adds the products of a quarter of a unit's groups, of a lane's four rows, to a warp's sums.
// In the emulator once for all types: its products are long.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
#[cfg_attr(not(target_arch = "nvptx64"), inline(never))]
unsafe fn multiply(w: &[[u32; 4]; 4], input: &Input, at: (u32, u32), sums: &mut Sums) {
    let (stage, quarter) = at;
    for eight in 0..EIGHTS {
        if eight as u32 >= input.eights {
            break;
        }
        let x = input.piece(stage, eight as u32, quarter, thread_idx_x() % 32);
        let x = unsafe { x.load_v4() };
        for tile in 0..2 {
            let (upper, lower) = (&w[2 * tile], &w[2 * tile + 1]);
            for half in 0..2 {
                let i = 2 * half;
                let a = [upper[i], lower[i], upper[i + 1], lower[i + 1]];
                let sum = &mut sums[eight][tile];
                *sum = mma::m16n8k16_f16(a, [x[i], x[i + 1]], *sum);
            }
        }
    }
}

/// Units of a tile of groups.
const TILE_UNITS: u32 = TILE as u32 / 4;

/// How many units ahead weights are asked for in the second-level cache: what memory takes to answer. For all blocks
/// together that cache holds some eight.
const AHEAD: u32 = 3;

/// Whether a block may begin before its input is there.
const EARLY: bool = cfg!(cuda_sm_90);

/// Sectors of a row's planes in a unit, each where it begins in a tile and how far those of neighbouring units are apart.
const fn sectors(layout: Layout) -> ([(u32, u32); 16], usize) {
    const SECTOR: u32 = 32;
    let (mut all, mut n) = ([(0, 0); 16], 0);
    let mut plane = 0;
    while plane < layout.planes.len() {
        let start = layout.plane_offset(plane, TILE) as u32;
        let apart = (layout.tile_elements(plane) * layout.planes[plane].bytes) as u32 / TILE_UNITS;
        let mut at = 0;
        while at < apart {
            all[n] = (start + at, apart);
            n += 1;
            at += SECTOR;
        }
        plane += 1;
    }
    (all, n)
}

/// Asks for a unit of a warp's rows in the second-level cache; a lane is a row.
#[inline(always)]
unsafe fn prefetch<F: Fragments>(m: &Matrix, first: u32, unit: u32) {
    let row = first + thread_idx_x() % 32;
    let tile = unit as usize / TILE_UNITS as usize;
    if row < m.rows && tile * TILE < m.groups() {
        let (sectors, n) = const { sectors(F::LAYOUT) };
        let at = m.tile_at(&F::LAYOUT, row as usize, tile);
        for (start, apart) in sectors.into_iter().take(n) {
            let offset = start + unit % TILE_UNITS * apart;
            unsafe { prefetch_l2(at.wrapping_add(offset as usize)) }
        }
    }
}

/// Products of units `from .. to` of a tile whose first matrix row is `first`.
#[cfg_attr(target_arch = "nvptx64", inline(always))]
#[cfg_attr(not(target_arch = "nvptx64"), inline(never))]
unsafe fn walk<F: Fragments>(
    m: &Matrix,
    (first, end): (u32, u32),
    (from, to): (u32, u32),
    input: &mut Input,
) -> Sums {
    let t = thread_idx_x();
    let (warp, lane) = (t / 32, t % 32);
    let groups = m.groups() as u32;
    // Past the end the last is as good as any: what comes of it is not kept, or multiplied by zeros.
    let first = first + warp * 32;
    let row = |k: u32| {
        let row = first + k * 8 + lane / 4;
        if row < end { row } else { end - 1 }
    };
    let rows = [row(0), row(1), row(2), row(3)];
    let group = |unit: u32| {
        let g = unit * 4 + lane % 4;
        if g < groups { g } else { groups - 1 }
    };
    let load = |unit: u32| {
        let g = group(unit) as usize;
        unrolled!(4, |k| unsafe { F::load(m, rows[k] as usize, g) })
    };
    let mut sums = [[[0.0f32; 4]; 2]; EIGHTS];
    unsafe {
        let mut raw = load(from);
        if EARLY {
            // Weights are on their way before the input is there.
            for unit in from + 1..from + AHEAD {
                if unit < to {
                    prefetch::<F>(m, first, unit);
                }
            }
            input.begin();
        }
        let mut unit = from;
        while unit < to {
            if unit + AHEAD < to {
                prefetch::<F>(m, first, unit + AHEAD);
            }
            let stage = input.next();
            let g = group(unit) as usize;
            let groups = unrolled!(4, |k| F::group(raw[k], g));
            unit += 1;
            if unit < to {
                raw = load(unit);
            }
            let quarter = |quarter: usize| {
                unrolled!(4, |k| F::quarter(
                    &groups[k],
                    quarter,
                    m,
                    rows[k] as usize,
                    g
                ))
            };
            // Floats are on their way while those before are multiplied.
            let mut w = quarter(0);
            for now in 0..4 {
                let after = if now < 3 { quarter(now + 1) } else { w };
                multiply(&w, input, (stage, now as u32), &mut sums);
                w = after;
            }
        }
    }
    sums
}

macro_rules! by_type {
    ($($ty:literal => $name:ident, $kind:ident;)*) => {
        /// [`walk`] of whatever type the matrix has.
        #[inline(always)]
        unsafe fn walk_any(
            m: &Matrix,
            rows: (u32, u32),
            units: (u32, u32),
            input: &mut Input,
        ) -> Sums {
            unsafe {
                match m.ty {
                    $($ty => {
                        walk::<by_type!(@$kind $name)>(m, rows, units, input)
                    })*
                    _ => [[[0.0; 4]; 2]; EIGHTS],
                }
            }
        }
    };
    (@float $name:ident) => { OfFloats<crate::types::$name> };
    (@quantised $name:ident) => { OfLevels<crate::types::$name> };
}
for_each_type!(by_type);

/// The part that has tile `tile` of all tiles, and the tile's number in it.
#[inline(always)]
fn locate(parts: &[Part; 3], tile: u32) -> (Part, u32) {
    let [first, second] = [tiles(&parts[0]), tiles(&parts[1])];
    // Not indexed by a variable, for which the arguments would be copied to local memory.
    if tile < first {
        (parts[0], tile)
    } else if tile < first + second {
        (parts[1], tile - first)
    } else {
        (parts[2], tile - first - second)
    }
}

/// Sums of the products of this block's units. Grid: [`Units::blocks`].
#[kernel(launch_bounds(256, 1))]
pub unsafe fn skinny(a: SkinnyArgs) {
    let t = thread_idx_x();
    let block = block_idx_x();
    let (per_tile, eights) = (a.units.per_tile, a.units.eights);
    let (mut unit, end) = (a.units.start(block), a.units.start(block + 1));
    unsafe {
        let mut tile = quotient(unit, per_tile);
        let mut input = Input {
            x: a.x,
            rows: a.rows,
            cols: a.cols,
            eights,
            stage: 0,
            unit: unit - tile * per_tile,
            per_tile,
            left: end - unit,
            begun: false,
        };
        if !EARLY {
            input.begin();
        }
        while unit < end {
            let (part, number) = locate(&a.parts, tile);
            let start = tile * per_tile;
            let last = if end < start + per_tile {
                end
            } else {
                start + per_tile
            };
            let rows = (part.first + number * BN, part.first + part.rows);
            let units = (unit - start, last - start);
            let sums = walk_any(&part.matrix, rows, units, &mut input);
            // A lane's sums side by side: neighbours write neighbouring pieces, and the order is for who adds up to know.
            let to = a.sums.add((tile + block) as usize * a.units.slot());
            for eight in 0..EIGHTS {
                if (eight as u32) < eights {
                    for half in 0..2 {
                        let sixteen = t / 32 * 2 + half as u32;
                        let place = (sixteen * eights + eight as u32) * 32 + t % 32;
                        let sums = sums[eight][half].map(f32::to_bits);
                        st_global_v4(to.add(place as usize * 4), sums);
                    }
                }
            }
            unit = last;
            tile += 1;
        }
    }
}

/// Arguments of [`skinny_join`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct JoinArgs {
    pub parts: [Part; 3],
    pub units: Units,
    /// What the products left.
    pub sums: *const f32,
    /// 1: `out` is f32 `[rows][stride]`, parts side by side as their `out_row` says; 2: `silu(first) * second` of the
    /// first two parts in f16.
    pub ways: u32,
    pub out: *mut u8,
    pub rows: u32,
    pub stride: u32,
    /// Whether to add to what `out` holds; not of two ways.
    pub add: u32,
}

impl JoinArgs {
    /// Threads with something to do: four sums of one tile each, of two ways also of the other's.
    pub fn threads(&self) -> usize {
        let tiles = if self.ways == 2 {
            tiles(&self.parts[0])
        } else {
            self.units.count / self.units.per_tile
        };
        tiles as usize * self.units.slot() / 4
    }
}

/// Adds up what blocks have left of a tile, four values of a lane's.
#[inline(always)]
unsafe fn add_up(a: &JoinArgs, tile: u32, place: usize) -> [f32; 4] {
    let first = tile * a.units.per_tile;
    let last = a.units.block_of(first + a.units.per_tile - 1);
    let mut block = a.units.block_of(first);
    let mut sums = [0.0f32; 4];
    while block <= last {
        let slot = (tile + block) as usize * a.units.slot();
        let more = unsafe { ld_v4_u32(a.sums.add(slot + place * 4)) };
        for i in 0..4 {
            sums[i] += f32::from_bits(more[i]);
        }
        block += 1;
    }
    sums
}

/// The bias of row `row` of a part.
#[inline(always)]
unsafe fn bias(part: &Part, row: u32) -> f32 {
    if part.bias.is_null() {
        0.0
    } else {
        unsafe { ldg_f32(part.bias.add((part.first + row) as usize)) }
    }
}

/// `x Wᵀ + b` of what the products have left, or `out += …`, or `silu(x Gᵀ + g) * (x Uᵀ + u)`.
#[kernel(launch_bounds(256, 2))]
pub unsafe fn skinny_join(a: JoinArgs) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    let i = block_idx_x() * THREADS + thread_idx_x();
    let per_tile = (a.units.slot() / 4) as u32;
    unsafe {
        let tile = quotient(i, per_tile);
        let place = i - tile * per_tile;
        let of_second = tile + tiles(&a.parts[0]);
        let all = if a.ways == 2 {
            of_second - tile
        } else {
            quotient(a.units.count, a.units.per_tile)
        };
        if tile >= all {
            return;
        }
        let (part, number) = locate(&a.parts, tile);
        // The place of a lane's first sum in the tile, and its input row.
        let eights = a.units.eights;
        let (lane, sixteen) = (place % 32, quotient(place / 32, eights));
        let column = number * BN + sixteen * 16 + lane / 4;
        let row = (place / 32 - sixteen * eights) * EIGHT + lane % 4 * 2;
        let sums = add_up(&a, tile, place as usize);
        let second = if a.ways == 2 {
            add_up(&a, of_second, place as usize)
        } else {
            [0.0; 4]
        };
        for i in 0..4 {
            let (row, column) = (row + i as u32 % 2, column + i as u32 / 2 * 8);
            if row >= a.rows || column >= part.rows {
                continue;
            }
            let v = sums[i] + bias(&part, column);
            let at = row as usize * a.stride as usize + (part.out_row + column) as usize;
            if a.ways == 2 {
                let up = second[i] + bias(&a.parts[1], column);
                a.out.cast::<u16>().add(at).write(to_f16(silu(v) * up));
            } else {
                let out = a.out.cast::<f32>().add(at);
                out.write(if a.add != 0 { out.read() + v } else { v });
            }
        }
    }
}
