//! Q2_K to Q6_K: blocks of 256 weights, eight groups, with scales of their own for each 16 or 32.

use super::legacy::quantised_weights;
use super::*;

/// Groups per block.
const GROUPS: usize = 8;

/// The 6-bit scale and minimum of group `j`, packed over 12 bytes (Q4_K, Q5_K).
#[inline(always)]
unsafe fn scale_min(packed: *const u8, j: usize) -> (u32, u32) {
    let at = |i: usize| unsafe { u32::from(*packed.add(i)) };
    if j < 4 {
        (at(j) & 63, at(j + 4) & 63)
    } else {
        (
            (at(j + 4) & 15) | ((at(j - 4) >> 6) << 4),
            (at(j + 4) >> 4) | ((at(j) >> 6) << 4),
        )
    }
}

/// A block's header as Q4_K and Q5_K keep it on the device, 16 bytes: `d` and `dmin`; then for each
/// group a byte with the low four bits of scale and minimum; then a nibble with their high two.
#[inline(always)]
unsafe fn write_header<T: Weights>(s: *const u8, m: &MatrixRow<T>, plane: usize, b: usize) {
    unsafe {
        let (mut low, mut high) = ([0u32; 2], 0u32);
        for j in 0..GROUPS {
            let (scale, min) = scale_min(s.add(4), j);
            low[j / 4] |= ((scale & 15) | ((min & 15) << 4)) << (8 * (j % 4));
            high |= ((scale >> 4) | ((min >> 4) << 2)) << (4 * j);
        }
        let d = u32::from(u16_at(s, 0)) | (u32::from(u16_at(s, 2)) << 16);
        write::word(m, plane, b * 4, d);
        write::word(m, plane, b * 4 + 1, low[0]);
        write::word(m, plane, b * 4 + 2, low[1]);
        write::word(m, plane, b * 4 + 3, high);
    }
}

/// What [`write_header`] wrote, for group `g`: `d * scale * q - dmin * min`.
#[inline(always)]
fn read_header(h: [u32; 4], g: usize) -> Affine {
    let j = g % GROUPS;
    let low = (if j < 4 { h[1] } else { h[2] }) >> (8 * (j % 4));
    let high = h[3] >> (4 * j);
    let scale = (low & 15) | ((high & 3) << 4);
    let min = ((low >> 4) & 15) | (((high >> 2) & 3) << 4);
    let d = read::f16(h[0] as u16) * scale as f32;
    let m = -(read::f16((h[0] >> 16) as u16) * min as f32);
    Affine {
        d: [d, d],
        m: [m, m],
    }
}

/// A pair of signed bytes.
#[inline(always)]
fn signed_pair(v: u16) -> [f32; 2] {
    [f32::from(v as i8), f32::from((v >> 8) as i8)]
}

quantised_weights! {
    /// `d * scale * q - dmin * min`, 2 bits, scales for each 16.
    Q2K, 10, block 256 of 84, planes [group 8, group 2, block 4],
    uniform false,
    load |m, g| -> ([u32; 2], u16, u32) {
        (read::words2(m, 0, g), read::half_word(m, 1, g), read::word(m, 2, g / GROUPS))
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
        for j in 0..GROUPS {
            let g = b * GROUPS + j;
            let qs = s.add(16 + 32 * (j / 4));
            write::pairs(m, 0, g, |i| u32::from(*qs.add(i)) >> (2 * (j % 4)));
            write::half_word(m, 1, g, u16_at(s, 2 * j));
        }
        write::word(m, 2, b, u32::from(u16_at(s, 80)) | (u32::from(u16_at(s, 82)) << 16));
    }
}

quantised_weights! {
    /// `d * (scale - 32) * (q - 4)`, 3 bits, scales for each 16.
    Q3K, 11, block 256 of 110, planes [group 8, group 4, group 2, block 2],
    uniform false,
    load |m, g| -> ([u32; 2], u32, u16, u16) {
        (
            read::words2(m, 0, g),
            read::word(m, 1, g),
            read::half_word(m, 2, g),
            read::half_word(m, 3, g / GROUPS),
        )
    }
    levels |(low, high, _, _)| {
        let (low, high) = (read::pairs(low), read::bits(high));
        unrolled!(8, |w| low[w] | (high[w] << 2))
    },
    affine |(_, _, scales, d), _| {
        let (scales, d) = (signed_pair(scales), read::f16(d));
        let d = [d * scales[0], d * scales[1]];
        Affine { d, m: [-4.0 * d[0], -4.0 * d[1]] }
    },
    repack |s, m, b| {
        let packed = s.add(96);
        let scale = |i: usize| -> u16 {
            let low = (u16::from(*packed.add(i % 8)) >> (4 * (i / 8))) & 15;
            let high = (u16::from(*packed.add(8 + i % 4)) >> (2 * (i / 4))) & 3;
            (low | (high << 4)).wrapping_sub(32) & 0xff
        };
        for j in 0..GROUPS {
            let g = b * GROUPS + j;
            let qs = s.add(32 + 32 * (j / 4));
            write::pairs(m, 0, g, |i| u32::from(*qs.add(i)) >> (2 * (j % 4)));
            write::bits(m, 1, g, |i| u32::from(*s.add(i)) >> j);
            write::half_word(m, 2, g, scale(2 * j) | (scale(2 * j + 1) << 8));
        }
        write::half_word(m, 3, b, u16_at(s, 108));
    }
}

quantised_weights! {
    /// `d * scale * q - dmin * min`, 4 bits.
    Q4K, 12, block 256 of 144, planes [group 16, block 16],
    uniform true,
    load |m, g| -> ([u32; 4], [u32; 4]) { (read::words4(m, 0, g), read::words4(m, 1, g / GROUPS)) }
    levels |(qs, _)| read::nibbles(qs),
    affine |(_, header), g| read_header(header, g),
    repack |s, m, b| {
        for j in 0..GROUPS {
            let qs = s.add(16 + 32 * (j / 2));
            write::nibbles(m, b * GROUPS + j, |i| u32::from(*qs.add(i)) >> (4 * (j % 2)));
        }
        write_header(s, m, 1, b);
    }
}

quantised_weights! {
    /// `d * scale * q - dmin * min`, 5 bits.
    Q5K, 13, block 256 of 176, planes [group 16, group 4, block 16],
    uniform true,
    load |m, g| -> ([u32; 4], u32, [u32; 4]) {
        (read::words4(m, 0, g), read::word(m, 1, g), read::words4(m, 2, g / GROUPS))
    }
    levels |(low, high, _)| {
        let (low, high) = (read::nibbles(low), read::bits(high));
        unrolled!(8, |w| low[w] | (high[w] << 4))
    },
    affine |(_, _, header), g| read_header(header, g),
    repack |s, m, b| {
        for j in 0..GROUPS {
            let g = b * GROUPS + j;
            let qs = s.add(48 + 32 * (j / 2));
            write::nibbles(m, g, |i| u32::from(*qs.add(i)) >> (4 * (j % 2)));
            write::bits(m, 1, g, |i| u32::from(*s.add(16 + i)) >> j);
        }
        write_header(s, m, 2, b);
    }
}

quantised_weights! {
    /// `d * scale * (q - 32)`, 6 bits, signed scales for each 16.
    Q6K, 14, block 256 of 210, planes [group 16, group 8, group 2, block 2],
    uniform false,
    load |m, g| -> ([u32; 4], [u32; 2], u16, u16) {
        (
            read::words4(m, 0, g),
            read::words2(m, 1, g),
            read::half_word(m, 2, g),
            read::half_word(m, 3, g / GROUPS),
        )
    }
    levels |(low, high, _, _)| {
        let (low, high) = (read::nibbles(low), read::pairs(high));
        unrolled!(8, |w| low[w] | (high[w] << 4))
    },
    affine |(_, _, scales, d), _| {
        let (scales, d) = (signed_pair(scales), read::f16(d));
        let d = [d * scales[0], d * scales[1]];
        Affine { d, m: [-32.0 * d[0], -32.0 * d[1]] }
    },
    repack |s, m, b| {
        for j in 0..GROUPS {
            let g = b * GROUPS + j;
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
