//! Tensor-core products of a warpgroup (compute capability 9.0 alone, `sm_90a`): 128 threads, from a warp on whose
//! number is a multiple of four, multiply two tiles of shared memory.
//!
//! Both are tiles of rows of 64 16-bit elements, as [`crate::tensor::copy_box`] leaves them: D = A·Bᵀ + D with
//! A of 64 rows, B of N. Warp `w` of the four has rows 16 w to 16 w + 15 of D, in the fragments of
//! [`crate::mma`]: with `g = lane / 4` and `t = lane % 4`, `d[j][0..2]` is (16 w + g, 8 j + 2 t..), `d[j][2..4]` the same
//! columns eight rows below.
//!
//! PTX ISA, "Asynchronous warpgroup level matrix instructions". The instructions run on by themselves; the
//! functions here return once they are done, and other warpgroups of the block keep the tensor cores busy.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator;
use crate::shared::SharedPtr;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// The descriptor of a tile: its address, 1024 bytes from eight rows to the next, a swizzle of 128 bytes.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn descriptor(tile: SharedPtr<u16>) -> u64 {
    let address = u64::from(tile.addr() & 0x3ffff) >> 4;
    address | (1 << 16) | ((1024 >> 4) << 32) | (1 << 62)
}

macro_rules! products {
    ($($(#[$doc:meta])* $name:ident of $tiles:literal, $shape:literal, $first:literal $($i:literal)*, $a:literal $b:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// All 128 threads call it with the same addresses, 1024-byte aligned and within shared memory; the tiles have
        /// arrived and stay until it returns.
        #[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90a))]
        #[inline(always)]
        pub unsafe fn $name(a: SharedPtr<u16>, b: SharedPtr<u16>, mut d: [[f32; 4]; $tiles]) -> [[f32; 4]; $tiles] {
            #[cfg(target_arch = "nvptx64")]
            unsafe {
                // 16 columns at a time: 32 bytes further, which the descriptor counts in sixteens.
                asm!(
                    "{{ .reg .pred p; .reg .b64 a, b; setp.eq.u32 p, 0, 0; wgmma.fence.sync.aligned;",
                    concat!("mov.b64 a, {", $a, "}; mov.b64 b, {", $b, "};"),
                    concat!("wgmma.mma_async.sync.aligned.", $shape, ".f32.f16.f16 {{{", $first, "}", $(", {", $i, "}",)* "}}, a, b, p, 1, 1, 0, 0;"),
                    "add.s64 a, a, 2; add.s64 b, b, 2;",
                    concat!("wgmma.mma_async.sync.aligned.", $shape, ".f32.f16.f16 {{{", $first, "}", $(", {", $i, "}",)* "}}, a, b, p, 1, 1, 0, 0;"),
                    "add.s64 a, a, 2; add.s64 b, b, 2;",
                    concat!("wgmma.mma_async.sync.aligned.", $shape, ".f32.f16.f16 {{{", $first, "}", $(", {", $i, "}",)* "}}, a, b, p, 1, 1, 0, 0;"),
                    "add.s64 a, a, 2; add.s64 b, b, 2;",
                    concat!("wgmma.mma_async.sync.aligned.", $shape, ".f32.f16.f16 {{{", $first, "}", $(", {", $i, "}",)* "}}, a, b, p, 1, 1, 0, 0;"),
                    "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }}",
                    inout(reg32) d[$first / 4][$first % 4],
                    $(inout(reg32) d[$i / 4][$i % 4],)*
                    in(reg64) descriptor(a), in(reg64) descriptor(b),
                    options(nostack, preserves_flags)
                );
                d
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                // What the device's registers are numbered by.
                let _ = [$first, $($i,)* $a, $b];
                d = multiply(stringify!($name), a, b, d);
                d
            }
        }
    )*};
}

products! {
    /// 64 × 128 × 64, halves, sums in f32.
    m64n128k64_f16 of 16, "m64n128k16",
        0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
        32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63, 64 65;
    /// 64 × 256 × 64, halves, sums in f32.
    m64n256k64_f16 of 32, "m64n256k16",
        0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
        32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
        64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95
        96 97 98 99 100 101 102 103 104 105 106 107 108 109 110 111 112 113 114 115 116 117 118 119 120 121
        122 123 124 125 126 127, 128 129;
}

/// A warp's part of a product on the host.
#[cfg(not(target_arch = "nvptx64"))]
fn multiply<const TILES: usize>(
    op: &'static str,
    a: SharedPtr<u16>,
    b: SharedPtr<u16>,
    d: [[f32; 4]; TILES],
) -> [[f32; 4]; TILES] {
    let warp = crate::thread::thread_idx_x() / 32 % 4;
    emulator::exchange(op, u32::MAX, (a.addr(), b.addr(), d), |lanes| {
        let (a, b, _) = lanes[0];
        if lanes.iter().any(|l| (l.0, l.1) != (a, b)) || !(a | b).is_multiple_of(1024) {
            emulator::fail(format!(
                "{op}: tiles at {a:#x} and {b:#x} must be 1024-byte aligned, and the same for all lanes"
            ));
        }
        let row = |tile: u32, row: u32| -> [f32; 64] {
            let at = emulator::shared_access(tile + row * 128, 128, 128, "wgmma of a row");
            core::array::from_fn(|k| {
                let place = (k / 8) ^ (row as usize % 8);
                // Safety: checked.
                let bits = unsafe { at.cast::<u16>().add(place * 8 + k % 8).read() };
                crate::half::F16(bits).to_f32()
            })
        };
        let rows: [_; 16] = core::array::from_fn(|r| row(a, 16 * warp + r as u32));
        let columns: Vec<_> = (0..8 * TILES as u32).map(|c| row(b, c)).collect();
        core::array::from_fn(|lane| {
            let (g, t) = (lane / 4, lane % 4);
            core::array::from_fn(|tile| {
                core::array::from_fn(|i| {
                    let pairs = rows[g + 8 * (i / 2)]
                        .iter()
                        .zip(&columns[8 * tile + 2 * t + i % 2]);
                    pairs.fold(lanes[lane].2[tile][i], |sum, (a, b)| sum + a * b)
                })
            })
        })
    })
}
