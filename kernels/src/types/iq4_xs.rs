use super::iq4_nl::TABLE;
use super::*;

quantised_weights! {
    /// `d * (scale - 32) * value[q]`. A block's header is `d`, the scales' high bits, their low bits.
    Iq4Xs, 23, block 256 of 136, planes [group 16, block 8],
    uniform true,
    load |m, g| -> ([u32; 4], [u32; 2]) {
        (read::words4(m, 0, g), read::words2(m, 1, g / BLOCK_GROUPS))
    }
    levels |(qs, _)| grid::look_up(qs, TABLE),
    affine |(_, header), g| {
        let j = g % BLOCK_GROUPS;
        let scale = (header[1] >> (4 * j) & 15) | ((header[0] >> (16 + 2 * j) & 3) << 4);
        let d = read::f16(header[0] as u16) * (scale as f32 - 32.0);
        Affine::centred([d, d], 128.0)
    },
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            grid::write_nibbles(m, b * BLOCK_GROUPS + j, |i| write::nibble(s.add(8 + 16 * j), i));
        }
        write::word(m, 1, 2 * b, u32_at(s, 0));
        write::word(m, 1, 2 * b + 1, u32_at(s, 4));
    }
}
