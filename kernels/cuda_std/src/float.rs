//! Elementary functions of `f32`.
//!
//! `core` has none on the device. [`exp`], [`ln`], [`sin`], [`cos`], [`tanh`], [`powf`] are one
//! code for both targets, good to two units in the last place; the `*_approx` functions are single
//! instructions of the hardware, with the errors the PTX ISA states.

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;
#[cfg(target_arch = "nvptx64")]
use core::intrinsics;

/// `a * b + c`, rounded once.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    {
        intrinsics::fmaf32(a, b, c)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        a.mul_add(b, c)
    }
}

/// `a * b + c` in double precision, rounded once.
#[inline(always)]
pub fn fma_f64(a: f64, b: f64, c: f64) -> f64 {
    #[cfg(target_arch = "nvptx64")]
    {
        intrinsics::fmaf64(a, b, c)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        a.mul_add(b, c)
    }
}

/// The square root, correctly rounded.
#[inline(always)]
pub fn sqrt(x: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let root: f32;
        asm!("sqrt.rn.f32 {0}, {1};", out(reg32) root, in(reg32) x, options(pure, nomem, nostack, preserves_flags));
        root
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        x.sqrt()
    }
}

/// `1 / sqrt(x)`, good to two units in the last place.
#[inline(always)]
pub fn rsqrt(x: f32) -> f32 {
    1.0 / sqrt(x)
}

/// The greater; a NaN loses.
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let result: f32;
        asm!("max.f32 {0}, {1}, {2};", out(reg32) result, in(reg32) a, in(reg32) b,
            options(pure, nomem, nostack, preserves_flags));
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        a.max(b)
    }
}

/// The lesser; a NaN loses.
#[inline(always)]
pub fn min(a: f32, b: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let result: f32;
        asm!("min.f32 {0}, {1}, {2};", out(reg32) result, in(reg32) a, in(reg32) b,
            options(pure, nomem, nostack, preserves_flags));
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        a.min(b)
    }
}

/// The absolute value.
#[inline(always)]
pub fn abs(x: f32) -> f32 {
    f32::from_bits(x.to_bits() & 0x7fff_ffff)
}

/// The nearest integer, ties to even; saturates, NaN is 0.
#[inline(always)]
pub fn round_to_i32(x: f32) -> i32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let result: i32;
        asm!("cvt.rni.s32.f32 {0}, {1};", out(reg32) result, in(reg32) x,
            options(pure, nomem, nostack, preserves_flags));
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        x.round_ties_even() as i32
    }
}

/// The greatest integer not above `x`.
#[inline(always)]
pub fn floor(x: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let result: f32;
        asm!("cvt.rmi.f32.f32 {0}, {1};", out(reg32) result, in(reg32) x,
            options(pure, nomem, nostack, preserves_flags));
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        x.floor()
    }
}

macro_rules! approximations {
    ($($(#[$doc:meta])* $name:ident = $op:literal, $host:expr;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(x: f32) -> f32 {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                let result: f32;
                asm!(concat!($op, " {0}, {1};"), out(reg32) result, in(reg32) x,
                    options(pure, nomem, nostack, preserves_flags));
                result
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                let host: fn(f32) -> f32 = $host;
                host(x)
            }
        }
    )*};
}

approximations! {
    /// 2 to the power of x; relative error 2^-22.
    exp2_approx = "ex2.approx.ftz.f32", f32::exp2;
    /// The logarithm to base 2; absolute error 2^-22.
    log2_approx = "lg2.approx.ftz.f32", f32::log2;
    /// 1 / x; one unit in the last place.
    rcp_approx = "rcp.approx.ftz.f32", |x| 1.0 / x;
    /// 1 / sqrt(x); relative error 2^-22.
    rsqrt_approx = "rsqrt.approx.ftz.f32", |x| 1.0 / x.sqrt();
    /// sin(x) for |x| up to pi; absolute error 2^-20.
    sin_approx = "sin.approx.ftz.f32", f32::sin;
    /// cos(x) for |x| up to pi; absolute error 2^-20.
    cos_approx = "cos.approx.ftz.f32", f32::cos;
    /// tanh(x); relative error 2^-11.
    tanh_approx = "tanh.approx.f32", f32::tanh;
}

/// `exp(x)` by the hardware's approximation of `exp2`; relative error about 2^-21 for |x| below 10.
#[inline(always)]
pub fn exp_approx(x: f32) -> f32 {
    exp2_approx(x * core::f32::consts::LOG2_E)
}

/// Adding and subtracting this rounds a small float to an integer.
const ROUND: f32 = 12_582_912.0;

/// e to the power of x.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // x = k ln 2 + r, |r| <= ln 2 / 2; beyond the clamp the result is 0 or infinity anyway.
    let clamped = x.clamp(-105.0, 90.0);
    let k = fma(clamped, core::f32::consts::LOG2_E, ROUND) - ROUND;
    let r = fma(k, -0.693_145_75, clamped);
    let r = fma(k, -1.428_606_8e-6, r);
    let p = fma(1.378_059_4e-3, r, 8.373_124_5e-3);
    let p = fma(p, r, 4.166_953_6e-2);
    let p = fma(p, r, 0.166_664_72);
    let p = fma(p, r, 0.499_999_85);
    let p = fma(p, r, 1.0);
    let p = fma(p, r, 1.0);
    // 2^k in two steps: k reaches beyond one exponent's range at both ends.
    let k = k as i32;
    let half = k >> 1;
    p * exp2_int(half) * exp2_int(k - half)
}

/// 2^k for |k| up to 126.
#[inline(always)]
fn exp2_int(k: i32) -> f32 {
    f32::from_bits(((k + 127) << 23) as u32)
}

/// The natural logarithm.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    // A subnormal is scaled into the normal range.
    let (a, i) = if x < f32::MIN_POSITIVE {
        (x * 8_388_608.0, -23.0)
    } else {
        (x, 0.0)
    };
    // m in [2/3, 4/3), x = m 2^e.
    let bits = a.to_bits() as i32;
    let e = bits.wrapping_sub(0x3f2a_aaab) & 0xff80_0000_u32 as i32;
    let m = f32::from_bits((bits - e) as u32);
    let i = fma(e as f32, 1.192_092_9e-7, i);
    let f = m - 1.0;
    let s = f * f;
    let r = fma(-0.130_310_06, s, -0.121_483_51);
    let t = fma(0.140_869_14, s, 0.139_814_85);
    let r = fma(r, s, -0.166_846_13);
    let t = fma(t, s, 0.200_120_35);
    let r = fma(r, s, -0.249_996_2);
    let r = fma(t, f, r);
    let r = fma(r, f, 0.333_331_97);
    let r = fma(r, f, -0.5);
    let r = fma(r, s, f);
    let r = fma(i, core::f32::consts::LN_2, r);
    if x > 0.0 && x < f32::INFINITY {
        r
    } else if x == 0.0 {
        f32::NEG_INFINITY
    } else if x == f32::INFINITY {
        x
    } else {
        f32::NAN
    }
}

/// x minus the nearest multiple of pi/2, and that multiple modulo 4. |x| below 2^31 · pi/2.
#[inline(always)]
fn reduce_pi_2(x: f32) -> (f32, i32) {
    if abs(x) < 71_476.0 {
        let k = fma(x, core::f32::consts::FRAC_2_PI, ROUND) - ROUND;
        // pi/2 in three pieces (Cody and Waite); each product is exact in the fma.
        let r = fma(k, -f32::from_bits(0x3fc9_0fd8), x);
        let r = fma(k, -3.139_164_7e-7, r);
        let r = fma(k, -5.390_302_5e-15, r);
        (r, k as i32)
    } else {
        let wide = f64::from(x);
        let k = fma_f64(wide, core::f64::consts::FRAC_2_PI, 6_755_399_441_055_744.0)
            - 6_755_399_441_055_744.0;
        let r = fma_f64(k, -core::f64::consts::FRAC_PI_2, wide);
        let r = fma_f64(k, -6.123_233_995_736_766e-17, r);
        (r as f32, k as i64 as i32)
    }
}

/// sin or cos in [-pi/4, pi/4], by the quadrant.
#[inline(always)]
fn sin_quadrant(r: f32, quadrant: i32) -> f32 {
    let s = r * r;
    let p = fma(
        f32::from_bits(0x363e_9dde),
        s,
        f32::from_bits(0xb950_35dd_u32),
    );
    let p = fma(p, s, f32::from_bits(0x3c08_88cd));
    let p = fma(p, s, f32::from_bits(0xbe2a_aaab_u32));
    let sin = fma(p * s, r, r);
    let q = fma(
        f32::from_bits(0x37cd_4000),
        s,
        f32::from_bits(0xbab6_077d_u32),
    );
    let q = fma(q, s, f32::from_bits(0x3d2a_aaa8));
    let q = fma(q, s, -0.5);
    let cos = fma(q, s, 1.0);
    let value = if quadrant & 1 == 0 { sin } else { cos };
    if quadrant & 2 == 0 { value } else { -value }
}

/// The sine of x radians, |x| below 2^31.
#[inline(always)]
pub fn sin(x: f32) -> f32 {
    let (r, quadrant) = reduce_pi_2(x);
    sin_quadrant(r, quadrant)
}

/// The cosine of x radians, |x| below 2^31.
#[inline(always)]
pub fn cos(x: f32) -> f32 {
    let (r, quadrant) = reduce_pi_2(x);
    sin_quadrant(r, quadrant.wrapping_add(1))
}

/// Sine and cosine of x radians, with one reduction.
#[inline(always)]
pub fn sin_cos(x: f32) -> (f32, f32) {
    let (r, quadrant) = reduce_pi_2(x);
    (
        sin_quadrant(r, quadrant),
        sin_quadrant(r, quadrant.wrapping_add(1)),
    )
}

/// The hyperbolic tangent.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let a = abs(x);
    let s = x * x;
    // Minimax over |x| < 0.6.
    let p = fma(-5.895_009e-3, s, 2.079_583_7e-2);
    let p = fma(p, s, -5.378_378_7e-2);
    let p = fma(p, s, 0.133_319_24);
    let p = fma(p, s, -0.333_333);
    let small = fma(p * s, x, x);
    let large = 1.0 - 2.0 / (exp(a + a) + 1.0);
    let large = if x < 0.0 { -large } else { large };
    if a < 0.55 { small } else { large }
}

/// x to the power of y, for x >= 0.
#[inline(always)]
pub fn powf(x: f32, y: f32) -> f32 {
    if y == 0.0 || x == 1.0 {
        return 1.0;
    }
    if x == 0.0 {
        return if y > 0.0 { 0.0 } else { f32::INFINITY };
    }
    // In f64: the product's rounding would cost an f32 up to seven bits.
    let log2 = log2_f64(f64::from(x));
    exp2_f64(f64::from(y) * log2)
}

/// log2 of a positive finite float, to about 40 bits; NaN and infinity pass.
#[inline(always)]
fn log2_f64(x: f64) -> f64 {
    let bits = x.to_bits() as i64;
    if x <= 0.0 || bits >> 52 >= 2047 {
        return if x == f64::INFINITY { x } else { f64::NAN };
    }
    // m in [sqrt(1/2), sqrt(2)).
    let e = (bits - 0x3fe6_a09e_667f_3bcd) >> 52;
    let m = f64::from_bits((bits - (e << 52)) as u64);
    // ln m = 2 atanh(s), |s| <= 0.172.
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let mut p = 1.0 / 17.0;
    p = fma_f64(p, z, 1.0 / 15.0);
    p = fma_f64(p, z, 1.0 / 13.0);
    p = fma_f64(p, z, 1.0 / 11.0);
    p = fma_f64(p, z, 1.0 / 9.0);
    p = fma_f64(p, z, 1.0 / 7.0);
    p = fma_f64(p, z, 1.0 / 5.0);
    p = fma_f64(p, z, 1.0 / 3.0);
    p = fma_f64(p, z, 1.0);
    fma_f64(2.0 * s * p, core::f64::consts::LOG2_E, e as f64)
}

/// 2^x rounded to f32.
#[inline(always)]
fn exp2_f64(x: f64) -> f32 {
    if x.is_nan() {
        return f32::NAN;
    }
    if x < -160.0 {
        return 0.0;
    }
    if x > 130.0 {
        return f32::INFINITY;
    }
    let shifted = x + 6_755_399_441_055_744.0;
    let k = shifted - 6_755_399_441_055_744.0;
    let r = (x - k) * core::f64::consts::LN_2;
    let mut p = 1.0 / 3_628_800.0;
    p = fma_f64(p, r, 1.0 / 362_880.0);
    p = fma_f64(p, r, 1.0 / 40_320.0);
    p = fma_f64(p, r, 1.0 / 5_040.0);
    p = fma_f64(p, r, 1.0 / 720.0);
    p = fma_f64(p, r, 1.0 / 120.0);
    p = fma_f64(p, r, 1.0 / 24.0);
    p = fma_f64(p, r, 1.0 / 6.0);
    p = fma_f64(p, r, 0.5);
    p = fma_f64(p, r, 1.0);
    p = fma_f64(p, r, 1.0);
    (p * f64::from_bits(((k as i64 + 1023) as u64) << 52)) as f32
}
