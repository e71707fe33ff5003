//! `d * value[q]`, 4 bits, looked up: here `d * (q - 128)` with `q = 128 + value`.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::grid::{look_up, raised};
use super::{Quant, UNIT};
use gguf::blocks::{F16, Iq4Nl};
use gguf_codebooks::IQ4_VALUES;

/// For [`gguf::blocks::Iq4Xs`] too.
pub(super) const VALUES: [u8; 16] = raised(IQ4_VALUES, 128);

impl Quant for Iq4Nl {
    const SUB: usize = 32;
    const MAX: u8 = 255;
    const OFFSET: f32 = 128.0;

    #[inline(always)]
    fn quants(&self, _unit: usize) -> [u8; UNIT] {
        look_up(&self.qs, &VALUES)
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = f32_of(self.d);
        s[0] = d;
        m[0] = -128.0 * d;
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, _unit: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe { super::grid::look_up_avx2(&self.qs, &VALUES) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn pair_avx512<const N: usize>(blocks: *const Self) -> (__m512i, __m512, __m512) {
        // SAFETY: the caller's.
        unsafe {
            let bytes = super::pair_bytes_avx512::<Self, N>(blocks);
            let s = super::pair_halves_avx512::<Self>(bytes, 0);
            let q = super::pair_nibbles_avx512::<Self, 1>(bytes);
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(VALUES.as_ptr().cast()));
            (_mm512_shuffle_epi8(table, q), s, _mm512_setzero_ps())
        }
    }
}
