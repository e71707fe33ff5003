//! `d * q + m`, 5 bits.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Quant, Scales, UNIT};
use gguf::blocks::{F16, Q5_1};

impl Quant for Q5_1 {
    const SUB: usize = 32;
    const MAX: u8 = 31;
    const OFFSET: f32 = 0.0;
    const INTERLEAVED: Option<Scales> = Some(Scales::Halves);

    #[inline(always)]
    fn quants(&self, _unit: usize) -> [u8; UNIT] {
        let high = u32::from_le_bytes(self.qh);
        std::array::from_fn(|i| {
            ((self.qs[i % 16] >> (i / 16 * 4)) & 0x0f) | ((((high >> i) & 1) as u8) << 4)
        })
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        s[0] = f32_of(self.d);
        m[0] = f32_of(self.m);
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, _unit: usize) -> __m256i {
        // SAFETY: the caller's.
        unsafe {
            let high = super::spread_bits_avx2(u32::from_le_bytes(self.qh), 16);
            _mm256_or_si256(super::nibbles_avx2(&self.qs), high)
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn pair_avx512<const N: usize>(blocks: *const Self) -> (__m512i, __m512, __m512) {
        // SAFETY: the caller's.
        unsafe {
            let bytes = super::pair_bytes_avx512::<Self, N>(blocks);
            let s = super::pair_halves_avx512::<Self>(bytes, 0);
            let m = super::pair_halves_avx512::<Self>(bytes, 1);
            let q = super::pair_nibbles_avx512::<Self, 4>(bytes);
            let second = if N == 1 { [0; 4] } else { (*blocks.add(1)).qh };
            let q = super::pair_fifth_bits_avx512(q, (*blocks).qh, second);
            (q, s, m)
        }
    }
}
