//! Products: repacking, `linear_exact`, `gemm`.

use super::Driver;
use super::bench::{Bench, TestMatrix, layout, nmse, types};
use super::decode;
use super::rows::Paging;
use crate::error::Result;
use half::f16;
use kernels::exact::{self, LinearArgs};
use kernels::gemm::{self, GemmArgs};
use kernels::rows::EmbedArgs;
use kernels::types::GROUP;

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
            decode::product(b, &m)?;
        }
        for (rows, cols) in [(5, block), (130, 2 * block + if quantised { 0 } else { 9 })] {
            let m = b.matrix(ty, rows, cols)?;
            for (kernel, mt, n) in [("gemm_32", 1, 3), ("gemm_64", 2, 64), ("gemm_128", 4, 129)] {
                gemm(b, &m, kernel, mt, n, n == 3)?;
            }
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
        nmse(&found, &expected),
        F32_LIMIT,
    );
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
