//! Models: configuration from metadata, weights, and the forward pass over device operations.

mod architectures;
mod config;
mod keys;
mod loading;
mod lora;
mod plan;
mod rope;
mod transformer;
mod verdict;

pub use config::{Config, Shape};
pub use lora::LoraSource;
pub use plan::Plan;
pub use verdict::{Verdict, verdicts};

use crate::device::{self, Batch, CacheType, DeviceInfo, SampleRow};
use crate::error::{Error, Result};
use std::str::FromStr;
use std::sync::Arc;

/// Where a model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device where there is one that works, else the CPU.
    #[default]
    Auto,
    /// CUDA device `N`.
    Cuda(usize),
    Cpu,
    /// The CUDA kernels, on the emulator.
    Emulated,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Ok(match s {
            "auto" => Self::Auto,
            "cuda" => Self::Cuda(0),
            "cpu" => Self::Cpu,
            "emulated" => Self::Emulated,
            _ => match s.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(n)) => Self::Cuda(n),
                _ => {
                    return Err(format!(
                        "{s:?} is no device; expected auto, cuda, cuda:N, cpu or emulated"
                    ));
                }
            },
        })
    }
}

/// How a model is loaded.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    pub device: DeviceChoice,
    /// f32 activations throughout, and an f32 cache unless another is asked for.
    pub exact: bool,
    /// CPU threads; `None` for all cores.
    pub threads: Option<usize>,
    /// Tokens of one sequence; `None` for the model's own context, at most [`DEFAULT_CONTEXT`].
    pub context: Option<usize>,
    /// What the KV cache is made of; `None` for f16, or f32 with `exact`.
    pub cache_type: Option<CacheType>,
    /// LoRA adapters, added to each other.
    pub adapters: Vec<LoraSource>,
    pub cache: CacheSize,
    /// Rows of one step at most, and so what a window's part of the cache has room for beside the window;
    /// `None` for as many as the device does well.
    pub step_rows: Option<usize>,
}

impl LoadOptions {
    /// Rows of one step at most on a device that does well with `most`.
    fn step_rows(&self, most: usize) -> usize {
        self.step_rows.map_or(most, |rows| rows.clamp(1, most))
    }
}

/// How large the KV cache is, all sequences together. It always holds one of the whole context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheSize {
    /// One sequence of the whole context.
    #[default]
    Context,
    /// So many bytes.
    Bytes(u64),
    /// So many tokens, as far as a quarter of the memory left beside the model goes.
    UpTo(usize),
}

/// Context when none is asked for: enough for a long chat, small beside any model.
pub const DEFAULT_CONTEXT: usize = 4096;

/// Rows of one step on any device; a longer prompt goes in several.
pub const MAX_ROWS: usize = 2048;

/// Rows of one step whose logits can be asked for.
pub const MAX_OUTPUTS: usize = 64;

/// How far loading has come; first told once the device is open, last once it has every weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadProgress {
    pub bytes: u64,
    pub total_bytes: u64,
}

/// What a model is, as reports and `kigo serve` name it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ModelInfo {
    /// `general.name`, or the file's stem.
    pub name: String,
    pub architecture: String,
    pub path: std::path::PathBuf,
    pub file_bytes: u64,
    pub parameters: u64,
    /// Logits per position, padding included.
    pub vocabulary: usize,
    /// Tokens the model was trained to attend over.
    pub trained_context: usize,
    /// Tokens that one sequence may have here.
    pub context: usize,
    pub layers: usize,
    /// How the file says that hidden states become an embedding; `None` for a model that makes none.
    pub pooling: Option<Pooling>,
}

/// How the hidden states of a text become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    Mean,
    /// That of the last token.
    Last,
}

/// The part of a KV cache that keeps no more than a window of each sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Blocks that a sequence needs at most, of which it takes one after the other and begins again.
    pub len: usize,
    /// Blocks that there are.
    pub blocks: usize,
}

/// A loaded model on its device, whichever that is.
pub trait Runner: Send {
    fn info(&self) -> &ModelInfo;

    fn device(&self) -> &DeviceInfo;

    /// Blocks of [`device::BLOCK_TOKENS`] tokens in the KV cache.
    fn cache_blocks(&self) -> usize;

    /// The part of the cache for layers that see a window, if it has one.
    fn ring(&self) -> Option<Ring> {
        None
    }

    /// Above how many expected tokens ([`device::Span::horizon`]) the model rotates a sequence's keys by
    /// other angles, if it has such.
    fn long_above(&self) -> Option<usize> {
        None
    }

    /// Rows of one step at most.
    fn step_rows(&self) -> usize;

    /// As [`device::Device::MAX_BATCH`], within [`Runner::step_rows`].
    fn max_batch(&self) -> usize {
        1
    }

    /// Runs the batch; its logits stay on the device until the next call.
    ///
    /// # Errors
    /// More than [`Runner::step_rows`] rows or [`MAX_OUTPUTS`] outputs, a token id outside the vocabulary, a
    /// position past the context, blocks outside the cache; or the device's failure.
    fn forward(&mut self, batch: &Batch) -> Result<()>;

    /// Chooses a token from each of the first `rows.len()` logit rows of the last [`Runner::forward`].
    fn sample(&mut self, rows: &[SampleRow<'_>]) -> Result<Vec<u32>>;

    /// Steps that have begun ahead ([`SampleRow::ahead`]) and that nobody has asked for yet: what a sequence does next costs
    /// nothing as long as there are any, and all of them are lost where another has a step.
    fn steps_begun(&self) -> usize {
        0
    }

    /// The hidden state of row `row` of the last [`Runner::forward`], after the output norm: what the output
    /// matrix multiplies. As long as an embedding.
    fn hidden(&mut self, row: usize) -> Result<Vec<f32>>;

    /// As [`device::Device::profile`].
    fn profile(&mut self) -> Result<Vec<device::OpTiming>> {
        Ok(Vec::new())
    }

    /// As [`device::Device::hand_offs`].
    fn hand_offs(&mut self) -> Result<Vec<device::HandOff>> {
        Ok(Vec::new())
    }

    /// The logits of output `i` of the last [`Runner::forward`], `vocabulary` long.
    fn logits(&mut self, output: usize) -> Result<Vec<f32>>;
}

/// Starts opening a device on another thread, where that takes a while; [`load`] goes on from there.
pub fn prepare(device: DeviceChoice) {
    match device {
        DeviceChoice::Auto => device::gpu::cuda::Cuda::prepare(0),
        DeviceChoice::Cuda(index) => device::gpu::cuda::Cuda::prepare(index),
        DeviceChoice::Cpu | DeviceChoice::Emulated => {}
    }
}

/// Loads a model.
///
/// # Errors
/// A file that is no model Kigo runs, a device that is not there, too little memory.
pub fn load(
    file: &Arc<gguf::Gguf>,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Box<dyn Runner>> {
    let config = Config::from_gguf(file)?;
    match options.device {
        DeviceChoice::Cpu => {
            let device = device::cpu::Cpu::new(options.threads, options.exact)?;
            loading::load(device, file, config, options, progress)
        }
        DeviceChoice::Emulated => {
            let device = device::gpu::Gpu::emulated(options.exact)?;
            loading::load(device, file, config, options, progress)
        }
        DeviceChoice::Cuda(index) => {
            let device = device::gpu::Gpu::cuda(index, options.exact)?;
            loading::load(device, file, config, options, progress)
        }
        DeviceChoice::Auto => match device::gpu::Gpu::cuda(0, options.exact) {
            Ok(device) => loading::load(device, file, config, options, progress),
            Err(Error::NoDevice(why)) => {
                tracing::info!(%why, "no CUDA device; using the CPU");
                let device = device::cpu::Cpu::new(options.threads, options.exact)?;
                loading::load(device, file, config, options, progress)
            }
            Err(error) => Err(error),
        },
    }
}
