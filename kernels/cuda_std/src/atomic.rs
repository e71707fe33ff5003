//! Atomic operations on global and shared memory, of the whole GPU's scope.
//!
//! Each returns the old value (one that is not used costs nothing: `ptxas` makes a reduction of
//! it) and orders nothing; [`load_acquire_u32`] and [`red_release_add_u32`] do.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator;
use crate::shared::SharedPtr;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;
#[cfg(not(target_arch = "nvptx64"))]
use core::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

macro_rules! atomics {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $op:literal, $reg:ident; $cell:ident $method:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// `pointer` is valid, aligned, in global memory.
        #[inline(always)]
        pub unsafe fn $name(pointer: *mut $type, value: $type) -> $type {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                let old: $type;
                asm!(concat!("atom.global.", $op, " {0}, [{1}], {2};"), out($reg) old, in(reg64) pointer as u64,
                    in($reg) value, options(nostack, preserves_flags));
                old
            }
            #[cfg(not(target_arch = "nvptx64"))]
            unsafe {
                $cell::from_ptr(pointer).$method(value, Ordering::Relaxed)
            }
        }
    )*};
}

atomics! {
    /// Adds `value`.
    add_u32: u32 = "add.u32", reg32; AtomicU32 fetch_add;
    /// Adds `value`.
    add_i32: i32 = "add.s32", reg32; AtomicI32 fetch_add;
    /// Adds `value`.
    add_u64: u64 = "add.u64", reg64; AtomicU64 fetch_add;
    /// Stores the greater of both.
    max_u32: u32 = "max.u32", reg32; AtomicU32 fetch_max;
    /// Stores the greater of both.
    max_i32: i32 = "max.s32", reg32; AtomicI32 fetch_max;
    /// Stores the greater of both.
    max_u64: u64 = "max.u64", reg64; AtomicU64 fetch_max;
    /// Stores the lesser of both.
    min_u32: u32 = "min.u32", reg32; AtomicU32 fetch_min;
    /// Stores the lesser of both.
    min_i32: i32 = "min.s32", reg32; AtomicI32 fetch_min;
    /// Stores the lesser of both.
    min_u64: u64 = "min.u64", reg64; AtomicU64 fetch_min;
    /// Stores the bits set in either.
    or_u32: u32 = "or.b32", reg32; AtomicU32 fetch_or;
    /// Stores the bits set in both.
    and_u32: u32 = "and.b32", reg32; AtomicU32 fetch_and;
    /// Stores `value`.
    exch_u32: u32 = "exch.b32", reg32; AtomicU32 swap;
    /// Stores `value`.
    exch_u64: u64 = "exch.b64", reg64; AtomicU64 swap;
}

/// Adds `value`. The order of additions is not fixed, so the sum's last bits are not either.
///
/// # Safety
/// `pointer` is valid, aligned, in global memory.
#[inline(always)]
pub unsafe fn add_f32(pointer: *mut f32, value: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let old: f32;
        asm!("atom.global.add.f32 {0}, [{1}], {2};", out(reg32) old, in(reg64) pointer as u64, in(reg32) value,
            options(nostack, preserves_flags));
        old
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        let cell = AtomicU32::from_ptr(pointer.cast());
        let add = |old| Some((f32::from_bits(old) + value).to_bits());
        let (Ok(old) | Err(old)) = cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        f32::from_bits(old)
    }
}

/// Stores `value` if `expected` is there; the old value either way.
///
/// # Safety
/// `pointer` is valid, aligned, in global memory.
#[inline(always)]
pub unsafe fn cas_u32(pointer: *mut u32, expected: u32, value: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let old: u32;
        asm!("atom.global.cas.b32 {0}, [{1}], {2}, {3};", out(reg32) old, in(reg64) pointer as u64,
            in(reg32) expected, in(reg32) value, options(nostack, preserves_flags));
        old
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        let cell = AtomicU32::from_ptr(pointer);
        let (Ok(old) | Err(old)) =
            cell.compare_exchange(expected, value, Ordering::Relaxed, Ordering::Relaxed);
        old
    }
}

macro_rules! shared_atomics {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $op:literal, $reg:ident; $cell:ident $method:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// The address is inside the block's shared memory and aligned.
        #[inline(always)]
        pub unsafe fn $name(pointer: SharedPtr<$type>, value: $type) -> $type {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                let old: $type;
                asm!(concat!("atom.shared.", $op, " {0}, [{1}], {2};"), out($reg) old, in(reg32) pointer.addr(),
                    in($reg) value, options(nostack, preserves_flags));
                old
            }
            #[cfg(not(target_arch = "nvptx64"))]
            unsafe {
                let bytes = size_of::<$type>();
                let pointer = emulator::shared_access(pointer.addr(), bytes, bytes, "an atomic access");
                $cell::from_ptr(pointer.cast()).$method(value, Ordering::Relaxed)
            }
        }
    )*};
}

shared_atomics! {
    /// Adds `value` in shared memory.
    shared_add_u32: u32 = "add.u32", reg32; AtomicU32 fetch_add;
    /// Adds `value` in shared memory.
    shared_add_i32: i32 = "add.s32", reg32; AtomicI32 fetch_add;
    /// Adds `value` in shared memory.
    shared_add_u64: u64 = "add.u64", reg64; AtomicU64 fetch_add;
    /// Stores the greater of both in shared memory.
    shared_max_u32: u32 = "max.u32", reg32; AtomicU32 fetch_max;
    /// Stores the greater of both in shared memory.
    shared_max_u64: u64 = "max.u64", reg64; AtomicU64 fetch_max;
    /// Stores the lesser of both in shared memory.
    shared_min_u32: u32 = "min.u32", reg32; AtomicU32 fetch_min;
}

/// Loads; what the releasing thread wrote before its release can be seen after it. In a loop that
/// waits, call [`crate::thread::nanosleep`].
///
/// # Safety
/// `pointer` is valid, aligned, in global memory.
#[inline(always)]
pub unsafe fn load_acquire_u32(pointer: *const u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let value: u32;
        asm!("ld.acquire.gpu.global.u32 {0}, [{1}];", out(reg32) value, in(reg64) pointer as u64,
            options(nostack, preserves_flags));
        value
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        AtomicU32::from_ptr(pointer.cast_mut()).load(Ordering::Acquire)
    }
}

/// Stores; what this thread wrote before can be seen by who acquires the value.
///
/// # Safety
/// `pointer` is valid, aligned, in global memory.
#[inline(always)]
pub unsafe fn store_release_u32(pointer: *mut u32, value: u32) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("st.release.gpu.global.u32 [{0}], {1};", in(reg64) pointer as u64, in(reg32) value,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        AtomicU32::from_ptr(pointer).store(value, Ordering::Release);
    }
}

/// Adds; what this thread wrote before can be seen by who acquires the sum.
///
/// # Safety
/// `pointer` is valid, aligned, in global memory.
#[inline(always)]
pub unsafe fn red_release_add_u32(pointer: *mut u32, value: u32) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("red.release.gpu.global.add.u32 [{0}], {1};", in(reg64) pointer as u64, in(reg32) value,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        AtomicU32::from_ptr(pointer).fetch_add(value, Ordering::Release);
    }
}

/// Adds and returns the old value, acquiring and releasing: for "the last block goes on".
///
/// # Safety
/// `pointer` is valid, aligned, in global memory.
#[inline(always)]
pub unsafe fn add_acq_rel_u32(pointer: *mut u32, value: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let old: u32;
        asm!("atom.acq_rel.gpu.global.add.u32 {0}, [{1}], {2};", out(reg32) old, in(reg64) pointer as u64,
            in(reg32) value, options(nostack, preserves_flags));
        old
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        AtomicU32::from_ptr(pointer).fetch_add(value, Ordering::AcqRel)
    }
}
