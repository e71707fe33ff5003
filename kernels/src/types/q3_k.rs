use super::*;

quantised_weights! {
    /// `d * (scale - 32) * (q - 4)`, 3 bits, scales for each 16.
    Q3K, 11, block 256 of 110, planes [group 8, group 4, group 2, block 2],
    uniform false,
    load |m, g| -> ([u32; 2], u32, u16, u16) {
        (
            read::words2(m, 0, g),
            read::word(m, 1, g),
            read::half_word(m, 2, g),
            read::half_word(m, 3, g / BLOCK_GROUPS),
        )
    }
    levels |(low, high, _, _)| {
        let (low, high) = (read::pairs(low), read::bits(high));
        unrolled!(8, |w| low[w] | (high[w] << 2))
    },
    affine |(_, _, scales, d), _| {
        let (scales, d) = (read::signed_pair(scales), read::f16(d));
        let d = [d * scales[0], d * scales[1]];
        Affine { d, m: [-4.0 * d[0], -4.0 * d[1]] }
    },
    repack |s, m, b| {
        let packed = s.add(96);
        let scale = |i: usize| -> u16 {
            let low = (u16::from(*packed.add(i % 8)) >> (4 * (i / 8))) & 15;
            let high = (u16::from(*packed.add(8 + i % 4)) >> (2 * (i / 4))) & 3;
            (low | (high << 4)).wrapping_sub(32) & 0xff
        };
        for j in 0..BLOCK_GROUPS {
            let g = b * BLOCK_GROUPS + j;
            let qs = s.add(32 + 32 * (j / 4));
            write::pairs(m, 0, g, |i| u32::from(*qs.add(i)) >> (2 * (j % 4)));
            write::bits(m, 1, g, |i| u32::from(*s.add(i)) >> j);
            write::half_word(m, 2, g, scale(2 * j) | (scale(2 * j + 1) << 8));
        }
        write::half_word(m, 3, b, u16_at(s, 108));
    }
}
