use super::iq2_xxs::{NEGATIVE, POSITIVE};
use super::*;
use gguf_codebooks::{IQ2_XS, nibble_grid};

static GRID: [u32; 512] = nibble_grid(&IQ2_XS);

quantised_weights! {
    /// `d * (0.5 + scale) / 4 * ±magnitude`, scales for each 16. A group is the low bits of four indices, then
    /// its signs with the ninth bits of the indices in their four bits to spare.
    Iq2Xs, 17, block 256 of 74, planes [group 8, group 1, block 2],
    uniform false,
    load |m, g| -> ([u32; 2], u8, u16) {
        (read::words2(m, 0, g), read::single(m, 1, g), read::half_word(m, 2, g / BLOCK_GROUPS))
    }
    levels |(qs, _, _)| {
        let codes = unrolled!(4, |k| {
            let index = grid::byte(qs[0], k) | (((qs[1] >> (28 + k)) & 1) << 8);
            grid::entry(&GRID, index) | grid::even_run_signs(qs[1], k)
        });
        grid::choose(codes, POSITIVE, NEGATIVE)
    },
    affine |(_, scales, d), _| {
        let d = 0.25 * read::f16(d);
        let d = [d * (0.5 + f32::from(scales & 15)), d * (0.5 + f32::from(scales >> 4))];
        Affine::centred(d, 64.0)
    },
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let g = b * BLOCK_GROUPS + j;
            let run = |k: usize| u32::from(u16_at(s, 2 + 8 * j + 2 * k));
            let mut low = 0;
            let mut signs = grid::pack_run_signs(|k, i| if i < 7 { run(k) >> (9 + i) } else { 0 });
            for k in 0..4 {
                low |= (run(k) & 0xff) << (8 * k);
                signs |= ((run(k) >> 8) & 1) << (28 + k);
            }
            write::word(m, 0, 2 * g, low);
            write::word(m, 0, 2 * g + 1, signs);
            write::single(m, 1, g, *s.add(66 + j));
        }
        write::half_word(m, 2, b, u16_at(s, 0));
    }
}
