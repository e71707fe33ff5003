//! The NVIDIA driver, opened when it is first needed.
//!
//! `cust` links against `libcuda`, and a program so linked does not start without a driver. Kigo must, so
//! it gives the linker an empty `libcuda.so` (see `.cargo/config.toml`) and defines the driver's functions
//! here: each jumps through a table that [`open`] fills from `libcuda.so.1`. Before that, and for a
//! function that the driver lacks, the table holds one that returns `CUDA_ERROR_NOT_FOUND`.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

const CUDA_ERROR_NOT_FOUND: i32 = 500;

extern "C" fn missing() -> i32 {
    CUDA_ERROR_NOT_FOUND
}

macro_rules! trampolines {
    ($($name:ident)*) => {
        #[allow(non_camel_case_types)]
        #[repr(usize)]
        enum Index {
            $($name,)*
            Count,
        }

        const COUNT: usize = Index::Count as usize;

        const NAMES: [&str; COUNT] = [$(stringify!($name)),*];

        /// Where each function's jump goes.
        static TABLE: [AtomicUsize; COUNT] = [const { AtomicUsize::new(0) }; COUNT];

        $(
            /// Jumps to the driver's function of this name.
            ///
            /// # Safety
            /// That function's own.
            #[unsafe(naked)]
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name() {
                // Arguments stay where the caller put them; only a scratch register is touched.
                #[cfg(target_arch = "x86_64")]
                std::arch::naked_asm!(
                    "mov rax, qword ptr [rip + {table} + {offset}]",
                    "test rax, rax",
                    "jz {missing}",
                    "jmp rax",
                    table = sym TABLE,
                    offset = const Index::$name as usize * 8,
                    missing = sym missing,
                );
                #[cfg(target_arch = "aarch64")]
                std::arch::naked_asm!(
                    "adrp x16, {table}",
                    "add x16, x16, :lo12:{table}",
                    "ldr x16, [x16, {offset}]",
                    "cbz x16, 2f",
                    "br x16",
                    "2: b {missing}",
                    table = sym TABLE,
                    offset = const Index::$name as usize * 8,
                    missing = sym missing,
                );
            }
        )*
    };
}

trampolines! {
    cuArray3DCreate_v2 cuArray3DGetDescriptor_v2 cuArrayDestroy
    cuCtxCreate_v2 cuCtxDestroy_v2 cuCtxGetApiVersion cuCtxGetCacheConfig cuCtxGetCurrent
    cuCtxGetDevice cuCtxGetFlags cuCtxGetLimit cuCtxGetSharedMemConfig
    cuCtxGetStreamPriorityRange cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuCtxSetCacheConfig
    cuCtxSetCurrent cuCtxSetLimit cuCtxSetSharedMemConfig cuCtxSynchronize
    cuDestroyExternalMemory cuDeviceGet cuDeviceGetAttribute cuDeviceGetCount cuDeviceGetName
    cuDeviceGetUuid cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxReset_v2
    cuDevicePrimaryCtxRetain cuDevicePrimaryCtxSetFlags_v2 cuDeviceTotalMem_v2
    cuDriverGetVersion cuEventCreate cuEventDestroy_v2 cuEventElapsedTime cuEventQuery
    cuEventRecord cuEventSynchronize cuFuncGetAttribute cuFuncSetAttribute cuFuncSetCacheConfig
    cuFuncSetSharedMemConfig cuGetErrorName cuGetErrorString cuImportExternalMemory cuInit
    cuLaunchCooperativeKernel cuLaunchHostFunc cuLaunchKernel cuLaunchKernelEx cuLinkAddData_v2
    cuLinkAddFile_v2 cuLinkComplete cuLinkCreate_v2 cuLinkDestroy cuMemAllocHost_v2 cuMemAllocManaged cuMemAlloc_v2
    cuMemFreeHost cuMemFree_v2 cuMemGetInfo_v2 cuMemHostAlloc cuMemcpyDtoHAsync_v2
    cuMemcpyDtoH_v2 cuMemcpyHtoDAsync_v2 cuMemcpyHtoD_v2 cuMemsetD8Async cuModuleGetFunction
    cuModuleGetGlobal_v2 cuModuleLoadData cuModuleLoadDataEx cuModuleUnload
    cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxPotentialBlockSize cuStreamAddCallback
    cuStreamCreateWithPriority cuStreamDestroy_v2 cuStreamGetFlags
    cuStreamGetPriority cuStreamQuery cuStreamSynchronize cuStreamWaitEvent cuSurfObjectCreate
    cuSurfObjectDestroy cuSurfObjectGetResourceDesc cuTexObjectCreate cuTexObjectDestroy
    cuTensorMapEncodeTiled cuTexObjectGetResourceDesc
}

/// Opens the driver's library, once.
///
/// # Errors
/// Says what the loader said.
pub(super) fn open() -> Result<(), String> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    OPENED
        .get_or_init(|| {
            let names = ["libcuda.so.1", "libcuda.so"];
            // Opening a library runs its initialisers; the driver's own are meant for just this.
            let library = names
                .iter()
                .find_map(|name| unsafe { libloading::Library::new(name) }.ok())
                .ok_or_else(|| format!("no NVIDIA driver ({} not found)", names[0]))?;
            for (name, slot) in NAMES.iter().zip(&TABLE) {
                // Only the address is taken; its type is that of cust's declaration.
                if let Ok(symbol) =
                    unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }
                {
                    slot.store(*symbol as usize, Ordering::Release);
                }
            }
            // The driver stays for the life of the process.
            std::mem::forget(library);
            Ok(())
        })
        .clone()
}
