//! [`Driver`](super::Driver) over the emulator: device memory is host memory, a launch runs at once.

use super::{Address, Allocation, Consume, Driver, Mapped, Piece};
use crate::device::DeviceInfo;
use crate::error::{Error, Result};
use cuda_std::emulator;
use cuda_std::tensor::{TensorMap, Tiling};
use kernels::decode::NEEDS;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;

/// The emulator as a device.
pub struct Emulated {
    info: DeviceInfo,
    allocations: HashMap<Address, Layout>,
    /// What the kernel `decode` is settled for, if anything, as a module would be.
    settled: u64,
}

/// Alignment of device memory, as CUDA's.
const ALIGNMENT: usize = 256;

/// What fresh memory holds: NaN as f32 and as f16, so that a read of what nobody wrote shows.
const POISON: u8 = 0xff;

impl Emulated {
    pub(super) fn new() -> Emulated {
        Emulated {
            info: DeviceInfo {
                backend: "emulated",
                name: "GPU emulator".into(),
                memory_bytes: crate::device::host_memory::total(),
                memory_bytes_per_s: None,
                architecture: "rust".into(),
            },
            allocations: HashMap::new(),
            settled: 0,
        }
    }

    fn run<A: Copy>(
        &self,
        kernel: &str,
        grid: emulator::Dim3,
        block: u32,
        shared: usize,
        args: &A,
        cooperative: bool,
    ) -> Result<()> {
        let fail = |what: String| Error::Device {
            device: self.info.name.clone(),
            what,
        };
        let entry = kernels::all()
            .iter()
            .find(|k| k.name == kernel)
            .ok_or_else(|| fail(format!("no kernel is named {kernel}")))?;
        let parameters = [ptr::from_ref(args).cast::<c_void>()];
        let mut options = emulator::Options {
            cooperative,
            ..emulator::Options::default()
        };
        if Self::DECODE_KERNELS.contains(&kernel) && self.settled != 0 {
            let halves = [self.settled as u32, (self.settled >> 32) as u32];
            for (id, half) in NEEDS.into_iter().zip(halves) {
                options.settled[id as usize] = half;
            }
        }
        // The caller answers for what the pointers in `args` point to.
        unsafe {
            emulator::launch_with(
                entry,
                grid,
                (block, 1, 1),
                shared as u32,
                parameters.as_ptr(),
                options,
            )
        }
        .map_err(|e| fail(e.to_string()))
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        for (address, layout) in self.allocations.drain() {
            // Each came from `alloc_zeroed` with this very layout.
            unsafe { dealloc(address as *mut u8, layout) };
        }
    }
}

impl Driver for Emulated {
    const STAGE_BYTES: usize = 1 << 30;
    const DECODE_KERNELS: &'static [&'static str] = &["decode", "decode_bulk"];

    // So that short prompts go through both ways of a product.
    const SKINNY_ROWS: usize = 5;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn multiprocessors(&self) -> u32 {
        2
    }

    fn shared_limit(&self) -> usize {
        227 << 10
    }

    fn free_bytes(&self) -> Result<u64> {
        crate::device::host_memory::free()
    }

    fn alloc(&mut self, bytes: usize) -> Result<Allocation> {
        let layout = Layout::from_size_align(bytes.max(1), ALIGNMENT)
            .map_err(|e| Error::Request(format!("an allocation of {bytes} bytes: {e}")))?;
        // The layout is not empty.
        let pointer = unsafe { alloc_zeroed(layout) };
        if pointer.is_null() {
            handle_alloc_error(layout);
        }
        unsafe { ptr::write_bytes(pointer, POISON, layout.size()) };
        self.allocations.insert(pointer as Address, layout);
        Ok(Allocation {
            address: pointer as Address,
            bytes,
        })
    }

    fn free(&mut self, allocation: Allocation) {
        if let Some(layout) = self.allocations.remove(&allocation.address) {
            unsafe { dealloc(allocation.address as *mut u8, layout) };
        }
    }

    fn write(&mut self, to: Address, bytes: &[u8]) -> Result<()> {
        // `to` is memory of this driver's, with room for `bytes`, by the trait's contract.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn read(&mut self, from: Address, bytes: &mut [u8]) -> Result<()> {
        unsafe { ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn stage(&mut self, piece: Piece, consume: Consume<Self>) -> Result<()> {
        let address = piece.bytes()?.as_ptr() as Address;
        consume(self, address)
    }

    fn launch<A: Copy>(
        &mut self,
        kernel: &'static str,
        grid: (u32, u32),
        block: u32,
        shared: usize,
        args: &A,
    ) -> Result<()> {
        self.run(kernel, (grid.0, grid.1, 1), block, shared, args, false)
    }

    fn launch_cooperative<A: Copy>(
        &mut self,
        kernel: &'static str,
        grid: u32,
        block: u32,
        shared: usize,
        args: &A,
    ) -> Result<()> {
        self.run(kernel, (grid, 1, 1), block, shared, args, true)
    }

    fn settle(&mut self, needs: u64) -> Result<()> {
        self.settled |= needs;
        Ok(())
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }

    fn idle(&mut self) -> Result<bool> {
        Ok(true)
    }

    fn warpgroups(&self) -> bool {
        true
    }

    fn copy_engine(&self) -> bool {
        true
    }

    fn tensor_map(&mut self, tiling: &Tiling) -> Result<TensorMap> {
        Ok(TensorMap::emulated(tiling))
    }

    fn alloc_mapped(&mut self, bytes: usize) -> Result<Mapped> {
        let memory = self.alloc(bytes)?;
        self.write(memory.address, &vec![0; bytes])?;
        Ok(Mapped {
            host: memory.address as *mut u8,
            address: memory.address,
        })
    }
}
