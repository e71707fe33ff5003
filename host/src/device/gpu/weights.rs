//! Weights on their way to the device: sliced, staged, repacked there by a kernel.

use super::{Driver, Piece, Weight};
use crate::error::{Error, Result};
use gguf::Gguf;
use kernels::types::{GROUP, LAYOUTS, Layout, RepackArgs};
use std::ops::Range;
use std::sync::Arc;

/// Threads per block of the repacking kernel.
const THREADS: u32 = 128;
/// Of planes and of what [`Driver::alloc`] gives.
const ALIGNMENT: usize = 256;

/// Where each plane of so many blocks begins, and the bytes of all.
fn planes(layout: &Layout, blocks: usize) -> (Vec<usize>, usize) {
    let mut total = 0;
    let offsets = layout
        .planes
        .iter()
        .map(|bytes| {
            let offset = total;
            total += (bytes * blocks).next_multiple_of(ALIGNMENT);
            offset
        })
        .collect();
    (offsets, total)
}

/// Blocks of a matrix whose rows are padded to whole groups.
fn blocks(layout: &Layout, rows: usize, cols: usize) -> usize {
    // Weights of one repacking thread: a block, or a group of a float type.
    rows * (cols.next_multiple_of(GROUP) / layout.block.max(GROUP))
}

/// Bytes that a tensor takes on the device: a matrix as [`load`] lays it out, a vector in f32.
pub(super) fn device_bytes(tensor: gguf::Tensor<'_>) -> usize {
    let (rows, cols) = (tensor.rows() as usize, tensor.row_len() as usize);
    match LAYOUTS.iter().find(|l| l.ty == tensor.ty() as u32) {
        Some(layout) if tensor.dims().len() > 1 => planes(layout, blocks(layout, rows, cols)).1,
        _ => (4 * rows * cols).next_multiple_of(ALIGNMENT),
    }
}

/// Streams rows of a tensor to the device and repacks them there; copies may still run when this returns.
pub(super) fn load<D: Driver>(
    driver: &mut D,
    tensor: gguf::Tensor<'_>,
    part: Range<usize>,
    file: &Arc<Gguf>,
) -> Result<Weight> {
    let ty = tensor.ty() as u32;
    let Some(layout) = LAYOUTS.iter().find(|l| l.ty == ty) else {
        return Err(Error::Request(format!(
            "tensor {} is of type {}, which the GPU kernels do not read",
            tensor.name(),
            tensor.ty()
        )));
    };
    let (rows, file_cols) = (part.len(), tensor.row_len() as usize);
    let cols = file_cols.next_multiple_of(GROUP);
    let blocks_per_row = blocks(layout, 1, cols);
    let (offsets, total) = planes(layout, rows * blocks_per_row);
    let memory = driver.alloc(total)?;
    let matrix = layout.matrix(rows, cols, |i, _| {
        (memory.address + offsets[i] as u64) as *const u8
    });

    let row_bytes = tensor.row_bytes() as usize;
    let rows_per_slice = (D::STAGE_BYTES / row_bytes).max(1);
    if row_bytes > D::STAGE_BYTES {
        return Err(Error::Request(format!(
            "tensor {} has rows of {row_bytes} bytes, at most {} can be loaded",
            tensor.name(),
            D::STAGE_BYTES
        )));
    }
    let stride = layout.block_bytes as u32;
    for first in (0..rows).step_by(rows_per_slice) {
        let end = rows.min(first + rows_per_slice);
        let piece = Piece {
            file: Arc::clone(file),
            tensor: tensor.name().to_owned(),
            range: (part.start + first) * row_bytes..(part.start + end) * row_bytes,
        };
        let blocks = (end - first) * blocks_per_row;
        let repack = move |driver: &mut D, address| {
            let args = RepackArgs {
                source: address as *const u8,
                matrix,
                first: (first * blocks_per_row) as u64,
                blocks: blocks as u64,
                file_cols: file_cols as u32,
                stride,
            };
            let grid = blocks.div_ceil(THREADS as usize) as u32;
            driver.launch("repack_kernel", (grid, 1), THREADS, 0, &args)
        };
        driver.stage(piece, Box::new(repack))?;
    }
    Ok(Weight {
        matrix,
        cols: file_cols,
        quantised: layout.quantised,
    })
}
