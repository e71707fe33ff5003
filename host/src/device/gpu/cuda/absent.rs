//! What stands for CUDA in a build without the feature `cuda`: a device that cannot be opened.

use crate::device::DeviceInfo;
use crate::device::gpu::{Address, Allocation, Consume, Driver, Mapped, Piece};
use crate::error::{Error, Result};

/// No value of it exists.
pub enum Cuda {}

impl Cuda {
    /// # Errors
    /// Always: this build has no CUDA.
    pub fn open(_index: usize) -> Result<Cuda> {
        Err(Error::NoDevice(
            "this build of Kigo has no CUDA; build it with --features cuda, or use --device cpu"
                .into(),
        ))
    }

    /// Does nothing: there is no driver to start.
    pub fn prepare(_index: usize) {}
}

impl Driver for Cuda {
    const STAGE_BYTES: usize = 1;

    fn info(&self) -> &DeviceInfo {
        match *self {}
    }
    fn multiprocessors(&self) -> u32 {
        match *self {}
    }
    fn shared_limit(&self) -> usize {
        match *self {}
    }
    fn free_bytes(&self) -> Result<u64> {
        match *self {}
    }
    fn alloc(&mut self, _: usize) -> Result<Allocation> {
        match *self {}
    }
    fn free(&mut self, _: Allocation) {
        match *self {}
    }
    fn write(&mut self, _: Address, _: &[u8]) -> Result<()> {
        match *self {}
    }
    fn read(&mut self, _: Address, _: &mut [u8]) -> Result<()> {
        match *self {}
    }
    fn stage(&mut self, _: Piece, _: Consume<Self>) -> Result<()> {
        match *self {}
    }
    fn launch<A: Copy>(
        &mut self,
        _: &'static str,
        _: (u32, u32),
        _: u32,
        _: usize,
        _: &A,
    ) -> Result<()> {
        match *self {}
    }
    fn wait(&mut self) -> Result<()> {
        match *self {}
    }
    fn launch_cooperative<A: Copy>(
        &mut self,
        _: &'static str,
        _: u32,
        _: u32,
        _: usize,
        _: &A,
    ) -> Result<()> {
        match *self {}
    }
    fn idle(&mut self) -> Result<bool> {
        match *self {}
    }
    fn alloc_mapped(&mut self, _: usize) -> Result<Mapped> {
        match *self {}
    }
}
