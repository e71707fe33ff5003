use super::iq1_s::{GRID, LOWER, LOWERED, RAISED};
use super::*;

quantised_weights! {
    /// As [`Iq1S`], scales for each 16 and shifts for each 8. A group is the low bits of four indices; then
    /// for each a nibble with its high bits and the shift's sign. A block's scales are as in the file: four a
    /// word, the scale of the scales in the words' top bits.
    Iq1M, 29, block 256 of 56, planes [group 4, group 2, block 8],
    uniform false,
    load |m, g| -> (u32, u16, [u32; 2]) {
        (read::word(m, 0, g), read::half_word(m, 1, g), read::words2(m, 2, g / BLOCK_GROUPS))
    }
    levels |(qs, high, _)| {
        let codes = unrolled!(4, |k| {
            let high = u32::from(high) >> (4 * k);
            grid::entry(&GRID, grid::byte(qs, k) | ((high & 7) << 8)) | ((high >> 3 & 1) * LOWER)
        });
        grid::choose(codes, RAISED, LOWERED)
    },
    affine |(_, _, h), g| {
        let j = g % BLOCK_GROUPS;
        let d = (h[0] >> 12 & 15) | (h[0] >> 28 << 4) | ((h[1] >> 12 & 15) << 8) | (h[1] >> 28 << 12);
        let d = 0.125 * read::f16(d as u16);
        let scales = (if j < 4 { h[0] } else { h[1] }) >> (16 * (j / 2 % 2) + 6 * (j % 2));
        let scale = |v: u32| (2 * (v & 7) + 1) as f32;
        Affine::centred([d * scale(scales), d * scale(scales >> 3)], 16.0)
    },
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let g = b * BLOCK_GROUPS + j;
            write::word(m, 0, g, u32_at(s, 4 * j));
            write::half_word(m, 1, g, u16_at(s, 32 + 2 * j));
        }
        write::word(m, 2, 2 * b, u32_at(s, 48));
        write::word(m, 2, 2 * b + 1, u32_at(s, 52));
    }
}
