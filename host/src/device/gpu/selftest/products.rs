//! Products: repacking, `linear_exact`, `gemv` and its kin, `gemm`.

use super::Driver;
use super::bench::{Bench, TestMatrix, layout, nmse, types};
use super::rows::{Paging, rms_norm, rotate, rotation_table, silu};
use crate::error::Result;
use gguf::GgmlType;
use half::f16;
use kernels::dense::{self, DenseArgs, DequantiseArgs, Part};
use kernels::exact::{self, LinearArgs};
use kernels::gemm::{self, GemmArgs};
use kernels::gemv::{self, GateUpArgs, GemvArgs, Input, QkvArgs};
use kernels::rows::{EmbedArgs, Rotation};
use kernels::types::GROUP;
use std::ptr;

/// f32 arithmetic against f64.
const F32_LIMIT: f64 = 1e-10;
/// 8-bit activations against the same 8-bit activations: a value on the edge may round the other way.
const Q8_LIMIT: f64 = 1e-6;
/// f16 weights and activations against f16 activations.
const F16_LIMIT: f64 = 1e-6;

pub fn run<D: Driver>(b: &mut Bench<'_, D>) -> Result<()> {
    for ty in types() {
        let quantised = layout(ty).quantised;
        let block = layout(ty).block.max(32);
        // Widths: one block, several, and more than a warp's 32 groups; float types any width.
        let widths = if quantised {
            [block, 3 * block, 1536]
        } else {
            [20, 97, 1111]
        };
        for (cols, rows) in widths.into_iter().zip([1, 7, 70]) {
            let m = b.matrix(ty, rows, cols)?;
            embed(b, &m)?;
            for n in [1, 9] {
                linear_exact(b, &m, n)?;
            }
            for (norm, bias, add) in [(false, false, false), (true, true, true)] {
                gemv(b, &m, norm, bias, add)?;
            }
        }
        for (rows, cols) in [(5, block), (130, 2 * block + if quantised { 0 } else { 9 })] {
            let m = b.matrix(ty, rows, cols)?;
            for (kernel, mt, n) in [("gemm_32", 1, 3), ("gemm_64", 2, 129)] {
                gemm(b, &m, kernel, mt, n, n == 3)?;
            }
            if rows > 5 {
                for (kernel, bm, bn, n) in [
                    ("dense_128x128", 128, 128, 129),
                    ("dense_64x128", 64, 128, 9),
                    ("dense_64x64", 64, 64, 65),
                ] {
                    dense(b, &m, kernel, bm, bn, n, n == 9)?;
                }
            }
        }
    }
    for (gate, up) in [
        (GgmlType::Q4_K, GgmlType::Q4_K),
        (GgmlType::Q5_0, GgmlType::Q8_0),
        (GgmlType::F16, GgmlType::Q6_K),
    ] {
        gate_up(b, gate, up)?;
        dense_gate_up(b, gate, up, "dense_gate_up_128x128", 128, 130)?;
        dense_gate_up(b, gate, up, "dense_gate_up_64x128", 64, 17)?;
    }
    for (types, heads, kv_heads, head_dim, dims, halves) in [
        (
            [GgmlType::Q4_K, GgmlType::Q4_K, GgmlType::Q6_K],
            4,
            2,
            32,
            32,
            true,
        ),
        (
            [GgmlType::Q5_0, GgmlType::Q5_0, GgmlType::Q8_0],
            7,
            1,
            64,
            64,
            false,
        ),
        (
            [GgmlType::F16, GgmlType::F32, GgmlType::BF16],
            3,
            3,
            16,
            8,
            true,
        ),
        (
            [GgmlType::Q4_1, GgmlType::Q4_1, GgmlType::Q4_1],
            2,
            1,
            24,
            16,
            false,
        ),
    ] {
        qkv(b, types, heads, kv_heads, head_dim, dims, halves)?;
    }
    Ok(())
}

fn name(m: &TestMatrix, rest: impl std::fmt::Display) -> String {
    format!("{} {}×{} {rest}", m.ty, m.rows, m.cols)
}

fn embed<D: Driver>(b: &mut Bench<'_, D>, m: &TestMatrix) -> Result<()> {
    let tokens: Vec<u32> = (0..3).map(|_| b.random.below(m.rows) as u32).collect();
    let paging = Paging::new(b, &[(0, 3)], 1, &tokens)?;
    let out = b.alloc(4 * 3 * m.cols)?;
    let args = EmbedArgs {
        table: m.matrix,
        step: paging.step,
        scale: 0.5,
        len: m.cols as u32,
        out: out.ptr(),
    };
    let groups = m.matrix.cols as usize / GROUP;
    b.driver
        .launch("embed", (groups.div_ceil(32) as u32, 3), 32, 0, &args)?;
    let found = b.take::<f32>("embed", out)?;
    let expected: Vec<f64> = tokens
        .iter()
        .flat_map(|&t| &m.values[t as usize * m.cols..(t as usize + 1) * m.cols])
        .map(|v| f64::from(*v) * 0.5)
        .collect();
    let error = nmse(&found, &expected);
    b.report("embed", name(m, ""), error, F32_LIMIT);
    b.report("repack_kernel", name(m, ""), error, F32_LIMIT);
    Ok(())
}

fn linear_exact<D: Driver>(b: &mut Bench<'_, D>, m: &TestMatrix, n: usize) -> Result<()> {
    let x = b.random.values(n * m.cols);
    let bias = b.random.values(m.rows);
    let before = b.random.values(n * m.rows);
    let (x_on, bias_on, out) = (b.upload(&x)?, b.upload(&bias)?, b.upload(&before)?);
    let args = LinearArgs {
        matrix: m.matrix,
        bias: bias_on.ptr(),
        x: x_on.ptr(),
        len: m.cols as u32,
        rows: n as u32,
        out: out.ptr(),
        add: 1,
    };
    let grid = (
        m.rows.div_ceil(exact::THREADS as usize / 32),
        n.div_ceil(exact::ROWS),
    );
    b.driver.launch(
        "linear_exact",
        (grid.0 as u32, grid.1 as u32),
        exact::THREADS,
        0,
        &args,
    )?;
    let found = b.take::<f32>("linear_exact", out)?;
    let expected: Vec<f64> = x
        .chunks(m.cols)
        .flat_map(|x| m.times(x))
        .zip(&before)
        .enumerate()
        .map(|(i, (y, before))| y + f64::from(bias[i % m.rows]) + f64::from(*before))
        .collect();
    b.take::<f32>("linear_exact", x_on)?;
    b.report(
        "linear_exact",
        name(m, format!("× {n}")),
        nmse(&found, &expected),
        F32_LIMIT,
    );
    Ok(())
}

/// What an 8-bit activation row stands for.
fn quantise(x: &[f32]) -> Vec<f32> {
    x.chunks(GROUP)
        .flat_map(|group| {
            let peak = group.iter().fold(0.0f32, |p, v| p.max(v.abs()));
            let inverse = if peak > 0.0 { 127.0 / peak } else { 0.0 };
            let d = peak / 127.0;
            group
                .iter()
                .map(move |v| (v * inverse).round_ties_even() * d)
                .collect::<Vec<_>>()
        })
        .collect()
}

/// The row that `m` is multiplied with: float types take it as it is.
fn seen_by(m: &TestMatrix, x: &[f32]) -> Vec<f32> {
    if layout(m.ty).quantised {
        quantise(x)
    } else {
        x.to_vec()
    }
}

fn gemv<D: Driver>(
    b: &mut Bench<'_, D>,
    m: &TestMatrix,
    norm: bool,
    bias: bool,
    add: bool,
) -> Result<()> {
    let x = b.random.values(m.cols);
    let weight = b.random.values(m.cols);
    let bias_values = b.random.values(m.rows);
    let before = b.random.values(m.rows);
    let (x_on, weight_on, bias_on) = (b.upload(&x)?, b.upload(&weight)?, b.upload(&bias_values)?);
    let out = if add {
        b.upload(&before)?
    } else {
        b.alloc(4 * m.rows)?
    };
    let float = !layout(m.ty).quantised;
    let args = GemvArgs {
        input: Input {
            x: x_on.ptr(),
            norm: if norm { weight_on.ptr() } else { ptr::null() },
            eps: 1e-5,
            len: m.cols as u32,
            keep_f32: u32::from(float),
        },
        matrix: m.matrix,
        bias: if bias { bias_on.ptr() } else { ptr::null() },
        out: out.ptr(),
        add: u32::from(add),
    };
    let shared = gemv::shared_bytes(m.matrix.cols as usize, float);
    b.driver
        .launch("gemv", (2, 1), gemv::THREADS, shared, &args)?;
    let found = b.take::<f32>("gemv", out)?;
    let x = if norm { rms_norm(&x, &weight, 1e-5) } else { x };
    let expected: Vec<f64> = m
        .times(&seen_by(m, &x))
        .iter()
        .enumerate()
        .map(|(i, y)| {
            y + if bias { f64::from(bias_values[i]) } else { 0.0 }
                + if add { f64::from(before[i]) } else { 0.0 }
        })
        .collect();
    let limit = if float { F32_LIMIT } else { Q8_LIMIT };
    let case = name(m, if norm { "norm, bias, add" } else { "" });
    b.report("gemv", case, nmse(&found, &expected), limit);
    Ok(())
}

fn gemm<D: Driver>(
    b: &mut Bench<'_, D>,
    m: &TestMatrix,
    kernel: &'static str,
    mt: usize,
    n: usize,
    add: bool,
) -> Result<()> {
    let padded = m.matrix.cols as usize;
    let x: Vec<f32> = (0..n * m.cols)
        .map(|_| f16::from_f32(b.random.signed()).to_f32())
        .collect();
    let halves: Vec<f16> = x
        .chunks(m.cols)
        .flat_map(|row| {
            row.iter()
                .copied()
                .chain(std::iter::repeat(0.0))
                .take(padded)
                .map(f16::from_f32)
        })
        .collect();
    let bias = b.random.values(m.rows);
    let before = b.random.values(n * m.rows);
    let (x_on, bias_on) = (b.upload(&halves)?, b.upload(&bias)?);
    let out = if add {
        b.upload(&before)?
    } else {
        b.alloc(4 * n * m.rows)?
    };
    let args = GemmArgs {
        matrix: m.matrix,
        bias: bias_on.ptr(),
        x: x_on.ptr(),
        rows: n as u32,
        out: out.ptr(),
        add: u32::from(add),
    };
    let grid = (m.rows.div_ceil(gemm::BN) as u32, n.div_ceil(32 * mt) as u32);
    b.driver
        .launch(kernel, grid, gemm::THREADS, gemm::shared_bytes(mt), &args)?;
    let found = b.take::<f32>(kernel, out)?;
    let expected: Vec<f64> = x
        .chunks(m.cols)
        .flat_map(|x| m.times(x))
        .enumerate()
        .map(|(i, y)| {
            y + f64::from(bias[i % m.rows]) + if add { f64::from(before[i]) } else { 0.0 }
        })
        .collect();
    b.report(
        kernel,
        name(m, format!("× {n}")),
        nmse(&found, &expected),
        F16_LIMIT,
    );
    Ok(())
}

/// Input rows as halves, padded to the matrix's columns, and as what those stand for.
fn half_rows<D: Driver>(
    b: &mut Bench<'_, D>,
    m: &TestMatrix,
    n: usize,
    scale: f32,
) -> (Vec<f16>, Vec<f32>) {
    let padded = m.matrix.cols as usize;
    let mut halves = vec![f16::ZERO; n * padded];
    let mut x = Vec::with_capacity(n * m.cols);
    for row in halves.chunks_mut(padded) {
        for half in &mut row[..m.cols] {
            *half = f16::from_f32(b.random.signed() * scale);
            x.push(half.to_f32());
        }
    }
    (halves, x)
}

/// All rows of a matrix, from output row `out_row` on.
fn whole(m: &TestMatrix, bias: *const f32, out_row: u32) -> Part {
    Part {
        matrix: m.matrix,
        bias,
        first: 0,
        rows: m.rows as u32,
        out_row,
    }
}

fn dequantise<D: Driver>(
    b: &mut Bench<'_, D>,
    parts: [Part; 3],
    n: u32,
    ways: u32,
    out: *mut u16,
    bias: *mut f32,
) -> Result<()> {
    let args = DequantiseArgs {
        parts,
        ways,
        out,
        bias,
    };
    let groups = |p: &Part| p.rows as usize * p.matrix.groups();
    let most = parts.iter().map(groups).max().unwrap_or(0);
    let threads = dense::DEQUANTISE_THREADS;
    let grid = (most.div_ceil(threads as usize) as u32, n);
    b.driver
        .launch("dequantise", grid, threads, dense::DEQUANTISE_SHARED, &args)
}

/// A matrix's rows in two parts that change places, the second without a bias, through f16.
fn dense<D: Driver>(
    b: &mut Bench<'_, D>,
    m: &TestMatrix,
    kernel: &'static str,
    bm: usize,
    bn: usize,
    n: usize,
    add: bool,
) -> Result<()> {
    let cols = m.matrix.cols as usize;
    let (halves, x) = half_rows(b, m, n, 1.0);
    let (bias, before) = (b.random.values(m.rows), b.random.values(n * m.rows));
    let (x_on, bias_on) = (b.upload(&halves)?, b.upload(&bias)?);
    let (w_on, w_bias) = (b.alloc(2 * m.rows * cols)?, b.alloc(4 * m.rows)?);
    let cut = m.rows / 2 + 1;
    let first = Part {
        rows: cut as u32,
        out_row: (m.rows - cut) as u32,
        ..whole(m, bias_on.ptr(), 0)
    };
    let second = Part {
        first: cut as u32,
        rows: (m.rows - cut) as u32,
        ..whole(m, ptr::null(), 0)
    };
    dequantise(b, [first, second, second], 2, 1, w_on.ptr(), w_bias.ptr())?;
    let out = if add {
        b.upload(&before)?
    } else {
        b.alloc(4 * n * m.rows)?
    };
    let args = DenseArgs {
        w: w_on.ptr(),
        bias: w_bias.ptr(),
        x: x_on.ptr(),
        rows: n as u32,
        cols: cols as u32,
        n: m.rows as u32,
        out: out.ptr(),
        stride: m.rows as u32,
        add: u32::from(add),
    };
    let grid = (n.div_ceil(bm) as u32, m.rows.div_ceil(bn) as u32);
    let shared = dense::shared_bytes(bm, bn);
    b.driver
        .launch(kernel, grid, dense::THREADS, shared, &args)?;
    let found = b.take::<f32>(kernel, out)?;
    b.take::<u16>("dequantise", w_on)?;
    b.take::<f32>("dequantise", w_bias)?;
    let mut expected = Vec::new();
    for x in x.chunks(m.cols) {
        let y = m.times(x);
        let biased = |i: usize| y[i] + if i < cut { f64::from(bias[i]) } else { 0.0 };
        expected.extend((cut..m.rows).chain(0..cut).map(biased));
    }
    if add {
        for (e, before) in expected.iter_mut().zip(&before) {
            *e += f64::from(*before);
        }
    }
    let error = nmse(&found, &expected);
    b.report(kernel, name(m, format!("× {n}")), error, F16_LIMIT);
    b.report("dequantise", name(m, "two parts"), error, F16_LIMIT);
    Ok(())
}

fn dense_gate_up<D: Driver>(
    b: &mut Bench<'_, D>,
    gate: GgmlType,
    up: GgmlType,
    kernel: &'static str,
    bm: usize,
    n: usize,
) -> Result<()> {
    let (rows, cols) = (96, 512);
    let (gate, up) = (b.matrix(gate, rows, cols)?, b.matrix(up, rows, cols)?);
    // Small, so that the products of two products stay in range.
    let (halves, x) = half_rows(b, &gate, n, 1.0 / 64.0);
    let (gate_bias, up_bias) = (b.random.values(rows), b.random.values(rows));
    let x_on = b.upload(&halves)?;
    let (gate_bias_on, up_bias_on) = (b.upload(&gate_bias)?, b.upload(&up_bias)?);
    let (w_on, w_bias) = (b.alloc(2 * 2 * rows * cols)?, b.alloc(4 * 2 * rows)?);
    let parts = [
        whole(&gate, gate_bias_on.ptr(), 0),
        whole(&up, up_bias_on.ptr(), 8),
    ];
    dequantise(
        b,
        [parts[0], parts[1], parts[1]],
        2,
        2,
        w_on.ptr(),
        w_bias.ptr(),
    )?;
    let out = b.alloc(2 * n * rows)?;
    let args = DenseArgs {
        w: w_on.ptr(),
        bias: w_bias.ptr(),
        x: x_on.ptr(),
        rows: n as u32,
        cols: cols as u32,
        n: 2 * rows as u32,
        out: out.ptr(),
        stride: rows as u32,
        add: 0,
    };
    let grid = (n.div_ceil(bm) as u32, (2 * rows).div_ceil(128) as u32);
    let shared = dense::shared_bytes(bm, 128);
    b.driver
        .launch(kernel, grid, dense::THREADS, shared, &args)?;
    let halves = b.take::<f16>(kernel, out)?;
    let found: Vec<f32> = halves.into_iter().map(f16::to_f32).collect();
    let mut expected = Vec::new();
    for x in x.chunks(cols) {
        let (g, u) = (gate.times(x), up.times(x));
        expected.extend(
            (0..rows)
                .map(|i| silu(g[i] + f64::from(gate_bias[i])) * (u[i] + f64::from(up_bias[i]))),
        );
    }
    let case = format!("{} and {} {rows}×{cols} × {n}", gate.ty, up.ty);
    b.report(kernel, case, nmse(&found, &expected), F16_LIMIT);
    Ok(())
}

fn gate_up<D: Driver>(b: &mut Bench<'_, D>, gate: GgmlType, up: GgmlType) -> Result<()> {
    let (rows, cols) = (37, 512);
    let (gate, up) = (b.matrix(gate, rows, cols)?, b.matrix(up, rows, cols)?);
    let (x, weight) = (b.random.values(cols), b.random.values(cols));
    let (gate_bias, up_bias) = (b.random.values(rows), b.random.values(rows));
    let (x_on, weight_on) = (b.upload(&x)?, b.upload(&weight)?);
    let (gate_bias_on, up_bias_on) = (b.upload(&gate_bias)?, b.upload(&up_bias)?);
    let out = b.alloc(4 * rows)?;
    let args = GateUpArgs {
        input: Input {
            x: x_on.ptr(),
            norm: weight_on.ptr(),
            eps: 1e-6,
            len: cols as u32,
            keep_f32: 1,
        },
        gate: gate.matrix,
        up: up.matrix,
        gate_bias: gate_bias_on.ptr(),
        up_bias: up_bias_on.ptr(),
        out: out.ptr(),
    };
    let shared = gemv::shared_bytes(cols, true);
    b.driver
        .launch("gemv_gate_up", (2, 1), gemv::THREADS, shared, &args)?;
    let found = b.take::<f32>("gemv_gate_up", out)?;
    let normed = rms_norm(&x, &weight, 1e-6);
    let g = gate.times(&seen_by(&gate, &normed));
    let u = up.times(&seen_by(&up, &normed));
    let expected: Vec<f64> = (0..rows)
        .map(|i| silu(g[i] + f64::from(gate_bias[i])) * (u[i] + f64::from(up_bias[i])))
        .collect();
    let case = format!("{} and {} {rows}×{cols}", gate.ty, up.ty);
    b.report("gemv_gate_up", case, nmse(&found, &expected), Q8_LIMIT);
    Ok(())
}

fn qkv<D: Driver>(
    b: &mut Bench<'_, D>,
    types: [GgmlType; 3],
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    dims: usize,
    halves: bool,
) -> Result<()> {
    let cols = 256;
    let position = 41;
    let sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
    let mut matrices = Vec::new();
    let mut biases = Vec::new();
    for (ty, rows) in types.into_iter().zip(sizes) {
        matrices.push(b.matrix(ty, rows, cols)?);
        biases.push(b.random.values(rows));
    }
    let (x, weight) = (b.random.values(cols), b.random.values(cols));
    let (x_on, weight_on) = (b.upload(&x)?, b.upload(&weight)?);
    let biases_on = [
        b.upload(&biases[0])?,
        b.upload(&biases[1])?,
        b.upload(&biases[2])?,
    ];
    let table = rotation_table(position + 1, dims);
    let table_on = b.upload(&table)?;
    let paging = Paging::new(b, &[(position, 1)], kv_heads * head_dim * 2, &[0])?;
    let out = b.alloc(4 * sizes[0])?;
    let args = QkvArgs {
        input: Input {
            x: x_on.ptr(),
            norm: weight_on.ptr(),
            eps: 1e-6,
            len: cols as u32,
            keep_f32: 1,
        },
        matrices: [matrices[0].matrix, matrices[1].matrix, matrices[2].matrix],
        biases: [biases_on[0].ptr(), biases_on[1].ptr(), biases_on[2].ptr()],
        rotation: Rotation {
            table: table_on.ptr(),
            dims: dims as u32,
            halves: u32::from(halves),
        },
        cache: paging.layer(kv_heads, head_dim),
        step: paging.step,
        heads: heads as u32,
        q: out.ptr(),
    };
    let shared = gemv::shared_bytes(cols, true);
    b.driver
        .launch("gemv_qkv", (2, 1), gemv::THREADS, shared, &args)?;
    let mut found = b.take::<f32>("gemv_qkv", out)?;
    let normed = rms_norm(&x, &weight, 1e-6);
    let mut expected = Vec::new();
    for (i, m) in matrices.iter().enumerate() {
        let mut y = m.times(&seen_by(m, &normed));
        for (y, bias) in y.iter_mut().zip(&biases[i]) {
            *y += f64::from(*bias);
        }
        if i < 2 {
            for head in y.chunks_mut(head_dim) {
                rotate(head, &table, position, dims, halves);
            }
        }
        expected.extend(y);
    }
    for value in [false, true] {
        for head in 0..kv_heads {
            found.extend(paging.read::<f16, D>(b, kv_heads, head_dim, value, head, 0, position)?);
        }
    }
    let case = format!("{heads} heads, {kv_heads} kv, {head_dim} wide, {dims} rotate");
    // Keys and values are rounded to f16.
    b.report("gemv_qkv", case, nmse(&found, &expected), Q8_LIMIT);
    Ok(())
}
