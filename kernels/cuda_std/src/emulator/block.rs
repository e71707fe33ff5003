//! Blocks and the scheduler of their fibers.

use super::launch::{Error, Launch};
use super::shared_memory::SharedMemory;
use super::thread::{self, Failure, State, Thread};
use super::warp::Warp;
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A fiber's stack. Only touched pages take memory.
const STACK_BYTES: usize = 256 * 1024;

thread_local! {
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

fn take_stack() -> std::io::Result<DefaultStack> {
    match STACKS.with_borrow_mut(Vec::pop) {
        Some(stack) => Ok(stack),
        None => DefaultStack::new(STACK_BYTES),
    }
}

fn give_stack(stack: DefaultStack) {
    STACKS.with_borrow_mut(|pool| {
        if pool.len() < 4096 {
            pool.push(stack);
        }
    });
}

type Fiber = Coroutine<(), (), (), DefaultStack>;

/// Which barrier instruction threads wait in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarrierKind {
    Sync,
    Count,
    Or,
    And,
}

#[derive(Default)]
struct Barrier {
    /// Linear indices of the waiting threads.
    waiting: Vec<u32>,
    expected: u32,
    kind: Option<BarrierKind>,
    true_predicates: u32,
}

/// One block in flight.
pub(crate) struct Block {
    /// Place of the block in its group.
    slot: u32,
    pub index: Cell<(u32, u32, u32)>,
    pub threads: Box<[Thread]>,
    pub warps: Box<[Warp]>,
    pub shared: SharedMemory,
    barriers: RefCell<[Barrier; 16]>,
    exited: Cell<u32>,
    pub group: Cell<*const Group>,
}

/// Blocks that are alive together on one OS thread: one, or all of a cooperative launch.
pub(crate) struct Group {
    pub launch: *const Launch,
    blocks: Box<[Block]>,
    /// (block's slot, thread): may go on, or have not begun.
    ready: RefCell<VecDeque<(u32, u32)>>,
    /// How often a thread has spun since one last did anything else.
    spins: Cell<u64>,
}

impl Group {
    pub fn new(launch: &Launch, blocks: u64) -> Result<Self, Error> {
        let alive = blocks * u64::from(launch.block_threads);
        if alive > 65_536 {
            return Err(launch.error(
                None,
                None,
                format!("a cooperative launch of {alive} threads; the emulator keeps at most 65536 alive"),
            ));
        }
        let blocks = (0..blocks as u32)
            .map(|slot| Block {
                slot,
                index: Cell::new((0, 0, 0)),
                threads: (0..launch.block_threads)
                    .map(|t| Thread::new(t, launch.block))
                    .collect(),
                warps: (0..launch.block_threads.div_ceil(32))
                    .map(|w| Warp::new(launch.block_threads - w * 32))
                    .collect(),
                shared: SharedMemory::new(launch.shared_bytes),
                barriers: RefCell::default(),
                exited: Cell::new(0),
                group: Cell::new(std::ptr::null()),
            })
            .collect();
        Ok(Self {
            launch,
            blocks,
            ready: RefCell::default(),
            spins: Cell::new(0),
        })
    }

    pub fn launch(&self) -> &Launch {
        // Safety: a group lives within the call that owns the launch.
        unsafe { &*self.launch }
    }

    /// Runs the blocks of these linear indices, as many as the group has.
    pub fn run(&mut self, indices: Range<u64>) -> Result<(), Error> {
        let launch = self.launch();
        self.ready.borrow_mut().clear();
        self.spins.set(0);
        for (linear, block) in indices.zip(self.blocks.iter()) {
            block.reset(launch.block_index(linear), self);
            let mut ready = self.ready.borrow_mut();
            let all = 0..launch.block_threads;
            if launch.options.alternate && linear % 2 == 1 {
                ready.extend(all.rev().map(|t| (block.slot, t)));
            } else {
                ready.extend(all.map(|t| (block.slot, t)));
            }
        }
        let mut fibers: Vec<Vec<Option<Fiber>>> = self
            .blocks
            .iter()
            .map(|b| b.threads.iter().map(|_| None).collect())
            .collect();
        let mut live = self.blocks.len() as u64 * u64::from(launch.block_threads);
        while live > 0 {
            let Some((slot, t)) = self.ready.borrow_mut().pop_front() else {
                return Err(self.deadlock());
            };
            let block = &self.blocks[slot as usize];
            let thread = &block.threads[t as usize];
            let fiber_slot = &mut fibers[slot as usize][t as usize];
            if self.step(block, thread, fiber_slot)? {
                live -= 1;
            }
        }
        for block in &self.blocks {
            block
                .shared
                .check_ends()
                .map_err(|message| launch.error(Some(block.index.get()), None, message))?;
        }
        Ok(())
    }

    /// Runs one thread until it waits (`false`) or ends (`true`).
    fn step(
        &self,
        block: &Block,
        thread: &Thread,
        fiber_slot: &mut Option<Fiber>,
    ) -> Result<bool, Error> {
        let launch = self.launch();
        let blame =
            |message: String| launch.error(Some(block.index.get()), Some(thread.index), message);
        if fiber_slot.is_none() {
            let stack =
                take_stack().map_err(|e| blame(format!("no stack for the thread's fiber: {e}")))?;
            let (call, params) = (launch.kernel.call, launch.params);
            let pointer: *const Thread = thread;
            *fiber_slot = Some(Coroutine::with_stack(
                stack,
                move |yielder: &Yielder<(), ()>, ()| {
                    // Safety: the block outlives its fibers, the caller of the launch vouches for the parameters.
                    unsafe {
                        (*pointer).yielder.set(yielder);
                        call(params);
                    }
                },
            ));
        }
        let Some(fiber) = fiber_slot.as_mut() else {
            return Ok(true);
        };
        thread.state.set(State::Running);
        let outer = thread::enter(block, thread);
        let result = catch_unwind(AssertUnwindSafe(|| fiber.resume(())));
        thread::leave(outer);
        match result {
            Ok(CoroutineResult::Yield(())) => Ok(false),
            Ok(CoroutineResult::Return(())) => {
                thread.state.set(State::Exited);
                if let Some(fiber) = fiber_slot.take() {
                    give_stack(fiber.into_stack());
                }
                self.progress();
                block.exit(thread).map_err(blame)?;
                Ok(true)
            }
            Err(payload) => Err(blame(match payload.downcast::<Failure>() {
                Ok(failure) => failure.0,
                Err(payload) => match payload.downcast::<String>() {
                    Ok(message) => format!("panicked: {message}"),
                    Err(payload) => match payload.downcast::<&str>() {
                        Ok(message) => format!("panicked: {message}"),
                        Err(_) => "panicked".to_owned(),
                    },
                },
            })),
        }
    }

    pub fn make_ready(&self, block: &Block, thread: u32) {
        block.threads[thread as usize].state.set(State::Ready);
        self.ready.borrow_mut().push_back((block.slot, thread));
    }

    pub fn progress(&self) {
        self.spins.set(0);
    }

    /// Counts a turn of a spinning thread; tells what is wrong when nothing but spinning goes on.
    pub fn count_spin(&self) -> Result<(), String> {
        let spins = self.spins.get() + 1;
        self.spins.set(spins);
        let cooperative = self.launch().options.cooperative;
        let parallel = self.launch().parallel;
        if parallel && spins.is_multiple_of(1024) {
            // What it waits for may be done by a block on another OS thread.
            std::thread::yield_now();
        }
        let limit = if parallel {
            20_000_000
        } else {
            1000 * (self.ready.borrow().len() as u64 + 1)
        };
        if spins > limit {
            return Err(if cooperative {
                "spins for ever: every live thread of the grid waits".to_owned()
            } else {
                "spins for ever: only a cooperative launch keeps all blocks alive together"
                    .to_owned()
            });
        }
        Ok(())
    }

    fn deadlock(&self) -> Error {
        let mut waits = Vec::new();
        let mut first = None;
        for block in &self.blocks {
            for thread in &block.threads {
                if !matches!(thread.state.get(), State::Exited) {
                    first = first.or(Some((block.index.get(), thread.index)));
                    if waits.len() < 4 {
                        waits.push(format!("thread {:?} {}", thread.index, thread.state.get()));
                    }
                }
            }
        }
        let message = format!("deadlock: no thread can go on; {}", waits.join(", "));
        self.launch()
            .error(first.map(|f| f.0), first.map(|f| f.1), message)
    }
}

impl Block {
    fn reset(&self, index: (u32, u32, u32), group: &Group) {
        self.index.set(index);
        self.group.set(group);
        self.exited.set(0);
        *self.barriers.borrow_mut() = Default::default();
        for thread in &self.threads {
            thread.reset();
        }
        for warp in &self.warps {
            warp.reset();
        }
        self.shared.reset();
    }

    pub fn group(&self) -> &Group {
        // Safety: set by `reset`; the group owns the block.
        unsafe { &*self.group.get() }
    }

    /// Brings a thread to barrier `id`. `true`: the last one, go on; `false`: wait.
    pub fn arrive(
        &self,
        thread: &Thread,
        id: u32,
        count: Option<u32>,
        kind: BarrierKind,
        predicate: bool,
    ) -> Result<bool, String> {
        let all = self.threads.len() as u32;
        let expected = count.unwrap_or(all);
        if id > 15 {
            return Err(format!("barrier {id}: a block has barriers 0 to 15"));
        }
        if expected == 0 || (count.is_some() && !expected.is_multiple_of(32)) || expected > all {
            return Err(format!(
                "barrier {id} for {expected} threads: a multiple of 32, at most {all}, is needed"
            ));
        }
        if expected == all && self.exited.get() > 0 {
            return Err(format!(
                "waits at barrier {id} for all {all} threads of the block, but {} have exited",
                self.exited.get()
            ));
        }
        let mut barriers = self.barriers.borrow_mut();
        let barrier = &mut barriers[id as usize];
        if let Some(first) = barrier.waiting.first() {
            if barrier.expected != expected || barrier.kind != Some(kind) {
                return Err(format!(
                    "barrier {id}: this thread arrives for {kind:?} of {expected} threads, thread {:?} waits for {:?} of {}",
                    self.threads[*first as usize].index,
                    barrier.kind.unwrap_or(BarrierKind::Sync),
                    barrier.expected
                ));
            }
        } else {
            barrier.expected = expected;
            barrier.kind = Some(kind);
            barrier.true_predicates = 0;
        }
        barrier.true_predicates += u32::from(predicate);
        if barrier.waiting.len() as u32 + 1 < expected {
            barrier.waiting.push(thread.linear);
            thread.state.set(State::Barrier(id));
            return Ok(false);
        }
        let result = match kind {
            BarrierKind::Sync => 0,
            BarrierKind::Count => barrier.true_predicates,
            BarrierKind::Or => u32::from(barrier.true_predicates > 0),
            BarrierKind::And => u32::from(barrier.true_predicates == expected),
        };
        let waiting = std::mem::take(&mut barrier.waiting);
        thread.barrier_result.set(result);
        for other in waiting {
            self.threads[other as usize].barrier_result.set(result);
            self.group().make_ready(self, other);
        }
        self.group().progress();
        Ok(true)
    }

    /// A thread has ended: nobody may be waiting for it.
    fn exit(&self, thread: &Thread) -> Result<(), String> {
        self.exited.set(self.exited.get() + 1);
        let all = self.threads.len();
        for (id, barrier) in self.barriers.borrow().iter().enumerate() {
            if let Some(first) = barrier.waiting.first()
                && barrier.expected as usize == all
            {
                return Err(format!(
                    "exited while thread {:?} waits at barrier {id} for all {all} threads of the block",
                    self.threads[*first as usize].index
                ));
            }
        }
        self.warps[(thread.linear / 32) as usize].exit(thread.linear % 32)
    }
}
