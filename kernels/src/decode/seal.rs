//! Words that say who wrote them.
//!
//! An f32 gives its lowest [`BITS`] bits for a number that says which operation wrote it; the value keeps
//! 19 bits of mantissa, more than the 15-bit activations that come of it. A reader looks
//! at a word until it carries the number it waits for: value and arrival are one read, with no barrier and
//! no fence. Numbers run on from launch to launch, so that what an earlier operation left in a buffer is
//! never taken for what is awaited; zero, as fresh memory has it, is none.

use super::{Current, get};
use cuda_std::int::here;
use cuda_std::memory::{await_v4_u32, ld_relaxed_u32, st_relaxed_u32, st_relaxed_v4_u32};
use cuda_std::thread::spin;

const BITS: u32 = 4;
/// How many numbers there are. Two operations that write the same buffer, with none that does between
/// them, must not be a multiple of it apart.
pub const NUMBERS: u32 = (1 << BITS) - 1;
/// The number of words that an earlier launch wrote: whole f32.
pub const PLAIN: u32 = u32::MAX;

/// What the words of a buffer carry.
#[derive(Clone, Copy)]
pub struct Seal {
    mask: u32,
    number: u32,
}

impl Seal {
    /// Of words that carry none.
    pub const PLAIN: Seal = Seal { mask: 0, number: 0 };

    /// Of words that operation `number` of the step of `op` writes, or plain ones.
    #[inline(always)]
    pub unsafe fn of(op: Current, number: u32) -> Seal {
        if number == PLAIN {
            return Seal::PLAIN;
        }
        let n = unsafe { get!(op, now.base) } + number;
        Seal {
            mask: (1 << BITS) - 1,
            number: 1 + if n >= NUMBERS { n - NUMBERS } else { n },
        }
    }

    /// Of the words that the operation itself leaves: plain ones where nobody reads them in this launch.
    #[inline(always)]
    pub unsafe fn of_output(op: Current) -> Seal {
        unsafe {
            let number = if get!(op, sealed) != 0 {
                get!(op, number)
            } else {
                PLAIN
            };
            Seal::of(op, number)
        }
    }

    /// The same, known from here on: what it follows from would else be looked at where it is first used.
    #[inline(always)]
    pub fn here(self) -> Seal {
        Seal {
            mask: here(self.mask),
            number: here(self.number),
        }
    }

    /// What it is made of, for who keeps it elsewhere.
    #[inline(always)]
    pub fn words(self) -> (u32, u32) {
        (self.mask, self.number)
    }

    #[inline(always)]
    pub fn from_words(mask: u32, number: u32) -> Seal {
        Seal { mask, number }
    }

    /// Whether `word` has arrived.
    #[inline(always)]
    pub fn on(self, word: u32) -> bool {
        word & self.mask == self.number
    }

    #[inline(always)]
    pub fn open(self, word: u32) -> f32 {
        f32::from_bits(word & !self.mask)
    }

    /// Rounds to what is left of the mantissa; infinities and NaN stay what they are.
    #[inline(always)]
    pub fn close(self, v: f32) -> u32 {
        let bits = v.to_bits();
        let half = if bits & 0x7f80_0000 == 0x7f80_0000 {
            0
        } else {
            self.mask.div_ceil(2)
        };
        ((bits + half) & !self.mask) | self.number
    }

    /// The value of `word`, read at `p` before, once it has arrived.
    #[inline(always)]
    pub unsafe fn await_word(self, p: *const f32, word: u32) -> f32 {
        let mut word = word;
        while !self.on(word) {
            spin();
            word = unsafe { ld_relaxed_u32(p.cast()) };
        }
        self.open(word)
    }

    /// Four words at each of some places, once all lanes' have arrived: they come together, and none outside.
    #[inline(always)]
    pub unsafe fn await_all<const N: usize>(self, from: [*const f32; N]) -> [[u32; 4]; N] {
        unsafe { await_v4_u32(from, self.mask, self.number) }
    }

    #[inline(always)]
    pub unsafe fn write(self, p: *mut f32, v: f32) {
        unsafe { st_relaxed_u32(p.cast(), self.close(v)) }
    }

    #[inline(always)]
    pub unsafe fn write_four(self, p: *mut f32, v: [f32; 4]) {
        unsafe { st_relaxed_v4_u32(p, v.map(|v| self.close(v))) }
    }

    #[inline(always)]
    pub fn all_on(self, words: [u32; 4]) -> bool {
        let [a, b, c, d] = words.map(|w| w ^ self.number);
        // Without branches: all lanes of a warp look again together.
        (a | b | c | d) & self.mask == 0
    }
}
