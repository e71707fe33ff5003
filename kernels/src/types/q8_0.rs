use super::*;

quantised_weights! {
    /// `d * q`, q signed; stored as `q + 128`, so that levels are unsigned here too.
    Q8_0, 8, block 32 of 34, planes [group 16, group 16, group 2],
    uniform true,
    load |m, g| -> ([u32; 4], [u32; 4], u16) {
        (read::words4(m, 0, g), read::words4(m, 1, g), read::half_word(m, 2, g))
    }
    levels |(lo, hi, _)| unrolled!(8, |w| if w < 4 { lo[w] } else { hi[w - 4] }),
    affine |(_, _, d), _| {
        let d = read::f16(d);
        Affine::uniform(d, -128.0 * d)
    },
    repack |s, m, b| {
        for w in 0..8 {
            let q = s.add(2 + 4 * w);
            let v = u32::from_le_bytes([*q, *q.add(1), *q.add(2), *q.add(3)]) ^ 0x8080_8080;
            write::word(m, w / 4, b * 4 + w % 4, v);
        }
        write::half_word(m, 2, b, u16_at(s, 0));
    }
}
