use super::*;

quantised_weights! {
    /// `d * (q - 8)`.
    Q4_0, 2, block 32 of 18, planes [group 16, group 2],
    uniform true,
    load |m, g| -> ([u32; 4], u16) { (read::words4(m, 0, g), read::half_word(m, 1, g)) }
    nibbles |(qs, _)| qs,
    affine |(_, d), _| {
        let d = read::f16(d);
        Affine::uniform(d, -8.0 * d)
    },
    repack |s, m, b| {
        write::nibbles(m, b, |i| write::nibble(s.add(2), i));
        write::half_word(m, 1, b, u16_at(s, 0));
    }
}
