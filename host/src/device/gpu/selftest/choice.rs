//! Choosing a token: the same choice as the reference, every time.

use super::Driver;
use super::bench::Bench;
use crate::error::Result;
use crate::sampling::{self, SamplingParams};
use kernels::sample::{self, ArgmaxArgs, DrawArgs};

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
        for vocabulary in [1, 100, 3001] {
            check_draw(b, case, &params, vocabulary)?;
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
    let out = b.alloc(rows * 4)?;
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
    let found = b.take::<u32>("argmax_final", out)?;
    let wrong = logits
        .chunks(vocabulary)
        .zip(&found)
        .filter(|(row, found)| sampling::argmax(row) != **found)
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

fn check_draw<D: Driver>(
    b: &mut Bench<'_, D>,
    case: &str,
    params: &SamplingParams,
    vocabulary: usize,
) -> Result<()> {
    let draws = 6;
    let mut wrong = 0;
    for draw in 0..draws {
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
        let mut seen: Vec<u32> = (0..7).map(|_| b.random.below(vocabulary) as u32).collect();
        seen.sort_unstable();
        seen.dedup();
        let u = if draw == 0 {
            0.0
        } else {
            (b.random.next() >> 40) as f32 / (1 << 24) as f32
        };
        let (on, seen_on) = (b.upload(&logits)?, b.upload(&seen)?);
        let work = b.alloc(4 * vocabulary)?;
        let out = b.alloc(4)?;
        let args = DrawArgs {
            logits: on.ptr(),
            work: work.ptr(),
            vocabulary: vocabulary as u32,
            seen: seen_on.ptr(),
            seen_len: seen.len() as u32,
            penalty: params.repetition_penalty,
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: sampling::fraction(params.top_p),
            min_p: sampling::fraction(params.min_p),
            u: sampling::fraction(u),
            out: out.ptr(),
        };
        let grid = (vocabulary.div_ceil(64) as u32, 1);
        b.driver.launch("scale_logits", grid, 64, 0, &args)?;
        b.driver.launch("penalise", (1, 1), 64, 0, &args)?;
        b.driver.launch(
            "draw",
            (1, 1),
            sample::DRAW_THREADS,
            sample::DRAW_SHARED,
            &args,
        )?;
        b.take::<f32>("draw", work)?;
        let found = b.take::<u32>("draw", out)?[0];
        let expected = sampling::sample(params, u, &seen, &mut logits);
        wrong += usize::from(found != expected);
    }
    for kernel in ["draw", "penalise", "scale_logits"] {
        let case = format!("{case}, {vocabulary}, choices of {draws}");
        b.report(kernel, case, wrong as f64, 0.0);
    }
    Ok(())
}
