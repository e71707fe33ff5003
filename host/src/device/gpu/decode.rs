//! Decode steps: the operations of one row, recorded as a program that one launch of the kernel
//! `decode` carries.
//!
//! A step costs the host one launch: token and position travel as arguments, the block table only when it
//! grew, and the likeliest token comes back through memory that the host reads while the device runs.

use super::{Address, Allocation, Buffer, Driver, Gpu, Mapped};
use crate::device::{BLOCK_TOKENS, Batch};
use crate::error::{Error, Result};
use kernels::decode::{self, Choice, DecodeArgs, MAX_SPLITS, Op, kind};
use kernels::types::GROUP;
use std::collections::HashMap;

/// Tokens that are worth a split of their own: four for each warp of the block that takes it.
const SPLIT_TOKENS: usize = 64;

/// What decides how a step's operations look.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Shape {
    outputs: usize,
    splits: u32,
}

/// Operations in device memory.
struct Program {
    ops: Allocation,
    count: u32,
    norm_len: u32,
    shared: usize,
}

/// Operations on their way into a program.
#[derive(Default)]
struct Recording(Vec<Op>);

// The addresses in an `Op` belong to the device, not to this thread.
unsafe impl Send for Recording {}

/// Where the parts of an attention lie that the next product takes together.
#[derive(Clone, Copy)]
struct Parts {
    /// The buffer that the attention's result would have been written to.
    stands_for: Address,
    address: Address,
    head_dim: u32,
}

/// The state of decode steps.
pub(super) struct Decode {
    programs: HashMap<Shape, Program>,
    /// Set while a step is recorded.
    recording: Option<Recording>,
    parts: Option<Parts>,
    splits: u32,
    /// An operation that runs alone.
    single: Allocation,
    barrier: Address,
    choice: Address,
    chosen: Mapped,
    sequence: u32,
    /// The launch whose choice belongs to the current logits.
    chooser: Option<u32>,
    /// The block table on the device; empty where that is another step's.
    pub(super) table: Vec<u32>,
}

impl Decode {
    pub(super) fn new<D: Driver>(driver: &mut D) -> Result<Self> {
        let single = driver.alloc(size_of::<Op>())?;
        let barrier = driver.alloc(4)?;
        driver.write(barrier.address, &[0; 4])?;
        let choice = driver.alloc(size_of::<Choice>())?;
        driver.write(choice.address, &[0; size_of::<Choice>()])?;
        Ok(Self {
            programs: HashMap::new(),
            recording: None,
            parts: None,
            splits: 1,
            single,
            barrier: barrier.address,
            choice: choice.address,
            chosen: driver.alloc_mapped(8)?,
            sequence: 0,
            chooser: None,
            table: Vec::new(),
        })
    }
}

/// Shared memory and the longest norm weight of a launch of `ops`.
fn needs(ops: &[Op]) -> (usize, usize) {
    let products = ops
        .iter()
        .filter(|op| !matches!(op.kind, kind::EMBED | kind::ATTEND));
    let (mut row, mut norm) = (0, 0);
    for op in products {
        let cols = (op.input.len as usize).next_multiple_of(GROUP);
        row = row.max(decode::row_bytes(cols, op.input.keep_f32 != 0));
        if !op.input.norm.is_null() {
            norm = norm.max(op.input.len as usize);
        }
    }
    (decode::shared_bytes(norm, row), norm)
}

/// The bytes of operations, as the device reads them.
fn bytes(ops: &[Op]) -> &[u8] {
    // An `Op` is plain data; its padding is never read.
    unsafe { std::slice::from_raw_parts(ops.as_ptr().cast(), size_of_val(ops)) }
}

impl<D: Driver> Gpu<D> {
    /// Whether operations are being recorded for a decode step.
    pub(super) fn fused(&self) -> bool {
        self.decode.recording.is_some()
    }

    /// Adds an operation to the step that is being recorded.
    pub(super) fn push(&mut self, op: Op) {
        if let Some(recording) = &mut self.decode.recording {
            recording.0.push(op);
        }
    }

    /// Drops every program; what they point to is about to move.
    pub(super) fn forget_programs(&mut self) {
        for (_, program) in self.decode.programs.drain() {
            self.driver.free(program.ops);
        }
    }

    /// Says that the logits are no longer those that [`Gpu::chosen`] knows the greatest of.
    pub(super) fn forget_choice(&mut self) {
        self.decode.chooser = None;
    }

    /// Splits of each head's tokens in the current step.
    pub(super) fn decode_splits(&self) -> u32 {
        self.decode.splits
    }

    /// Notes that what `out` would hold lies in parts at `address`.
    pub(super) fn set_parts(&mut self, out: &Buffer, address: Address, head_dim: usize) {
        self.decode.parts = Some(Parts {
            stands_for: out.address,
            address,
            head_dim: head_dim as u32,
        });
    }

    /// Address and head size of the parts that `input` stands for, if it does.
    pub(super) fn parts_of(&self, input: *const f32) -> Option<(*const f32, u32)> {
        self.decode
            .parts
            .filter(|p| p.stands_for == input as Address)
            .map(|p| (p.address as *const f32, p.head_dim))
    }

    /// A step of one row.
    pub(super) fn decode_step(
        &mut self,
        batch: &Batch,
        record: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let (Some(&token), Some(span)) = (batch.tokens.first(), batch.spans.first()) else {
            return Err(Error::Request("a step without rows".into()));
        };
        let Some(tables) = self.current.tables.as_ref().map(|t| t.address) else {
            return Err(Error::Request(
                "a step before the cache was allocated".into(),
            ));
        };
        let tokens = span.past + 1;
        let table = &span.blocks[..tokens.div_ceil(BLOCK_TOKENS)];
        if self.decode.table != table {
            self.driver.write(tables, bytemuck::cast_slice(table))?;
            self.decode.table = table.to_vec();
        }
        self.current.rows = 1;
        self.current.outputs = batch.outputs.len();
        let blocks = self.driver.multiprocessors();
        self.decode.splits = (blocks / self.heads as u32)
            .min(tokens.div_ceil(SPLIT_TOKENS) as u32)
            .clamp(1, MAX_SPLITS);
        let shape = Shape {
            outputs: batch.outputs.len(),
            splits: self.decode.splits,
        };
        if !self.decode.programs.contains_key(&shape) {
            let program = self.record(record)?;
            self.decode.programs.insert(shape, program);
        }
        let Some(program) = self.decode.programs.get(&shape) else {
            return Ok(());
        };
        let (ops, count) = (program.ops.address, program.count);
        let (norm_len, shared) = (program.norm_len, program.shared);
        self.decode.chooser = None;
        self.run_program(ops, count, norm_len, shared, token, span.past as u32)?;
        if shape.outputs > 0 {
            self.decode.chooser = Some(self.decode.sequence);
        }
        Ok(())
    }

    fn record(&mut self, record: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<Program> {
        self.decode.recording = Some(Recording::default());
        let recorded = record(self);
        self.decode.parts = None;
        let ops = self.decode.recording.take().unwrap_or_default().0;
        recorded?;
        let memory = self.driver.alloc(size_of_val(ops.as_slice()))?;
        self.driver.write(memory.address, bytes(&ops))?;
        let (shared, norm_len) = needs(&ops);
        Ok(Program {
            ops: memory,
            count: ops.len() as u32,
            norm_len: norm_len as u32,
            shared,
        })
    }

    fn run_program(
        &mut self,
        ops: Address,
        count: u32,
        norm_len: u32,
        shared: usize,
        token: u32,
        position: u32,
    ) -> Result<()> {
        let decode = &mut self.decode;
        decode.sequence = decode.sequence.wrapping_add(1);
        let args = DecodeArgs {
            ops: ops as *const Op,
            count,
            token,
            position,
            sequence: decode.sequence,
            table: self.current.tables.as_ref().map_or(0, |t| t.address) as *const u32,
            barrier: decode.barrier as *mut u32,
            choice: decode.choice as *mut Choice,
            chosen: decode.chosen.address as *mut u64,
            norm_len,
        };
        self.driver.launch_cooperative(
            "decode",
            self.driver.multiprocessors(),
            decode::THREADS,
            shared,
            &args,
        )
    }

    /// Runs one product by itself, outside a recorded step.
    pub(super) fn run_single(&mut self, op: Op) -> Result<()> {
        let ops = [op];
        let (shared, norm_len) = needs(&ops);
        let address = self.decode.single.address;
        self.driver.write(address, bytes(&ops))?;
        self.run_program(address, 1, norm_len as u32, shared, 0, 0)?;
        self.decode.chooser = (op.choose != 0).then_some(self.decode.sequence);
        Ok(())
    }

    /// The id of the greatest of the current logits where the device chose it already.
    pub(super) fn chosen(&mut self) -> Result<Option<u32>> {
        /// Looks at the memory between two looks at the stream, which cost more.
        const LOOKS: usize = 2000;
        let Some(sequence) = self.decode.chooser else {
            return Ok(None);
        };
        let look = || {
            // Mapped memory, eight bytes, aligned; written by the device, hence volatile.
            let v = unsafe { self.decode.chosen.host.cast::<u64>().read_volatile() };
            ((v >> 32) as u32 == sequence).then_some(v as u32)
        };
        loop {
            for _ in 0..LOOKS {
                if let Some(id) = look() {
                    return Ok(Some(id));
                }
                std::hint::spin_loop();
            }
            if self.driver.idle()? {
                return match look() {
                    Some(id) => Ok(Some(id)),
                    None => Err(Error::Device {
                        device: self.driver.info().name.clone(),
                        what: "a decode step ended without choosing a token".into(),
                    }),
                };
            }
        }
    }
}
