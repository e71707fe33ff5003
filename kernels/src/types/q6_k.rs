use super::*;

quantised_weights! {
    /// `d * scale * (q - 32)`, 6 bits, signed scales for each 16.
    Q6K, 14, block 256 of 210, planes [group 16, group 8, group 2, block 2],
    uniform false,
    load |m, g| -> ([u32; 4], [u32; 2], u16, u16) {
        (
            read::words4(m, 0, g),
            read::words2(m, 1, g),
            read::half_word(m, 2, g),
            read::half_word(m, 3, g / BLOCK_GROUPS),
        )
    }
    levels |(low, high, _, _)| {
        let (low, high) = (read::nibbles(low), read::pairs(high));
        unrolled!(8, |w| low[w] | (high[w] << 4))
    },
    affine |(_, _, scales, d), _| {
        let (scales, d) = (read::signed_pair(scales), read::f16(d));
        let d = [d * scales[0], d * scales[1]];
        Affine { d, m: [-32.0 * d[0], -32.0 * d[1]] }
    },
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let g = b * BLOCK_GROUPS + j;
            let (n, c) = (j / 4, j % 4);
            let low = s.add(64 * n + 32 * (c % 2));
            let high = s.add(128 + 32 * n);
            write::nibbles(m, g, |i| u32::from(*low.add(i)) >> (4 * (c / 2)));
            write::pairs(m, 1, g, |i| u32::from(*high.add(i)) >> (2 * c));
            write::half_word(m, 2, g, u16_at(s, 192 + 2 * j));
        }
        write::half_word(m, 3, b, u16_at(s, 208));
    }
}
