use super::iq2_xxs::{NEGATIVE, POSITIVE};
use super::*;
use gguf_codebooks::{IQ2_S, nibble_grid};

static GRID: [u32; 1024] = nibble_grid(&IQ2_S);

quantised_weights! {
    /// `d * (0.5 + scale) / 4 * ±magnitude`, scales for each 16. A group is the low bits of four indices and
    /// its signs; then the high bits and the scales.
    Iq2S, 22, block 256 of 82, planes [group 8, group 2, block 2],
    uniform false,
    load |m, g| -> ([u32; 2], u16, u16) {
        (read::words2(m, 0, g), read::half_word(m, 1, g), read::half_word(m, 2, g / BLOCK_GROUPS))
    }
    levels |(qs, high, _)| {
        let codes = unrolled!(4, |k| {
            let index = grid::byte(qs[0], k) | ((u32::from(high) >> (2 * k) & 3) << 8);
            grid::entry(&GRID, index) | grid::run_signs(qs[1], k)
        });
        grid::choose(codes, POSITIVE, NEGATIVE)
    },
    affine |(_, high, d), _| {
        let d = 0.25 * read::f16(d);
        let d = [d * (0.5 + f32::from(high >> 8 & 15)), d * (0.5 + f32::from(high >> 12))];
        Affine::centred(d, 64.0)
    },
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let g = b * BLOCK_GROUPS + j;
            let signs = u32_at(s, 34 + 4 * j);
            write::word(m, 0, 2 * g, u32_at(s, 2 + 4 * j));
            write::word(m, 0, 2 * g + 1, grid::pack_run_signs(|k, i| signs >> (8 * k + i)));
            write::half_word(m, 1, g, u16::from_le_bytes([*s.add(66 + j), *s.add(74 + j)]));
        }
        write::half_word(m, 2, b, u16_at(s, 0));
    }
}
