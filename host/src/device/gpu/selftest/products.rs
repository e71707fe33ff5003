//! Products: repacking, `linear_exact`, `linear_one`, `skinny`, `dense`.

use super::Driver;
use super::bench::{Bench, TestMatrix, layout, nmse, nmse_at_least, types};
use super::decode;
use super::rows::{Paging, silu};
use crate::device::gpu::products::Form;
use crate::error::Result;
use gguf::GgmlType;
use half::f16;
use kernels::dense::{self, DequantiseArgs, Part};
use kernels::epilogue::Output;
use kernels::exact::{self, LinearArgs};
use kernels::one::{self, OneArgs};
use kernels::rows::EmbedArgs;
use kernels::skinny::{self, JoinArgs, SkinnyArgs, Units};
use kernels::types::GROUP;
use std::ptr;

/// f32 arithmetic against f64.
pub const F32_LIMIT: f64 = 1e-10;
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
            for kernel in D::DECODE_KERNELS {
                b.decode_kernel = kernel;
                decode::product(b, &m)?;
            }
        }
        for (rows, cols) in [(5, block), (130, 2 * block + if quantised { 0 } else { 9 })] {
            let m = b.matrix(ty, rows, cols)?;
            one(b, &m)?;
            if rows > 5 {
                for (n, blocks) in [(7, 1), (16, 2), (21, 5), (64, 3)] {
                    skinny(b, &m, (n, blocks), n <= 7)?;
                }
                for (form, n) in Form::PLAIN.into_iter().zip([65, 9, 129, 131, 70]) {
                    if b.driver.warpgroups() || !form.warpgroups {
                        dense(b, &m, form, n, n <= 70)?;
                    }
                }
            }
        }
    }
    for (gate, up) in [
        (GgmlType::Q4_K, GgmlType::Q4_K),
        (GgmlType::Q5_0, GgmlType::Q8_0),
        (GgmlType::F16, GgmlType::Q6_K),
    ] {
        for (form, n) in Form::GATE_UP.into_iter().zip([17, 130, 140, 65]) {
            if b.driver.warpgroups() || !form.warpgroups {
                dense_gate_up(b, gate, up, form, n)?;
            }
        }
        for n in [2, 9, 40] {
            skinny_gate_up(b, gate, up, n)?;
        }
    }
    Ok(())
}

pub fn name(m: &TestMatrix, rest: impl std::fmt::Display) -> String {
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
        nmse_at_least(
            &found,
            &expected,
            x.chunks(m.cols).map(|x| m.typical(x)).sum(),
        ),
        F32_LIMIT,
    );
    Ok(())
}

fn one<D: Driver>(b: &mut Bench<'_, D>, m: &TestMatrix) -> Result<()> {
    let (halves, x) = half_rows(b, m, 1, 1.0);
    let (bias, before) = (b.random.values(m.rows), b.random.values(m.rows));
    let (x_on, bias_on, out) = (b.upload(&halves)?, b.upload(&bias)?, b.upload(&before)?);
    let args = OneArgs {
        matrix: m.matrix,
        bias: bias_on.ptr(),
        x: x_on.ptr(),
        out: out.ptr(),
        add: 1,
    };
    let grid = (m.rows.div_ceil(one::THREADS as usize / 32) as u32, 1);
    b.driver
        .launch("linear_one", grid, one::THREADS, 0, &args)?;
    let found = b.take::<f32>("linear_one", out)?;
    let sums = m.times(&x);
    let expected: Vec<f64> = (0..m.rows)
        .map(|i| sums[i] + f64::from(bias[i]) + f64::from(before[i]))
        .collect();
    // Few outputs may be small beside what they are summed from.
    let error = nmse_at_least(&found, &expected, m.typical(&x));
    b.report("linear_one", name(m, ""), error, F16_LIMIT);
    Ok(())
}

/// The products of [`dense`] by `skinny`, shared out among `blocks` blocks.
fn skinny<D: Driver>(
    b: &mut Bench<'_, D>,
    m: &TestMatrix,
    (n, blocks): (usize, u32),
    add: bool,
) -> Result<()> {
    let (halves, x) = half_rows(b, m, n, 1.0);
    let (bias, before) = (b.random.values(m.rows), b.random.values(n * m.rows));
    let (x_on, bias_on) = (b.upload(&halves)?, b.upload(&bias)?);
    let out = if add {
        b.upload(&before)?
    } else {
        b.alloc(4 * n * m.rows)?
    };
    let cut = m.rows / 2 + 1;
    let to = SkinnyTo {
        ways: 1,
        out: out.ptr(),
        stride: m.rows,
        add,
    };
    let parts = two_parts(m, cut, bias_on.ptr());
    skinny_launches(b, parts, (x_on.ptr(), n), blocks, to)?;
    let found = b.take::<f32>("skinny", out)?;
    let expected = of_two_parts(m, &x, cut, &bias, add.then_some(&before[..]));
    let typical = x.chunks(m.cols).map(|x| m.typical(x)).sum();
    let error = nmse_at_least(&found, &expected, typical);
    let case = name(m, format!("× {n} on {blocks}"));
    b.report("skinny", case.clone(), error, F16_LIMIT);
    b.report("skinny_join", case, error, F16_LIMIT);
    Ok(())
}

/// Where products by `skinny` go; see [`JoinArgs`].
struct SkinnyTo {
    ways: u32,
    out: *mut u8,
    stride: usize,
    add: bool,
}

/// Launches a product by `skinny` of the first two parts, and the adding up of its sums.
fn skinny_launches<D: Driver>(
    b: &mut Bench<'_, D>,
    parts: [Part; 3],
    (x, n): (*const u16, usize),
    blocks: u32,
    to: SkinnyTo,
) -> Result<()> {
    let cols = parts[0].matrix.cols;
    let units = Units::of(&parts[..2], cols, n as u32, blocks);
    let sums = b.alloc(4 * units.values())?;
    let args = SkinnyArgs {
        parts,
        units,
        x,
        rows: n as u32,
        cols,
        sums: sums.ptr(),
    };
    let (grid, shared) = ((units.blocks, 1), skinny::shared_bytes(n as u32));
    b.driver
        .launch("skinny", grid, skinny::THREADS, shared, &args)?;
    let args = JoinArgs {
        parts,
        units,
        sums: sums.ptr(),
        ways: to.ways,
        out: to.out,
        rows: n as u32,
        stride: to.stride as u32,
        add: u32::from(to.add),
    };
    let grid = (args.threads().div_ceil(skinny::THREADS as usize) as u32, 1);
    b.driver
        .launch("skinny_join", grid, skinny::THREADS, 0, &args)
}

fn skinny_gate_up<D: Driver>(
    b: &mut Bench<'_, D>,
    gate: GgmlType,
    up: GgmlType,
    n: usize,
) -> Result<()> {
    let (rows, cols) = (300, 512);
    let (gate, up) = (b.matrix(gate, rows, cols)?, b.matrix(up, rows, cols)?);
    // Small, so that the products of two products stay in range.
    let (halves, x) = half_rows(b, &gate, n, 1.0 / 64.0);
    let (gate_bias, up_bias) = (b.random.values(rows), b.random.values(rows));
    let x_on = b.upload(&halves)?;
    let (gate_bias_on, up_bias_on) = (b.upload(&gate_bias)?, b.upload(&up_bias)?);
    let out = b.alloc(2 * n * rows)?;
    let second = whole(&up, up_bias_on.ptr(), 8);
    let parts = [whole(&gate, gate_bias_on.ptr(), 0), second, second];
    let to = SkinnyTo {
        ways: 2,
        out: out.ptr(),
        stride: rows,
        add: false,
    };
    skinny_launches(b, parts, (x_on.ptr(), n), 3, to)?;
    let halves = b.take::<f16>("skinny", out)?;
    let found: Vec<f32> = halves.into_iter().map(f16::to_f32).collect();
    let expected = of_gate_up((&gate, &gate_bias), (&up, &up_bias), &x);
    let case = format!("{} and {} {rows}×{cols} × {n}", gate.ty, up.ty);
    b.report("skinny", case, nmse(&found, &expected), F16_LIMIT);
    Ok(())
}

/// A matrix's rows in two parts that change places, the first of `cut` rows, the second without a bias.
fn two_parts(m: &TestMatrix, cut: usize, bias: *const f32) -> [Part; 3] {
    let first = Part {
        rows: cut as u32,
        out_row: (m.rows - cut) as u32,
        ..whole(m, bias, 0)
    };
    let second = Part {
        first: cut as u32,
        rows: (m.rows - cut) as u32,
        ..whole(m, ptr::null(), 0)
    };
    [first, second, second]
}

/// What the products of rows `x` by [`two_parts`] should be, added to `before`.
fn of_two_parts(
    m: &TestMatrix,
    x: &[f32],
    cut: usize,
    bias: &[f32],
    before: Option<&[f32]>,
) -> Vec<f64> {
    let mut expected = Vec::new();
    for x in x.chunks(m.cols) {
        let y = m.times(x);
        let biased = |i: usize| y[i] + if i < cut { f64::from(bias[i]) } else { 0.0 };
        expected.extend((cut..m.rows).chain(0..cut).map(biased));
    }
    for (e, before) in expected.iter_mut().zip(before.unwrap_or_default()) {
        *e += f64::from(*before);
    }
    expected
}

/// `silu(x Gᵀ + g) * (x Uᵀ + u)`.
fn of_gate_up(
    (gate, gate_bias): (&TestMatrix, &[f32]),
    (up, up_bias): (&TestMatrix, &[f32]),
    x: &[f32],
) -> Vec<f64> {
    let mut expected = Vec::new();
    for x in x.chunks(gate.cols) {
        let (g, u) = (gate.times(x), up.times(x));
        expected.extend(
            (0..gate.rows)
                .map(|i| silu(g[i] + f64::from(gate_bias[i])) * (u[i] + f64::from(up_bias[i]))),
        );
    }
    expected
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
    form: Form,
    n: usize,
    add: bool,
) -> Result<()> {
    let cols = m.matrix.cols as usize;
    let (halves, x) = half_rows(b, m, n, 1.0);
    let (bias, before) = (b.random.values(m.rows), b.random.values(n * m.rows));
    let (x_on, bias_on) = (b.upload(&halves)?, b.upload(&bias)?);
    let (w_on, w_bias) = (b.alloc(2 * m.rows * cols)?, b.alloc(4 * m.rows)?);
    let cut = m.rows / 2 + 1;
    let parts = two_parts(m, cut, bias_on.ptr());
    dequantise(b, parts, 2, 1, w_on.ptr(), w_bias.ptr())?;
    let out = if add {
        b.upload(&before)?
    } else {
        b.alloc(4 * n * m.rows)?
    };
    let to = Output {
        bias: w_bias.ptr(),
        out: out.ptr(),
        rows: n as u32,
        n: m.rows as u32,
        stride: m.rows as u32,
        add: u32::from(add),
    };
    let (w, x_on) = (w_on.ptr::<u16>(), x_on.ptr::<u16>());
    form.multiply(&mut b.driver, w, x_on, cols as u32, to)?;
    let kernel = form.kernel;
    let found = b.take::<f32>(kernel, out)?;
    b.take::<u16>("dequantise", w_on)?;
    b.take::<f32>("dequantise", w_bias)?;
    let expected = of_two_parts(m, &x, cut, &bias, add.then_some(&before[..]));
    let error = nmse(&found, &expected);
    b.report(kernel, name(m, format!("× {n}")), error, F16_LIMIT);
    b.report("dequantise", name(m, "two parts"), error, F16_LIMIT);
    Ok(())
}

fn dense_gate_up<D: Driver>(
    b: &mut Bench<'_, D>,
    gate: GgmlType,
    up: GgmlType,
    form: Form,
    n: usize,
) -> Result<()> {
    let (rows, cols) = (160, 512);
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
    let to = Output {
        bias: w_bias.ptr(),
        out: out.ptr(),
        rows: n as u32,
        n: 2 * rows as u32,
        stride: rows as u32,
        add: 0,
    };
    let (w, x_on) = (w_on.ptr::<u16>(), x_on.ptr::<u16>());
    form.multiply(&mut b.driver, w, x_on, cols as u32, to)?;
    let kernel = form.kernel;
    let halves = b.take::<f16>(kernel, out)?;
    let found: Vec<f32> = halves.into_iter().map(f16::to_f32).collect();
    let expected = of_gate_up((&gate, &gate_bias), (&up, &up_bias), &x);
    let case = format!("{} and {} {rows}×{cols} × {n}", gate.ty, up.ty);
    b.report(kernel, case, nmse(&found, &expected), F16_LIMIT);
    Ok(())
}
