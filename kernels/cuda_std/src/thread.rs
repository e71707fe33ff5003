//! Where a thread is, and how it waits for the others of its block.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator;
#[cfg(target_arch = "nvptx64")]
use core::arch::{asm, nvptx};

macro_rules! index {
    ($($(#[$doc:meta])* $name:ident = $device:ident, $host:ident . $axis:tt;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() -> u32 {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                nvptx::$device() as u32
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                emulator::$host().$axis
            }
        }
    )*};
}

index! {
    /// The thread's x in its block.
    thread_idx_x = _thread_idx_x, thread_idx.0;
    /// The thread's y in its block.
    thread_idx_y = _thread_idx_y, thread_idx.1;
    /// The thread's z in its block.
    thread_idx_z = _thread_idx_z, thread_idx.2;
    /// The block's x in the grid.
    block_idx_x = _block_idx_x, block_idx.0;
    /// The block's y in the grid.
    block_idx_y = _block_idx_y, block_idx.1;
    /// The block's z in the grid.
    block_idx_z = _block_idx_z, block_idx.2;
    /// Threads of a block along x.
    block_dim_x = _block_dim_x, block_dim.0;
    /// Threads of a block along y.
    block_dim_y = _block_dim_y, block_dim.1;
    /// Threads of a block along z.
    block_dim_z = _block_dim_z, block_dim.2;
    /// Blocks of the grid along x.
    grid_dim_x = _grid_dim_x, grid_dim.0;
    /// Blocks of the grid along y.
    grid_dim_y = _grid_dim_y, grid_dim.1;
    /// Blocks of the grid along z.
    grid_dim_z = _grid_dim_z, grid_dim.2;
}

/// The thread's index over the whole grid, for one-dimensional launches.
#[inline(always)]
pub fn index_1d() -> u32 {
    block_idx_x() * block_dim_x() + thread_idx_x()
}

/// The thread's lane in its warp, 0 to 31.
#[inline(always)]
pub fn lane_id() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let lane: u32;
        asm!("mov.u32 {}, %laneid;", out(reg32) lane, options(pure, nomem, nostack, preserves_flags));
        lane
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        emulator::lane()
    }
}

/// The warp's index in a one-dimensional block.
#[inline(always)]
pub fn warp_id() -> u32 {
    thread_idx_x() / 32
}

/// Waits until every thread of the block has come here; shared and global writes before it are
/// visible to the block after it. Every thread must come: none may have exited.
#[inline(always)]
pub fn sync_threads() {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        nvptx::_syncthreads()
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        emulator::barrier(0, None, emulator::BarrierKind::Sync, false);
    }
}

macro_rules! sync_reduce {
    ($($(#[$doc:meta])* $name:ident = $red:literal $kind:ident;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(predicate: bool) -> u32 {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                let result: u32;
                asm!($red, out(reg32) result, in(reg32) u32::from(predicate), options(nostack));
                result
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                emulator::barrier(0, None, emulator::BarrierKind::$kind, predicate)
            }
        }
    )*};
}

sync_reduce! {
    /// As [`sync_threads`]; how many threads' predicates are true.
    sync_threads_count = "{{ .reg .pred p; setp.ne.u32 p, {1}, 0; bar.red.popc.u32 {0}, 0, p; }}" Count;
    /// As [`sync_threads`]; 1 if any thread's predicate is true, else 0.
    sync_threads_or = "{{ .reg .pred p, q; setp.ne.u32 p, {1}, 0; bar.red.or.pred q, 0, p; selp.u32 {0}, 1, 0, q; }}" Or;
    /// As [`sync_threads`]; 1 if every thread's predicate is true, else 0.
    sync_threads_and = "{{ .reg .pred p, q; setp.ne.u32 p, {1}, 0; bar.red.and.pred q, 0, p; selp.u32 {0}, 1, 0, q; }}" And;
}

/// Waits at barrier `id` (0 to 15; 0 is that of [`sync_threads`]) until `count` threads, a
/// multiple of 32, have come, wherever in the kernel they are.
#[inline(always)]
pub fn bar_sync(id: u32, count: u32) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        // Not `bar.sync`, which stands for `barrier.sync.aligned`: compute-sanitizer takes that for one place in the code.
        asm!("barrier.cta.sync {0}, {1};", in(reg32) id, in(reg32) count, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        emulator::barrier(id, Some(count), emulator::BarrierKind::Sync, false);
    }
}

/// The multiprocessor's cycle counter.
#[inline(always)]
pub fn clock64() -> u64 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let clock: u64;
        asm!("mov.u64 {}, %clock64;", out(reg64) clock, options(nomem, nostack));
        clock
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        globaltimer()
    }
}

/// The low half of [`clock64`].
#[inline(always)]
pub fn clock() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let clock: u32;
        asm!("mov.u32 {}, %clock;", out(reg32) clock, options(nomem, nostack));
        clock
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        globaltimer() as u32
    }
}

/// Belongs into loops that look for what another thread writes: in the emulator it lets others run once. A card has no
/// use for it.
#[inline(always)]
pub fn spin() {
    #[cfg(not(target_arch = "nvptx64"))]
    emulator::spin();
}

/// Nanoseconds of the GPU's global timer.
#[inline(always)]
pub fn globaltimer() -> u64 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let time: u64;
        asm!("mov.u64 {}, %globaltimer;", out(reg64) time, options(nomem, nostack));
        time
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        START
            .get_or_init(std::time::Instant::now)
            .elapsed()
            .as_nanos() as u64
    }
}

/// Sleeps about `nanoseconds` (at most a million). A loop that waits on memory must call it, or
/// the emulator never runs the thread it waits for.
#[inline(always)]
pub fn nanosleep(nanoseconds: u32) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("nanosleep.u32 {};", in(reg32) nanoseconds, options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let _ = nanoseconds;
        emulator::spin();
    }
}

/// Programmatic dependent launch: lets the next kernel of the stream begin (needs PTX for sm_90;
/// else nothing happens).
#[inline(always)]
pub fn griddepcontrol_launch_dependents() {
    #[cfg(all(target_arch = "nvptx64", cuda_sm_90))]
    unsafe {
        asm!("griddepcontrol.launch_dependents;", options(nostack));
    }
}

/// Programmatic dependent launch: waits until the kernel before has ended and its writes can be
/// seen (needs PTX for sm_90; else nothing happens).
#[inline(always)]
pub fn griddepcontrol_wait() {
    #[cfg(all(target_arch = "nvptx64", cuda_sm_90))]
    unsafe {
        asm!("griddepcontrol.wait;", options(nostack));
    }
}

/// Ends the kernel with an error (what a panic does on the device).
#[inline(always)]
pub fn trap() -> ! {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        nvptx::trap()
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        panic!("trap")
    }
}
