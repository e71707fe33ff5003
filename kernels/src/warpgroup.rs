//! Matrix times many rows on Hopper: [`crate::dense`] with the products of warpgroups (`wgmma`), to which the copy
//! engine brings tiles. A module of its own, `sm_90a`, has these kernels alone.
//!
//! Two warpgroups take 64 input rows each, and share the tile of weights. A ninth warp does nothing but ask for
//! tiles: [`BK`] columns a stage, as many stages ahead as shared memory holds. A stage has two barriers: it is full
//! when all its bytes have come, and empty when both warpgroups have multiplied it.

use crate::epilogue::{self, Output};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::tensor::{self, BOX_COLS, TensorMap};
use cuda_std::thread::{block_idx_x, block_idx_y, sync_threads, thread_idx_x};
use cuda_std::{argument, kernel, mbarrier, warp, wgmma};

/// Threads per block: two warpgroups, and the warp that asks.
pub const THREADS: u32 = 288;
/// Threads of both warpgroups.
const CONSUMERS: u32 = 256;
/// Input rows of a block.
pub const BM: usize = 128;
/// Columns per stage.
pub const BK: usize = BOX_COLS as usize;
const X_BYTES: usize = BM * BK * 2;
/// Tiles lie at multiples of it.
const ALIGNMENT: usize = 1024;
/// What stages may take: all that a block can have, less barriers and alignment.
const BUDGET: usize = 224 << 10;

const fn stage_bytes(bn: usize) -> usize {
    X_BYTES + bn * BK * 2
}

const fn stages(bn: usize) -> usize {
    BUDGET / stage_bytes(bn)
}

/// Shared memory of a block for `bn` matrix rows: barriers, then stages.
pub const fn shared_bytes(bn: usize) -> usize {
    2 * ALIGNMENT + stages(bn) * stage_bytes(bn)
}

/// Arguments of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct WarpgroupArgs {
    /// f16 `[rows][cols]`, boxes of [`BM`] rows.
    pub x: TensorMap,
    /// f16 `[n][cols]` as [`crate::dense::dequantise`] wrote it, boxes of as many rows as the kernel's name says last.
    pub w: TensorMap,
    pub cols: u32,
    pub to: Output,
}

/// The barriers of a stage: full, empty.
#[inline(always)]
fn barrier(stage: u32, empty: u32) -> SharedPtr<u64> {
    shared::at(stage * 16 + empty * 8)
}

/// A block's product. `multiply` takes the tiles of one stage, `store` a lane's sums, of the input row and
/// the matrix row that it is told.
#[inline(always)]
unsafe fn block<const BN: usize, const TILES: usize>(
    a: *const WarpgroupArgs,
    cols: u32,
    multiply: impl Fn(SharedPtr<u16>, SharedPtr<u16>, [[f32; 4]; TILES]) -> [[f32; 4]; TILES],
    store: impl Fn((usize, usize), [[f32; 4]; TILES]),
) {
    let t = thread_idx_x();
    let stages = stages(BN) as u32;
    let bytes = stage_bytes(BN) as u32;
    // Barriers come first, the stages at the next multiple.
    let start = (shared::at::<u8>(0).addr() + ALIGNMENT as u32).next_multiple_of(ALIGNMENT as u32);
    let (first_m, first_n) = (block_idx_x() * BM as u32, block_idx_y() * BN as u32);
    let turns = cols.div_ceil(BK as u32);
    unsafe {
        if t == 0 {
            for stage in 0..stages {
                mbarrier::init(barrier(stage, 0), 1);
                mbarrier::init(barrier(stage, 1), CONSUMERS);
            }
            mbarrier::show_to_copies();
        }
        sync_threads();
        if t >= CONSUMERS {
            if warp::elect() {
                let (mut stage, mut parity) = (0, 1);
                for turn in 0..turns {
                    mbarrier::wait(barrier(stage, 1), parity);
                    let (full, at) = (barrier(stage, 0), start + stage * bytes);
                    let column = turn * BK as u32;
                    mbarrier::arrive_expecting(full, bytes);
                    let x = SharedPtr::from_addr(at);
                    tensor::copy_box(x, &raw const (*a).x, first_m, column, full);
                    let w = x.byte_add(X_BYTES as u32);
                    tensor::copy_box(w, &raw const (*a).w, first_n, column, full);
                    stage += 1;
                    if stage == stages {
                        (stage, parity) = (0, parity ^ 1);
                    }
                }
            }
            return;
        }
        let group = t / 128;
        let mut sums = [[0.0; 4]; TILES];
        let (mut stage, mut parity) = (0, 0);
        for _ in 0..turns {
            mbarrier::wait(barrier(stage, 0), parity);
            let at = start + stage * bytes;
            let x = SharedPtr::from_addr(at + group * 64 * BK as u32 * 2);
            sums = multiply(x, SharedPtr::from_addr(at + X_BYTES as u32), sums);
            mbarrier::arrive(barrier(stage, 1));
            stage += 1;
            if stage == stages {
                (stage, parity) = (0, parity ^ 1);
            }
        }
        let row = first_m + t / 32 * 16 + t % 32 / 4;
        store((row as usize, (first_n + t % 4 * 2) as usize), sums);
    }
}

/// `out = x Wᵀ + b`, or `out += …`, a block 128 input rows by 256 matrix rows. Grid: input rows, matrix
/// rows, so that neighbouring blocks share weights, and those pass through the caches once.
#[kernel(launch_bounds(288, 1))]
pub unsafe fn warpgroup_128x256(a: WarpgroupArgs) {
    unsafe {
        block::<256, 32>(
            argument!(warpgroup_128x256, a),
            a.cols,
            |x, w, sums| wgmma::m64n256k64_f16(x, w, sums),
            |first, sums| epilogue::store(&a.to, first, &sums, 32),
        );
    }
}

/// The same, a block 128 input rows by 128 matrix rows.
#[kernel(launch_bounds(288, 1))]
pub unsafe fn warpgroup_128x128(a: WarpgroupArgs) {
    unsafe {
        block::<128, 16>(
            argument!(warpgroup_128x128, a),
            a.cols,
            |x, w, sums| wgmma::m64n128k64_f16(x, w, sums),
            |first, sums| epilogue::store(&a.to, first, &sums, 16),
        );
    }
}

/// `silu(x Gᵀ + g) * (x Uᵀ + u)` in f16, of matrix rows that [`crate::dense::dequantise`] laid in two ways: eight of
/// the gate, eight of up. A block 128 input rows by 256 matrix rows; `n` is a multiple of 16.
#[kernel(launch_bounds(288, 1))]
pub unsafe fn warpgroup_gate_up_128x256(a: WarpgroupArgs) {
    unsafe {
        block::<256, 32>(
            argument!(warpgroup_gate_up_128x256, a),
            a.cols,
            |x, w, sums| wgmma::m64n256k64_f16(x, w, sums),
            |first, sums| epilogue::store_gate_up(&a.to, first, &sums, 32),
        );
    }
}

/// The same, a block 128 input rows by 128 matrix rows.
#[kernel(launch_bounds(288, 1))]
pub unsafe fn warpgroup_gate_up_128x128(a: WarpgroupArgs) {
    unsafe {
        block::<128, 16>(
            argument!(warpgroup_gate_up_128x128, a),
            a.cols,
            |x, w, sums| wgmma::m64n128k64_f16(x, w, sums),
            |first, sums| epilogue::store_gate_up(&a.to, first, &sums, 16),
        );
    }
}
