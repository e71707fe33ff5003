//! The operations of [`Device`](crate::device::Device) as launches.
//!
//! Five ways of one product: an operation of the kernel `decode` for a single row, with norm and epilogue
//! fused; `linear_one` for single rows of models that it does not know; `skinny` on tensor cores for several;
//! `dense`, the same with weights unpacked beforehand, for many; `linear_exact` in f32 with `--exact`. All but the
//! first are launches of their own, with norm and epilogue as kernels beside them.
//!
//! In a step of several rows without `--exact`, what goes from [`Gpu::op_attend`] or
//! [`Gpu::op_norm_gate_up`] to [`Gpu::op_linear_add`] lies in its buffer as f16, rows padded with zeros
//! to whole groups: the form that products take.

use super::products::{Rows, Target, bias_ptr};
use super::program::cut_of;
use super::recording::Role;
use super::{Address, Buffer, Driver, Gpu, Scratch, Weight};
use crate::device::{Activation, CachePart, GateUp, Head, Linear, Norm, NormKind, Residual};
use crate::error::{Error, Result};
use kernels::decode::{Input, NO_OP, Op, PLAIN, kind};
use kernels::rows::{ActivateArgs, EmbedArgs, FinishArgs, NormArgs, activations, norms};
use kernels::types::{GROUP, NO_MATRIX};
use std::ptr;

pub(super) const ELEMENTWISE: u32 = 256;

pub(super) fn blocks(n: usize, per_block: u32) -> u32 {
    n.div_ceil(per_block as usize) as u32
}

/// Rows of f32 to be normed; see [`NormArgs`].
#[derive(Clone, Copy)]
pub(super) struct NormRows {
    pub x: *const f32,
    pub x_stride: usize,
    pub gather: *const u32,
    pub rows: usize,
    /// Parts of a row normed by themselves.
    pub parts: usize,
    /// Elements of a part.
    pub len: usize,
    /// Elements of weight and bias.
    pub weights: usize,
    pub out: Address,
    pub stride: usize,
    pub f16: bool,
    pub scale: f32,
    pub add: bool,
}

impl NormRows {
    /// Whole rows of `len`, in order, each where it lies.
    pub fn whole(x: *const f32, rows: usize, len: usize) -> Self {
        NormRows {
            x,
            x_stride: len,
            gather: ptr::null(),
            rows,
            parts: 1,
            len,
            weights: len,
            out: x as Address,
            stride: len,
            f16: false,
            scale: 1.0,
            add: false,
        }
    }
}

/// The kernels' number of an activation.
pub(super) fn activation_number(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => activations::SILU,
        Activation::Gelu => activations::GELU,
        Activation::ClampedSwish => activations::CLAMPED_SWISH,
    }
}

impl<D: Driver> Gpu<D> {
    /// The input of an operation of `decode`: in a recorded step what an operation before has written in the place
    /// of `x`; `x` itself otherwise.
    pub(super) fn input(
        &mut self,
        x: *const f32,
        norm: Option<&Norm<'_, Self>>,
        len: usize,
        float: bool,
    ) -> Result<Input> {
        let plain = Input {
            x,
            norm: norm.map_or(ptr::null(), |n| n.weight.ptr()),
            from: PLAIN,
            eps: norm.map_or(0.0, |n| n.eps),
            len: len as u32,
            inverse_len: 0.0,
            keep_f32: u32::from(float),
            halves: 0,
        };
        if !self.fused() {
            return Ok(plain);
        }
        let role = Role::Buffer(x as Address);
        let from = self.number_of(role)?;
        let x = self.numbered(role, 0)?;
        Ok(Input { from, x, ..plain })
    }

    pub(super) fn op_embed(&mut self, table: &Weight, scale: f32, out: &Buffer) -> Result<()> {
        if self.fused() {
            let role = Role::Buffer(out.address);
            let to = self.numbered(role, table.cols)?;
            let op = Op {
                kind: kind::EMBED,
                input: Input {
                    len: table.cols as u32,
                    ..NO_OP.input
                },
                matrices: [table.matrix, NO_MATRIX, NO_MATRIX],
                scale,
                out: to,
                ..NO_OP
            };
            self.push("embed", op, &[role]);
            return Ok(());
        }
        let args = EmbedArgs {
            table: table.matrix,
            step: self.step_args(CachePart::Whole),
            scale,
            len: table.cols as u32,
            out: out.ptr(),
        };
        let grid = (
            blocks(table.matrix.cols as usize / GROUP, 32),
            self.current.rows as u32,
        );
        self.driver.launch("embed", grid, 32, 0, &args)
    }

    /// Norms, or without a norm scales, casts or adds, rows of f32.
    pub(super) fn norm(&mut self, norm: Option<&Norm<'_, Self>>, r: NormRows) -> Result<()> {
        let kind = match norm.map(|n| n.kind) {
            None => norms::NONE,
            Some(NormKind::Rms) => norms::RMS,
            Some(NormKind::Layer) => norms::LAYER,
        };
        let args = NormArgs {
            x: r.x,
            x_stride: r.x_stride as u32,
            rows: r.gather,
            kind,
            weight: norm.map_or(ptr::null(), |n| n.weight.ptr().cast_const()),
            bias: norm.and_then(|n| n.bias).map_or(ptr::null(), |b| b.ptr()),
            weight_stride: if r.weights > r.len { r.len as u32 } else { 0 },
            eps: norm.map_or(0.0, |n| n.eps),
            parts: r.parts as u32,
            len: r.len as u32,
            out: r.out as *mut u8,
            stride: r.stride as u32,
            f16: u32::from(r.f16),
            scale: r.scale,
            add: u32::from(r.add),
        };
        let grid = ((r.rows * r.parts) as u32, 1);
        self.driver.launch("norm", grid, 256, 128, &args)
    }

    /// `rows` normed rows of `x`, in the form that products of several rows take.
    pub(super) fn norm_rows(
        &mut self,
        x: &Buffer,
        norm: Option<&Norm<'_, Self>>,
        len: usize,
        rows: usize,
        gather: *const u32,
        f16: bool,
    ) -> Result<Rows> {
        if norm.is_none() && !f16 && gather.is_null() {
            return Ok(Rows::F32(x.ptr()));
        }
        let stride = if f16 {
            len.next_multiple_of(GROUP)
        } else {
            len
        };
        let (which, bytes) = if f16 {
            (Scratch::Half, 2)
        } else {
            (Scratch::Normed, 4)
        };
        let out = self.scratch(which, rows * stride * bytes)?;
        self.norm(
            norm,
            NormRows {
                gather,
                out,
                stride,
                f16,
                ..NormRows::whole(x.ptr(), rows, len)
            },
        )?;
        Ok(if f16 {
            Rows::F16(out as *const u16)
        } else {
            Rows::F32(out as *const f32)
        })
    }

    /// `x += scale * norm(y)`.
    pub(super) fn add_residual(
        &mut self,
        residual: &Residual<'_, Self>,
        y: Address,
        len: usize,
        x: &Buffer,
    ) -> Result<()> {
        let rows = self.current.rows;
        let mut from = NormRows::whole(y as *const f32, rows, len);
        if let Some(norm) = &residual.norm {
            from.weights = norm.weight.len;
        }
        self.norm(
            residual.norm.as_ref(),
            NormRows {
                out: x.address,
                scale: residual.scale,
                add: true,
                ..from
            },
        )
    }

    /// Columns of a row of `len` values in f16, once it is known that a step's rows fit `buffer` so.
    pub(super) fn half_stride(&self, len: usize, buffer: &Buffer) -> Result<usize> {
        let stride = len.next_multiple_of(GROUP);
        if self.current.rows * stride * 2 > buffer.len * 4 {
            return Err(Error::Request(format!(
                "rows of {len} values are too short for the GPU kernels"
            )));
        }
        Ok(stride)
    }

    pub(super) fn op_linear_add(
        &mut self,
        linear: Linear<'_, Self>,
        input: &Buffer,
        residual: &Residual<'_, Self>,
        x: &Buffer,
    ) -> Result<()> {
        if self.fused() {
            let role = Role::Buffer(x.address);
            let add_from = self.number_of(role)?;
            let to = self.numbered(role, linear.weight.matrix.rows as usize)?;
            let (name, cut) = if self.after_attention() {
                ("attention out", 0)
            } else {
                let blocks = self.driver.multiprocessors();
                ("down", cut_of(&linear.weight.matrix, blocks))
            };
            let op = Op {
                add: 1,
                add_from,
                cut,
                ..self.product_op(linear, input.ptr(), None, to)?
            };
            let second = Role::Second(x.address);
            let outputs = [role, second];
            self.push(name, op, &outputs[..if cut == 0 { 1 } else { 2 }]);
            return Ok(());
        }
        let rows = self.current.rows;
        let input = if self.exact {
            Rows::F32(input.ptr())
        } else {
            Rows::F16(input.ptr().cast_const().cast())
        };
        if residual.is_plain() {
            self.product(linear, input, rows, x.ptr(), true)?;
            return self.adapt(linear, input, rows, x.ptr());
        }
        let len = linear.weight.matrix.rows as usize;
        let y = self.scratch(Scratch::First, rows * len * 4)?;
        self.whole_product(linear, input, rows, y as *mut f32)?;
        self.add_residual(residual, y, len, x)
    }

    pub(super) fn op_norm_gate_up(
        &mut self,
        x: &Buffer,
        op: &GateUp<'_, Self>,
        out: &Buffer,
    ) -> Result<()> {
        let GateUp {
            norm,
            gate,
            up,
            activation,
        } = op;
        let len = up.weight.cols;
        let width = up.weight.matrix.rows as usize;
        if let Some(gate) = gate
            && self.fused()
        {
            let float = !gate.weight.quantised || !up.weight.quantised;
            let role = Role::Buffer(out.address);
            let to = self.numbered(role, width)?;
            let op = Op {
                kind: kind::GATE_UP,
                input: self.input(x.ptr(), norm.as_ref(), len, float)?,
                matrices: [gate.weight.matrix, up.weight.matrix, NO_MATRIX],
                biases: [bias_ptr(*gate), bias_ptr(*up), ptr::null()],
                out: to,
                ..NO_OP
            };
            self.push("gate, up", op, &[role]);
            return Ok(());
        }
        let rows = self.current.rows;
        let normed = self.norm_rows(x, norm.as_ref(), len, rows, ptr::null(), !self.exact)?;
        let stride = if self.exact {
            width
        } else {
            self.half_stride(width, out)?
        };
        if let (Rows::F16(x), Some(gate), Activation::Silu) = (normed, *gate, *activation)
            && rows > 1
            && width == stride
            && gate.adapters.is_empty()
            && up.adapters.is_empty()
        {
            let to = Target {
                address: out.address,
                element_bytes: 2,
                stride,
                add: false,
            };
            return self.linears(&[gate, *up], x, rows, to);
        }
        // Without a gate, the activation is of `up`.
        let first = self.scratch(Scratch::First, rows * width * 4)? as *mut f32;
        self.whole_product(gate.unwrap_or(*up), normed, rows, first)?;
        let mut second = ptr::null_mut();
        if gate.is_some() {
            second = self.scratch(Scratch::Second, rows * width * 4)? as *mut f32;
            self.whole_product(*up, normed, rows, second)?;
        }
        self.activate(
            ActivateArgs {
                gate: first,
                up: second,
                out: out.ptr().cast(),
                len: width as u32,
                stride: stride as u32,
                f16: u32::from(!self.exact),
                activation: activation_number(*activation),
            },
            rows,
        )
    }

    pub(super) fn activate(&mut self, args: ActivateArgs, rows: usize) -> Result<()> {
        let grid = (blocks(args.stride as usize, ELEMENTWISE), rows as u32);
        self.driver
            .launch("activate_rows", grid, ELEMENTWISE, 0, &args)
    }

    pub(super) fn op_norm_head(
        &mut self,
        x: &Buffer,
        op: &Head<'_, Self>,
        logits: &Buffer,
    ) -> Result<()> {
        let Head {
            norm, output: head, ..
        } = op;
        let len = head.weight.cols;
        let outputs = self.current.outputs;
        if self.fused() {
            let op = self.product_op(*head, x.ptr(), Some(norm), logits.ptr())?;
            self.push("head", Op { choose: 1, ..op }, &[]);
            return Ok(());
        }
        let gather = self.step_args(CachePart::Whole).outputs;
        let adapted = !head.adapters.is_empty();
        let f16 = !self.exact && (outputs > 1 || adapted);
        match self.norm_rows(x, Some(norm), len, outputs, gather, f16)? {
            Rows::F32(x) if !self.exact => {
                let op = self.product_op(*head, x, None, logits.ptr())?;
                self.run_single(Op { choose: 1, ..op })?;
            }
            rows => self.whole_product(*head, rows, outputs, logits.ptr())?,
        }
        if op.scale == 1.0 && op.soft_cap.is_none() {
            return Ok(());
        }
        let len = outputs * head.weight.matrix.rows as usize;
        let args = FinishArgs {
            logits: logits.ptr(),
            len: len as u32,
            scale: op.scale,
            cap: op.soft_cap.unwrap_or(0.0),
        };
        let grid = (blocks(len, ELEMENTWISE), 1);
        self.driver
            .launch("finish_logits", grid, ELEMENTWISE, 0, &args)
    }
}
