//! Exchanges among the 32 lanes of a warp.
//!
//! Every lane named in a mask must come to the same call. Functions without a mask mean all 32.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator;

/// All 32 lanes.
pub const FULL_MASK: u32 = u32::MAX;

#[cfg(target_arch = "nvptx64")]
unsafe extern "C" {
    #[link_name = "llvm.nvvm.shfl.sync.bfly.i32"]
    fn shfl_bfly(mask: u32, value: u32, lane: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.shfl.sync.down.i32"]
    fn shfl_down(mask: u32, value: u32, lane: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.shfl.sync.up.i32"]
    fn shfl_up(mask: u32, value: u32, lane: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.shfl.sync.idx.i32"]
    fn shfl_idx(mask: u32, value: u32, lane: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.vote.ballot.sync"]
    fn vote_ballot(mask: u32, predicate: bool) -> u32;
    #[link_name = "llvm.nvvm.vote.any.sync"]
    fn vote_any(mask: u32, predicate: bool) -> bool;
    #[link_name = "llvm.nvvm.vote.all.sync"]
    fn vote_all(mask: u32, predicate: bool) -> bool;
    #[link_name = "llvm.nvvm.redux.sync.add"]
    fn redux_add(value: i32, mask: u32) -> i32;
    #[link_name = "llvm.nvvm.redux.sync.max"]
    fn redux_max(value: i32, mask: u32) -> i32;
    #[link_name = "llvm.nvvm.redux.sync.min"]
    fn redux_min(value: i32, mask: u32) -> i32;
    #[link_name = "llvm.nvvm.redux.sync.umax"]
    fn redux_umax(value: i32, mask: u32) -> i32;
    #[link_name = "llvm.nvvm.bar.warp.sync"]
    fn bar_warp(mask: u32);
}

/// A value of 32 bits that lanes can exchange.
pub trait Exchange: Copy {
    /// The bits.
    fn to_word(self) -> u32;
    /// From bits.
    fn from_word(word: u32) -> Self;
}

impl<T: crate::shared::Word> Exchange for T {
    #[inline(always)]
    fn to_word(self) -> u32 {
        crate::shared::Word::to_word(self)
    }

    #[inline(always)]
    fn from_word(word: u32) -> Self {
        crate::shared::Word::from_word(word)
    }
}

/// `source(lane, argument)` for every lane; a lane reads its own value where the source is out of range.
#[cfg(not(target_arch = "nvptx64"))]
fn shuffle(
    op: &'static str,
    mask: u32,
    value: u32,
    argument: u32,
    source: fn(i64, i64) -> i64,
) -> u32 {
    let (result, valid) = emulator::exchange(op, mask, (value, argument), |lanes| {
        core::array::from_fn(|lane| {
            let from = source(lane as i64, i64::from(lanes[lane].1));
            let from = if (0..32).contains(&from) {
                from as usize
            } else {
                lane
            };
            (lanes[from].0, from == lane || mask & (1 << from) != 0)
        })
    });
    if !valid {
        emulator::fail(format!(
            "{op}: lane {} reads from a lane outside of mask {mask:#010x}",
            emulator::lane()
        ));
    }
    result
}

macro_rules! shuffles {
    ($($(#[$doc:meta])* $name:ident, $masked:ident = $device:ident, $clamp:literal, $source:expr;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name<T: Exchange>(value: T, lane: u32) -> T {
            $masked(FULL_MASK, value, lane)
        }

        $(#[$doc])*
        /// Only the lanes of `mask` take part.
        #[inline(always)]
        pub fn $masked<T: Exchange>(mask: u32, value: T, lane: u32) -> T {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                T::from_word($device(mask, value.to_word(), lane, $clamp))
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                T::from_word(shuffle(stringify!($name), mask, value.to_word(), lane, $source))
            }
        }
    )*};
}

shuffles! {
    /// The value of lane `own ^ lane`.
    shuffle_xor, shuffle_xor_mask = shfl_bfly, 31, |own, lane| own ^ lane;
    /// The value of lane `own + lane`; the own value where there is none.
    shuffle_down, shuffle_down_mask = shfl_down, 31, |own, lane| own + lane;
    /// The value of lane `own - lane`; the own value where there is none.
    shuffle_up, shuffle_up_mask = shfl_up, 0, |own, lane| own - lane;
    /// The value of lane `lane` (modulo 32).
    shuffle_idx, shuffle_idx_mask = shfl_idx, 31, |_, lane| lane % 32;
}

/// A bit for each lane of `mask` whose predicate is true.
#[inline(always)]
pub fn ballot_mask(mask: u32, predicate: bool) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        vote_ballot(mask, predicate)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        emulator::exchange("ballot", mask, predicate, |lanes| {
            let bits = (0..32)
                .filter(|lane| mask & (1 << lane) != 0 && lanes[*lane])
                .fold(0, |b, lane| b | 1 << lane);
            [bits; 32]
        })
    }
}

/// A bit for each lane whose predicate is true.
#[inline(always)]
pub fn ballot(predicate: bool) -> u32 {
    ballot_mask(FULL_MASK, predicate)
}

/// Whether the predicate of any lane of `mask` is true.
#[inline(always)]
pub fn any_mask(mask: u32, predicate: bool) -> bool {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        vote_any(mask, predicate)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        ballot_mask(mask, predicate) != 0
    }
}

/// Whether the predicate of every lane of `mask` is true.
#[inline(always)]
pub fn all_mask(mask: u32, predicate: bool) -> bool {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        vote_all(mask, predicate)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        ballot_mask(mask, predicate) == mask
    }
}

/// Whether any lane's predicate is true.
#[inline(always)]
pub fn any(predicate: bool) -> bool {
    any_mask(FULL_MASK, predicate)
}

/// Whether every lane's predicate is true.
#[inline(always)]
pub fn all(predicate: bool) -> bool {
    all_mask(FULL_MASK, predicate)
}

/// Waits for the lanes of `mask`; their writes before it are visible to each other after it.
#[inline(always)]
pub fn sync_warp_mask(mask: u32) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        bar_warp(mask)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        emulator::exchange("sync_warp", mask, (), |_| [(); 32])
    }
}

/// Waits for all lanes of the warp.
#[inline(always)]
pub fn sync_warp() {
    sync_warp_mask(FULL_MASK)
}

/// The sum over all lanes, in every lane.
// An exclusive-or tree: both partners of an exchange add the same two numbers, so all lanes end
// with the same bits, and each run gives the same ones.
#[inline(always)]
pub fn reduce_sum_f32(value: f32) -> f32 {
    let mut value = value;
    let mut distance = 16;
    while distance > 0 {
        value += shuffle_xor(value, distance);
        distance /= 2;
    }
    value
}

macro_rules! reductions {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $device:ident, $combine:expr;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(value: $type) -> $type {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                $device(value as i32, FULL_MASK) as $type
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                let op = stringify!($name);
                emulator::exchange(op, FULL_MASK, value, |lanes| {
                    let all = lanes.iter().copied().reduce($combine);
                    [all.unwrap_or(value); 32]
                })
            }
        }
    )*};
}

// One instruction of compute capability 8.0 on.
reductions! {
    /// The sum over all lanes, in every lane.
    reduce_sum_i32: i32 = redux_add, i32::wrapping_add;
    /// The sum over all lanes, in every lane.
    reduce_sum_u32: u32 = redux_add, u32::wrapping_add;
    /// The maximum over all lanes, in every lane.
    reduce_max_u32: u32 = redux_umax, u32::max;
    /// The maximum over all lanes, in every lane.
    reduce_max_i32: i32 = redux_max, i32::max;
    /// The minimum over all lanes, in every lane.
    reduce_min_i32: i32 = redux_min, i32::min;
}

/// The bits of a number as an integer of the same order: of a negative one, all but the sign are turned over. The same again is the number.
#[inline(always)]
fn in_order(bits: i32) -> i32 {
    bits ^ (((bits >> 31) as u32) >> 1) as i32
}

/// The maximum over all lanes, in every lane; a NaN loses.
#[inline(always)]
pub fn reduce_max_f32(value: f32) -> f32 {
    let bits = value.to_bits() as i32;
    // The last of all integers is a NaN, too.
    let word = if value.is_nan() {
        i32::MIN
    } else {
        in_order(bits)
    };
    f32::from_bits(in_order(reduce_max_i32(word)) as u32)
}

/// The minimum over all lanes, in every lane; a NaN loses.
#[inline(always)]
pub fn reduce_min_f32(value: f32) -> f32 {
    let bits = value.to_bits() as i32;
    let word = if value.is_nan() {
        i32::MAX
    } else {
        in_order(bits)
    };
    f32::from_bits(in_order(reduce_min_i32(word)) as u32)
}

/// True in one lane of the warp, always the same; all must come. Unlike a question after the lane's number it tells the
/// compiler that what follows is one thread's.
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
#[inline(always)]
pub fn elect() -> bool {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let elected: u32;
        core::arch::asm!("{{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 {0}, 1, 0, p; }}",
            out(reg32) elected, options(nomem, nostack, preserves_flags));
        elected != 0
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        emulator::exchange("elect", u32::MAX, (), |_| {
            core::array::from_fn(|lane| lane == 0)
        })
    }
}
