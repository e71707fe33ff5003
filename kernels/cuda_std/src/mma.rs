//! Tensor-core products of one warp, and `ldmatrix`.
//!
//! Each computes D = A·B + C with A of m × k, B of k × n, C and D of m × n, spread over the 32
//! lanes. With `g = lane / 4` and `t = lane % 4` the fragments are (PTX ISA, "Matrix Fragments"):
//!
//! | product | A | B | C, D |
//! | --- | --- | --- | --- |
//! | m16n8k16, 16-bit | `a[0]`: (g, 2t..), `a[1]`: (g+8, 2t..), `a[2]`: (g, 2t+8..), `a[3]`: (g+8, 2t+8..) | `b[0]`: (2t.., g), `b[1]`: (2t+8.., g) | `c[0..2]`: (g, 2t..), `c[2..4]`: (g+8, 2t..) |
//! | m16n8k8, 16-bit | `a[0]`: (g, 2t..), `a[1]`: (g+8, 2t..) | `b[0]`: (2t.., g) | as above |
//! | m16n8k8, TF32 | `a[0]`: (g, t), `a[1]`: (g+8, t), `a[2]`: (g, t+4), `a[3]`: (g+8, t+4) | `b[0]`: (t, g), `b[1]`: (t+4, g) | as above |
//! | m16n8k16, 8-bit | `a[0]`: (g, 4t..), `a[1]`: (g+8, 4t..) | `b[0]`: (4t.., g) | as above |
//! | m16n8k32, 8-bit | `a[0]`: (g, 4t..), `a[1]`: (g+8, 4t..), `a[2]`: (g, 4t+16..), `a[3]`: (g+8, 4t+16..) | `b[0]`: (4t.., g), `b[1]`: (4t+16.., g) | as above |
//!
//! A word holds 2 (16-bit) or 4 (8-bit) neighbours along k, the first in the low bits. All lanes
//! of the warp must come. The emulator sums in f32 in the order of k; the hardware's order and
//! rounding inside one instruction are not documented, so last bits differ.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator;
use crate::shared::SharedPtr;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// One word per matrix of 8 × 8 16-bit elements (B's fragments; see [`ldmatrix_x4`]).
pub type Words<const N: usize> = [u32; N];

/// Picks an element: of a function from (lane, register) to the lane's word, and two indices.
#[cfg(not(target_arch = "nvptx64"))]
type Pick<S> = fn(&dyn Fn(usize, usize) -> u32, usize, usize) -> S;

/// Sums A·B + C over k on the host; `a(words, row, k)` and `b(words, k, column)` pick elements.
#[cfg(not(target_arch = "nvptx64"))]
fn product<const K: usize, const A: usize, const B: usize, T: Copy, S: Copy>(
    op: &'static str,
    fragments: ([u32; A], [u32; B], [T; 4]),
    a: Pick<S>,
    b: Pick<S>,
    multiply_add: fn(S, S, T) -> T,
) -> [T; 4] {
    emulator::exchange(op, u32::MAX, fragments, |lanes| {
        let word_a = |lane: usize, register: usize| lanes[lane].0[register];
        let word_b = |lane: usize, register: usize| lanes[lane].1[register];
        let rows: [[S; K]; 16] =
            core::array::from_fn(|row| core::array::from_fn(|k| a(&word_a, row, k)));
        let columns: [[S; K]; 8] =
            core::array::from_fn(|column| core::array::from_fn(|k| b(&word_b, k, column)));
        core::array::from_fn(|lane| {
            let (g, t) = (lane / 4, lane % 4);
            core::array::from_fn(|i| {
                let pairs = rows[g + 8 * (i / 2)].iter().zip(&columns[2 * t + i % 2]);
                pairs.fold(lanes[lane].2[i], |sum, (a, b)| multiply_add(*a, *b, sum))
            })
        })
    })
}

/// Where an element lies: the lane's `t`, the register's half along k, and the place in the word.
#[cfg(not(target_arch = "nvptx64"))]
fn place(k: usize, per_word: usize) -> (usize, usize, usize) {
    (k / per_word % 4, k / (4 * per_word), k % per_word)
}

#[cfg(not(target_arch = "nvptx64"))]
fn bits_a<const PER_WORD: usize>(word: &dyn Fn(usize, usize) -> u32, row: usize, k: usize) -> u32 {
    let (t, half, part) = place(k, PER_WORD);
    word(row % 8 * 4 + t, row / 8 + 2 * half) >> (part * 32 / PER_WORD)
}

#[cfg(not(target_arch = "nvptx64"))]
fn bits_b<const PER_WORD: usize>(
    word: &dyn Fn(usize, usize) -> u32,
    k: usize,
    column: usize,
) -> u32 {
    let (t, half, part) = place(k, PER_WORD);
    word(column * 4 + t, half) >> (part * 32 / PER_WORD)
}

#[cfg(not(target_arch = "nvptx64"))]
fn from_f16(bits: u32) -> f32 {
    crate::half::F16(bits as u16).to_f32()
}

#[cfg(not(target_arch = "nvptx64"))]
fn from_bf16(bits: u32) -> f32 {
    crate::half::BF16(bits as u16).to_f32()
}

/// The hardware ignores the 13 low bits.
#[cfg(not(target_arch = "nvptx64"))]
fn from_tf32(bits: u32) -> f32 {
    f32::from_bits(bits & !0x1fff)
}

macro_rules! products_k16 {
    ($($(#[$doc:meta])* $name:ident = $op:literal, $convert:ident;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                let (mut d0, mut d1, mut d2, mut d3) = (c[0], c[1], c[2], c[3]);
                asm!(concat!($op, " {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};"),
                    inout(reg32) d0, inout(reg32) d1, inout(reg32) d2, inout(reg32) d3,
                    in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3], in(reg32) b[0], in(reg32) b[1],
                    options(nomem, nostack, preserves_flags));
                [d0, d1, d2, d3]
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                product::<16, _, _, _, _>(
                stringify!($name),
                (a, b, c),
                    |word, row, k| $convert(bits_a::<2>(word, row, k)),
                    |word, k, column| $convert(bits_b::<2>(word, k, column)),
                    |a, b, sum| sum + a * b,
                )
            }
        }
    )*};
}

products_k16! {
    /// 16 × 8 × 16, halves, sums in f32.
    m16n8k16_f16 = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", from_f16;
    /// 16 × 8 × 16, bfloat16, sums in f32.
    m16n8k16_bf16 = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", from_bf16;
}

/// 16 × 8 × 8, halves, sums in f32.
#[inline(always)]
pub fn m16n8k8_f16(a: [u32; 2], b: u32, c: [f32; 4]) -> [f32; 4] {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let (mut d0, mut d1, mut d2, mut d3) = (c[0], c[1], c[2], c[3]);
        asm!("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}}}, {{{6}}}, {{{0}, {1}, {2}, {3}}};",
            inout(reg32) d0, inout(reg32) d1, inout(reg32) d2, inout(reg32) d3,
            in(reg32) a[0], in(reg32) a[1], in(reg32) b, options(nomem, nostack, preserves_flags));
        [d0, d1, d2, d3]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        product::<8, _, _, _, _>(
            "m16n8k8_f16",
            (a, [b], c),
            |word, row, k| from_f16(bits_a::<2>(word, row, k)),
            |word, k, column| from_f16(bits_b::<2>(word, k, column)),
            |a, b, sum| sum + a * b,
        )
    }
}

/// 16 × 8 × 8, TF32 (an f32's bits; see [`crate::half::to_tf32`]), sums in f32.
#[inline(always)]
pub fn m16n8k8_tf32(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let (mut d0, mut d1, mut d2, mut d3) = (c[0], c[1], c[2], c[3]);
        asm!("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};",
            inout(reg32) d0, inout(reg32) d1, inout(reg32) d2, inout(reg32) d3,
            in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3], in(reg32) b[0], in(reg32) b[1],
            options(nomem, nostack, preserves_flags));
        [d0, d1, d2, d3]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        product::<8, _, _, _, _>(
            "m16n8k8_tf32",
            (a, b, c),
            |word, row, k| from_tf32(bits_a::<1>(word, row, k)),
            |word, k, column| from_tf32(bits_b::<1>(word, k, column)),
            |a, b, sum| sum + a * b,
        )
    }
}

/// 16 × 8 × 32, signed bytes, sums in i32 (exact, wrapping).
#[inline(always)]
pub fn m16n8k32_s8(a: [u32; 4], b: [u32; 2], c: [i32; 4]) -> [i32; 4] {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let (mut d0, mut d1, mut d2, mut d3) = (c[0], c[1], c[2], c[3]);
        asm!("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};",
            inout(reg32) d0, inout(reg32) d1, inout(reg32) d2, inout(reg32) d3,
            in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3], in(reg32) b[0], in(reg32) b[1],
            options(nomem, nostack, preserves_flags));
        [d0, d1, d2, d3]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        product::<32, _, _, _, _>(
            "m16n8k32_s8",
            (a, b, c),
            |word, row, k| i32::from(bits_a::<4>(word, row, k) as i8),
            |word, k, column| i32::from(bits_b::<4>(word, k, column) as i8),
            |a, b, sum: i32| sum.wrapping_add(a * b),
        )
    }
}

/// 16 × 8 × 32, unsigned bytes with signed ones, sums in i32 (exact, wrapping).
#[inline(always)]
pub fn m16n8k32_u8_s8(a: [u32; 4], b: [u32; 2], c: [i32; 4]) -> [i32; 4] {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let (mut d0, mut d1, mut d2, mut d3) = (c[0], c[1], c[2], c[3]);
        asm!("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};",
            inout(reg32) d0, inout(reg32) d1, inout(reg32) d2, inout(reg32) d3,
            in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3], in(reg32) b[0], in(reg32) b[1],
            options(nomem, nostack, preserves_flags));
        [d0, d1, d2, d3]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        product::<32, _, _, _, _>(
            "m16n8k32_u8_s8",
            (a, b, c),
            |word, row, k| i32::from(bits_a::<4>(word, row, k) as u8),
            |word, k, column| i32::from(bits_b::<4>(word, k, column) as i8),
            |a, b, sum: i32| sum.wrapping_add(a * b),
        )
    }
}

/// 16 × 8 × 16, unsigned bytes with signed ones, sums in i32 (exact, wrapping).
#[inline(always)]
pub fn m16n8k16_u8_s8(a: [u32; 2], b: u32, c: [i32; 4]) -> [i32; 4] {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        let (mut d0, mut d1, mut d2, mut d3) = (c[0], c[1], c[2], c[3]);
        asm!("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}}}, {{{6}}}, {{{0}, {1}, {2}, {3}}};",
            inout(reg32) d0, inout(reg32) d1, inout(reg32) d2, inout(reg32) d3,
            in(reg32) a[0], in(reg32) a[1], in(reg32) b, options(nomem, nostack, preserves_flags));
        [d0, d1, d2, d3]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        product::<16, _, _, _, _>(
            "m16n8k16_u8_s8",
            (a, [b], c),
            |word, row, k| i32::from(bits_a::<4>(word, row, k) as u8),
            |word, k, column| i32::from(bits_b::<4>(word, k, column) as i8),
            |a, b, sum: i32| sum.wrapping_add(a * b),
        )
    }
}

/// Loads `N` matrices on the host: lane `8i + r` has the address of row `r` of matrix `i`.
#[cfg(not(target_arch = "nvptx64"))]
fn load_matrices<const N: usize>(op: &'static str, address: u32, transposed: bool) -> [u32; N] {
    // The last lane to come reads for all, so that every lane's writes before are seen.
    emulator::exchange(op, u32::MAX, address, |addresses| {
        let element = |matrix: usize, row: usize, column: usize| {
            let row =
                emulator::shared_access(addresses[8 * matrix + row], 16, 16, "ldmatrix of a row");
            // Safety: checked.
            u32::from(unsafe { row.cast::<u16>().add(column).read() })
        };
        core::array::from_fn(|lane| {
            let (g, t) = (lane / 4, lane % 4);
            core::array::from_fn(|matrix| {
                let [low, high] = [2 * t, 2 * t + 1].map(|c| {
                    if transposed {
                        element(matrix, c, g)
                    } else {
                        element(matrix, g, c)
                    }
                });
                low | high << 16
            })
        })
    })
}

macro_rules! matrix_loads {
    ($($(#[$doc:meta])* $name:ident, $n:literal, $op:literal, $transposed:literal: $($r:ident)*;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// Each address is inside the block's shared memory, valid for 16 bytes and 16-byte aligned.
        #[inline(always)]
        pub unsafe fn $name<T>(row: SharedPtr<T>) -> Words<$n> {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                $(let $r: u32;)*
                asm!($op, $(out(reg32) $r,)* in(reg32) row.addr(), options(readonly, nostack, preserves_flags));
                [$($r),*]
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                load_matrices::<$n>(stringify!($name), row.addr(), $transposed)
            }
        }
    )*};
}

matrix_loads! {
    /// Loads one matrix of 8 × 8 16-bit elements: lanes 0 to 7 give the addresses of its rows, lane
    /// `l` gets elements (l / 4, 2 (l % 4)) and the one right of it.
    ldmatrix_x1, 1, "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{{0}}}, [{1}];", false: a;
    /// As [`ldmatrix_x1`], two matrices: lanes 8 to 15 give the rows of the second.
    ldmatrix_x2, 2, "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{{0}, {1}}}, [{2}];", false: a b;
    /// As [`ldmatrix_x1`], four matrices: lanes 8i to 8i + 7 give the rows of matrix i.
    ldmatrix_x4, 4, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{0}, {1}, {2}, {3}}}, [{4}];", false: a b c d;
    /// As [`ldmatrix_x1`], transposed: lane `l` gets (2 (l % 4), l / 4) and the one below it.
    ldmatrix_x1_trans, 1, "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {{{0}}}, [{1}];", true: a;
    /// As [`ldmatrix_x2`], transposed.
    ldmatrix_x2_trans, 2, "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{{0}, {1}}}, [{2}];", true: a b;
    /// As [`ldmatrix_x4`], transposed.
    ldmatrix_x4_trans, 4, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{0}, {1}, {2}, {3}}}, [{4}];", true: a b c d;
}
