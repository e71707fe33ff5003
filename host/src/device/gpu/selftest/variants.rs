//! What architectures vary in rows: norms of other kinds, of parts of rows and in place; activations; capped
//! logits; the cache of 8 bits.

use super::Driver;
use super::attention::{self, PLAIN};
use super::bench::{Bench, nmse};
use super::rows::Paging;
use crate::error::Result;
use half::f16;
use kernels::attention::{AttendArgs, THREADS, Variant};
use kernels::rows::{
    ActivateArgs, BLOCK_TOKENS, CacheLayer, FinishArgs, NormArgs, RopeCacheArgs, Rotation,
    UnpackArgs, activations, cache_types, norms, q8_row_bytes,
};
use std::ptr;

pub fn run<D: Driver>(b: &mut Bench<'_, D>) -> Result<()> {
    for len in [8, 31, 300] {
        for kind in [norms::NONE, norms::RMS, norms::LAYER] {
            check_residual(b, len, kind)?;
            check_parts(b, len, kind)?;
        }
        for kind in [
            activations::SILU,
            activations::GELU,
            activations::CLAMPED_SWISH,
        ] {
            check_activation(b, len, kind)?;
        }
        check_logits(b, len)?;
    }
    for (heads, kv_heads, head_dim) in [(4, 2, 64), (3, 1, 40), (2, 2, 256)] {
        check_q8(b, heads, kv_heads, head_dim)?;
    }
    Ok(())
}

/// A row's norm without weights.
fn reference(x: &[f32], kind: u32, eps: f64) -> Vec<f64> {
    let n = x.len() as f64;
    let x: Vec<f64> = x.iter().copied().map(f64::from).collect();
    let mean = match kind {
        norms::LAYER => x.iter().sum::<f64>() / n,
        _ => 0.0,
    };
    let squares = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let scale = match kind {
        norms::NONE => 1.0,
        _ => 1.0 / (squares + eps).sqrt(),
    };
    x.iter().map(|x| (x - mean) * scale).collect()
}

/// `out += scale * (norm(x) * weight + bias)`.
fn check_residual<D: Driver>(b: &mut Bench<'_, D>, len: usize, kind: u32) -> Result<()> {
    let (rows, scale) = (3, 0.7f32);
    let (x, before) = (b.random.values(rows * len), b.random.values(rows * len));
    let (weight, bias) = (b.random.values(len), b.random.values(len));
    let (x_on, out) = (b.upload(&x)?, b.upload(&before)?);
    let (weight_on, bias_on) = (b.upload(&weight)?, b.upload(&bias)?);
    let weighted = kind != norms::NONE;
    let args = NormArgs {
        x: x_on.ptr(),
        x_stride: len as u32,
        rows: ptr::null(),
        kind,
        weight: if weighted {
            weight_on.ptr::<f32>()
        } else {
            ptr::null_mut()
        }
        .cast_const(),
        bias: if weighted {
            bias_on.ptr::<f32>()
        } else {
            ptr::null_mut()
        }
        .cast_const(),
        weight_stride: 0,
        eps: 1e-5,
        parts: 1,
        len: len as u32,
        out: out.ptr(),
        stride: len as u32,
        f16: 0,
        scale,
        add: 1,
    };
    b.driver.launch("norm", (rows as u32, 1), 256, 128, &args)?;
    let found = b.take::<f32>("norm", out)?;
    let expected: Vec<f64> = x
        .chunks(len)
        .flat_map(|x| reference(x, kind, 1e-5).into_iter().enumerate())
        .map(|(i, y)| match weighted {
            true => y * f64::from(weight[i]) + f64::from(bias[i]),
            false => y,
        })
        .zip(&before)
        .map(|(y, before)| f64::from(scale) * y + f64::from(*before))
        .collect();
    let case = format!("kind {kind}, {len} added");
    b.report("norm", case, nmse(&found, &expected), 1e-12);
    Ok(())
}

/// Parts of rows where they lie, other values beside them.
fn check_parts<D: Driver>(b: &mut Bench<'_, D>, len: usize, kind: u32) -> Result<()> {
    let rows = 2;
    for parts in [1, 3] {
        let stride = parts * len + 5;
        let x = b.random.values(rows * stride);
        let weight = b.random.values(parts * len);
        let (x_on, weight_on) = (b.upload(&x)?, b.upload(&weight)?);
        let args = NormArgs {
            x: x_on.ptr(),
            x_stride: stride as u32,
            rows: ptr::null(),
            kind,
            weight: weight_on.ptr(),
            bias: ptr::null(),
            weight_stride: len as u32,
            eps: 1e-5,
            parts: parts as u32,
            len: len as u32,
            out: x_on.ptr(),
            stride: stride as u32,
            f16: 0,
            scale: 1.0,
            add: 0,
        };
        let grid = ((rows * parts) as u32, 1);
        b.driver.launch("norm", grid, 256, 128, &args)?;
        let found = b.take::<f32>("norm", x_on)?;
        let mut expected: Vec<f64> = x.iter().copied().map(f64::from).collect();
        for (row, out) in x.chunks(stride).zip(expected.chunks_mut(stride)) {
            for (part, out) in row[..parts * len].chunks(len).zip(out.chunks_mut(len)) {
                out.copy_from_slice(&reference(part, kind, 1e-5));
            }
            for (out, weight) in out.iter_mut().zip(&weight) {
                *out *= f64::from(*weight);
            }
        }
        let case = format!("kind {kind}, {parts} parts of {len} in place");
        b.report("norm", case, nmse(&found, &expected), 1e-12);
    }
    Ok(())
}

/// The activations as the host's `Activation` defines them.
fn activation(kind: u32, gate: f64, up: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match kind {
        activations::SILU => gate * sigmoid(gate) * up,
        activations::GELU => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
            0.5 * gate * (1.0 + u.tanh()) * up
        }
        _ => {
            let (gate, up) = (gate.min(7.0), up.clamp(-7.0, 7.0));
            (up + 1.0) * gate * sigmoid(1.702 * gate)
        }
    }
}

fn check_activation<D: Driver>(b: &mut Bench<'_, D>, len: usize, kind: u32) -> Result<()> {
    let rows = 2;
    let mut wide = || -> Vec<f32> {
        let values = b.random.values(rows * len);
        values.iter().map(|v| v * 8.0).collect()
    };
    let (gate, up) = (wide(), wide());
    for gated in [true, false] {
        // Nothing clamps what is not gated.
        if !gated && kind == activations::CLAMPED_SWISH {
            continue;
        }
        let (gate_on, up_on) = (b.upload(&gate)?, b.upload(&up)?);
        let out = b.alloc(rows * len * 4)?;
        let args = ActivateArgs {
            gate: gate_on.ptr(),
            up: if gated {
                up_on.ptr::<f32>()
            } else {
                ptr::null_mut()
            }
            .cast_const(),
            out: out.ptr(),
            len: len as u32,
            stride: len as u32,
            f16: 0,
            activation: kind,
        };
        let grid = (len.div_ceil(64) as u32, rows as u32);
        b.driver.launch("activate_rows", grid, 64, 0, &args)?;
        let found = b.take::<f32>("activate_rows", out)?;
        let expected: Vec<f64> = gate
            .iter()
            .zip(&up)
            .map(|(g, u)| activation(kind, f64::from(*g), if gated { f64::from(*u) } else { 1.0 }))
            .collect();
        let case = format!("kind {kind}, {len}, gated {gated}");
        b.report("activate_rows", case, nmse(&found, &expected), 1e-12);
    }
    Ok(())
}

fn check_logits<D: Driver>(b: &mut Bench<'_, D>, len: usize) -> Result<()> {
    for cap in [0.0f32, 4.0] {
        let x = b.random.values(len);
        let on = b.upload(&x)?;
        let args = FinishArgs {
            logits: on.ptr(),
            len: len as u32,
            scale: 5.0,
            cap,
        };
        let grid = (len.div_ceil(64) as u32, 1);
        b.driver.launch("finish_logits", grid, 64, 0, &args)?;
        let found = b.take::<f32>("finish_logits", on)?;
        let expected: Vec<f64> = x
            .iter()
            .map(|x| match f64::from(cap) {
                0.0 => 5.0 * f64::from(*x),
                cap => cap * (5.0 * f64::from(*x) / cap).tanh(),
            })
            .collect();
        let case = format!("{len}, cap {cap}");
        b.report("finish_logits", case, nmse(&found, &expected), 1e-12);
    }
    Ok(())
}

/// Keys and values to a cache of 8 bits, back to f16, and attention over them.
fn check_q8<D: Driver>(
    b: &mut Bench<'_, D>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
) -> Result<()> {
    let rows = 40;
    let spans = [(0, rows)];
    let len = kv_heads * head_dim;
    let (k, v) = (b.random.values(rows * len), b.random.values(rows * len));
    let q = b.random.values(rows * heads * head_dim);
    let (k_on, v_on, q_on) = (b.upload(&k)?, b.upload(&v)?, b.upload(&q)?);
    let token_bytes = kv_heads * q8_row_bytes(head_dim);
    let paging = Paging::new(b, &spans, token_bytes, &vec![0; rows])?;
    let cache = paging.layer(kv_heads, head_dim);
    let args = RopeCacheArgs {
        q: q_on.ptr(),
        k: k_on.ptr(),
        v: v_on.ptr(),
        strides: [heads * head_dim, len].map(|n| n as u32),
        out: q_on.ptr(),
        f16: 0,
        rotation: Rotation {
            table: ptr::null(),
            dims: 0,
            halves: 0,
        },
        long_table: ptr::null(),
        long_above: 0,
        cache,
        step: paging.step,
        heads: heads as u32,
        cache_type: cache_types::Q8_0,
    };
    let warps = 2 * kv_heads * head_dim.div_ceil(32);
    let grid = ((warps * 32).div_ceil(64) as u32, rows as u32);
    b.driver.launch("store_q8", grid, 64, 0, &args)?;

    let table = paging.tables[0].clone();
    let blocks = 1 + table.iter().max().copied().unwrap_or(0) as usize;
    let bytes = blocks * BLOCK_TOKENS * len * 2;
    let (keys, values) = (b.alloc(bytes)?, b.alloc(bytes)?);
    let list = b.upload(&table)?;
    let args = UnpackArgs {
        cache,
        out: CacheLayer {
            keys: keys.ptr(),
            values: values.ptr(),
            ..cache
        },
        blocks: list.ptr(),
    };
    let grid = (table.len() as u32, kv_heads as u32);
    b.driver
        .launch("unpack_q8", grid, BLOCK_TOKENS as u32, 0, &args)?;
    let unpacked = [
        b.take::<f16>("unpack_q8", keys)?,
        b.take::<f16>("unpack_q8", values)?,
    ];
    let at = |token: usize, head: usize| {
        let block = table[token / BLOCK_TOKENS] as usize * kv_heads + head;
        (block * BLOCK_TOKENS + token % BLOCK_TOKENS) * head_dim
    };
    let cached: Vec<[Vec<Vec<f32>>; 2]> = (0..rows)
        .map(|token| {
            [0, 1].map(|kind| {
                let of = |head| &unpacked[kind][at(token, head)..][..head_dim];
                let heads = (0..kv_heads).map(|head| of(head).iter().map(|v| v.to_f32()).collect());
                heads.collect()
            })
        })
        .collect();
    let mut found = Vec::new();
    let mut expected = Vec::new();
    for (token, kinds) in cached.iter().enumerate() {
        for (kind, source) in kinds.iter().zip([&k, &v]) {
            found.extend(kind.iter().flatten());
            expected.extend(source[token * len..][..len].iter().copied().map(f64::from));
        }
    }
    let case = format!("{kv_heads} heads of {head_dim}");
    // Values within ±1 in steps of 1 / 127 at most.
    let error = nmse(&found, &expected);
    b.report("store_q8", case.clone(), error, 5e-5);
    b.report("unpack_q8", case, error, 5e-5);

    let out = b.alloc(4 * q.len())?;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let args = AttendArgs {
        q: q_on.ptr(),
        cache,
        step: paging.step,
        heads: heads as u32,
        splits: 1,
        own: 0,
        scale,
        variant: Variant::NONE,
        out: out.ptr(),
        partial: ptr::null_mut(),
    };
    let grid = ((rows * heads).div_ceil(THREADS as usize / 32) as u32, 1);
    b.driver.launch("attend_q8", grid, THREADS, 0, &args)?;
    let found = b.take::<f32>("attend_q8", out)?;
    let expected = attention::attention(
        &q,
        &vec![cached],
        heads,
        kv_heads,
        head_dim,
        &spans,
        scale,
        &PLAIN,
        None,
    );
    let case = format!("{heads}/{kv_heads} heads of {head_dim}");
    // The reference has them rounded to f16.
    b.report("attend_q8", case, nmse(&found, &expected), 1e-5);
    Ok(())
}
