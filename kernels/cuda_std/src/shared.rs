//! Shared memory.
//!
//! A pointer on the device is generic: a load through it first finds out which memory it means.
//! [`SharedPtr`] is a 32-bit address within shared memory, its accesses are `ld.shared` and
//! `st.shared`; hot loops use it.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator;
use crate::half::{BF16, F16, Half2};
#[cfg(target_arch = "nvptx64")]
use core::arch::{asm, global_asm};
use core::marker::PhantomData;

pub use cuda_std_macros::{shared_array, shared_static};

#[cfg(target_arch = "nvptx64")]
global_asm!(".extern .shared .align 128 .b8 __cuda_std_dynamic_shared[];");

/// An address in shared memory of an array of `T`.
#[repr(transparent)]
pub struct SharedPtr<T> {
    addr: u32,
    _type: PhantomData<*mut T>,
}

impl<T> Clone for SharedPtr<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedPtr<T> {}

/// The address `byte_offset` bytes into dynamic shared memory.
#[inline(always)]
pub fn at<T>(byte_offset: u32) -> SharedPtr<T> {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let base: u32;
        asm!("mov.u32 {}, __cuda_std_dynamic_shared;", out(reg32) base, options(pure, nomem, nostack, preserves_flags));
        SharedPtr::from_addr(base + byte_offset)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        SharedPtr::from_addr(emulator::DYNAMIC_START + byte_offset)
    }
}

/// The start of dynamic shared memory, 128-byte aligned; its size is the launch's.
#[inline(always)]
pub fn dynamic_shared_mem<T>() -> *mut T {
    at::<T>(0).as_ptr()
}

/// Bytes of dynamic shared memory that the launch asked for.
#[inline(always)]
pub fn dynamic_smem_size() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let bytes: u32;
        asm!("mov.u32 {}, %dynamic_smem_size;", out(reg32) bytes, options(pure, nomem, nostack, preserves_flags));
        bytes
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        emulator::dynamic_shared_bytes()
    }
}

impl<T> SharedPtr<T> {
    /// The pointer with this address.
    #[inline(always)]
    pub const fn from_addr(addr: u32) -> Self {
        Self {
            addr,
            _type: PhantomData,
        }
    }

    /// The shared address of a generic pointer into shared memory.
    #[inline(always)]
    pub fn from_generic(pointer: *const T) -> Self {
        #[cfg(target_arch = "nvptx64")]
        unsafe {
            let addr: u64;
            asm!("cvta.to.shared.u64 {}, {};", out(reg64) addr, in(reg64) pointer as u64,
                options(pure, nomem, nostack, preserves_flags));
            Self::from_addr(addr as u32)
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            Self::from_addr(emulator::shared_pointer(pointer.cast()))
        }
    }

    /// The address, in bytes.
    #[inline(always)]
    pub const fn addr(self) -> u32 {
        self.addr
    }

    /// `count` elements further.
    #[inline(always)]
    pub const fn add(self, count: u32) -> Self {
        Self::from_addr(
            self.addr
                .wrapping_add(count.wrapping_mul(size_of::<T>() as u32)),
        )
    }

    /// `bytes` bytes further.
    #[inline(always)]
    pub const fn byte_add(self, bytes: u32) -> Self {
        Self::from_addr(self.addr.wrapping_add(bytes))
    }

    /// The same address, of other elements.
    #[inline(always)]
    pub const fn cast<U>(self) -> SharedPtr<U> {
        SharedPtr::from_addr(self.addr)
    }

    /// A generic pointer to the same place.
    #[inline(always)]
    pub fn as_ptr(self) -> *mut T {
        #[cfg(target_arch = "nvptx64")]
        unsafe {
            let pointer: u64;
            asm!("cvta.shared.u64 {}, {};", out(reg64) pointer, in(reg64) u64::from(self.addr),
                options(pure, nomem, nostack, preserves_flags));
            pointer as *mut T
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            emulator::shared_to_pointer(self.addr).cast()
        }
    }
}

impl<T: Scalar> SharedPtr<T> {
    /// Loads one element.
    ///
    /// # Safety
    /// The address is inside the block's shared memory and aligned; no other thread writes it now.
    #[inline(always)]
    pub unsafe fn load(self) -> T {
        unsafe { T::load(self.addr) }
    }

    /// Stores one element.
    ///
    /// # Safety
    /// As [`SharedPtr::load`]; no other thread uses it now.
    #[inline(always)]
    pub unsafe fn store(self, value: T) {
        unsafe { T::store(self.addr, value) }
    }
}

impl<T: Word> SharedPtr<T> {
    /// Loads two elements; 8-byte aligned.
    ///
    /// # Safety
    /// As [`SharedPtr::load`].
    #[inline(always)]
    pub unsafe fn load_v2(self) -> [T; 2] {
        #[cfg(target_arch = "nvptx64")]
        unsafe {
            let (a, b): (u32, u32);
            asm!("ld.shared.v2.u32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg32) self.addr,
                options(pure, readonly, nostack, preserves_flags));
            [T::from_word(a), T::from_word(b)]
        }
        #[cfg(not(target_arch = "nvptx64"))]
        unsafe {
            emulator::shared_access(self.addr, 8, 8, "a load")
                .cast::<[u32; 2]>()
                .read()
                .map(T::from_word)
        }
    }

    /// Loads four elements; 16-byte aligned.
    ///
    /// # Safety
    /// As [`SharedPtr::load`].
    #[inline(always)]
    pub unsafe fn load_v4(self) -> [T; 4] {
        #[cfg(target_arch = "nvptx64")]
        unsafe {
            let (a, b, c, d): (u32, u32, u32, u32);
            asm!("ld.shared.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) self.addr,
                options(pure, readonly, nostack, preserves_flags));
            [
                T::from_word(a),
                T::from_word(b),
                T::from_word(c),
                T::from_word(d),
            ]
        }
        #[cfg(not(target_arch = "nvptx64"))]
        unsafe {
            emulator::shared_access(self.addr, 16, 16, "a load")
                .cast::<[u32; 4]>()
                .read()
                .map(T::from_word)
        }
    }

    /// Stores two elements; 8-byte aligned.
    ///
    /// # Safety
    /// As [`SharedPtr::store`].
    #[inline(always)]
    pub unsafe fn store_v2(self, value: [T; 2]) {
        let [a, b] = value.map(T::to_word);
        #[cfg(target_arch = "nvptx64")]
        unsafe {
            asm!("st.shared.v2.u32 [{2}], {{{0}, {1}}};", in(reg32) a, in(reg32) b, in(reg32) self.addr,
                options(nostack, preserves_flags));
        }
        #[cfg(not(target_arch = "nvptx64"))]
        unsafe {
            emulator::shared_access(self.addr, 8, 8, "a store")
                .cast::<[u32; 2]>()
                .write([a, b]);
        }
    }

    /// Stores four elements; 16-byte aligned.
    ///
    /// # Safety
    /// As [`SharedPtr::store`].
    #[inline(always)]
    pub unsafe fn store_v4(self, value: [T; 4]) {
        let [a, b, c, d] = value.map(T::to_word);
        #[cfg(target_arch = "nvptx64")]
        unsafe {
            asm!("st.shared.v4.u32 [{4}], {{{0}, {1}, {2}, {3}}};",
                in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, in(reg32) self.addr,
                options(nostack, preserves_flags));
        }
        #[cfg(not(target_arch = "nvptx64"))]
        unsafe {
            emulator::shared_access(self.addr, 16, 16, "a store")
                .cast::<[u32; 4]>()
                .write([a, b, c, d]);
        }
    }
}

/// What one instruction loads from and stores to shared memory.
pub trait Scalar: Copy {
    /// # Safety
    /// `addr` is inside the block's shared memory and aligned.
    unsafe fn load(addr: u32) -> Self;
    /// # Safety
    /// `addr` is inside the block's shared memory and aligned.
    unsafe fn store(addr: u32, value: Self);
}

/// A scalar of 32 bits, for vectors of two and four.
pub trait Word: Scalar {
    /// The bits.
    fn to_word(self) -> u32;
    /// From bits.
    fn from_word(word: u32) -> Self;
}

macro_rules! scalar {
    ($($type:ty: $reg:ident $suffix:literal as $bits:ty, $to:expr, $from:expr;)*) => {$(
        impl Scalar for $type {
            #[inline(always)]
            unsafe fn load(addr: u32) -> Self {
                #[cfg(target_arch = "nvptx64")]
                unsafe {
                    let bits: $bits;
                    asm!(concat!("ld.shared.", $suffix, " {0}, [{1}];"), out($reg) bits, in(reg32) addr,
                        options(pure, readonly, nostack, preserves_flags));
                    $from(bits)
                }
                #[cfg(not(target_arch = "nvptx64"))]
                unsafe {
                    let bytes = size_of::<Self>();
                    emulator::shared_access(addr, bytes, bytes, "a load").cast::<Self>().read()
                }
            }

            #[inline(always)]
            unsafe fn store(addr: u32, value: Self) {
                #[cfg(target_arch = "nvptx64")]
                unsafe {
                    let bits: $bits = $to(value);
                    asm!(concat!("st.shared.", $suffix, " [{1}], {0};"), in($reg) bits, in(reg32) addr,
                        options(nostack, preserves_flags));
                }
                #[cfg(not(target_arch = "nvptx64"))]
                unsafe {
                    let bytes = size_of::<Self>();
                    emulator::shared_access(addr, bytes, bytes, "a store").cast::<Self>().write(value);
                }
            }
        }
    )*};
}

scalar! {
    u8: reg16 "u8" as u16, |v| v as u16, |b| b as u8;
    i8: reg16 "u8" as u16, |v: i8| v as u8 as u16, |b| b as i8;
    u16: reg16 "u16" as u16, |v| v, |b| b;
    i16: reg16 "u16" as u16, |v| v as u16, |b| b as i16;
    u32: reg32 "u32" as u32, |v| v, |b| b;
    i32: reg32 "u32" as u32, |v| v as u32, |b| b as i32;
    f32: reg32 "f32" as f32, |v| v, |b| b;
    u64: reg64 "u64" as u64, |v| v, |b| b;
    F16: reg16 "u16" as u16, |v: F16| v.0, F16;
    BF16: reg16 "u16" as u16, |v: BF16| v.0, BF16;
    Half2: reg32 "u32" as u32, |v: Half2| v.0, Half2;
}

macro_rules! word {
    ($($type:ty: $to:expr, $from:expr;)*) => {$(
        impl Word for $type {
            #[inline(always)]
            fn to_word(self) -> u32 {
                $to(self)
            }

            #[inline(always)]
            fn from_word(word: u32) -> Self {
                $from(word)
            }
        }
    )*};
}

word! {
    u32: |v| v, |w| w;
    i32: |v| v as u32, |w| w as i32;
    f32: f32::to_bits, f32::from_bits;
    Half2: |v: Half2| v.0, Half2;
}
