//! The current GPU thread, and what a kernel asks of it.

use super::Dim3;
use super::block::{BarrierKind, Block};
use corosensei::Yielder;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;

/// The payload of a panic that the emulator itself raised.
pub(crate) struct Failure(pub String);

/// Ends the current thread's fiber with an error.
#[cold]
pub(crate) fn fail(message: String) -> ! {
    // No panic hook: the launch returns the message.
    std::panic::resume_unwind(Box::new(Failure(message)))
}

/// Where a GPU thread stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Ready,
    Running,
    Barrier(u32),
    Warp(&'static str, u32),
    Exited,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready | Self::Running => f.write_str("runs"),
            Self::Barrier(id) => write!(f, "waits at barrier {id}"),
            Self::Warp(op, mask) => write!(f, "waits in {op} with lanes {mask:#010x}"),
            Self::Exited => f.write_str("has exited"),
        }
    }
}

/// A `cp.async` under way: `from` is null where the copy fills with zeros alone.
struct Copy {
    to: *mut u8,
    from: *const u8,
    bytes: usize,
    from_bytes: usize,
}

#[derive(Default)]
struct Copies {
    open: Vec<Copy>,
    committed: VecDeque<Vec<Copy>>,
}

pub(crate) struct Thread {
    pub index: Dim3,
    pub linear: u32,
    pub state: Cell<State>,
    pub yielder: Cell<*const Yielder<(), ()>>,
    pub barrier_result: Cell<u32>,
    copies: RefCell<Copies>,
}

impl Thread {
    pub fn new(linear: u32, block: Dim3) -> Self {
        let index = (
            linear % block.0,
            linear / block.0 % block.1,
            linear / (block.0 * block.1),
        );
        Self {
            index,
            linear,
            state: Cell::new(State::Ready),
            yielder: Cell::new(std::ptr::null()),
            barrier_result: Cell::new(0),
            copies: RefCell::default(),
        }
    }

    pub fn reset(&self) {
        self.state.set(State::Ready);
        self.yielder.set(std::ptr::null());
        let mut copies = self.copies.borrow_mut();
        copies.open.clear();
        copies.committed.clear();
    }

    /// Gives way until the scheduler resumes this thread.
    pub fn suspend(&self) {
        // Safety: set when the fiber began; only the fiber itself calls this.
        unsafe { (*self.yielder.get()).suspend(()) }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Current {
    block: *const Block,
    thread: *const Thread,
}

thread_local! {
    // Fibers never move to another OS thread.
    static CURRENT: Cell<Current> =
        const { Cell::new(Current { block: std::ptr::null(), thread: std::ptr::null() }) };
}

pub(crate) fn enter(block: &Block, thread: &Thread) -> Current {
    CURRENT.replace(Current { block, thread })
}

pub(crate) fn leave(outer: Current) {
    CURRENT.set(outer);
}

/// The running block and thread.
pub(crate) fn current<'a>() -> (&'a Block, &'a Thread) {
    let current = CURRENT.get();
    assert!(
        !current.thread.is_null(),
        "a device function was called outside of an emulator launch"
    );
    // Safety: both outlive the fiber that is running.
    unsafe { (&*current.block, &*current.thread) }
}

pub(crate) fn thread_idx() -> Dim3 {
    current().1.index
}

pub(crate) fn lane() -> u32 {
    current().1.linear % 32
}

pub(crate) fn block_idx() -> Dim3 {
    current().0.index.get()
}

pub(crate) fn block_dim() -> Dim3 {
    current().0.group().launch().block
}

pub(crate) fn grid_dim() -> Dim3 {
    current().0.group().launch().grid
}

pub(crate) fn settled(id: u32) -> u32 {
    current().0.group().launch().options.settled[id as usize]
}

pub(crate) fn dynamic_shared_bytes() -> u32 {
    current().0.group().launch().shared_bytes
}

/// Waits at a barrier; the value is the reduced predicate.
pub(crate) fn barrier(id: u32, count: Option<u32>, kind: BarrierKind, predicate: bool) -> u32 {
    let (block, thread) = current();
    match block.arrive(thread, id, count, kind, predicate) {
        Ok(true) => {}
        Ok(false) => thread.suspend(),
        Err(message) => fail(message),
    }
    thread.barrier_result.get()
}

/// Lets the others run, for a loop that waits on memory.
pub(crate) fn spin() {
    let (block, thread) = current();
    let group = block.group();
    if let Err(message) = group.count_spin() {
        fail(message);
    }
    group.make_ready(block, thread.linear);
    thread.suspend();
}

/// The host address of a shared address, unchecked in size.
pub(crate) fn shared_to_pointer(address: u32) -> *mut u8 {
    current().0.shared.pointer(address)
}

/// The shared address of a host address in this block's shared memory.
pub(crate) fn shared_pointer(pointer: *const u8) -> u32 {
    match current().0.shared.address(pointer) {
        Ok(address) => address,
        Err(message) => fail(message),
    }
}

/// Notes a copy to shared memory; `from_bytes` are read, the rest of `bytes` is filled with zeros.
pub(crate) fn copy_async(to: u32, from: *const u8, bytes: u32, from_bytes: u32) {
    let (block, thread) = current();
    let bytes = bytes as usize;
    let from_bytes = from_bytes as usize;
    if from_bytes > bytes {
        fail(format!("cp.async of {bytes} bytes from {from_bytes} bytes"));
    }
    if from_bytes > 0 && !from.addr().is_multiple_of(bytes) {
        fail(format!(
            "cp.async from {from:p}: {bytes} bytes must be aligned"
        ));
    }
    let to = match block.shared.check(to, bytes, bytes, "cp.async") {
        Ok(to) => to,
        Err(message) => fail(message),
    };
    thread.copies.borrow_mut().open.push(Copy {
        to,
        from,
        bytes,
        from_bytes,
    });
}

pub(crate) fn commit_copies() {
    let mut copies = current().1.copies.borrow_mut();
    let open = std::mem::take(&mut copies.open);
    copies.committed.push_back(open);
}

/// Lands all committed groups but the newest `pending`. `all` lands uncommitted copies too.
pub(crate) fn wait_copies(pending: usize, all: bool) {
    let mut copies = current().1.copies.borrow_mut();
    while copies.committed.len() > pending {
        for copy in copies.committed.pop_front().into_iter().flatten() {
            land(&copy);
        }
    }
    if all {
        for copy in std::mem::take(&mut copies.open) {
            land(&copy);
        }
    }
}

fn land(copy: &Copy) {
    // Safety: the target was checked when the copy was noted, the kernel vouches for its source.
    unsafe {
        if copy.from_bytes > 0 {
            std::ptr::copy_nonoverlapping(copy.from, copy.to, copy.from_bytes);
        }
        std::ptr::write_bytes(
            copy.to.add(copy.from_bytes),
            0,
            copy.bytes - copy.from_bytes,
        );
    }
}
