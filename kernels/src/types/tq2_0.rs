use super::*;

quantised_weights! {
    /// `d * (q - 1)`, 2 bits.
    Tq2_0, 35, block 256 of 66, planes [group 8, block 2],
    uniform true,
    load |m, g| -> ([u32; 2], u16) {
        (read::words2(m, 0, g), read::half_word(m, 1, g / BLOCK_GROUPS))
    }
    levels |(qs, _)| read::pairs(qs),
    affine |(_, d), _| {
        let d = read::f16(d);
        Affine::uniform(d, -d)
    },
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let qs = s.add(32 * (j / 4));
            write::pairs(m, 0, b * BLOCK_GROUPS + j, |i| u32::from(*qs.add(i)) >> (2 * (j % 4)));
        }
        write::half_word(m, 1, b, u16_at(s, 64));
    }
}
