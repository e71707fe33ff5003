use super::*;

quantised_weights! {
    /// `d * scale * q - dmin * min`, 5 bits.
    Q5K, 13, block 256 of 176, planes [group 16, group 4, block 16],
    uniform true,
    load |m, g| -> ([u32; 4], u32, [u32; 4]) {
        (read::words4(m, 0, g), read::word(m, 1, g), read::words4(m, 2, g / BLOCK_GROUPS))
    }
    levels |(low, high, _)| {
        let (low, high) = (read::nibbles(low), read::bits(high));
        unrolled!(8, |w| low[w] | (high[w] << 4))
    },
    affine |(_, _, header), g| read::header_k4(header, g),
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let g = b * BLOCK_GROUPS + j;
            let qs = s.add(48 + 32 * (j / 2));
            write::nibbles(m, g, |i| u32::from(*qs.add(i)) >> (4 * (j % 2)));
            write::bits(m, 1, g, |i| u32::from(*s.add(16 + i)) >> j);
        }
        write::header_k4(s, m, 2, b);
    }
}
