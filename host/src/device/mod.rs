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
//! activations and cache in f32 throughout; otherwise it may quantise activations to 8 bits before a
//! product and keeps the cache in f16.

use crate::error::Result;
use crate::sampling::SamplingParams;
use std::sync::Arc;

pub mod cpu;
pub mod gpu;
pub mod host_memory;
pub mod ptx;

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
    /// Instruction set or compute capability in use, such as `avx512-vnni` or `sm_90`.
    pub architecture: String,
}

/// Consecutive rows of a [`Batch`] that belong to one sequence.
#[derive(Clone, Debug, PartialEq)]
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
}

/// The shape of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CacheShape {
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Blocks of [`BLOCK_TOKENS`] tokens.
    pub blocks: usize,
}

impl CacheShape {
    /// Elements of the keys (as many are the values') of all layers.
    pub fn elements(&self) -> usize {
        self.layers * self.blocks * BLOCK_TOKENS * self.kv_heads * self.head_dim
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

/// A matrix, `rows × cols` as `y = W x` reads it, and its bias.
pub struct Linear<'a, D: Device> {
    pub weight: &'a D::Weight,
    /// f32, `rows` long.
    pub bias: Option<&'a D::Buffer>,
}

impl<D: Device> Clone for Linear<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Linear<'_, D> {}

/// RMS norm: `x / sqrt(mean(x²) + eps) * weight`.
pub struct Norm<'a, D: Device> {
    pub weight: &'a D::Buffer,
    pub eps: f32,
}

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
    /// Elements of each head that rotate (the first ones), even, at most `head_dim`.
    pub dims: usize,
    pub layout: RopeLayout,
}

/// First step of a layer: norm, Q/K/V products, biases, rotation, cache write.
pub struct Qkv<'a, D: Device> {
    pub norm: Norm<'a, D>,
    pub q: Linear<'a, D>,
    pub k: Linear<'a, D>,
    pub v: Linear<'a, D>,
    pub rope: Rope<'a, D>,
    pub heads: Heads,
}

/// How one row's next token is chosen; see [`crate::sampling`] for the exact definition.
#[derive(Clone, Debug)]
pub struct SampleRow<'a> {
    pub params: &'a SamplingParams,
    /// Uniform in `[0, 1)`: `sampling::uniform(seed, index)`.
    pub u: f32,
    /// Distinct token ids of the prompt and of what was generated, for the repetition penalty.
    pub seen: &'a [u32],
}

/// Carries the operations of a forward pass.
///
/// Operations work on the rows of the batch given to [`Device::step`], in order, and may be queued:
/// an error of one may show at a later one, at [`Device::read`] or [`Device::sample`] at the latest.
/// What one operation of a decode step took, by the device's own clock.
#[derive(Clone, Copy, Debug)]
pub struct OpTiming {
    pub name: &'static str,
    /// Bytes of weights that it reads.
    pub bytes: u64,
    /// Nanoseconds from its begin until its input was there.
    pub wait_ns: u64,
    /// From then until its output was written.
    pub work_ns: u64,
    /// From its begin to that of the next.
    pub total_ns: u64,
}

pub trait Device: Send + Sized + 'static {
    /// A weight matrix, in whatever layout the device multiplies fastest, still quantised.
    type Weight: Send;
    /// f32 values: activations, norms, biases, tables.
    type Buffer: Send;
    /// Paged keys and values of every layer.
    type Cache: Send;

    /// Rows of one step at most: enough to fill the device, few enough that a step is short.
    const STEP_ROWS: usize;

    fn info(&self) -> &DeviceInfo;

    /// Bytes free for [`Device::load`], [`Device::alloc`] and [`Device::alloc_cache`] together.
    fn free_bytes(&self) -> Result<u64>;

    /// Most bytes that operations take for themselves beside the buffers they are given, `widest` being the
    /// most values that a row has between two of them.
    fn working_bytes(&self, widest: usize) -> u64 {
        let _ = widest;
        0
    }

    /// Times the operations of the coming decode steps; gives those of the last step that was timed so. Nothing
    /// on a device without such a clock.
    fn profile(&mut self) -> Result<Vec<OpTiming>> {
        Ok(Vec::new())
    }

    /// Bytes per element of the KV cache: 2 (f16), or 4 with `exact`.
    fn cache_element_bytes(&self) -> usize;

    /// Makes room for all weights of a file, which are loaded next.
    fn begin_loading(&mut self, _file: &Arc<gguf::Gguf>) -> Result<()> {
        Ok(())
    }

    /// Takes a matrix from the mapped file; copies may still run when it returns.
    fn load(&mut self, tensor: gguf::Tensor<'_>, file: &Arc<gguf::Gguf>) -> Result<Self::Weight>;

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

    /// `q = rope(Wq norm(x) + bq)`, `[rows][heads * head_dim]`; keys (rotated) and values go to `cache`
    /// at each row's position.
    fn norm_qkv(
        &mut self,
        x: &Self::Buffer,
        op: &Qkv<'_, Self>,
        cache: &mut Self::Cache,
        layer: usize,
        q: &mut Self::Buffer,
    ) -> Result<()>;

    /// Causal attention of each row over its sequence's cache, this step's rows included;
    /// `out` is `[rows][heads * head_dim]`.
    fn attend(
        &mut self,
        q: &Self::Buffer,
        cache: &Self::Cache,
        layer: usize,
        heads: Heads,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `x += W input + b`.
    fn linear_add(
        &mut self,
        linear: Linear<'_, Self>,
        input: &Self::Buffer,
        x: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out = silu(Wg norm(x)) * (Wu norm(x))`, `[rows][gate rows]`.
    fn norm_gate_up(
        &mut self,
        x: &Self::Buffer,
        norm: Norm<'_, Self>,
        gate: Linear<'_, Self>,
        up: Linear<'_, Self>,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `logits[i] = W norm(x[outputs[i]])`, `[outputs][vocabulary]`.
    fn norm_head(
        &mut self,
        x: &Self::Buffer,
        norm: Norm<'_, Self>,
        head: Linear<'_, Self>,
        logits: &mut Self::Buffer,
    ) -> Result<()>;

    /// Chooses a token for each of the first `rows.len()` rows of `logits`, each `vocabulary` long.
    fn sample(
        &mut self,
        logits: &Self::Buffer,
        vocabulary: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<u32>>;

    /// Copies values back; waits for all that was queued.
    fn read(&mut self, buffer: &Self::Buffer, offset: usize, out: &mut [f32]) -> Result<()>;
}
