use super::*;

quantised_weights! {
    /// `d * (q - 16)`.
    Q5_0, 6, block 32 of 22, planes [group 16, group 4, group 2],
    uniform true,
    load |m, g| -> ([u32; 4], u32, u16) {
        (read::words4(m, 0, g), read::word(m, 1, g), read::half_word(m, 2, g))
    }
    levels |(qs, high, _)| read::five_bits(read::nibbles(qs), read::bits(high)),
    affine |(_, _, d), _| {
        let d = read::f16(d);
        Affine::uniform(d, -16.0 * d)
    },
    repack |s, m, b| {
        write::nibbles(m, b, |i| write::nibble(s.add(6), i));
        write::bits(m, 1, b, |i| write::fifth_bit(s.add(2), i));
        write::half_word(m, 2, b, u16_at(s, 0));
    }
}
