//! Weights on their way to the device: sliced, staged, repacked there by a kernel.

use super::{Driver, Piece, Weight};
use crate::error::{Error, Result};
use gguf::Gguf;
use kernels::types::{GROUP, LAYOUTS, Layout, RepackArgs};
use std::ops::Range;
use std::sync::Arc;

/// Threads per block of the repacking kernel.
const THREADS: u32 = 128;
/// Of what [`Driver::alloc`] gives.
const ALIGNMENT: usize = 256;

/// Bytes of a matrix.
fn matrix_bytes(layout: &Layout, rows: usize, cols: usize) -> usize {
    let bytes = layout.matrix_bytes(rows, cols.next_multiple_of(GROUP));
    bytes.next_multiple_of(ALIGNMENT)
}

/// Bytes that a tensor takes on the device: a matrix as [`load`] lays it out, a vector in f32.
pub(super) fn device_bytes(tensor: gguf::Tensor<'_>) -> usize {
    let (rows, cols) = (tensor.rows() as usize, tensor.row_len() as usize);
    match LAYOUTS.iter().find(|l| l.ty == tensor.ty() as u32) {
        Some(layout) if tensor.dims().len() > 1 => matrix_bytes(layout, rows, cols),
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
    let memory = driver.alloc(matrix_bytes(layout, rows, cols))?;
    let matrix = layout.matrix(rows, cols, memory.address as *const u8);
    let row_bytes = tensor.row_bytes() as usize;
    let rows_per_slice = (D::STAGE_BYTES / row_bytes).max(1);
    if row_bytes > D::STAGE_BYTES {
        return Err(Error::Request(format!(
            "tensor {} has rows of {row_bytes} bytes, at most {} can be loaded",
            tensor.name(),
            D::STAGE_BYTES
        )));
    }
    // Weights of one repacking thread: a block, or a group of a float type.
    let blocks = cols / layout.block.max(GROUP);
    let block_bytes = layout.block_bytes * (layout.block.max(GROUP) / layout.block);
    for first in (0..rows).step_by(rows_per_slice) {
        let end = rows.min(first + rows_per_slice);
        let piece = Piece {
            file: Arc::clone(file),
            tensor: tensor.name().to_owned(),
            range: (part.start + first) * row_bytes..(part.start + end) * row_bytes,
        };
        let repack = move |driver: &mut D, address| {
            let args = RepackArgs {
                source: address as *const u8,
                matrix,
                first: first as u32,
                rows: (end - first) as u32,
                file_row_bytes: row_bytes as u32,
                blocks: blocks as u32,
                block_bytes: block_bytes as u32,
            };
            let grid = ((end - first) * blocks).div_ceil(THREADS as usize) as u32;
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
