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

/// The host's picture of a barrier: expected and missing arrivals, the phase's parity, and bytes that are to come.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Clone, Copy)]
struct State {
    expected: u32,
    missing: u32,
    parity: u32,
    bytes: u32,
}

#[cfg(not(target_arch = "nvptx64"))]
impl State {
    unsafe fn load(barrier: SharedPtr<u64>) -> State {
        let word = unsafe { barrier.load() };
        let part = |shift: u32| (word >> shift) as u32 & 0xfff;
        State {
            expected: part(0),
            missing: part(12),
            parity: part(24) & 1,
            bytes: (word >> 32) as u32,
        }
    }

    /// Stores it; a phase that misses nothing is followed by the next.
    unsafe fn store(mut self, barrier: SharedPtr<u64>) {
        if self.missing == 0 && self.bytes == 0 {
            self.missing = self.expected;
            self.parity ^= 1;
        }
        let low = self.expected | (self.missing << 12) | (self.parity << 24);
        unsafe { barrier.store(u64::from(low) | (u64::from(self.bytes) << 32)) }
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
        let state = State {
            expected: count,
            missing: count,
            parity: 0,
            bytes: 0,
        };
        state.store(barrier);
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
        let mut state = State::load(barrier);
        state.missing -= 1;
        state.store(barrier);
    }
}

/// Arrives, and says that so many bytes will come by [`copy_bulk`] before the phase is done.
///
/// # Safety
/// As [`arrive`].
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
#[inline(always)]
pub unsafe fn arrive_expecting(barrier: SharedPtr<u64>, bytes: u32) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("{{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [{0}], {1}; }}",
            in(reg32) barrier.addr(), in(reg32) bytes, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        let mut state = State::load(barrier);
        state.missing -= 1;
        state.bytes += bytes;
        state.store(barrier);
    }
}

/// Starts a copy of `bytes` from global to shared memory, by the copy engine; its arrival counts at `barrier`. What is copied is the
/// first to leave the second-level cache.
///
/// # Safety
/// `to` and `from` are valid for `bytes` and 16-byte aligned, `bytes` a multiple of 16; the barrier expects them.
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
#[inline(always)]
pub unsafe fn copy_bulk(to: SharedPtr<u8>, from: *const u8, bytes: u32, barrier: SharedPtr<u64>) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!(
            "{{",
            ".reg .b64 policy;",
            "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;",
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [{0}], [{1}], {2}, [{3}], policy;",
            "}}",
            in(reg32) to.addr(), in(reg64) from as u64, in(reg32) bytes, in(reg32) barrier.addr(),
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        let aligned = (to.addr() | bytes | from as usize as u32).is_multiple_of(16);
        if !aligned {
            emulator::fail("a bulk copy that is not aligned to 16 bytes".to_owned());
        }
        let mut i = 0;
        while i < bytes {
            emulator::copy_async(to.addr() + i, from.add(i as usize), 16, 16);
            i += 16;
        }
        emulator::wait_copies(0, true);
        landed(barrier, bytes);
    }
}

/// The copy engine says that so many bytes have come.
#[cfg(not(target_arch = "nvptx64"))]
pub(crate) unsafe fn landed(barrier: SharedPtr<u64>, bytes: u32) {
    unsafe {
        let mut state = State::load(barrier);
        state.bytes -= bytes;
        state.store(barrier);
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
        let done = State::load(barrier).parity != parity & 1;
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
    while !unsafe { try_wait(barrier, parity) } {}
}

/// As [`test`]; where the hardware can, the thread sleeps for a while first.
#[inline(always)]
unsafe fn try_wait(barrier: SharedPtr<u64>, parity: u32) -> bool {
    #[cfg(cuda_sm_90)]
    unsafe {
        let done: u32;
        asm!("{{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [{1}], {2}; selp.u32 {0}, 1, 0, p; }}",
            out(reg32) done, in(reg32) barrier.addr(), in(reg32) parity, options(nostack, preserves_flags));
        done != 0
    }
    #[cfg(not(cuda_sm_90))]
    unsafe {
        test(barrier, parity)
    }
}

/// Shows barriers that were [made](init) to the copy engine.
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
#[inline(always)]
pub fn show_to_copies() {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!(
            "fence.mbarrier_init.release.cluster;",
            options(nostack, preserves_flags)
        );
    }
}
