//! Launches that may begin before the one before them has ended (programmatic dependent launch): kernels that wait for it themselves.

use cust::sys::{CUfunction, CUstream, cudaError_enum};
use std::ffi::c_void;
use std::ptr;

/// Compute capability, ten times the major number and the minor, from which on there are such.
pub(super) const CAPABILITY: i32 = 90;

/// `CUlaunchConfig` of `cuda.h`.
#[repr(C)]
struct Config {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: CUstream,
    attributes: *const Attribute,
    count: u32,
}

/// `CUlaunchAttribute`: a number, and a union of 64 bytes.
#[repr(C)]
struct Attribute {
    id: u32,
    padding: u32,
    value: [u32; 16],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`, whose value says whether it is allowed.
const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

// Newer than cust; `driver` has it.
unsafe extern "C" {
    fn cuLaunchKernelEx(
        config: *const Config,
        function: CUfunction,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> cudaError_enum;
}

/// As `cuLaunchKernel`.
///
/// # Safety
/// As that; and the kernel waits for the launch before.
pub(super) unsafe fn launch(
    function: CUfunction,
    (x, y): (u32, u32),
    block: u32,
    shared: usize,
    stream: CUstream,
    parameters: *mut *mut c_void,
) -> cudaError_enum {
    let mut value = [0; 16];
    value[0] = 1;
    let attribute = Attribute {
        id: PROGRAMMATIC_STREAM_SERIALIZATION,
        padding: 0,
        value,
    };
    let config = Config {
        grid: [x, y, 1],
        block: [block, 1, 1],
        shared_bytes: shared as u32,
        stream,
        attributes: &attribute,
        count: 1,
    };
    unsafe { cuLaunchKernelEx(&config, function, parameters, ptr::null_mut()) }
}
