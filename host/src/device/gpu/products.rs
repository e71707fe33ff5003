//! Products, `x Wᵀ + b`, in the ways that `ops` describes, and what adapters add to them.

use super::ops::{NormRows, blocks};
use super::{Address, Driver, Gpu, Scratch};
use crate::device::{Linear, Norm};
use crate::error::Result;
use cuda_std::tensor::{Copied, Tiling};
use kernels::decode::{NO_OP, Op, kind};
use kernels::dense::{self, DenseArgs, DequantiseArgs, Part};
use kernels::epilogue::Output;
use kernels::exact::{self, LinearArgs};
use kernels::one::{self, OneArgs};
use kernels::skinny::{self, JoinArgs, SkinnyArgs, Units};
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
                copy: Copied::Box,
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
        let n = matrix.rows as usize;
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
                    add: u32::from(add),
                };
                let grid = (
                    blocks(n, exact::THREADS / 32),
                    blocks(rows, exact::ROWS as u32),
                );
                self.driver
                    .launch("linear_exact", grid, exact::THREADS, 0, &args)
            }
            Rows::F16(x) if rows == 1 => {
                let args = OneArgs {
                    matrix,
                    bias,
                    x,
                    out,
                    add: u32::from(add),
                };
                let grid = (blocks(n, one::THREADS / 32), 1);
                self.driver
                    .launch("linear_one", grid, one::THREADS, 0, &args)
            }
            Rows::F16(x) => {
                let to = Target {
                    address: out as Address,
                    element_bytes: 4,
                    stride: n,
                    add,
                };
                self.linears(&[linear], x, rows, to)
            }
        }
    }

    /// Products of `rows` rows with rows of up to three matrices: `ways` is 1 for parts that follow each other, 2 for gate
    /// and up.
    pub(super) fn parts_product(
        &mut self,
        parts: &[Part],
        ways: usize,
        x: *const u16,
        rows: usize,
        to: Target,
    ) -> Result<()> {
        if rows <= D::SKINNY_ROWS {
            self.skinny_product(parts, ways, x, rows, to)
        } else {
            self.dense_product(parts, ways, x, rows, to)
        }
    }

    /// [`Gpu::parts_product`] of few rows, whose weights are unpacked as they are multiplied.
    fn skinny_product(
        &mut self,
        parts: &[Part],
        ways: usize,
        x: *const u16,
        rows: usize,
        to: Target,
    ) -> Result<()> {
        let cols = parts[0].matrix.cols;
        let units = Units::of(parts, cols, rows as u32, self.driver.multiprocessors());
        let sums = self.scratch(Scratch::Sums, units.values() * 4)?;
        let none = Part {
            rows: 0,
            ..parts[parts.len() - 1]
        };
        let parts = std::array::from_fn(|i| parts.get(i).copied().unwrap_or(none));
        let args = SkinnyArgs {
            parts,
            units,
            x,
            rows: rows as u32,
            cols,
            sums: sums as *mut f32,
        };
        let (grid, shared) = ((units.blocks, 1), skinny::shared_bytes(rows as u32));
        self.driver
            .launch("skinny", grid, skinny::THREADS, shared, &args)?;
        let args = JoinArgs {
            parts,
            units,
            sums: sums as *const f32,
            ways: ways as u32,
            out: to.address as *mut u8,
            rows: rows as u32,
            stride: to.stride as u32,
            add: u32::from(to.add),
        };
        let grid = (blocks(args.threads(), skinny::THREADS), 1);
        self.driver
            .launch("skinny_join", grid, skinny::THREADS, 0, &args)
    }

    /// [`Gpu::parts_product`] of many rows: unpacks the weights, and multiplies.
    fn dense_product(
        &mut self,
        parts: &[Part],
        ways: usize,
        x: *const u16,
        rows: usize,
        to: Target,
    ) -> Result<()> {
        let cols = parts[0].matrix.cols as usize;
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

    /// [`Gpu::parts_product`] of one matrix, or of gate and up; where weights are unpacked beforehand, slice by slice.
    pub(super) fn linears(
        &mut self,
        linears: &[Linear<'_, Self>],
        x: *const u16,
        rows: usize,
        to: Target,
    ) -> Result<()> {
        let ways = linears.len();
        let matrix = linears[0].weight.matrix;
        let (n, row_bytes) = (matrix.rows as usize, ways * matrix.cols as usize * 2);
        // Slices of whole tiles, and of equal size.
        let slices = match rows <= D::SKINNY_ROWS {
            true => 1,
            false => (n * row_bytes).div_ceil(SLICE_BYTES),
        };
        let slice = n.div_ceil(slices).next_multiple_of(128);
        for first in (0..n).step_by(slice) {
            let mut parts = Vec::with_capacity(ways);
            for (way, linear) in linears.iter().enumerate() {
                // Eight rows of the gate, eight of up.
                parts.push(part(linear, first, slice.min(n - first), 8 * way));
            }
            let address = to.address + (first * to.element_bytes) as u64;
            self.parts_product(&parts, ways, x, rows, Target { address, ..to })?;
        }
        Ok(())
    }
}
