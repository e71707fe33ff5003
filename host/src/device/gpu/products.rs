//! Products, `x Wᵀ + b`, in the ways that `ops` describes, and what adapters add to them.

use super::ops::{NormRows, blocks};
use super::{Address, Driver, Gpu, Scratch};
use crate::device::{Linear, Norm};
use crate::error::Result;
use cuda_std::tensor::Tiling;
use kernels::decode::{NO_OP, Op, kind};
use kernels::dense::{self, DenseArgs, DequantiseArgs, Part};
use kernels::epilogue::Output;
use kernels::exact::{self, LinearArgs};
use kernels::few;
use kernels::gemm::{self, GemmArgs};
use kernels::types::{GROUP, NO_MATRIX};
use kernels::warpgroup::{self, WarpgroupArgs};
use std::ptr;

/// Bytes of weights unpacked at a time: their product should take many turns of the whole card, the last
/// of which is rarely full.
pub(super) const SLICE_BYTES: usize = 128 << 20;

/// An output of `dense` products.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub address: Address,
    pub element_bytes: usize,
    pub stride: usize,
    pub add: bool,
}

/// A kernel that multiplies by unpacked weights: a block takes `bm` input rows and `bn` matrix rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub kernel: &'static str,
    pub bm: u32,
    pub bn: u32,
    /// Of the kernels in `warpgroup`.
    pub warpgroups: bool,
}

const fn form(kernel: &'static str, bm: u32, bn: u32, warpgroups: bool) -> Form {
    Form {
        kernel,
        bm,
        bn,
        warpgroups,
    }
}

impl Form {
    pub const PLAIN: [Form; 5] = [
        form("dense_64x64", 64, 64, false),
        form("dense_64x128", 64, 128, false),
        form("dense_128x128", 128, 128, false),
        form("warpgroup_128x128", 128, 128, true),
        form("warpgroup_128x256", 128, 256, true),
    ];
    pub const GATE_UP: [Form; 4] = [
        form("dense_gate_up_64x128", 64, 128, false),
        form("dense_gate_up_128x128", 128, 128, false),
        form("warpgroup_gate_up_128x128", 128, 128, true),
        form("warpgroup_gate_up_128x256", 128, 256, true),
    ];

    /// The form for so many input rows and matrix rows, of which `ways` alternate.
    ///
    /// Large tiles read shared memory less often, small ones share the work out better. Where they draw level was
    /// measured on an H100, for products of 128 to 2,048 rows by the matrices of 135M to 8B models.
    fn choose<D: Driver>(driver: &D, ways: usize, rows: u32, n: u32) -> Form {
        let count = |bm: u32, bn: u32| blocks(rows as usize, bm) * blocks(n as usize, bn);
        let card = driver.multiprocessors();
        let forms: &[Form] = if ways == 1 {
            &Form::PLAIN
        } else {
            &Form::GATE_UP
        };
        let last = forms.len() - 1;
        // A multiprocessor has room for one block of these; the larger take 1.8 times as long.
        if driver.warpgroups() && 4 * count(128, 128) >= 3 * card {
            let turns = |bn: u32| count(128, bn).div_ceil(card);
            let larger = 18 * turns(256) <= 10 * turns(128);
            return forms[if larger { last } else { last - 1 }];
        }
        // Of these for two.
        let fills = |bm: u32, bn: u32, many: u32| 2 * count(bm, bn) >= many * card;
        match (fills(128, 128, 5), fills(64, 128, 3)) {
            (true, _) => forms[last - 2],
            (_, true) => forms[last - 3],
            _ => forms[0],
        }
    }

    /// `x Wᵀ`: f16 `w` is `[n][cols]`, `x` `[rows][cols]`.
    pub fn multiply<D: Driver>(
        self,
        driver: &mut D,
        w: *const u16,
        x: *const u16,
        cols: u32,
        to: Output,
    ) -> Result<()> {
        let grid = (
            blocks(to.rows as usize, self.bm),
            blocks(to.n as usize, self.bn),
        );
        if !self.warpgroups {
            let args = DenseArgs { w, x, cols, to };
            let shared = dense::shared_bytes(self.bm as usize, self.bn as usize);
            return driver.launch(self.kernel, grid, dense::THREADS, shared, &args);
        }
        let mut map = |rows: u32, box_rows: u32, address: *const u16| {
            driver.tensor_map(&Tiling {
                address: address as Address,
                rows,
                cols,
                stride: u64::from(cols) * 2,
                box_rows,
            })
        };
        let args = WarpgroupArgs {
            x: map(to.rows, self.bm, x)?,
            w: map(to.n, self.bn, w)?,
            cols,
            to,
        };
        let shared = warpgroup::shared_bytes(self.bn as usize);
        driver.launch(self.kernel, grid, warpgroup::THREADS, shared, &args)
    }
}

/// A product's optional bias.
pub(super) fn bias_ptr<D: Driver>(linear: Linear<'_, Gpu<D>>) -> *const f32 {
    linear.bias.map_or(ptr::null(), |b| b.ptr().cast_const())
}

/// Rows `first .. first + rows` of a matrix, to be unpacked from row `out_row` on.
pub(super) fn part<D: Driver>(
    linear: &Linear<'_, Gpu<D>>,
    first: usize,
    rows: usize,
    out_row: usize,
) -> Part {
    Part {
        matrix: linear.weight.matrix,
        bias: bias_ptr(*linear),
        first: first as u32,
        rows: rows as u32,
        out_row: out_row as u32,
    }
}

/// Input rows of a product that is not fused.
#[derive(Clone, Copy)]
pub(super) enum Rows {
    F32(*const f32),
    F16(*const u16),
}

impl<D: Driver> Gpu<D> {
    /// The product of one row.
    pub(super) fn product_op(
        &mut self,
        linear: Linear<'_, Self>,
        x: *const f32,
        norm: Option<&Norm<'_, Self>>,
        out: *mut f32,
    ) -> Result<Op> {
        let weight = linear.weight;
        Ok(Op {
            kind: kind::PRODUCT,
            input: self.input(x, norm, weight.cols, !weight.quantised)?,
            matrices: [weight.matrix, NO_MATRIX, NO_MATRIX],
            biases: [bias_ptr(linear), ptr::null(), ptr::null()],
            out,
            ..NO_OP
        })
    }

    /// A product with its adapters, `out = x Wᵀ + b`.
    pub(super) fn whole_product(
        &mut self,
        linear: Linear<'_, Self>,
        x: Rows,
        rows: usize,
        out: *mut f32,
    ) -> Result<()> {
        self.product(linear, x, rows, out, false)?;
        self.adapt(linear, x, rows, out)
    }

    /// Adds what a linear's adapters make of the rows `x` to its product `out`, `[rows][matrix rows]`.
    pub(super) fn adapt(
        &mut self,
        linear: Linear<'_, Self>,
        x: Rows,
        rows: usize,
        out: *mut f32,
    ) -> Result<()> {
        for adapter in linear.adapters {
            let plain = |weight| Linear {
                weight,
                bias: None,
                adapters: &[],
            };
            let rank = adapter.a.matrix.rows as usize;
            let low = self.scratch(Scratch::Low, rows * rank * 4)?;
            self.product(plain(&adapter.a), x, rows, low as *mut f32, false)?;
            let low = NormRows {
                scale: adapter.scale,
                ..NormRows::whole(low as *const f32, rows, rank)
            };
            let scaled = match x {
                Rows::F32(_) => {
                    self.norm(None, low)?;
                    Rows::F32(low.x)
                }
                Rows::F16(_) => {
                    let stride = rank.next_multiple_of(GROUP);
                    let half = self.scratch(Scratch::LowHalf, rows * stride * 2)?;
                    let half = NormRows {
                        out: half,
                        stride,
                        f16: true,
                        ..low
                    };
                    self.norm(None, half)?;
                    Rows::F16(half.out as *const u16)
                }
            };
            self.product(plain(&adapter.b), scaled, rows, out, true)?;
        }
        Ok(())
    }

    /// A product that is not fused: `out = x Wᵀ + b`, or `out += …`.
    pub(super) fn product(
        &mut self,
        linear: Linear<'_, Self>,
        x: Rows,
        rows: usize,
        out: *mut f32,
        add: bool,
    ) -> Result<()> {
        let matrix = linear.weight.matrix;
        let bias = bias_ptr(linear);
        let add = u32::from(add);
        let n = matrix.rows as usize;
        let columns = blocks(n, gemm::BN as u32);
        match x {
            Rows::F32(x) => {
                let len = linear.weight.cols as u32;
                let args = LinearArgs {
                    matrix,
                    bias,
                    x,
                    len,
                    rows: rows as u32,
                    out,
                    add,
                };
                let grid = (
                    blocks(n, exact::THREADS / 32),
                    blocks(rows, exact::ROWS as u32),
                );
                self.driver
                    .launch("linear_exact", grid, exact::THREADS, 0, &args)
            }
            // Not where a matrix has so many rows that one row of blocks fills the card anyway.
            Rows::F16(x)
                if rows == self.current.rows
                    && self.dense()
                    && (rows > 64 || columns < 4 * self.driver.multiprocessors()) =>
            {
                let to = Target {
                    address: out as Address,
                    element_bytes: 4,
                    stride: n,
                    add: add != 0,
                };
                self.dense_sliced(&[linear], x, to)
            }
            Rows::F16(x) => {
                let args = GemmArgs {
                    matrix,
                    bias,
                    x,
                    rows: rows as u32,
                    out,
                    add,
                };
                // One row, or a few where tiles of tensor cores would leave most of the card without work.
                if rows == 1 || rows <= few::ROWS && columns < self.driver.multiprocessors() {
                    let grid = (blocks(n, few::THREADS / 32), 1);
                    return self
                        .driver
                        .launch("linear_few", grid, few::THREADS, 0, &args);
                }
                // The taller tile where it still gives every multiprocessor a block.
                let fills = columns * blocks(rows, 64) >= self.driver.multiprocessors();
                let (kernel, mt) = if rows > 32 && fills {
                    ("gemm_64", 2)
                } else {
                    ("gemm_32", 1)
                };
                let grid = (columns, blocks(rows, 32 * mt));
                let shared = gemm::shared_bytes(mt as usize);
                self.driver
                    .launch(kernel, grid, gemm::THREADS, shared, &args)
            }
        }
    }

    /// Whether weights are unpacked beforehand for the products of this step.
    pub(super) fn dense(&self) -> bool {
        !self.exact && self.current.rows >= D::DENSE_ROWS
    }

    /// Unpacks rows of up to three matrices, `rows` in all, and multiplies: `ways` is 1 for parts that
    /// follow each other, 2 for gate and up.
    pub(super) fn dense_product(
        &mut self,
        parts: &[Part],
        ways: usize,
        x: *const u16,
        to: Target,
    ) -> Result<()> {
        let (rows, cols) = (self.current.rows, parts[0].matrix.cols as usize);
        let n: usize = parts.iter().map(|p| p.rows as usize).sum();
        let w = self.scratch(Scratch::Weights, n * cols * 2)?;
        let bias = self.scratch(Scratch::Biases, n * 4)?;
        let groups = |p: &Part| p.rows as usize * p.matrix.groups();
        let most = parts.iter().map(groups).max().unwrap_or(0);
        let args = DequantiseArgs {
            parts: std::array::from_fn(|i| parts[i.min(parts.len() - 1)]),
            ways: ways as u32,
            out: w as *mut u16,
            bias: bias as *mut f32,
        };
        let threads = dense::DEQUANTISE_THREADS;
        let grid = (blocks(most, threads), parts.len() as u32);
        self.driver
            .launch("dequantise", grid, threads, dense::DEQUANTISE_SHARED, &args)?;
        let output = Output {
            bias: bias as *const f32,
            out: to.address as *mut u8,
            rows: rows as u32,
            n: n as u32,
            stride: to.stride as u32,
            add: u32::from(to.add),
        };
        let form = Form::choose(&self.driver, ways, output.rows, output.n);
        form.multiply(&mut self.driver, w as *const u16, x, cols as u32, output)
    }

    /// [`Gpu::dense_product`] of one matrix, or of gate and up, slice by slice.
    pub(super) fn dense_sliced(
        &mut self,
        linears: &[Linear<'_, Self>],
        x: *const u16,
        to: Target,
    ) -> Result<()> {
        let ways = linears.len();
        let matrix = linears[0].weight.matrix;
        let (n, row_bytes) = (matrix.rows as usize, ways * matrix.cols as usize * 2);
        // Slices of whole tiles, and of equal size.
        let slices = (n * row_bytes).div_ceil(SLICE_BYTES);
        let slice = n.div_ceil(slices).next_multiple_of(128);
        for first in (0..n).step_by(slice) {
            let mut parts = Vec::with_capacity(ways);
            for (way, linear) in linears.iter().enumerate() {
                parts.push(part(linear, first, slice.min(n - first), 8 * way));
            }
            let address = to.address + (first * to.element_bytes) as u64;
            self.dense_product(&parts, ways, x, Target { address, ..to })?;
        }
        Ok(())
    }
}
