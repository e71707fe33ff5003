//! `kigo bench`: seconds to load, tokens per second of prefill and decode.

use super::generate::in_range;
use super::sequences::{self, Sequences};
use super::{Common, load, positive, print_json, profile, roofline, stdout_error, synthetic};
use crate::engine::Direct;
use crate::error::{Error, Result};
use crate::model::{self, Runner};
use crate::sampling::SamplingParams;
use clap::Args;
use gguf::Gguf;
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// Prompt tokens of the prefill test; 0 leaves it out
    #[arg(short, long, value_name = "P", default_value_t = 512)]
    prompt: usize,
    /// Tokens to generate in the decode test; 0 leaves it out
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    generate: usize,
    /// Times each test is measured, after one warm-up
    #[arg(short, long, value_name = "R", default_value_t = 5, value_parser = positive)]
    repetitions: usize,
    /// Tokens already in the cache when the decode test starts
    #[arg(long, value_name = "D", default_value_t = 0)]
    depth: usize,
    /// Sequences that decode together in the decode test, a token of each in a step
    #[arg(long, value_name = "S", default_value_t = 1, value_parser = positive)]
    sequences: usize,
    /// Draw the decode test's tokens at this temperature with the default filters, rather than take the likeliest
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.0,
        conflicts_with = "sequences"
    )]
    temperature: f32,
    /// Measure random weights in the shape of a model instead of --model: NAME is one of
    /// smollm2-135m-q4_1, qwen2.5-0.5b-q4_k_m, qwen2.5-1.5b-q4_k_m, llama-8b-q4_k_m,
    /// qwen3-0.6b-q8_0, qwen3-8b-q4_k_m, llama-1b-f16.
    /// The file is made in the cache folder (~/.cache/kigo/synthetic) and stays there
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    synthetic: Option<String>,
    /// Measure also how long after the start of the process the token after the prompt is there
    #[arg(long)]
    first_token: bool,
    /// Time each operation of a decode step, by the device's clock (GPUs only): how long it waited and worked, the
    /// bytes that it read, and how near that came to the memory's bandwidth; and what a hand-off takes, in which all
    /// multiprocessors get what each has written, as between any two operations
    #[arg(long)]
    profile: bool,
    /// Draw what --profile measures as a roofline, an SVG: operations a second over operations a byte, under what
    /// the memory allows
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

pub(super) fn run(common: &Common, args: &BenchArgs, out: &mut dyn Write) -> Result<()> {
    let file = match &args.synthetic {
        Some(name) => {
            model::prepare(common.device);
            Arc::new(Gguf::open(synthetic::file(name)?)?)
        }
        None => load::open_to_run(common)?,
    };
    let sampling = in_range(SamplingParams {
        temperature: args.temperature,
        ..SamplingParams::default()
    })?;
    let profiled = args.profile || args.plot.is_some();
    let steps = if profiled { profile::TOKENS } else { 0 };
    let decoded = args.depth + args.generate.max(steps) + 1;
    let tokens = args.prompt.max(decoded);
    let cache = sequences::cache_tokens(args.sequences, decoded);
    let loaded = load::load_for(common, &file, tokens, cache)?;
    if let Some(file) = &args.plot {
        // Known before minutes of measuring.
        let device = loaded.runner.device();
        if device.backend == "cpu" || common.exact {
            return Err(no_plot(file, &device.name));
        }
    }
    let (load_s, open_s) = (loaded.seconds, loaded.open_seconds);
    let (weights_s, gb_per_s) = (loaded.weights_seconds, loaded.gb_per_s());
    let mut direct = Direct::new(loaded.runner);
    let vocabulary = direct.runner().info().vocabulary as u64;
    let mut random = Random(0x4b69_676f);
    let mut ids = |n: usize| -> Vec<u32> {
        (0..n)
            .map(|_| (random.next() % vocabulary) as u32)
            .collect()
    };

    let mut ttft_s = None;
    if args.first_token {
        let prompt = ids(args.prompt.max(1));
        direct.feed(&prompt)?;
        direct.sample_greedy()?;
        ttft_s = Some(super::process_age().as_secs_f64());
    }
    let mut prefill = Vec::new();
    if args.prompt > 0 {
        for repetition in 0..=args.repetitions {
            let prompt = ids(args.prompt);
            direct.reset();
            let started = Instant::now();
            direct.feed(&prompt)?;
            // Choosing a token waits for the device.
            direct.sample_greedy()?;
            if repetition > 0 {
                prefill.push(args.prompt as f64 / started.elapsed().as_secs_f64());
            }
        }
    }
    let mut decode = Vec::new();
    if args.generate > 0 && args.sequences > 1 {
        for repetition in 0..=args.repetitions {
            let (prompt, first) = (ids(args.depth), ids(args.sequences));
            let runner = direct.runner_mut();
            let mut all = Sequences::new(runner, args.sequences, decoded, first)?;
            all.feed(&prompt)?;
            let rate = all.measure(args.generate)?;
            if repetition > 0 {
                decode.push(rate);
            }
        }
        direct.reset();
    } else if args.generate > 0 {
        for repetition in 0..=args.repetitions {
            direct.reset();
            let depth = ids(args.depth);
            direct.feed(&depth)?;
            if args.depth > 0 {
                direct.sample_greedy()?;
            }
            let mut id = ids(1)[0];
            let started = Instant::now();
            for left in (1..args.generate).rev() {
                direct.feed(&[id])?;
                id = direct.sample_ahead(&sampling, left)?;
            }
            direct.feed(&[id])?;
            direct.sample_ahead(&sampling, 0)?;
            if repetition > 0 {
                decode.push(args.generate as f64 / started.elapsed().as_secs_f64());
            }
        }
    }

    let profile = if profiled {
        profile::measure(&mut direct, args.depth, ids(1)[0])?
    } else {
        Vec::new()
    };
    // Only where a step has any.
    let hand_offs = if profile.is_empty() {
        Vec::new()
    } else {
        direct.hand_offs()?
    };

    let runner = direct.runner();
    let (model, device) = (runner.info(), runner.device());
    if common.json {
        let value = json!({
            "device": device.name,
            "backend": device.backend,
            "architecture": device.architecture,
            "model": model.name,
            "file_bytes": model.file_bytes,
            "exact": common.exact,
            "load_s": load_s,
            "open_s": open_s,
            "weights_s": weights_s,
            "weights_gb_per_s": gb_per_s,
            "ttft_s": ttft_s,
            "depth": args.depth,
            "sequences": args.sequences,
            "temperature": args.temperature,
            "pp": { "n": args.prompt, "tokens_per_s": prefill },
            "tg": { "n": args.generate, "tokens_per_s": decode },
            "memory_bytes_per_s": device.memory_bytes_per_s,
            "profile": profile,
            "hand_offs": hand_offs,
        });
        print_json(out, &value)?;
        return plot(args, &profile, direct.runner());
    }
    let mut report = format!(
        "{} on {} ({}, {})\nload     {load_s:.2} s: device {open_s:.2} s, weights {weights_s:.3} s at \
         {gb_per_s:.2} GB/s\n",
        model.name, device.name, device.backend, device.architecture,
    );
    if let Some(ttft_s) = ttft_s {
        let n = args.prompt.max(1);
        report.push_str(&format!(
            "first    {ttft_s:.2} s from the start of the process to the token after {n}\n"
        ));
    }
    for (name, n, rates) in [
        ("pp", args.prompt, &prefill),
        ("tg", args.generate, &decode),
    ] {
        if let Some((mean, deviation)) = mean_and_deviation(rates) {
            let drawn = match args.temperature {
                t if name == "tg" && t > 0.0 => format!(" at temperature {t}"),
                _ => String::new(),
            };
            report.push_str(&format!(
                "{name}{n:<6} {mean:.1} ± {deviation:.1} tokens/s{drawn}\n"
            ));
        }
    }
    if profiled {
        report.push_str(&profile::table(&profile, device.memory_bytes_per_s));
        report.push_str(&profile::hand_offs(&hand_offs));
    }
    write!(out, "{report}").map_err(stdout_error)?;
    plot(args, &profile, direct.runner())
}

fn no_plot(file: &Path, device: &str) -> Error {
    Error::Request(format!(
        "--plot: nothing to draw on {device}, {} is not written: {}",
        file.display(),
        profile::NOT_TIMED
    ))
}

/// Writes the file of --plot, if it is asked for. Comes last, so that what was measured is told whatever becomes of
/// the file.
fn plot(args: &BenchArgs, profile: &[profile::Row], runner: &dyn Runner) -> Result<()> {
    let Some(file) = &args.plot else {
        return Ok(());
    };
    let device = runner.device();
    if profile.is_empty() {
        return Err(no_plot(file, &device.name));
    }
    let svg = roofline::Roofline {
        model: &runner.info().name,
        device: &device.name,
        depth: args.depth,
        memory_bytes_per_s: device.memory_bytes_per_s,
        operations: profile,
    }
    .svg()?;
    std::fs::write(file, svg).map_err(|source| Error::Io {
        path: file.clone(),
        source,
    })
}

/// Mean and sample standard deviation.
fn mean_and_deviation(values: &[f64]) -> Option<(f64, f64)> {
    if values.is_empty() {
        return None;
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    Some((mean, (squares / (n - 1.0).max(1.0)).sqrt()))
}

/// SplitMix64 (Steele et al. 2014): every run measures the same ids.
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_deviation_of_known_values() {
        assert_eq!(mean_and_deviation(&[]), None);
        assert_eq!(mean_and_deviation(&[3.0]), Some((3.0, 0.0)));
        assert_eq!(mean_and_deviation(&[1.0, 2.0, 3.0]), Some((2.0, 1.0)));
    }

    /// The reference sequence for seed 1234567, from the algorithm's published test values.
    #[test]
    fn random_numbers_are_splitmix64() {
        let mut random = Random(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| random.next()).collect();
        assert_eq!(
            first,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }
}
