//! Work on single rows, and the references and the paged cache that other checks share.

use super::Driver;
use super::bench::{Bench, Guarded, nmse, nmse_at_least};
use crate::error::Result;
use half::f16;
use kernels::rows::{
    ActivateArgs, BLOCK_TOKENS, CacheLayer, CastArgs, NormArgs, RopeCacheArgs, Rotation, Step,
    activations, cache_types, norms,
};

/// `x / sqrt(mean(x²) + eps) * weight`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f64) -> Vec<f32> {
    let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + eps).sqrt();
    x.iter()
        .zip(weight)
        .map(|(x, w)| (f64::from(*x) * scale * f64::from(*w)) as f32)
        .collect()
}

pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `(cos, sin)` for every position and pair, base 10000.
pub fn rotation_table(positions: usize, dims: usize) -> Vec<f32> {
    (0..positions)
        .flat_map(|p| {
            (0..dims / 2).flat_map(move |i| {
                let angle = p as f64 * 10_000f64.powf(-2.0 * i as f64 / dims as f64);
                [angle.cos() as f32, angle.sin() as f32]
            })
        })
        .collect()
}

/// Rotates one head.
pub fn rotate(head: &mut [f64], table: &[f32], position: usize, dims: usize, halves: bool) {
    for i in 0..dims / 2 {
        let (a, b) = if halves {
            (i, i + dims / 2)
        } else {
            (2 * i, 2 * i + 1)
        };
        let at = (position * dims / 2 + i) * 2;
        let (cos, sin) = (f64::from(table[at]), f64::from(table[at + 1]));
        (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
    }
}

/// A step's arrays and a paged cache, its blocks dealt to the sequences at random.
pub struct Paging {
    pub step: Step,
    pub tables: Vec<Vec<u32>>,
    keys: Guarded,
    values: Guarded,
}

impl Paging {
    /// `spans`: each sequence's tokens before the step, and its rows. `token_bytes`: keys (or values)
    /// of all heads for one token.
    pub fn new<D: Driver>(
        b: &mut Bench<'_, D>,
        spans: &[(usize, usize)],
        token_bytes: usize,
        tokens: &[u32],
    ) -> Result<Paging> {
        let needed: Vec<usize> = spans
            .iter()
            .map(|(past, len)| (past + len).div_ceil(BLOCK_TOKENS))
            .collect();
        let blocks = needed.iter().sum::<usize>() + 2;
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        for i in (1..free.len()).rev() {
            let j = b.random.below(i + 1);
            free.swap(i, j);
        }
        let stride = needed.iter().max().copied().unwrap_or(1) + 1;
        let mut flat = vec![u32::MAX; stride * spans.len()];
        let mut tables = Vec::new();
        let (mut positions, mut sequences) = (Vec::new(), Vec::new());
        for (i, ((past, len), n)) in spans.iter().zip(&needed).enumerate() {
            let table = free.split_off(free.len() - n);
            flat[i * stride..i * stride + n].copy_from_slice(&table);
            tables.push(table);
            positions.extend((0..*len).map(|r| (past + r) as u32));
            sequences.extend(std::iter::repeat_n(i as u32, *len));
        }
        let ends = spans.iter().map(|(past, len)| (past + len) as u32);
        let horizons: Vec<u32> = ends
            .zip(spans)
            .flat_map(|(end, (_, len))| std::iter::repeat_n(end, *len))
            .collect();
        let bytes = blocks * BLOCK_TOKENS * token_bytes;
        let outputs: Vec<u32> = (0..positions.len() as u32).rev().collect();
        Ok(Paging {
            step: Step {
                tokens: b.upload(tokens)?.ptr(),
                positions: b.upload(&positions)?.ptr(),
                sequences: b.upload(&sequences)?.ptr(),
                tables: b.upload(&flat)?.ptr(),
                table_stride: stride as u32,
                rows: positions.len() as u32,
                outputs: b.upload(&outputs)?.ptr(),
                horizons: b.upload(&horizons)?.ptr(),
            },
            tables,
            keys: b.alloc(bytes)?,
            values: b.alloc(bytes)?,
        })
    }

    pub fn layer(&self, kv_heads: usize, head_dim: usize) -> CacheLayer {
        CacheLayer {
            keys: self.keys.ptr(),
            values: self.values.ptr(),
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
        }
    }

    /// Address of a token's key (or value) of one head, of so many bytes.
    pub fn at(
        &self,
        row_bytes: usize,
        kv_heads: usize,
        value: bool,
        head: usize,
        sequence: usize,
        token: usize,
    ) -> u64 {
        let block = self.tables[sequence][token / BLOCK_TOKENS] as usize;
        let row = (block * kv_heads + head) * BLOCK_TOKENS + token % BLOCK_TOKENS;
        let base = if value { &self.values } else { &self.keys };
        base.address() + (row * row_bytes) as u64
    }

    pub fn read<E: Element, D: Driver>(
        &self,
        b: &mut Bench<'_, D>,
        kv_heads: usize,
        head_dim: usize,
        value: bool,
        head: usize,
        sequence: usize,
        token: usize,
    ) -> Result<Vec<f32>> {
        let row_bytes = head_dim * size_of::<E>();
        let at = self.at(row_bytes, kv_heads, value, head, sequence, token);
        let mut values = vec![E::zeroed(); head_dim];
        b.driver.read(at, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values.into_iter().map(E::to_f32).collect())
    }

    pub fn write<E: Element, D: Driver>(
        &self,
        b: &mut Bench<'_, D>,
        kv_heads: usize,
        head_dim: usize,
        value: bool,
        head: usize,
        sequence: usize,
        token: usize,
        values: &[f32],
    ) -> Result<()> {
        let row_bytes = head_dim * size_of::<E>();
        let at = self.at(row_bytes, kv_heads, value, head, sequence, token);
        let values: Vec<E> = values.iter().copied().map(E::from_f32).collect();
        b.driver.write(at, bytemuck::cast_slice(&values))
    }
}

/// An element of the cache.
pub trait Element: bytemuck::Pod {
    fn to_f32(self) -> f32;
    fn from_f32(v: f32) -> Self;
}

impl Element for f16 {
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(v: f32) -> f16 {
        f16::from_f32(v)
    }
}

impl Element for f32 {
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(v: f32) -> f32 {
        v
    }
}

pub fn run<D: Driver>(b: &mut Bench<'_, D>) -> Result<()> {
    for len in [1, 31, 64, 300] {
        for f16 in [false, true] {
            check_rms_norm(b, len, f16)?;
        }
        check_cast(b, len)?;
        for f16 in [false, true] {
            check_silu(b, len, f16)?;
        }
    }
    for (heads, kv_heads, head_dim, dims, halves) in [
        (1, 1, 8, 8, true),
        (4, 2, 64, 64, false),
        (3, 1, 40, 16, true),
    ] {
        for f16_out in [false, true] {
            check_rope_cache::<f16, D>(b, heads, kv_heads, head_dim, dims, halves, f16_out)?;
        }
        check_rope_cache::<f32, D>(b, heads, kv_heads, head_dim, dims, halves, false)?;
    }
    Ok(())
}

fn check_rms_norm<D: Driver>(b: &mut Bench<'_, D>, len: usize, to_f16: bool) -> Result<()> {
    let rows = 3;
    let (x, weight) = (b.random.values(rows * len), b.random.values(len));
    let gather = [2u32, 0];
    let (x_on, weight_on, gather_on) = (b.upload(&x)?, b.upload(&weight)?, b.upload(&gather)?);
    let stride = if to_f16 {
        len.next_multiple_of(32)
    } else {
        len
    };
    let out = b.alloc(gather.len() * stride * if to_f16 { 2 } else { 4 })?;
    let args = NormArgs {
        x: x_on.ptr(),
        x_stride: len as u32,
        rows: gather_on.ptr(),
        kind: norms::RMS,
        weight: weight_on.ptr(),
        bias: std::ptr::null(),
        weight_stride: 0,
        eps: 1e-5,
        parts: 1,
        len: len as u32,
        out: out.ptr(),
        stride: stride as u32,
        f16: u32::from(to_f16),
        scale: 1.0,
        add: 0,
    };
    b.driver
        .launch("norm", (gather.len() as u32, 1), 256, 128, &args)?;
    let found: Vec<f32> = if to_f16 {
        b.take::<f16>("norm", out)?
            .into_iter()
            .map(f16::to_f32)
            .collect()
    } else {
        b.take::<f32>("norm", out)?
    };
    let expected: Vec<f64> = gather
        .iter()
        .flat_map(|&r| {
            let mut row = rms_norm(&x[r as usize * len..][..len], &weight, 1e-5);
            row.resize(stride, 0.0);
            row
        })
        .map(f64::from)
        .collect();
    let (kind, limit) = if to_f16 {
        ("f16", 1e-6)
    } else {
        ("f32", 1e-12)
    };
    b.report(
        "norm",
        format!("rms, {len} to {kind}"),
        nmse(&found, &expected),
        limit,
    );
    Ok(())
}

fn check_cast<D: Driver>(b: &mut Bench<'_, D>, len: usize) -> Result<()> {
    let mut x = b.random.values(2 * len);
    x[0] = 1e6;
    let stride = len.next_multiple_of(32);
    let x_on = b.upload(&x)?;
    let out = b.alloc(2 * stride * 2)?;
    let args = CastArgs {
        x: x_on.ptr(),
        out: out.ptr(),
        len: len as u32,
        stride: stride as u32,
    };
    b.driver
        .launch("cast_f16", (stride.div_ceil(64) as u32, 2), 64, 0, &args)?;
    let found = b.take::<f16>("cast_f16", out)?;
    let wrong = found
        .chunks(stride)
        .zip(x.chunks(len))
        .flat_map(|(f, x)| {
            f.iter().enumerate().map(|(i, f)| {
                let v = x.get(i).copied().unwrap_or(0.0).clamp(-65504.0, 65504.0);
                f.to_bits() != f16::from_f32(v).to_bits()
            })
        })
        .filter(|wrong| *wrong)
        .count();
    b.report("cast_f16", format!("{len}, bits"), wrong as f64, 0.0);
    Ok(())
}

fn check_silu<D: Driver>(b: &mut Bench<'_, D>, len: usize, to_f16: bool) -> Result<()> {
    let rows = 2;
    let gate: Vec<f32> = b
        .random
        .values(rows * len)
        .iter()
        .map(|v| v * 30.0)
        .collect();
    let up = b.random.values(rows * len);
    let (gate_on, up_on) = (b.upload(&gate)?, b.upload(&up)?);
    let stride = if to_f16 {
        len.next_multiple_of(32)
    } else {
        len
    };
    let half = b.alloc(rows * stride * 2)?;
    let args = ActivateArgs {
        gate: gate_on.ptr(),
        up: up_on.ptr(),
        out: if to_f16 { half.ptr() } else { gate_on.ptr() },
        len: len as u32,
        stride: stride as u32,
        f16: u32::from(to_f16),
        activation: activations::SILU,
    };
    let grid = (stride.div_ceil(64) as u32, rows as u32);
    b.driver.launch("activate_rows", grid, 64, 0, &args)?;
    let found: Vec<f32> = if to_f16 {
        let halves = b.take::<f16>("activate_rows", half)?;
        halves.into_iter().map(f16::to_f32).collect()
    } else {
        b.take::<f32>("activate_rows", gate_on)?
    };
    let expected: Vec<f64> = gate
        .chunks(len)
        .zip(up.chunks(len))
        .flat_map(|(gate, up)| {
            let mut row: Vec<f64> = gate
                .iter()
                .zip(up)
                .map(|(g, u)| silu(f64::from(*g)) * f64::from(*u))
                .collect();
            row.resize(stride, 0.0);
            row
        })
        .collect();
    let (kind, limit) = if to_f16 {
        ("f16", 1e-6)
    } else {
        ("f32", 1e-12)
    };
    // Below the smallest normal f16 fewer bits are left than the limit asks for.
    let error = nmse_at_least(&found, &expected, f64::from(f16::MIN_POSITIVE).powi(2));
    b.report("activate_rows", format!("{len} to {kind}"), error, limit);
    Ok(())
}

fn check_rope_cache<E: Element, D: Driver>(
    b: &mut Bench<'_, D>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    dims: usize,
    halves: bool,
    f16_out: bool,
) -> Result<()> {
    let spans = [(30, 5), (0, 2)];
    let rows = 7;
    let (q_len, kv_len) = (heads * head_dim, kv_heads * head_dim);
    let q = b.random.values(rows * q_len);
    let k = b.random.values(rows * kv_len);
    let v = b.random.values(rows * kv_len);
    // Side by side where one product made all three, else each its own.
    let (q_on, k_on, v_on, strides) = if f16_out {
        let joined: Vec<f32> = (0..rows)
            .flat_map(|r| {
                let parts = [(&q, q_len), (&k, kv_len), (&v, kv_len)];
                parts.map(|(x, len)| x[r * len..][..len].to_vec()).concat()
            })
            .collect();
        let on = b.upload(&joined)?;
        let at = |offset: usize| (on.address() + 4 * offset as u64) as *mut f32;
        let stride = q_len + 2 * kv_len;
        (at(0), at(q_len), at(q_len + kv_len), [stride, stride])
    } else {
        let on = [b.upload(&q)?, b.upload(&k)?, b.upload(&v)?];
        (on[0].ptr(), on[1].ptr(), on[2].ptr(), [q_len, kv_len])
    };
    let out = b.alloc(rows * q_len * if f16_out { 2 } else { 4 })?;
    let table = rotation_table(40, dims);
    let table_on = b.upload(&table)?;
    let paging = Paging::new(b, &spans, kv_heads * head_dim * size_of::<E>(), &[0; 7])?;
    let args = RopeCacheArgs {
        q: q_on,
        k: k_on,
        v: v_on,
        strides: strides.map(|s| s as u32),
        out: out.ptr(),
        f16: u32::from(f16_out),
        rotation: Rotation {
            table: table_on.ptr(),
            dims: dims as u32,
            halves: u32::from(halves),
        },
        cache: paging.layer(kv_heads, head_dim),
        step: paging.step,
        heads: heads as u32,
        cache_type: if size_of::<E>() == 4 {
            cache_types::F32
        } else {
            cache_types::F16
        },
        long_table: std::ptr::null(),
        long_above: 0,
    };
    let tasks = (heads + 2 * kv_heads) * head_dim / 2;
    b.driver.launch(
        "rope_cache",
        (tasks.div_ceil(64) as u32, rows as u32),
        64,
        0,
        &args,
    )?;
    let mut found: Vec<f32> = if f16_out {
        let halves = b.take::<f16>("rope_cache", out)?;
        halves.into_iter().map(f16::to_f32).collect()
    } else {
        b.take::<f32>("rope_cache", out)?
    };
    let turned = |x: &[f32], position: usize, rotates: bool| -> Vec<f64> {
        let mut head: Vec<f64> = x.iter().copied().map(f64::from).collect();
        if rotates {
            rotate(&mut head, &table, position, dims, halves);
        }
        head
    };
    let positions: Vec<(usize, usize)> = spans
        .iter()
        .enumerate()
        .flat_map(|(s, (past, len))| (0..*len).map(move |r| (s, past + r)))
        .collect();
    let mut expected = Vec::new();
    for (row, (_, position)) in positions.iter().enumerate() {
        for head in q[row * heads * head_dim..][..heads * head_dim].chunks(head_dim) {
            expected.extend(turned(head, *position, true));
        }
    }
    for (row, (sequence, position)) in positions.iter().enumerate() {
        for (value, source) in [(false, &k), (true, &v)] {
            for head in 0..kv_heads {
                let from = &source[(row * kv_heads + head) * head_dim..][..head_dim];
                expected.extend(turned(from, *position, !value));
                found.extend(
                    paging
                        .read::<E, D>(b, kv_heads, head_dim, value, head, *sequence, *position)?,
                );
            }
        }
    }
    let limit = if size_of::<E>() == 4 { 1e-12 } else { 1e-6 };
    let case = format!(
        "{heads} heads, {head_dim} wide, {dims} rotate, {}{}",
        size_of::<E>() * 8,
        if f16_out { ", f16 queries" } else { "" }
    );
    b.report("rope_cache", case, nmse(&found, &expected), limit);
    Ok(())
}
