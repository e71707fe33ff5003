//! What a kernel can do, on the device and on the host.
//!
//! The names are those of rust-cuda's `cuda_std`; below them lies rustc's own NVPTX back end, and
//! beside them stands what rust-cuda lacks: tensor-core products, asynchronous copies, cache hints,
//! grid barriers, launch bounds. Every function here has a second body for the host, so that the
//! same kernel runs in the [`emulator`], one fiber per GPU thread.
//!
//! | module | what is in it |
//! | --- | --- |
//! | [`thread`] | indices, block barriers, timers, programmatic launch |
//! | [`shared`] | shared memory: 32-bit addresses with typed loads and stores |
//! | [`memory`] | global loads and stores with cache hints, `cp.async`, fences |
//! | [`mbarrier`] | barriers in shared memory, for copies that are waited for elsewhere |
//! | [`warp`] | shuffles, votes, reductions |
//! | [`atomic`] | atomic operations; acquire and release |
//! | [`grid`] | a barrier over the whole grid |
//! | [`mma`] | tensor-core products, `ldmatrix` |
//! | [`tensor`], [`wgmma`] | Hopper's copies of tiles, and the products of a warpgroup |
//! | [`float`] | elementary functions, approximations of the hardware |
//! | [`half`] | 16-bit floats, alone and in pairs |
//! | [`int`] | `dp4a`, `lop3`, `prmt` |
//!
//! ```
//! use cuda_std::{emulator, params, prelude::*};
//!
//! #[kernel(launch_bounds(256))]
//! pub unsafe fn scale(x: *mut f32, factor: f32, n: u32) {
//!     let i = thread::index_1d();
//!     if i < n {
//!         *x.add(i as usize) *= factor;
//!     }
//! }
//!
//! # fn main() -> Result<(), cuda_std::emulator::Error> {
//! let mut x = [1.0f32, 2.0, 3.0];
//! // Safety: the parameters fit the kernel's.
//! unsafe {
//!     let kernel = &__KERNEL_scale;
//!     emulator::launch(kernel, (1, 1, 1), (32, 1, 1), 0, params![x.as_mut_ptr(), 2.0f32, 3u32].as_ptr())?;
//! }
//! assert_eq!(x, [2.0, 4.0, 6.0]);
//! # Ok(())
//! # }
//! ```
#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(
    target_arch = "nvptx64",
    feature(
        abi_ptx,
        asm_experimental_arch,
        f16,
        stdarch_nvptx,
        link_llvm_intrinsics,
        core_intrinsics
    )
)]
#![cfg_attr(target_arch = "nvptx64", allow(internal_features))]

extern crate self as cuda_std;

pub use cuda_std_macros::{kernel, kernels, shared_array, shared_static};

pub mod atomic;
#[cfg(not(target_arch = "nvptx64"))]
pub mod emulator;
pub mod float;
pub mod grid;
pub mod half;
pub mod int;
pub mod mbarrier;
pub mod memory;
pub mod mma;
pub mod settled;
pub mod shared;
pub mod tensor;
pub mod thread;
pub mod warp;
pub mod wgmma;

/// What most kernels use.
pub mod prelude {
    pub use crate::half::{BF16, F16, Half2};
    pub use crate::shared::SharedPtr;
    pub use crate::{atomic, float, grid, half, int, mbarrier, memory, mma, shared, thread, warp};
    pub use crate::{kernel, kernels, shared_array, shared_static};
}
