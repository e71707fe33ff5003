//! `d * scale * (v ± 1/8)` with `v` of -1, 0 and 1 from a grid, scales of 32 elements: here
//! `d * scale / 8 * (q - 16)` with `q = 16 + 8 v ± 1`.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Quant, UNIT};
use gguf::blocks::{F16, Iq1S};
use gguf_codebooks::{IQ1, bytes_of_pairs};

/// `8 v + 16`, for [`gguf::blocks::Iq1M`] too.
pub(super) static GRID: [u64; 2048] = super::grid::words(&bytes_of_pairs(&IQ1, [8, 16, 24]));

#[inline(always)]
fn unit(block: &Iq1S, unit: usize) -> [u64; 4] {
    let shift = if block.high(unit) >> 15 == 0 { 1 } else { -1 };
    // No byte leaves its bounds.
    let shift = 0x0101_0101_0101_0101u64.wrapping_mul(shift as u64);
    std::array::from_fn(|run| GRID[block.index(4 * unit + run)].wrapping_add(shift))
}

impl Quant for Iq1S {
    const SUB: usize = 32;
    const MAX: u8 = 25;
    const OFFSET: f32 = 16.0;

    #[inline(always)]
    fn quants(&self, at: usize) -> [u8; UNIT] {
        bytemuck::cast(unit(self, at).map(u64::to_le_bytes))
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = 0.125 * f32_of(self.d);
        for j in 0..8 {
            s[j] = d * f32::from(2 * ((self.high(j) >> 12) & 7) + 1);
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
