use super::*;

quantised_weights! {
    /// `d * scale * q - dmin * min`, 2 bits, scales for each 16.
    Q2K, 10, block 256 of 84, planes [group 8, group 2, block 4],
    uniform false,
    load |m, g| -> ([u32; 2], u16, u32) {
        (read::words2(m, 0, g), read::half_word(m, 1, g), read::word(m, 2, g / BLOCK_GROUPS))
    }
    levels |(qs, _, _)| read::pairs(qs),
    affine |(_, scales, d), _| {
        let (d, dmin) = (read::f16(d as u16), read::f16((d >> 16) as u16));
        Affine {
            d: [d * f32::from(scales & 15), d * f32::from((scales >> 8) & 15)],
            m: [-dmin * f32::from((scales >> 4) & 15), -dmin * f32::from(scales >> 12)],
        }
    },
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let g = b * BLOCK_GROUPS + j;
            let qs = s.add(16 + 32 * (j / 4));
            write::pairs(m, 0, g, |i| u32::from(*qs.add(i)) >> (2 * (j % 4)));
            write::half_word(m, 1, g, u16_at(s, 2 * j));
        }
        write::word(m, 2, b, u32::from(u16_at(s, 80)) | (u32::from(u16_at(s, 82)) << 16));
    }
}
