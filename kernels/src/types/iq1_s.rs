use super::*;
use gguf_codebooks::{IQ1, nibble_grid};

/// The grid, for [`Iq1M`] too.
pub static GRID: [u32; 2048] = nibble_grid(&IQ1);

/// Levels of IQ1's codes, `16 + 8 v + 1` and `16 + 8 v - 1` for `v` of -1, 0 and 1: the shift by an eighth
/// is part of the level, as [`Iq1M`] has one for each eight weights.
pub const RAISED: u32 = u32::from_le_bytes([9, 17, 25, 0]);
pub const LOWERED: u32 = u32::from_le_bytes([7, 15, 23, 0]);
/// Added to an entry of the grid, it chooses [`LOWERED`].
pub const LOWER: u32 = 0x4444_4444;

quantised_weights! {
    /// `d * (2 scale + 1) * (v ± 1/8)`, here `d * (2 scale + 1) / 8 * (q - 16)`. A group is the low bits of
    /// four indices; then their high bits, the scale and the shift's sign.
    Iq1S, 19, block 256 of 50, planes [group 4, group 2, block 2],
    uniform true,
    load |m, g| -> (u32, u16, u16) {
        (read::word(m, 0, g), read::half_word(m, 1, g), read::half_word(m, 2, g / BLOCK_GROUPS))
    }
    levels |(qs, high, _)| {
        let high = u32::from(high);
        let lower = (high >> 15) * LOWER;
        let codes = unrolled!(4, |k| {
            grid::entry(&GRID, grid::byte(qs, k) | ((high >> (3 * k) & 7) << 8)) | lower
        });
        grid::choose(codes, RAISED, LOWERED)
    },
    affine |(_, high, d), _| {
        let d = 0.125 * read::f16(d) * f32::from(2 * (high >> 12 & 7) + 1);
        Affine::centred([d, d], 16.0)
    },
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let g = b * BLOCK_GROUPS + j;
            write::word(m, 0, g, u32_at(s, 2 + 4 * j));
            write::half_word(m, 1, g, u16_at(s, 34 + 2 * j));
        }
        write::half_word(m, 2, b, u16_at(s, 0));
    }
}
