//! Global memory: loads and stores with cache hints, asynchronous copies, fences.
//!
//! The names say what the hardware does: `ldg_*` reads through the read-only path (`ld.global.nc`:
//! only for data that nothing writes while the kernel runs), `*_stream` keeps data that is read
//! once, such as weights, out of L1, `ld_*` is the plain, coherent load of a vector.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator;
use crate::shared::SharedPtr;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;
#[cfg(not(target_arch = "nvptx64"))]
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// On the host, an access the hardware would refuse is refused too.
#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
fn aligned<T, const BYTES: usize>(pointer: *const T) {
    if !pointer.addr().is_multiple_of(BYTES) {
        emulator::fail(format!(
            "a global access of {BYTES} bytes at {pointer:p}: must be aligned to {BYTES}"
        ));
    }
}

macro_rules! load_v4 {
    ($($(#[$doc:meta])* $name:ident = $op:literal $(, $pure:ident)?;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// `pointer` is valid for 16 bytes and 16-byte aligned.
        #[inline(always)]
        pub unsafe fn $name<T>(pointer: *const T) -> [u32; 4] {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                let (a, b, c, d): (u32, u32, u32, u32);
                asm!(concat!($op, ".v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];"),
                    out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) pointer as u64,
                    options($($pure,)? readonly, nostack, preserves_flags));
                [a, b, c, d]
            }
            #[cfg(not(target_arch = "nvptx64"))]
            unsafe {
                aligned::<T, 16>(pointer);
                pointer.cast::<[u32; 4]>().read()
            }
        }
    )*};
}

load_v4! {
    /// Loads 16 bytes.
    ld_v4_u32 = "ld.global", pure;
    /// Loads 16 read-only bytes.
    ldg_v4_u32 = "ld.global.nc", pure;
    /// Loads 16 read-only bytes, read once: they take no place in L1.
    ldg_v4_u32_stream = "ld.global.nc.L1::no_allocate", pure;
    /// As [`ldg_v4_u32_stream`], and fetches 256 bytes into L2.
    ldg_v4_u32_stream_l2 = "ld.global.nc.L1::no_allocate.L2::256B", pure;
    /// As [`ldg_v4_u32`], at the place where it is written.
    ldg_v4_u32_here = "ld.global.nc";
    /// As [`ldg_v4_u32_here`], and fetches the 256 bytes around into L2.
    ldg_v4_u32_l2 = "ld.global.nc.L2::256B";
    /// Loads 16 read-only bytes with the evict-first policy.
    ldg_v4_u32_cs = "ld.global.cs", pure;
}

macro_rules! load_v2 {
    ($($(#[$doc:meta])* $name:ident = $op:literal $(, $pure:ident)?;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// `pointer` is valid for 8 bytes and 8-byte aligned.
        #[inline(always)]
        pub unsafe fn $name<T>(pointer: *const T) -> [u32; 2] {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                let (a, b): (u32, u32);
                asm!(concat!($op, ".v2.u32 {{{0}, {1}}}, [{2}];"), out(reg32) a, out(reg32) b, in(reg64) pointer as u64,
                    options($($pure,)? readonly, nostack, preserves_flags));
                [a, b]
            }
            #[cfg(not(target_arch = "nvptx64"))]
            unsafe {
                aligned::<T, 8>(pointer);
                pointer.cast::<[u32; 2]>().read()
            }
        }
    )*};
}

load_v2! {
    /// Loads 8 bytes.
    ld_v2_u32 = "ld.global", pure;
    /// Loads 8 read-only bytes.
    ldg_v2_u32 = "ld.global.nc", pure;
    /// As [`ldg_v2_u32`], at the place where it is written, and fetches the 256 bytes around into L2.
    ldg_v2_u32_l2 = "ld.global.nc.L2::256B";
    /// Loads 8 read-only bytes, read once: they take no place in L1.
    ldg_v2_u32_stream = "ld.global.nc.L1::no_allocate", pure;
}

macro_rules! load {
    ($($(#[$doc:meta])* $name:ident -> $type:ty = $op:literal, $reg:ident $bits:ty $(, $pure:ident)?;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// `pointer` is valid and aligned.
        #[inline(always)]
        pub unsafe fn $name(pointer: *const $type) -> $type {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                let bits: $bits;
                asm!(concat!($op, " {0}, [{1}];"), out($reg) bits, in(reg64) pointer as u64,
                    options($($pure,)? readonly, nostack, preserves_flags));
                bits as $type
            }
            #[cfg(not(target_arch = "nvptx64"))]
            unsafe {
                pointer.read()
            }
        }
    )*};
}

load! {
    /// Loads a read-only byte.
    ldg_u8 -> u8 = "ld.global.nc.u8", reg16 u16, pure;
    /// Loads a read-only 16-bit word.
    ldg_u16 -> u16 = "ld.global.nc.u16", reg16 u16, pure;
    /// Loads a read-only word.
    ldg_u32 -> u32 = "ld.global.nc.u32", reg32 u32, pure;
    /// As [`ldg_u32`], at the place where it is written, and fetches the 256 bytes around into L2.
    ldg_u32_l2 -> u32 = "ld.global.nc.L2::256B.u32", reg32 u32;
    /// As [`ldg_u8`], likewise.
    ldg_u8_l2 -> u8 = "ld.global.nc.L2::256B.u8", reg16 u16;
    /// As [`ldg_u16`], likewise.
    ldg_u16_l2 -> u16 = "ld.global.nc.L2::256B.u16", reg16 u16;
    /// Loads a read-only integer.
    ldg_i32 -> i32 = "ld.global.nc.u32", reg32 u32, pure;
    /// Loads a read-only float.
    ldg_f32 -> f32 = "ld.global.nc.f32", reg32 f32, pure;
    /// Loads a read-only double word.
    ldg_u64 -> u64 = "ld.global.nc.u64", reg64 u64, pure;
    /// Loads a read-only word, read once.
    ldg_u32_stream -> u32 = "ld.global.nc.L1::no_allocate.u32", reg32 u32, pure;
    /// Loads a read-only 16-bit word, read once.
    ldg_u16_stream -> u16 = "ld.global.nc.L1::no_allocate.u16", reg16 u16, pure;
    /// Loads a read-only byte, read once.
    ldg_u8_stream -> u8 = "ld.global.nc.L1::no_allocate.u8", reg16 u16, pure;
    /// Loads a word past L1, as another block may have written it.
    ld_cg_u32 -> u32 = "ld.global.cg.u32", reg32 u32, pure;
    /// Loads a float past L1, as another block may have written it.
    ld_cg_f32 -> f32 = "ld.global.cg.f32", reg32 f32, pure;
}

/// Loads 16 bytes past L1, as another block of this launch may have written them.
///
/// # Safety
/// `pointer` is valid for 16 bytes and 16-byte aligned.
#[inline(always)]
pub unsafe fn ld_cg_v4_u32<T>(pointer: *const T) -> [u32; 4] {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let (a, b, c, d): (u32, u32, u32, u32);
        asm!("ld.global.cg.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) pointer as u64,
            options(pure, readonly, nostack, preserves_flags));
        [a, b, c, d]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        aligned::<T, 16>(pointer);
        pointer.cast::<[u32; 4]>().read()
    }
}

macro_rules! store_vector {
    ($($(#[$doc:meta])* $name:ident = $op:literal, $n:literal: $($lane:ident)*, $bytes:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// `pointer` is valid for the vector and aligned to its size.
        #[inline(always)]
        pub unsafe fn $name<T>(pointer: *mut T, value: [u32; $n]) {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                let [$($lane),*] = value;
                asm!($op, in(reg64) pointer as u64, $(in(reg32) $lane),*, options(nostack, preserves_flags));
            }
            #[cfg(not(target_arch = "nvptx64"))]
            unsafe {
                aligned::<T, $bytes>(pointer);
                pointer.cast::<[u32; $n]>().write(value);
            }
        }
    )*};
}

store_vector! {
    /// Stores 16 bytes.
    st_global_v4 = "st.global.v4.u32 [{0}], {{{1}, {2}, {3}, {4}}};", 4: a b c d, 16;
    /// Stores 16 bytes that nobody reads soon.
    st_global_v4_cs = "st.global.cs.v4.u32 [{0}], {{{1}, {2}, {3}, {4}}};", 4: a b c d, 16;
    /// Stores 8 bytes.
    st_global_v2 = "st.global.v2.u32 [{0}], {{{1}, {2}}};", 2: a b, 8;
}

/// Begins a copy of 16 bytes from global to shared memory, past L1 and the registers. Nothing
/// arrives for certain before [`cp_async_wait`] (and a barrier, for other threads).
///
/// # Safety
/// Both are valid for 16 bytes and 16-byte aligned, until the copy has ended.
#[inline(always)]
pub unsafe fn cp_async_16<T, U>(to: SharedPtr<T>, from: *const U) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("cp.async.cg.shared.global [{0}], [{1}], 16;", in(reg32) to.addr(), in(reg64) from as u64,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        emulator::copy_async(to.addr(), from.cast(), 16, 16);
    }
}

/// As [`cp_async_16`], but only the first `from_bytes` (0 to 16) are read, the rest becomes zero.
///
/// # Safety
/// As [`cp_async_16`]; `from` is valid for `from_bytes`.
#[inline(always)]
pub unsafe fn cp_async_16_zfill<T, U>(to: SharedPtr<T>, from: *const U, from_bytes: u32) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("cp.async.cg.shared.global [{0}], [{1}], 16, {2};", in(reg32) to.addr(), in(reg64) from as u64,
            in(reg32) from_bytes, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        emulator::copy_async(to.addr(), from.cast(), 16, from_bytes);
    }
}

/// As [`cp_async_16`] of `to + OFFSET` from `from + OFFSET` where `condition` holds; without a branch.
///
/// # Safety
/// As [`cp_async_16`], where `condition` holds.
#[inline(always)]
pub unsafe fn cp_async_16_if<const OFFSET: u32, T, U>(
    condition: bool,
    to: SharedPtr<T>,
    from: *const U,
) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("{{ .reg .pred p; setp.ne.u32 p, {2}, 0; @p cp.async.cg.shared.global [{0}+{3}], [{1}+{3}], 16; }}",
            in(reg32) to.addr(), in(reg64) from as u64, in(reg32) u32::from(condition), const OFFSET,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    if condition {
        let from = from.cast::<u8>().wrapping_add(OFFSET as usize);
        emulator::copy_async(to.addr() + OFFSET, from, 16, 16);
    }
}

macro_rules! cp_async_small {
    ($($(#[$doc:meta])* $name:ident of $bytes:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// As [`cp_async_16`], with its own size as alignment.
        #[inline(always)]
        pub unsafe fn $name<T, U>(to: SharedPtr<T>, from: *const U) {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                asm!(concat!("cp.async.ca.shared.global [{0}], [{1}], ", $bytes, ";"), in(reg32) to.addr(),
                    in(reg64) from as u64, options(nostack, preserves_flags));
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                emulator::copy_async(to.addr(), from.cast(), $bytes, $bytes);
            }
        }
    )*};
}

cp_async_small! {
    /// As [`cp_async_16`], of 4 bytes, through L1.
    cp_async_4 of 4;
    /// As [`cp_async_16`], of 8 bytes, through L1.
    cp_async_8 of 8;
}

/// Makes one group of the thread's copies since the last commit.
#[inline(always)]
pub fn cp_async_commit() {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("cp.async.commit_group;", options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        emulator::commit_copies();
    }
}

/// Waits until at most the newest `PENDING` of the thread's groups are under way.
#[inline(always)]
pub fn cp_async_wait<const PENDING: u32>() {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("cp.async.wait_group {};", const PENDING, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        emulator::wait_copies(PENDING as usize, false);
    }
}

/// Waits for all of the thread's copies, committed or not.
#[inline(always)]
pub fn cp_async_wait_all() {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("cp.async.wait_all;", options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        emulator::wait_copies(0, true);
    }
}

/// Asks for a line of global memory in L2.
///
/// # Safety
/// `pointer` points into global memory.
#[inline(always)]
pub unsafe fn prefetch_l2<T>(pointer: *const T) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("prefetch.global.L2 [{}];", in(reg64) pointer as u64, options(readonly, nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let _ = pointer;
    }
}

/// Loads four words that other blocks may write meanwhile: each is whole, their order is free. In a loop
/// that waits, call [`crate::thread::nanosleep`] or [`crate::thread::spin`].
///
/// # Safety
/// `pointer` is valid for 16 bytes and 16-byte aligned.
#[inline(always)]
pub unsafe fn ld_relaxed_v4_u32<T>(pointer: *const T) -> [u32; 4] {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let (a, b, c, d): (u32, u32, u32, u32);
        asm!("ld.relaxed.gpu.global.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) pointer as u64,
            options(nostack, preserves_flags));
        [a, b, c, d]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        aligned::<T, 16>(pointer);
        let words = pointer.cast::<AtomicU32>();
        [0, 1, 2, 3].map(|i| (*words.add(i)).load(Ordering::Relaxed))
    }
}

/// A load of [`await_v4_u32`], and what gathers in register `t` the bits in which its words are not the number: `(word ^ number) | t`.
#[cfg(target_arch = "nvptx64")]
macro_rules! look {
    ($a:literal $b:literal $c:literal $d:literal, $from:literal) => {
        concat!(
            "ld.relaxed.gpu.global.v4.u32 {{{",
            $a,
            "}, {",
            $b,
            "}, {",
            $c,
            "}, {",
            $d,
            "}}}, [{",
            $from,
            "}];"
        )
    };
    ($a:literal $b:literal $c:literal $d:literal => $t:literal) => {
        concat!(
            "xor.b32 ",
            $t,
            ", {",
            $a,
            "}, {number}; ",
            "lop3.b32 ",
            $t,
            ", {",
            $b,
            "}, {number}, ",
            $t,
            ", 0xbe; ",
            "lop3.b32 ",
            $t,
            ", {",
            $c,
            "}, {number}, ",
            $t,
            ", 0xbe; ",
            "lop3.b32 ",
            $t,
            ", {",
            $d,
            "}, {number}, ",
            $t,
            ", 0xbe;"
        )
    };
}

/// The rest of it, of a loop from `again` on: `t0`, `t1` and `t2` of all lanes have none of the bits of the mask.
#[cfg(target_arch = "nvptx64")]
macro_rules! until_there {
    () => {
        concat!(
            "lop3.b32 t0, t0, t1, t2, 0xfe; ",
            "and.b32 t0, t0, {mask}; ",
            "setp.eq.u32 there, t0, 0; ",
            "vote.sync.all.pred there, there, 0xffffffff; ",
            "@!there bra.uni again;"
        )
    };
}

/// Loads four words from each of `N` places, three at most, again and again until all words of all lanes of the warp are `number`
/// in the bits of `mask`. Other blocks may write them meanwhile.
///
/// The loop has few instructions, and one branch that all lanes take: questions that some answer otherwise take as long as the loads.
///
/// # Safety
/// The pointers are valid for 16 bytes and 16-byte aligned; all lanes come.
// A label of PTX is known inside of its braces alone; it has none of numbers.
#[allow(named_asm_labels)]
#[inline(always)]
pub unsafe fn await_v4_u32<const N: usize, T>(
    from: [*const T; N],
    mask: u32,
    number: u32,
) -> [[u32; 4]; N] {
    const { assert!(0 < N && N <= 3) };
    let mut words = [[0; 4]; N];
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let at = |i: usize| from[i % N] as u64;
        let (a, b, c, d): (u32, u32, u32, u32);
        if N == 1 {
            asm!(
                "{{ .reg .pred there; .reg .b32 t0, t1, t2; mov.b32 t1, 0; mov.b32 t2, 0;",
                "again:",
                look!("0" "1" "2" "3", "4"),
                look!("0" "1" "2" "3" => "t0"),
                until_there!(),
                "}}",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d,
                in(reg64) at(0), mask = in(reg32) mask, number = in(reg32) number,
                options(nostack, preserves_flags));
            words[0] = [a, b, c, d];
            return words;
        }
        let (e, f, g, h): (u32, u32, u32, u32);
        if N == 2 {
            asm!(
                "{{ .reg .pred there; .reg .b32 t0, t1, t2; mov.b32 t2, 0;",
                "again:",
                look!("0" "1" "2" "3", "8"),
                look!("4" "5" "6" "7", "9"),
                look!("0" "1" "2" "3" => "t0"),
                look!("4" "5" "6" "7" => "t1"),
                until_there!(),
                "}}",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d,
                out(reg32) e, out(reg32) f, out(reg32) g, out(reg32) h,
                in(reg64) at(0), in(reg64) at(1), mask = in(reg32) mask, number = in(reg32) number,
                options(nostack, preserves_flags));
            words[0] = [a, b, c, d];
            words[1 % N] = [e, f, g, h];
            return words;
        }
        let (i, j, k, l): (u32, u32, u32, u32);
        asm!(
            "{{ .reg .pred there; .reg .b32 t0, t1, t2;",
            "again:",
            look!("0" "1" "2" "3", "12"),
            look!("4" "5" "6" "7", "13"),
            look!("8" "9" "10" "11", "14"),
            look!("0" "1" "2" "3" => "t0"),
            look!("4" "5" "6" "7" => "t1"),
            look!("8" "9" "10" "11" => "t2"),
            until_there!(),
            "}}",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d,
            out(reg32) e, out(reg32) f, out(reg32) g, out(reg32) h,
            out(reg32) i, out(reg32) j, out(reg32) k, out(reg32) l,
            in(reg64) at(0), in(reg64) at(1), in(reg64) at(2),
            mask = in(reg32) mask, number = in(reg32) number,
            options(nostack, preserves_flags));
        words[0] = [a, b, c, d];
        words[1 % N] = [e, f, g, h];
        words[2 % N] = [i, j, k, l];
    }
    #[cfg(not(target_arch = "nvptx64"))]
    loop {
        for i in 0..N {
            words[i] = unsafe { ld_relaxed_v4_u32(from[i]) };
        }
        let there = |w: &[u32; 4]| w.iter().all(|w| (w ^ number) & mask == 0);
        if crate::warp::all(words.iter().all(there)) {
            break;
        }
        crate::thread::spin();
    }
    words
}

/// Stores what other blocks may read meanwhile; each word is whole, the four need not appear together.
///
/// # Safety
/// `pointer` is valid for 16 bytes and 16-byte aligned.
#[inline(always)]
pub unsafe fn st_relaxed_v4_u32<T>(pointer: *mut T, value: [u32; 4]) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("st.relaxed.gpu.global.v4.u32 [{0}], {{{1}, {2}, {3}, {4}}};",
            in(reg64) pointer as u64, in(reg32) value[0], in(reg32) value[1], in(reg32) value[2],
            in(reg32) value[3], options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        aligned::<T, 16>(pointer);
        let words = pointer.cast::<AtomicU32>();
        for (i, value) in value.into_iter().enumerate() {
            (*words.add(i)).store(value, Ordering::Relaxed);
        }
    }
}

macro_rules! relaxed {
    ($($load:ident, $store:ident: $type:ty as $cell:ident = $suffix:literal, $reg:ident;)*) => {$(
        /// Loads what other blocks may write meanwhile; see [`ld_relaxed_v4_u32`].
        ///
        /// # Safety
        /// `pointer` is valid and aligned.
        #[inline(always)]
        pub unsafe fn $load(pointer: *const $type) -> $type {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                let value: $type;
                asm!(concat!("ld.relaxed.gpu.global.", $suffix, " {0}, [{1}];"), out($reg) value,
                    in(reg64) pointer as u64, options(nostack, preserves_flags));
                value
            }
            #[cfg(not(target_arch = "nvptx64"))]
            unsafe {
                (*pointer.cast::<$cell>()).load(Ordering::Relaxed)
            }
        }

        /// Stores what other blocks may read meanwhile; orders nothing else.
        ///
        /// # Safety
        /// `pointer` is valid and aligned.
        #[inline(always)]
        pub unsafe fn $store(pointer: *mut $type, value: $type) {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                asm!(concat!("st.relaxed.gpu.global.", $suffix, " [{0}], {1};"), in(reg64) pointer as u64,
                    in($reg) value, options(nostack, preserves_flags));
            }
            #[cfg(not(target_arch = "nvptx64"))]
            unsafe {
                (*pointer.cast::<$cell>()).store(value, Ordering::Relaxed);
            }
        }
    )*};
}

relaxed! {
    ld_relaxed_u32, st_relaxed_u32: u32 as AtomicU32 = "u32", reg32;
    ld_relaxed_u64, st_relaxed_u64: u64 as AtomicU64 = "u64", reg64;
}

macro_rules! fence {
    ($($(#[$doc:meta])* $name:ident = $op:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                asm!($op, options(nostack, preserves_flags));
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                core::sync::atomic::fence(Ordering::SeqCst);
            }
        }
    )*};
}

fence! {
    /// Orders the thread's memory accesses for all threads of the GPU.
    threadfence = "membar.gl;";
    /// Orders the thread's memory accesses for all threads of the block.
    threadfence_block = "membar.cta;";
    /// Orders the thread's memory accesses for all GPUs and the host.
    threadfence_system = "membar.sys;";
}
