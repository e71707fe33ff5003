use super::*;

quantised_weights! {
    /// `d * q + m`.
    Q5_1, 7, block 32 of 24, planes [group 16, group 4, group 4],
    uniform true,
    load |m, g| -> ([u32; 4], u32, u32) {
        (read::words4(m, 0, g), read::word(m, 1, g), read::word(m, 2, g))
    }
    levels |(qs, high, _)| read::five_bits(read::nibbles(qs), read::bits(high)),
    affine |(_, _, dm), _| Affine::uniform(read::f16(dm as u16), read::f16((dm >> 16) as u16)),
    repack |s, m, b| {
        write::nibbles(m, b, |i| write::nibble(s.add(8), i));
        write::bits(m, 1, b, |i| write::fifth_bit(s.add(4), i));
        write::word(m, 2, b, u32::from(u16_at(s, 0)) | (u32::from(u16_at(s, 2)) << 16));
    }
}
