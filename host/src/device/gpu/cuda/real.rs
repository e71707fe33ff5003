//! A CUDA device: context, stream, module, pinned ring.

use super::driver;
use crate::device::gpu::{Address, Allocation, Driver, Mapped};
use crate::device::{DeviceInfo, ptx};
use crate::error::{Error, Result};
use cust::context::{Context, CurrentContext};
use cust::device::{Device, DeviceAttribute};
use cust::error::CudaError;
use cust::event::{Event, EventFlags};
use cust::module::Module;
use cust::stream::{Stream, StreamFlags};
use cust::sys;
use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, c_void};
use std::ptr;

/// Slots of the pinned ring.
const SLOTS: usize = 4;
const STAGE_BYTES: usize = 16 << 20;
/// Threads that copy from the page cache into a pinned slot; one alone is far slower than the bus.
const COPY_THREADS: usize = 8;

/// CUDA 12.0, the first whose drivers take PTX 8.0.
const MIN_DRIVER: i32 = 12_000;

/// What a call of the driver returned other than success.
struct Failure(sys::cudaError_enum);

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut name = ptr::null();
        // On success the driver gives a string that lives as long as it does.
        let result = unsafe { sys::cuGetErrorName(self.0, &mut name) };
        if result == sys::cudaError_enum::CUDA_SUCCESS && !name.is_null() {
            f.write_str(&unsafe { CStr::from_ptr(name) }.to_string_lossy())
        } else {
            write!(f, "error {}", self.0 as u32)
        }
    }
}

fn check(result: sys::cudaError_enum) -> Result<(), Failure> {
    if result == sys::cudaError_enum::CUDA_SUCCESS {
        Ok(())
    } else {
        Err(Failure(result))
    }
}

/// A slot of the ring: pinned memory, its twin on the device, and when both are free again.
struct Slot {
    pinned: *mut u8,
    staged: Address,
    free: Event,
}

struct Function {
    raw: sys::CUfunction,
    /// Dynamic shared memory that it may use so far.
    shared: usize,
}

/// A CUDA device.
pub struct Cuda {
    info: DeviceInfo,
    multiprocessors: u32,
    shared_limit: usize,
    stream: Stream,
    functions: HashMap<&'static str, Function>,
    allocations: HashSet<Address>,
    mapped: Vec<*mut u8>,
    slots: Vec<Slot>,
    next_slot: usize,
    // Last, so that all above is dropped while the context lives.
    module: Module,
    context: Context,
}

// The raw pointers are handles of the driver, good on any thread that has the context current, which
// every method sees to.
unsafe impl Send for Cuda {}

impl Cuda {
    /// Opens device `index`.
    ///
    /// # Errors
    /// [`Error::NoDevice`]: no driver, no such device, or a driver too old for the kernels.
    pub fn open(index: usize) -> Result<Cuda> {
        let absent = |what: String| Error::NoDevice(format!("{what}; --device cpu needs no GPU"));
        driver::open().map_err(absent)?;
        cust::init(cust::CudaFlags::empty())
            .map_err(|e| absent(format!("the NVIDIA driver does not start: {e}")))?;
        // Asked before the kernels are given to it: cust does not know the error of a driver too old.
        let mut version = 0;
        check(unsafe { sys::cuDriverGetVersion(&mut version) })
            .map_err(|e| absent(format!("the NVIDIA driver does not tell its version: {e}")))?;
        if version < MIN_DRIVER {
            return Err(absent(format!(
                "the NVIDIA driver is for CUDA {}.{}, Kigo's kernels need {}.{} or newer (driver release \
                 525); install a newer driver",
                version / 1000,
                version % 1000 / 10,
                MIN_DRIVER / 1000,
                MIN_DRIVER % 1000 / 10
            )));
        }
        let count = Device::num_devices().map_err(|e| absent(format!("no CUDA device: {e}")))?;
        if index >= count as usize {
            return Err(absent(format!(
                "no CUDA device {index}; this machine has {count}"
            )));
        }
        let fail = |what: &str, e: CudaError| Error::Device {
            device: format!("cuda:{index}"),
            what: format!("{what}: {e}"),
        };
        let device = Device::get_device(index as u32).map_err(|e| fail("opening it", e))?;
        let name = device.name().map_err(|e| fail("asking its name", e))?;
        let memory = device
            .total_memory()
            .map_err(|e| fail("asking its memory", e))?;
        let attribute = |a| {
            device
                .get_attribute(a)
                .map_err(|e| fail("asking an attribute", e))
        };
        let capability = attribute(DeviceAttribute::ComputeCapabilityMajor)? * 10
            + attribute(DeviceAttribute::ComputeCapabilityMinor)?;
        let multiprocessors = attribute(DeviceAttribute::MultiprocessorCount)? as u32;
        let mut shared_limit = 0;
        // cust has no name for this attribute.
        let optin =
            sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        check(unsafe { sys::cuDeviceGetAttribute(&mut shared_limit, optin, device.as_raw()) })
            .map_err(|e| Error::Device {
                device: name.clone(),
                what: format!("asking its shared memory: {e}"),
            })?;
        let shared_limit = shared_limit as usize;
        let context = Context::new(device).map_err(|e| fail("creating a context", e))?;
        let stream = Stream::new(StreamFlags::NON_BLOCKING, None)
            .map_err(|e| fail("creating a stream", e))?;

        let (arch, text) = ptx::for_capability(capability as u32).ok_or_else(|| {
            absent(format!(
                "{name} has compute capability {}.{}, Kigo's kernels need 8.0 or newer",
                capability / 10,
                capability % 10
            ))
        })?;
        let module = Module::from_ptx(text, &[]).map_err(|e| fail("compiling the kernels", e))?;
        Ok(Cuda {
            info: DeviceInfo {
                backend: "cuda",
                name,
                memory_bytes: memory as u64,
                architecture: arch.to_owned(),
            },
            multiprocessors,
            shared_limit,
            stream,
            functions: HashMap::new(),
            allocations: HashSet::new(),
            mapped: Vec::new(),
            slots: Vec::new(),
            next_slot: 0,
            module,
            context,
        })
    }

    fn fail(&self, what: &str, why: impl std::fmt::Display) -> Error {
        Error::Device {
            device: self.info.name.clone(),
            what: format!("{what}: {why}"),
        }
    }

    /// Makes this device's context current on the calling thread.
    fn enter(&self) -> Result<()> {
        CurrentContext::set_current(&self.context).map_err(|e| self.fail("entering the context", e))
    }

    fn raw_stream(&self) -> sys::CUstream {
        self.stream.as_inner()
    }

    /// The function of this name, allowed to use `shared` bytes of dynamic shared memory.
    fn function(&mut self, name: &'static str, shared: usize) -> Result<sys::CUfunction> {
        if shared > self.shared_limit {
            return Err(Error::Device {
                device: self.info.name.clone(),
                what: format!(
                    "kernel {name} would need {shared} bytes of shared memory, the device gives a \
                     block {} at most",
                    self.shared_limit
                ),
            });
        }
        if !self.functions.contains_key(name) {
            let function = self
                .module
                .get_function(name)
                .map_err(|e| self.fail(&format!("kernel {name}"), e))?;
            // 48 KiB are allowed from the start.
            let entry = Function {
                raw: function.to_raw(),
                shared: 48 << 10,
            };
            self.functions.insert(name, entry);
        }
        let (raw, allowed) = match self.functions.get(name) {
            Some(f) => (f.raw, f.shared),
            None => {
                return Err(Error::NoDevice(format!(
                    "kernel {name} is not in the module"
                )));
            }
        };
        if shared > allowed {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            check(unsafe { sys::cuFuncSetAttribute(raw, attribute, shared as i32) })
                .map_err(|e| self.fail(&format!("shared memory of {name}"), e))?;
            if let Some(f) = self.functions.get_mut(name) {
                f.shared = shared;
            }
        }
        Ok(raw)
    }

    fn make_slots(&mut self) -> Result<()> {
        while self.slots.len() < SLOTS {
            let mut pinned = ptr::null_mut();
            check(unsafe { sys::cuMemHostAlloc(&mut pinned, STAGE_BYTES, 0) })
                .map_err(|e| self.fail("allocating pinned memory", e))?;
            let staged = self.alloc(STAGE_BYTES)?.address;
            let free = Event::new(EventFlags::DISABLE_TIMING)
                .map_err(|e| self.fail("creating an event", e))?;
            self.slots.push(Slot {
                pinned: pinned.cast(),
                staged,
                free,
            });
        }
        Ok(())
    }

    fn drop_slots(&mut self) {
        for slot in std::mem::take(&mut self.slots) {
            // A failure to free leaves nothing to be done.
            let _ = unsafe { sys::cuMemFreeHost(slot.pinned.cast()) };
            self.free(Allocation {
                address: slot.staged,
                bytes: STAGE_BYTES,
            });
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.enter().is_err() || self.stream.synchronize().is_err() {
            return;
        }
        self.drop_slots();
        for host in std::mem::take(&mut self.mapped) {
            let _ = unsafe { sys::cuMemFreeHost(host.cast()) };
        }
        for address in std::mem::take(&mut self.allocations) {
            let _ = unsafe { sys::cuMemFree_v2(address) };
        }
    }
}

/// Copies into pinned memory with several threads.
fn copy_parallel(from: &[u8], to: *mut u8) {
    struct Target(*mut u8);
    // Each thread gets a part of its own.
    unsafe impl Send for Target {}
    let copy = |from: &[u8], to: Target| unsafe {
        ptr::copy_nonoverlapping(from.as_ptr(), to.0, from.len());
    };
    if from.len() < 1 << 20 {
        return copy(from, Target(to));
    }
    let threads = std::thread::available_parallelism()
        .map_or(1, |n| n.get())
        .min(COPY_THREADS);
    let part = from.len().div_ceil(threads).next_multiple_of(4096);
    std::thread::scope(|scope| {
        for (i, from) in from.chunks(part).enumerate() {
            // Within the slot, which is at least as long as `from`.
            let target = Target(unsafe { to.add(i * part) });
            scope.spawn(move || copy(from, target));
        }
    });
}

impl Driver for Cuda {
    const STAGE_BYTES: usize = STAGE_BYTES;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn free_bytes(&self) -> Result<u64> {
        self.enter()?;
        let (free, _) =
            cust::memory::mem_get_info().map_err(|e| self.fail("asking free memory", e))?;
        Ok(free as u64)
    }

    fn alloc(&mut self, bytes: usize) -> Result<Allocation> {
        self.enter()?;
        let mut address = 0;
        match check(unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(256)) }) {
            Ok(()) => {
                self.allocations.insert(address);
                Ok(Allocation { address, bytes })
            }
            Err(e) if e.0 == sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(Error::OutOfMemory {
                    device: self.info.name.clone(),
                    what: "an allocation".into(),
                    required: (bytes as u64).div_ceil(1 << 20),
                    free: self.free_bytes()? >> 20,
                })
            }
            Err(e) => Err(self.fail(&format!("allocating {bytes} bytes"), e)),
        }
    }

    fn free(&mut self, allocation: Allocation) {
        if self.enter().is_ok() && self.allocations.remove(&allocation.address) {
            let _ = unsafe { sys::cuMemFree_v2(allocation.address) };
        }
    }

    fn write(&mut self, to: Address, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.enter()?;
        let from = bytes.as_ptr().cast::<c_void>();
        // From pageable memory this returns once the driver has its own copy.
        check(unsafe { sys::cuMemcpyHtoDAsync_v2(to, from, bytes.len(), self.raw_stream()) })
            .map_err(|e| self.fail("copying to the device", e))
    }

    fn read(&mut self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.enter()?;
        let to = bytes.as_mut_ptr().cast::<c_void>();
        check(unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, bytes.len(), self.raw_stream()) })
            .map_err(|e| self.fail("copying from the device", e))?;
        self.wait()
    }

    fn stage(
        &mut self,
        bytes: &[u8],
        consume: &mut dyn FnMut(&mut Self, Address) -> Result<()>,
    ) -> Result<()> {
        self.enter()?;
        self.make_slots()?;
        if bytes.len() > STAGE_BYTES {
            return Err(Error::Request(format!(
                "{} bytes do not fit a stage",
                bytes.len()
            )));
        }
        let slot = &self.slots[self.next_slot];
        let (pinned, staged) = (slot.pinned, slot.staged);
        // An event that was never recorded counts as past.
        slot.free
            .synchronize()
            .map_err(|e| self.fail("waiting for a copy", e))?;
        copy_parallel(bytes, pinned);
        check(unsafe {
            sys::cuMemcpyHtoDAsync_v2(staged, pinned.cast(), bytes.len(), self.raw_stream())
        })
        .map_err(|e| self.fail("copying to the device", e))?;
        consume(self, staged)?;
        self.slots[self.next_slot]
            .free
            .record(&self.stream)
            .map_err(|e| self.fail("recording an event", e))?;
        self.next_slot = (self.next_slot + 1) % SLOTS;
        Ok(())
    }

    fn launch<A: Copy>(
        &mut self,
        kernel: &'static str,
        grid: (u32, u32),
        block: u32,
        shared: usize,
        args: &A,
    ) -> Result<()> {
        self.enter()?;
        let function = self.function(kernel, shared)?;
        let mut parameters = [ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // The caller answers for what the pointers in `args` point to; the driver copies `args` itself.
        check(unsafe {
            sys::cuLaunchKernel(
                function,
                grid.0,
                grid.1,
                1,
                block,
                1,
                1,
                shared as u32,
                self.raw_stream(),
                parameters.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
        .map_err(|e| self.fail(&format!("launching {kernel}"), e))
    }

    fn wait(&mut self) -> Result<()> {
        self.enter()?;
        self.stream
            .synchronize()
            .map_err(|e| self.fail("running the kernels", e))
    }

    fn launch_cooperative<A: Copy>(
        &mut self,
        kernel: &'static str,
        grid: u32,
        block: u32,
        shared: usize,
        args: &A,
    ) -> Result<()> {
        self.enter()?;
        let function = self.function(kernel, shared)?;
        let mut parameters = [ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // As in `launch`.
        check(unsafe {
            sys::cuLaunchCooperativeKernel(
                function,
                grid,
                1,
                1,
                block,
                1,
                1,
                shared as u32,
                self.raw_stream(),
                parameters.as_mut_ptr(),
            )
        })
        .map_err(|e| self.fail(&format!("launching {kernel}"), e))
    }

    fn idle(&mut self) -> Result<bool> {
        self.enter()?;
        let result = unsafe { sys::cuStreamQuery(self.raw_stream()) };
        if result == sys::cudaError_enum::CUDA_ERROR_NOT_READY {
            return Ok(false);
        }
        check(result).map_err(|e| self.fail("running the kernels", e))?;
        Ok(true)
    }

    fn alloc_mapped(&mut self, bytes: usize) -> Result<Mapped> {
        self.enter()?;
        let mut host = ptr::null_mut();
        check(unsafe { sys::cuMemHostAlloc(&mut host, bytes, sys::CU_MEMHOSTALLOC_DEVICEMAP) })
            .map_err(|e| self.fail("allocating mapped memory", e))?;
        self.mapped.push(host.cast());
        // `host` has room for `bytes`. With unified addressing, which every device with enough compute
        // capability has, it is the device's address too.
        unsafe { ptr::write_bytes(host.cast::<u8>(), 0, bytes) };
        Ok(Mapped {
            host: host.cast(),
            address: host as Address,
        })
    }
}
