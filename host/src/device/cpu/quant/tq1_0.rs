//! `d * (q - 1)`, digits to the base 3, one scale.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{Quant, UNIT};
use gguf::blocks::{F16, Tq1_0};

/// The bytes that have the elements of a unit, and what they are to be multiplied by.
#[inline(always)]
fn unit(block: &Tq1_0, unit: usize) -> ([u8; UNIT], [u8; UNIT]) {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let (mut bytes, mut powers) = ([0; UNIT], [0; UNIT]);
    match unit {
        0..5 => {
            bytes.copy_from_slice(&block.qs[..32]);
            powers.fill(POWERS[unit]);
        }
        5 | 6 => {
            let n = 2 * (unit - 5);
            for (half, at) in [(0, 0), (1, 16)] {
                bytes[at..at + 16].copy_from_slice(&block.qs[32..]);
                powers[at..at + 16].fill(POWERS[n + half]);
            }
        }
        _ => {
            bytes[..16].copy_from_slice(&block.qs[32..]);
            powers[..16].fill(POWERS[4]);
            for n in 0..4 {
                bytes[16 + 4 * n..20 + 4 * n].copy_from_slice(&block.qh);
                powers[16 + 4 * n..20 + 4 * n].fill(POWERS[n]);
            }
        }
    }
    (bytes, powers)
}

impl Quant for Tq1_0 {
    const SUB: usize = 32;
    const MAX: u8 = 2;
    const OFFSET: f32 = 1.0;

    #[inline(always)]
    fn quants(&self, at: usize) -> [u8; UNIT] {
        let (bytes, powers) = unit(self, at);
        std::array::from_fn(|i| {
            let rest = bytes[i].wrapping_mul(powers[i]);
            ((u16::from(rest) * 3) >> 8) as u8
        })
    }

    #[inline(always)]
    fn scales(&self, f32_of: impl Fn(F16) -> f32, s: &mut [f32; 16], m: &mut [f32; 16]) {
        let d = f32_of(self.d);
        s[..8].fill(d);
        m[..8].fill(-d);
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn quants_avx2(&self, at: usize) -> __m256i {
        let (bytes, powers) = unit(self, at);
        // SAFETY: 32 bytes are there; AVX2 is the caller's promise.
        unsafe {
            let digits = |at: usize| {
                let wide = |b: &[u8; UNIT]| {
                    _mm256_cvtepu8_epi16(_mm_loadu_si128(b.as_ptr().add(at).cast()))
                };
                let rest = _mm256_mullo_epi16(wide(&bytes), wide(&powers));
                let rest = _mm256_and_si256(rest, _mm256_set1_epi16(0xff));
                _mm256_srli_epi16::<8>(_mm256_mullo_epi16(rest, _mm256_set1_epi16(3)))
            };
            // Packing works on each half of the vectors by itself.
            let packed = _mm256_packus_epi16(digits(0), digits(16));
            _mm256_permute4x64_epi64::<0b11_01_10_00>(packed)
        }
    }
}
