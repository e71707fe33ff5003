//! From what the user named to a model on its device.

use super::Common;
use crate::catalog::{self, Catalog};
use crate::engine::{Engine, EngineHandle, ModelText};
use crate::error::{Error, Result};
use crate::model::{self, DEFAULT_CONTEXT, LoadOptions, Runner};
use crate::tokenizer;
use gguf::Gguf;
use indicatif::{ProgressBar, ProgressStyle};
use std::sync::Arc;
use std::time::Instant;

/// The file behind a catalog name or path.
pub(super) fn open_named(name_or_path: &str) -> Result<Gguf> {
    Ok(Gguf::open(catalog::resolve(name_or_path)?)?)
}

/// The file of `--model`, or of the catalog's default.
pub(super) fn open(common: &Common) -> Result<Arc<Gguf>> {
    let default = || Catalog::builtin().default_model().name.as_str();
    let name = common.model.as_deref().unwrap_or_else(default);
    Ok(Arc::new(open_named(name)?))
}

/// A model on its device.
pub(super) struct Loaded {
    pub runner: Box<dyn Runner>,
    /// Seconds from the open file to a model that is ready.
    pub seconds: f64,
}

/// Loads what the common flags say. The context grows to `tokens` where `--ctx-size` does not say
/// otherwise.
pub(super) fn load(common: &Common, file: &Arc<Gguf>, tokens: usize) -> Result<Loaded> {
    tokenizer::check(file.metadata())?;
    let started = Instant::now();
    let runner = load_with_progress(file, &common.load_options(tokens))?;
    Ok(Loaded {
        runner,
        seconds: started.elapsed().as_secs_f64(),
    })
}

impl Common {
    fn load_options(&self, tokens: usize) -> LoadOptions {
        let needed = (tokens > DEFAULT_CONTEXT).then_some(tokens);
        LoadOptions {
            device: self.device,
            exact: self.exact,
            threads: self.threads,
            context: self.ctx_size.or(needed),
        }
    }
}

/// Loads a model with a progress bar on stderr, where that is a terminal.
pub(crate) fn load_with_progress(
    file: &Arc<Gguf>,
    options: &LoadOptions,
) -> Result<Box<dyn Runner>> {
    let style = ProgressStyle::with_template(
        "loading {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec}",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar());
    // indicatif draws on stderr, and only on a terminal.
    let bar = ProgressBar::new(0).with_style(style);
    let started = Instant::now();
    let mut bytes = 0;
    let runner = model::load(file, options, &mut |progress| {
        bytes = progress.bytes;
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.bytes);
    });
    bar.finish_and_clear();
    let runner = runner?;
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(
        model = runner.info().name,
        device = runner.device().name,
        seconds = format!("{seconds:.2}"),
        gb_per_s = format!("{:.2}", bytes as f64 / seconds / 1e9),
        "loaded"
    );
    Ok(runner)
}

/// Loads the model and starts an engine on it.
pub(super) fn engine(common: &Common, file: &Arc<Gguf>, tokens: usize) -> Result<EngineHandle> {
    let text = Arc::new(ModelText::from_gguf(file)?);
    let loaded = load(common, file, tokens)?;
    start(loaded.runner, text)
}

/// Starts an engine.
pub(super) fn start(runner: Box<dyn Runner>, text: Arc<ModelText>) -> Result<EngineHandle> {
    Engine::start(runner, text).map_err(|source| Error::Io {
        path: "the engine's thread".into(),
        source,
    })
}
