use super::*;

quantised_weights! {
    /// `d * q + m`.
    Q4_1, 3, block 32 of 20, planes [group 16, group 4],
    uniform true,
    load |m, g| -> ([u32; 4], u32) { (read::words4(m, 0, g), read::word(m, 1, g)) }
    nibbles |(qs, _)| qs,
    affine |(_, dm), _| Affine::uniform(read::f16(dm as u16), read::f16((dm >> 16) as u16)),
    repack |s, m, b| {
        write::nibbles(m, b, |i| write::nibble(s.add(4), i));
        write::word(m, 1, b, u32::from(u16_at(s, 0)) | (u32::from(u16_at(s, 2)) << 16));
    }
}
