//! f32 rows: norms, activations, and the products of F32, F16 and BF16 weights, and of all weights in
//! exact mode.

use super::gemm::ROWS;
use super::pool::{Parts, Pool};
use super::quant::{Kernels, Quant, UNIT};
use super::simd::{Level, Set, Simd, multiversion};
use crate::device::Activation;
use gguf::GgmlType;

/// Rows are padded with zeros to a multiple of this, the most lanes of any vector.
const PAD: usize = 16;

/// Rows of weights, or of activations, that are multiplied at once.
const SIDE: usize = 4;

/// Elements from one row to the next.
pub(super) fn stride(cols: usize) -> usize {
    cols.next_multiple_of(PAD)
}

/// Rows of f32 activations, padded.
#[derive(Default)]
pub(super) struct FloatRows {
    pub rows: usize,
    pub stride: usize,
    pub data: Vec<f32>,
}

impl FloatRows {
    /// Takes `rows` rows of `cols` elements; see [`super::activations::Activations::quantize`].
    pub fn fill<'x>(
        &mut self,
        pool: &mut Pool,
        rows: usize,
        cols: usize,
        fill: impl Fn(usize, &mut [f32]) -> Option<&'x [f32]> + Sync,
    ) {
        let stride = stride(cols);
        (self.rows, self.stride) = (rows, stride);
        self.data.resize(rows * stride, 0.0);
        let data = Parts::new(&mut self.data);
        pool.for_ranges(rows, 16, |_, range| {
            for row in range {
                // SAFETY: each row is visited once.
                let to = unsafe { data.get(row * stride..(row + 1) * stride) };
                let (to, pad) = to.split_at_mut(cols);
                pad.fill(0.0);
                if let Some(lent) = fill(row, to) {
                    to.copy_from_slice(lent);
                }
            }
        });
    }
}

/// Writes up to [`ROWS`] rows of weights of type `ty` as f32, each padded to [`stride`]; rows that
/// are missing are left out.
pub(super) fn unpack(
    level: Level,
    ty: GgmlType,
    kernels: Option<&Kernels>,
    weights: &[u8],
    row_bytes: usize,
    cols: usize,
    out: &mut Vec<f32>,
) {
    let stride = stride(cols);
    out.resize(ROWS * stride, 0.0);
    for (row, out) in weights
        .chunks_exact(row_bytes)
        .zip(out.chunks_exact_mut(stride))
    {
        let (out, pad) = out.split_at_mut(cols);
        pad.fill(0.0);
        match (kernels, ty) {
            (Some(kernels), _) => (kernels.to_f32)(level, row, out),
            (None, GgmlType::F16) => row_f16(level, row, out),
            (None, GgmlType::BF16) => row_bf16(level, row, out),
            (None, _) => {
                for (out, bytes) in out.iter_mut().zip(row.chunks_exact(4)) {
                    *out = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
            }
        }
    }
}

multiversion! {
    /// Halves, little-endian, as f32.
    fn row_f16(bytes: &[u8], out: &mut [f32]) = row_f16_generic
}

#[inline(always)]
fn row_f16_generic<S: Simd>(bytes: &[u8], out: &mut [f32]) {
    // SAFETY: `widen` passes pointers to LANES halves; `multiversion!` checked the features.
    widen::<S>(bytes, out, |p| unsafe { S::load_f16(p) });
}

multiversion! {
    /// bfloat16 values, little-endian, as f32.
    fn row_bf16(bytes: &[u8], out: &mut [f32]) = row_bf16_generic
}

#[inline(always)]
fn row_bf16_generic<S: Simd>(bytes: &[u8], out: &mut [f32]) {
    // SAFETY: as above.
    widen::<S>(bytes, out, |p| unsafe { S::load_bf16(p) });
}

#[inline(always)]
fn widen<S: Simd>(bytes: &[u8], out: &mut [f32], load: impl Fn(*const u16) -> S::V) {
    assert!(bytes.len() == 2 * out.len());
    let whole = out.len() / S::LANES * S::LANES;
    // SAFETY: inside both slices; `multiversion!` checked the features. The loads take any address.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            S::store(
                out.as_mut_ptr().add(i),
                load(bytes.as_ptr().add(2 * i).cast()),
            );
        }
        let mut last = [0u8; 2 * PAD];
        last[..bytes.len() - 2 * whole].copy_from_slice(&bytes[2 * whole..]);
        let mut values = [0.0; PAD];
        S::store(values.as_mut_ptr(), load(last.as_ptr().cast()));
        let rest = out.len() - whole;
        out[whole..].copy_from_slice(&values[..rest]);
    }
}

/// A row of quantised weights, given as the file's bytes, as f32.
pub(super) fn quant_to_f32<Q: Quant>(level: Level, weights: &[u8], out: &mut [f32]) {
    let weights: &[Q] = bytemuck::cast_slice(weights);
    assert!(out.len() == weights.len() * Q::LEN);
    match level.0 {
        Set::Portable => quant_row(weights, out, |h| h.to_f32(), Q::quants),
        // SAFETY: a level above portable exists only after its features were detected.
        #[cfg(target_arch = "x86_64")]
        _ => unsafe { quant_row_avx2(weights, out) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quant_row_avx2<Q: Quant>(weights: &[Q], out: &mut [f32]) {
    // SAFETY: the features are the caller's promise.
    quant_row(
        weights,
        out,
        |h| unsafe { super::dot::half_f16c(h) },
        |block, unit| unsafe { super::gemm::bytes_of(block.quants_avx2(unit)) },
    );
}

#[inline(always)]
fn quant_row<Q: Quant>(
    weights: &[Q],
    out: &mut [f32],
    f32_of: impl Fn(gguf::blocks::F16) -> f32 + Copy,
    quants: impl Fn(&Q, usize) -> [u8; UNIT],
) {
    let (mut s, mut m) = ([0.0; 16], [0.0; 16]);
    for (block, out) in weights.iter().zip(out.chunks_exact_mut(Q::LEN)) {
        block.scales(f32_of, &mut s, &mut m);
        for (unit, out) in out.chunks_exact_mut(UNIT).enumerate() {
            let q = quants(block, unit);
            for (part, out) in out.chunks_exact_mut(Q::SUB).enumerate() {
                let sub = unit * (UNIT / Q::SUB) + part;
                for (out, &q) in out.iter_mut().zip(&q[part * Q::SUB..]) {
                    *out = s[sub] * f32::from(q) + m[sub];
                }
            }
        }
    }
}

multiversion! {
    /// Multiplies [`ROWS`] rows of weights by rows of activations, both padded to `stride`;
    /// `out[row]` are a row's products. Sums are kept in as many parts as a vector has lanes, which
    /// keeps their rounding small.
    pub(super) fn multiply(weights: &[f32], x: &[f32], stride: usize, out: &mut [[f32; ROWS]])
        = multiply_generic
}

#[inline(always)]
fn multiply_generic<S: Simd>(weights: &[f32], x: &[f32], stride: usize, out: &mut [[f32; ROWS]]) {
    assert!(weights.len() == ROWS * stride && x.len() == out.len() * stride);
    let mut quads = x.chunks_exact(SIDE * stride);
    let mut outs = out.chunks_exact_mut(SIDE);
    for (x, out) in (&mut quads).zip(&mut outs) {
        for row in (0..ROWS).step_by(SIDE) {
            let sums = block::<S, SIDE>(&weights[row * stride..], x, stride);
            for (out, sums) in out.iter_mut().zip(sums) {
                out[row..row + SIDE].copy_from_slice(&sums);
            }
        }
    }
    let rest = quads.remainder().chunks_exact(stride);
    for (x, out) in rest.zip(outs.into_remainder()) {
        for row in (0..ROWS).step_by(SIDE) {
            let [sums] = block::<S, 1>(&weights[row * stride..], x, stride);
            out[row..row + SIDE].copy_from_slice(&sums);
        }
    }
}

/// Products of [`SIDE`] rows of weights and `N` rows of activations.
#[inline(always)]
fn block<S: Simd, const N: usize>(w: &[f32], x: &[f32], stride: usize) -> [[f32; SIDE]; N] {
    assert!(w.len() >= SIDE * stride && x.len() >= N * stride && stride.is_multiple_of(S::LANES));
    // SAFETY: `at` and a vector more stay below `stride`, rows inside the slices;
    // `multiversion!` checked the features.
    unsafe {
        let mut sums = [[S::splat(0.0); SIDE]; N];
        for at in (0..stride).step_by(S::LANES) {
            let w: [S::V; SIDE] = std::array::from_fn(|i| S::load(w.as_ptr().add(i * stride + at)));
            for (n, sums) in sums.iter_mut().enumerate() {
                let x = S::load(x.as_ptr().add(n * stride + at));
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = S::fma(w, x, *sum);
                }
            }
        }
        sums.map(|sums| sums.map(|sum| S::sum(sum)))
    }
}

multiversion! {
    /// `out = x / sqrt(mean(x²) + eps) * weight`.
    pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32])
        = rms_norm_generic
}

#[inline(always)]
fn rms_norm_generic<S: Simd>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let n = x.len();
    assert!(weight.len() == n && out.len() == n);
    let whole = n / S::LANES * S::LANES;
    // SAFETY: `i` and a vector more stay inside the slices; `multiversion!` checked the features.
    unsafe {
        let mut squares = S::splat(0.0);
        for i in (0..whole).step_by(S::LANES) {
            let v = S::load(x.as_ptr().add(i));
            squares = S::fma(v, v, squares);
        }
        let rest: f32 = x[whole..].iter().map(|v| v * v).sum();
        let scale = 1.0 / ((S::sum(squares) + rest) / n as f32 + eps).sqrt();
        let scales = S::splat(scale);
        for i in (0..whole).step_by(S::LANES) {
            let v = S::mul(S::load(x.as_ptr().add(i)), scales);
            S::store(
                out.as_mut_ptr().add(i),
                S::mul(v, S::load(weight.as_ptr().add(i))),
            );
        }
        for i in whole..n {
            out[i] = x[i] * scale * weight[i];
        }
    }
}

/// `out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`.
pub(super) fn layer_norm(
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    eps: f32,
    out: &mut [f32],
) {
    let n = x.len() as f32;
    let mean = x.iter().sum::<f32>() / n;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / n;
    let scale = 1.0 / (variance + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = (x - mean) * scale * weight;
    }
    if let Some(bias) = bias {
        out.iter_mut()
            .zip(bias)
            .for_each(|(out, bias)| *out += bias);
    }
}

multiversion! {
    /// The activation over a tile's products: `gate` becomes the result; without a gate, `gate` holds
    /// what `up` would.
    pub(super) fn activate(
        activation: Activation, gate: &mut [[f32; ROWS]], up: Option<&[[f32; ROWS]]>
    ) = activate_generic
}

#[inline(always)]
fn activate_generic<S: Simd>(
    activation: Activation,
    gate: &mut [[f32; ROWS]],
    up: Option<&[[f32; ROWS]]>,
) {
    assert!(up.is_none_or(|up| gate.len() == up.len()));
    for (row, gate) in gate.iter_mut().enumerate() {
        for i in (0..ROWS).step_by(S::LANES) {
            // SAFETY: the lanes divide the row; `multiversion!` checked the features.
            unsafe {
                let mut x = S::load(gate.as_ptr().add(i));
                let up = up.map(|up| S::load(up[row].as_ptr().add(i)));
                // All are `x * sigmoid(z)`; `tanh(u) = 2 sigmoid(2u) - 1`.
                let (z, up) = match activation {
                    Activation::Silu => (x, up),
                    Activation::Gelu => {
                        let cube = S::mul(S::mul(x, x), S::mul(x, S::splat(0.044_715)));
                        let u = S::mul(S::add(x, cube), S::splat(2.0 * GELU));
                        (u, up)
                    }
                    Activation::ClampedSwish => {
                        x = min::<S>(x, LIMIT);
                        let up = up.map(|up| {
                            let up = min::<S>(S::max(up, S::splat(-LIMIT)), LIMIT);
                            S::add(up, S::splat(1.0))
                        });
                        (S::mul(x, S::splat(SWISH)), up)
                    }
                };
                // Beyond 88 exp would overflow, and the quotient is 0 beside any other number.
                let minus = S::sub(S::splat(0.0), S::max(z, S::splat(-88.0)));
                let y = S::div(x, S::add(S::splat(1.0), S::exp(minus)));
                let y = up.map_or(y, |up| S::mul(y, up));
                S::store(gate.as_mut_ptr().add(i), y);
            }
        }
    }
}

/// `sqrt(2 / pi)`.
const GELU: f32 = 0.797_884_6;
/// Of [`Activation::ClampedSwish`].
const LIMIT: f32 = 7.0;
const SWISH: f32 = 1.702;

/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn min<S: Simd>(x: S::V, most: f32) -> S::V {
    // SAFETY: the caller's.
    unsafe {
        let zero = S::splat(0.0);
        S::sub(zero, S::max(S::sub(zero, x), S::splat(-most)))
    }
}
