//! The command line: one file a command, or a few that belong together.
//!
//! Results go to stdout, everything else to stderr. With `--json` stdout gets exactly one JSON object.

mod accuracy;
mod bench;
mod chat;
mod generate;
pub mod inspect;
mod load;
mod logits;
mod logs;
pub mod models;
pub mod profile;
mod ptx;
mod quantize;
mod roofline;
mod sequences;
mod serve;
mod serve_config;
mod synthetic;
mod tensor;
mod text;

pub(crate) use load::load_with_progress;

use crate::device::CacheType;
use crate::error::{Error, Result};
use crate::model::{DeviceChoice, LoraSource};
use clap::{Args, Parser, Subcommand};
use serde_json::Value;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Runs GGUF language models on a GPU or a CPU.
#[derive(Debug, Parser)]
#[command(name = "kigo", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// What every command understands.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Common options")]
pub struct Common {
    /// A name from `kigo models list`, a path to a GGUF file, or hf:OWNER/REPO[:FILE|:QUANT]
    #[arg(long, global = true, env = "KIGO_MODEL", value_name = "NAME|PATH|HUB")]
    pub model: Option<String>,
    /// auto, cuda, cuda:N, cpu or emulated
    #[arg(long, global = true, env = "KIGO_DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Activations and cache in f32 throughout: slower, and as close to the file as it gets
    #[arg(long, global = true, env = "KIGO_EXACT")]
    pub exact: bool,
    /// CPU threads [default: all cores]
    #[arg(long, global = true, env = "KIGO_THREADS", value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
    /// Tokens of prompt and answer together [default: the model's own, at most 4096]
    #[arg(long, global = true, env = "KIGO_CTX_SIZE", value_name = "N", value_parser = positive)]
    pub ctx_size: Option<usize>,
    /// What the KV cache is made of: f16, q8_0 or f32 [default: f16; f32 with --exact]
    #[arg(long, global = true, env = "KIGO_CACHE_TYPE", value_name = "TYPE")]
    pub cache_type: Option<CacheType>,
    /// A LoRA adapter, and by how much it counts; may be given more than once
    #[arg(long, global = true, value_name = "FILE[:SCALE]")]
    pub lora: Vec<LoraSource>,
    /// Render chats as ChatML where the model's own template is missing or fails
    #[arg(long, global = true, env = "KIGO_TEMPLATE_FALLBACK")]
    pub template_fallback: bool,
    /// Print one JSON object on stdout and nothing else
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Chat in the terminal
    Run(chat::RunArgs),
    /// Generate once
    Generate(generate::GenerateArgs),
    /// Serve requests over HTTP
    Serve(Box<serve_config::ServeArgs>),
    /// Turn the text on stdin into token ids
    Tokenize(text::TokenizeArgs),
    /// Turn token ids into text
    Detokenize(text::DetokenizeArgs),
    /// Render the model's chat template for the JSON on stdin:
    /// {"messages", "tools"?, "add_generation_prompt"?}
    ChatTemplate,
    /// The logits after a sequence of ids
    Logits(logits::LogitsArgs),
    /// The negative log-likelihood of a sequence of ids
    Perplexity(logits::PerplexityArgs),
    /// Show a GGUF file's metadata and tensors
    Inspect {
        /// A GGUF file, or a name from `kigo models list`
        file: String,
    },
    /// Print a tensor's values, dequantised
    Tensor {
        /// A GGUF file, or a name from `kigo models list`
        file: String,
        /// The tensor's name
        name: String,
        /// The first value to print
        #[arg(long, default_value_t = 0, value_name = "O")]
        offset: u64,
        /// How many values to print [default: the rest]
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// Turn a file of F32, F16 or BF16 weights into one of quantised blocks
    Quantize(quantize::QuantizeArgs),
    /// Models known by name
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Hold the models of a folder against their reference logits, on every device that is here
    Accuracy(accuracy::AccuracyArgs),
    /// Measure loading, prefill and decode
    Bench(bench::BenchArgs),
    /// The kernels in this binary
    #[command(subcommand)]
    Ptx(PtxCommand),
    /// Run every kernel on a device and compare it with the CPU reference
    Selftest {
        /// Let the kernel decode's steps end at barriers that compute-sanitizer's racecheck can follow
        #[arg(long)]
        racecheck: bool,
    },
}

#[derive(Debug, Subcommand)]
enum ModelsCommand {
    /// List them, and say which are here
    List,
    /// Download one, with its sha256 checked
    Fetch {
        /// A name from the list, or hf:OWNER/REPO[:FILE|:QUANT]
        name: String,
    },
}

#[derive(Debug, Subcommand)]
enum PtxCommand {
    /// Name every kernel
    List,
    /// Print a kernel's PTX
    Show {
        /// A name from the list
        name: String,
    },
    /// What each kernel asks of the hardware
    Stats,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("expected a whole number above 0".to_owned()),
    }
}

/// When [`main`] began: what the system does before it, loading the binary, takes a millisecond or two.
static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);

/// How long this process has run.
fn process_age() -> Duration {
    STARTED.elapsed()
}

/// Runs the command line of this process: exit code 0, 1 for an error, 2 for wrong usage.
pub fn main() -> ExitCode {
    LazyLock::force(&STARTED);
    let cli = Cli::parse();
    // The worker's logs depend on its settings.
    if !matches!(cli.command, Command::Serve(_)) {
        logs::init(false, false);
    }
    match run(&cli) {
        Ok(code) => code,
        // `kigo ... | head` has read what it wanted.
        Err(Error::Io { path, source })
            if path == Path::new(STDOUT) && source.kind() == ErrorKind::BrokenPipe =>
        {
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let common = &cli.common;
    let out: &mut dyn Write = &mut std::io::stdout();
    match &cli.command {
        Command::Run(args) => chat::run(common, args)?,
        Command::Generate(args) => generate::run(common, args, out)?,
        Command::Serve(args) => serve::run(common, args, out)?,
        Command::Tokenize(args) => text::tokenize(common, args, out)?,
        Command::Detokenize(args) => text::detokenize(common, args, out)?,
        Command::ChatTemplate => text::chat_template(common, out)?,
        Command::Logits(args) => logits::logits(common, args, out)?,
        Command::Perplexity(args) => logits::perplexity(common, args, out)?,
        Command::Inspect { file } => {
            let file = std::sync::Arc::new(load::open_named(file)?);
            let verdicts = crate::model::verdicts(&file, &common.load_options(0));
            inspect::inspect(&file, &verdicts, common.json, out).map_err(stdout_error)?;
        }
        Command::Tensor {
            file,
            name,
            offset,
            count,
        } => {
            let file = load::open_named(file)?;
            tensor::tensor(&file, name, *offset, *count, common.json, out)?;
        }
        Command::Quantize(args) => quantize::run(common, args, out)?,
        Command::Models(ModelsCommand::List) => models::list(common.json)?,
        Command::Models(ModelsCommand::Fetch { name }) => models::fetch(name, common.json)?,
        Command::Accuracy(args) => {
            if !accuracy::run(common, args, out)? {
                out.flush().map_err(stdout_error)?;
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Bench(args) => bench::run(common, args, out)?,
        Command::Ptx(PtxCommand::List) => ptx::list(common.json, out)?,
        Command::Ptx(PtxCommand::Show { name }) => ptx::show(name, common.json, out)?,
        Command::Ptx(PtxCommand::Stats) => ptx::stats(common.json, out)?,
        Command::Selftest { racecheck } => {
            if !selftest(common, *racecheck, out)? {
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    out.flush().map_err(stdout_error)?;
    Ok(ExitCode::SUCCESS)
}

/// Whether every kernel is right; a line for each, or all lines in one object.
fn selftest(common: &Common, racecheck: bool, out: &mut dyn Write) -> Result<bool> {
    if !common.json {
        return crate::device::gpu::selftest(common.device, racecheck, out);
    }
    let mut text = Vec::new();
    let passed = crate::device::gpu::selftest(common.device, racecheck, &mut text)?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    print_json(
        out,
        &serde_json::json!({ "passed": passed, "lines": lines }),
    )?;
    Ok(passed)
}

const STDOUT: &str = "stdout";

/// For `map_err` of writes to stdout; [`main`] knows a closed pipe by it.
pub(crate) fn stdout_error(source: std::io::Error) -> Error {
    Error::Io {
        path: STDOUT.into(),
        source,
    }
}

/// The one JSON object of `--json`.
fn print_json(out: &mut dyn Write, value: &Value) -> Result<()> {
    writeln!(out, "{value}").map_err(stdout_error)
}

/// All of stdin, or an error that says what it is for.
fn read_stdin(what: &str) -> Result<String> {
    let text = std::io::read_to_string(std::io::stdin());
    text.map_err(|source| match source.kind() {
        ErrorKind::InvalidData => {
            Error::Request(format!("{what} on stdin is not UTF-8; nothing was done"))
        }
        _ => Error::Io {
            path: "stdin".into(),
            source,
        },
    })
}

fn read_file(path: &PathBuf) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| Error::Io {
        path: path.clone(),
        source,
    })
}

/// JSON from `text`, or an error that names where it came from.
fn parse_json<T: serde::de::DeserializeOwned>(
    text: &str,
    origin: &str,
    expected: &str,
) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|e| Error::Request(format!("{origin}: {e}; expected {expected}")))
}

#[cfg(test)]
mod tests;
