//! Matrix times many rows: [`dequantise`] writes a slice of matrices as f16 to scratch memory, once for all
//! rows, and the `dense` kernels multiply with it. Unpacking takes a pass over memory more than
//! [`crate::skinny`] does, but runs at its bandwidth, and products without it keep tensor cores busy.
//!
//! A `dense` block of four warps computes a tile of the output, `mma.sync` m16n8k16 with f16 operands
//! and f32 sums. `cp.async` keeps [`STAGES`] steps of [`BK`] columns in flight; a warp reads the fragments
//! of the next 16 columns while tensor cores multiply the present ones.

use crate::epilogue::{self, Output};
use crate::types::{GROUP, Matrix, unpack_f16};
use cuda_std::memory::{cp_async_16_zfill, cp_async_commit, cp_async_wait, ldg_f32, st_global_v4};
use cuda_std::shared::{self, SharedPtr};
use cuda_std::thread::{block_idx_x, block_idx_y, sync_threads, thread_idx_x};
use cuda_std::{kernel, mma, warp};

/// Threads per block of a product: two warps along the input rows, two along the matrix rows.
pub const THREADS: u32 = 128;
/// Columns per step.
pub const BK: usize = 64;
/// Steps in shared memory.
pub const STAGES: usize = 3;
const ROW_BYTES: usize = BK * 2;

/// Shared memory of a block for `bm` input rows and `bn` matrix rows.
pub const fn shared_bytes(bm: usize, bn: usize) -> usize {
    STAGES * (bm + bn) * ROW_BYTES
}

/// Threads per block of [`dequantise`].
pub const DEQUANTISE_THREADS: u32 = 128;
/// Shared memory of a block of [`dequantise`].
pub const DEQUANTISE_SHARED: usize = DEQUANTISE_THREADS as usize * GROUP * 2;

/// Rows of a matrix to be unpacked, and where to.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Part {
    pub matrix: Matrix,
    /// f32 of the matrix's rows, or null.
    pub bias: *const f32,
    /// First row to be taken.
    pub first: u32,
    pub rows: u32,
    /// The row of the output it goes to.
    pub out_row: u32,
}

/// Arguments of [`dequantise`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DequantiseArgs {
    pub parts: [Part; 3],
    /// 1 to lay row after row, 2 to leave room for eight rows of another part after each eight.
    pub ways: u32,
    /// f16 `[rows][cols]`.
    pub out: *mut u16,
    /// f32 `[rows]`.
    pub bias: *mut f32,
}

/// Unpacks rows of up to three matrices of equally many columns, and their biases, zeros where there
/// are none. Block `y` is a part, a thread a group of its weights.
#[kernel(launch_bounds(128))]
pub unsafe fn dequantise(a: DequantiseArgs) {
    // Not indexed by a variable, for which the arguments would be copied to local memory.
    let part = match block_idx_y() {
        0 => a.parts[0],
        1 => a.parts[1],
        _ => a.parts[2],
    };
    let m = &part.matrix;
    let groups = m.groups();
    let total = part.rows as usize * groups;
    let t = thread_idx_x() as usize;
    let lane = t % 32;
    let warp_first = block_idx_x() as usize * DEQUANTISE_THREADS as usize + t - lane;
    let out_row = |r: usize| part.out_row as usize + r / 8 * (8 * a.ways as usize) + r % 8;
    // Through shared memory, so that neighbouring lanes write neighbouring pieces.
    let staging = |piece: usize| -> SharedPtr<u32> {
        let place = piece ^ (piece / 8 % 4);
        shared::at(((t - lane) * GROUP * 2 + place * 16) as u32)
    };
    unsafe {
        let g = warp_first + lane;
        if g < total {
            let w = unpack_f16(m, part.first as usize + g / groups, g % groups);
            for i in 0..4 {
                let v = [w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]];
                staging(lane * 4 + i).store_v4(v);
            }
            if g % groups == 0 {
                let r = g / groups;
                let bias = if part.bias.is_null() {
                    0.0
                } else {
                    ldg_f32(part.bias.add(part.first as usize + r))
                };
                a.bias.add(out_row(r)).write(bias);
            }
        }
        warp::sync_warp();
        for i in 0..4 {
            let piece = i * 32 + lane;
            let g = warp_first + piece / 4;
            if g < total {
                let at = (out_row(g / groups) * groups + g % groups) * GROUP + piece % 4 * 8;
                st_global_v4(a.out.add(at), staging(piece).load_v4());
            }
        }
    }
}

/// Arguments of the `dense` kernels.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DenseArgs {
    /// f16 `[n][cols]`, as [`dequantise`] wrote it; `cols` is a multiple of 32.
    pub w: *const u16,
    /// f16 `[rows][cols]`.
    pub x: *const u16,
    pub cols: u32,
    pub to: Output,
}

/// Byte offset of 16-byte piece `piece` of row `row`: pieces change places by row, so that a column of
/// them, as `ldmatrix` reads it, touches every bank once.
#[inline(always)]
fn swizzle(row: usize, piece: usize) -> usize {
    row * ROW_BYTES + ((piece ^ (row & 7)) * 16)
}

/// Starts the copy of [`BK`] columns from `k` on of `16 * T` rows. Elements are counted in 32 bits, which
/// both operands fit: the loop has little else to do beside its products.
#[inline(always)]
unsafe fn load<const T: usize>(
    tile: u32,
    source: *const u16,
    (first, rows): (u32, u32),
    (k, cols): (u32, u32),
) {
    let t = thread_idx_x();
    let (row, piece) = (t / 8, t % 8);
    let c = k + piece * 8;
    // Outside the matrix nothing is read: the size of the source is zero, its address any.
    let rows = if c < cols { rows } else { 0 };
    let mut at = (first + row).wrapping_mul(cols).wrapping_add(c);
    let to = tile + swizzle(row as usize, piece as usize) as u32;
    for i in 0..T as u32 {
        let inside = first + row + i * 16 < rows;
        unsafe {
            cp_async_16_zfill(
                shared::at::<u8>(to + i * 16 * ROW_BYTES as u32),
                source.wrapping_add(at as usize),
                if inside { 16 } else { 0 },
            );
        }
        at = at.wrapping_add(16 * cols);
    }
}

#[inline(always)]
unsafe fn fragment(tile: usize, row: usize, piece: usize) -> [u32; 4] {
    let at: SharedPtr<u16> = shared::at((tile + swizzle(row, piece)) as u32);
    unsafe { mma::ldmatrix_x4(at) }
}

/// A warp's tile: `16 MT` input rows, `16 NP` matrix rows. A block's is twice that both ways. Sums are
/// indexed by tile of 16 input rows, by tile of eight matrix rows (at most eight of them).
#[inline(always)]
unsafe fn multiply<const MT: usize, const NP: usize>(a: &DenseArgs) -> [[[f32; 4]; 8]; MT] {
    let t = thread_idx_x() as usize;
    let (warp_index, lane) = (t / 32, t % 32);
    let (warp_m, warp_n) = (warp_index / 2, warp_index % 2);
    let cols = a.cols as usize;
    let first_m = block_idx_x() as usize * 32 * MT;
    let first_n = block_idx_y() as usize * 32 * NP;
    let x_bytes = 32 * MT * ROW_BYTES;
    let stage_bytes = x_bytes + 32 * NP * ROW_BYTES;
    let mut sums = [[[0.0f32; 4]; 8]; MT];
    unsafe {
        let bring = |stage: usize, k: usize| {
            let at = (stage * stage_bytes) as u32;
            let columns = (k as u32, a.cols);
            // Two times the tiles of a warp: half of them for each 16 rows that the threads cover.
            for half in 0..2 {
                let (m, n) = (half * 16 * MT as u32, half * 16 * NP as u32);
                let x = at + m * ROW_BYTES as u32;
                load::<MT>(x, a.x, (first_m as u32 + m, a.to.rows), columns);
                let w = at + x_bytes as u32 + n * ROW_BYTES as u32;
                load::<NP>(w, a.w, (first_n as u32 + n, a.to.n), columns);
            }
        };
        for s in 0..STAGES - 1 {
            if s * BK < cols {
                bring(s, s * BK);
            }
            cp_async_commit();
        }
        let x_row = warp_m * 16 * MT + lane % 16;
        let w_row = warp_n * 16 * NP + (lane / 16) * 8 + lane % 8;
        let (mut k, mut stage) = (0, 0);
        while k < cols {
            cp_async_wait::<{ STAGES as u32 - 2 }>();
            sync_threads();
            // The stage that every warp left before the barrier.
            let ahead = k + (STAGES - 1) * BK;
            if ahead < cols {
                bring(if stage == 0 { STAGES - 1 } else { stage - 1 }, ahead);
            }
            cp_async_commit();
            let now = stage * stage_bytes;
            let mut x = [[[0; 4]; MT]; 2];
            let mut w = [[[0; 4]; NP]; 2];
            for step in 0..BK / 16 + 1 {
                if step < BK / 16 {
                    for i in 0..MT {
                        x[step % 2][i] = fragment(now, x_row + i * 16, step * 2 + lane / 16);
                    }
                    for j in 0..NP {
                        let piece = step * 2 + (lane / 8) % 2;
                        w[step % 2][j] = fragment(now + x_bytes, w_row + j * 16, piece);
                    }
                }
                if step > 0 {
                    let (x, w) = (&x[(step - 1) % 2], &w[(step - 1) % 2]);
                    for i in 0..MT {
                        for j in 0..2 * NP {
                            let b = [w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]];
                            sums[i][j] = mma::m16n8k16_f16(x[i], b, sums[i][j]);
                        }
                    }
                }
            }
            k += BK;
            stage = if stage + 1 == STAGES { 0 } else { stage + 1 };
        }
    }
    sums
}

/// The first input row and matrix row of this lane's sums.
#[inline(always)]
fn corner<const MT: usize, const NP: usize>() -> (usize, usize) {
    let t = thread_idx_x() as usize;
    let (warp_index, lane) = (t / 32, t % 32);
    (
        (block_idx_x() as usize * 2 + warp_index / 2) * 16 * MT + lane / 4,
        (block_idx_y() as usize * 2 + warp_index % 2) * 16 * NP + (lane % 4) * 2,
    )
}

#[inline(always)]
unsafe fn dense<const MT: usize, const NP: usize>(a: &DenseArgs) {
    unsafe {
        let sums = multiply::<MT, NP>(a);
        for i in 0..MT {
            let (row, column) = corner::<MT, NP>();
            let from = (row + i * 16, column);
            epilogue::store(&a.to, from, &sums[i], 2 * NP);
        }
    }
}

#[inline(always)]
unsafe fn gate_up<const MT: usize, const NP: usize>(a: &DenseArgs) {
    unsafe {
        let sums = multiply::<MT, NP>(a);
        for i in 0..MT {
            let (row, column) = corner::<MT, NP>();
            let from = (row + i * 16, column);
            epilogue::store_gate_up(&a.to, from, &sums[i], 2 * NP);
        }
    }
}

/// `out = x Wᵀ + b`, or `out += …`, a block 128 input rows by 128 matrix rows. Grid: input rows, matrix
/// rows, so that neighbouring blocks share weights, and those pass through the caches once.
#[kernel(launch_bounds(128, 2))]
pub unsafe fn dense_128x128(a: DenseArgs) {
    unsafe { dense::<4, 4>(&a) }
}

/// The same, 64 input rows by 128 matrix rows.
#[kernel(launch_bounds(128, 3))]
pub unsafe fn dense_64x128(a: DenseArgs) {
    unsafe { dense::<2, 4>(&a) }
}

/// The same, 64 by 64.
#[kernel(launch_bounds(128, 4))]
pub unsafe fn dense_64x64(a: DenseArgs) {
    unsafe { dense::<2, 2>(&a) }
}

/// `silu(x Gᵀ + g) * (x Uᵀ + u)` in f16, of matrix rows that [`dequantise`] laid in two ways: eight of the
/// gate, eight of up. A block 128 input rows by 128 matrix rows; `n` is a multiple of 16.
#[kernel(launch_bounds(128, 2))]
pub unsafe fn dense_gate_up_128x128(a: DenseArgs) {
    unsafe { gate_up::<4, 4>(&a) }
}

/// The same, 64 input rows by 128 matrix rows.
#[kernel(launch_bounds(128, 3))]
pub unsafe fn dense_gate_up_64x128(a: DenseArgs) {
    unsafe { gate_up::<2, 4>(&a) }
}
