//! Launches: checks, errors, and the spreading of blocks over OS threads.

use super::Dim3;
use super::block::Group;
use super::shared_memory::SHARED_LIMIT;
use crate::settled;
use std::ffi::c_void;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// A kernel entry, as `#[kernel]` makes it on the host.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// The entry's name in PTX.
    pub name: &'static str,
    /// Runs the body for the current GPU thread; takes the parameter array of `cuLaunchKernel`.
    pub call: unsafe fn(*const *const c_void),
    /// Size of each parameter in bytes.
    pub params: &'static [usize],
    /// The largest block allowed, in threads; 0: no bound was given.
    pub max_threads: u32,
    /// Blocks per multiprocessor that the register allocation must allow; 0: no bound.
    pub min_blocks: u32,
}

/// Why a launch failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Index of the block, where one is to blame.
    pub block: Option<Dim3>,
    /// Index of the thread in its block, where one is to blame.
    pub thread: Option<Dim3>,
    /// What happened.
    pub message: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {}", self.kernel)?;
        if let Some(block) = self.block {
            write!(f, ", block {block:?}")?;
        }
        if let Some(thread) = self.thread {
            write!(f, ", thread {thread:?}")?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for Error {}

/// How a launch runs.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// OS threads that share the blocks; 0: as many as the machine has cores.
    pub threads: usize,
    /// Keeps all blocks alive together, as `cuLaunchCooperativeKernel` does.
    pub cooperative: bool,
    /// Runs the threads of odd blocks in reverse order.
    pub alternate: bool,
    /// The numbers that the kernel is [settled](crate::settled) for: all ones where nothing is known of one.
    pub settled: [u32; settled::COUNT],
}

impl Default for Options {
    fn default() -> Self {
        Self {
            threads: 0,
            cooperative: false,
            alternate: true,
            settled: [u32::MAX; settled::COUNT],
        }
    }
}

/// What all blocks of a launch share.
pub(crate) struct Launch {
    pub kernel: Kernel,
    pub grid: Dim3,
    pub block: Dim3,
    pub block_threads: u32,
    pub shared_bytes: u32,
    pub params: *const *const c_void,
    pub options: Options,
    /// Whether blocks run on several OS threads.
    pub parallel: bool,
}

// Safety: the parameters are only read, and the caller of a launch vouches for the kernel's own accesses.
unsafe impl Sync for Launch {}

impl Launch {
    pub fn error(
        &self,
        block: Option<Dim3>,
        thread: Option<Dim3>,
        message: impl Into<String>,
    ) -> Error {
        Error {
            kernel: self.kernel.name,
            block,
            thread,
            message: message.into(),
        }
    }

    pub fn block_index(&self, linear: u64) -> Dim3 {
        let (x, y) = (u64::from(self.grid.0), u64::from(self.grid.1));
        (
            (linear % x) as u32,
            (linear / x % y) as u32,
            (linear / (x * y)) as u32,
        )
    }

    fn check(&self) -> Result<u64, Error> {
        let refuse = |message: String| Err(self.error(None, None, message));
        let (grid, block) = (self.grid, self.block);
        let blocks = u64::from(grid.0) * u64::from(grid.1) * u64::from(grid.2);
        let threads = u64::from(block.0) * u64::from(block.1) * u64::from(block.2);
        if blocks == 0 || grid.0 > 0x7fff_ffff || grid.1 > 65_535 || grid.2 > 65_535 {
            return refuse(format!(
                "grid {grid:?} is not within (1..=2147483647, 1..=65535, 1..=65535)"
            ));
        }
        if threads == 0 || threads > 1024 || block.2 > 64 {
            return refuse(format!(
                "block {block:?} has {threads} threads; 1 to 1024 are allowed, z at most 64"
            ));
        }
        let bound = self.kernel.max_threads;
        if bound != 0 && threads > u64::from(bound) {
            return refuse(format!(
                "block {block:?} has {threads} threads; the kernel's launch_bounds allow {bound}"
            ));
        }
        if self.shared_bytes > SHARED_LIMIT {
            return refuse(format!(
                "{} bytes of dynamic shared memory; a block has {SHARED_LIMIT}",
                self.shared_bytes
            ));
        }
        let size: usize = self.kernel.params.iter().sum();
        if size > 4096 {
            return refuse(format!("{size} bytes of parameters; 4096 are allowed"));
        }
        if self.params.is_null() && !self.kernel.params.is_empty() {
            return refuse(format!(
                "no parameter array; the kernel takes {} parameters",
                self.kernel.params.len()
            ));
        }
        for i in 0..self.kernel.params.len() {
            // Safety: the caller passes one pointer per parameter.
            if unsafe { (*self.params.add(i)).is_null() } {
                return refuse(format!(
                    "parameter {i} is a null pointer; each entry must point to its value"
                ));
            }
        }
        Ok(blocks)
    }
}

/// Runs `kernel` over `grid` blocks of `block` threads, and returns when all have ended.
///
/// # Safety
/// `params` holds one pointer per kernel parameter, each to a readable value of the parameter's
/// type; the pointers among those values are valid for what the kernel does with them.
///
/// # Errors
/// A launch the hardware would refuse; a panic in the kernel; misuse of barriers, warps or shared memory.
pub unsafe fn launch(
    kernel: &Kernel,
    grid: Dim3,
    block: Dim3,
    shared_bytes: u32,
    params: *const *const c_void,
) -> Result<(), Error> {
    unsafe {
        launch_with(
            kernel,
            grid,
            block,
            shared_bytes,
            params,
            Options::default(),
        )
    }
}

/// As [`launch`], with all blocks alive together: `grid::sync` may be used.
///
/// # Safety
/// As [`launch`].
///
/// # Errors
/// As [`launch`].
pub unsafe fn launch_cooperative(
    kernel: &Kernel,
    grid: Dim3,
    block: Dim3,
    shared_bytes: u32,
    params: *const *const c_void,
) -> Result<(), Error> {
    let options = Options {
        cooperative: true,
        ..Options::default()
    };
    unsafe { launch_with(kernel, grid, block, shared_bytes, params, options) }
}

/// As [`launch`], with [`Options`].
///
/// # Safety
/// As [`launch`].
///
/// # Errors
/// As [`launch`].
pub unsafe fn launch_with(
    kernel: &Kernel,
    grid: Dim3,
    block: Dim3,
    shared_bytes: u32,
    params: *const *const c_void,
    options: Options,
) -> Result<(), Error> {
    let block_threads = block.0.saturating_mul(block.1).saturating_mul(block.2);
    let mut launch = Launch {
        kernel: *kernel,
        grid,
        block,
        block_threads,
        shared_bytes,
        params,
        options,
        parallel: false,
    };
    let blocks = launch.check()?;
    if options.cooperative {
        return Group::new(&launch, blocks)?.run(0..blocks);
    }
    let cores = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = if options.threads == 0 {
        cores()
    } else {
        options.threads
    };
    // Starting OS threads takes as long as some thousand short GPU threads.
    let small = blocks * u64::from(block_threads) < 4096;
    let workers = if small {
        1
    } else {
        threads.min(usize::try_from(blocks).unwrap_or(usize::MAX))
    };
    launch.parallel = workers > 1;
    let next = AtomicU64::new(0);
    let failed: Mutex<Option<(u64, Error)>> = Mutex::new(None);
    let work = || {
        let mut group = match Group::new(&launch, 1) {
            Ok(group) => group,
            Err(error) => return note(&failed, 0, error),
        };
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= blocks {
                return;
            }
            if let Err(error) = group.run(index..index + 1) {
                next.store(blocks, Ordering::Relaxed);
                return note(&failed, index, error);
            }
        }
    };
    if workers <= 1 {
        work();
    } else {
        std::thread::scope(|scope| {
            for _ in 1..workers {
                scope.spawn(work);
            }
            work();
        });
    }
    match failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// Keeps the error of the first block in order.
fn note(failed: &Mutex<Option<(u64, Error)>>, index: u64, error: Error) {
    let mut failed = failed.lock().unwrap_or_else(|e| e.into_inner());
    if failed.as_ref().is_none_or(|(first, _)| index < *first) {
        *failed = Some((index, error));
    }
}
