//! The GPU backend: operations as launches of the kernels in the crate `kernels`.
//!
//! Launches go through a [`Driver`]: [`cuda`] on a card, [`emulated`] on a machine without one. Everything
//! above that line is the same code, so what the emulator checks is what the card runs.

mod attending;
mod attention;
pub mod cuda;
mod decode;
mod emulated;
mod experts;
mod hand_offs;
mod ops;
mod products;
mod program;
mod recording;
mod sampling;
mod selftest;
mod weights;

pub use emulated::Emulated;
pub use selftest::Outcome;

use super::{
    Attention, BLOCK_TOKENS, Batch, CachePart, CachePlace, CacheShape, CacheType, Device,
    DeviceInfo, Experts,
};
use super::{GateUp, Head, Linear, Qkv, Residual, SampleRow};
use super::{HandOff, OpTiming};
use crate::error::{Error, Result};
use crate::model::{DeviceChoice, MAX_OUTPUTS, MAX_ROWS};
use cuda_std::tensor::{TensorMap, Tiling};
use kernels::decode::{HALF, HALVES, LINE, NARROW_DIM, QUANTISED, WIDE};
use kernels::skinny;
use kernels::types::type_bit;
use std::collections::HashMap;
use std::io::Write;
use std::ops::Range;
use std::sync::Arc;

/// An address in device memory.
pub type Address = u64;

/// Memory of a device; freed with the driver that gave it, or by [`Driver::free`].
#[derive(Debug)]
pub struct Allocation {
    pub address: Address,
    pub bytes: usize,
}

/// What runs kernels: memory, copies, launches, all in order on one stream.
pub trait Driver: Send + Sized + 'static {
    fn info(&self) -> &DeviceInfo;
    fn multiprocessors(&self) -> u32;
    /// Bytes of shared memory that a block may have.
    fn shared_limit(&self) -> usize;
    fn free_bytes(&self) -> Result<u64>;

    /// Memory aligned to 256 bytes, its content whatever it was.
    fn alloc(&mut self, bytes: usize) -> Result<Allocation>;
    fn free(&mut self, allocation: Allocation);

    /// Copies to the device; `bytes` may change once this returns.
    fn write(&mut self, to: Address, bytes: &[u8]) -> Result<()>;

    /// Copies from the device; waits for all that was queued.
    fn read(&mut self, from: Address, bytes: &mut [u8]) -> Result<()>;

    /// Gets memory for the next allocations, `bytes` in all, at once where that is faster.
    fn reserve(&mut self, _bytes: usize) -> Result<()> {
        Ok(())
    }

    /// Brings up to [`Driver::STAGE_BYTES`] to a staging area on the device and calls `consume` with
    /// its address; what `consume` launches may read it. All of that may happen after this returns: at
    /// the latest [`Driver::wait`] does it, and returns what failed.
    fn stage(&mut self, piece: Piece, consume: Consume<Self>) -> Result<()>;

    /// Bytes that one [`Driver::stage`] takes.
    const STAGE_BYTES: usize;

    /// Launches `kernel` with its one argument struct. The pointers in `args` must be addresses that this
    /// driver allocated, good for what the kernel's documentation says it reads and writes.
    fn launch<A: Copy>(
        &mut self,
        kernel: &'static str,
        grid: (u32, u32),
        block: u32,
        shared: usize,
        args: &A,
    ) -> Result<()>;

    /// Waits for all that was queued.
    fn wait(&mut self) -> Result<()>;

    /// As [`Driver::launch`], with all blocks running together, so that they can wait for each other.
    fn launch_cooperative<A: Copy>(
        &mut self,
        kernel: &'static str,
        grid: u32,
        block: u32,
        shared: usize,
        args: &A,
    ) -> Result<()>;

    /// Says that steps of the kernel `decode` need no more than `needs` (`kernels::decode::NEEDS`), from now on, in
    /// addition to what was said before. Only their speed depends on it.
    fn settle(&mut self, _needs: u64) -> Result<()> {
        Ok(())
    }

    /// Lets steps of the kernel `decode` end at barriers that compute-sanitizer's racecheck can follow
    /// (`kernels::decode::STEP_BARRIER`). Said before the first.
    fn for_racecheck(&mut self) {}

    /// Whether all that was queued has ended.
    ///
    /// # Errors
    /// What it failed with.
    fn idle(&mut self) -> Result<bool>;

    /// Memory, zeroed, that kernels write and the host reads while they run; it lives as long as the driver.
    fn alloc_mapped(&mut self, bytes: usize) -> Result<Mapped>;

    /// Whether the kernels of `warpgroup` run here.
    fn warpgroups(&self) -> bool;

    /// Whether there is a copy engine, of which kernels for compute capability 9.0 make use.
    fn copy_engine(&self) -> bool;

    /// Describes a matrix for the [copy engine](Driver::copy_engine).
    fn tensor_map(&mut self, tiling: &Tiling) -> Result<TensorMap>;

    /// Names of the forms of the kernel `decode`, which differ in how weights come.
    const DECODE_KERNELS: &'static [&'static str] = &["decode"];

    /// Rows up to which weights are unpacked as they are multiplied (`skinny`); for more they are unpacked beforehand,
    /// once for all rows (`dense`). Measured on an H100.
    const SKINNY_ROWS: usize = skinny::ROWS as usize;
}

/// Memory that host and device share.
#[derive(Clone, Copy, Debug)]
pub struct Mapped {
    pub host: *mut u8,
    pub address: Address,
}

// The host's pointer is good on any thread.
unsafe impl Send for Mapped {}

/// What is to be done with bytes that reached the device, by their address there.
pub type Consume<D> = Box<dyn FnOnce(&mut D, Address) -> Result<()>>;

/// A part of a tensor's data on its way to a device.
pub struct Piece {
    pub file: Arc<gguf::Gguf>,
    pub tensor: String,
    /// Bytes of the tensor's data.
    pub range: std::ops::Range<usize>,
}

impl Piece {
    /// The bytes, in the mapped file.
    fn bytes(&self) -> Result<&[u8], gguf::Error> {
        Ok(&self.file.require(&self.tensor)?.data()[self.range.clone()])
    }

    /// Copies the bytes.
    #[cfg(feature = "cuda")]
    fn read(&self, out: &mut [u8]) -> Result<(), gguf::Error> {
        let tensor = self.file.require(&self.tensor)?;
        self.file.read(&tensor, self.range.start, out)
    }
}

/// f32 values on the device.
#[derive(Debug)]
pub struct Buffer {
    address: Address,
    len: usize,
}

impl Buffer {
    fn ptr(&self) -> *mut f32 {
        self.address as *mut f32
    }
}

/// A repacked weight matrix.
#[derive(Debug)]
pub struct Weight {
    matrix: kernels::types::Matrix,
    /// Columns without padding.
    cols: usize,
    quantised: bool,
}

// The addresses in a `Matrix` belong to the device, not to this thread.
unsafe impl Send for Weight {}

/// Keys and values on the device, layer after layer.
#[derive(Debug)]
pub struct Cache {
    keys: Address,
    values: Address,
    shape: CacheShape,
}

/// Memory that operations of a step use between them, grown as they need it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Scratch {
    /// f16 input rows of tensor-core products.
    Half,
    /// Queries, keys, values, or gate and up, before their epilogue.
    First,
    Second,
    /// Unpacked weights, and their biases.
    Weights,
    Biases,
    /// Sums of parts of products.
    Sums,
    /// The list of tiles of attention on tensor cores.
    Tiles,
    /// Normed rows in f32.
    Normed,
    /// Attention's splits.
    Partial,
    /// Rows between the matrices of adapters, in f32 and in f16.
    Low,
    LowHalf,
    /// Picked experts, their weights, and rows of theirs.
    Routing,
    Slots,
    SlotsUp,
    /// One layer of an 8-bit cache in f16, and which blocks of it.
    Unpacked,
    Blocks,
    /// Sampling: rows to draw from with the ids that they have seen, choices, and greatest ranks.
    Draws,
    Ids,
    Ranks,
    /// What the blocks of rows that are drawn from have in common.
    Drawing,
}

/// Sequences that one step can hold.
const MAX_SPANS: usize = 512;

/// The current step, as the kernels see it.
struct Current {
    memory: Allocation,
    tables: Option<Allocation>,
    /// Blocks of a table at most, and of the step's longest, each of whose tables takes as much.
    table_room: usize,
    table_stride: usize,
    rows: usize,
    outputs: usize,
    splits: u32,
    /// First row, rows, and tokens before, of each sequence.
    spans: Vec<[usize; 3]>,
    /// Cache blocks of the sequences, of each part.
    blocks: [Vec<u32>; 2],
    /// Tiles of attention on tensor cores; the first layer lays them out.
    tiles: Option<u32>,
    /// Host copy of the arrays, reused.
    staging: Vec<u32>,
}

/// A GPU, real or emulated.
pub struct Gpu<D: Driver> {
    driver: D,
    exact: bool,
    current: Current,
    scratch: HashMap<Scratch, Allocation>,
    /// Query heads, set by the first attention; splits depend on it.
    heads: usize,
    /// Whether heads are no wider than a decode step's attention takes.
    narrow: bool,
    /// What decides how a decode step's attention is split; set along with `heads`.
    attending: attending::Attending,
    /// What the attention that is recorded next does to its queries and keys.
    late: Option<attention::LateTurn>,
    /// Whether steps of one row may be fused; see [`Device::set_plain`].
    plain: bool,
    decode: decode::Decode,
}

impl Gpu<Emulated> {
    /// The kernels on the emulator.
    pub fn emulated(exact: bool) -> Result<Self> {
        Self::new(Emulated::new(), exact)
    }
}

impl Gpu<cuda::Cuda> {
    /// CUDA device `index`.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a driver, a device of that number, or a driver new enough.
    pub fn cuda(index: usize, exact: bool) -> Result<Self> {
        Self::new(cuda::Cuda::open(index)?, exact)
    }
}

impl<D: Driver> Gpu<D> {
    fn new(mut driver: D, exact: bool) -> Result<Self> {
        let words = 4 * MAX_ROWS + MAX_OUTPUTS;
        let memory = driver.alloc(4 * words)?;
        let decode = decode::Decode::new(&mut driver)?;
        Ok(Gpu {
            driver,
            decode,
            exact,
            current: Current {
                memory,
                tables: None,
                table_room: 0,
                table_stride: 0,
                rows: 0,
                outputs: 0,
                splits: 1,
                spans: Vec::new(),
                blocks: Default::default(),
                tiles: None,
                staging: vec![0; words],
            },
            scratch: HashMap::new(),
            heads: 1,
            narrow: true,
            attending: attending::Attending::default(),
            late: None,
            plain: true,
        })
    }

    /// Scratch memory of at least `bytes`.
    fn scratch(&mut self, which: Scratch, bytes: usize) -> Result<Address> {
        if let Some(a) = self.scratch.get(&which)
            && a.bytes >= bytes
        {
            return Ok(a.address);
        }
        // Recorded steps hold the old address.
        self.forget_programs();
        if let Some(old) = self.scratch.remove(&which) {
            self.driver.wait()?;
            self.driver.free(old);
        }
        let new = self.driver.alloc(bytes)?;
        let address = new.address;
        self.scratch.insert(which, new);
        Ok(address)
    }

    fn set_batch(&mut self, batch: &Batch) -> Result<()> {
        self.decode.table.clear();
        self.forget_choice();
        let current = &mut self.current;
        let Some(tables) = &current.tables else {
            return Err(Error::Request(
                "a step before the cache was allocated".into(),
            ));
        };
        if batch.spans.len() > MAX_SPANS {
            let n = batch.spans.len();
            return Err(Error::Request(format!(
                "a step of {n} sequences, at most {MAX_SPANS}"
            )));
        }
        let ends = batch.spans.iter().map(|span| span.past + span.len);
        let longest = ends.max().unwrap_or(0);
        // Tables one after the other, so that those of many short sequences are little to copy.
        let stride = longest.div_ceil(BLOCK_TOKENS);
        current.table_stride = stride;
        let rows = batch.tokens.len();
        // Array after array without gaps, so that a step of few rows copies little.
        let s = &mut current.staging[..4 * rows + batch.outputs.len()];
        // Of each part of the cache; that of rings as long as the other, so that kernels know of no rings.
        let mut list = [Vec::new(), Vec::new()];
        s[..rows].copy_from_slice(&batch.tokens);
        current.spans.clear();
        current.blocks.iter_mut().for_each(Vec::clear);
        current.tiles = None;
        for (i, span) in batch.spans.iter().enumerate() {
            for row in 0..span.len {
                s[rows + span.start + row] = (span.past + row) as u32;
                s[2 * rows + span.start + row] = i as u32;
                s[3 * rows + span.start + row] = span.horizon.max(span.past + span.len) as u32;
            }
            current.spans.push([span.start, span.len, span.past]);
            let used = (span.past + span.len).div_ceil(BLOCK_TOKENS);
            for (part, table) in [CachePart::Whole, CachePart::Ring]
                .into_iter()
                .zip(&mut list)
            {
                if part == CachePart::Ring && span.ring.is_empty() {
                    continue;
                }
                table.resize(i * stride, 0);
                table.extend((0..used).map(|index| span.block(index, part)));
                let ring = span.ring.len();
                let distinct = if part == CachePart::Ring {
                    used.min(ring)
                } else {
                    used
                };
                let last = table[i * stride + used - distinct..].iter();
                current.blocks[part as usize].extend(last);
            }
        }
        for (i, &row) in batch.outputs.iter().enumerate() {
            s[4 * rows + i] = row as u32;
        }
        self.driver
            .write(current.memory.address, bytemuck::cast_slice(s))?;
        for (part, table) in list.iter().enumerate().filter(|(_, t)| !t.is_empty()) {
            let to = tables.address + (4 * part * MAX_SPANS * current.table_room) as u64;
            self.driver.write(to, bytemuck::cast_slice(table))?;
        }
        current.rows = rows;
        current.outputs = batch.outputs.len();
        current.splits = attention::attention_splits(
            self.driver.multiprocessors(),
            current.rows * self.heads,
            longest,
        );
        Ok(())
    }

    /// The arrays of the current step, with the block tables of a part of the cache.
    fn step_args(&self, part: CachePart) -> kernels::rows::Step {
        let tables = self.current.tables.as_ref().map_or(0, |t| t.address);
        let skipped = part as usize * MAX_SPANS * self.current.table_room;
        let rows = self.current.rows;
        let at = |words: usize| (self.current.memory.address + 4 * words as u64) as *const u32;
        kernels::rows::Step {
            tokens: at(0),
            positions: at(rows),
            sequences: at(2 * rows),
            tables: (tables + 4 * skipped as u64) as *const u32,
            table_stride: self.current.table_stride as u32,
            rows: rows as u32,
            outputs: at(4 * rows),
            horizons: at(3 * rows),
        }
    }
}

impl<D: Driver> Device for Gpu<D> {
    type Weight = Weight;
    type Buffer = Buffer;
    type Cache = Cache;
    const STEP_ROWS: usize = MAX_ROWS;
    // For more, products unpack weights beforehand, and are summed in another order.
    const MAX_BATCH: usize = if D::SKINNY_ROWS < MAX_OUTPUTS {
        D::SKINNY_ROWS
    } else {
        MAX_OUTPUTS
    };

    fn info(&self) -> &DeviceInfo {
        self.driver.info()
    }

    fn free_bytes(&self) -> Result<u64> {
        self.driver.free_bytes()
    }

    fn working_bytes(&self, widest: usize) -> u64 {
        working_bytes(widest)
    }

    fn set_plain(&mut self, plain: bool) {
        self.plain = plain;
    }

    fn profile(&mut self) -> Result<Vec<OpTiming>> {
        self.timings()
    }

    fn hand_offs(&mut self) -> Result<Vec<HandOff>> {
        hand_offs::measure(&mut self.driver)
    }

    fn begin_loading(&mut self, file: &Arc<gguf::Gguf>) -> Result<()> {
        let bytes = file.tensors().map(weights::device_bytes).sum();
        self.driver.reserve(bytes)
    }

    fn load(
        &mut self,
        tensor: gguf::Tensor<'_>,
        rows: Range<usize>,
        file: &Arc<gguf::Gguf>,
    ) -> Result<Weight> {
        let weight = weights::load(&mut self.driver, tensor, rows, file)?;
        self.decode.needs |= u64::from(type_bit(weight.matrix.ty));
        if program::cut_of(&weight.matrix, self.driver.multiprocessors()) != 0 {
            self.decode.needs |= HALVES;
        }
        Ok(weight)
    }

    fn finish_loading(&mut self) -> Result<()> {
        self.driver.wait()
    }

    fn shape(weight: &Weight) -> (usize, usize) {
        (weight.matrix.rows as usize, weight.cols)
    }

    fn upload(&mut self, values: &[f32]) -> Result<Buffer> {
        let buffer = self.alloc(values.len())?;
        self.driver
            .write(buffer.address, bytemuck::cast_slice(values))?;
        Ok(buffer)
    }

    fn alloc(&mut self, len: usize) -> Result<Buffer> {
        let allocation = self.driver.alloc(4 * len)?;
        Ok(Buffer {
            address: allocation.address,
            len,
        })
    }

    fn alloc_cache(&mut self, shape: CacheShape) -> Result<Cache> {
        check_cache(shape)?;
        self.narrow = shape.head_dim <= kernels::decode::MAX_HEAD_DIM as usize;
        if shape.head_dim > NARROW_DIM as usize {
            self.decode.needs |= WIDE;
        }
        self.decode.needs |= match shape.ty {
            CacheType::Q8_0 => QUANTISED,
            _ => HALF,
        };
        // The copy engine brings lines, the last of which may reach past the last row's end.
        let bytes = shape.bytes() + LINE as usize;
        let keys = self.driver.alloc(bytes)?;
        let values = self.driver.alloc(bytes)?;
        self.current.table_room = shape.blocks;
        self.current.tables = Some(self.driver.alloc(4 * 2 * MAX_SPANS * shape.blocks)?);
        Ok(Cache {
            keys: keys.address,
            values: values.address,
            shape,
        })
    }

    fn step(
        &mut self,
        batch: &Batch,
        record: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        // A step without outputs is one whose hidden states may be read.
        let outputs = !batch.outputs.is_empty();
        if batch.tokens.len() == 1 && outputs && !self.exact && self.plain && self.narrow {
            return self.decode_step(batch, record);
        }
        self.set_batch(batch)?;
        record(self)
    }

    fn embed(&mut self, table: &Weight, scale: f32, out: &mut Buffer) -> Result<()> {
        self.op_embed(table, scale, out)
    }

    fn norm_qkv(
        &mut self,
        x: &Buffer,
        op: &Qkv<'_, Self>,
        cache: &mut Cache,
        place: CachePlace,
        q: &mut Buffer,
    ) -> Result<()> {
        self.op_norm_qkv(x, op, cache, place, q)
    }

    fn attend(
        &mut self,
        q: &Buffer,
        cache: &Cache,
        place: CachePlace,
        op: &Attention<'_, Self>,
        out: &mut Buffer,
    ) -> Result<()> {
        self.op_attend(q, cache, place, op, out)
    }

    fn linear_add(
        &mut self,
        linear: Linear<'_, Self>,
        input: &Buffer,
        residual: &Residual<'_, Self>,
        x: &mut Buffer,
    ) -> Result<()> {
        self.op_linear_add(linear, input, residual, x)
    }

    fn norm_gate_up(&mut self, x: &Buffer, op: &GateUp<'_, Self>, out: &mut Buffer) -> Result<()> {
        self.op_norm_gate_up(x, op, out)
    }

    fn experts(&mut self, op: &Experts<'_, Self>, x: &mut Buffer) -> Result<()> {
        self.op_experts(op, x)
    }

    fn norm_head(&mut self, x: &Buffer, op: &Head<'_, Self>, logits: &mut Buffer) -> Result<()> {
        self.op_norm_head(x, op, logits)
    }

    fn sample(
        &mut self,
        logits: &Buffer,
        vocabulary: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<u32>> {
        self.op_sample(logits, vocabulary, rows)
    }

    fn steps_begun(&self) -> usize {
        self.decode.steps_begun()
    }

    fn read(&mut self, buffer: &Buffer, offset: usize, out: &mut [f32]) -> Result<()> {
        if offset + out.len() > buffer.len {
            return Err(Error::Request(format!(
                "a read of values {offset}..{} from a buffer of {}",
                offset + out.len(),
                buffer.len
            )));
        }
        self.driver.read(
            buffer.address + 4 * offset as u64,
            bytemuck::cast_slice_mut(out),
        )
    }
}

/// Whether the kernels read weights of this type.
pub fn reads(ty: gguf::GgmlType) -> bool {
    kernels::types::LAYOUTS.iter().any(|l| l.ty == ty as u32)
}

/// See [`Device::working_bytes`].
pub fn working_bytes(widest: usize) -> u64 {
    // Unpacked weights, two f32 intermediates of a step's rows, and sums of a head's products with half a million rows.
    (products::SLICE_BYTES + 2 * 4 * MAX_ROWS * widest + (128 << 20)) as u64
}

/// # Errors
/// A cache that the kernels cannot work with.
pub fn check_cache(shape: CacheShape) -> Result<()> {
    if shape.head_dim.is_multiple_of(8) && shape.head_dim <= 256 {
        return Ok(());
    }
    Err(Error::Request(format!(
        "heads of {} elements; the GPU kernels take multiples of 8 up to 256",
        shape.head_dim
    )))
}

/// Runs every kernel on `device` against a plain reference, a line each; with `racecheck` on a card with barriers that
/// compute-sanitizer's tool of that name can follow (`kernels::decode::STEP_BARRIER`).
///
/// # Errors
/// No such device. `Ok(false)` where a kernel's result is wrong.
pub fn selftest(device: DeviceChoice, racecheck: bool, out: &mut dyn Write) -> Result<bool> {
    let index = match device {
        DeviceChoice::Emulated => return selftest::report(Emulated::new(), out),
        DeviceChoice::Cuda(index) => index,
        DeviceChoice::Auto => 0,
        DeviceChoice::Cpu => {
            return Err(Error::Request(
                "selftest checks the GPU kernels; expected --device cuda or --device emulated"
                    .into(),
            ));
        }
    };
    let mut cuda = cuda::Cuda::open(index)?;
    if racecheck {
        cuda.for_racecheck();
    }
    selftest::report(cuda, out)
}
