//! A decoder-only transformer, written once over the operations of [`Device`].

use super::{
    CacheSize, Config, DEFAULT_CONTEXT, LoadOptions, LoadProgress, MAX_OUTPUTS, ModelInfo, Pooling,
    Runner,
};
use crate::device::{
    BLOCK_TOKENS, Batch, CacheShape, Device, DeviceInfo, Heads, Linear, Norm, OpTiming, Qkv, Rope,
    SampleRow,
};
use crate::error::{Error, Result};
use gguf::Gguf;
use std::sync::Arc;

struct Layer<D: Device> {
    attention_norm: D::Buffer,
    q: Projection<D>,
    k: Projection<D>,
    v: Projection<D>,
    output: Projection<D>,
    feed_forward_norm: D::Buffer,
    gate: Projection<D>,
    up: Projection<D>,
    down: Projection<D>,
}

struct Projection<D: Device> {
    weight: D::Weight,
    bias: Option<D::Buffer>,
}

impl<D: Device> Projection<D> {
    fn linear(&self) -> Linear<'_, D> {
        Linear {
            weight: &self.weight,
            bias: self.bias.as_ref(),
        }
    }
}

/// Intermediate activations of one step, [`Device::STEP_ROWS`] rows each.
struct Scratch<D: Device> {
    x: D::Buffer,
    q: D::Buffer,
    attended: D::Buffer,
    hidden: D::Buffer,
    /// [`MAX_OUTPUTS`] rows.
    logits: D::Buffer,
}

struct Transformer<D: Device> {
    device: D,
    info: ModelInfo,
    device_info: DeviceInfo,
    config: Config,
    cache_shape: CacheShape,
    embedding: D::Weight,
    layers: Vec<Layer<D>>,
    output_norm: D::Buffer,
    /// `None` where the embedding table serves as the output matrix too.
    head: Option<D::Weight>,
    rope: D::Buffer,
    cache: D::Cache,
    scratch: Scratch<D>,
}

/// Reads tensors in order, checks their shapes, reports progress.
struct Loader<'a, D: Device> {
    device: &'a mut D,
    file: &'a Arc<Gguf>,
    bytes: u64,
    total_bytes: u64,
    progress: &'a mut dyn FnMut(LoadProgress),
}

impl<D: Device> Loader<'_, D> {
    fn tensor(&self, name: &str, dims: &[usize]) -> Result<gguf::Tensor<'_>> {
        let tensor = self.file.require(name)?;
        if !tensor
            .dims()
            .iter()
            .copied()
            .eq(dims.iter().map(|&d| d as u64))
        {
            return Err(Error::Model {
                file: self.file.path().to_owned(),
                what: format!(
                    "tensor {name} has dimensions {:?}, expected {dims:?} from the metadata",
                    tensor.dims()
                ),
            });
        }
        Ok(tensor)
    }

    fn count(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        (self.progress)(LoadProgress {
            bytes: self.bytes,
            total_bytes: self.total_bytes,
        });
    }

    fn matrix(&mut self, name: &str, cols: usize, rows: usize) -> Result<D::Weight> {
        self.tensor(name, &[cols, rows])?;
        let file = self.file;
        let tensor = file.require(name)?;
        let weight = self.device.load(tensor, file)?;
        self.count(tensor.data().len());
        Ok(weight)
    }

    fn values(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, &[len])?;
        let mut values = vec![0.0; len];
        tensor.dequantize_into(0, &mut values)?;
        let bytes = tensor.data().len();
        self.count(bytes);
        Ok(values)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<D::Buffer> {
        let values = self.values(name, len)?;
        self.device.upload(&values)
    }

    fn projection(
        &mut self,
        name: &str,
        cols: usize,
        rows: usize,
        bias: bool,
    ) -> Result<Projection<D>> {
        let weight = self.matrix(&format!("{name}.weight"), cols, rows)?;
        let bias_name = format!("{name}.bias");
        // A bias may be there without the architecture asking for it; leaving it out would be wrong.
        let bias = if bias || self.file.tensor(&bias_name).is_some() {
            Some(self.vector(&bias_name, rows)?)
        } else {
            None
        };
        Ok(Projection { weight, bias })
    }
}

/// Plans memory, loads every weight, and makes the model ready for its first step.
pub(super) fn load<D: Device>(
    mut device: D,
    file: &Arc<Gguf>,
    config: Config,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Box<dyn Runner>> {
    let context = match options.context {
        None => config.context.min(DEFAULT_CONTEXT),
        Some(n) if n >= 1 && n <= config.context => n,
        Some(n) => {
            return Err(Error::Request(format!(
                "--ctx-size is {n}, expected 1 to {} (the model's own context)",
                config.context
            )));
        }
    };
    let mut cache_shape = CacheShape {
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        blocks: context.div_ceil(BLOCK_TOKENS),
    };
    let q_dim = config.heads * config.head_dim;
    let kv_dim = config.kv_heads * config.head_dim;
    let total_bytes = file.tensors().map(|t| t.data().len() as u64).sum::<u64>();

    let widths = config.embedding + 2 * q_dim + config.feed_forward;
    let widest = (q_dim + 2 * kv_dim).max(config.feed_forward);
    let scratch_bytes = 4 * (D::STEP_ROWS * widths + MAX_OUTPUTS * config.vocabulary) as u64
        + device.working_bytes(widest);
    let rope_bytes = 4 * (context * config.rope_dims) as u64;
    let free = device.free_bytes()?;
    let beside = total_bytes + scratch_bytes + rope_bytes;
    let bytes_of = |shape: CacheShape| (2 * shape.elements() * device.cache_element_bytes()) as u64;
    let block_bytes = bytes_of(CacheShape {
        blocks: 1,
        ..cache_shape
    });
    let wanted = match options.cache {
        CacheSize::Context => 0,
        CacheSize::Bytes(bytes) => bytes / block_bytes,
        CacheSize::UpTo(tokens) => {
            let quarter = free.saturating_sub(beside) / 4 / block_bytes;
            (tokens.div_ceil(BLOCK_TOKENS) as u64).min(quarter)
        }
    };
    // Block numbers are 32 bits wide.
    let wanted = wanted.min(u64::from(u32::MAX)) as usize;
    cache_shape.blocks = cache_shape.blocks.max(wanted);
    let cache_bytes = bytes_of(cache_shape);
    let required = beside + cache_bytes;
    if required > free {
        return Err(Error::OutOfMemory {
            device: device.info().name.clone(),
            what: format!(
                "{} (weights {} MiB, KV cache for {} tokens {} MiB, working memory {} MiB)",
                file.path().display(),
                total_bytes >> 20,
                cache_shape.blocks * BLOCK_TOKENS,
                cache_bytes >> 20,
                (scratch_bytes + rope_bytes) >> 20
            ),
            required: required >> 20,
            free: free >> 20,
        });
    }

    let mut loader = Loader {
        device: &mut device,
        file,
        bytes: 0,
        total_bytes,
        progress,
    };
    // Tells when the device was open.
    loader.count(0);
    loader.device.begin_loading(file)?;
    let (d, ff) = (config.embedding, config.feed_forward);
    let bias = config.architecture.qkv_bias;
    let embedding = loader.matrix("token_embd.weight", d, config.vocabulary)?;
    let layers = (0..config.layers)
        .map(|i| {
            let name = |part: &str| format!("blk.{i}.{part}");
            Ok(Layer {
                attention_norm: loader.vector(&name("attn_norm.weight"), d)?,
                q: loader.projection(&name("attn_q"), d, q_dim, bias)?,
                k: loader.projection(&name("attn_k"), d, kv_dim, bias)?,
                v: loader.projection(&name("attn_v"), d, kv_dim, bias)?,
                output: loader.projection(&name("attn_output"), q_dim, d, false)?,
                feed_forward_norm: loader.vector(&name("ffn_norm.weight"), d)?,
                gate: loader.projection(&name("ffn_gate"), d, ff, false)?,
                up: loader.projection(&name("ffn_up"), d, ff, false)?,
                down: loader.projection(&name("ffn_down"), ff, d, false)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let output_norm = loader.vector("output_norm.weight", d)?;
    let head = match file.tensor("output.weight") {
        Some(_) => Some(loader.matrix("output.weight", d, config.vocabulary)?),
        None => None,
    };
    let factors = match file.tensor("rope_freqs.weight") {
        Some(_) => Some(loader.values("rope_freqs.weight", config.rope_dims / 2)?),
        None => None,
    };
    loader.device.finish_loading()?;
    loader.count(0);

    let rope = device.upload(&config.rope_table(context, factors.as_deref()))?;
    let cache = device.alloc_cache(cache_shape)?;
    let scratch = Scratch {
        x: device.alloc(D::STEP_ROWS * d)?,
        q: device.alloc(D::STEP_ROWS * q_dim)?,
        attended: device.alloc(D::STEP_ROWS * q_dim)?,
        hidden: device.alloc(D::STEP_ROWS * ff)?,
        logits: device.alloc(MAX_OUTPUTS * config.vocabulary)?,
    };
    let info = ModelInfo {
        name: match file.metadata().opt_str("general.name")? {
            Some(name) => name.to_owned(),
            None => file
                .path()
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        },
        architecture: config.architecture.name.to_owned(),
        path: file.path().to_owned(),
        file_bytes: file.file_bytes(),
        parameters: file.tensors().map(|t| t.elements()).sum(),
        vocabulary: config.vocabulary,
        trained_context: config.context,
        context,
        layers: config.layers,
        pooling: pooling(file, config.architecture.name)?,
    };
    let device_info = device.info().clone();
    Ok(Box::new(Transformer {
        device,
        info,
        device_info,
        config,
        cache_shape,
        embedding,
        layers,
        output_norm,
        head,
        rope,
        cache,
        scratch,
    }))
}

/// `ARCHITECTURE.pooling_type`, as files number them.
fn pooling(file: &Gguf, architecture: &str) -> Result<Option<Pooling>> {
    let key = format!("{architecture}.pooling_type");
    Ok(match file.metadata().opt_u64(&key)? {
        Some(1) => Some(Pooling::Mean),
        Some(3) => Some(Pooling::Last),
        _ => None,
    })
}

impl<D: Device> Transformer<D> {
    fn check(&self, batch: &Batch) -> Result<()> {
        let bad = |what: String| Err(Error::Request(what));
        let rows = batch.tokens.len();
        if rows == 0 || rows > D::STEP_ROWS {
            let most = D::STEP_ROWS;
            return bad(format!("a step has {rows} rows, expected 1 to {most}"));
        }
        if batch.outputs.len() > MAX_OUTPUTS {
            let n = batch.outputs.len();
            return bad(format!(
                "a step wants logits of {n} rows, at most {MAX_OUTPUTS} can be had"
            ));
        }
        if let Some(id) = batch
            .tokens
            .iter()
            .find(|&&id| id as usize >= self.config.vocabulary)
        {
            let limit = self.config.vocabulary;
            return bad(format!(
                "token id {id} is outside the vocabulary of {limit}"
            ));
        }
        let mut next = 0;
        for span in &batch.spans {
            let end = span.past + span.len;
            if span.start != next || span.len == 0 {
                return bad(format!(
                    "a span starts at row {}, expected {next}",
                    span.start
                ));
            }
            next += span.len;
            if end > self.info.context {
                return bad(format!(
                    "a sequence would reach {end} tokens, past the context of {}; use a larger \
                     --ctx-size",
                    self.info.context
                ));
            }
            if span.blocks.len() * BLOCK_TOKENS < end
                || span
                    .blocks
                    .iter()
                    .any(|&b| b as usize >= self.cache_shape.blocks)
            {
                return bad(format!("blocks {:?} do not hold {end} tokens", span.blocks));
            }
        }
        if next != rows || batch.outputs.iter().any(|&row| row >= rows) {
            return bad(format!("spans cover {next} of {rows} rows"));
        }
        Ok(())
    }
}

impl<D: Device> Runner for Transformer<D> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn device(&self) -> &DeviceInfo {
        &self.device_info
    }

    fn cache_blocks(&self) -> usize {
        self.cache_shape.blocks
    }

    fn step_rows(&self) -> usize {
        D::STEP_ROWS
    }

    fn profile(&mut self) -> Result<Vec<OpTiming>> {
        self.device.profile()
    }

    fn forward(&mut self, batch: &Batch) -> Result<()> {
        self.check(batch)?;
        let Self {
            device,
            config,
            embedding,
            layers,
            output_norm,
            head,
            rope,
            cache,
            scratch,
            ..
        } = self;
        let heads = Heads {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
        };
        let norm = |weight| Norm {
            weight,
            eps: config.rms_eps,
        };
        let s = scratch;
        device.step(batch, &mut |device: &mut D| {
            device.embed(embedding, 1.0, &mut s.x)?;
            for (i, layer) in layers.iter().enumerate() {
                let qkv = Qkv {
                    norm: norm(&layer.attention_norm),
                    q: layer.q.linear(),
                    k: layer.k.linear(),
                    v: layer.v.linear(),
                    rope: Rope {
                        table: rope,
                        dims: config.rope_dims,
                        layout: config.architecture.rope_layout,
                    },
                    heads,
                };
                device.norm_qkv(&s.x, &qkv, cache, i, &mut s.q)?;
                device.attend(&s.q, cache, i, heads, &mut s.attended)?;
                device.linear_add(layer.output.linear(), &s.attended, &mut s.x)?;
                device.norm_gate_up(
                    &s.x,
                    norm(&layer.feed_forward_norm),
                    layer.gate.linear(),
                    layer.up.linear(),
                    &mut s.hidden,
                )?;
                device.linear_add(layer.down.linear(), &s.hidden, &mut s.x)?;
            }
            if !batch.outputs.is_empty() {
                let head = Linear {
                    weight: head.as_ref().unwrap_or(embedding),
                    bias: None,
                };
                device.norm_head(&s.x, norm(output_norm), head, &mut s.logits)?;
            }
            Ok(())
        })
    }

    fn sample(&mut self, rows: &[SampleRow<'_>]) -> Result<Vec<u32>> {
        self.device
            .sample(&self.scratch.logits, self.config.vocabulary, rows)
    }

    fn hidden(&mut self, row: usize) -> Result<Vec<f32>> {
        let n = self.config.embedding;
        let (mut x, mut weight) = (vec![0.0; n], vec![0.0; n]);
        self.device.read(&self.scratch.x, row * n, &mut x)?;
        self.device.read(&self.output_norm, 0, &mut weight)?;
        // Once for each row of a text, so the host does it.
        let squares: f64 = x.iter().map(|&v| f64::from(v).powi(2)).sum();
        let scale = 1.0 / (squares / n as f64 + f64::from(self.config.rms_eps)).sqrt();
        let normed = x.iter().zip(&weight);
        Ok(normed
            .map(|(&v, &w)| (f64::from(v) * scale) as f32 * w)
            .collect())
    }

    fn logits(&mut self, output: usize) -> Result<Vec<f32>> {
        let n = self.config.vocabulary;
        let mut logits = vec![0.0; n];
        self.device
            .read(&self.scratch.logits, output * n, &mut logits)?;
        Ok(logits)
    }
}
