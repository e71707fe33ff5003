//! Devices: what carries a forward pass.
//!
//! A model is written once, over the operations of [`Device`]; each backend carries them:
//!
//! - [`cpu`]: threads and vector instructions;
//! - [`gpu`]: the kernels of the crate `kernels`, launched through a [`gpu::Driver`]: CUDA through
//!   `cust`, or the emulator, which runs the same kernels on a machine without a GPU.
//!
//! Operations are as coarse as the fused steps of a fast decode: about five to a layer. Activations
//! are f32, row-major, one row per token of the current [`Batch`]. With `exact` set, a device keeps
//! activations in f32 throughout; otherwise it may quantise them before a product, the
//! CPU to 15 bits, a GPU to 8.
//!
//! What architectures do differently is a parameter of an operation, never another operation.

use crate::error::Result;
use crate::sampling::SamplingParams;
use std::ops::Range;
use std::sync::Arc;

pub mod cpu;
pub mod gpu;
pub mod host_memory;
pub mod ptx;
mod random_blocks;

/// Tokens that one block of the KV cache holds.
pub const BLOCK_TOKENS: usize = 32;

/// What a device is, as reports and metrics name it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct DeviceInfo {
    /// `cuda`, `cpu` or `emulated`.
    pub backend: &'static str,
    /// The card's or the processor's own name.
    pub name: String,
    /// Bytes of memory, all of it.
    pub memory_bytes: u64,
    /// Bytes that its memory moves in a second at most, where the device tells: what the weights of a decode
    /// step cannot be read faster than.
    pub memory_bytes_per_s: Option<u64>,
    /// Instruction set or compute capability in use, such as `avx512-vnni` or `sm_90`.
    pub architecture: String,
}

/// Consecutive rows of a [`Batch`] that belong to one sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Span {
    /// First row in the batch.
    pub start: usize,
    /// Rows, at least one.
    pub len: usize,
    /// Tokens of this sequence already in the cache; row `start + i` has position `past + i`.
    pub past: usize,
    /// Block numbers of the sequence in the cache: token `t` lies in `blocks[t / BLOCK_TOKENS]`.
    /// They cover at least `past + len` tokens.
    pub blocks: Vec<u32>,
    /// The same in the part of the cache that holds windows only: token `t` lies in
    /// `ring[t / BLOCK_TOKENS % ring.len()]`. Empty where the cache has no such part.
    pub ring: Vec<u32>,
    /// Tokens that the sequence is expected to come to, where that is known: more than `past + len`, or
    /// as good as that. Models with other rotations for long contexts choose them by it, so it should
    /// not change while a sequence grows.
    pub horizon: usize,
}

impl Span {
    /// The number of the block with tokens `index * BLOCK_TOKENS ..`.
    pub fn block(&self, index: usize, part: CachePart) -> u32 {
        match part {
            CachePart::Whole => self.blocks[index],
            CachePart::Ring => self.ring[index % self.ring.len()],
        }
    }
}

/// One step's rows, for any number of sequences.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Token ids, a row each.
    pub tokens: Vec<u32>,
    /// The sequences, in row order; they cover the rows without gaps.
    pub spans: Vec<Span>,
    /// Rows whose logits are wanted, ascending. Logits row `i` belongs to batch row `outputs[i]`.
    pub outputs: Vec<usize>,
    /// That it is the sequence's step after one that had a token chosen with steps [ahead](SampleRow::ahead): a device may have begun it.
    pub goes_on: bool,
}

/// What a KV cache is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    F32,
    #[default]
    F16,
    /// 8-bit integers, 32 to an f16 scale.
    Q8_0,
}

impl CacheType {
    /// As it is asked for.
    pub fn name(self) -> &'static str {
        match self {
            CacheType::F32 => "f32",
            CacheType::F16 => "f16",
            CacheType::Q8_0 => "q8_0",
        }
    }

    /// Bytes of `head_dim` elements of one token, as far as they count for planning.
    pub fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            CacheType::F32 => 4 * head_dim,
            CacheType::F16 => 2 * head_dim,
            // Rows begin where eight bytes can be loaded at once.
            CacheType::Q8_0 => (head_dim + 2 * head_dim.div_ceil(32)).next_multiple_of(8),
        }
    }
}

impl std::str::FromStr for CacheType {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f32" => Ok(CacheType::F32),
            "f16" => Ok(CacheType::F16),
            "q8_0" => Ok(CacheType::Q8_0),
            _ => Err(format!(
                "{s:?} is no type of a KV cache; expected f16, q8_0 or f32"
            )),
        }
    }
}

impl std::fmt::Display for CacheType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            CacheType::F32 => "f32",
            CacheType::F16 => "f16",
            CacheType::Q8_0 => "q8_0",
        })
    }
}

/// The two parts of a KV cache, with blocks of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CachePart {
    /// Every token, of layers that see every token.
    Whole,
    /// The last tokens, of layers that see no more than a window.
    Ring,
}

/// Where a layer's keys and values lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachePlace {
    pub part: CachePart,
    /// The layer's number among those of the part.
    pub layer: usize,
}

/// The shape of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CacheShape {
    /// Layers in [`CachePart::Whole`].
    pub layers: usize,
    /// Blocks of [`BLOCK_TOKENS`] tokens of each of them.
    pub blocks: usize,
    /// Layers in [`CachePart::Ring`].
    pub ring_layers: usize,
    /// Blocks of each of them.
    pub ring_blocks: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ty: CacheType,
}

impl CacheShape {
    /// Bytes of the keys (as many are the values') of a block of one layer, all heads.
    fn block_bytes(&self) -> usize {
        BLOCK_TOKENS * self.kv_heads * self.ty.row_bytes(self.head_dim)
    }

    /// Bytes of the keys of all layers.
    pub fn bytes(&self) -> usize {
        (self.layers * self.blocks + self.ring_layers * self.ring_blocks) * self.block_bytes()
    }

    /// Blocks before those of a layer.
    pub fn first_block(&self, place: CachePlace) -> usize {
        match place.part {
            CachePart::Whole => place.layer * self.blocks,
            CachePart::Ring => self.layers * self.blocks + place.layer * self.ring_blocks,
        }
    }

    /// Where the keys of a layer begin, in bytes.
    pub fn offset(&self, place: CachePlace) -> usize {
        self.first_block(place) * self.block_bytes()
    }
}

/// Which elements of a head a rotation pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// `(2i, 2i + 1)`: files of the llama architecture, whose Q and K rows are permuted for it.
    Interleaved,
    /// `(i, i + dims / 2)`: NeoX style, as in qwen2.
    Halves,
}

/// A matrix, `rows × cols` as `y = W x` reads it, its bias, and what is added to it at run time.
pub struct Linear<'a, D: Device> {
    pub weight: &'a D::Weight,
    /// f32, `rows` long.
    pub bias: Option<&'a D::Buffer>,
    pub adapters: &'a [Adapter<D>],
}

impl<D: Device> Clone for Linear<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Linear<'_, D> {}

/// A low-rank addition to a matrix: `y += scale * B (A x)` (LoRA, arXiv:2106.09685).
pub struct Adapter<D: Device> {
    /// `rank × cols`.
    pub a: D::Weight,
    /// `rows × rank`.
    pub b: D::Weight,
    pub scale: f32,
}

/// Which moments of a row a norm takes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) * weight` (arXiv:1910.07467).
    Rms,
    /// `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` (arXiv:1607.06450).
    Layer,
}

/// A norm of rows, or of equal parts of them.
pub struct Norm<'a, D: Device> {
    pub kind: NormKind,
    pub weight: &'a D::Buffer,
    /// As long as `weight`.
    pub bias: Option<&'a D::Buffer>,
    pub eps: f32,
}

impl<D: Device> Clone for Norm<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Norm<'_, D> {}

/// Heads of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    pub heads: usize,
    /// Divides `heads`; query head `h` reads KV head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Multiplies the scores before the softmax.
    pub scale: f32,
}

/// The rotation of queries and keys.
pub struct Rope<'a, D: Device> {
    /// `(cos, sin)` pairs, `[position][dims / 2][2]`, every scaling already in them.
    pub table: &'a D::Buffer,
    /// Another table, for sequences whose [`Span::horizon`] is above the number.
    pub long: Option<(&'a D::Buffer, usize)>,
    /// Elements of each head that rotate (the first ones), even, at most `head_dim`.
    pub dims: usize,
    pub layout: RopeLayout,
}

/// A norm of queries or keys before they are rotated.
pub struct HeadNorm<'a, D: Device> {
    /// Its weight is as long as what is normed together, or as a whole row of all heads.
    pub norm: Norm<'a, D>,
    /// Elements normed together: a head's, or those of all heads.
    pub len: usize,
}

/// First step of a layer: norm, Q/K/V products, biases, head norms, rotation, cache write.
pub struct Qkv<'a, D: Device> {
    pub norm: Option<Norm<'a, D>>,
    pub q: Linear<'a, D>,
    pub k: Linear<'a, D>,
    pub v: Linear<'a, D>,
    pub q_norm: Option<HeadNorm<'a, D>>,
    pub k_norm: Option<HeadNorm<'a, D>>,
    pub rope: Option<Rope<'a, D>>,
    pub heads: Heads,
}

/// How a layer attends.
pub struct Attention<'a, D: Device> {
    pub heads: Heads,
    /// Position `p` sees positions above `p - window`; `None` for all up to `p`.
    pub window: Option<usize>,
    /// Scores `s` become `cap * tanh(s / cap)` (gemma-2, arXiv:2408.00118).
    pub soft_cap: Option<f32>,
    /// A score for each head that takes part in the softmax and has no value (arXiv:2309.17453).
    pub sinks: Option<&'a D::Buffer>,
}

/// How a product joins the residual stream: `x += scale * norm(y)`.
pub struct Residual<'a, D: Device> {
    pub norm: Option<Norm<'a, D>>,
    pub scale: f32,
}

impl<D: Device> Residual<'_, D> {
    /// `x += y`.
    pub const PLAIN: Self = Residual {
        norm: None,
        scale: 1.0,
    };

    /// Whether this is `x += y`.
    pub fn is_plain(&self) -> bool {
        self.norm.is_none() && self.scale == 1.0
    }
}

/// What stands between the two products of a feed-forward block; `g` is the gate's product where there
/// is a gate, else `up`'s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `silu(g) * up`, `silu(x) = x / (1 + exp(-x))` (arXiv:2002.05202).
    Silu,
    /// `gelu(g) * up`, or without a gate `gelu(up)`: the tanh form,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³)))` (arXiv:1606.08415).
    Gelu,
    /// `(up + 1) * g * sigmoid(1.702 g)`, with `g` at most 7 and `up` within ±7: gpt-oss.
    ClampedSwish,
}

/// First part of a feed-forward block: norm, up and gate, activation.
pub struct GateUp<'a, D: Device> {
    pub norm: Option<Norm<'a, D>>,
    pub gate: Option<Linear<'a, D>>,
    pub up: Linear<'a, D>,
    pub activation: Activation,
}

/// A feed-forward block of experts, of which a router picks some for each row (arXiv:1701.06538).
pub struct Experts<'a, D: Device> {
    pub norm: Option<Norm<'a, D>>,
    /// A row for each expert.
    pub router: Linear<'a, D>,
    /// The matrices of all experts, one after the other, and so their biases.
    pub gate: Linear<'a, D>,
    pub up: Linear<'a, D>,
    pub down: Linear<'a, D>,
    pub activation: Activation,
    /// Experts that there are.
    pub count: usize,
    /// Experts that work on a row: those with the greatest router scores.
    pub used: usize,
    /// Whether the softmax over all scores is scaled so that the picked experts' weights add up to 1,
    /// which is the softmax over the picked scores.
    pub renormalise: bool,
    pub residual: Residual<'a, D>,
}

/// The last step: norm, output matrix, scale, cap.
pub struct Head<'a, D: Device> {
    pub norm: Norm<'a, D>,
    pub output: Linear<'a, D>,
    /// Multiplies the logits.
    pub scale: f32,
    /// Logits `l` become `cap * tanh(l / cap)`, after the scale.
    pub soft_cap: Option<f32>,
}

/// How one row's next token is chosen; see [`crate::sampling`] for the exact definition.
#[derive(Clone, Debug)]
pub struct SampleRow<'a> {
    pub params: &'a SamplingParams,
    /// The token is drawn by `sampling::uniform(seed, index)`, those of the sequence's next steps by the numbers after it.
    pub seed: u64,
    pub index: u64,
    /// Distinct token ids of the prompt and of what was generated, for the repetition penalty.
    pub seen: &'a [u32],
    /// That the sequence's next steps, so many at most, are most likely those of the chosen tokens, and that nobody asks for the
    /// logits of this one again, nor for any step's but the last of them: a device may begin them before it is told to.
    pub ahead: usize,
}

impl SampleRow<'_> {
    /// What the token is drawn by, uniform in `[0, 1)`.
    #[must_use]
    pub fn u(&self) -> f32 {
        crate::sampling::uniform(self.seed, self.index)
    }
}

/// What one operation of a decode step took, by the device's own clock.
#[derive(Clone, Copy, Debug)]
pub struct OpTiming {
    pub name: &'static str,
    /// Bytes of weights that it reads, or of keys and values for attention: each once, however often it is
    /// asked for.
    pub bytes: u64,
    /// Multiplications and additions with them.
    pub operations: u64,
    /// Nanoseconds from the last output of the operation before it until its input was in the last block.
    pub wait_ns: u64,
    /// From then until its last output was written.
    pub work_ns: u64,
    /// Both.
    pub total_ns: u64,
}

/// What it takes until all of a device's multiprocessors have what each has written: a floor of what lies between two operations of a
/// decode step.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct HandOff {
    /// Bytes on their way from memory to each multiprocessor meanwhile.
    #[serde(rename = "bytes_on_their_way")]
    pub flying: u64,
    pub ns: f64,
    /// At which rate these came.
    pub bytes_per_s: f64,
}

/// Carries the operations of a forward pass.
///
/// Operations work on the rows of the batch given to [`Device::step`], in order, and may be queued:
/// an error of one may show at a later one, at [`Device::read`] or [`Device::sample`] at the latest.
pub trait Device: Send + Sized + 'static {
    /// A weight matrix, in whatever layout the device multiplies fastest, still quantised.
    type Weight: Send;
    /// f32 values: activations, norms, biases, tables.
    type Buffer: Send;
    /// Paged keys and values of every layer.
    type Cache: Send;

    /// Rows of one step at most: enough to fill the device, few enough that a step is short.
    const STEP_ROWS: usize;

    /// Sequences whose generated tokens' rows gain from sharing a step, at most, so that what comes of a row in such a
    /// step depends neither on who nor on how many the others are; 1 where rows get on as fast one after the other.
    const MAX_BATCH: usize;

    fn info(&self) -> &DeviceInfo;

    /// Bytes free for [`Device::load`], [`Device::alloc`] and [`Device::alloc_cache`] together.
    fn free_bytes(&self) -> Result<u64>;

    /// Most bytes that operations take for themselves beside the buffers they are given, `widest` being the
    /// most values that a row has between two of them.
    fn working_bytes(&self, widest: usize) -> u64 {
        let _ = widest;
        0
    }

    /// Whether single rows may take a device's shorter way, which knows nothing but RMS norms, plain
    /// residuals, rotation, causal attention and gated SiLU. Said once, before the first step.
    fn set_plain(&mut self, _plain: bool) {}

    /// Times the operations of the coming decode steps; gives those of the last step that was timed so. Nothing
    /// on a device without such a clock.
    fn profile(&mut self) -> Result<Vec<OpTiming>> {
        Ok(Vec::new())
    }

    /// Measures hand-offs, with more and more bytes on their way. Nothing on a device whose decode step has none.
    fn hand_offs(&mut self) -> Result<Vec<HandOff>> {
        Ok(Vec::new())
    }

    /// Makes room for all weights of a file, which are loaded next.
    fn begin_loading(&mut self, _file: &Arc<gguf::Gguf>) -> Result<()> {
        Ok(())
    }

    /// Takes rows of a matrix from the mapped file; copies may still run when it returns. `rows` are some
    /// of the tensor's: all, or a part of a tensor that holds several matrices.
    fn load(
        &mut self,
        tensor: gguf::Tensor<'_>,
        rows: Range<usize>,
        file: &Arc<gguf::Gguf>,
    ) -> Result<Self::Weight>;

    /// [`Device::load`] of a matrix whose rows are looked up ([`Device::embed`]) and which is not multiplied.
    fn load_table(
        &mut self,
        tensor: gguf::Tensor<'_>,
        rows: Range<usize>,
        file: &Arc<gguf::Gguf>,
    ) -> Result<Self::Weight> {
        self.load(tensor, rows, file)
    }

    /// Waits for every [`Device::load`].
    fn finish_loading(&mut self) -> Result<()>;

    /// `(rows, cols)` of a weight.
    fn shape(weight: &Self::Weight) -> (usize, usize);

    /// An f32 buffer with these values.
    fn upload(&mut self, values: &[f32]) -> Result<Self::Buffer>;

    /// An f32 buffer of `len` values, whatever they are.
    fn alloc(&mut self, len: usize) -> Result<Self::Buffer>;

    fn alloc_cache(&mut self, shape: CacheShape) -> Result<Self::Cache>;

    /// Runs one step: makes `batch` current and carries the operations that `record` calls. A device
    /// may keep what `record` did for a batch of the same shape and repeat it without calling it, so
    /// `record` must depend on nothing but the batch's row count, span count and output count.
    fn step(
        &mut self,
        batch: &Batch,
        record: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<()>;

    /// `out[row] = table[tokens[row]] * scale`; `out` is `[rows][cols]`.
    fn embed(&mut self, table: &Self::Weight, scale: f32, out: &mut Self::Buffer) -> Result<()>;

    /// `q = rope(norm(Wq norm(x) + bq))`, `[rows][heads * head_dim]`; keys (normed and rotated) and values
    /// go to `cache` at each row's position.
    fn norm_qkv(
        &mut self,
        x: &Self::Buffer,
        op: &Qkv<'_, Self>,
        cache: &mut Self::Cache,
        place: CachePlace,
        q: &mut Self::Buffer,
    ) -> Result<()>;

    /// Causal attention of each row over its sequence's cache, this step's rows included;
    /// `out` is `[rows][heads * head_dim]`.
    fn attend(
        &mut self,
        q: &Self::Buffer,
        cache: &Self::Cache,
        place: CachePlace,
        op: &Attention<'_, Self>,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `x += scale * norm(W input + b)`.
    fn linear_add(
        &mut self,
        linear: Linear<'_, Self>,
        input: &Self::Buffer,
        residual: &Residual<'_, Self>,
        x: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out = activation(Wg norm(x), Wu norm(x))`, `[rows][up rows]`.
    fn norm_gate_up(
        &mut self,
        x: &Self::Buffer,
        op: &GateUp<'_, Self>,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `x += scale * norm(sum over the picked experts e of w_e * We_down activation(We_gate n, We_up n))`,
    /// with `n = norm(x)`. Only picked experts' weights are read.
    fn experts(&mut self, op: &Experts<'_, Self>, x: &mut Self::Buffer) -> Result<()>;

    /// `logits[i] = cap(scale * W norm(x[outputs[i]]))`, `[outputs][vocabulary]`.
    fn norm_head(
        &mut self,
        x: &Self::Buffer,
        op: &Head<'_, Self>,
        logits: &mut Self::Buffer,
    ) -> Result<()>;

    /// Chooses a token for each of the first `rows.len()` rows of `logits`, each `vocabulary` long.
    fn sample(
        &mut self,
        logits: &Self::Buffer,
        vocabulary: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<u32>>;

    /// See [`Runner::steps_begun`](crate::model::Runner::steps_begun).
    fn steps_begun(&self) -> usize {
        0
    }

    /// Copies values back; waits for all that was queued.
    fn read(&mut self, buffer: &Self::Buffer, offset: usize, out: &mut [f32]) -> Result<()>;
}
