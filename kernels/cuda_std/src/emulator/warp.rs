//! Exchanges among the lanes of a warp.

use super::thread::{State, current, fail};
use std::cell::{Cell, RefCell};

/// Where a waiting lane's input is and its output goes, both on its stack.
#[derive(Clone, Copy)]
struct Slot {
    input: *const (),
    output: *mut (),
}

/// An exchange for which not all lanes have come.
#[derive(Clone, Copy)]
struct Pending {
    op: &'static str,
    mask: u32,
    arrived: u32,
}

pub(crate) struct Warp {
    slots: [Cell<Slot>; 32],
    /// More than one only while parts of the warp exchange with masks of their own.
    pending: RefCell<Vec<Pending>>,
    /// Lanes that exist: a block's last warp may have fewer than 32.
    existing: u32,
    exited: Cell<u32>,
}

impl Warp {
    pub fn new(threads: u32) -> Self {
        let existing = if threads >= 32 {
            u32::MAX
        } else {
            (1 << threads) - 1
        };
        let empty = Slot {
            input: std::ptr::null(),
            output: std::ptr::null_mut(),
        };
        Self {
            slots: std::array::from_fn(|_| Cell::new(empty)),
            pending: RefCell::default(),
            existing,
            exited: Cell::new(0),
        }
    }

    pub fn reset(&self) {
        self.exited.set(0);
        self.pending.borrow_mut().clear();
    }

    /// A lane has ended: no other may be waiting for it.
    pub fn exit(&self, lane: u32) -> Result<(), String> {
        self.exited.set(self.exited.get() | 1 << lane);
        match self
            .pending
            .borrow()
            .iter()
            .find(|p| p.mask & (1 << lane) != 0)
        {
            Some(p) => Err(format!(
                "lane {lane} exited while lane {} waits for it in {} with lanes {:#010x}",
                p.arrived.trailing_zeros(),
                p.op,
                p.mask
            )),
            None => Ok(()),
        }
    }

    /// Brings a lane to an exchange. `true`: it is the last one.
    fn arrive(&self, me: u32, op: &'static str, mask: u32) -> Result<bool, String> {
        if mask & (1 << me) == 0 {
            return Err(format!(
                "{op}: lane {me} is not in its own mask {mask:#010x}"
            ));
        }
        if mask & !self.existing != 0 {
            return Err(format!(
                "{op}: mask {mask:#010x} names lanes that the block has not; it has {:#010x}",
                self.existing
            ));
        }
        if mask & self.exited.get() != 0 {
            return Err(format!(
                "{op}: lanes {:#010x} of mask {mask:#010x} have exited",
                mask & self.exited.get()
            ));
        }
        let mut pending = self.pending.borrow_mut();
        let mut same = None;
        for (at, p) in pending.iter().enumerate() {
            if p.mask == mask && p.op == op {
                same = Some(at);
            } else if p.mask & (1 << me) != 0 && p.arrived & mask != 0 {
                // Each waits for the other, in different calls.
                return Err(format!(
                    "the warp has diverged: lane {me} is in {op} with lanes {mask:#010x}, lane {} in {} with lanes {:#010x}",
                    (p.arrived & mask).trailing_zeros(),
                    p.op,
                    p.mask
                ));
            }
        }
        let at = same.unwrap_or_else(|| {
            pending.push(Pending {
                op,
                mask,
                arrived: 0,
            });
            pending.len() - 1
        });
        pending[at].arrived |= 1 << me;
        let last = pending[at].arrived == mask;
        if last {
            pending.swap_remove(at);
        }
        Ok(last)
    }
}

/// Brings the lanes of `mask` together: the last to come calls `combine` with every lane's input
/// (its own input stands in for lanes outside `mask`), and each lane gets its element of the result.
pub(crate) fn exchange<I: Copy, O: Copy>(
    op: &'static str,
    mask: u32,
    input: I,
    combine: impl FnOnce(&[I; 32]) -> [O; 32],
) -> O {
    let (block, thread) = current();
    let warp = &block.warps[(thread.linear / 32) as usize];
    let me = thread.linear % 32;
    match warp.arrive(me, op, mask) {
        Ok(true) => {}
        Ok(false) => {
            let mut output = std::mem::MaybeUninit::<O>::uninit();
            warp.slots[me as usize].set(Slot {
                input: (&raw const input).cast(),
                output: output.as_mut_ptr().cast(),
            });
            thread.state.set(State::Warp(op, mask));
            thread.suspend();
            // Safety: the last lane has written it before it made this one ready.
            return unsafe { output.assume_init() };
        }
        Err(message) => fail(message),
    }
    let mut inputs = [input; 32];
    for lane in lanes(mask & !(1 << me)) {
        // Safety: the lane waits in the same call with the same types (equal `op`), its stack is alive.
        inputs[lane] = unsafe { warp.slots[lane].get().input.cast::<I>().read() };
    }
    let outputs = combine(&inputs);
    for lane in lanes(mask & !(1 << me)) {
        // Safety: as above.
        unsafe {
            warp.slots[lane]
                .get()
                .output
                .cast::<O>()
                .write(outputs[lane])
        };
        block
            .group()
            .make_ready(block, thread.linear - me + lane as u32);
    }
    block.group().progress();
    outputs[me as usize]
}

fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (lane < 32).then_some(lane as usize)
    })
}
