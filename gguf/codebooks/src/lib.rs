//! The tables that ggml's IQ and MX weight types look their values up in: part of the file format, and
//! needed by whoever reads it, on the host (`gguf`) as on the device (`kernels`). Hence a crate of
//! their own, without `std`.
//!
//! The grids are kept as the format's authors publish them, a few bits for each weight, and brought to the
//! form that a reader wants by a `const fn` while it compiles.

#![no_std]

mod grids;

pub use grids::{IQ1, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS};

/// What the codes of [`IQ2_XXS`], [`IQ2_XS`] and [`IQ2_S`] stand for; code 3 does not occur.
pub const IQ2_MAGNITUDES: [u8; 3] = [8, 25, 43];
/// What the codes of [`IQ3_XXS`] stand for.
pub const IQ3_XXS_MAGNITUDES: [u8; 8] = [4, 12, 20, 28, 36, 44, 52, 62];
/// What the codes of [`IQ3_S`] stand for.
pub const IQ3_S_MAGNITUDES: [u8; 8] = [1, 3, 5, 7, 9, 11, 13, 15];
/// What is added to each of IQ1's -1, 0 and 1, or subtracted from it.
pub const IQ1_DELTA: f32 = 0.125;

/// The sixteen values of IQ4_NL and IQ4_XS, unevenly spaced.
pub const IQ4_VALUES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// Twice the sixteen values of MXFP4's E2M1 elements (OCP Microscaling Formats 1.0, section 5.3.3).
pub const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half of `2^(e - 127)`, MXFP4's scale, for its [`MXFP4_VALUES`]: exact, though its two least are subnormal.
#[inline(always)]
pub const fn mxfp4_scale(e: u8) -> f32 {
    let bits = if e < 2 {
        0x0020_0000 << e
    } else {
        (e as u32 - 1) << 23
    };
    f32::from_bits(bits)
}

/// All eight signs of a group whose last one is not stored: it makes their number even.
#[inline(always)]
pub const fn even_signs(seven: u8) -> u8 {
    seven | (((seven.count_ones() as u8) & 1) << 7)
}

/// The 2-bit codes of an entry of eight, in the nibbles of a word.
#[inline(always)]
pub const fn nibbles(entry: u16) -> u32 {
    let mut word = 0;
    let mut i = 0;
    while i < 8 {
        word |= ((entry as u32 >> (2 * i)) & 3) << (4 * i);
        i += 1;
    }
    word
}

/// [`nibbles`] of a whole grid.
pub const fn nibble_grid<const N: usize>(grid: &[u16; N]) -> [u32; N] {
    let mut out = [0; N];
    let mut i = 0;
    while i < N {
        out[i] = nibbles(grid[i]);
        i += 1;
    }
    out
}

/// A grid of eight 2-bit codes an entry, with a byte of `values` for each code.
pub const fn bytes_of_pairs<const N: usize>(grid: &[u16; N], values: [u8; 3]) -> [[u8; 8]; N] {
    let mut out = [[0; 8]; N];
    let mut i = 0;
    while i < N {
        let mut j = 0;
        while j < 8 {
            out[i][j] = values[(grid[i] >> (2 * j)) as usize & 3];
            j += 1;
        }
        i += 1;
    }
    out
}

/// A grid of four codes of up to 4 bits an entry, with a byte of `values` for each code.
pub const fn bytes_of_nibbles<const N: usize>(grid: &[u16; N], values: [u8; 8]) -> [[u8; 4]; N] {
    let mut out = [[0; 4]; N];
    let mut i = 0;
    while i < N {
        let mut j = 0;
        while j < 4 {
            out[i][j] = values[(grid[i] >> (4 * j)) as usize & 7];
            j += 1;
        }
        i += 1;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sorted, without repetitions, and of codes that stand for something.
    fn well_formed(grid: &[u16], bits: u32, codes: u16) {
        assert!(grid.is_sorted_by(|a, b| a < b));
        for &entry in grid {
            let mut rest = entry;
            for _ in 0..16 / bits {
                assert!(rest & ((1 << bits) - 1) < codes, "{entry:04x}");
                rest >>= bits;
            }
        }
    }

    #[test]
    fn grids_are_well_formed() {
        for grid in [&IQ1[..], &IQ2_XXS, &IQ2_XS, &IQ2_S] {
            well_formed(grid, 2, 3);
        }
        for grid in [&IQ3_XXS[..], &IQ3_S] {
            well_formed(grid, 4, 8);
        }
    }

    #[test]
    fn signs_are_even() {
        for seven in 0..128 {
            let all = even_signs(seven);
            assert_eq!(all & 127, seven);
            assert_eq!(all.count_ones() % 2, 0);
        }
    }

    #[test]
    fn scales_are_powers_of_two() {
        for e in 0..=254u8 {
            let exact = 2f64.powi(i32::from(e) - 128);
            assert_eq!(f64::from(mxfp4_scale(e)), exact);
        }
    }
}
