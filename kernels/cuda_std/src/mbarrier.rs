//! Barriers in shared memory: who arrives need not wait, who waits need not arrive.
//!
//! A barrier takes `count` arrivals a phase, and phases follow each other; their parity begins with 0. A wait
//! names the parity of the phase that it waits for, so it may come late by one phase, not by two. Right after
//! [`init`] the phase of parity 1 counts as done.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator;
use crate::shared::SharedPtr;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// The host's picture of a barrier: expected and missing arrivals, and the phase's parity.
#[cfg(not(target_arch = "nvptx64"))]
mod word {
    pub fn new(expected: u32, missing: u32, parity: u32) -> u64 {
        u64::from(expected) | (u64::from(missing) << 24) | (u64::from(parity) << 48)
    }

    pub fn read(word: u64) -> (u32, u32, u32) {
        let part = |shift: u32| (word >> shift) as u32 & 0xff_ffff;
        (part(0), part(24), part(48) & 1)
    }
}

/// Makes a barrier for `count` arrivals a phase. A barrier of the block must show it to the others.
///
/// # Safety
/// The barrier lies inside shared memory, 8-byte aligned; nobody uses it yet.
#[inline(always)]
pub unsafe fn init(barrier: SharedPtr<u64>, count: u32) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("mbarrier.init.shared.b64 [{0}], {1};", in(reg32) barrier.addr(), in(reg32) count,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        barrier.store(word::new(count, count, 0));
    }
}

/// Arrives: what this thread did before is seen by who waits for the phase.
///
/// # Safety
/// The barrier was made; its phase misses an arrival.
#[inline(always)]
pub unsafe fn arrive(barrier: SharedPtr<u64>) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("{{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [{0}]; }}", in(reg32) barrier.addr(),
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        let (expected, missing, parity) = word::read(barrier.load());
        barrier.store(if missing > 1 {
            word::new(expected, missing - 1, parity)
        } else {
            word::new(expected, expected, parity ^ 1)
        });
    }
}

/// Arrives once all `cp.async` that this thread has begun have landed; does not wait for it.
///
/// # Safety
/// As [`arrive`].
#[inline(always)]
pub unsafe fn arrive_after_copies(barrier: SharedPtr<u64>) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("cp.async.mbarrier.arrive.noinc.shared.b64 [{0}];", in(reg32) barrier.addr(),
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        emulator::wait_copies(0, true);
        arrive(barrier);
    }
}

/// Whether the phase of this parity is done. In the emulator, where it is not, others run.
///
/// # Safety
/// The barrier was made; its phase is that of `parity` or the one after it.
#[inline(always)]
pub unsafe fn test(barrier: SharedPtr<u64>, parity: u32) -> bool {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let done: u32;
        asm!("{{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [{1}], {2}; selp.u32 {0}, 1, 0, p; }}",
            out(reg32) done, in(reg32) barrier.addr(), in(reg32) parity, options(nostack, preserves_flags));
        done != 0
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        let done = word::read(barrier.load()).2 != parity & 1;
        if !done {
            emulator::spin();
        }
        done
    }
}

/// Waits until the phase of this parity is done.
///
/// # Safety
/// As [`test`].
#[inline(always)]
pub unsafe fn wait(barrier: SharedPtr<u64>, parity: u32) {
    while !unsafe { test(barrier, parity) } {}
}
