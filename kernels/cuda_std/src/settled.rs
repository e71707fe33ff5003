//! Numbers that are settled when a module is loaded.
//!
//! A kernel that serves many cases carries code for all of them; which of them a launch can meet is often known before
//! it is compiled for the card. Such a number is a constant in the PTX, all ones, marked by a comment: who loads the module
//! may write another in its place, and what can no longer be reached is never compiled.

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// How many numbers a kernel may have, from 0 on.
pub const COUNT: usize = 4;

/// The number `ID`; all ones unless the module's PTX was settled.
///
/// In the PTX it is `mov.b32 …, 0xffffffff; // cuda_std settled ID`; in the emulator a launch says it
/// (`emulator::Options::settled`).
#[inline(always)]
pub fn settled<const ID: u32>() -> u32 {
    const { assert!((ID as usize) < COUNT) };
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let number: u32;
        asm!("mov.b32 {0}, 0xffffffff; // cuda_std settled {1}", out(reg32) number, const ID,
            options(pure, nomem, nostack, preserves_flags));
        number
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        crate::emulator::settled(ID)
    }
}
