//! Quantisers: blocks of a type from f32 values, with the least squared error that a search over scales
//! finds. Elements weigh the same; what a model's activations would say of their importance is not asked.
//!
//! A type's own part, how its numbers are packed, is [`Block::quantize`](crate::Block::quantize).

use crate::blocks::{self, Block, F16, Visitor};
use crate::{Error, GgmlType};

/// Appends `values` as blocks of type `ty` to `out`.
///
/// # Errors
/// The type has no quantiser here, `values` are no whole blocks, or are not finite or too large for the
/// type's scales.
pub fn quantize(ty: GgmlType, values: &[f32], out: &mut Vec<u8>) -> Result<(), Error> {
    struct Run<'a>(&'a [f32], &'a mut Vec<u8>);
    impl Visitor for Run<'_> {
        type Output = Result<(), Error>;
        fn visit<B: Block>(self) -> Self::Output {
            let Run(values, out) = self;
            if !values.len().is_multiple_of(B::LEN) {
                let detail = format!(
                    "{} values are no whole number of {}'s blocks of {}",
                    values.len(),
                    B::TYPE,
                    B::LEN
                );
                return Err(Error::Buffer { detail });
            }
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                let detail = format!("value {i} is {}, which no {} can hold", values[i], B::TYPE);
                return Err(Error::Buffer { detail });
            }
            let mut back = [0.0; blocks::MAX_LEN];
            for (n, values) in values.chunks_exact(B::LEN).enumerate() {
                let Some(block) = B::quantize(values) else {
                    return Err(Error::NoQuantizer { ty: B::TYPE });
                };
                let back = &mut back[..B::LEN];
                block.dequantize(back);
                if back.iter().any(|v| !v.is_finite()) {
                    let peak = values.iter().fold(0.0f32, |p, v| p.max(v.abs()));
                    let detail = format!(
                        "values up to {peak} from value {} on are too large for {}",
                        n * B::LEN,
                        B::TYPE
                    );
                    return Err(Error::Buffer { detail });
                }
                out.extend_from_slice(bytemuck::bytes_of(&block));
            }
            Ok(())
        }
    }
    blocks::visit(ty, Run(values, out)).unwrap_or(Err(Error::NoQuantizer { ty }))
}

/// Whether [`quantize`] makes blocks of this type.
pub fn can_quantize(ty: GgmlType) -> bool {
    struct Probe;
    impl Visitor for Probe {
        type Output = bool;
        fn visit<B: Block>(self) -> bool {
            B::quantize(&[0.0; blocks::MAX_LEN][..B::LEN]).is_some()
        }
    }
    blocks::visit(ty, Probe).unwrap_or(false)
}

/// The types that [`quantize`] makes.
pub fn quantizable() -> impl Iterator<Item = GgmlType> {
    GgmlType::ALL.iter().copied().filter(|ty| can_quantize(*ty))
}

/// Their names, for error messages.
pub(crate) fn names() -> String {
    let names: Vec<&str> = quantizable().map(|ty| ty.name()).collect();
    names.join(", ")
}

/// The half nearest to `x`; infinite beyond its range.
pub(crate) fn half(x: f32) -> F16 {
    F16::from_bits(half::f16::from_f32(x).to_bits())
}

/// `1 / x`, or 0.
pub(crate) fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// The integer nearest to `x` of `min..=max`.
pub(crate) fn round(x: f32, min: i32, max: i32) -> i32 {
    // Adding 1.5 * 2^23 leaves no bits for a fraction; unlike `round` that takes no call on old processors.
    const MAGIC: f32 = 12_582_912.0;
    let x = x.clamp(min as f32, max as f32);
    ((x + MAGIC) - MAGIC) as i32
}

/// The numbers that a type multiplies its scale by.
pub(crate) trait Levels {
    /// The nearest to `x`.
    fn nearest(&self, x: f32) -> i32;
    /// The least and the greatest.
    fn ends(&self) -> [i32; 2];
}

/// All from the least to the greatest.
pub(crate) struct Even(pub i32, pub i32);

impl Levels for Even {
    fn nearest(&self, x: f32) -> i32 {
        round(x, self.0, self.1)
    }

    fn ends(&self) -> [i32; 2] {
        [self.0, self.1]
    }
}

/// Sixteen of a table, in ascending order.
pub(crate) struct Table {
    values: [i8; 16],
    /// Between each and the next.
    middles: [f32; 15],
}

impl Table {
    pub fn new(values: [i8; 16]) -> Table {
        let middle = |i: usize| (f32::from(values[i]) + f32::from(values[i + 1])) / 2.0;
        Table {
            values,
            middles: std::array::from_fn(middle),
        }
    }

    /// The place of the nearest to `x`.
    pub fn place(&self, x: f32) -> usize {
        // A count without branches is faster than a search.
        let below: i32 = self.middles.iter().map(|&m| i32::from(x > m)).sum();
        below as usize
    }
}

impl Levels for Table {
    fn nearest(&self, x: f32) -> i32 {
        self.values[self.place(x)].into()
    }

    fn ends(&self) -> [i32; 2] {
        [self.values[0].into(), self.values[15].into()]
    }
}

/// How often a search tries; the last try clips the most.
fn tries(levels: i32) -> u32 {
    // Few levels are worth more clipping.
    if levels <= 4 { 40 } else { 14 }
}

/// The scale `d` with the least `Σ(x - d * level)²` among those tried, of either sign.
///
/// A try takes the levels that a scale gives, and for them the best scale there is, `Σx·level / Σlevel²`.
pub(crate) fn scale(x: &[f32], levels: &impl Levels) -> f32 {
    let peak = x
        .iter()
        .fold(0.0f32, |p, v| if v.abs() > p.abs() { *v } else { p });
    if peak.abs() < f32::MIN_POSITIVE {
        return 0.0;
    }
    let (mut best, mut best_gain) = (0.0, 0.0);
    let [min, max] = levels.ends();
    // Where the greatest value may fall near; the ends are one as good as the other if they are alike.
    let ends = [max, min];
    let ends = if min == -max { &ends[..1] } else { &ends[..] };
    for i in 0..=tries(max - min + 1) {
        for &end in ends {
            let inverse = (0.8 + 0.05 * i as f32) * end as f32 / peak;
            let (mut product, mut square) = (0.0f32, 0.0f32);
            for &x in x {
                let level = levels.nearest(x * inverse) as f32;
                product += x * level;
                square += level * level;
            }
            // The error is Σx² less this.
            let gain = f64::from(product).powi(2) / f64::from(square.max(1.0));
            if gain > best_gain {
                (best, best_gain) = (product / square, gain);
            }
        }
    }
    best
}

/// `Σ(x - y)²` with `y` what each `x` becomes.
fn error(x: &[f32], y: impl Fn(f32) -> f32) -> f64 {
    let sum: f32 = x.iter().map(|&x| (x - y(x)).powi(2)).sum();
    sum.into()
}

/// Scale and offset with the least `Σ(x - (d * q + m))²`, `q` of `0..=max`, among those tried; `d` is not
/// negative, nor is `m` positive where it must not be.
pub(crate) fn scale_and_offset(x: &[f32], max: i32, negative_offset: bool) -> (f32, f32) {
    let low = x.iter().fold(f32::INFINITY, |a, &b| a.min(b));
    let high = x.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let low = if negative_offset { low.min(0.0) } else { low };
    if high - low < f32::MIN_POSITIVE {
        return (0.0, low);
    }
    let n = x.len() as f64;
    let sum: f64 = x.iter().map(|&x| f64::from(x)).sum();
    let (mut best, mut best_error) = ((0.0, low), f64::INFINITY);
    for i in 0..=tries(max + 1) {
        let inverse = (0.8 + 0.05 * i as f32) * max as f32 / (high - low);
        // The middle stays where it is as ends are clipped.
        let middle = (high + low) / 2.0;
        let level = |x: f32| round((x - middle) * inverse + max as f32 / 2.0, 0, max);
        let (mut q1, mut q2, mut xq) = (0.0f32, 0.0f32, 0.0f32);
        for &x in x {
            let q = level(x) as f32;
            q1 += q;
            q2 += q * q;
            xq += q * x;
        }
        let (q1, q2, xq) = (f64::from(q1), f64::from(q2), f64::from(xq));
        let determinant = n * q2 - q1 * q1;
        let alone = (if q2 > 0.0 { xq / q2 } else { 0.0 }, 0.0);
        let (mut d, mut m) = alone;
        if determinant > 0.0 {
            d = (n * xq - q1 * sum) / determinant;
            m = (sum - d * q1) / n;
        }
        if negative_offset && m > 0.0 {
            (d, m) = alone;
        }
        let (d, m) = (d.max(0.0) as f32, m as f32);
        let inverse = self::inverse(d);
        let e = error(x, |x| d * round((x - m) * inverse, 0, max) as f32 + m);
        if e < best_error {
            (best, best_error) = ((d, m), e);
        }
    }
    best
}

/// A block whose sub-blocks have integer scales, themselves with a scale.
pub(crate) struct Scaled<const SUBS: usize> {
    pub d: F16,
    pub scales: [i32; SUBS],
}

/// Scales of `SUBS` sub-blocks of equal size, integers of `ends` with one scale for all.
pub(crate) fn scaled<const SUBS: usize>(
    x: &[f32],
    levels: &impl Levels,
    ends: [i32; 2],
) -> Scaled<SUBS> {
    let sub = |j: usize| &x[j * x.len() / SUBS..(j + 1) * x.len() / SUBS];
    let wanted: [f32; SUBS] = std::array::from_fn(|j| scale(sub(j), levels));
    // Of either sign: the end that is farther from 0 takes the greatest.
    let peak = wanted
        .iter()
        .fold(0.0f32, |p, v| if v.abs() > p.abs() { *v } else { p });
    let far = if ends[1] < -ends[0] { ends[0] } else { ends[1] };
    let d = half(peak / far as f32);
    let inverse = inverse(d.to_f32());
    let scales = std::array::from_fn(|j| {
        let near = round(wanted[j] * inverse, ends[0], ends[1]);
        let candidates = (near - 1).max(ends[0])..=(near + 1).min(ends[1]);
        least(candidates, |&scale| {
            let d = d.to_f32() * scale as f32;
            let inverse = self::inverse(d);
            error(sub(j), |x| d * levels.nearest(x * inverse) as f32)
        })
        .unwrap_or(near)
    });
    Scaled { d, scales }
}

/// A block whose sub-blocks have integer scales and minimums, each with a scale of their own.
pub(crate) struct ScaledOffset<const SUBS: usize> {
    pub d: F16,
    pub dmin: F16,
    pub scales: [i32; SUBS],
    pub mins: [i32; SUBS],
}

impl<const SUBS: usize> ScaledOffset<SUBS> {
    /// The level of `x`, an element of sub-block `j`.
    pub fn level(&self, j: usize, x: f32, max: i32) -> u8 {
        let d = self.d.to_f32() * self.scales[j] as f32;
        let min = self.dmin.to_f32() * self.mins[j] as f32;
        round((x + min) * inverse(d), 0, max) as u8
    }
}

/// Scales and minimums of `SUBS` sub-blocks of equal size, integers of `0..=most`; levels are `0..=max`.
pub(crate) fn scaled_offset<const SUBS: usize>(
    x: &[f32],
    max: i32,
    most: i32,
) -> ScaledOffset<SUBS> {
    let sub = |j: usize| &x[j * x.len() / SUBS..(j + 1) * x.len() / SUBS];
    let wanted: [(f32, f32); SUBS] = std::array::from_fn(|j| scale_and_offset(sub(j), max, true));
    let peak = |of: fn(&(f32, f32)) -> f32| wanted.iter().map(of).fold(0.0, f32::max);
    let d = half(peak(|w| w.0) / most as f32);
    let dmin = half(peak(|w| -w.1) / most as f32);
    let (inverse_d, inverse_min) = (inverse(d.to_f32()), inverse(dmin.to_f32()));
    let (mut scales, mut mins) = ([0; SUBS], [0; SUBS]);
    for j in 0..SUBS {
        let near = [
            round(wanted[j].0 * inverse_d, 0, most),
            round(-wanted[j].1 * inverse_min, 0, most),
        ];
        let around = |v: i32| (v - 1).max(0)..=(v + 1).min(most);
        let pairs = around(near[0]).flat_map(|s| around(near[1]).map(move |m| [s, m]));
        let best = least(pairs, |&[scale, min]| {
            let (d, min) = (d.to_f32() * scale as f32, dmin.to_f32() * min as f32);
            let inverse = inverse(d);
            error(sub(j), |x| {
                d * round((x + min) * inverse, 0, max) as f32 - min
            })
        });
        [scales[j], mins[j]] = best.unwrap_or(near);
    }
    ScaledOffset {
        d,
        dmin,
        scales,
        mins,
    }
}

/// The candidate with the least error.
pub(crate) fn least<T>(
    candidates: impl Iterator<Item = T>,
    error: impl Fn(&T) -> f64,
) -> Option<T> {
    let with_error = candidates.map(|c| (error(&c), c));
    let least = with_error.min_by(|a, b| a.0.total_cmp(&b.0));
    least.map(|(_, candidate)| candidate)
}
