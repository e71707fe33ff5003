//! The kernel `decode`: attention.

use super::Driver;
use super::bench::{Bench, nmse};
use super::decode::{input, launch};
use super::rows::{Paging, rms_norm, rotate, rotation_table};
use crate::device::CacheType;
use crate::error::Result;
use gguf::GgmlType;
use half::f16;
use kernels::decode::{self, Input, NO_OP, Op, kind};
use kernels::rows::Rotation;
use kernels::types::NO_MATRIX;
use std::ptr;

/// An attention of one row.
#[derive(Clone, Copy)]
pub struct Case {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Tokens in the cache before the step's own.
    pub past: usize,
    pub splits: u32,
    /// Where heads are normed by the attention: how many of their elements rotate, and whether pairs lie half of these apart.
    pub late: Option<(usize, bool)>,
    pub cache: CacheType,
}

/// What a head's key or value is in a cache.
struct Cached {
    bytes: Vec<u8>,
    values: Vec<f32>,
}

impl Cached {
    fn new(cache: CacheType, values: &[f32]) -> Cached {
        let mut bytes = Vec::new();
        if cache == CacheType::Q8_0 {
            let mut scales = Vec::new();
            for unit in values.chunks(32) {
                let most = unit.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                let d = most / 127.0;
                let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
                // Half away from zero.
                bytes.extend(unit.iter().map(|v| (v * inverse).round() as i8 as u8));
                scales.extend(f16::from_f32(d).to_le_bytes());
            }
            bytes.extend(scales);
            bytes.resize(cache.row_bytes(values.len()), 0);
        } else {
            bytes.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()));
        }
        Cached::of_bytes(cache, bytes, values.len())
    }

    fn of_bytes(cache: CacheType, bytes: Vec<u8>, len: usize) -> Cached {
        let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
        let value = |i: usize| match cache {
            CacheType::Q8_0 => {
                let v = half(len + i / 32 * 2) * f32::from(bytes[i] as i8);
                f16::from_f32(v).to_f32()
            }
            _ => half(2 * i),
        };
        Cached {
            values: (0..len).map(value).collect(),
            bytes,
        }
    }
}

/// Attention, and the product that takes its parts, with a barrier between them.
pub fn attend<D: Driver>(b: &mut Bench<'_, D>, case: &Case) -> Result<()> {
    const EPS: f32 = 1e-6;
    let Case {
        heads,
        kv_heads,
        head_dim,
        past,
        splits,
        late,
        cache,
    } = *case;
    let tokens = past + 1;
    let row_bytes = cache.row_bytes(head_dim);
    // An 8-bit one has the step's own key and value from the attention.
    let keeps = late.is_some() || cache == CacheType::Q8_0;
    let paging = Paging::new(b, &[(past, 1)], kv_heads * row_bytes, &[0])?;
    let mut fresh = [Vec::new(), Vec::new()];
    // Keys far from zero, as those of a model with large key biases are.
    let mut cached = [Vec::new(), Vec::new()];
    for token in 0..tokens {
        for (kind, by_token) in cached.iter_mut().enumerate() {
            let mut by_head = Vec::new();
            for head in 0..kv_heads {
                let offset = if kind == 0 { 3.0 } else { 0.0 };
                let v = b.random.values(head_dim);
                let v: Vec<f32> = v.iter().map(|v| v + offset).collect();
                let cached = Cached::new(cache, &v);
                if token < past || !keeps {
                    let at = paging.at(row_bytes, kv_heads, kind == 1, head, 0, token);
                    b.driver.write(at, &cached.bytes)?;
                }
                if token == past {
                    fresh[kind].extend(match cache {
                        CacheType::Q8_0 => &v,
                        _ => &cached.values,
                    });
                }
                by_head.push(cached.values);
            }
            by_token.push(by_head);
        }
    }
    let len = heads * head_dim;
    let q: Vec<f32> = b.random.values(len).iter().map(|v| v * 3.0).collect();
    let q_on = b.upload(&q)?;
    // The step's own key and value: as a cache of f16 is to have them, or the key before its norm.
    let keys = fresh[0].clone();
    let fresh = fresh.concat();
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
        for (head, key) in cached[0][past].iter_mut().zip(keys.chunks(head_dim)) {
            let turned: Vec<f32> = turn(key, &key_norm).iter().map(|v| *v as f32).collect();
            *head = Cached::new(cache, &turned).values;
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
        // Where nothing is left to do the cache has it all.
        fresh: if keeps {
            fresh_on.ptr()
        } else {
            ptr::null_mut()
        },
        cache: paging.layer(kv_heads, head_dim),
        quantised: u32::from(cache == CacheType::Q8_0),
        row_bytes: row_bytes as u32,
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
    let turned = match late {
        Some((dims, _)) => format!(", normed, {dims} rotate"),
        None => String::new(),
    };
    // The cache has them for the steps to come: keys, and in 8 bits values. Now and then one of them is rounded the other way than here;
    // attention is to be that over what the cache has.
    let kinds = match (keeps, cache) {
        (false, _) => 0,
        (true, CacheType::Q8_0) => 2,
        _ => 1,
    };
    for (kind, what) in ["keys", "values"].into_iter().enumerate().take(kinds) {
        let mut kept = Vec::new();
        for head in 0..kv_heads {
            let mut bytes = vec![0; row_bytes];
            let at = paging.at(row_bytes, kv_heads, kind == 1, head, 0, past);
            b.driver.read(at, &mut bytes)?;
            kept.push(Cached::of_bytes(cache, bytes, head_dim).values);
        }
        let expected = std::mem::replace(&mut cached[kind][past], kept.clone()).concat();
        let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
        let turned = if kind == 0 { &turned[..] } else { "" };
        b.report(
            b.decode_kernel,
            format!("{heads}/{kv_heads} {what} of {head_dim} in {cache}{turned}"),
            nmse(&kept.concat(), &expected),
            if cache == CacheType::Q8_0 { 1e-5 } else { 1e-6 },
        );
    }
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
    let case = format!(
        "attention, {heads}/{kv_heads} heads of {head_dim}, {tokens} tokens of {cache}, {splits} splits{turned}"
    );
    let error = nmse(&found, &m.times(&attended));
    // Roots are approximate.
    let limit = if late.is_some() { 1e-6 } else { 1e-9 };
    b.report(b.decode_kernel, case, error, limit);
    Ok(())
}
