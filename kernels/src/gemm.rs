//! Matrix times several rows on tensor cores: `mma.sync` m16n8k16, f16 operands, f32 sums. For many
//! rows see [`crate::dense`].
//!
//! A block computes a tile of [`BN`] matrix rows for `32 * MT` input rows. Per step of [`BK`]
//! columns, each of its 256 threads unpacks one group of weights from quantised form straight into
//! shared memory as f16, while `cp.async` brings the input rows; two stages alternate, so that the loads
//! of the next step run beside the products of this one.

use crate::types::{GROUP, Matrix, unpack_f16};
use cuda_std::memory::{cp_async_16_zfill, cp_async_commit, cp_async_wait, ldg_f32};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::{block_idx_x, block_idx_y, sync_threads, thread_idx_x};
use cuda_std::{kernel, mma, thread};

/// Threads per block: two warps along the input rows, four along the matrix rows.
pub const THREADS: u32 = 256;
/// Matrix rows per block.
pub const BN: usize = 128;
/// Columns per step.
pub const BK: usize = 64;
/// Bytes of a row of a tile in shared memory.
const ROW_BYTES: usize = BK * 2;

/// Shared memory of a block with `mt` tiles of 16 input rows per warp.
pub const fn shared_bytes(mt: usize) -> usize {
    2 * (BN + 32 * mt) * ROW_BYTES
}

/// Arguments of the `gemm` kernels.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmArgs {
    pub matrix: Matrix,
    pub bias: *const f32,
    /// f16 `[rows][matrix.cols]`, 16-byte aligned.
    pub x: *const u16,
    pub rows: u32,
    /// f32 `[rows][matrix rows]`.
    pub out: *mut f32,
    pub add: u32,
}

/// Byte offset of 16-byte piece `piece` of row `row`: pieces change places by row, so that a column of
/// them, as `ldmatrix` reads it, touches every bank once.
#[inline(always)]
fn swizzle(row: usize, piece: usize) -> usize {
    row * ROW_BYTES + ((piece ^ (row & 7)) * 16)
}

/// Starts the copy of one step's input rows.
#[inline(always)]
unsafe fn load_x<const MT: usize>(a: &GemmArgs, tile: usize, first_row: usize, k: usize) {
    let cols = a.matrix.cols as usize;
    let t = thread_idx_x() as usize;
    for i in 0..MT {
        let piece = t + i * THREADS as usize;
        let (row, p) = (piece / 8, piece % 8);
        let (r, c) = (first_row + row, k + p * 8);
        let inside = r < a.rows as usize && c < cols;
        unsafe {
            // Outside the matrix nothing is read: the size of the source is zero, its address any.
            let source = if inside { a.x.add(r * cols + c) } else { a.x };
            cp_async_16_zfill(
                shared::at::<u8>((tile + swizzle(row, p)) as u32),
                source,
                if inside { 16 } else { 0 },
            );
        }
    }
}

/// Unpacks this thread's group of one step's weights.
#[inline(always)]
unsafe fn unpack_w(m: &Matrix, first_row: usize, k: usize) -> [u32; 16] {
    let t = thread_idx_x() as usize;
    let r = first_row + t / 2;
    let g = k / GROUP + t % 2;
    if r < m.rows as usize && g < m.groups() {
        unsafe { unpack_f16(m, r, g) }
    } else {
        [0; 16]
    }
}

/// Stores what [`unpack_w`] gave.
#[inline(always)]
unsafe fn store_w(tile: usize, w: &[u32; 16]) {
    let t = thread_idx_x() as usize;
    for i in 0..4 {
        let p = shared::at::<u32>((tile + swizzle(t / 2, (t % 2) * 4 + i)) as u32);
        unsafe { p.store_v4([w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]]) };
    }
}

/// Four 8×8 matrices for a lane that names row `row` and piece `piece` of a tile.
#[inline(always)]
unsafe fn fragment(tile: usize, row: usize, piece: usize) -> [u32; 4] {
    let at: SharedPtr<u16> = shared::at((tile + swizzle(row, piece)) as u32);
    unsafe { mma::ldmatrix_x4(at) }
}

#[inline(always)]
unsafe fn gemm<const MT: usize>(a: &GemmArgs) {
    let t = thread_idx_x() as usize;
    let (warp_index, lane) = (t / 32, thread::lane_id() as usize);
    let (warp_m, warp_n) = (warp_index / 4, warp_index % 4);
    let first_n = block_idx_x() as usize * BN;
    let first_m = block_idx_y() as usize * 32 * MT;
    let w_bytes = BN * ROW_BYTES;
    let stage_bytes = shared_bytes(MT) / 2;
    let cols = a.matrix.cols as usize;
    let mut sums = [[[0.0f32; 4]; 4]; MT];
    unsafe {
        load_x::<MT>(a, w_bytes, first_m, 0);
        cp_async_commit();
        store_w(0, &unpack_w(&a.matrix, first_n, 0));
        let (mut k, mut stage) = (0, 0);
        while k < cols {
            cp_async_wait::<0>();
            sync_threads();
            let (now, next) = (stage * stage_bytes, (stage ^ 1) * stage_bytes);
            let more = k + BK < cols;
            let mut w = [0; 16];
            if more {
                load_x::<MT>(a, next + w_bytes, first_m, k + BK);
                cp_async_commit();
                w = unpack_w(&a.matrix, first_n, k + BK);
            }
            for kk in 0..BK / 16 {
                // Lanes 0–15 name rows 0–15 of the first eight columns, lanes 16–31 of the last eight.
                let mut x = [[0; 4]; MT];
                for (i, x) in x.iter_mut().enumerate() {
                    let row = (warp_m * MT + i) * 16 + lane % 16;
                    *x = fragment(now + w_bytes, row, kk * 2 + lane / 16);
                }
                for pair in 0..2 {
                    // Two tiles of eight matrix rows: (first, k low), (first, k high), (second, …).
                    let row = warp_n * 32 + pair * 16 + (lane / 16) * 8 + lane % 8;
                    let b = fragment(now, row, kk * 2 + (lane / 8) % 2);
                    for i in 0..MT {
                        for half in 0..2 {
                            let sum = &mut sums[i][pair * 2 + half];
                            *sum = mma::m16n8k16_f16(x[i], [b[half * 2], b[half * 2 + 1]], *sum);
                        }
                    }
                }
            }
            if more {
                store_w(next, &w);
            }
            k += BK;
            stage ^= 1;
        }
        let n = a.matrix.rows as usize;
        for i in 0..MT {
            for j in 0..4 {
                for e in 0..4 {
                    let r = first_m + (warp_m * MT + i) * 16 + lane / 4 + (e / 2) * 8;
                    let c = first_n + warp_n * 32 + j * 8 + (lane % 4) * 2 + e % 2;
                    if r < a.rows as usize && c < n {
                        let mut v = sums[i][j][e];
                        if !a.bias.is_null() {
                            v += ldg_f32(a.bias.add(c));
                        }
                        let out = a.out.add(r * n + c);
                        out.write(if a.add != 0 { out.read() + v } else { v });
                    }
                }
            }
        }
    }
}

/// `out = x Wᵀ + b`, or `out += …`, 32 input rows a block. Grid: `(matrix rows / 128, rows / 32)`.
#[kernel(launch_bounds(256))]
pub unsafe fn gemm_32(a: GemmArgs) {
    unsafe { gemm::<1>(&a) }
}

/// The same, 64 input rows a block.
#[kernel(launch_bounds(256))]
pub unsafe fn gemm_64(a: GemmArgs) {
    unsafe { gemm::<2>(&a) }
}
