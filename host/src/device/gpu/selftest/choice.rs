//! Choosing a token: the same choice as the reference, every time.

use super::Driver;
use super::bench::Bench;
use crate::device::gpu::program::bytes;
use crate::error::Result;
use crate::sampling::{self, SamplingParams};
use kernels::draw::{self, Common, DrawArgs, DrawRow};
use kernels::sample::{self, ArgmaxArgs};
use std::ptr;

pub fn run<D: Driver>(b: &mut Bench<'_, D>) -> Result<()> {
    for vocabulary in [1, 33, 5000] {
        check_argmax(b, vocabulary)?;
    }
    let base = SamplingParams {
        temperature: 0.8,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: None,
    };
    for (case, params) in [
        ("temperature", base.clone()),
        (
            "top-k 1",
            SamplingParams {
                top_k: 1,
                ..base.clone()
            },
        ),
        (
            "top-k 40",
            SamplingParams {
                top_k: 40,
                ..base.clone()
            },
        ),
        (
            "top-k 300",
            SamplingParams {
                top_k: 300,
                ..base.clone()
            },
        ),
        (
            "top-k 40, top-p 0.95, min-p 0.05",
            SamplingParams {
                top_k: 40,
                top_p: 0.95,
                min_p: 0.05,
                ..base.clone()
            },
        ),
        (
            "top-p 0.3, hot",
            SamplingParams {
                temperature: 4.0,
                top_p: 0.3,
                ..base.clone()
            },
        ),
        (
            "min-p 0.7",
            SamplingParams {
                min_p: 0.7,
                ..base.clone()
            },
        ),
        (
            "top-p 0.9",
            SamplingParams {
                top_p: 0.9,
                ..base.clone()
            },
        ),
        (
            "min-p 0.2",
            SamplingParams {
                min_p: 0.2,
                ..base.clone()
            },
        ),
        (
            "all",
            SamplingParams {
                temperature: 1.3,
                top_k: 50,
                top_p: 0.8,
                min_p: 0.05,
                repetition_penalty: 1.4,
                ..base.clone()
            },
        ),
        (
            "greedy, penalty",
            SamplingParams {
                temperature: 0.0,
                repetition_penalty: 1.9,
                ..base
            },
        ),
    ] {
        for (vocabulary, blocks) in [(1, 1), (100, 4), (600, 1), (3001, 8), (20_000, 2)] {
            check_draw(b, case, &params, vocabulary, blocks)?;
        }
    }
    Ok(())
}

fn check_argmax<D: Driver>(b: &mut Bench<'_, D>, vocabulary: usize) -> Result<()> {
    let rows = 2;
    let mut logits = b.random.values(rows * vocabulary);
    // A tie: the lower id wins.
    let (i, j) = (b.random.below(vocabulary), b.random.below(vocabulary));
    logits[i] = 9.0;
    logits[j] = 9.0;
    let on = b.upload(&logits)?;
    let partial = b.alloc(rows * sample::ARGMAX_BLOCKS as usize * 8)?;
    let out = b.alloc(rows * 8)?;
    let args = ArgmaxArgs {
        logits: on.ptr(),
        vocabulary: vocabulary as u32,
        partial: partial.ptr(),
        out: out.ptr(),
    };
    let grid = (sample::ARGMAX_BLOCKS, rows as u32);
    b.driver
        .launch("argmax", grid, sample::ARGMAX_THREADS, 256, &args)?;
    b.driver
        .launch("argmax_final", (rows as u32, 1), 32, 256, &args)?;
    b.take::<u64>("argmax", partial)?;
    let found = b.take::<u64>("argmax_final", out)?;
    let wrong = logits
        .chunks(vocabulary)
        .zip(&found)
        .filter(|(row, found)| u64::from(sampling::argmax(row)) != **found)
        .count();
    b.report(
        "argmax",
        format!("{vocabulary}, choices"),
        wrong as f64,
        0.0,
    );
    b.report(
        "argmax_final",
        format!("{vocabulary}, choices"),
        wrong as f64,
        0.0,
    );
    Ok(())
}

/// Six rows at once, each of so many blocks.
fn check_draw<D: Driver>(
    b: &mut Bench<'_, D>,
    case: &str,
    params: &SamplingParams,
    vocabulary: usize,
    blocks: u32,
) -> Result<()> {
    const DRAWS: usize = 6;
    /// Stands above the choice.
    const NUMBER: u32 = 7;
    let work = b.alloc(4 * vocabulary * DRAWS)?;
    let common = b.alloc(size_of::<Common>() * DRAWS)?;
    let arrived = b.upload(&[0u32; DRAWS])?;
    let out = b.alloc(8 * DRAWS)?;
    let next = b.alloc(2 * 8 * DRAWS)?;
    let mut rows = Vec::new();
    let mut expected = Vec::new();
    let mut held = Vec::new();
    let mut lists = Vec::new();
    for draw in 0..DRAWS {
        // Coarse values give ties at every threshold.
        let mut logits: Vec<f32> = b
            .random
            .values(vocabulary)
            .iter()
            .map(|v| (v * 24.0).round() / 2.0)
            .collect();
        if draw == 1 {
            logits[0] = f32::NAN;
        }
        // Of different numbers, and none in one row; some more than once.
        let mut seen: Vec<u32> = (0..40 * draw)
            .map(|_| b.random.below(vocabulary) as u32)
            .collect();
        let seen_on = b.upload(&[&seen[..], &[u32::MAX]].concat())?;
        // One more lies elsewhere.
        let last = (draw % 2 == 1).then(|| b.random.below(vocabulary) as u32);
        let last_on = b.upload(&[last.map_or(0, |id| (9 << 32) | u64::from(id))])?;
        let seen_len = seen.len() as u32;
        seen.extend(last);
        let u = if draw == 0 {
            0.0
        } else {
            (b.random.next() >> 40) as f32 / (1 << 24) as f32
        };
        // Not the same for all.
        let mut params = params.clone();
        if draw == 3 && params.temperature > 0.0 {
            params.temperature *= 2.0;
            params.top_k /= 2;
        }
        let on = b.upload(&logits)?;
        rows.push(DrawRow {
            logits: on.ptr(),
            work: work.ptr::<f32>().wrapping_add(draw * vocabulary),
            common: common.ptr::<Common>().wrapping_add(draw),
            arrived: arrived.ptr::<u32>().wrapping_add(draw),
            seen: seen_on.ptr(),
            last: match last {
                Some(_) => last_on.ptr(),
                None => ptr::null(),
            },
            out: out.ptr::<u64>().wrapping_add(draw),
            next: match draw {
                0 => ptr::null_mut(),
                _ => next.ptr::<u64>().wrapping_add(2 * draw),
            },
            number: NUMBER,
            vocabulary: vocabulary as u32,
            seen_len,
            penalty: params.repetition_penalty,
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: sampling::fraction(params.top_p),
            min_p: sampling::fraction(params.min_p),
            u: sampling::fraction(u),
        });
        held.extend([on, last_on]);
        let added = params.repetition_penalty != 1.0;
        lists.push((seen_on, if added { last } else { None }));
        let id = sampling::sample(&params, u, &seen, &mut logits);
        expected.push((u64::from(NUMBER) << 32) | u64::from(id));
    }
    let rows_on = b.upload(bytes(&rows))?;
    let args = DrawArgs {
        rows: rows_on.ptr(),
        blocks,
    };
    let grid = DRAWS as u32 * blocks;
    b.driver
        .launch_cooperative("draw", grid, draw::THREADS, draw::SHARED, &args)?;
    b.take::<f32>("draw", work)?;
    b.take::<u64>("draw", common)?;
    b.take::<u32>("draw", arrived)?;
    b.take::<u8>("draw", rows_on)?;
    let found = b.take::<u64>("draw", out)?;
    let passed_on = b.take::<u64>("draw", next)?;
    for memory in held {
        b.take::<u32>("draw", memory)?;
    }
    let mut wrong = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
    wrong += (2..2 * DRAWS)
        .filter(|&i| passed_on[i] != expected[i / 2])
        .count();
    // Who is drawn next must know it.
    for (seen, last) in lists {
        let list = b.take::<u32>("draw", seen)?;
        wrong += usize::from(list.last() != Some(&last.unwrap_or(u32::MAX)));
    }
    let case = format!("{case}, {vocabulary} among {blocks}, choices of {DRAWS} rows");
    b.report("draw", case, wrong as f64, 0.0);
    Ok(())
}
