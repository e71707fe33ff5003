//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 weights, which are groups as they are.

use super::*;

macro_rules! quantised_weights {
    ($(#[$doc:meta])* $name:ident, $ty:literal, block $block:literal of $bytes:literal, planes [$($per:ident $plane:literal),*],
     uniform $uniform:literal,
     load |$lm:ident, $lg:ident| -> $raw:ty { $load:expr }
     levels |$lr:pat_param| $levels:expr,
     affine |$ar:pat_param, $ag:pat_param| $affine:expr,
     repack |$s:ident, $rm:ident, $rb:ident| $repack:expr) => {
        $(#[$doc])*
        pub struct $name;

        impl Quantised for $name {
            const UNIFORM: bool = $uniform;

            type Raw = $raw;

            #[inline(always)]
            unsafe fn load<P: Planes>($lm: &P, $lg: usize) -> $raw {
                unsafe { $load }
            }

            #[inline(always)]
            fn levels($lr: $raw) -> [u32; 8] {
                $levels
            }

            #[inline(always)]
            fn affine($ar: $raw, $ag: usize) -> Affine {
                $affine
            }
        }

        impl Weights for $name {
            const LAYOUT: Layout = Layout {
                ty: $ty,
                block: $block,
                block_bytes: $bytes,
                planes: {
                    let planes = [$(Plane::$per($plane)),*];
                    let mut all = [Plane::NONE; 4];
                    let mut i = 0;
                    while i < planes.len() {
                        all[i] = planes[i];
                        i += 1;
                    }
                    all
                },
                quantised: true,
            };

            #[inline(always)]
            unsafe fn unpack(m: &Matrix, r: usize, g: usize) -> [f32; 32] {
                unsafe { unpack_quantised::<Self>(m, r, g) }
            }

            #[inline(always)]
            unsafe fn unpack_f16(m: &Matrix, r: usize, g: usize) -> [u32; 16] {
                unsafe { unpack_f16_quantised::<Self>(m, r, g) }
            }

            #[inline(always)]
            unsafe fn repack($s: *const u8, m: &Matrix, r: usize, $rb: usize, _valid: usize) {
                unsafe {
                    let $rm = &m.row::<Self>(r);
                    $repack
                }
            }
        }
    };
}
pub(super) use quantised_weights;

/// The same scale and offset for both halves.
#[inline(always)]
fn uniform(d: f32, m: f32) -> Affine {
    Affine {
        d: [d, d],
        m: [m, m],
    }
}

/// A nibble block's level of weight `i`: low nibbles first.
#[inline(always)]
unsafe fn nibble(qs: *const u8, i: usize) -> u32 {
    unsafe { (u32::from(*qs.add(i % 16)) >> (4 * (i / 16))) & 15 }
}

/// The fifth bit of weight `i`: bit `i` of a little-endian word.
#[inline(always)]
unsafe fn fifth_bit(qh: *const u8, i: usize) -> u32 {
    unsafe { (u32::from(*qh.add(i / 8)) >> (i % 8)) & 1 }
}

#[inline(always)]
fn five_bits(low: [u32; 8], high: [u32; 8]) -> [u32; 8] {
    unrolled!(8, |w| low[w] | (high[w] << 4))
}

quantised_weights! {
    /// `d * (q - 8)`.
    Q4_0, 2, block 32 of 18, planes [group 16, group 2],
    uniform true,
    load |m, g| -> ([u32; 4], u16) { (read::words4(m, 0, g), read::half_word(m, 1, g)) }
    levels |(qs, _)| read::nibbles(qs),
    affine |(_, d), _| {
        let d = read::f16(d);
        uniform(d, -8.0 * d)
    },
    repack |s, m, b| {
        write::nibbles(m, b, |i| nibble(s.add(2), i));
        write::half_word(m, 1, b, u16_at(s, 0));
    }
}

quantised_weights! {
    /// `d * q + m`.
    Q4_1, 3, block 32 of 20, planes [group 16, group 4],
    uniform true,
    load |m, g| -> ([u32; 4], u32) { (read::words4(m, 0, g), read::word(m, 1, g)) }
    levels |(qs, _)| read::nibbles(qs),
    affine |(_, dm), _| uniform(read::f16(dm as u16), read::f16((dm >> 16) as u16)),
    repack |s, m, b| {
        write::nibbles(m, b, |i| nibble(s.add(4), i));
        write::word(m, 1, b, u32::from(u16_at(s, 0)) | (u32::from(u16_at(s, 2)) << 16));
    }
}

quantised_weights! {
    /// `d * (q - 16)`.
    Q5_0, 6, block 32 of 22, planes [group 16, group 4, group 2],
    uniform true,
    load |m, g| -> ([u32; 4], u32, u16) {
        (read::words4(m, 0, g), read::word(m, 1, g), read::half_word(m, 2, g))
    }
    levels |(qs, high, _)| five_bits(read::nibbles(qs), read::bits(high)),
    affine |(_, _, d), _| {
        let d = read::f16(d);
        uniform(d, -16.0 * d)
    },
    repack |s, m, b| {
        write::nibbles(m, b, |i| nibble(s.add(6), i));
        write::bits(m, 1, b, |i| fifth_bit(s.add(2), i));
        write::half_word(m, 2, b, u16_at(s, 0));
    }
}

quantised_weights! {
    /// `d * q + m`.
    Q5_1, 7, block 32 of 24, planes [group 16, group 4, group 4],
    uniform true,
    load |m, g| -> ([u32; 4], u32, u32) {
        (read::words4(m, 0, g), read::word(m, 1, g), read::word(m, 2, g))
    }
    levels |(qs, high, _)| five_bits(read::nibbles(qs), read::bits(high)),
    affine |(_, _, dm), _| uniform(read::f16(dm as u16), read::f16((dm >> 16) as u16)),
    repack |s, m, b| {
        write::nibbles(m, b, |i| nibble(s.add(8), i));
        write::bits(m, 1, b, |i| fifth_bit(s.add(4), i));
        write::word(m, 2, b, u32::from(u16_at(s, 0)) | (u32::from(u16_at(s, 2)) << 16));
    }
}

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
        uniform(d, -128.0 * d)
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
