//! The block types: one file each, with the layout and the dequantisation beside it.
//!
//! A new type is one file with a struct that implements [`Block`], and one line in the registry
//! below. Layouts and formulas are those of ggml's block structs (ggml-common.h) and its
//! `dequantize_row_*` reference functions; the results are the same bit for bit, so the order of
//! the floating-point operations matters: each product and each sum is rounded once, never fused.
//!
//! Every struct has alignment 1: a file may ask for any power of two as its tensors' alignment, so
//! nothing more is certain of a block's address.

use bytemuck::Pod;

use crate::{Error, GgmlType};

/// A block of elements as it lies in a file.
pub trait Block: Pod + Send + Sync {
    /// The type that is made of these blocks.
    const TYPE: GgmlType;
    /// Elements in a block.
    const LEN: usize = Self::TYPE.block_len();

    /// Writes the block's elements.
    ///
    /// # Panics
    /// `out` has another length than [`LEN`](Block::LEN).
    fn dequantize(&self, out: &mut [f32]);

    /// The block of [`LEN`](Block::LEN) finite values, see [`crate::quantize()`]; none if the type has no
    /// quantiser here: the grids of IQ1 to IQ3 make sense only where some elements matter more than others.
    fn quantize(_values: &[f32]) -> Option<Self> {
        None
    }
}

/// Elements in the longest block of any type.
pub const MAX_LEN: usize = 256;

/// Work that is generic over the block type: what [`visit`] runs for the type of some data.
pub trait Visitor {
    /// What the work returns.
    type Output;
    /// Does the work for blocks of type `B`.
    fn visit<B: Block>(self) -> Self::Output;
}

macro_rules! registry {
    ($($module:ident::$block:ident,)*) => {
        $(
            mod $module;
            pub use $module::$block;
        )*

        /// The types that have a block struct here.
        pub const SUPPORTED: &[GgmlType] = &[$(<$block as Block>::TYPE),*];

        /// Runs a visitor for the block struct of a type; none if the type has none.
        pub fn visit<V: Visitor>(ty: GgmlType, visitor: V) -> Option<V::Output> {
            $(
                if ty == <$block as Block>::TYPE {
                    return Some(visitor.visit::<$block>());
                }
            )*
            None
        }

        // A struct that disagrees with the type table, or could be misaligned, does not compile.
        const _: () = {
            $(
                assert!(size_of::<$block>() == <$block as Block>::TYPE.block_bytes());
                assert!(align_of::<$block>() == 1);
                assert!(<$block as Block>::LEN == <$block as Block>::TYPE.block_len());
                assert!(<$block as Block>::LEN <= MAX_LEN);
            )*
        };
    };
}

// rustfmt does not look into a macro's modules: format these files by name.
registry! {
    float32::F32,
    float16::F16,
    bfloat16::BF16,
    q4_0::Q4_0,
    q4_1::Q4_1,
    q5_0::Q5_0,
    q5_1::Q5_1,
    q8_0::Q8_0,
    q2_k::Q2K,
    q3_k::Q3K,
    q4_k::Q4K,
    q5_k::Q5K,
    q6_k::Q6K,
    iq1_s::Iq1S,
    iq1_m::Iq1M,
    iq2_xxs::Iq2Xxs,
    iq2_xs::Iq2Xs,
    iq2_s::Iq2S,
    iq3_xxs::Iq3Xxs,
    iq3_s::Iq3S,
    iq4_nl::Iq4Nl,
    iq4_xs::Iq4Xs,
    tq1_0::Tq1_0,
    tq2_0::Tq2_0,
    mxfp4::Mxfp4,
}

/// Writes `bytes`, blocks of type `ty`, as f32. `out` must have room for exactly the elements.
///
/// # Errors
/// The type has no dequantisation here, or the lengths do not match.
pub fn dequantize(ty: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<(), Error> {
    struct Run<'a>(&'a [u8], &'a mut [f32]);
    impl Visitor for Run<'_> {
        type Output = Result<(), Error>;
        fn visit<B: Block>(self) -> Self::Output {
            let mismatch = || Error::Buffer {
                detail: format!(
                    "{} bytes of {} do not hold exactly {} elements",
                    self.0.len(),
                    B::TYPE,
                    self.1.len()
                ),
            };
            let blocks: &[B] = bytemuck::try_cast_slice(self.0).map_err(|_| mismatch())?;
            if blocks.len().checked_mul(B::LEN) != Some(self.1.len()) {
                return Err(mismatch());
            }
            for (block, out) in blocks.iter().zip(self.1.chunks_exact_mut(B::LEN)) {
                block.dequantize(out);
            }
            Ok(())
        }
    }
    visit(ty, Run(bytes, out)).unwrap_or(Err(Error::UnsupportedType { ty }))
}

/// The names of the types that can be dequantised, for error messages.
pub(crate) fn supported_names() -> String {
    let names: Vec<&str> = SUPPORTED.iter().map(|ty| ty.name()).collect();
    names.join(", ")
}

/// `out[i] = f(i)` for the blocks whose elements are independent of each other.
#[inline(always)]
fn fill<const N: usize>(out: &mut [f32], f: impl Fn(usize) -> f32) {
    assert_eq!(out.len(), N);
    for (i, o) in out.iter_mut().enumerate() {
        *o = f(i);
    }
}

/// Blocks of 32 with four bits of each element in 16 bytes: element `i` in the low half of byte
/// `i`, element `i + 16` in the high half. `out[i] = f(i, nibble)`.
#[inline(always)]
fn fill_nibbles(out: &mut [f32], qs: &[u8; 16], f: impl Fn(usize, u8) -> f32) {
    assert_eq!(out.len(), 32);
    let (low, high) = out.split_at_mut(16);
    fill::<16>(low, |i| f(i, qs[i] & 0x0f));
    fill::<16>(high, |i| f(i + 16, qs[i] >> 4));
}

/// What [`fill_nibbles`] reads; `q` gives an element's number, of which the low four bits count.
fn pack_nibbles(q: impl Fn(usize) -> u8) -> [u8; 16] {
    std::array::from_fn(|i| (q(i) & 15) | (q(i + 16) << 4))
}

/// A bit for each of 32 elements: the fifth of its number.
fn pack_fifth_bits(q: impl Fn(usize) -> u8) -> [u8; 4] {
    let bits = (0..32).map(|i| u32::from(q(i) >> 4 & 1) << i);
    bits.sum::<u32>().to_le_bytes()
}

/// What [`scale_min_k4`] reads, from numbers of 6 bits.
fn pack_scale_min_k4(scales: &[i32; 8], mins: &[i32; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for j in 0..8 {
        let (scale, min) = (scales[j] as u8, mins[j] as u8);
        if j < 4 {
            packed[j] |= scale;
            packed[j + 4] |= min;
        } else {
            packed[j + 4] = (scale & 15) | (min << 4);
            packed[j - 4] |= scale >> 4 << 6;
            packed[j] |= min >> 4 << 6;
        }
    }
    packed
}

/// Scale and minimum `j` (0 to 7), 6 bits each, of the 12 bytes that Q4_K and Q5_K share.
///
/// Sub-blocks 0 to 3 have their scale in the low six bits of bytes 0 to 3 and their minimum in those
/// of bytes 4 to 7. Of sub-blocks 4 to 7 the low four bits are the halves of bytes 8 to 11 (scale
/// low, minimum high), and the high two bits are the top bits of bytes 0 to 3 and 4 to 7.
#[inline(always)]
pub fn scale_min_k4(j: usize, scales: &[u8; 12]) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        (
            (scales[j + 4] & 0x0f) | ((scales[j - 4] >> 6) << 4),
            (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4),
        )
    }
}

/// `value`, negated where bit `i` of `signs` is set.
#[inline(always)]
fn signed(value: f32, signs: u8, i: usize) -> f32 {
    if (signs >> i) & 1 == 0 { value } else { -value }
}

/// Number `j` of 4 bits, two a byte, the first in the low half.
#[inline(always)]
pub fn nibble(bytes: &[u8], j: usize) -> u8 {
    (bytes[j / 2] >> (j % 2 * 4)) & 15
}
