//! The kernel `decode`: each kind of operation, alone and after one another.

use super::super::program::{Plan, cut_of, listing, plan, turn_bytes};
use super::Driver;
use super::bench::{Bench, Guarded, TestMatrix, layout, nmse, nmse_at_least};
use super::decode_attention::{Case, attend};
use super::products::{F32_LIMIT, name};
use super::rows::{Paging, rms_norm, rotate, rotation_table, silu};
use crate::device::CacheType;
use crate::error::{Error, Result};
use gguf::GgmlType;
use half::f16;
use kernels::decode::{self, CHOICES, DecodeArgs, Input, NO_OP, Op, PLAIN, kind};
use kernels::rows::Rotation;
use kernels::types::{GROUP, NO_MATRIX};
use std::ptr;

/// 15-bit activations against the same: a value on the edge may round the other way.
const Q15_LIMIT: f64 = 1e-9;

/// Keys and values are rounded to f16: the square of half of its last place.
const F16_LIMIT: f64 = 2.4e-7;

/// Levels of either sign.
const LEVELS: f32 = 16256.0;

/// Blocks of a launch.
const BLOCKS: u32 = 2;

pub fn run<D: Driver>(b: &mut Bench<'_, D>) -> Result<()> {
    for (gate, up) in [
        (GgmlType::Q4_K, GgmlType::Q4_K),
        (GgmlType::Q5_0, GgmlType::Q8_0),
        (GgmlType::F16, GgmlType::Q6_K),
    ] {
        gate_up(b, gate, up)?;
    }
    for (types, heads, kv_heads, head_dim, dims, halves) in [
        (
            [GgmlType::Q4_K, GgmlType::Q4_K, GgmlType::Q6_K],
            4,
            2,
            32,
            32,
            true,
        ),
        (
            [GgmlType::Q5_0, GgmlType::Q5_0, GgmlType::Q8_0],
            7,
            1,
            64,
            64,
            false,
        ),
        (
            [GgmlType::F16, GgmlType::F32, GgmlType::BF16],
            3,
            3,
            16,
            8,
            true,
        ),
        (
            [GgmlType::Q4_1, GgmlType::Q4_1, GgmlType::Q4_1],
            2,
            1,
            24,
            16,
            false,
        ),
    ] {
        qkv(b, types, heads, kv_heads, head_dim, dims, halves)?;
    }
    // One token to several splits, the last without tokens; heads of one and of two parts, groups of one and of two
    // pieces.
    for (heads, kv_heads, head_dim, past, splits) in [
        (2, 1, 8, 0, 1),
        (7, 1, 64, 70, 1),
        (14, 2, 64, 300, 9),
        (4, 4, 40, 130, 3),
        (6, 2, 128, 1100, 16),
        (12, 1, 96, 33, 2),
        (2, 1, 64, 2000, 66),
        (5, 1, 128, 1500, 5),
        (2, 1, 72, 415, 3),
        (3, 1, 64, 1, 4),
    ] {
        for cache in CACHES {
            attend(
                b,
                &Case {
                    heads,
                    kv_heads,
                    head_dim,
                    past,
                    splits,
                    late: None,
                    cache,
                },
            )?;
        }
    }
    // More turns of the cache than a ring has room for: of three programs one has a small ring, that of a single head such that whoever
    // awaited its first turn before others had read theirs would do so for ever.
    for heads in [3, 1] {
        for past in [1500, 1501, 1502] {
            attend(b, &Case { heads, past, ..ONE })?;
        }
    }
    // Six to fourteen turns of a split, of which some warps take one and some half a one, and up to two tiles behind them; and more than
    // there are places for turns.
    for past in [
        380, 415, 447, 463, 512, 575, 601, 640, 688, 703, 767, 775, 830, 863, 1100, 1151, 1200,
        1727,
    ] {
        for cache in CACHES {
            attend(
                b,
                &Case {
                    heads: 7,
                    past,
                    splits: 2,
                    cache,
                    ..ONE
                },
            )?;
        }
    }
    // In 8 bits they come through the ring where there is one split, too: more turns than a round of the warps.
    for (heads, kv_heads, head_dim) in [(7, 1, 64), (6, 3, 128), (4, 2, 40)] {
        for past in [200, 390, 511, 900] {
            let (splits, late, cache) = (1, None, CacheType::Q8_0);
            attend(
                b,
                &Case {
                    heads,
                    kv_heads,
                    head_dim,
                    past,
                    splits,
                    late,
                    cache,
                },
            )?;
        }
    }
    // Heads that are normed and rotated by the attention: all, some and none of their elements.
    for (heads, kv_heads, head_dim, past, splits, dims, halves) in [
        (4, 2, 128, 40, 1, 128, true),
        (9, 1, 64, 300, 3, 64, true),
        (2, 2, 96, 15, 1, 48, false),
        (2, 1, 40, 16, 2, 16, true),
        (3, 3, 32, 0, 1, 0, true),
    ] {
        let late = Some((dims, halves));
        for cache in CACHES {
            attend(
                b,
                &Case {
                    heads,
                    kv_heads,
                    head_dim,
                    past,
                    splits,
                    late,
                    cache,
                },
            )?;
        }
    }
    for (rows, cols) in [(64, 8192), (64, 8448), (1600, 12288)] {
        halves(b, rows, cols)?;
    }
    for (vocabulary, steps) in [(1, 1), (33, 5), (3000, 1), (3000, 3)] {
        choice(b, vocabulary, steps)?;
    }
    Ok(())
}

/// What steps' caches are made of.
const CACHES: [CacheType; 2] = [CacheType::F16, CacheType::Q8_0];

/// An attention with one key-value head, in three splits.
const ONE: Case = Case {
    heads: 1,
    kv_heads: 1,
    head_dim: 64,
    past: 0,
    splits: 3,
    late: None,
    cache: CacheType::F16,
};

/// Runs `ops` once; what they choose, if they do.
pub(super) fn launch<D: Driver>(
    b: &mut Bench<'_, D>,
    ops: &[Op],
    base: u32,
    token: u32,
    position: usize,
    table: *const u32,
) -> Result<Option<u32>> {
    let chosen = launch_steps(b, ops, base, token, position, table, 1)?;
    Ok(chosen.first().copied())
}

/// Runs `ops` for so many steps; what they choose, if they do.
fn launch_steps<D: Driver>(
    b: &mut Bench<'_, D>,
    ops: &[Op],
    base: u32,
    token: u32,
    position: usize,
    table: *const u32,
    steps: u32,
) -> Result<Vec<u32>> {
    let limit = b.driver.shared_limit();
    let mut planned = plan(&b.driver, ops, BLOCKS, limit)?;
    // Now and then a ring of no more than a few turns, which comes around.
    b.programs += 1;
    if b.programs.is_multiple_of(3) {
        let room = planned.room;
        let turn = ops.iter().map(|op| turn_bytes(op, room.turn_tiles)).max();
        let less = room.ring_bytes.saturating_sub(4 * turn.unwrap_or(0) + 256);
        planned = plan(&b.driver, ops, BLOCKS, limit - less as usize)?;
    }
    let Plan { ops, count, room } = planned;
    let (listing, behind) = listing(&mut b.driver, &ops, BLOCKS)?;
    let ops_on = b.upload(&listing)?;
    let ranks = b.upload(&[0u64; 2 * BLOCKS as usize])?;
    let chosen = b.upload(&[0u64; CHOICES as usize])?;
    let choice = b.upload(&[0u64])?;
    const SEQUENCE: u32 = 77;
    const STRIDE: u32 = 7;
    let args = DecodeArgs {
        ops: ops_on.ptr(),
        segments: ops_on.ptr::<u8>().wrapping_add(behind.segments).cast(),
        segment_count: behind.segment_count,
        maps: behind
            .maps
            .map_or(ptr::null(), |at| ops_on.ptr::<u8>().wrapping_add(at).cast()),
        tasks: ops_on.ptr::<u8>().wrapping_add(behind.tasks).cast(),
        count,
        steps,
        base,
        stride: STRIDE,
        token,
        position: position as u32,
        sequence: SEQUENCE,
        ring_bytes: room.ring_bytes,
        flying: 8192,
        turn_tiles: room.turn_tiles,
        row_bytes: room.row_bytes,
        table,
        ranks: ranks.ptr(),
        trace: ptr::null_mut(),
        chosen: chosen.ptr(),
        choice: choice.ptr(),
    };
    b.driver
        .launch_cooperative(b.decode_kernel, BLOCKS, decode::THREADS, room.shared, &args)?;
    b.take::<u8>("decode", ops_on)?;
    b.take::<u64>("decode", ranks)?;
    let chosen = b.take::<u64>("decode", chosen)?;
    b.take::<u64>("decode", choice)?;
    let of = |step: u32| {
        let sequence = SEQUENCE + step;
        let word = chosen.get((sequence % CHOICES) as usize);
        word.filter(|v| (**v >> 32) as u32 == sequence)
            .map(|v| *v as u32)
    };
    Ok((0..steps).filter_map(of).collect())
}

/// What a row of 15-bit activations stands for.
fn quantise(x: &[f32]) -> Vec<f32> {
    x.chunks(GROUP)
        .flat_map(|group| {
            let peak = group.iter().fold(0.0f32, |p, v| p.max(v.abs()));
            let inverse = if peak > 0.0 { LEVELS / peak } else { 0.0 };
            let d = peak / LEVELS;
            group
                .iter()
                .map(move |v| (v * inverse).round_ties_even() * d)
                .collect::<Vec<_>>()
        })
        .collect()
}

/// The error of one activation that rounds the other way: more than [`Q15_LIMIT`] only in short rows.
fn one_step(m: &TestMatrix, x: &[f32], expected: &[f64]) -> f64 {
    let most = |values: &[f32]| values.iter().fold(0.0f32, |p, v| p.max(v.abs()));
    let step = f64::from(most(x) / LEVELS) * f64::from(most(&m.values));
    let scale: f64 = expected.iter().map(|e| e * e).sum();
    step * step / scale.max(m.typical(x)).max(1e-30)
}

/// The error of activations that round the other way, in all outputs of a product with the row `x`: sums of thousands of
/// products in f32 differ from exact ones by up to a tenth of a step, so that one or two of 64 do, and seldom eight.
fn some_steps(x: &[f32]) -> f64 {
    const MOST: f64 = 8.0;
    let peak = x.iter().fold(0.0f32, |p, v| p.max(v.abs()));
    let squares: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
    MOST * f64::from(peak / LEVELS).powi(2) / squares.max(1e-30)
}

/// [`one_step`] of `silu(g) * u`: a step changes both by at most that of the greatest weight.
fn one_step_gated(gate: &TestMatrix, up: &TestMatrix, x: &[f32], g: &[f64], u: &[f64]) -> f64 {
    /// The greatest slope of `silu`.
    const SLOPE: f64 = 1.1;
    let most = |values: &[f32]| f64::from(values.iter().fold(0.0f32, |p, v| p.max(v.abs())));
    let step = most(x) / f64::from(LEVELS);
    let (of_gate, of_up) = (step * most(&gate.values), step * most(&up.values));
    let change = |(g, u): (&f64, &f64)| SLOPE * u.abs() * of_gate + silu(*g).abs() * of_up;
    let changes: f64 = g.iter().zip(u).map(|v| change(v).powi(2)).sum();
    let scale: f64 = g.iter().zip(u).map(|(g, u)| (silu(*g) * u).powi(2)).sum();
    changes / scale.max(1e-30)
}

/// The row that `m` is multiplied with: float types take it as it is.
fn seen_by(m: &TestMatrix, x: &[f32]) -> Vec<f32> {
    if layout(m.ty).quantised {
        quantise(x)
    } else {
        x.to_vec()
    }
}

pub(super) fn input(
    x: &Guarded,
    norm: Option<&Guarded>,
    eps: f32,
    len: usize,
    float: bool,
) -> Input {
    Input {
        x: x.ptr(),
        norm: norm.map_or(ptr::null(), |n| n.ptr()),
        from: PLAIN,
        eps,
        len: len as u32,
        inverse_len: 0.0,
        keep_f32: u32::from(float),
        halves: 0,
    }
}

/// `out = W x`, then `out += W norm(x) + b`.
pub fn product<D: Driver>(b: &mut Bench<'_, D>, m: &TestMatrix) -> Result<()> {
    let float = !layout(m.ty).quantised;
    for (norm, add) in [(false, false), (true, true), (true, false)] {
        let x = b.random.values(m.cols);
        let weight = b.random.values(m.cols);
        let bias = b.random.values(m.rows);
        let before = b.random.values(m.rows);
        let (x_on, weight_on, bias_on) = (b.upload(&x)?, b.upload(&weight)?, b.upload(&bias)?);
        let out = if add {
            b.upload(&before)?
        } else {
            b.alloc(4 * m.rows)?
        };
        let op = Op {
            kind: kind::PRODUCT,
            add: u32::from(add),
            input: input(&x_on, norm.then_some(&weight_on), 1e-5, m.cols, float),
            matrices: [m.matrix, NO_MATRIX, NO_MATRIX],
            biases: [
                if add { bias_on.ptr() } else { ptr::null() },
                ptr::null(),
                ptr::null(),
            ],
            out: out.ptr(),
            ..NO_OP
        };
        launch(b, &[op], 0, 0, 0, ptr::null())?;
        let found = b.take::<f32>("decode", out)?;
        let x = if norm { rms_norm(&x, &weight, 1e-5) } else { x };
        let seen = seen_by(m, &x);
        let expected: Vec<f64> = m
            .times(&seen)
            .iter()
            .enumerate()
            .map(|(i, y)| {
                y + if add {
                    f64::from(bias[i]) + f64::from(before[i])
                } else {
                    0.0
                }
            })
            .collect();
        let limit = if float {
            F32_LIMIT
        } else {
            Q15_LIMIT.max(one_step(m, &x, &expected))
        };
        let case = name(
            m,
            match (norm, add) {
                (false, _) => "",
                (true, true) => "norm, bias, add",
                (true, false) => "norm",
            },
        );
        let error = nmse_at_least(&found, &expected, m.typical(&seen));
        b.report(b.decode_kernel, case, error, limit);
    }
    Ok(())
}

fn gate_up<D: Driver>(b: &mut Bench<'_, D>, gate: GgmlType, up: GgmlType) -> Result<()> {
    let (rows, cols) = (37, 512);
    let (gate, up) = (b.matrix(gate, rows, cols)?, b.matrix(up, rows, cols)?);
    let (x, weight) = (b.random.values(cols), b.random.values(cols));
    let (gate_bias, up_bias) = (b.random.values(rows), b.random.values(rows));
    let (x_on, weight_on) = (b.upload(&x)?, b.upload(&weight)?);
    let (gate_bias_on, up_bias_on) = (b.upload(&gate_bias)?, b.upload(&up_bias)?);
    let out = b.alloc(4 * rows)?;
    let op = Op {
        kind: kind::GATE_UP,
        input: input(&x_on, Some(&weight_on), 1e-6, cols, true),
        matrices: [gate.matrix, up.matrix, NO_MATRIX],
        biases: [gate_bias_on.ptr(), up_bias_on.ptr(), ptr::null()],
        out: out.ptr(),
        ..NO_OP
    };
    launch(b, &[op], 0, 0, 0, ptr::null())?;
    let found = b.take::<f32>("decode", out)?;
    let normed = rms_norm(&x, &weight, 1e-6);
    let biased = |m: &TestMatrix, bias: &[f32]| -> Vec<f64> {
        let y = m.times(&seen_by(m, &normed));
        y.iter().zip(bias).map(|(y, b)| y + f64::from(*b)).collect()
    };
    let (g, u) = (biased(&gate, &gate_bias), biased(&up, &up_bias));
    let expected: Vec<f64> = g.iter().zip(&u).map(|(g, u)| silu(*g) * u).collect();
    let case = format!("gate and up {} and {} {rows}×{cols}", gate.ty, up.ty);
    let limit = Q15_LIMIT.max(one_step_gated(&gate, &up, &normed, &g, &u));
    b.report(b.decode_kernel, case, nmse(&found, &expected), limit);
    Ok(())
}

/// `h = W x`, `h += V y`, which is long enough to be cut in two, `z = U norm(h)` and `h += T y` behind it.
fn halves<D: Driver>(b: &mut Bench<'_, D>, rows: usize, cols: usize) -> Result<()> {
    let few = 64;
    let first = b.matrix(GgmlType::Q8_0, rows, few)?;
    let long = b.matrix(GgmlType::Q4_K, rows, cols)?;
    let reader = b.matrix(GgmlType::Q5_0, few, rows)?;
    let last = b.matrix(GgmlType::Q8_0, rows, few)?;
    let (x, y, weight) = (
        b.random.values(few),
        b.random.values(cols),
        b.random.values(rows),
    );
    let bias = b.random.values(rows);
    let (x_on, y_on) = (b.upload(&x)?, b.upload(&y)?);
    let (weight_on, bias_on) = (b.upload(&weight)?, b.upload(&bias)?);
    let (h, z) = (b.alloc(2 * 4 * rows)?, b.alloc(4 * few)?);
    let unread = b.alloc(4 * rows)?;
    let product = |m: &TestMatrix, input: Input, out: *mut f32| Op {
        kind: kind::PRODUCT,
        input,
        matrices: [m.matrix, NO_MATRIX, NO_MATRIX],
        out,
        ..NO_OP
    };
    let normed = Input {
        x: h.ptr(),
        from: 4,
        ..input(&x_on, Some(&weight_on), 1e-5, rows, false)
    };
    let cut = cut_of(&long.matrix, BLOCKS);
    let ops = [
        // The first two are never cut.
        product(&last, input(&x_on, None, 0.0, few, false), unread.ptr()),
        Op {
            number: 3,
            sealed: 1,
            ..product(&first, input(&x_on, None, 0.0, few, false), h.ptr())
        },
        Op {
            number: 4,
            sealed: 1,
            add: 1,
            add_from: 3,
            cut,
            biases: [bias_on.ptr(), ptr::null(), ptr::null()],
            ..product(&long, input(&y_on, None, 0.0, cols, false), h.ptr())
        },
        product(&reader, normed, z.ptr()),
        Op {
            add: 1,
            add_from: 4,
            ..product(&last, input(&x_on, None, 0.0, few, false), h.ptr())
        },
    ];
    if cut == 0 {
        return Err(Error::Request(format!(
            "the self-test's product of {cols} values is not cut in two"
        )));
    }
    launch(b, &ops, 13, 0, 0, ptr::null())?;
    b.take::<f32>("decode", unread)?;
    let (found_h, found_z) = (b.take::<f32>("decode", h)?, b.take::<f32>("decode", z)?);
    let sum =
        |a: Vec<f64>, b: Vec<f64>| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
    let biased = bias.iter().map(|v| f64::from(*v)).collect();
    let middle = sum(
        sum(first.times(&quantise(&x)), long.times(&quantise(&y))),
        biased,
    );
    let narrow: Vec<f32> = middle.iter().map(|v| *v as f32).collect();
    let seen = rms_norm(&narrow, &weight, 1e-5);
    let expected_z = reader.times(&quantise(&seen));
    let expected_h = sum(middle, last.times(&quantise(&x)));
    for (what, found, expected, limit) in [
        (
            "read",
            &found_z[..],
            &expected_z,
            Q15_LIMIT.max(some_steps(&seen)),
        ),
        ("added to", &found_h[..rows], &expected_h, Q15_LIMIT),
    ] {
        let case = format!("halves of {rows}×{cols} {what}");
        b.report(b.decode_kernel, case, nmse(found, expected), limit);
    }
    Ok(())
}

fn qkv<D: Driver>(
    b: &mut Bench<'_, D>,
    types: [GgmlType; 3],
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    dims: usize,
    halves: bool,
) -> Result<()> {
    let cols = 256;
    let position = 41;
    let sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim];
    let mut matrices = Vec::new();
    let mut biases = Vec::new();
    for (ty, rows) in types.into_iter().zip(sizes) {
        matrices.push(b.matrix(ty, rows, cols)?);
        biases.push(b.random.values(rows));
    }
    let (x, weight) = (b.random.values(cols), b.random.values(cols));
    let (x_on, weight_on) = (b.upload(&x)?, b.upload(&weight)?);
    let biases_on = [
        b.upload(&biases[0])?,
        b.upload(&biases[1])?,
        b.upload(&biases[2])?,
    ];
    let table = rotation_table(position + 1, dims);
    let table_on = b.upload(&table)?;
    let paging = Paging::new(b, &[(position, 1)], kv_heads * head_dim * 2, &[0])?;
    let out = b.alloc(4 * sizes[0])?;
    let op = Op {
        kind: kind::QKV,
        input: input(&x_on, Some(&weight_on), 1e-6, cols, true),
        matrices: [matrices[0].matrix, matrices[1].matrix, matrices[2].matrix],
        biases: [biases_on[0].ptr(), biases_on[1].ptr(), biases_on[2].ptr()],
        rotation: Rotation {
            table: table_on.ptr(),
            dims: dims as u32,
            halves: u32::from(halves),
        },
        cache: paging.layer(kv_heads, head_dim),
        heads: heads as u32,
        out: out.ptr(),
        ..NO_OP
    };
    launch(b, &[op], 0, 0, position, paging.step.tables)?;
    let mut found = b.take::<f32>("decode", out)?;
    let normed = rms_norm(&x, &weight, 1e-6);
    let mut expected = Vec::new();
    for (i, m) in matrices.iter().enumerate() {
        let mut y = m.times(&seen_by(m, &normed));
        for (y, bias) in y.iter_mut().zip(&biases[i]) {
            *y += f64::from(*bias);
        }
        if i < 2 {
            for head in y.chunks_mut(head_dim) {
                rotate(head, &table, position, dims, halves);
            }
        }
        expected.extend(y);
    }
    for value in [false, true] {
        for head in 0..kv_heads {
            found.extend(paging.read::<f16, D>(b, kv_heads, head_dim, value, head, 0, position)?);
        }
    }
    let case = format!("qkv, {heads} heads, {kv_heads} kv, {head_dim} wide, {dims} rotate");
    let limit = F16_LIMIT.max(one_step(&matrices[0], &normed, &expected));
    b.report(b.decode_kernel, case, nmse(&found, &expected), limit);
    Ok(())
}

/// An embedding, then logits and the greatest of them, and the same with that for so many steps.
fn choice<D: Driver>(b: &mut Bench<'_, D>, vocabulary: usize, steps: u32) -> Result<()> {
    let cols = 64;
    let table = b.matrix(GgmlType::Q8_0, vocabulary, cols)?;
    let head = b.matrix(GgmlType::Q8_0, vocabulary, cols)?;
    let token = b.random.below(vocabulary);
    let (x, logits) = (b.alloc(4 * cols)?, b.alloc(4 * vocabulary)?);
    let ops = [
        Op {
            kind: kind::EMBED,
            input: input(&x, None, 0.0, cols, false),
            matrices: [table.matrix, NO_MATRIX, NO_MATRIX],
            scale: 0.5,
            number: 2,
            sealed: 1,
            out: x.ptr(),
            ..NO_OP
        },
        Op {
            kind: kind::PRODUCT,
            choose: 1,
            input: Input {
                from: 2,
                ..input(&x, None, 0.0, cols, false)
            },
            matrices: [head.matrix, NO_MATRIX, NO_MATRIX],
            out: logits.ptr(),
            ..NO_OP
        },
    ];
    let chosen = launch_steps(b, &ops, 14, token as u32, 0, ptr::null(), steps)?;
    let embedded = |token: usize| -> Vec<f32> {
        let row = &table.values[token * cols..(token + 1) * cols];
        row.iter().map(|v| v * 0.5).collect()
    };
    let complete = chosen.len() == steps as usize;
    let before = std::iter::once(token).chain(chosen.iter().map(|id| *id as usize));
    let tokens: Vec<usize> = before.take(chosen.len()).collect();
    // By how much a step's choice is less than the greatest; the last one's is known to the bit.
    let mut short = if complete { 0.0 } else { 1.0 };
    for (&id, &token) in chosen.iter().zip(&tokens) {
        let y = head.times(&quantise(&embedded(token)));
        let greatest = y.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        short += match y.get(id as usize) {
            Some(y) => (greatest - y) / greatest.abs().max(1e-30),
            None => 1.0,
        };
    }
    let case = format!("{steps} choices of {vocabulary}");
    b.report(b.decode_kernel, case, short, 1e-4);
    let found = b.take::<f32>("decode", x)?;
    let expected = embedded(tokens.last().copied().unwrap_or(token));
    let expected: Vec<f64> = expected.iter().map(|v| f64::from(*v)).collect();
    b.report(
        b.decode_kernel,
        format!("embedding of {vocabulary}"),
        nmse(&found, &expected),
        F32_LIMIT,
    );
    let logits = b.take::<f32>("decode", logits)?;
    let greatest = (0..vocabulary as u32)
        .rev()
        .max_by(|i, j| logits[*i as usize].total_cmp(&logits[*j as usize]));
    // Of equals the lower id, as everywhere.
    let error = if chosen.last() == greatest.as_ref() {
        0.0
    } else {
        1.0
    };
    b.report(
        b.decode_kernel,
        format!("choice of {vocabulary}"),
        error,
        0.0,
    );
    Ok(())
}
