//! Descriptions of matrices for the copy engine, which the driver encodes.

use cuda_std::tensor::{BOX_COLS, Copied, TensorMap, Tiling};
use cust::sys::cudaError_enum;
use std::ffi::c_void;

// Newer than cust; `driver` has it.
unsafe extern "C" {
    fn cuTensorMapEncodeTiled(
        map: *mut c_void,
        data_type: u32,
        rank: u32,
        address: *mut c_void,
        sizes: *const u64,
        strides: *const u64,
        box_sizes: *const u32,
        element_strides: *const u32,
        interleave: u32,
        swizzle: u32,
        l2_promotion: u32,
        fill: u32,
    ) -> cudaError_enum;
}

/// Numbers of `cuda.h`, `CU_TENSOR_MAP_…`.
const FLOAT16: u32 = 6;
const INTERLEAVE_NONE: u32 = 0;
const SWIZZLE_128B: u32 = 3;
const L2_PROMOTION_256B: u32 = 3;
const FILL_ZEROS: u32 = 0;

/// Describes f16 rows; `map` is left alone where the driver refuses.
pub(super) fn encode(tiling: &Tiling, map: &mut TensorMap) -> cudaError_enum {
    // The driver wants its 128 bytes at a multiple of 64.
    #[repr(align(64))]
    struct Aligned(TensorMap);
    let mut aligned = Aligned(TensorMap([0; 16]));
    let [rows, boxes] = [tiling.rows, tiling.boxes()].map(u64::from);
    // From the fastest on; strides of all but that.
    let (sizes, strides, box_sizes) = match tiling.copy {
        Copied::Box => (
            vec![u64::from(tiling.cols), rows],
            vec![tiling.stride],
            vec![BOX_COLS, tiling.box_rows],
        ),
        Copied::Rows => (
            vec![u64::from(tiling.cols.min(BOX_COLS)), boxes, rows],
            vec![2 * u64::from(BOX_COLS), tiling.stride],
            vec![BOX_COLS, tiling.boxes(), tiling.box_rows],
        ),
    };
    // It reads what the pointers point to, and writes the map alone.
    let result = unsafe {
        cuTensorMapEncodeTiled(
            aligned.0.0.as_mut_ptr().cast(),
            FLOAT16,
            sizes.len() as u32,
            tiling.address as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            box_sizes.as_ptr(),
            [1; 3].as_ptr(),
            INTERLEAVE_NONE,
            SWIZZLE_128B,
            L2_PROMOTION_256B,
            FILL_ZEROS,
        )
    };
    if result == cudaError_enum::CUDA_SUCCESS {
        *map = aligned.0;
    }
    result
}
