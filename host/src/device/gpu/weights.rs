//! Weights on their way to the device: sliced, staged, repacked there by a kernel.

use super::{Driver, Weight};
use crate::error::{Error, Result};
use kernels::types::{GROUP, LAYOUTS, RepackArgs};

/// Threads per block of the repacking kernel.
const THREADS: u32 = 128;

/// Alignment of a plane.
const ALIGNMENT: usize = 256;

/// Streams a tensor to the device and repacks it there; copies may still run when this returns.
pub(super) fn load<D: Driver>(driver: &mut D, tensor: gguf::Tensor<'_>) -> Result<Weight> {
    let ty = tensor.ty() as u32;
    let Some(layout) = LAYOUTS.iter().find(|l| l.ty == ty) else {
        return Err(Error::Request(format!(
            "tensor {} is of type {}, which the GPU kernels do not read",
            tensor.name(),
            tensor.ty()
        )));
    };
    let (rows, file_cols) = (tensor.rows() as usize, tensor.row_len() as usize);
    let cols = file_cols.next_multiple_of(GROUP);
    // Weights of one repacking thread: a block, or a group of a float type.
    let unit = layout.block.max(GROUP);
    let blocks_per_row = cols / unit;
    let blocks = rows * blocks_per_row;

    let total: usize = layout
        .planes
        .iter()
        .map(|b| (b * blocks).next_multiple_of(ALIGNMENT))
        .sum();
    let memory = driver.alloc(total)?;
    let mut at = memory.address;
    let matrix = layout.matrix(rows, cols, |_, bytes| {
        let plane = at as *const u8;
        at += bytes.next_multiple_of(ALIGNMENT) as u64;
        plane
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
    for (i, slice) in tensor.data().chunks(rows_per_slice * row_bytes).enumerate() {
        let slice_blocks = slice.len() / row_bytes * blocks_per_row;
        let first = (i * rows_per_slice * blocks_per_row) as u64;
        driver.stage(slice, &mut |driver, address| {
            let args = RepackArgs {
                source: address as *const u8,
                matrix,
                first,
                blocks: slice_blocks as u64,
                file_cols: file_cols as u32,
                stride,
            };
            let grid = slice_blocks.div_ceil(THREADS as usize) as u32;
            driver.launch("repack_kernel", (grid, 1), THREADS, 0, &args)
        })?;
    }
    Ok(Weight {
        matrix,
        cols: file_cols,
        quantised: layout.quantised,
    })
}
