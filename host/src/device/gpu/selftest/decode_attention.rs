//! The kernel `decode`: attention.

use super::Driver;
use super::bench::{Bench, nmse};
use super::decode::{input, launch};
use super::rows::{Paging, rms_norm, rotate, rotation_table};
use crate::error::Result;
use gguf::GgmlType;
use half::f16;
use kernels::decode::{self, Input, NO_OP, Op, kind};
use kernels::rows::Rotation;
use kernels::types::NO_MATRIX;
use std::ptr;

/// Attention, and the product that takes its parts, with a barrier between them.
pub fn attend<D: Driver>(
    b: &mut Bench<'_, D>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    past: usize,
    splits: u32,
    late: Option<(usize, bool)>,
) -> Result<()> {
    const EPS: f32 = 1e-6;
    let tokens = past + 1;
    let paging = Paging::new(b, &[(past, 1)], kv_heads * head_dim * 2, &[0])?;
    // Keys far from zero, as those of a model with large key biases are.
    let mut cached = [Vec::new(), Vec::new()];
    for token in 0..tokens {
        for (kind, by_token) in cached.iter_mut().enumerate() {
            let mut by_head = Vec::new();
            for head in 0..kv_heads {
                let offset = if kind == 0 { 3.0 } else { 0.0 };
                let v: Vec<f32> = b
                    .random
                    .values(head_dim)
                    .iter()
                    .map(|v| f16::from_f32(v + offset).to_f32())
                    .collect();
                paging.write::<f16, D>(b, kv_heads, head_dim, kind == 1, head, 0, token, &v)?;
                by_head.push(v);
            }
            by_token.push(by_head);
        }
    }
    let len = heads * head_dim;
    let q: Vec<f32> = b.random.values(len).iter().map(|v| v * 3.0).collect();
    let q_on = b.upload(&q)?;
    // The step's own key and value: as the cache is to have them, or the key before its norm.
    let mut fresh = Vec::new();
    for kind in &cached {
        fresh.extend(kind[past].concat());
    }
    let (query_norm, key_norm) = (b.random.values(head_dim), b.random.values(head_dim));
    let dims = late.map_or(0, |(dims, _)| dims);
    let halves = late.is_some_and(|(_, halves)| halves);
    let table = rotation_table(tokens, dims.max(2));
    let turn = |head: &[f32], norm: &[f32]| -> Vec<f64> {
        let mut y: Vec<f64> = rms_norm(head, norm, f64::from(EPS))
            .iter()
            .map(|v| f64::from(*v))
            .collect();
        rotate(&mut y, &table, past, dims, halves);
        y
    };
    let mut q_seen: Vec<f64> = q.iter().map(|v| f64::from(*v)).collect();
    if late.is_some() {
        q_seen = q
            .chunks(head_dim)
            .flat_map(|head| turn(head, &query_norm))
            .collect();
        for head in &mut cached[0][past] {
            let turned = turn(head, &key_norm);
            *head = turned.iter().map(|v| f16::from_f64(*v).to_f32()).collect();
        }
    }
    let (query_norm_on, key_norm_on) = (b.upload(&query_norm)?, b.upload(&key_norm)?);
    let (table_on, fresh_on) = (b.upload(&table)?, b.upload(&fresh)?);
    let words = decode::split_words(head_dim as u32) as usize;
    let parts = b.alloc(4 * heads * splits as usize * words)?;
    let row = b.alloc(4 * len)?;
    let m = b.matrix(GgmlType::F32, 9, len)?;
    let out = b.alloc(4 * m.rows)?;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let attention = Op {
        kind: kind::ATTEND,
        input: input(
            &q_on,
            late.is_some().then_some(&query_norm_on),
            EPS,
            len,
            false,
        ),
        late: u32::from(late.is_some()),
        key_norm: if late.is_some() {
            key_norm_on.ptr()
        } else {
            ptr::null()
        },
        rotation: Rotation {
            table: table_on.ptr(),
            dims: dims as u32,
            halves: u32::from(halves),
        },
        // Where nothing is normed the cache has it all.
        fresh: if late.is_some() {
            fresh_on.ptr()
        } else {
            ptr::null_mut()
        },
        cache: paging.layer(kv_heads, head_dim),
        heads: heads as u32,
        splits,
        scale,
        number: 3,
        sealed: 1,
        parts: parts.ptr(),
        out: row.ptr(),
        ..NO_OP
    };
    let product = Op {
        kind: kind::PRODUCT,
        input: Input {
            from: 3,
            ..input(&row, None, 0.0, len, true)
        },
        matrices: [m.matrix, NO_MATRIX, NO_MATRIX],
        out: out.ptr(),
        ..NO_OP
    };
    launch(b, &[attention, product], 9, 0, past, paging.step.tables)?;
    b.take::<u32>("decode", parts)?;
    b.take::<u32>("decode", row)?;
    let found = b.take::<f32>("decode", out)?;
    let mut attended = Vec::with_capacity(len);
    for (head, q) in q_seen.chunks(head_dim).enumerate() {
        let kv = head / (heads / kv_heads);
        let scores: Vec<f64> = cached[0]
            .iter()
            .map(|keys| {
                let dot: f64 = q
                    .iter()
                    .zip(&keys[kv])
                    .map(|(q, k)| q * f64::from(*k))
                    .sum();
                dot * f64::from(scale)
            })
            .collect();
        let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mass: f64 = scores.iter().map(|s| (s - peak).exp()).sum();
        for e in 0..head_dim {
            let sum: f64 = scores
                .iter()
                .zip(&cached[1])
                .map(|(s, values)| (s - peak).exp() * f64::from(values[kv][e]))
                .sum();
            attended.push((sum / mass) as f32);
        }
    }
    let turned = match late {
        Some((dims, _)) => format!(", normed, {dims} rotate"),
        None => String::new(),
    };
    let case = format!(
        "attention, {heads}/{kv_heads} heads of {head_dim}, {tokens} tokens, {splits} splits{turned}"
    );
    // A key that is rounded the other way, to f16, for one of the tokens.
    let limit = if late.is_some() { 1e-6 } else { 1e-9 };
    let error = nmse(&found, &m.times(&attended));
    b.report(b.decode_kernel, case, error, limit);
    if late.is_some() {
        // The cache has it for the steps to come.
        let mut kept = Vec::new();
        for head in 0..kv_heads {
            kept.extend(paging.read::<f16, D>(b, kv_heads, head_dim, false, head, 0, past)?);
        }
        let expected: Vec<f64> = cached[0][past]
            .concat()
            .iter()
            .map(|v| f64::from(*v))
            .collect();
        b.report(
            b.decode_kernel,
            format!("{heads}/{kv_heads} keys of {head_dim}, normed, {dims} rotate"),
            nmse(&kept, &expected),
            1e-6,
        );
    }
    Ok(())
}
