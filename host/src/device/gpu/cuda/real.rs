//! A CUDA device: context, stream, module, pinned ring.

use super::readers::{Outcome, Readers};
use super::{cubin, driver, early, tensor_map};
use crate::device::gpu::{Address, Allocation, Consume, Driver, Mapped, Piece};
use crate::device::{DeviceInfo, ptx};
use crate::error::{Error, Result};
use cuda_std::tensor::{TensorMap, Tiling};
use cust::context::{Context, CurrentContext};
use cust::device::{Device, DeviceAttribute};
use cust::error::CudaError;
use cust::event::{Event, EventFlags};
use cust::module::Module;
use cust::stream::{Stream, StreamFlags};
use cust::sys;
use kernels::decode::{NEEDS, STEP_BARRIER};
use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, c_void};
use std::ops::Range;
use std::ptr;
use std::sync::mpsc::{Receiver, TryRecvError};

/// Slots of the pinned ring: enough for every reader to fill one while others are on the bus.
const SLOTS: usize = 16;
/// Bytes of a slot. Pinning costs time too, so no more than keep the bus busy.
const STAGE_BYTES: usize = 2 << 20;
/// Pinned memory for small writes, after the slots.
const WRITE_BYTES: usize = 1 << 20;

/// CUDA 12.0, the first whose drivers take PTX 8.0.
const MIN_DRIVER: i32 = 12_000;

/// The kernel that has a module of its own, settled for what a model needs.
const DECODE: &str = "decode";

/// How the kernels' names begin that are in the module for one architecture alone.
const WARPGROUP: &str = "warpgroup_";

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

/// Bytes a second of memory with a clock of so many kHz and a bus of so many bits, which moves data on both edges
/// of the clock. None where the driver does not tell either: virtual devices say zero.
fn bandwidth(clock_khz: i32, bus_bits: i32) -> Option<u64> {
    let clock = u64::try_from(clock_khz).ok()? * 1000;
    let bus = u64::try_from(bus_bits).ok()?;
    Some(2 * clock * bus / 8).filter(|&b| b > 0)
}

/// Pinned memory and what is under way in it.
///
/// A slot goes from [`Readers`], which fill it, over the bus to its twin on the device, in the order of
/// [`Driver::stage`].
struct Ring {
    readers: Readers,
    pinned: *mut u8,
    /// The slots' twins on the device, where there are any yet.
    staged: Option<Address>,
    /// When each slot and its twin are free again.
    free: Vec<Event>,
    next: usize,
    /// Slots that are being filled, oldest first.
    filling: VecDeque<Filling>,
    /// Where the next small write goes, in the [`WRITE_BYTES`] behind the slots.
    write_at: usize,
}

struct Filling {
    slot: usize,
    bytes: usize,
    outcome: Receiver<Outcome>,
    consume: Consume<Cuda>,
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
    /// The kernel `decode`: its PTX, what its last module is settled for, and its modules, of which the last is in use
    /// and the others may still run.
    decode: String,
    settled: u64,
    decode_modules: Vec<Module>,
    /// Of the driver and of the device, as the cache of compiled kernels wants them.
    versions: (i32, i32),
    allocations: HashSet<Address>,
    mapped: Vec<*mut u8>,
    /// What [`Driver::reserve`] got and no allocation has taken yet.
    reserved: Range<Address>,
    ring: Ring,
    // Last, so that all above is dropped while the context lives.
    module: Module,
    /// Kernels for this architecture alone.
    warpgroup: Option<Module>,
    context: Context,
}

// The raw pointers are handles of the driver, good on any thread that has the context current, which
// every method sees to.
unsafe impl Send for Cuda {}

impl Cuda {
    /// Starts the driver and device `index` on a thread, so that [`Cuda::open`] finds both ready: that takes
    /// some tenths of a second, in which a file can be opened. What fails here fails there again, and is
    /// told there.
    pub fn prepare(index: usize) {
        std::thread::spawn(move || {
            if driver::open().is_ok() && cust::init(cust::CudaFlags::empty()).is_ok() {
                let context = Device::get_device(index as u32).and_then(Context::new);
                // Stays for the life of the process.
                std::mem::forget(context);
            }
        });
    }

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
        let memory_bytes_per_s = bandwidth(
            attribute(DeviceAttribute::MemoryClockRate).unwrap_or(0),
            attribute(DeviceAttribute::GlobalMemoryBusWidth).unwrap_or(0),
        );
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
        let (text, decode) = ptx::part(text, DECODE);
        // Pinning and loading the kernels take their time in different places: side by side.
        let warpgroup = ptx::beside(capability as u32);
        let (module, warpgroup, pinned) = std::thread::scope(|scope| {
            let pinning = scope.spawn(|| {
                CurrentContext::set_current(&context)?;
                let mut pinned = ptr::null_mut();
                let bytes = SLOTS * STAGE_BYTES + WRITE_BYTES;
                check(unsafe { sys::cuMemHostAlloc(&mut pinned, bytes, 0) })
                    .map_err(|_| CudaError::OutOfMemory)?;
                Ok(pinned as usize)
            });
            let module = cubin::load(&text, version, capability);
            let warpgroup = warpgroup.map(|text| cubin::load(text, version, capability));
            let pinned = pinning.join().unwrap_or(Err(CudaError::UnknownError));
            (module, warpgroup, pinned)
        });
        let module = module.map_err(|e| fail("compiling the kernels", e))?;
        let warpgroup = warpgroup
            .transpose()
            .map_err(|e| fail("compiling the kernels of warpgroups", e))?;
        let pinned = pinned.map_err(|e| fail("allocating pinned memory", e))?;
        let free = (0..SLOTS).map(|_| Event::new(EventFlags::DISABLE_TIMING));
        let ring = Ring {
            readers: Readers::new(),
            pinned: pinned as *mut u8,
            staged: None,
            free: free
                .collect::<Result<_, _>>()
                .map_err(|e| fail("creating an event", e))?,
            next: 0,
            filling: VecDeque::new(),
            write_at: 0,
        };
        Ok(Cuda {
            info: DeviceInfo {
                backend: "cuda",
                name,
                memory_bytes: memory as u64,
                memory_bytes_per_s,
                architecture: arch.to_owned(),
            },
            multiprocessors,
            shared_limit,
            stream,
            functions: HashMap::new(),
            decode,
            settled: 0,
            decode_modules: Vec::new(),
            versions: (version, capability),
            allocations: HashSet::new(),
            mapped: Vec::new(),
            reserved: 0..0,
            ring,
            module,
            warpgroup,
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
            if name == DECODE && self.decode_modules.is_empty() {
                self.settle(u64::MAX)?;
            }
            let module = match (self.decode_modules.last(), &self.warpgroup) {
                (Some(module), _) if name == DECODE => module,
                (_, Some(module)) if name.starts_with(WARPGROUP) => module,
                _ => &self.module,
            };
            let function = module
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

    /// The address of the slots' twins.
    fn staged(&mut self) -> Result<Address> {
        if let Some(staged) = self.ring.staged {
            return Ok(staged);
        }
        let staged = self.alloc_apart(SLOTS * STAGE_BYTES)?.address;
        self.ring.staged = Some(staged);
        Ok(staged)
    }

    /// Sends the slots that are full on their way, oldest first; waits for those up to slot `wanted` where
    /// it is among them, and for all with `everything`.
    fn send_full(&mut self, wanted: usize, everything: bool) -> Result<()> {
        while let Some(oldest) = self.ring.filling.front() {
            let needed = everything || self.ring.filling.iter().any(|f| f.slot == wanted);
            let outcome = if needed {
                oldest.outcome.recv().ok()
            } else {
                match oldest.outcome.try_recv() {
                    Err(TryRecvError::Empty) => return Ok(()),
                    outcome => outcome.ok(),
                }
            };
            let Some(Filling {
                slot,
                bytes,
                consume,
                ..
            }) = self.ring.filling.pop_front()
            else {
                return Ok(());
            };
            match outcome {
                Some(outcome) => outcome?,
                None => return Err(self.fail("reading weights", "a reading thread is gone")),
            }
            let staged = self.staged()? + (slot * STAGE_BYTES) as u64;
            // Within the ring's memory.
            let pinned = unsafe { self.ring.pinned.add(slot * STAGE_BYTES) };
            check(unsafe {
                sys::cuMemcpyHtoDAsync_v2(staged, pinned.cast(), bytes, self.raw_stream())
            })
            .map_err(|e| self.fail("copying to the device", e))?;
            consume(self, staged)?;
            self.ring.free[slot]
                .record(&self.stream)
                .map_err(|e| self.fail("recording an event", e))?;
        }
        Ok(())
    }

    /// An allocation of its own, whatever is reserved.
    fn alloc_apart(&mut self, bytes: usize) -> Result<Allocation> {
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
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // What a failed load left behind must not be written to once it is freed.
        for filling in self.ring.filling.drain(..) {
            let _ = filling.outcome.recv();
        }
        if self.enter().is_err() || self.stream.synchronize().is_err() {
            return;
        }
        // A failure to free leaves nothing to be done.
        for host in std::mem::take(&mut self.mapped) {
            let _ = unsafe { sys::cuMemFreeHost(host.cast()) };
        }
        let _ = unsafe { sys::cuMemFreeHost(self.ring.pinned.cast()) };
        for address in std::mem::take(&mut self.allocations) {
            let _ = unsafe { sys::cuMemFree_v2(address) };
        }
    }
}

impl Driver for Cuda {
    const STAGE_BYTES: usize = STAGE_BYTES;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn shared_limit(&self) -> usize {
        self.shared_limit
    }

    fn free_bytes(&self) -> Result<u64> {
        self.enter()?;
        let (free, _) =
            cust::memory::mem_get_info().map_err(|e| self.fail("asking free memory", e))?;
        Ok(free as u64)
    }

    fn reserve(&mut self, bytes: usize) -> Result<()> {
        let reserved = self.alloc_apart(bytes)?.address;
        self.reserved = reserved..reserved + bytes as u64;
        Ok(())
    }

    fn alloc(&mut self, bytes: usize) -> Result<Allocation> {
        let size = bytes.max(1).next_multiple_of(256) as u64;
        if size > self.reserved.end - self.reserved.start {
            return self.alloc_apart(bytes);
        }
        let address = self.reserved.start;
        self.reserved.start += size;
        // Freed with all that was reserved, not for itself.
        Ok(Allocation { address, bytes })
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
        let mut from = bytes.as_ptr().cast::<c_void>();
        if bytes.len() <= WRITE_BYTES / 4 {
            // From pinned memory nothing waits, except once a round for the copies of the last.
            if self.ring.write_at + bytes.len() > WRITE_BYTES {
                self.stream
                    .synchronize()
                    .map_err(|e| self.fail("waiting for a copy", e))?;
                self.ring.write_at = 0;
            }
            let at = SLOTS * STAGE_BYTES + self.ring.write_at;
            self.ring.write_at += bytes.len().next_multiple_of(64);
            // Within the ring's memory, where no copy of this round lies.
            unsafe {
                let pinned = self.ring.pinned.add(at);
                ptr::copy_nonoverlapping(bytes.as_ptr(), pinned, bytes.len());
                from = pinned.cast();
            }
        }
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

    fn stage(&mut self, piece: Piece, consume: Consume<Self>) -> Result<()> {
        self.enter()?;
        let bytes = piece.range.len();
        if bytes > STAGE_BYTES {
            return Err(Error::Request(format!(
                "{bytes} bytes do not fit a stage of {STAGE_BYTES}"
            )));
        }
        let slot = self.ring.next;
        self.ring.next = (slot + 1) % SLOTS;
        self.send_full(slot, false)?;
        // An event that was never recorded counts as past.
        self.ring.free[slot]
            .synchronize()
            .map_err(|e| self.fail("waiting for a copy", e))?;
        // The slot is within the ring's memory, and the bus is done with it.
        let outcome = unsafe {
            let pinned = self.ring.pinned.add(slot * STAGE_BYTES);
            self.ring.readers.read(piece, pinned)
        };
        self.ring.filling.push_back(Filling {
            slot,
            bytes,
            outcome,
            consume,
        });
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
        let (stream, parameters) = (self.raw_stream(), parameters.as_mut_ptr());
        let waits = self.versions.1 >= early::CAPABILITY && kernels::WAITING.contains(&kernel);
        // The caller answers for what the pointers in `args` point to; the driver copies `args` itself.
        check(unsafe {
            if waits {
                early::launch(function, grid, block, shared, stream, parameters)
            } else {
                sys::cuLaunchKernel(
                    function,
                    grid.0,
                    grid.1,
                    1,
                    block,
                    1,
                    1,
                    shared as u32,
                    stream,
                    parameters,
                    ptr::null_mut(),
                )
            }
        })
        .map_err(|e| self.fail(&format!("launching {kernel}"), e))
    }

    fn wait(&mut self) -> Result<()> {
        self.enter()?;
        self.send_full(0, true)?;
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

    fn for_racecheck(&mut self) {
        self.decode = ptx::settle(&self.decode, STEP_BARRIER, 0);
    }

    fn settle(&mut self, needs: u64) -> Result<()> {
        let needs = self.settled | needs;
        if needs == self.settled {
            return Ok(());
        }
        self.enter()?;
        let halves = [needs as u32, (needs >> 32) as u32].into_iter().zip(NEEDS);
        let text = halves.fold(self.decode.clone(), |text, (half, id)| {
            ptx::settle(&text, id, half)
        });
        let module = cubin::load(&text, self.versions.0, self.versions.1)
            .map_err(|e| self.fail("compiling the kernel decode", e))?;
        self.decode_modules.push(module);
        self.functions.remove(DECODE);
        self.settled = needs;
        Ok(())
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

    fn warpgroups(&self) -> bool {
        self.warpgroup.is_some()
    }

    fn copy_engine(&self) -> bool {
        self.versions.1 >= 90
    }

    fn tensor_map(&mut self, tiling: &Tiling) -> Result<TensorMap> {
        let mut map = TensorMap([0; 16]);
        check(tensor_map::encode(tiling, &mut map))
            .map_err(|e| self.fail(&format!("describing {tiling:?}"), e))?;
        Ok(map)
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
