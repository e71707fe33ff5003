//! The whole line, checked: a worker writes a haiku about the current minute, and proves that a model
//! wrote it just now.
//!
//! [`run`] starts a worker on a free port and asks it over HTTP, as anybody would. The minute (in
//! words, in the answer) and the nonce (in the prompt) cannot be known beforehand, so an answer prepared
//! before cannot have the minute. And the worker's first logits must be those that a second forward
//! pass through the library computes for this very prompt, nonce included.

mod attempt;
mod client;
mod report;
mod words;

pub use attempt::{Asked, Attempt, Check};
pub use client::Received;
pub use report::Report;
pub use words::{count_word, minute_in_words};

use crate::catalog::{self, Catalog};
use crate::cli::load_with_progress;
use crate::engine::{Engine, EngineConfig, ModelText};
use crate::error::{Error, Result};
use crate::model::LoadOptions;
use gguf::Gguf;
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// How to run the check.
#[derive(Clone, Debug)]
pub struct Options {
    /// A catalog name or a path; `None` for the catalog's default.
    pub model: Option<String>,
    pub load: LoadOptions,
    /// Fail where the worker's device is no GPU.
    pub require_gpu: bool,
    /// The folder that gets a folder for each run.
    pub results: PathBuf,
}

/// Runs the check, shows on `out` what happens, writes the artifacts. The report says whether it
/// passed.
///
/// # Errors
/// Only what keeps the check from being made: no model, no device, a folder that cannot be written.
pub fn run(options: &Options, out: &mut dyn Write) -> Result<Report> {
    let default = || Catalog::builtin().default_model().name.as_str();
    let path = catalog::resolve(options.model.as_deref().unwrap_or_else(default))?;
    let file = Arc::new(Gguf::open(path)?);
    let text = Arc::new(ModelText::from_gguf(&file)?);
    let loaded = load_with_progress(&file, &options.load)?;
    let (runner, load_s) = (loaded.runner, loaded.seconds);
    let device = runner.device().clone();
    let model = runner.info().clone();
    if options.require_gpu && device.backend != "cuda" {
        return Err(Error::NoDevice(format!(
            "a GPU is required here, but the model is on {} ({}); install a driver, or run the check \
             that does not ask for a GPU",
            device.name, device.backend
        )));
    }
    say(
        out,
        &format!("{} on {} ({})\n", model.name, device.name, device.backend),
    )?;

    let engine =
        Engine::start(runner, text.clone(), EngineConfig::default()).map_err(|source| {
            Error::Io {
                path: "the engine's thread".into(),
                source,
            }
        })?;
    let nonce = nonce();
    let runtime = tokio::runtime::Runtime::new().map_err(|source| Error::Io {
        path: "the async runtime".into(),
        source,
    })?;
    let mut asked = runtime.block_on(attempt::ask(engine, &nonce, out))?;
    drop(runtime);

    if let Some(attempt) = asked.attempts.last_mut() {
        say(out, "second forward pass through the library ...\n")?;
        attempt.compare_logits(&file, &text, &options.load)?;
    }
    let report = Report {
        nonce,
        load_s,
        device,
        model,
        exact: options.load.exact,
        asked,
    };
    let folder = report.write(&options.results)?;
    say(out, &report.screen(&folder))?;
    Ok(report)
}

fn say(out: &mut dyn Write, text: &str) -> Result<()> {
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(crate::cli::stdout_error)
}

/// Eight characters that no earlier run can have known.
fn nonce() -> String {
    const ALPHABET: &[u8] = b"abcdefghjkmnpqrstuvwxyz23456789";
    // RandomState keys come from the system's randomness.
    let mut random = RandomState::new().hash_one(Instant::now());
    (0..8)
        .map(|_| {
            let letter = ALPHABET[(random % ALPHABET.len() as u64) as usize];
            random /= ALPHABET.len() as u64;
            char::from(letter)
        })
        .collect()
}
