use super::*;

quantised_weights! {
    /// `d * scale * q - dmin * min`, 4 bits.
    Q4K, 12, block 256 of 144, planes [group 16, block 16],
    uniform true,
    load |m, g| -> ([u32; 4], [u32; 4]) { (read::words4(m, 0, g), read::words4(m, 1, g / BLOCK_GROUPS)) }
    nibbles |(qs, _)| qs,
    affine |(_, header), g| read::header_k4(header, g),
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let qs = s.add(16 + 32 * (j / 2));
            write::nibbles(m, b * BLOCK_GROUPS + j, |i| u32::from(*qs.add(i)) >> (4 * (j % 2)));
        }
        write::header_k4(s, m, 1, b);
    }
}
