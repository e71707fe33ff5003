//! Activations in 15 bits: what the integer products take.
//!
//! Each 32 elements of a row share a scale: `x ≈ d * q`, `d = max |x| / 16256`. Instructions multiply 8 bits
//! by 8, so `q = 128 * high + low` lies in two planes, and `sum(w * q)` is `128 * sum(w * high) + sum(w * low)`,
//! exactly: with 8-bit weights at most `32 * 255 * 16256 < 2^27`. Sums of `d * q` go along, because weights with
//! an offset or a minimum `m` add `m * sum(x)` to the product.

use super::pool::{Parts, Pool};
use super::quant::UNIT;
use super::simd::{Level, Simd, multiversion};

/// From this many rows on, products go through [`super::gemm`] and rows are interleaved for it.
pub(super) const TILED_FROM: usize = 3;

/// Elements whose products a vector lane of [`super::dot`] adds up.
const LANE: usize = 4;

/// Bits of the low plane.
pub(super) const LOW_BITS: u32 = 7;

/// The greatest quant: its high part is 127, its low part 0.
const MAX: f32 = (127 << LOW_BITS) as f32;

/// Rows of quantised activations. Buffers are kept from one use to the next.
#[derive(Default)]
pub(super) struct Activations {
    rows: usize,
    units: usize,
    /// Rows lie `[unit][row]`, else `[row][unit]`.
    tiled: bool,
    /// -127 to 127.
    high: Vec<i8>,
    /// -64 to 64.
    low: Vec<i8>,
    d: Vec<f32>,
    /// Sums of 32 elements.
    sums: Vec<f32>,
    /// Sums of the first and of the last 16 elements of each unit.
    half_sums: Vec<f32>,
    /// `d` for each 4 elements; only where rows are not tiled.
    lane_d: Vec<f32>,
    /// Sums of 4 elements; only where rows are not tiled.
    lane_sums: Vec<f32>,
}

/// One row, for [`super::dot`].
#[derive(Clone, Copy)]
pub(super) struct RowView<'a> {
    pub high: &'a [i8],
    pub low: &'a [i8],
    pub d: &'a [f32],
    pub sums: &'a [f32],
    pub half_sums: &'a [f32],
    pub lane_d: &'a [f32],
    pub lane_sums: &'a [f32],
}

/// All rows, for [`super::gemm`]: `[unit][row]` of 32 quants' parts, of one scale, of one and of two sums.
#[derive(Clone, Copy)]
pub(super) struct TiledView<'a> {
    pub rows: usize,
    pub units: usize,
    pub high: &'a [i8],
    pub low: &'a [i8],
    pub d: &'a [f32],
    pub sums: &'a [f32],
    pub half_sums: &'a [f32],
}

impl Activations {
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// All rows, if they are laid out for [`super::gemm`].
    pub fn tiled(&self) -> Option<TiledView<'_>> {
        self.tiled.then_some(TiledView {
            rows: self.rows,
            units: self.units,
            high: &self.high,
            low: &self.low,
            d: &self.d,
            sums: &self.sums,
            half_sums: &self.half_sums,
        })
    }

    /// Row `row`; only where rows are not [`Activations::tiled`].
    pub fn row(&self, row: usize) -> RowView<'_> {
        debug_assert!(!self.tiled);
        let of = |per: usize| row * self.units * per..(row + 1) * self.units * per;
        RowView {
            high: &self.high[of(UNIT)],
            low: &self.low[of(UNIT)],
            d: &self.d[of(1)],
            sums: &self.sums[of(1)],
            half_sums: &self.half_sums[of(2)],
            lane_d: &self.lane_d[of(UNIT / LANE)],
            lane_sums: &self.lane_sums[of(UNIT / LANE)],
        }
    }

    /// Quantises `rows` rows of `cols` (a multiple of 32) elements. `fill(row, buffer)` gives a row's
    /// values: it may write them to the buffer, which is `cols` long, or lend what it has.
    pub fn quantize<'x>(
        &mut self,
        level: Level,
        pool: &mut Pool,
        rows: usize,
        cols: usize,
        tiled: bool,
        fill: impl Fn(usize, &mut [f32]) -> Option<&'x [f32]> + Sync,
    ) {
        assert!(cols.is_multiple_of(UNIT));
        let units = cols / UNIT;
        (self.rows, self.units, self.tiled) = (rows, units, tiled);
        let lanes = if tiled { 0 } else { rows * units * UNIT / LANE };
        self.high.resize(rows * units * UNIT, 0);
        self.low.resize(rows * units * UNIT, 0);
        self.d.resize(rows * units, 0.0);
        self.sums.resize(rows * units, 0.0);
        self.half_sums.resize(rows * units * 2, 0.0);
        self.lane_d.resize(lanes, 0.0);
        self.lane_sums.resize(lanes, 0.0);
        let target = Target {
            rows,
            units,
            tiled,
            high: Parts::new(&mut self.high),
            low: Parts::new(&mut self.low),
            d: Parts::new(&mut self.d),
            sums: Parts::new(&mut self.sums),
            half_sums: Parts::new(&mut self.half_sums),
            lane_d: Parts::new(&mut self.lane_d),
            lane_sums: Parts::new(&mut self.lane_sums),
        };
        // A thread is worth waking for some microseconds of work.
        let grain = rows.div_ceil(4 * pool.threads()).max(16_384 / cols.max(1));
        pool.for_ranges(rows, grain, |_, range| {
            let mut buffer = vec![0.0; cols];
            for row in range {
                let lent = fill(row, &mut buffer);
                quantize_row(level, lent.unwrap_or(&buffer), row, &target);
            }
        });
    }
}

/// Where quantised rows go.
struct Target<'a> {
    rows: usize,
    units: usize,
    tiled: bool,
    high: Parts<'a, i8>,
    low: Parts<'a, i8>,
    d: Parts<'a, f32>,
    sums: Parts<'a, f32>,
    half_sums: Parts<'a, f32>,
    lane_d: Parts<'a, f32>,
    lane_sums: Parts<'a, f32>,
}

multiversion! {
    /// Quantises one row; no two threads may do the same one.
    fn quantize_row(x: &[f32], row: usize, target: &Target<'_>) = quantize_row_generic
}

#[inline(always)]
fn quantize_row_generic<S: Simd>(x: &[f32], row: usize, target: &Target<'_>) {
    const LANES: usize = UNIT / LANE;
    for (unit, x) in x.chunks_exact(UNIT).enumerate() {
        let at = if target.tiled {
            unit * target.rows + row
        } else {
            row * target.units + unit
        };
        // SAFETY: `at` is this row's and unit's alone.
        unsafe {
            let high = target.high.get(at * UNIT..(at + 1) * UNIT);
            let low = target.low.get(at * UNIT..(at + 1) * UNIT);
            let d = quantize_unit::<S>(x, high, low);
            let parts: [i32; LANES] = std::array::from_fn(|i| {
                let sum = |q: &[i8]| {
                    let q = &q[i * LANE..(i + 1) * LANE];
                    i32::from(q[0]) + i32::from(q[1]) + i32::from(q[2]) + i32::from(q[3])
                };
                (sum(high) << LOW_BITS) + sum(low)
            });
            let first = parts[0] + parts[1] + parts[2] + parts[3];
            let last = parts[4] + parts[5] + parts[6] + parts[7];
            target.d.get(at..at + 1)[0] = d;
            target.sums.get(at..at + 1)[0] = d * (first + last) as f32;
            let halves = [d * first as f32, d * last as f32];
            target
                .half_sums
                .get(2 * at..2 * at + 2)
                .copy_from_slice(&halves);
            if !target.tiled {
                let lanes = at * LANES..(at + 1) * LANES;
                target
                    .lane_d
                    .get(lanes.clone())
                    .copy_from_slice(&[d; LANES]);
                target
                    .lane_sums
                    .get(lanes)
                    .copy_from_slice(&parts.map(|part| d * part as f32));
            }
        }
    }
}

/// Writes the parts of 32 values and returns their scale.
#[inline(always)]
fn quantize_unit<S: Simd>(x: &[f32], high: &mut [i8], low: &mut [i8]) -> f32 {
    const BASE: f32 = (1 << LOW_BITS) as f32;
    assert!(x.len() == UNIT && high.len() == UNIT && low.len() == UNIT);
    // SAFETY: 32 elements on all sides, which the lanes divide; `multiversion!` checked the features.
    unsafe {
        let mut max = S::splat(0.0);
        for i in (0..UNIT).step_by(S::LANES) {
            max = S::max(max, S::abs(S::load(x.as_ptr().add(i))));
        }
        let max = S::reduce_max(max);
        // Below, the inverse would overflow; such values are 0 beside any others.
        let inverse = S::splat(if max > 1e-30 { MAX / max } else { 0.0 });
        for i in (0..UNIT).step_by(S::LANES) {
            let q = S::round(S::mul(S::load(x.as_ptr().add(i)), inverse));
            let high_part = S::round(S::mul(q, S::splat(1.0 / BASE)));
            S::store_i8(high.as_mut_ptr().add(i), high_part);
            S::store_i8(
                low.as_mut_ptr().add(i),
                S::fma(high_part, S::splat(-BASE), q),
            );
        }
        max / MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::testing::Random;

    /// What element `i` of the unit at `at` stands for.
    fn value(a: &Activations, at: usize, i: usize) -> f64 {
        let (high, low) = (a.high[at * UNIT + i], a.low[at * UNIT + i]);
        f64::from(a.d[at]) * (128.0 * f64::from(high) + f64::from(low))
    }

    #[test]
    fn every_level_and_layout_holds_the_values_and_their_sums() {
        let mut random = Random::new(1);
        for level in Level::available() {
            for (rows, cols) in [(1, 32), (3, 96), (9, 160)] {
                let mut x = random.normals(rows * cols);
                x[..16].fill(0.0);
                x[5] = 1e-35;
                for tiled in [false, true] {
                    let mut pool = Pool::new(2).unwrap();
                    let mut a = Activations::default();
                    a.quantize(level, &mut pool, rows, cols, tiled, |row, _| {
                        Some(&x[row * cols..(row + 1) * cols])
                    });
                    assert_eq!(a.tiled().is_some(), tiled);
                    for (i, &x) in x.iter().enumerate() {
                        let (row, unit) = (i / cols, i % cols / UNIT);
                        let units = cols / UNIT;
                        let at = if tiled {
                            unit * rows + row
                        } else {
                            row * units + unit
                        };
                        let (value, x) = (value(&a, at, i % UNIT), f64::from(x));
                        // Half a step, and three roundings to f32.
                        let most = f64::from(a.d[at]) * 0.5 + x.abs() * 1.8e-7;
                        assert!((value - x).abs() <= most, "{level:?} {i} {value} {x}");
                    }
                    for at in 0..rows * cols / UNIT {
                        let values: Vec<_> = (0..UNIT).map(|i| value(&a, at, i)).collect();
                        let near = |got: f32, values: &[f64]| {
                            let want: f64 = values.iter().sum();
                            assert!((f64::from(got) - want).abs() < 1e-5, "{got} {want}");
                        };
                        near(a.sums[at], &values);
                        near(a.half_sums[2 * at], &values[..16]);
                        near(a.half_sums[2 * at + 1], &values[16..]);
                        for lane in 0..if tiled { 0 } else { 8 } {
                            near(a.lane_sums[at * 8 + lane], &values[lane * 4..lane * 4 + 4]);
                            assert_eq!(a.lane_d[at * 8 + lane], a.d[at]);
                        }
                    }
                }
            }
        }
    }
}
