//! `cargo run --release --example haiku`: a worker writes a haiku about this minute, and proves it.
//!
//! See [`kigo::haiku`] for what is checked.

use clap::Parser;
use kigo::haiku::{self, Options};
use kigo::model::{DeviceChoice, LoadOptions};
use std::path::PathBuf;
use std::process::ExitCode;

/// Starts a worker, asks it for a haiku about this minute, and checks the answer.
#[derive(Parser)]
struct Args {
    /// A name from `kigo models list`, or a path to a GGUF file
    #[arg(long, env = "KIGO_MODEL", value_name = "NAME|PATH")]
    model: Option<String>,
    /// auto, cuda, cuda:N, cpu or emulated
    #[arg(long, env = "KIGO_DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// Activations and cache in f32 throughout
    #[arg(long)]
    exact: bool,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Where the artifacts go
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../.test-results/haiku"))]
    results: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let options = Options {
        model: args.model,
        load: LoadOptions {
            device: args.device,
            exact: args.exact,
            threads: args.threads,
            ..LoadOptions::default()
        },
        require_gpu: false,
        results: args.results,
    };
    match haiku::run(&options, &mut std::io::stdout()) {
        Ok(report) if report.passed() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
