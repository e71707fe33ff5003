//! Masses of logits, and what decides among them: the very operations of the host's `sampling`.

use super::DrawRow;
use cuda_std::float;

/// One in units of 2^-24.
pub(super) const ONE: u64 = 1 << 24;

/// What the sampler makes of a logit: no NaN, one zero, divided by the temperature.
#[inline(always)]
pub(super) fn scaled(v: f32, temperature: f32) -> f32 {
    let v = if v.is_nan() {
        f32::NEG_INFINITY
    } else {
        v + 0.0
    };
    if temperature > 0.0 {
        v / temperature
    } else {
        v
    }
}

/// The number whose [`order`] that is.
#[inline(always)]
pub(super) fn of_order(order: u32) -> f32 {
    f32::from_bits(if order >> 31 == 1 {
        order ^ 0x8000_0000
    } else {
        !order
    })
}

/// The nearest whole number, ties to even, of a number below 2^31 or whole already.
#[inline(always)]
fn round_ties_even(x: f32) -> f32 {
    if x < 8_388_608.0 {
        float::round_to_i32(x) as f32
    } else {
        x
    }
}

/// `round(exp(v - peak) * 2^40)`: the very operations of the host's `sampling::mass`.
#[inline(always)]
pub(super) fn mass(v: f32, peak: f32) -> u64 {
    use float::fma;
    let d = if v == peak { 0.0 } else { v - peak };
    if d.is_nan() || d <= -28.5 {
        return 0;
    }
    let d = if d > 0.0 { 0.0 } else { d };
    let n = round_ties_even(d * core::f32::consts::LOG2_E);
    let r = fma(n, -0.693_359_4, d);
    let r = fma(n, 2.121_944_4e-4, r);
    let p = fma(r, 1.0 / 5040.0, 1.0 / 720.0);
    let p = fma(r, p, 1.0 / 120.0);
    let p = fma(r, p, 1.0 / 24.0);
    let p = fma(r, p, 1.0 / 6.0);
    let p = fma(r, p, 0.5);
    let p = fma(r, p, 1.0);
    let p = fma(r, p, 1.0);
    let scale = f32::from_bits(((n as i32 + 40 + 127) as u32) << 23);
    round_ties_even(p * scale) as u64
}

/// `fraction / 2^24` of `total`, rounded down, and whether anything was cut.
#[inline(always)]
pub(super) fn share(fraction: u32, total: u64) -> (u64, bool) {
    let high = (total >> 24) * u64::from(fraction);
    let low = (total & (ONE - 1)) * u64::from(fraction);
    (high + (low >> 24), low & (ONE - 1) != 0)
}

/// The least sum that is at least such a share of `total`, and any at all.
#[inline(always)]
pub(super) fn least_sum(fraction: u32, total: u64) -> u64 {
    let (goal, cut) = share(fraction, total);
    let goal = goal + u64::from(cut);
    if goal == 0 { 1 } else { goal }
}

/// What who is drawn must have at least.
#[inline(always)]
pub(super) fn least_mass(row: &DrawRow) -> u64 {
    u64::from(row.min_p) << (40 - 24)
}
