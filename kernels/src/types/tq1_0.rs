//! Groups must not share bytes here as they do in the file, so digits change places: of a group's 32 six
//! bytes have five each, and half a byte the last two, which takes no more room than the file does.

use super::*;

/// Bytes 0 and 2 of a word as halves, or 1 and 3 of it shifted.
const SPREAD: u32 = 0x00ff_00ff;

/// The next digits of two bytes, in the low bits of halves; the rest stays in `bytes`. A byte times 3 has
/// its first digit above 256, and below it the byte of the digits that follow.
#[inline(always)]
fn next_digits(bytes: &mut u32) -> u32 {
    let product = *bytes * 3;
    *bytes = product & SPREAD;
    (product >> 8) & 0x0003_0003
}

/// A byte of five digits, the first highest: `256 / 243` of their number, rounded up.
#[inline(always)]
fn byte_of(digit: impl Fn(usize) -> u32) -> u8 {
    let number = (0..5).fold(0, |v, i| 3 * v + digit(i));
    (256 * number).div_ceil(243) as u8
}

/// Digit `i` of a block of the file.
#[inline(always)]
unsafe fn digit(s: *const u8, i: usize) -> u32 {
    let (at, n) = match i {
        0..160 => (i % 32, i / 32),
        160..240 => (32 + i % 16, (i - 160) / 16),
        _ => (48 + i % 4, (i - 240) / 4),
    };
    let mut rest = unsafe { u32::from(*s.add(at)) };
    for _ in 0..n {
        rest = (rest * 3) & 0xff;
    }
    (rest * 3) >> 8
}

quantised_weights! {
    /// `d * (q - 1)`, digits to the base 3. Digit `n` of byte `b` of the word is weight `4 n + b`, of the half
    /// word weight `20 + 2 n + b`.
    Tq1_0, 34, block 256 of 54, planes [group 4, group 2, block 4, block 2],
    uniform true,
    load |m, g| -> (u32, u16, u32, u16) {
        (
            read::word(m, 0, g),
            read::half_word(m, 1, g),
            read::word(m, 2, g / BLOCK_GROUPS) >> (4 * (g % BLOCK_GROUPS)) & 15,
            read::half_word(m, 3, g / BLOCK_GROUPS),
        )
    }
    levels |(word, half, last, _)| {
        let (mut even, mut odd) = (word & SPREAD, (word >> 8) & SPREAD);
        let mut levels = [0; 8];
        for n in 0..5 {
            levels[n] = next_digits(&mut even) | (next_digits(&mut odd) << 8);
        }
        let mut two = u32::from(half & 0xff) | (u32::from(half >> 8) << 16);
        let mut pair = || {
            let digits = next_digits(&mut two);
            (digits | (digits >> 8)) & 0xffff
        };
        levels[5] = pair() | (pair() << 16);
        levels[6] = pair() | (pair() << 16);
        // A third of a number up to 8.
        let first = (last * 11) >> 5;
        levels[7] = pair() | (first << 16) | ((last - 3 * first) << 24);
        levels
    },
    affine |(_, _, _, d), _| {
        let d = read::f16(d);
        Affine::uniform(d, -d)
    },
    repack |s, m, b| {
        for j in 0..BLOCK_GROUPS {
            let g = b * BLOCK_GROUPS + j;
            let at = |i: usize| digit(s, 32 * j + i);
            let byte = |b: usize| u32::from(byte_of(|n| at(4 * n + b)));
            write::word(m, 0, g, byte(0) | (byte(1) << 8) | (byte(2) << 16) | (byte(3) << 24));
            let byte = |b: usize| byte_of(|n| at(20 + 2 * n + b));
            write::half_word(m, 1, g, u16::from_le_bytes([byte(0), byte(1)]));
        }
        let last = |j: usize| 3 * digit(s, 32 * j + 30) + digit(s, 32 * j + 31);
        write::word(m, 2, b, (0..BLOCK_GROUPS).fold(0, |v, j| v | (last(j) << (4 * j))));
        write::half_word(m, 3, b, u16_at(s, 52));
    }
}
