use super::*;
use gguf_codebooks::{IQ3_S, IQ3_S_MAGNITUDES, bytes_of_nibbles};

/// 16 more than the magnitudes.
static GRID: [u32; 512] = grid::raised(&bytes_of_nibbles(&IQ3_S, IQ3_S_MAGNITUDES), 16);

quantised_weights! {
    /// `d * (1 + 2 scale) * ±magnitude`. A group is the low bits of eight indices; its signs; the ninth bits
    /// with the scale, and four bits to spare.
    Iq3S, 21, block 256 of 110, planes [group 8, group 4, group 2, block 2],
    uniform true,
    load |m, g| -> ([u32; 2], u32, u16, u16) {
        (
            read::words2(m, 0, g),
            read::word(m, 1, g),
            read::half_word(m, 2, g),
            read::half_word(m, 3, g / BLOCK_GROUPS),
        )
    }
    levels |(qs, signs, high, _)| unrolled!(8, |w| {
        let index = grid::byte(qs[w / 4], w % 4) | ((u32::from(high) >> w & 1) << 8);
        grid::negate::<16>(grid::entry(&GRID, index), grid::word_signs(signs, w))
    }),
    affine |(_, _, high, d), _| {
        let d = read::f16(d) * f32::from(1 + 2 * (high >> 8));
        Affine::centred([d, d], 16.0)
    },
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let g = b * BLOCK_GROUPS + j;
            let signs = u32_at(s, 74 + 4 * j);
            let scale = (*s.add(106 + j / 2) >> (4 * (j % 2))) & 15;
            write::word(m, 0, 2 * g, u32_at(s, 2 + 8 * j));
            write::word(m, 0, 2 * g + 1, u32_at(s, 2 + 8 * j + 4));
            write::bits(m, 1, g, |i| signs >> i);
            write::half_word(m, 2, g, u16::from_le_bytes([*s.add(66 + j), scale]));
        }
        write::half_word(m, 3, b, u16_at(s, 0));
    }
}
