//! From a file to a model on its device: memory planned, shapes checked, every tensor placed.

use super::architectures::{ExpertPlan, Gate, HeadNorms, Matrices, Norms};
use super::lora::Lora;
use super::plan::{self, CachePlan, Plan, dims};
use super::rope::{Rotation, Scaling};
use super::transformer::{
    FeedForward, Layer, NormWeights, Projection, RopeTables, Scratch, Transformer,
};
use super::{
    CacheSize, Config, LoadOptions, LoadProgress, MAX_OUTPUTS, ModelInfo, Pooling, Runner,
};
use crate::device::{Adapter, BLOCK_TOKENS, CachePlace, CacheShape, CacheType, Device};
use crate::error::{Error, Result};
use gguf::Gguf;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

/// Tensors that files carry and a forward pass can do without.
const IDLE: [&str; 2] = [".attn_rot_embd.weight", ".rotary_emb.inv_freq"];

/// Reads tensors in order, checks their shapes, reports progress.
struct Loader<'a, D: Device> {
    device: &'a mut D,
    file: &'a Arc<Gguf>,
    config: &'a Config,
    places: &'a [CachePlace],
    adapters: &'a [Lora],
    /// Names that were asked for.
    used: HashSet<String>,
    bytes: u64,
    total_bytes: u64,
    progress: &'a mut dyn FnMut(LoadProgress),
}

/// What a file holds, on a device.
struct Weights<D: Device> {
    embedding: D::Weight,
    layers: Vec<Layer<D>>,
    output_norm: NormWeights<D>,
    head: Option<Projection<D>>,
}

impl<'a, D: Device> Loader<'a, D> {
    fn new(
        device: &'a mut D,
        file: &'a Arc<Gguf>,
        config: &'a Config,
        places: &'a [CachePlace],
        adapters: &'a [Lora],
        progress: &'a mut dyn FnMut(LoadProgress),
    ) -> Self {
        Loader {
            device,
            file,
            config,
            places,
            adapters,
            used: HashSet::new(),
            bytes: 0,
            total_bytes: file.tensors().map(|t| t.data().len() as u64).sum(),
            progress,
        }
    }

    fn weights(&mut self) -> Result<Weights<D>> {
        let shape = &self.config.shape;
        let (d, vocabulary) = (shape.embedding, shape.vocabulary);
        Ok(Weights {
            embedding: self.embedding(d, vocabulary)?,
            layers: (0..shape.layers)
                .map(|i| self.layer(i))
                .collect::<Result<Vec<_>>>()?,
            output_norm: self.norm("output_norm", d)?,
            head: match self.has("output.weight") {
                true => Some(self.projection("output", d, vocabulary, false)?),
                false => None,
            },
        })
    }

    /// The embedding, which is the head too where there is no other.
    fn embedding(&mut self, d: usize, vocabulary: usize) -> Result<D::Weight> {
        const NAME: &str = "token_embd.weight";
        if !self.has("output.weight") {
            return self.matrix(NAME, &[d, vocabulary], 0..vocabulary);
        }
        self.tensor(NAME, &[d, vocabulary])?;
        let tensor = self.file.require(NAME)?;
        let bytes = tensor.data().len();
        let weight = self.device.load_table(tensor, 0..vocabulary, self.file)?;
        self.count(bytes);
        Ok(weight)
    }

    fn bad(&self, what: String) -> Error {
        Error::Model {
            file: self.file.path().to_owned(),
            what,
        }
    }

    fn has(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    fn tensor(&mut self, name: &str, dims: &[usize]) -> Result<()> {
        let tensor = self.file.require(name)?;
        let expected = dims.iter().map(|&d| d as u64);
        if !tensor.dims().iter().copied().eq(expected) {
            return Err(self.bad(format!(
                "tensor {name} has dimensions {:?}, expected {dims:?} from the metadata",
                tensor.dims()
            )));
        }
        self.used.insert(name.to_owned());
        Ok(())
    }

    fn count(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        (self.progress)(LoadProgress {
            bytes: self.bytes,
            total_bytes: self.total_bytes,
        });
    }

    /// Rows of a matrix, or of matrices one after the other, of these dimensions.
    fn matrix(&mut self, name: &str, dims: &[usize], rows: Range<usize>) -> Result<D::Weight> {
        self.tensor(name, dims)?;
        let tensor = self.file.require(name)?;
        let bytes = rows.len() * tensor.row_bytes() as usize;
        let weight = self.device.load(tensor, rows, self.file)?;
        self.count(bytes);
        Ok(weight)
    }

    fn values(&mut self, name: &str, dims: &[usize]) -> Result<Vec<f32>> {
        self.tensor(name, dims)?;
        let tensor = self.file.require(name)?;
        let mut values = vec![0.0; dims.iter().product()];
        tensor.dequantize_into(0, &mut values)?;
        self.count(tensor.data().len());
        Ok(values)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<D::Buffer> {
        let values = self.values(name, &[len])?;
        self.device.upload(&values)
    }

    fn norm(&mut self, name: &str, len: usize) -> Result<NormWeights<D>> {
        let weight = self.vector(&format!("{name}.weight"), len)?;
        let bias = format!("{name}.bias");
        Ok(NormWeights {
            weight,
            bias: match self.has(&bias) {
                true => Some(self.vector(&bias, len)?),
                false => None,
            },
        })
    }

    /// The norm of a row of `heads` heads: a weight for each element of a head or of the row.
    fn head_norm(&mut self, name: &str, heads: usize) -> Result<Option<NormWeights<D>>> {
        let Some(kind) = self.config.blueprint.head_norms else {
            return Ok(None);
        };
        let head_dim = self.config.shape.head_dim;
        let weight = format!("{name}.weight");
        let dims = self.file.require(&weight)?.dims().len();
        let dims = match kind {
            HeadNorms::Row => vec![heads * head_dim],
            HeadNorms::Head if dims == 2 => vec![head_dim, heads],
            HeadNorms::Head => vec![head_dim],
        };
        let values = self.values(&weight, &dims)?;
        Ok(Some(NormWeights {
            weight: self.device.upload(&values)?,
            bias: None,
        }))
    }

    /// Rows of a matrix `[cols, all rows]` with their bias and adapters. A bias may be there without the
    /// architecture asking for it; leaving it out would be wrong.
    fn part(
        &mut self,
        name: &str,
        cols: usize,
        all: usize,
        rows: Range<usize>,
        needs_bias: bool,
    ) -> Result<Projection<D>> {
        let weight = self.matrix(&format!("{name}.weight"), &[cols, all], rows.clone())?;
        let bias = format!("{name}.bias");
        let bias = if needs_bias || self.has(&bias) {
            let values = self.values(&bias, &[all])?;
            Some(self.device.upload(&values[rows.clone()])?)
        } else {
            None
        };
        let mut adapters = Vec::new();
        for lora in self.adapters {
            let Some(pair) = lora.pair(name, cols, all)? else {
                continue;
            };
            adapters.push(Adapter {
                a: self.device.load(pair.a, 0..pair.rank, &lora.file)?,
                b: self.device.load(pair.b, rows.clone(), &lora.file)?,
                scale: pair.scale,
            });
        }
        Ok(Projection {
            weight,
            bias,
            adapters,
        })
    }

    fn projection(
        &mut self,
        name: &str,
        cols: usize,
        rows: usize,
        needs_bias: bool,
    ) -> Result<Projection<D>> {
        self.part(name, cols, rows, 0..rows, needs_bias)
    }

    /// Several matrices, `rows` each: tensors of their own, or one after the other in `joined`.
    fn several<const N: usize>(
        &mut self,
        lie: Matrices,
        joined: &str,
        names: [&str; N],
        cols: usize,
        rows: [usize; N],
        needs_bias: bool,
    ) -> Result<[Projection<D>; N]> {
        let all: usize = rows.iter().sum();
        let mut parts = Vec::with_capacity(N);
        let mut first = 0;
        for (name, rows) in names.into_iter().zip(rows) {
            parts.push(match lie {
                Matrices::Separate => self.projection(name, cols, rows, needs_bias)?,
                Matrices::Joined => {
                    self.part(joined, cols, all, first..first + rows, needs_bias)?
                }
            });
            first += rows;
        }
        parts
            .try_into()
            .map_err(|_| self.bad(format!("{joined} has not {N} parts")))
    }

    /// The matrices of all experts, `[cols, rows, count]`, and their biases.
    fn experts(
        &mut self,
        name: &str,
        cols: usize,
        rows: usize,
        count: usize,
    ) -> Result<Projection<D>> {
        let dims = [cols, rows, count];
        let weight = self.matrix(&format!("{name}.weight"), &dims, 0..rows * count)?;
        let bias = format!("{name}.bias");
        let bias = match self.has(&bias) {
            true => {
                let values = self.values(&bias, &[rows, count])?;
                Some(self.device.upload(&values)?)
            }
            false => None,
        };
        Ok(Projection {
            weight,
            bias,
            adapters: Vec::new(),
        })
    }

    fn layer(&mut self, i: usize) -> Result<Layer<D>> {
        let (shape, blueprint) = (&self.config.shape, &self.config.blueprint);
        let name = |part: &str| format!("blk.{i}.{part}");
        let d = shape.embedding;
        let (q_dim, kv_dim) = dims(shape);
        let before = blueprint.norms != Norms::After;
        let after = blueprint.norms != Norms::Before;
        let attention_norm = match before {
            true => Some(self.norm(&name("attn_norm"), d)?),
            false => None,
        };
        let [q, k, v] = self.several(
            blueprint.qkv,
            &name("attn_qkv"),
            [&name("attn_q"), &name("attn_k"), &name("attn_v")],
            d,
            [q_dim, kv_dim, kv_dim],
            blueprint.qkv_bias,
        )?;
        let q_norm = self.head_norm(&name("attn_q_norm"), shape.heads)?;
        let k_norm = self.head_norm(&name("attn_k_norm"), shape.kv_heads)?;
        let sinks = match blueprint.sinks {
            true => Some(self.vector(&name("attn_sinks.weight"), shape.heads)?),
            false => None,
        };
        let output = self.projection(&name("attn_output"), q_dim, d, false)?;
        let post_attention_norm = match after {
            true => Some(self.norm(&name("post_attention_norm"), d)?),
            false => None,
        };
        let own = name(blueprint.feed_forward_norm);
        let shared = blueprint.parallel && !self.has(&format!("{own}.weight"));
        let feed_forward_norm = match before && !shared {
            true => Some(self.norm(&own, d)?),
            false => None,
        };
        let feed_forward = match blueprint.experts {
            Some(ExpertPlan {
                count,
                feed_forward: ff,
                ..
            }) => FeedForward::Experts {
                router: self.projection(&name("ffn_gate_inp"), d, count, false)?,
                gate: self.experts(&name("ffn_gate_exps"), d, ff, count)?,
                up: self.experts(&name("ffn_up_exps"), d, ff, count)?,
                down: self.experts(&name("ffn_down_exps"), ff, d, count)?,
            },
            None => {
                let ff = shape.feed_forward;
                let up = name("ffn_up");
                let (gate, up) = match blueprint.gate {
                    Gate::None => (None, self.projection(&up, d, ff, false)?),
                    Gate::Present(lie) => {
                        let names = [&*name("ffn_gate"), &up];
                        let [gate, up] = self.several(lie, &up, names, d, [ff; 2], false)?;
                        (Some(gate), up)
                    }
                };
                FeedForward::Dense {
                    gate,
                    up,
                    down: self.projection(&name("ffn_down"), ff, d, false)?,
                }
            }
        };
        let post_feed_forward_norm = match after {
            true => Some(self.norm(&name("post_ffw_norm"), d)?),
            false => None,
        };
        Ok(Layer {
            plan: blueprint.layers[i],
            place: self.places[i],
            attention_norm,
            q,
            k,
            v,
            q_norm,
            k_norm,
            sinks,
            output,
            post_attention_norm,
            feed_forward_norm,
            feed_forward,
            post_feed_forward_norm,
        })
    }

    fn rope(&mut self, rotation: &Rotation, first: bool, context: usize) -> Result<RopeTables<D>> {
        let dims = self.config.shape.rope_dims;
        let given = Some("rope_freqs.weight").filter(|name| first && self.has(name));
        let mut table = |name: Option<&str>| {
            let divisors = match name {
                Some(name) => Some(self.values(name, &[dims / 2])?),
                None => None,
            };
            let values = rotation.table(context, dims, divisors.as_deref());
            self.device.upload(&values)
        };
        if let Scaling::Long { original } = rotation.scaling {
            return Ok(RopeTables {
                table: table(Some("rope_factors_short.weight"))?,
                long: Some((table(Some("rope_factors_long.weight"))?, original)),
            });
        }
        Ok(RopeTables {
            table: table(given)?,
            long: None,
        })
    }

    /// What the model does not use would make it another model.
    ///
    /// # Errors
    /// A tensor that was not asked for, of the model or of an adapter.
    fn check_all_used(&self) -> Result<()> {
        let idle = |name: &str| IDLE.iter().any(|end| name.ends_with(end));
        let mut names = self.file.tensors().map(|t| t.name());
        if let Some(name) = names.find(|name| !self.used.contains(*name) && !idle(name)) {
            return Err(self.bad(format!(
                "tensor {name} is no part of the architecture {} as Kigo knows it",
                self.config.architecture
            )));
        }
        self.adapters.iter().try_for_each(Lora::check_all_used)
    }
}

/// Blocks of the cache: those of one sequence, or as many more as `size` asks for and `free` allows.
fn cache_blocks(shape: CacheShape, size: CacheSize, free: u64, plan: &Plan) -> usize {
    let more = CacheShape {
        blocks: shape.blocks + 1,
        ..shape
    };
    let block_bytes = 2 * (more.bytes() - shape.bytes()).max(1) as u64;
    let wanted = match size {
        CacheSize::Context => 0,
        CacheSize::Bytes(bytes) => bytes / block_bytes,
        CacheSize::UpTo(tokens) => {
            let beside = free.saturating_sub(plan.weights + plan.working);
            (tokens.div_ceil(BLOCK_TOKENS) as u64).min(beside / 4 / block_bytes)
        }
    };
    // Block numbers are 32 bits wide.
    let wanted = wanted.min(u64::from(u32::MAX)) as usize;
    shape.blocks.max(wanted)
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

/// Does what [`load`] does on a device that keeps nothing: checks every tensor, and plans memory.
///
/// # Errors
/// The first that [`load`] would give, but for what only the device itself can say.
pub(super) fn rehearse<D: Device>(
    mut device: D,
    file: &Arc<Gguf>,
    options: &LoadOptions,
) -> Result<Plan> {
    let config = Config::from_gguf(file)?;
    let context = plan::context(&config, options.context)?;
    let step_rows = options.step_rows(D::STEP_ROWS);
    let cache = CachePlan::new(&config, context, options, step_rows);
    let plan = plan::plan(file, &config, cache.shape, context, step_rows, |widest| {
        device.working_bytes(widest)
    });
    let mut quiet = |_| ();
    let mut loader = Loader::new(&mut device, file, &config, &cache.places, &[], &mut quiet);
    loader.weights()?;
    for (i, rotation) in config.blueprint.rotations.iter().enumerate() {
        loader.rope(rotation, i == 0, 1)?;
    }
    loader.check_all_used()?;
    device.alloc_cache(cache.shape)?;
    Ok(plan)
}

/// Plans memory, loads every weight, and makes the model ready for its first step.
pub(super) fn load<D: Device>(
    mut device: D,
    file: &Arc<Gguf>,
    config: Config,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Box<dyn Runner>> {
    let context = plan::context(&config, options.context)?;
    let step_rows = options.step_rows(D::STEP_ROWS);
    let CachePlan {
        shape: mut cache_shape,
        places,
        ring,
    } = CachePlan::new(&config, context, options, step_rows);
    let adapters = options
        .adapters
        .iter()
        .map(|source| Lora::open(source, &config))
        .collect::<Result<Vec<_>>>()?;

    let mut plan = plan::plan(file, &config, cache_shape, context, step_rows, |widest| {
        device.working_bytes(widest)
    });
    let free = device.free_bytes()?;
    cache_shape.blocks = cache_blocks(cache_shape, options.cache, free, &plan);
    plan.cache = 2 * cache_shape.bytes() as u64;
    plan.weights += adapters.iter().map(|a| a.file.file_bytes()).sum::<u64>();
    if plan.total() > free {
        return Err(Error::OutOfMemory {
            device: device.info().name.clone(),
            what: format!(
                "{} (weights {} MiB, KV cache for {} tokens {} MiB, working memory {} MiB)",
                file.path().display(),
                plan.weights >> 20,
                cache_shape.blocks * BLOCK_TOKENS,
                plan.cache >> 20,
                plan.working >> 20
            ),
            required: plan.total() >> 20,
            free: free >> 20,
        });
    }
    let adapted = !adapters.is_empty();
    // Heads that are normed are turned by lanes of four elements, pairs of which are lanes apart.
    let turns = config.blueprint.head_norms.is_none() || config.shape.rope_dims.is_multiple_of(8);
    let plain = config.blueprint.is_plain() && turns;
    device.set_plain(plain && !adapted && cache_shape.ty != CacheType::F32);

    let mut loader = Loader::new(&mut device, file, &config, &places, &adapters, progress);
    // Tells when the device was open.
    loader.count(0);
    loader.device.begin_loading(file)?;
    let Weights {
        embedding,
        layers,
        output_norm,
        head,
    } = loader.weights()?;
    let ropes = config
        .blueprint
        .rotations
        .iter()
        .enumerate()
        .map(|(i, rotation)| loader.rope(rotation, i == 0, context))
        .collect::<Result<Vec<_>>>()?;
    loader.check_all_used()?;
    loader.device.finish_loading()?;
    loader.count(0);

    let cache = device.alloc_cache(cache_shape)?;
    let shape = &config.shape;
    let (d, vocabulary) = (shape.embedding, shape.vocabulary);
    let (q_dim, _) = dims(shape);
    let scratch = Scratch {
        x: device.alloc(step_rows * d)?,
        q: device.alloc(step_rows * q_dim)?,
        attended: device.alloc(step_rows * q_dim)?,
        hidden: device.alloc(step_rows * shape.feed_forward)?,
        logits: device.alloc(MAX_OUTPUTS * vocabulary)?,
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
        architecture: config.architecture.to_owned(),
        path: file.path().to_owned(),
        file_bytes: file.file_bytes(),
        parameters: file.tensors().map(|t| t.elements()).sum(),
        vocabulary,
        trained_context: shape.context,
        context,
        layers: shape.layers,
        pooling: pooling(file, config.architecture)?,
    };
    let device_info = device.info().clone();
    Ok(Box::new(Transformer {
        device,
        info,
        device_info,
        config,
        cache_shape,
        ring,
        step_rows,
        embedding,
        layers,
        output_norm,
        head,
        ropes,
        cache,
        scratch,
    }))
}
