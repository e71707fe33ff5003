//! Operations of a step.

use super::long::ragged;
use super::row::GROUPS;
use super::{
    ENDS, HALF, HALVES, LATE, MIXED, NARROW_DIM, PLAIN, QUANTISED, RAGGED, Shares, TAILS, UNEVEN,
    WARPS, WIDE,
};
use crate::rows::{CacheLayer, Rotation};
use crate::types::{GROUP, Matrix, NO_MATRIX, TILE, type_bit};

/// What an [`Op`] does.
pub mod kind {
    /// `out = W norm(x) + b`, or `out += …`.
    pub const PRODUCT: u32 = 0;
    /// `out = silu(Wg norm(x) + bg) * (Wu norm(x) + bu)`.
    pub const GATE_UP: u32 = 1;
    /// `out = rope(Wq norm(x) + bq)`; keys, rotated, and values go to the f16 cache and to `fresh`. With `late` nothing
    /// rotates, and keys go to `fresh` alone; and so do both where the cache is `quantised`.
    pub const QKV: u32 = 2;
    /// Attention of the row over the cache, `input.x` being the queries. With `late`, the heads of these and the keys in
    /// `fresh` are normed and rotated first, and the keys go to the cache; to one that is `quantised` keys and values go in any case. `out` is a row of heads. In several splits it is
    /// merged from what these leave at `parts`.
    pub const ATTEND: u32 = 3;
    /// `out = table[token] * scale`.
    pub const EMBED: u32 = 4;
}

/// The input row of an operation.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Input {
    /// f32, `len` long.
    pub x: *const f32,
    /// RMS norm's weight; null for no norm. Of an attention, that of each query head.
    pub norm: *const f32,
    /// [`Op::number`] of the operation that writes `x`; [`PLAIN`] where an earlier launch did.
    pub from: u32,
    pub eps: f32,
    pub len: u32,
    /// `1 / len`, for the norm.
    pub inverse_len: f32,
    /// Whether f32 values are kept too, for matrices of float types.
    pub keep_f32: u32,
    /// Whether each value is the sum of two words, the second `len` behind the first: what a product that is cut in two leaves.
    pub halves: u32,
}

/// What an operation in the window knows of the step that it belongs to; in the program it is anything.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub struct Now {
    /// The token's position in the sequence.
    pub position: u32,
    /// See [`DecodeArgs::base`].
    pub base: u32,
    /// The number that the host knows the step's choice by.
    pub sequence: u32,
    /// The operation's index in the program.
    pub index: u32,
    /// The block's tasks: the first, and from bit 16 on the one behind the last.
    pub tasks: u32,
    pub unused: [u32; 3],
}

/// One operation. What its `kind` has no use for may be anything.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub struct Op {
    pub now: Now,
    pub kind: u32,
    /// Its place among a program's operations, modulo [`NUMBERS`].
    pub number: u32,
    /// Whether `out` is read in this launch, and its words carry `number`.
    pub sealed: u32,
    /// Whether to add to `out` instead of overwriting it.
    pub add: u32,
    /// The number that the words of `out` carry before the addition, or [`PLAIN`]; and whether that is to two words, as
    /// [`Input::halves`] has it.
    pub add_from: u32,
    pub add_halves: u32,
    /// The index in the program of the operation after the next one, 0 for the next step's first; and the block from which on it is
    /// another, the one behind it there: of two products with halves of a row, a block takes one. The first two of a program are
    /// not of these.
    pub after: u32,
    pub after_second: u32,
    /// Warps that share a task out, a *team*; how many teams there are.
    pub team: u32,
    pub teams: u32,
    /// By what a warp's number is divided: by the former for the number of its team, or by the latter for that which it has in its
    /// team; the rest is the other. And its inverse, in [`INVERSE_UNIT`]s.
    pub divisor: u32,
    pub inverse: u32,
    /// Turns of a task.
    pub turns: u32,
    /// Whether a warp multiplies with no other part of the row than the one that it has brought: there is one team, and a part
    /// at most for each of its warps.
    pub alone: u32,
    /// Whether `out` are logits, the greatest of which is the step's choice.
    pub choose: u32,
    pub heads: u32,
    /// Query heads of each key-value head.
    pub group: u32,
    /// Parts that the tokens are cut into, at most [`MAX_SPLITS`]: a block takes one at a time.
    pub splits: u32,
    /// `2^32 / splits`, rounded up; of no use where there is one.
    pub inverse_splits: u32,
    /// For how many turns of the cache the ring has room.
    pub room: u32,
    /// The first block that takes pieces of an attention; and how many of the first blocks merge what its splits have left.
    pub first_block: u32,
    pub mergers: u32,
    /// Of the attention scores, or of the embedding.
    pub scale: f32,
    pub input: Input,
    /// The one; gate and up; Q, K and V.
    pub matrices: [Matrix; 3],
    /// f32, null for none.
    pub biases: [*const f32; 3],
    pub rotation: Rotation,
    /// Whether queries and keys are normed head by head: only the attention has whole heads.
    pub late: u32,
    /// RMS norm's weight of each key head, where they are.
    pub key_norm: *const f32,
    pub cache: CacheLayer,
    /// Whether the cache is of 8 bits; and the bytes of a token's key, or value, of a head.
    pub quantised: u32,
    pub row_bytes: u32,
    /// f32 `[2][kv_heads * head_dim]`: this step's keys and values, sealed, as the cache holds them; null for
    /// an attention whose last token is in the cache.
    pub fresh: *mut f32,
    /// What attention in several splits leaves, f32 `[heads][head_dim / OCTET + 1][splits][OCTET]`: sums not yet normalised, then their
    /// peak and mass, the rest unused.
    pub parts: *mut f32,
    /// f32.
    pub out: *mut f32,
    /// Strips of the row that are a product of their own, for so many blocks, from bit 16 on; the rest is for the others. Zero where
    /// it is not cut, and where it has been.
    pub cut: u32,
    /// How the tasks fall to the blocks.
    pub shares: Shares,
}

impl Op {
    /// Whether keys and values of an attention come through the ring: where tokens are split, and those of 8 bits always.
    pub const fn ringed(&self) -> bool {
        self.splits > 1 || self.quantised != 0
    }

    /// What of [`NEEDS`](super::NEEDS) it is.
    pub fn needs(&self) -> u64 {
        let [first, second, _] = self.matrices;
        let flag = |is: bool, flag: u64| if is { flag } else { 0 };
        let attends = self.kind == kind::ATTEND;
        let late = self.late != 0;
        let ends_within =
            |groups: u32| !attends && !self.input.len.is_multiple_of(groups * GROUP as u32);
        // An absent one's type is a number like any other.
        let matrices = self.matrices.iter().filter(|m| m.rows > 0);
        let types = matrices.fold(0, |all, m| all | type_bit(m.ty));
        u64::from(types)
            | flag(self.kind == kind::GATE_UP && first.ty != second.ty, MIXED)
            | flag(attends && self.cache.head_dim > NARROW_DIM, WIDE)
            | flag(attends && self.quantised == 0, HALF)
            | flag(
                attends && self.quantised == 0 && ragged(self.cache.head_dim),
                RAGGED,
            )
            | flag(self.quantised != 0, QUANTISED)
            | flag(late, LATE)
            | flag(self.input.halves | self.add_halves != 0, HALVES)
            | flag(!self.input.len.is_multiple_of(4), UNEVEN)
            | flag(ends_within(TILE as u32), TAILS)
            | flag(ends_within(GROUPS), ENDS)
    }
}

/// See [`Op::inverse`].
pub const INVERSE_UNIT: u32 = 256;

/// Bytes of an [`Op`].
pub const OP_BYTES: u32 = size_of::<Op>() as u32;
const _: () = assert!(
    OP_BYTES / 16 <= 32,
    "a warp copies an operation, 16 bytes a lane"
);

/// An operation of no kind, for the fields that a kind has no use for.
pub const NO_OP: Op = Op {
    now: Now {
        position: 0,
        base: 0,
        sequence: 0,
        index: 0,
        tasks: 0,
        unused: [0; 3],
    },
    kind: u32::MAX,
    number: 0,
    sealed: 0,
    add: 0,
    add_from: PLAIN,
    add_halves: 0,
    after: 0,
    after_second: u32::MAX,
    team: WARPS,
    teams: 1,
    divisor: WARPS,
    inverse: 0,
    turns: 0,
    alone: 0,
    choose: 0,
    heads: 0,
    group: 0,
    splits: 0,
    inverse_splits: 0,
    room: 0,
    first_block: 0,
    mergers: 0,
    scale: 0.0,
    input: Input {
        x: core::ptr::null(),
        norm: core::ptr::null(),
        from: PLAIN,
        eps: 0.0,
        len: 0,
        inverse_len: 0.0,
        keep_f32: 0,
        halves: 0,
    },
    matrices: [NO_MATRIX; 3],
    biases: [core::ptr::null(); 3],
    rotation: Rotation {
        table: core::ptr::null(),
        dims: 0,
        halves: 0,
    },
    late: 0,
    key_norm: core::ptr::null(),
    cache: CacheLayer {
        keys: core::ptr::null_mut(),
        values: core::ptr::null_mut(),
        kv_heads: 0,
        head_dim: 0,
    },
    quantised: 0,
    row_bytes: 0,
    fresh: core::ptr::null_mut(),
    parts: core::ptr::null_mut(),
    out: core::ptr::null_mut(),
    cut: 0,
    shares: Shares::NONE,
};
