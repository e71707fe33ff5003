//! Attention over the paged cache, split and whole.

use super::Driver;
use super::bench::{Bench, nmse};
use super::rows::{Element, Paging};
use crate::error::Result;
use half::f16;
use kernels::attention::{self, AttendArgs};

pub fn run<D: Driver>(b: &mut Bench<'_, D>) -> Result<()> {
    let long: &[(usize, usize)] = &[(0, 3), (70, 1), (31, 2)];
    for (heads, kv_heads, head_dim) in [(2, 1, 8), (7, 1, 64), (4, 4, 40), (6, 2, 128), (1, 1, 256)]
    {
        for (spans, splits) in [(&long[..1], 1), (long, 1), (long, 4)] {
            check::<f16, D>(b, heads, kv_heads, head_dim, spans, splits)?;
            check::<f32, D>(b, heads, kv_heads, head_dim, spans, splits)?;
        }
    }
    Ok(())
}

fn check<E: Element, D: Driver>(
    b: &mut Bench<'_, D>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    spans: &[(usize, usize)],
    splits: u32,
) -> Result<()> {
    let rows: usize = spans.iter().map(|s| s.1).sum();
    let paging = Paging::new(
        b,
        spans,
        kv_heads * head_dim * size_of::<E>(),
        &vec![0; rows],
    )?;
    // Keys far from zero, as those of a model with large key biases are.
    let mut cached = Vec::new();
    for (sequence, (past, len)) in spans.iter().enumerate() {
        let mut tokens = Vec::new();
        for token in 0..past + len {
            let mut kinds = Vec::new();
            for value in [false, true] {
                let mut by_head = Vec::new();
                for head in 0..kv_heads {
                    let offset = if value { 0.0 } else { 3.0 };
                    let v: Vec<f32> = b
                        .random
                        .values(head_dim)
                        .iter()
                        .map(|v| E::from_f32(v + offset).to_f32())
                        .collect();
                    paging
                        .write::<E, D>(b, kv_heads, head_dim, value, head, sequence, token, &v)?;
                    by_head.push(v);
                }
                kinds.push(by_head);
            }
            tokens.push(kinds);
        }
        cached.push(tokens);
    }
    let q: Vec<f32> = b
        .random
        .values(rows * heads * head_dim)
        .iter()
        .map(|v| v * 3.0)
        .collect();
    let q_on = b.upload(&q)?;
    let out = b.alloc(4 * q.len())?;
    let partial = b.alloc(4 * rows * heads * splits as usize * (head_dim + 2))?;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let args = AttendArgs {
        q: q_on.ptr(),
        cache: paging.layer(kv_heads, head_dim),
        step: paging.step,
        heads: heads as u32,
        splits,
        scale,
        out: out.ptr(),
        partial: partial.ptr(),
    };
    let kernel = if size_of::<E>() == 4 {
        "attend_f32"
    } else {
        "attend_f16"
    };
    let grid = (rows * heads).div_ceil(attention::THREADS as usize / 32) as u32;
    b.driver
        .launch(kernel, (grid, splits), attention::THREADS, 0, &args)?;
    if splits > 1 {
        b.driver
            .launch("attend_combine", (grid, 1), attention::THREADS, 0, &args)?;
    }
    b.take::<f32>(kernel, partial)?;
    let found = b.take::<f32>(kernel, out)?;

    let mut expected = Vec::with_capacity(q.len());
    let mut row = 0;
    for (sequence, (past, len)) in spans.iter().enumerate() {
        for r in 0..*len {
            for head in 0..heads {
                let q = &q[(row * heads + head) * head_dim..][..head_dim];
                let kv = head / (heads / kv_heads);
                let tokens = &cached[sequence][..past + r + 1];
                let scores: Vec<f64> = tokens
                    .iter()
                    .map(|t| {
                        let dot: f64 = q
                            .iter()
                            .zip(&t[0][kv])
                            .map(|(q, k)| f64::from(*q) * f64::from(*k))
                            .sum();
                        dot * f64::from(scale)
                    })
                    .collect();
                let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let mass: f64 = scores.iter().map(|s| (s - peak).exp()).sum();
                for e in 0..head_dim {
                    let sum: f64 = scores
                        .iter()
                        .zip(tokens)
                        .map(|(s, t)| (s - peak).exp() * f64::from(t[1][kv][e]))
                        .sum();
                    expected.push(sum / mass);
                }
            }
            row += 1;
        }
    }
    let case = format!(
        "{heads}/{kv_heads} heads of {head_dim}, {} spans, {splits} splits",
        spans.len()
    );
    let error = nmse(&found, &expected);
    b.report(kernel, case.clone(), error, 1e-10);
    if splits > 1 {
        b.report("attend_combine", case, error, 1e-10);
    }
    Ok(())
}
