//! Integer instructions that one word of quantised weights needs.

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

macro_rules! dot {
    ($($(#[$doc:meta])* $name:ident($a:ty, $b:ty) = $op:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(a: u32, b: u32, c: i32) -> i32 {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                let sum: i32;
                asm!(concat!($op, " {0}, {1}, {2}, {3};"), out(reg32) sum, in(reg32) a, in(reg32) b, in(reg32) c,
                    options(pure, nomem, nostack, preserves_flags));
                sum
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                let products = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
                products.fold(c, |sum, (a, b)| sum.wrapping_add(i32::from(a as $a) * i32::from(b as $b)))
            }
        }
    )*};
}

dot! {
    /// `c` plus the dot product of four signed bytes with four signed bytes.
    dp4a(i8, i8) = "dp4a.s32.s32";
    /// `c` plus the dot product of four unsigned bytes (`a`) with four signed bytes (`b`).
    dp4a_us(u8, i8) = "dp4a.u32.s32";
    /// `c` plus the dot product of four unsigned bytes with four unsigned bytes.
    dp4a_uu(u8, u8) = "dp4a.u32.u32";
}

/// Any function of three bits, for all 32: bit `a*4 + b*2 + c` of `TABLE` is the result. The table
/// of an expression is the expression over `0xf0`, `0xcc`, `0xaa`.
#[inline(always)]
pub fn lop3<const TABLE: u32>(a: u32, b: u32, c: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let result: u32;
        asm!("lop3.b32 {0}, {1}, {2}, {3}, {4};", out(reg32) result, in(reg32) a, in(reg32) b, in(reg32) c,
            const TABLE, options(pure, nomem, nostack, preserves_flags));
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        (0..8)
            .filter(|row| TABLE >> row & 1 != 0)
            .fold(0, |result, row| {
                let pick = |x: u32, bit: u32| if row >> bit & 1 != 0 { x } else { !x };
                result | pick(a, 2) & pick(b, 1) & pick(c, 0)
            })
    }
}

/// Four bytes chosen from the eight of `a` (0 to 3) and `b` (4 to 7), one by each nibble of
/// `selector`; a nibble's top bit copies the byte's sign instead.
#[inline(always)]
pub fn prmt(a: u32, b: u32, selector: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let result: u32;
        asm!("prmt.b32 {0}, {1}, {2}, {3};", out(reg32) result, in(reg32) a, in(reg32) b, in(reg32) selector,
            options(pure, nomem, nostack, preserves_flags));
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
        u32::from_le_bytes(core::array::from_fn(|i| {
            let nibble = selector >> (4 * i) & 0xf;
            let byte = bytes[(nibble & 7) as usize];
            if nibble & 8 == 0 {
                byte
            } else if byte & 0x80 != 0 {
                0xff
            } else {
                0
            }
        }))
    }
}

/// The 32 bits of `high:low` that begin at bit `shift % 32`.
#[inline(always)]
pub fn funnel_shift_right(low: u32, high: u32, shift: u32) -> u32 {
    // Of a shift of 64 bits the assembler makes three instructions. (With one it spills registers of `linear_exact` for 8.0.)
    #[cfg(all(target_arch = "nvptx64", cuda_sm_90))]
    unsafe {
        let y: u32;
        asm!("shf.r.wrap.b32 {0}, {1}, {2}, {3};", out(reg32) y, in(reg32) low, in(reg32) high, in(reg32) shift,
            options(pure, nomem, nostack, preserves_flags));
        y
    }
    #[cfg(not(all(target_arch = "nvptx64", cuda_sm_90)))]
    {
        ((u64::from(high) << 32 | u64::from(low)) >> (shift & 31)) as u32
    }
}

/// `a - b` in each of four bytes, wrapping. (`vsub4` is emulated on these GPUs; this is as fast.)
#[inline(always)]
pub const fn sub_bytes(a: u32, b: u32) -> u32 {
    const TOP: u32 = 0x8080_8080;
    ((a | TOP) - (b & !TOP)) ^ ((a ^ !b) & TOP)
}

/// `x`, which the compiler takes for any number: a loop that steps by it is not unrolled.
#[inline(always)]
pub fn opaque(x: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let y: u32;
        asm!("mov.u32 {0}, {1};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack, preserves_flags));
        y
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        x
    }
}

/// `a / b`, without the check that `b` is not zero.
///
/// # Safety
/// `b` is not zero.
#[inline(always)]
pub unsafe fn quotient(a: u32, b: u32) -> u32 {
    unsafe { core::hint::assert_unchecked(b != 0) }
    a / b
}

/// `x`, which the compiler takes for a new number each time: what follows from it is computed here, and neither moved
/// out of a loop nor kept in registers from before.
#[inline(always)]
pub fn here(x: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let y: u32;
        asm!("mov.u32 {0}, {1};", out(reg32) y, in(reg32) x, options(nomem, nostack, preserves_flags));
        y
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        x
    }
}
