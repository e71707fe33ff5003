//! 16-bit floats, alone and in pairs.
//!
//! On the device each conversion is one instruction; on the host the `half` crate does the same
//! rounding (to nearest, ties to even).

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// The bits of an IEEE half-precision float.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct F16(pub u16);

/// The bits of a bfloat16: the upper half of an `f32`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct BF16(pub u16);

/// Two [`F16`], the first in the low half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Half2(pub u32);

impl F16 {
    /// The nearest half; ties to even; too large becomes infinite.
    #[inline(always)]
    pub fn from_f32(value: f32) -> Self {
        #[cfg(target_arch = "nvptx64")]
        {
            Self((value as f16).to_bits())
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            Self(::half::f16::from_f32(value).to_bits())
        }
    }

    /// The value, exactly.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        #[cfg(target_arch = "nvptx64")]
        {
            f16::from_bits(self.0) as f32
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            ::half::f16::from_bits(self.0).to_f32()
        }
    }

    /// From bits.
    #[inline(always)]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The bits.
    #[inline(always)]
    pub const fn to_bits(self) -> u16 {
        self.0
    }
}

impl BF16 {
    /// The nearest bfloat16; ties to even.
    #[inline(always)]
    pub fn from_f32(value: f32) -> Self {
        #[cfg(target_arch = "nvptx64")]
        unsafe {
            let bits: u16;
            asm!("cvt.rn.bf16.f32 {0}, {1};", out(reg16) bits, in(reg32) value,
                options(pure, nomem, nostack, preserves_flags));
            Self(bits)
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            Self(::half::bf16::from_f32(value).to_bits())
        }
    }

    /// The value, exactly.
    #[inline(always)]
    pub const fn to_f32(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }

    /// From bits.
    #[inline(always)]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// The bits.
    #[inline(always)]
    pub const fn to_bits(self) -> u16 {
        self.0
    }
}

impl Half2 {
    /// Both halves rounded: `low` into the lower half.
    #[inline(always)]
    pub fn from_f32(low: f32, high: f32) -> Self {
        #[cfg(target_arch = "nvptx64")]
        unsafe {
            let bits: u32;
            asm!("cvt.rn.f16x2.f32 {0}, {1}, {2};", out(reg32) bits, in(reg32) high, in(reg32) low,
                options(pure, nomem, nostack, preserves_flags));
            Self(bits)
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            Self::new(F16::from_f32(low), F16::from_f32(high))
        }
    }

    /// From two halves.
    #[inline(always)]
    pub const fn new(low: F16, high: F16) -> Self {
        Self(low.0 as u32 | (high.0 as u32) << 16)
    }

    /// The same half twice.
    #[inline(always)]
    pub const fn splat(value: F16) -> Self {
        Self::new(value, value)
    }

    /// The lower half.
    #[inline(always)]
    pub const fn low(self) -> F16 {
        F16(self.0 as u16)
    }

    /// The upper half.
    #[inline(always)]
    pub const fn high(self) -> F16 {
        F16((self.0 >> 16) as u16)
    }

    /// Both values, exactly, the lower half first.
    #[inline(always)]
    pub fn to_f32(self) -> [f32; 2] {
        [self.low().to_f32(), self.high().to_f32()]
    }

    #[cfg(not(target_arch = "nvptx64"))]
    fn map(operation: impl Fn([f64; 3]) -> f64, operands: [Self; 3]) -> Self {
        // Sums and products of halves are exact in f64 but for exponents far apart, where the
        // second rounding cannot be seen.
        let lane = |get: fn(Self) -> F16| {
            let values = operands.map(|x| ::half::f16::from_bits(get(x).0).to_f64());
            F16(::half::f16::from_f64(operation(values)).to_bits())
        };
        Self::new(lane(Self::low), lane(Self::high))
    }
}

macro_rules! packed {
    ($($(#[$doc:meta])* $name:ident($($arg:ident),*) = $op:literal, $host:expr;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name($($arg: Half2),*) -> Half2 {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                let result: u32;
                asm!($op, out(reg32) result, $(in(reg32) $arg.0),*, options(pure, nomem, nostack, preserves_flags));
                Half2(result)
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                let mut operands = [Half2(0); 3];
                for (to, from) in operands.iter_mut().zip([$($arg),*]) {
                    *to = from;
                }
                Half2::map($host, operands)
            }
        }
    )*};
}

packed! {
    /// `a * b + c` in each half, rounded once.
    hfma2(a, b, c) = "fma.rn.f16x2 {0}, {1}, {2}, {3};", |[a, b, c]| a * b + c;
    /// `a + b` in each half.
    hadd2(a, b) = "add.rn.f16x2 {0}, {1}, {2};", |[a, b, _]| a + b;
    /// `a - b` in each half.
    hsub2(a, b) = "sub.rn.f16x2 {0}, {1}, {2};", |[a, b, _]| a - b;
    /// `a * b` in each half.
    hmul2(a, b) = "mul.rn.f16x2 {0}, {1}, {2};", |[a, b, _]| a * b;
    /// The greater in each half; a NaN loses.
    hmax2(a, b) = "max.f16x2 {0}, {1}, {2};", |[a, b, _]| a.max(b);
}

/// Two floats as bfloat16, `low` in the lower half.
#[inline(always)]
pub fn pack_bf16x2(low: f32, high: f32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let bits: u32;
        asm!("cvt.rn.bf16x2.f32 {0}, {1}, {2};", out(reg32) bits, in(reg32) high, in(reg32) low,
            options(pure, nomem, nostack, preserves_flags));
        bits
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        u32::from(BF16::from_f32(low).0) | u32::from(BF16::from_f32(high).0) << 16
    }
}

/// Two floats as halves, `low` in the lower half.
#[inline(always)]
pub fn pack_f16x2(low: f32, high: f32) -> u32 {
    Half2::from_f32(low, high).0
}

/// An `f32` rounded to TF32 (10 bits of mantissa), for [`crate::mma`].
#[inline(always)]
pub fn to_tf32(value: f32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let bits: u32;
        asm!("cvt.rna.tf32.f32 {0}, {1};", out(reg32) bits, in(reg32) value,
            options(pure, nomem, nostack, preserves_flags));
        bits
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        // To nearest, ties away from zero.
        if value.is_finite() {
            value.to_bits().wrapping_add(0x1000) & !0x1fff
        } else {
            value.to_bits()
        }
    }
}

/// The bits of `x` rounded to f16; values past its range saturate.
#[inline(always)]
pub fn to_f16(x: f32) -> u16 {
    F16::from_f32(x.clamp(-65504.0, 65504.0)).to_bits()
}
