use super::*;
use gguf_codebooks::{IQ2_XXS, nibble_grid};

static GRID: [u32; 256] = nibble_grid(&IQ2_XXS);

/// Levels of IQ2's codes: 64 more than their magnitudes, and 64 less them.
pub const POSITIVE: u32 = u32::from_le_bytes([64 + 8, 64 + 25, 64 + 43, 64]);
pub const NEGATIVE: u32 = u32::from_le_bytes([64 - 8, 64 - 25, 64 - 43, 64]);

quantised_weights! {
    /// `d * (0.5 + scale) / 4 * ±magnitude`. A group is four indices, then its signs with the scale in their
    /// four bits to spare.
    Iq2Xxs, 16, block 256 of 66, planes [group 8, block 2],
    uniform true,
    load |m, g| -> ([u32; 2], u16) {
        (read::words2(m, 0, g), read::half_word(m, 1, g / BLOCK_GROUPS))
    }
    levels |(qs, _)| {
        let codes = unrolled!(4, |k| {
            grid::entry(&GRID, grid::byte(qs[0], k)) | grid::even_run_signs(qs[1], k)
        });
        grid::choose(codes, POSITIVE, NEGATIVE)
    },
    affine |(qs, d), _| {
        let d = 0.25 * read::f16(d) * (0.5 + (qs[1] >> 28) as f32);
        Affine::centred([d, d], 64.0)
    },
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let g = b * BLOCK_GROUPS + j;
            let word = u32_at(s, 2 + 8 * j + 4);
            let signs = grid::pack_run_signs(|k, i| grid::seven_signs(word, k, i));
            write::word(m, 0, 2 * g, u32_at(s, 2 + 8 * j));
            write::word(m, 0, 2 * g + 1, signs | (word & 0xf000_0000));
        }
        write::half_word(m, 1, b, u16_at(s, 0));
    }
}
