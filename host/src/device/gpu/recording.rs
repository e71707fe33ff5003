//! Operations of a decode step on their way into a program, and the numbers of the words that they write: such that a word left over from an
//! earlier operation or launch never looks like the one that is awaited.

use super::Address;
use kernels::decode::{NUMBERS, Op};

/// What a buffer of numbered words holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Role {
    /// What the plain buffer at this address would.
    Buffer(Address),
    /// The second half of that, which only some of its writers write.
    Second(Address),
    /// The step's keys and values of a layer that has so many.
    Fresh(usize),
    /// So many words of attention's parts.
    Parts(usize),
}

/// First and last write of a program to a buffer.
#[derive(Clone, Copy)]
pub(super) struct Writes {
    pub(super) role: Role,
    pub(super) first: u64,
    pub(super) last: u64,
}

/// Operations on their way into a program.
#[derive(Default)]
pub(super) struct Recording {
    pub(super) ops: Vec<Op>,
    pub(super) names: Vec<&'static str>,
    pub(super) writes: Vec<Writes>,
    pub(super) numbers: u64,
}

// The addresses in an `Op` belong to the device, not to this thread.
unsafe impl Send for Recording {}

impl Recording {
    pub(super) fn writes_of(&mut self, role: Role) -> Option<&mut Writes> {
        self.writes.iter_mut().find(|w| w.role == role)
    }

    /// Adds `op`, which writes the buffers `outputs`.
    pub(super) fn push(&mut self, name: &'static str, op: Op, outputs: &[Role]) {
        // No buffer's next number may look like its last.
        let mut number = self.numbers;
        while outputs.iter().any(|&role| {
            let last = self.writes_of(role).map(|w| w.last);
            last.is_some_and(|last| alike(number, last))
        }) {
            number += 1;
        }
        self.numbers = number + 1;
        for &role in outputs {
            match self.writes_of(role) {
                Some(w) => w.last = number,
                None => self.writes.push(Writes {
                    role,
                    first: number,
                    last: number,
                }),
            }
        }
        self.names.push(name);
        self.ops.push(Op {
            number: (number % u64::from(NUMBERS)) as u32,
            sealed: u32::from(!outputs.is_empty()),
            ..op
        });
    }
}

/// A number from `from` on that operations may count from, without the first of any buffer looking like the last that it has
/// now. There are fewer buffers than numbers.
pub(super) fn next_base(
    from: u64,
    writes: &[Writes],
    last: impl Fn(&Writes) -> Option<u64>,
) -> u64 {
    let looks = |base: u64| {
        let mut of = writes.iter();
        of.any(|w| last(w).is_some_and(|last| alike(base + w.first, last)))
    };
    let mut base = from;
    while looks(base) {
        base += 1;
    }
    base
}

/// Whether two numbers are the same in a word.
fn alike(a: u64, b: u64) -> bool {
    a % u64::from(NUMBERS) == b % u64::from(NUMBERS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::decode::NO_OP;
    use std::collections::HashMap;

    #[test]
    fn no_buffer_is_written_twice_in_a_row_with_the_same_number() {
        // What a layer writes: its residual twice, the second time in two halves.
        let (x, second) = (Role::Buffer(1), Role::Second(1));
        let layer: [&[Role]; 6] = [
            &[Role::Buffer(2), Role::Fresh(3)],
            &[Role::Parts(4)],
            &[Role::Buffer(5)],
            &[x],
            &[Role::Buffer(6)],
            &[x, second],
        ];
        for layers in 1..40 {
            let embedding = [x];
            let mut outputs = vec![&embedding[..]];
            outputs.extend((0..layers).flat_map(|_| layer));
            let mut recording = Recording::default();
            for outputs in &outputs {
                recording.push("", NO_OP, outputs);
            }
            let writes = &recording.writes;
            let stride = next_base(recording.numbers, writes, |w| Some(w.last));
            let (mut last, mut shown) = (HashMap::new(), HashMap::new());
            let mut numbers = 0;
            for steps in [1, 1, 5, 2, 8, 1] {
                let base = next_base(numbers, writes, |w| last.get(&w.role).copied());
                for step in 0..steps {
                    for (op, outputs) in recording.ops.iter().zip(&outputs) {
                        let number =
                            (base + step * stride + u64::from(op.number)) % u64::from(NUMBERS);
                        for role in *outputs {
                            assert_ne!(shown.insert(*role, number), Some(number), "{role:?}");
                        }
                    }
                }
                let last_base = base + (steps - 1) * stride;
                last.extend(writes.iter().map(|w| (w.role, last_base + w.last)));
                numbers = last_base + recording.numbers;
            }
        }
    }
}
