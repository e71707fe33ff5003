//! `d * (q - 8)`, 4 bits.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Quant, Scales, UNIT};
use gguf::blocks::{F16, Q4_0};

impl Quant for Q4_0 {
    const SUB: usize = 32;
    const MAX: u8 = 15;
    const OFFSET: f32 = 8.0;
    const INTERLEAVED: Option<Scales> = Some(Scales::Halves);

    #[inline(always)]
    fn quants(&self, _unit: usize) -> [u8; UNIT] {
        std::array::from_fn(|i| (self.qs[i % 16] >> (i / 16 * 4)) & 0x0f)
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = f32_of(self.d);
        s[0] = d;
        m[0] = -8.0 * d;
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, _unit: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe { super::nibbles_avx2(&self.qs) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn pair_avx512<const N: usize>(blocks: *const Self) -> (__m512i, __m512, __m512) {
        // SAFETY: the caller's.
        unsafe {
            let bytes = super::pair_bytes_avx512::<Self, N>(blocks);
            let s = super::pair_halves_avx512::<Self>(bytes, 0);
            let m = _mm512_setzero_ps();
            let q = super::pair_nibbles_avx512::<Self, 1>(bytes);
            (q, s, m)
        }
    }
}
