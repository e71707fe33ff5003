//! What F32, F16 and BF16 share: rows padded with zeros to a multiple of 32, otherwise as the file has them.

use super::*;
use cuda_std::half::pack_f16x2;

pub const fn layout(ty: u32, bytes: usize) -> Layout {
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

    /// The 32 weights of group `g` of row `r`.
    #[inline(always)]
    unsafe fn unpack(m: &Matrix, r: usize, g: usize) -> [f32; 32] {
        let n = Self::WEIGHTS;
        // Half as many with f16; the rest is never loaded.
        let e = unrolled!(8, |k| if k < 32 / n {
            Self::unpack_sixteen(unsafe { ldg_v4_u32_here(m.start(r).add(16 * (32 / n * g + k))) })
        } else {
            [0.0; 8]
        });
        unrolled!(32, |i| e[i / n][i % n])
    }

    /// Weights `4 w .. 4 w + 4` of group `g` of row `r`.
    #[inline(always)]
    unsafe fn unpack_four(m: &Matrix, r: usize, g: usize, w: usize) -> [f32; 4] {
        let first = GROUP * g + 4 * w;
        let v = Self::unpack_sixteen(unsafe {
            ldg_v4_u32_here(m.start(r).add(16 * (first / Self::WEIGHTS)))
        });
        let high = first % Self::WEIGHTS != 0;
        unrolled!(4, |i| if high { v[i + 4] } else { v[i] })
    }

    /// Weights `8 e .. 8 e + 8` of row `r` in f16, two to a word, rounded.
    #[inline(always)]
    unsafe fn eight_f16(m: &Matrix, r: usize, e: usize) -> [u32; 4] {
        let from = unsafe { m.start(r).add(e * (128 / Self::WEIGHTS)) };
        let n = Self::WEIGHTS;
        let v = unrolled!(2, |k| if k < 8 / n {
            Self::unpack_sixteen(unsafe { ldg_v4_u32_here(from.add(16 * k)) })
        } else {
            [0.0; 8]
        });
        // A weight past f16's range saturates rather than turn into infinity.
        let v = unrolled!(8, |i| v[i / n][i % n].clamp(-65504.0, 65504.0));
        unrolled!(4, |i| pack_f16x2(v[2 * i], v[2 * i + 1]))
    }

    /// The 32 weights of group `g` of row `r` likewise.
    #[inline(always)]
    unsafe fn unpack_f16(m: &Matrix, r: usize, g: usize) -> [u32; 16] {
        let v = unrolled!(4, |k| unsafe { Self::eight_f16(m, r, 4 * g + k) });
        unrolled!(16, |i| v[i / 4][i % 4])
    }
}

/// Copies `valid` values of `BYTES` bytes, and zeros up to 32.
#[inline(always)]
pub unsafe fn copy_padded<const BYTES: usize>(
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

macro_rules! float_weights {
    ($name:ident, $ty:literal, $bytes:literal) => {
        impl Weights for $name {
            const LAYOUT: Layout = layout($ty, $bytes);

            #[inline(always)]
            unsafe fn repack(source: *const u8, m: &Matrix, r: usize, block: usize, valid: usize) {
                unsafe { copy_padded::<$bytes>(source, m, r, block, valid) }
            }
        }
    };
}
pub(super) use float_weights;
