//! Mixtures of experts, and the 8-bit cache's way to tensor cores.

use super::ops::activation_number;
use super::products::Rows;
use super::{Buffer, Cache, Driver, Gpu, Scratch};
use crate::device::{CachePlace, Experts, Linear};
use crate::error::Result;
use kernels::experts::{self, CombineArgs, ExpertArgs, RouteArgs};
use kernels::rows::{ActivateArgs, BLOCK_TOKENS, CacheLayer, UnpackArgs};
use std::ptr;

const ELEMENTWISE: u32 = 256;

impl<D: Driver> Gpu<D> {
    /// Everything in f32: few rows share an expert, so that reading weights is what takes time.
    pub(super) fn op_experts(&mut self, op: &Experts<'_, Self>, x: &Buffer) -> Result<()> {
        let rows = self.current.rows;
        let len = op.router.weight.cols;
        let slots = rows * op.used;
        let normed = self.norm_rows(x, op.norm.as_ref(), len, rows, ptr::null(), false)?;
        let Rows::F32(normed_x) = normed else {
            return Ok(());
        };
        let scores = self.scratch(Scratch::First, rows * op.count * 4)?;
        self.whole_product(op.router, normed, rows, scores as *mut f32)?;
        let ids = self.scratch(Scratch::Routing, slots * 8)?;
        let weights = ids + 4 * slots as u64;
        let args = RouteArgs {
            scores: scores as *const f32,
            rows: rows as u32,
            count: op.count as u32,
            used: op.used as u32,
            renormalise: u32::from(op.renormalise),
            ids: ids as *mut u32,
            weights: weights as *mut f32,
        };
        let grid = (rows.div_ceil(experts::THREADS as usize / 32) as u32, 1);
        self.driver
            .launch("route", grid, experts::THREADS, 0, &args)?;

        let width = op.up.weight.matrix.rows as usize / op.count;
        let gate = self.scratch(Scratch::Slots, slots * width.max(len) * 4)?;
        let up = self.scratch(Scratch::SlotsUp, slots * width * 4)?;
        let ids = ids as *const u32;
        for (linear, out) in [(op.gate, gate), (op.up, up)] {
            self.expert_linear(
                linear,
                ids,
                (normed_x, op.used),
                (slots, width),
                out as *mut f32,
            )?;
        }
        let args = ActivateArgs {
            gate: gate as *const f32,
            up: up as *const f32,
            out: up as *mut u8,
            len: width as u32,
            stride: width as u32,
            f16: 0,
            activation: activation_number(op.activation),
        };
        self.activate(args, slots)?;
        let hidden = (up as *const f32, 1);
        self.expert_linear(op.down, ids, hidden, (slots, len), gate as *mut f32)?;

        let plain = op.residual.is_plain();
        let out = match plain {
            true => x.address,
            false => self.scratch(Scratch::First, rows * len * 4)?,
        };
        let args = CombineArgs {
            x: gate as *const f32,
            weights: weights as *const f32,
            used: op.used as u32,
            len: len as u32,
            out: out as *mut f32,
            add: u32::from(plain),
        };
        let grid = (len.div_ceil(ELEMENTWISE as usize) as u32, rows as u32);
        self.driver.launch("combine", grid, ELEMENTWISE, 0, &args)?;
        if plain {
            return Ok(());
        }
        self.add_residual(&op.residual, out, len, x)
    }

    /// Products of slots, `n` outputs each, with the matrices of their experts.
    fn expert_linear(
        &mut self,
        linear: Linear<'_, Self>,
        ids: *const u32,
        (x, slots_per_row): (*const f32, usize),
        (slots, n): (usize, usize),
        out: *mut f32,
    ) -> Result<()> {
        let args = ExpertArgs {
            matrix: linear.weight.matrix,
            bias: linear.bias.map_or(ptr::null(), |b| b.ptr().cast_const()),
            ids,
            x,
            slots_per_row: slots_per_row as u32,
            len: linear.weight.cols as u32,
            rows: n as u32,
            out,
        };
        let grid = (
            n.div_ceil(experts::THREADS as usize / 32) as u32,
            slots as u32,
        );
        self.driver
            .launch("expert_linear", grid, experts::THREADS, 0, &args)
    }

    /// A layer of an 8-bit cache as one of f16, with the blocks of this step's sequences in it.
    pub(super) fn unpacked_layer(
        &mut self,
        cache: &Cache,
        place: CachePlace,
    ) -> Result<CacheLayer> {
        let shape = cache.shape;
        let packed = self.cache_layer(cache, place);
        let most = shape.blocks.max(shape.ring_blocks);
        let bytes = most * BLOCK_TOKENS * shape.kv_heads * shape.head_dim * 2;
        let plain = self.scratch(Scratch::Unpacked, 2 * bytes)?;
        let out = CacheLayer {
            keys: plain as *mut u8,
            values: (plain + bytes as u64) as *mut u8,
            ..packed
        };
        let list = self.current.blocks[place.part as usize].clone();
        let blocks = self.scratch(Scratch::Blocks, list.len() * 4)?;
        self.driver.write(blocks, bytemuck::cast_slice(&list))?;
        let args = UnpackArgs {
            cache: packed,
            out,
            blocks: blocks as *const u32,
        };
        let grid = (list.len() as u32, shape.kv_heads as u32);
        self.driver
            .launch("unpack_q8", grid, BLOCK_TOKENS as u32, 0, &args)?;
        Ok(out)
    }
}
