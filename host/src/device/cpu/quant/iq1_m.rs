//! As [`super::iq1_s`], with scales of 16 elements and shifts of 8.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::iq1_s::GRID;
use super::{Quant, UNIT};
use gguf::blocks::{F16, Iq1M};

#[inline(always)]
fn unit(block: &Iq1M, unit: usize) -> [u64; 4] {
    const ONES: u64 = 0x0101_0101_0101_0101;
    std::array::from_fn(|run| {
        let (index, negative) = block.run(4 * unit + run);
        // No byte leaves its bounds.
        let shift = if negative { ONES.wrapping_neg() } else { ONES };
        GRID[index].wrapping_add(shift)
    })
}

impl Quant for Iq1M {
    const SUB: usize = 16;
    const MAX: u8 = 25;
    const OFFSET: f32 = 16.0;

    #[inline(always)]
    fn quants(&self, at: usize) -> [u8; UNIT] {
        bytemuck::cast(unit(self, at).map(u64::to_le_bytes))
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = 0.125 * f32_of(self.d());
        for j in 0..16 {
            s[j] = d * f32::from(self.scale(j));
            m[j] = -16.0 * s[j];
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, at: usize) -> __m256i {
        let [a, b, c, d] = unit(self, at).map(|word| word as i64);
        // SAFETY: the caller's.
        unsafe { _mm256_setr_epi64x(a, b, c, d) }
    }
}
