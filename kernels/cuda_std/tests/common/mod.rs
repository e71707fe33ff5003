//! What the tests share: kernels, random numbers, a launch that must succeed.
#![allow(dead_code)]

pub mod kernels;

use cuda_std::emulator::{Dim3, Error, Kernel, launch};
use std::ffi::c_void;

/// SplitMix64: the same numbers in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn word(&mut self) -> u32 {
        (self.next() >> 32) as u32
    }

    /// In [low, high).
    pub fn float(&mut self, low: f32, high: f32) -> f32 {
        let unit = (self.next() >> 40) as f32 / (1u64 << 24) as f32;
        low + (high - low) * unit
    }
}

/// A launch along x that must succeed.
pub fn run(kernel: &Kernel, blocks: u32, threads: u32, shared: u32, params: &[*const c_void]) {
    try_run(kernel, (blocks, 1, 1), (threads, 1, 1), shared, params).unwrap();
}

pub fn try_run(
    kernel: &Kernel,
    grid: Dim3,
    block: Dim3,
    shared: u32,
    params: &[*const c_void],
) -> Result<(), Error> {
    assert_eq!(kernel.params.len(), params.len(), "{}", kernel.name);
    // Safety: each test passes what its kernel takes.
    unsafe { launch(kernel, grid, block, shared, params.as_ptr()) }
}
