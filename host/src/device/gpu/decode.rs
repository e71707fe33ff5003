//! Decode steps: the operations of one row, recorded as a program that one launch of the kernel
//! `decode` carries.
//!
//! A step costs the host one launch at most: token and position travel as arguments, the block table only when it
//! grew, and the likeliest token comes back through memory that the host reads while the device runs. Where what a step
//! chooses is the next one's token, a launch may carry several. A token that is drawn takes a launch of its own behind its step's
//! ([`super::sampling`]), and the next step begins with it all the same.
//!
//! What operations hand each other lies in buffers of its own, whose words carry the number of their writer
//! (`kernels::decode`, [`super::recording`]).

use super::program::{Behind, Cost, FLYING, Plan, Room, cost, listing, plan};
use super::recording::{Recording, Role, Writes, next_base};
use super::sampling::Drawing;
use super::{Address, Allocation, Driver, Gpu, Mapped};
use crate::device::{BLOCK_TOKENS, Batch, OpTiming};
use crate::error::{Error, Result};
use cuda_std::tensor::TensorMap;
use kernels::decode::{
    CHOICES, CHOSEN, DecodeArgs, MAX_SEGMENTS, NO_OP, NUMBERS, Op, Segment, THREADS, TRACED, kind,
    point,
};
use std::collections::HashMap;

/// What decides how a step's operations look.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Shape {
    outputs: usize,
    splits: u32,
}

/// Bytes of a choice as the host reads it.
const CHOICE_BYTES: usize = 8;

/// Most steps of a launch, and how many bytes of weights they may read together: who wants the device for something else waits for
/// their end, two milliseconds or so.
pub(super) const MAX_STEPS: u32 = 8;
const STEPS_BYTES: u64 = 3 << 30;
const _: () = assert!(
    CHOICES > 2 * MAX_STEPS,
    "the host reads one before it is overwritten"
);

/// Elements of the cache that a multiprocessor keeps or does not keep together.
const SECTOR: u32 = 16;

/// Steps that have begun before the host knew their tokens: each goes on with the choice of the one before it.
#[derive(Clone, Copy)]
struct Ahead {
    /// The number of the next one, its position, and how many there are from it on.
    sequence: u32,
    position: u32,
    left: u32,
    /// How the next one's token is drawn, if it is.
    drawing: Option<Drawing>,
    /// What the one before it chose, once the host knows it.
    token: Option<u32>,
}

/// Steps that can go on with what the current one chooses.
#[derive(Clone, Copy)]
pub(super) struct Following {
    shape: Shape,
    /// The first one's.
    position: u32,
    pub(super) steps: u32,
}

/// Operations in device memory, and what lies behind them.
struct Program {
    ops: Allocation,
    behind: Behind,
    count: u32,
    room: Room,
    writes: Vec<Writes>,
    /// Numbers that it takes, and by how much more those of another step behind it are.
    numbers: u64,
    stride: u64,
    /// How many steps a launch may carry.
    steps: u32,
    /// Of each operation.
    names: Vec<&'static str>,
    costs: Vec<Cost>,
}

/// Where step `sequence` leaves its choice for the host, in bytes.
fn choice_offset(sequence: u32) -> usize {
    (sequence % CHOICES) as usize * CHOICE_BYTES
}

/// A program's launch.
struct Run {
    ops: Address,
    behind: Behind,
    count: u32,
    room: Room,
    /// See [`DecodeArgs`].
    base: u32,
    stride: u32,
    token: u32,
    position: u32,
    steps: u32,
}

/// The state of decode steps.
pub(super) struct Decode {
    programs: HashMap<Shape, Program>,
    /// Set while a step is recorded.
    recording: Option<Recording>,
    numbered: HashMap<Role, Allocation>,
    /// The number of a buffer's last write, counted on from the first launch.
    last: HashMap<Role, u64>,
    /// The next launch's first number.
    numbers: u64,
    splits: u32,
    /// What steps of the model on the device will need, as far as that is known (`kernels::decode::NEEDS`).
    pub(super) needs: u64,
    /// An operation that runs alone.
    single: Allocation,
    ranks: Address,
    /// The last [`CHOICES`] choices of the likeliest, and of those drawn: some may be made before the host has read the last.
    chosen: Mapped,
    drawn: Mapped,
    /// The last choice, for a step that goes on with it; behind it the last one drawn.
    choice: Address,
    sequence: u32,
    /// The position of the last step.
    position: u32,
    /// Where steps write their times, if they do, and the shape of the last that did, with its position.
    trace: Option<Allocation>,
    traced: Option<(Shape, u32)>,
    /// The step whose choice belongs to the current logits.
    chooser: Option<u32>,
    /// How that has begun to be drawn ahead, if it has; where its token is the likeliest, that is `None` inside.
    drawing: Option<Option<Drawing>>,
    ahead: Option<Ahead>,
    /// The block table on the device; empty where that is another step's. It may be longer than the sequence.
    pub(super) table: Vec<u32>,
}

impl Decode {
    pub(super) fn new<D: Driver>(driver: &mut D) -> Result<Self> {
        let blocks = driver.multiprocessors();
        let single = listing(driver, &[NO_OP], blocks)?.0.len();
        let single = driver.alloc(single + MAX_SEGMENTS * size_of::<Segment>())?;
        let ranks = vec![0; 16 * driver.multiprocessors() as usize];
        let ranks_on = driver.alloc(ranks.len())?;
        driver.write(ranks_on.address, &ranks)?;
        Ok(Self {
            programs: HashMap::new(),
            recording: None,
            numbered: HashMap::new(),
            last: HashMap::new(),
            numbers: 0,
            splits: 1,
            needs: 0,
            single,
            ranks: ranks_on.address,
            chosen: driver.alloc_mapped(CHOICES as usize * CHOICE_BYTES)?,
            drawn: driver.alloc_mapped(CHOICES as usize * CHOICE_BYTES)?,
            choice: driver.alloc(2 * CHOICE_BYTES)?.address,
            sequence: 0,
            position: 0,
            trace: None,
            traced: None,
            chooser: None,
            drawing: None,
            ahead: None,
            table: Vec::new(),
        })
    }
}

impl Decode {
    /// Steps that have begun before the host asked for them.
    pub(super) fn steps_begun(&self) -> usize {
        self.ahead.map_or(0, |ahead| ahead.left as usize)
    }
}

impl<D: Driver> Gpu<D> {
    /// Whether operations are being recorded for a decode step.
    pub(super) fn fused(&self) -> bool {
        self.decode.recording.is_some()
    }

    /// Adds an operation to the step that is being recorded; it writes the buffers `outputs`.
    pub(super) fn push(&mut self, name: &'static str, op: Op, outputs: &[Role]) {
        if let Some(recording) = &mut self.decode.recording {
            recording.push(name, op, outputs);
        }
    }

    /// The buffer of numbered words for `role`, at least `words` long.
    pub(super) fn numbered(&mut self, role: Role, words: usize) -> Result<*mut f32> {
        // Whole vectors are read; and there may be two halves of an output.
        let halves = if matches!(role, Role::Buffer(_)) {
            2
        } else {
            1
        };
        let bytes = 4 * (halves * words).next_multiple_of(4);
        if let Some(memory) = self.decode.numbered.get(&role)
            && memory.bytes >= bytes
        {
            return Ok(memory.address as *mut f32);
        }
        if let Some(old) = self.decode.numbered.remove(&role) {
            return Err(Error::Request(format!(
                "a decode step's buffer of {} bytes cannot grow to {bytes}",
                old.bytes
            )));
        }
        let memory = self.driver.alloc(bytes)?;
        let address = memory.address;
        // No number is zero.
        self.driver.write(address, &vec![0; bytes])?;
        self.decode.numbered.insert(role, memory);
        Ok(address as *mut f32)
    }

    /// The number that the words of `role` carry now.
    ///
    /// # Errors
    /// Where no operation of the step has written it.
    pub(super) fn number_of(&mut self, role: Role) -> Result<u32> {
        let recording = self.decode.recording.as_mut();
        match recording.and_then(|r| r.writes_of(role).map(|w| w.last)) {
            Some(last) => Ok((last % u64::from(NUMBERS)) as u32),
            None => Err(Error::Request(
                "a decode step reads what none of its operations wrote".into(),
            )),
        }
    }

    /// Drops every program; what they point to is about to move.
    pub(super) fn forget_programs(&mut self) {
        for (_, program) in self.decode.programs.drain() {
            self.driver.free(program.ops);
        }
    }

    /// Says that the logits are no longer those that [`Gpu::chosen`] knows the greatest of, and that nobody goes on with the
    /// steps that have begun ahead.
    pub(super) fn forget_choice(&mut self) {
        self.decode.chooser = None;
        self.decode.drawing = None;
        self.decode.ahead = None;
    }

    /// Splits of each head's tokens in the current step.
    pub(super) fn decode_splits(&self) -> u32 {
        self.decode.splits
    }

    /// Whether the step's last operation was attention.
    pub(super) fn after_attention(&self) -> bool {
        let recording = self.decode.recording.as_ref();
        let last = recording.and_then(|r| r.ops.last());
        last.is_some_and(|op| op.kind == kind::ATTEND)
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
        let (needed, table) = (tokens.div_ceil(BLOCK_TOKENS), &span.blocks);
        self.current.rows = 1;
        self.current.outputs = batch.outputs.len();
        let ahead = self.decode.ahead.take().filter(|ahead| {
            let same = ahead.token == Some(token) && ahead.position as usize == span.past;
            let known = self.decode.table.get(..needed) == table.get(..needed);
            batch.goes_on && same && known && batch.outputs.len() == 1
        });
        self.decode.drawing = ahead.map(|ahead| ahead.drawing);
        // Only launches to come read what it has grown by.
        if self.decode.table != *table {
            self.driver.write(tables, bytemuck::cast_slice(table))?;
            self.decode.table.clone_from(table);
        }
        if let Some(ahead) = ahead {
            self.decode.chooser = Some(ahead.sequence);
            self.decode.position = ahead.position;
            self.decode.ahead = (ahead.left > 1).then_some(Ahead {
                sequence: ahead.sequence + 1,
                position: ahead.position + 1,
                left: ahead.left - 1,
                drawing: ahead.drawing.map(|drawing| drawing.later(1)),
                token: None,
            });
            return Ok(());
        }
        let shape = self.shape_for(tokens, batch.outputs.len());
        self.decode.splits = shape.splits;
        if !self.decode.programs.contains_key(&shape) {
            let program = self.record(record)?;
            self.decode.programs.insert(shape, program);
        }
        self.decode.chooser = None;
        self.decode.position = span.past as u32;
        self.run_shape(shape, token, span.past as u32, 1)?;
        if shape.outputs > 0 {
            self.decode.chooser = Some(self.decode.sequence);
        }
        Ok(())
    }

    /// How a step looks whose sequence has so many tokens with its own.
    fn shape_for(&self, tokens: usize, outputs: usize) -> Shape {
        let blocks = self.driver.multiprocessors();
        let splits = self.attending.splits(tokens, blocks);
        Shape { outputs, splits }
    }

    /// Begins steps that go on with the likeliest token of the current one, if none has begun and that can be.
    pub(super) fn step_ahead(&mut self, most: usize) -> Result<()> {
        if let Some(following) = self.following(most) {
            let Following {
                shape,
                position,
                steps,
            } = following;
            self.run_shape(shape, CHOSEN, position, steps)?;
            self.begun(&following, None);
        }
        Ok(())
    }

    /// The steps that can go on with what the current one chooses, `most` at most, if none has begun: where the sequence has a place
    /// in the cache for them. They take the place of the current logits. Should the next step be another, nothing comes of them:
    /// what they write into the cache lies behind the sequence's last token.
    pub(super) fn following(&self, most: usize) -> Option<Following> {
        let position = self.decode.position as usize + 1;
        let shape = self.shape_for(position + 1, 1);
        let room = self.decode.table.len() * BLOCK_TOKENS;
        let most = most.min(room.saturating_sub(position));
        let program = self.decode.programs.get(&shape)?;
        let traced = self.decode.trace.is_some();
        let all = if traced { 1 } else { program.steps as usize };
        // Their numbers are consecutive: the one after the last there is comes with a step that nobody has begun.
        let all = all.min((u32::MAX - self.decode.sequence) as usize);
        let like = |step: &usize| self.shape_for(position + step + 1, 1) == shape;
        let steps = (0..most.min(all)).take_while(like).count() as u32;
        (steps > 0 && self.decode.ahead.is_none()).then_some(Following {
            shape,
            position: position as u32,
            steps,
        })
    }

    /// Runs the `n`th of `following`, counted from one, by itself.
    pub(super) fn run_following(&mut self, following: &Following, n: u32) -> Result<()> {
        self.run_shape(following.shape, CHOSEN, following.position + n - 1, 1)
    }

    /// Says that all of `following` have begun, the last of all steps, and how the first one's token is drawn, if it is.
    pub(super) fn begun(&mut self, following: &Following, drawing: Option<Drawing>) {
        self.decode.ahead = Some(Ahead {
            sequence: self.decode.sequence + 1 - following.steps,
            position: following.position,
            left: following.steps,
            drawing,
            token: None,
        });
    }

    fn record(&mut self, record: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<Program> {
        self.decode.recording = Some(Recording::default());
        let recorded = record(self);
        let recording = self.decode.recording.take().unwrap_or_default();
        recorded?;
        let blocks = self.driver.multiprocessors();
        let plan = plan(
            &self.driver,
            &recording.ops,
            blocks,
            self.driver.shared_limit(),
        )?;
        let Plan { ops, count, room } = plan;
        self.settle(&ops)?;
        let blocks = self.driver.multiprocessors();
        let (listing, behind) = listing(&mut self.driver, &ops, blocks)?;
        let memory = self.driver.alloc(listing.len())?;
        self.driver.write(memory.address, &listing)?;
        // Of the operations as they were recorded: one may be two by now.
        let costs: Vec<Cost> = recording.ops.iter().map(cost).collect();
        let once = costs.iter().filter(|c| !c.each_token);
        let bytes = once.map(|c| c.bytes).sum::<u64>().max(1);
        // What a step has written into the cache is read from memory by the next one, not from what a multiprocessor has kept of the
        // sectors around it: each row is its own sectors, or, in a cache of 8 bits, none of them is kept.
        let mut ops = ops.iter();
        let most = if ops.all(|op| op.quantised != 0 || op.cache.head_dim.is_multiple_of(SECTOR)) {
            MAX_STEPS
        } else {
            1
        };
        Ok(Program {
            ops: memory,
            behind,
            count,
            room,
            costs,
            stride: next_base(recording.numbers, &recording.writes, |w| Some(w.last)),
            steps: (STEPS_BYTES / bytes).clamp(1, u64::from(most)) as u32,
            writes: recording.writes,
            numbers: recording.numbers,
            names: recording.names,
        })
    }

    /// Sees to it that the kernel can carry `ops`, and has as little beyond them as the weights allow.
    fn settle(&mut self, ops: &[Op]) -> Result<()> {
        let needed = ops.iter().fold(0, |all, op| all | op.needs());
        self.driver.settle(needed | self.decode.needs)
    }

    /// Runs `steps` steps of a shape from `token` at `position` on.
    fn run_shape(&mut self, shape: Shape, token: u32, position: u32, steps: u32) -> Result<()> {
        let decode = &mut self.decode;
        let Some(program) = decode.programs.get(&shape) else {
            return Ok(());
        };
        let base = next_base(decode.numbers, &program.writes, |w| {
            decode.last.get(&w.role).copied()
        });
        let last_base = base + u64::from(steps - 1) * program.stride;
        for w in &program.writes {
            decode.last.insert(w.role, last_base + w.last);
        }
        decode.numbers = last_base + program.numbers;
        decode.traced = decode.trace.as_ref().map(|_| (shape, position));
        let run = Run {
            ops: program.ops.address,
            behind: program.behind,
            count: program.count,
            room: program.room,
            base: (base % u64::from(NUMBERS)) as u32,
            stride: (program.stride % u64::from(NUMBERS)) as u32,
            token,
            position,
            steps,
        };
        self.run_program(run)
    }

    fn run_program(&mut self, run: Run) -> Result<()> {
        let (ops, behind, room) = (run.ops, run.behind, run.room);
        let decode = &mut self.decode;
        // Zero is what fresh memory holds.
        let first = match decode.sequence.checked_add(run.steps) {
            Some(_) => decode.sequence + 1,
            None => 1,
        };
        decode.sequence = first + run.steps - 1;
        let args = DecodeArgs {
            ops: ops as *const Op,
            segments: (ops + behind.segments as u64) as *const Segment,
            segment_count: behind.segment_count,
            maps: behind.maps.map_or(0, |at| ops + at as u64) as *const TensorMap,
            tasks: (ops + behind.tasks as u64) as *const u32,
            count: run.count,
            steps: run.steps,
            base: run.base,
            stride: run.stride,
            token: run.token,
            position: run.position,
            sequence: first,
            ring_bytes: room.ring_bytes,
            flying: FLYING,
            turn_tiles: room.turn_tiles,
            row_bytes: room.row_bytes,
            table: self.current.tables.as_ref().map_or(0, |t| t.address) as *const u32,
            ranks: decode.ranks as *mut u64,
            trace: decode.trace.as_ref().map_or(0, |t| t.address) as *mut u64,
            chosen: decode.chosen.address as *mut u64,
            choice: decode.choice as *mut u64,
        };
        self.driver.launch_cooperative(
            "decode",
            self.driver.multiprocessors(),
            THREADS,
            room.shared,
            &args,
        )
    }

    /// See [`Device::profile`](crate::device::Device::profile).
    pub(super) fn timings(&mut self) -> Result<Vec<OpTiming>> {
        let longest = |programs: &HashMap<Shape, Program>| programs.values().map(|p| p.count).max();
        let blocks = self.driver.multiprocessors() as usize;
        let point_bytes = 8 * point::COUNT * blocks;
        let traced = self.decode.traced.take();
        let Some(trace) = self.decode.trace.as_ref().map(|t| t.address) else {
            let bytes = point_bytes * longest(&self.decode.programs).unwrap_or(0) as usize;
            if bytes > 0 {
                self.driver.settle(TRACED)?;
                self.decode.trace = Some(self.driver.alloc(bytes)?);
            }
            return Ok(Vec::new());
        };
        let Some((shape, position)) = traced else {
            return Ok(Vec::new());
        };
        let tokens = u64::from(position) + 1;
        let Some(program) = self.decode.programs.get(&shape) else {
            return Ok(Vec::new());
        };
        let count = program.count as usize;
        let mut times = vec![0u64; blocks * count * point::COUNT];
        self.driver
            .read(trace, bytemuck::cast_slice_mut(&mut times))?;
        // The last block's. Where none notes it in this step, it is an earlier one's or zero.
        let last = |i: usize, point: usize| {
            let of = |block: usize| times[(block * count + i) * point::COUNT + point];
            (0..blocks).map(of).max().unwrap_or(0)
        };
        let first = (0..blocks).map(|block| times[block * count * point::COUNT + point::BEGIN]);
        let begin = first.min().unwrap_or(0);
        let timing = |(i, name): (usize, &&'static str)| {
            let before = match i.checked_sub(1) {
                Some(before) => last(before, point::OUTPUT),
                None => begin,
            };
            let output = last(i, point::OUTPUT).max(before);
            let input = last(i, point::INPUT).clamp(before, output);
            let cost = program.costs[i];
            let seen = if cost.each_token { tokens } else { 1 };
            OpTiming {
                name,
                bytes: seen * cost.bytes,
                operations: seen * cost.operations,
                wait_ns: input - before,
                work_ns: output - input,
                total_ns: output - before,
            }
        };
        Ok(program.names.iter().enumerate().map(timing).collect())
    }

    /// Runs one product by itself, outside a recorded step.
    pub(super) fn run_single(&mut self, op: Op) -> Result<()> {
        let Plan { ops, room, .. } = plan(
            &self.driver,
            &[op],
            self.driver.multiprocessors(),
            self.driver.shared_limit(),
        )?;
        self.settle(&ops)?;
        let address = self.decode.single.address;
        let blocks = self.driver.multiprocessors();
        let (listing, behind) = listing(&mut self.driver, &ops, blocks)?;
        self.driver.write(address, &listing)?;
        self.run_program(Run {
            ops: address,
            behind,
            count: 1,
            room,
            base: 0,
            stride: 0,
            token: 0,
            position: 0,
            steps: 1,
        })?;
        self.decode.chooser = (op.choose != 0).then_some(self.decode.sequence);
        Ok(())
    }

    /// The step that chooses from the current logits, if one does.
    pub(super) fn chooser(&self) -> Option<u32> {
        self.decode.chooser
    }

    /// How that has begun to choose, where it has begun ahead: the inner `None` for the likeliest.
    pub(super) fn begun_drawing(&self) -> Option<Option<Drawing>> {
        self.decode.drawing
    }

    /// The number of the last step.
    pub(super) fn last_number(&self) -> u32 {
        self.decode.sequence
    }

    /// Where the token drawn for step `sequence` goes: for the host, and for the next step, with room for another behind it.
    pub(super) fn choice_places(&self, sequence: u32) -> [Address; 2] {
        let drawn = self.decode.drawn.address + choice_offset(sequence) as u64;
        [drawn, self.decode.choice]
    }

    /// What the current step chooses: the likeliest, or what is drawn.
    pub(super) fn chosen(&mut self, drawn: bool) -> Result<u32> {
        /// Looks at the memory between two looks at the stream, which cost more.
        const LOOKS: usize = 2000;
        let Some(sequence) = self.decode.chooser else {
            return Err(Error::Request(
                "a choice from logits that no step has made".into(),
            ));
        };
        let choices = match drawn {
            true => &self.decode.drawn,
            false => &self.decode.chosen,
        };
        let at = choices.host.wrapping_add(choice_offset(sequence));
        let look = || {
            // Mapped memory, eight bytes, aligned; written by the device, hence volatile.
            let v = unsafe { at.cast::<u64>().read_volatile() };
            ((v >> 32) as u32 == sequence).then_some(v as u32)
        };
        let id = loop {
            if let Some(id) = (0..LOOKS).find_map(|_| {
                std::hint::spin_loop();
                look()
            }) {
                break id;
            }
            if self.driver.idle()? {
                match look() {
                    Some(id) => break id,
                    None => {
                        return Err(Error::Device {
                            device: self.driver.info().name.clone(),
                            what: "a decode step ended without choosing a token".into(),
                        });
                    }
                }
            }
        };
        if let Some(ahead) = &mut self.decode.ahead {
            ahead.token = Some(id);
        }
        Ok(id)
    }
}
