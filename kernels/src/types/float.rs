//! F32, F16, BF16: rows padded with zeros to a multiple of 32, otherwise as the file has them.

use super::*;
use cuda_std::half::{F16 as Half, pack_f16x2};

/// f32.
pub struct F32;
/// IEEE half precision.
pub struct F16;
/// The upper half of an f32.
pub struct Bf16;

const fn layout(ty: u32, bytes: usize) -> Layout {
    Layout {
        ty,
        block: 1,
        block_bytes: bytes,
        planes: [
            Plane::group(bytes * GROUP),
            Plane::NONE,
            Plane::NONE,
            Plane::NONE,
        ],
        quantised: false,
    }
}

/// What 16 bytes hold.
pub trait Sixteen: Weights {
    /// Weights in 16 bytes, 4 or 8.
    const WEIGHTS: usize;

    /// Them; zeros behind them.
    fn unpack_sixteen(words: [u32; 4]) -> [f32; 8];
}

/// Copies `valid` values of `BYTES` bytes, and zeros up to 32.
#[inline(always)]
unsafe fn copy_padded<const BYTES: usize>(
    source: *const u8,
    m: &Matrix,
    r: usize,
    block: usize,
    valid: usize,
) {
    unsafe {
        let target = m.start(r).cast_mut().add(block * GROUP * BYTES);
        for i in 0..GROUP * BYTES {
            target
                .add(i)
                .write(if i < valid * BYTES { *source.add(i) } else { 0 });
        }
    }
}

impl Sixteen for F32 {
    const WEIGHTS: usize = 4;

    #[inline(always)]
    fn unpack_sixteen(v: [u32; 4]) -> [f32; 8] {
        unrolled!(8, |i| if i < 4 { f32::from_bits(v[i]) } else { 0.0 })
    }
}

impl Sixteen for F16 {
    const WEIGHTS: usize = 8;

    #[inline(always)]
    fn unpack_sixteen(v: [u32; 4]) -> [f32; 8] {
        unrolled!(8, |i| read::f16((v[i / 2] >> (16 * (i % 2))) as u16))
    }
}

impl Sixteen for Bf16 {
    const WEIGHTS: usize = 8;

    #[inline(always)]
    fn unpack_sixteen(v: [u32; 4]) -> [f32; 8] {
        unrolled!(8, |i| {
            f32::from_bits(if i % 2 == 0 {
                v[i / 2] << 16
            } else {
                v[i / 2] & 0xffff_0000
            })
        })
    }
}

macro_rules! float_weights {
    ($name:ident, $ty:literal, $bytes:literal) => {
        impl Weights for $name {
            const LAYOUT: Layout = layout($ty, $bytes);

            #[inline(always)]
            unsafe fn unpack(m: &Matrix, r: usize, g: usize) -> [f32; 32] {
                const N: usize = <$name as Sixteen>::WEIGHTS;
                // Half as many with f16; the rest is never loaded.
                let e = unrolled!(8, |k| if k < 32 / N {
                    Self::unpack_sixteen(unsafe {
                        ldg_v4_u32_here(m.start(r).add(16 * (32 / N * g + k)))
                    })
                } else {
                    [0.0; 8]
                });
                unrolled!(32, |i| e[i / N][i % N])
            }

            #[inline(always)]
            unsafe fn unpack_f16(m: &Matrix, r: usize, g: usize) -> [u32; 16] {
                // A weight past f16's range saturates rather than turn into infinity.
                let v = unsafe { Self::unpack(m, r, g) };
                unrolled!(16, |i| pack_f16x2(
                    v[2 * i].clamp(-65504.0, 65504.0),
                    v[2 * i + 1].clamp(-65504.0, 65504.0)
                ))
            }

            #[inline(always)]
            unsafe fn repack(source: *const u8, m: &Matrix, r: usize, block: usize, valid: usize) {
                unsafe { copy_padded::<$bytes>(source, m, r, block, valid) }
            }
        }
    };
}
float_weights!(F32, 0, 4);
float_weights!(F16, 1, 2);
float_weights!(Bf16, 30, 2);

/// Rounds to f16; values past its range saturate.
#[inline(always)]
pub fn to_f16(x: f32) -> u16 {
    Half::from_f32(x.clamp(-65504.0, 65504.0)).to_bits()
}
