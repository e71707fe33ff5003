//! From what the user named to a model on its device.

use super::Common;
use crate::catalog::{self, Catalog};
use crate::engine::{Engine, EngineConfig, EngineHandle, ModelText};
use crate::error::{Error, Result};
use crate::model::{self, CacheSize, DEFAULT_CONTEXT, LoadOptions, LoadProgress, Runner};
use crate::tokenizer::{self, ChatTemplate};
use gguf::Gguf;
use indicatif::{ProgressBar, ProgressStyle};
use std::sync::Arc;
use std::time::Instant;

/// The file behind a catalog name, a path, or a reference to the hub, which is downloaded if it is not here.
pub(super) fn open_named(name_or_path: &str) -> Result<Gguf> {
    if name_or_path.starts_with(catalog::hub::PREFIX) {
        return Ok(Gguf::open(super::models::hub_file(name_or_path)?)?);
    }
    Ok(Gguf::open(catalog::resolve(name_or_path)?)?)
}

/// As [`open`], for a command that runs the model: its device is opened meanwhile.
pub(super) fn open_to_run(common: &Common) -> Result<Arc<Gguf>> {
    model::prepare(common.device);
    open(common)
}

/// The file of `--model`, or of the catalog's default.
pub(super) fn open(common: &Common) -> Result<Arc<Gguf>> {
    let default = || Catalog::builtin().default_model().name.as_str();
    let name = common.model.as_deref().unwrap_or_else(default);
    Ok(Arc::new(open_named(name)?))
}

/// A model on its device.
pub(crate) struct Loaded {
    pub runner: Box<dyn Runner>,
    /// Seconds from the open file to a model that is ready.
    pub seconds: f64,
    /// Of them, those until the device was open: driver, context, kernels.
    pub open_seconds: f64,
    /// Of them, those in which the weights went to the device.
    pub weights_seconds: f64,
    /// Size of the weights in the file.
    pub weights_bytes: u64,
}

impl Loaded {
    /// Speed of the weights on their way to the device.
    pub fn gb_per_s(&self) -> f64 {
        self.weights_bytes as f64 / self.weights_seconds.max(1e-9) / 1e9
    }
}

/// Loads what the common flags say. The context grows to `tokens` where `--ctx-size` does not say
/// otherwise.
pub(super) fn load(common: &Common, file: &Arc<Gguf>, tokens: usize) -> Result<Loaded> {
    tokenizer::check(file.metadata())?;
    load_with_progress(file, &common.load_options(tokens))
}

/// As [`load`], with a cache for `cache` tokens.
pub(super) fn load_for(
    common: &Common,
    file: &Arc<Gguf>,
    tokens: usize,
    cache: usize,
) -> Result<Loaded> {
    tokenizer::check(file.metadata())?;
    let options = common.load_options(tokens);
    let cache = match cache > tokens {
        true => CacheSize::UpTo(cache),
        false => options.cache,
    };
    load_with_progress(file, &LoadOptions { cache, ..options })
}

impl Common {
    /// What renders chats where the model's own template is missing or fails, if that is wanted.
    pub(super) fn template_fallback(&self) -> Option<ChatTemplate> {
        self.template_fallback.then(ChatTemplate::chatml)
    }

    pub(super) fn load_options(&self, tokens: usize) -> LoadOptions {
        let needed = (tokens > DEFAULT_CONTEXT).then_some(tokens);
        LoadOptions {
            device: self.device,
            exact: self.exact,
            threads: self.threads,
            context: self.ctx_size.or(needed),
            cache_type: self.cache_type,
            adapters: self.lora.clone(),
            ..LoadOptions::default()
        }
    }
}

/// Loads a model with a progress bar on stderr, where that is a terminal.
pub(crate) fn load_with_progress(file: &Arc<Gguf>, options: &LoadOptions) -> Result<Loaded> {
    load_observed(file, options, &|_| {})
}

/// As [`load_with_progress`], for one who wants to know how far it has come.
fn load_observed(
    file: &Arc<Gguf>,
    options: &LoadOptions,
    observe: &dyn Fn(LoadProgress),
) -> Result<Loaded> {
    let style = ProgressStyle::with_template(
        "loading {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec}",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar());
    // indicatif draws on stderr, and only on a terminal.
    let bar = ProgressBar::new(0).with_style(style);
    let started = Instant::now();
    // When the device was open and when it had the weights.
    let mut times: Option<(Instant, Instant)> = None;
    let mut bytes = 0;
    let runner = model::load(file, options, &mut |progress| {
        observe(progress);
        bytes = progress.bytes;
        let now = Instant::now();
        if times.is_none() {
            // So that the bar shows the weights' own rate.
            bar.reset_elapsed();
        }
        times.get_or_insert((now, now)).1 = now;
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.bytes);
    });
    bar.finish_and_clear();
    let (open, last) = times.unwrap_or((started, started));
    let loaded = Loaded {
        runner: runner?,
        seconds: started.elapsed().as_secs_f64(),
        open_seconds: (open - started).as_secs_f64(),
        weights_seconds: (last - open).as_secs_f64(),
        weights_bytes: bytes,
    };
    tracing::info!(
        model = loaded.runner.info().name,
        device = loaded.runner.device().name,
        seconds = format!("{:.2}", loaded.seconds),
        weights_seconds = format!("{:.2}", loaded.weights_seconds),
        gb_per_s = format!("{:.2}", loaded.gb_per_s()),
        "loaded"
    );
    Ok(loaded)
}

/// Loads the model and starts an engine on it.
pub(super) fn engine(common: &Common, file: &Arc<Gguf>, tokens: usize) -> Result<EngineHandle> {
    let options = common.load_options(tokens);
    let fallback = common.template_fallback();
    engine_with(file, &options, fallback, EngineConfig::default(), &|_| {})
}

/// As [`engine`], for the worker.
pub(super) fn engine_for_worker(
    common: &Common,
    file: &Arc<Gguf>,
    cache: CacheSize,
    config: EngineConfig,
    observe: &(dyn Fn(LoadProgress) + Sync),
) -> Result<EngineHandle> {
    let options = LoadOptions {
        cache,
        ..common.load_options(0)
    };
    engine_with(file, &options, common.template_fallback(), config, observe)
}

fn engine_with(
    file: &Arc<Gguf>,
    options: &LoadOptions,
    template_fallback: Option<ChatTemplate>,
    config: EngineConfig,
    observe: &(dyn Fn(LoadProgress) + Sync),
) -> Result<EngineHandle> {
    tokenizer::check(file.metadata())?;
    // A tokenizer of 150,000 tokens takes as long to build as a small model to load.
    let (text, loaded) = std::thread::scope(|scope| {
        let text = scope.spawn(|| ModelText::from_gguf(file));
        let loaded = load_observed(file, options, observe);
        let text = text.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
        (text, loaded)
    });
    let text = text?.with_fallback(template_fallback);
    Engine::start(loaded?.runner, Arc::new(text), config).map_err(|source| Error::Io {
        path: "the engine's thread".into(),
        source,
    })
}
