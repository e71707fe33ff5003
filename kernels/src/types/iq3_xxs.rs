use super::*;
use gguf_codebooks::{IQ3_XXS, IQ3_XXS_MAGNITUDES, bytes_of_nibbles};

/// 64 more than the magnitudes.
static GRID: [u32; 256] = grid::raised(&bytes_of_nibbles(&IQ3_XXS, IQ3_XXS_MAGNITUDES), 64);

quantised_weights! {
    /// `d * (0.5 + scale) / 2 * ±magnitude`. A group is eight indices; then its signs with the scale in their
    /// four bits to spare.
    Iq3Xxs, 18, block 256 of 98, planes [group 8, group 4, block 2],
    uniform true,
    load |m, g| -> ([u32; 2], u32, u16) {
        (read::words2(m, 0, g), read::word(m, 1, g), read::half_word(m, 2, g / BLOCK_GROUPS))
    }
    levels |(qs, signs, _)| unrolled!(8, |w| {
        let entry = grid::entry(&GRID, grid::byte(qs[w / 4], w % 4));
        grid::negate::<64>(entry, grid::even_word_signs(signs, w))
    }),
    affine |(_, signs, d), _| {
        // Bits 25, 27, 29 and 31.
        let v = (signs >> 25) & 0x55;
        let v = (v | (v >> 1)) & 0x33;
        let scale = (v | (v >> 2)) & 0x0f;
        let d = 0.5 * read::f16(d) * (0.5 + scale as f32);
        Affine::centred([d, d], 64.0)
    },
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let g = b * BLOCK_GROUPS + j;
            let word = u32_at(s, 66 + 4 * j);
            write::word(m, 0, 2 * g, u32_at(s, 2 + 8 * j));
            write::word(m, 0, 2 * g + 1, u32_at(s, 2 + 8 * j + 4));
            write::bits(m, 1, g, |i| {
                if i % 8 < 7 { word >> (7 * (i / 8) + i % 8) } else { word >> (28 + i / 8) }
            });
        }
        write::half_word(m, 2, b, u16_at(s, 0));
    }
}
