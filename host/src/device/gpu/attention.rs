//! Attention: from normed rows to queries, keys and values, into the cache, and over it.

use super::attending::Attending;
use super::ops::{ELEMENTWISE, NormRows, blocks};
use super::products::{Rows, Target, bias_ptr, part};
use super::recording::Role;
use super::{Address, Buffer, Cache, Driver, Gpu, Scratch};
use crate::device::{Attention, CachePlace, CacheType, HeadNorm, Heads, Qkv, RopeLayout};
use crate::error::{Error, Result};
use kernels::attention::{self, AttendArgs, MAX_SPLITS, Variant};
use kernels::decode::{self, Input, MAX_HEAD_DIM, NO_OP, Op, kind};
use kernels::flash::{self, FlashArgs};
use kernels::rows::{CacheLayer, CastArgs, RopeCacheArgs, Rotation, cache_types};
use kernels::types::GROUP;
use std::ptr;

/// Tokens that are worth a split of their own.
const MIN_SPLIT_TOKENS: usize = 64;

/// Over how many blocks each row and head's tokens are split, so that a few rows fill the card: a power of
/// two, so that a recorded step serves many lengths.
pub(super) fn attention_splits(multiprocessors: u32, tasks: usize, longest: usize) -> u32 {
    let warps = multiprocessors as usize * 16;
    let wanted = (warps / tasks.max(1)).clamp(1, MAX_SPLITS);
    let useful = longest.div_ceil(MIN_SPLIT_TOKENS);
    let splits = wanted.min(useful).next_power_of_two();
    splits.min(MAX_SPLITS) as u32
}

/// Rows of the longest sequence of a step from which on attention goes through tiles of rows.
const FLASH_ROWS: usize = 4;

/// Rotation as kernels take it; a null table where nothing rotates.
fn rotation<D: Driver>(op: &Qkv<'_, Gpu<D>>) -> Rotation {
    op.rope.as_ref().map_or(
        Rotation {
            table: ptr::null(),
            dims: 0,
            halves: 0,
        },
        |rope| Rotation {
            table: rope.table.ptr(),
            dims: rope.dims as u32,
            halves: u32::from(rope.layout == RopeLayout::Halves),
        },
    )
}

fn variant<D: Driver>(op: &Attention<'_, Gpu<D>>) -> Variant {
    Variant {
        window: op.window.map_or(0, |w| u32::try_from(w).unwrap_or(0)),
        soft_cap: op.soft_cap.unwrap_or(0.0),
        sinks: op.sinks.map_or(ptr::null(), |s| s.ptr().cast_const()),
    }
}

/// What happens to queries and keys after their products.
#[derive(Clone, Copy)]
pub(super) struct LateTurn {
    query_norm: *const f32,
    key_norm: *const f32,
    eps: f32,
    rotation: Rotation,
}

// The addresses belong to the device, not to this thread.
unsafe impl Send for LateTurn {}

impl<D: Driver> Gpu<D> {
    pub(super) fn cache_layer(&self, cache: &Cache, place: CachePlace) -> CacheLayer {
        let offset = cache.shape.offset(place);
        CacheLayer {
            keys: (cache.keys + offset as u64) as *mut u8,
            values: (cache.values + offset as u64) as *mut u8,
            kv_heads: cache.shape.kv_heads as u32,
            head_dim: cache.shape.head_dim as u32,
        }
    }

    /// What a decode step's attention does to queries and keys that are normed head by head.
    ///
    /// # Errors
    /// Norms that are not of single heads.
    fn late_turn(&self, op: &Qkv<'_, Self>, rotation: Rotation) -> Result<Option<LateTurn>> {
        let (Some(q), Some(k)) = (&op.q_norm, &op.k_norm) else {
            return Ok(None);
        };
        let dim = op.heads.head_dim;
        let of_heads = |n: &HeadNorm<'_, Self>| n.len == dim && n.norm.weight.len == dim;
        if !of_heads(q) || !of_heads(k) || q.norm.eps != k.norm.eps {
            return Err(Error::Request(format!(
                "norms of queries and keys with weights of {} and {}: a decode step expects {dim} of each",
                q.norm.weight.len, k.norm.weight.len
            )));
        }
        Ok(Some(LateTurn {
            query_norm: q.norm.weight.ptr(),
            key_norm: k.norm.weight.ptr(),
            eps: q.norm.eps,
            rotation,
        }))
    }

    /// Norms the heads of rows, where they lie.
    fn norm_heads(
        &mut self,
        op: &Option<HeadNorm<'_, Self>>,
        x: *mut f32,
        stride: usize,
        row_len: usize,
    ) -> Result<()> {
        let Some(op) = op else {
            return Ok(());
        };
        let rows = self.current.rows;
        self.norm(
            Some(&op.norm),
            NormRows {
                x_stride: stride,
                stride,
                parts: row_len / op.len,
                weights: op.norm.weight.len,
                ..NormRows::whole(x, rows, op.len)
            },
        )
    }

    pub(super) fn op_norm_qkv(
        &mut self,
        x: &Buffer,
        op: &Qkv<'_, Self>,
        cache: &Cache,
        place: CachePlace,
        q: &Buffer,
    ) -> Result<()> {
        let h = op.heads;
        self.heads = h.heads;
        if op.q_norm.is_some() {
            self.decode.needs |= decode::LATE;
        }
        let group = (h.heads / h.kv_heads) as u32;
        let rows = [op.q, op.k, op.v].map(|l| l.weight.matrix.rows.div_ceil(decode::ROWS));
        self.attending = Attending {
            pieces: decode::attend_pieces(h.kv_heads as u32, group, h.head_dim as u32, true),
            before: rows.iter().sum(),
        };
        let len = op.q.weight.cols;
        let rotation = rotation(op);
        let cache_type = match cache.shape.ty {
            CacheType::F16 => cache_types::F16,
            CacheType::F32 => cache_types::F32,
            CacheType::Q8_0 => cache_types::Q8_0,
        };
        let (cached, cache) = (cache.shape, self.cache_layer(cache, place));
        let linears = [op.q, op.k, op.v];
        let step = self.step_args(place.part);
        let pairs = (h.heads + 2 * h.kv_heads) * h.head_dim / 2;
        if self.fused() {
            let float = linears.iter().any(|l| !l.weight.quantised);
            let role = Role::Buffer(q.address);
            let new = 2 * h.kv_heads * h.head_dim;
            let out = self.numbered(role, h.heads * h.head_dim)?;
            let late = self.late_turn(op, rotation)?;
            self.late = late;
            let op = Op {
                kind: kind::QKV,
                input: self.input(x.ptr(), op.norm.as_ref(), len, float)?,
                matrices: linears.map(|l| l.weight.matrix),
                biases: linears.map(bias_ptr),
                // What is normed is turned after that, by the attention.
                rotation: if late.is_some() {
                    NO_OP.rotation
                } else {
                    rotation
                },
                late: u32::from(late.is_some()),
                cache,
                quantised: u32::from(cached.ty == CacheType::Q8_0),
                row_bytes: cached.ty.row_bytes(h.head_dim) as u32,
                heads: h.heads as u32,
                fresh: self.numbered(Role::Fresh(new), new)?,
                out,
                ..NO_OP
            };
            self.push("qkv", op, &[role, Role::Fresh(new)]);
            return Ok(());
        }
        let rows = self.current.rows;
        let (q_len, kv_len) = (h.heads * h.head_dim, h.kv_heads * h.head_dim);
        let adapted = linears.iter().any(|l| !l.adapters.is_empty());
        let norm = op.norm.as_ref();
        let normed = self.norm_rows(x, norm, len, rows, ptr::null(), !self.exact)?;
        let (from_q, k, v, strides) = match normed {
            Rows::F16(x) if rows > 1 && !adapted => {
                let n = q_len + 2 * kv_len;
                let joined = self.scratch(Scratch::First, rows * n * 4)?;
                let parts = [
                    part(&op.q, 0, q_len, 0),
                    part(&op.k, 0, kv_len, q_len),
                    part(&op.v, 0, kv_len, q_len + kv_len),
                ];
                let to = Target {
                    address: joined,
                    element_bytes: 4,
                    stride: n,
                    add: false,
                };
                self.parts_product(&parts, 1, x, rows, to)?;
                let at = |column: usize| (joined + 4 * column as u64) as *mut f32;
                (at(0), at(q_len), at(q_len + kv_len), [n, n])
            }
            normed => {
                // Queries of f16 cannot be turned where they lie.
                let from_q = if self.flash(&h) {
                    self.scratch(Scratch::Partial, rows * q_len * 4)? as *mut f32
                } else {
                    q.ptr()
                };
                let k = self.scratch(Scratch::First, rows * kv_len * 4)? as *mut f32;
                let v = self.scratch(Scratch::Second, rows * kv_len * 4)? as *mut f32;
                self.whole_product(op.q, normed, rows, from_q)?;
                self.whole_product(op.k, normed, rows, k)?;
                self.whole_product(op.v, normed, rows, v)?;
                (from_q, k, v, [q_len, kv_len])
            }
        };
        self.norm_heads(&op.q_norm, from_q, strides[0], q_len)?;
        self.norm_heads(&op.k_norm, k, strides[1], kv_len)?;
        let long = op.rope.as_ref().and_then(|rope| rope.long);
        let args = RopeCacheArgs {
            q: from_q,
            k,
            v,
            strides: strides.map(|s| s as u32),
            out: q.ptr().cast(),
            f16: u32::from(self.flash(&h)),
            rotation,
            long_table: long.map_or(ptr::null(), |(table, _)| table.ptr()),
            long_above: long.map_or(0, |(_, above)| above as u32),
            cache,
            step,
            heads: h.heads as u32,
            cache_type,
        };
        let grid = (blocks(pairs, ELEMENTWISE), rows as u32);
        self.driver
            .launch("rope_cache", grid, ELEMENTWISE, 0, &args)?;
        if cache_type == cache_types::Q8_0 {
            let warps = 2 * h.kv_heads * h.head_dim.div_ceil(32);
            let grid = (blocks(warps * 32, ELEMENTWISE), rows as u32);
            self.driver
                .launch("store_q8", grid, ELEMENTWISE, 0, &args)?;
        }
        Ok(())
    }

    /// Whether this step's attention goes through tiles of rows; its queries are f16 then.
    fn flash(&self, h: &Heads) -> bool {
        let longest = self.current.spans.iter().map(|s| s[1]).max().unwrap_or(0);
        !self.exact
            && longest >= FLASH_ROWS
            && h.head_dim <= 128
            && h.heads / h.kv_heads <= flash::TILE_ROWS
            && (h.heads * h.head_dim).is_multiple_of(GROUP)
    }

    /// Lays out the tiles of this step's rows, unless an earlier layer did; their list and how many.
    fn flash_tiles(&mut self, per_tile: usize) -> Result<(Address, u32)> {
        if let Some(n) = self.current.tiles {
            let tiles = self.scratch(Scratch::Tiles, n as usize * 8)?;
            return Ok((tiles, n));
        }
        let mut order = Vec::new();
        for &[first, len, past] in &self.current.spans {
            for start in (0..len).step_by(per_tile) {
                let rows = per_tile.min(len - start);
                order.push((past + start + rows, [(first + start) as u32, rows as u32]));
            }
        }
        // Those with the most tokens to see first, so that the last to end are short.
        order.sort_by_key(|(tokens, _)| std::cmp::Reverse(*tokens));
        let list: Vec<[u32; 2]> = order.into_iter().map(|(_, tile)| tile).collect();
        let tiles = self.scratch(Scratch::Tiles, list.len() * 8)?;
        self.driver.write(tiles, bytemuck::cast_slice(&list))?;
        let n = list.len() as u32;
        self.current.tiles = Some(n);
        Ok((tiles, n))
    }

    pub(super) fn op_attend(
        &mut self,
        q: &Buffer,
        cache: &Cache,
        place: CachePlace,
        op: &Attention<'_, Self>,
        out: &Buffer,
    ) -> Result<()> {
        let heads = op.heads;
        if self.fused() {
            let splits = self.decode_splits();
            let row = Role::Buffer(out.address);
            let row_at = self.numbered(row, heads.heads * heads.head_dim)?;
            let mut outputs = vec![row];
            let mut parts = ptr::null_mut();
            if splits > 1 {
                let words = decode::split_words(heads.head_dim as u32) as usize;
                let values = heads.heads * splits as usize * words;
                let role = Role::Parts(values);
                parts = self.numbered(role, values)?;
                outputs.push(role);
            }
            let fresh = Role::Fresh(2 * heads.kv_heads * heads.head_dim);
            let input = self.input(q.ptr(), None, heads.heads * heads.head_dim, false)?;
            let late = self.late;
            let op = Op {
                kind: kind::ATTEND,
                input: Input {
                    norm: late.map_or(ptr::null(), |l| l.query_norm),
                    eps: late.map_or(0.0, |l| l.eps),
                    ..input
                },
                late: u32::from(late.is_some()),
                key_norm: late.map_or(ptr::null(), |l| l.key_norm),
                rotation: late.map_or(NO_OP.rotation, |l| l.rotation),
                cache: self.cache_layer(cache, place),
                quantised: u32::from(cache.shape.ty == CacheType::Q8_0),
                row_bytes: cache.shape.ty.row_bytes(heads.head_dim) as u32,
                heads: heads.heads as u32,
                splits,
                scale: heads.scale,
                fresh: self.numbered(fresh, 0)?,
                parts,
                out: row_at,
                ..NO_OP
            };
            self.push("attention", op, &outputs);
            return Ok(());
        }
        let (rows, len) = (self.current.rows, heads.heads * heads.head_dim);
        if self.flash(&heads) {
            self.half_stride(len, out)?;
            let group = heads.heads / heads.kv_heads;
            let (tiles, n) = self.flash_tiles(flash::TILE_ROWS / group)?;
            let cache = match cache.shape.ty {
                CacheType::Q8_0 => self.unpacked_layer(cache, place)?,
                _ => self.cache_layer(cache, place),
            };
            let variant = variant(op);
            let args = FlashArgs {
                q: q.ptr().cast_const().cast(),
                cache,
                step: self.step_args(place.part),
                tiles: tiles as *const u32,
                group: group as u32,
                scale: heads.scale,
                variant,
                out: out.ptr().cast(),
            };
            let plain = variant.window == 0 && variant.soft_cap == 0.0 && variant.sinks.is_null();
            let (kernel, dims) = match (heads.head_dim <= 64, plain) {
                (true, true) => ("flash_64", 64),
                (true, false) => ("flash_64_variant", 64),
                (false, true) => ("flash_128", 128),
                (false, false) => ("flash_128_variant", 128),
            };
            let grid = (heads.kv_heads as u32, n);
            let shared = flash::shared_bytes(dims);
            return self
                .driver
                .launch(kernel, grid, flash::THREADS, shared, &args);
        }
        // Rows go on to their product in f16.
        let cast = !self.exact;
        let target = if cast {
            self.scratch(Scratch::First, rows * len * 4)? as *mut f32
        } else {
            out.ptr()
        };
        // Nobody's result may depend on who the others of a step are.
        let own = self.current.spans.len() > 1;
        let splits = if own {
            let seen = |span: &[usize; 3]| {
                let tokens = span[1] + span[2];
                attention::most_own_splits(op.window.map_or(tokens, |w| tokens.min(w)))
            };
            self.current.spans.iter().map(seen).max().unwrap_or(1) as u32
        } else {
            self.current.splits
        };
        let tasks = rows * heads.heads;
        let partial = if splits > 1 {
            let values = tasks * splits as usize * (heads.head_dim + 2);
            self.scratch(Scratch::Partial, values * 4)?
        } else {
            0
        };
        let args = AttendArgs {
            q: q.ptr(),
            cache: self.cache_layer(cache, place),
            step: self.step_args(place.part),
            heads: heads.heads as u32,
            splits,
            own: u32::from(own),
            scale: heads.scale,
            variant: variant(op),
            out: target,
            partial: partial as *mut f32,
        };
        let grid = (blocks(tasks, attention::THREADS / 32), splits);
        let half = cache.shape.ty == CacheType::F16 && !self.exact;
        if own && half && heads.head_dim <= MAX_HEAD_DIM as usize && op.soft_cap.is_none() {
            let (kernel, dims) = match heads.head_dim <= 64 {
                true => ("attend_heads_64", 64),
                false => ("attend_heads_128", 128),
            };
            let (kv_heads, group) = (heads.kv_heads as u32, heads.heads / heads.kv_heads);
            let grid = rows as u32 * kernels::heads::blocks_of_row(kv_heads, group as u32);
            let (threads, shared) = (kernels::heads::THREADS, kernels::heads::shared_bytes(dims));
            self.driver
                .launch(kernel, (grid, splits), threads, shared, &args)?;
        } else {
            let kernel = match cache.shape.ty {
                CacheType::F16 => "attend_f16",
                CacheType::F32 => "attend_f32",
                CacheType::Q8_0 => "attend_q8",
            };
            self.driver
                .launch(kernel, grid, attention::THREADS, 0, &args)?;
        }
        if splits > 1 {
            self.driver
                .launch("attend_combine", (grid.0, 1), attention::THREADS, 0, &args)?;
        }
        if cast {
            let stride = self.half_stride(len, out)?;
            let args = CastArgs {
                x: target,
                out: out.ptr().cast(),
                len: len as u32,
                stride: stride as u32,
            };
            let grid = (blocks(stride, ELEMENTWISE), rows as u32);
            self.driver
                .launch("cast_f16", grid, ELEMENTWISE, 0, &args)?;
        }
        Ok(())
    }
}
