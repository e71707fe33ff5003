//! Copies of tiles by the copy engine (`cp.async.bulk.tensor`, compute capability 9.0): one thread asks for a box of
//! a matrix, or for whole rows, which land in shared memory swizzled, and what lies outside the matrix as zeros.
//!
//! The host describes the matrix by a [`TensorMap`]. That lies in global memory since before the launch, or inside the kernel's argument
//! struct, whose address the kernel takes with [`argument!`](crate::argument), since the engine reads the map where the launch put it.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator;
use crate::shared::SharedPtr;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// A matrix of 16-bit elements in global memory, row after row, and the box of it that one copy brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    /// A multiple of 16.
    pub address: u64,
    pub rows: u32,
    pub cols: u32,
    /// Bytes from row to row, a multiple of 16.
    pub stride: u64,
    /// 1 to 256.
    pub box_rows: u32,
    /// What a copy brings.
    pub copy: Copied,
}

/// What a copy brings of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// A box ([`copy_box`]).
    Box,
    /// All boxes side by side ([`copy_rows`]): of a row the first box's columns and behind them the next one's. Where that is more than one,
    /// what is right of the matrix is no zeros but what follows there.
    Rows,
}

impl Tiling {
    /// Boxes side by side that a copy brings.
    pub fn boxes(&self) -> u32 {
        match self.copy {
            Copied::Box => 1,
            Copied::Rows => self.cols.div_ceil(BOX_COLS),
        }
    }
}

/// Columns of a box: 128 bytes, the span of the swizzle.
pub const BOX_COLS: u32 = 64;

/// What the copy engine knows of a matrix: on a card the driver's `CUtensorMap`, in the emulator the [`Tiling`].
///
/// Row `r` of a box takes 128 bytes from `128 r` on; its eight pieces of 16 bytes lie at places `piece ^ (r % 8)`
/// (`CU_TENSOR_MAP_SWIZZLE_128B`). Of `n` boxes side by side the same is true of row `r` of box `b` as number `n r + b`.
///
/// The engine wants maps at multiples of 64 bytes: they come first in an argument struct. (A compiler's struct of arguments
/// is aligned to 16 at most; `cuda_builder` raises that where [`argument!`](crate::argument) is used.)
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub struct TensorMap(pub [u64; 16]);

#[cfg(not(target_arch = "nvptx64"))]
impl TensorMap {
    const EMULATED: u64 = u64::from_le_bytes(*b"emulated");

    /// The map as the emulator reads it.
    pub fn emulated(t: &Tiling) -> TensorMap {
        let mut words = [0; 16];
        let sizes = [t.rows, t.cols, t.box_rows].map(u64::from);
        words[..3].copy_from_slice(&[Self::EMULATED, t.address, t.stride]);
        words[3..6].copy_from_slice(&sizes);
        words[6] = u64::from(t.copy == Copied::Rows);
        TensorMap(words)
    }

    fn tiling(&self, copy: Copied) -> Tiling {
        if self.0[0] != Self::EMULATED || (self.0[6] != 0) != (copy == Copied::Rows) {
            emulator::fail(
                "a tensor map that was not made for the emulator or this copy".to_owned(),
            );
        }
        let size = |i: usize| self.0[i] as u32;
        Tiling {
            copy,
            address: self.0[1],
            stride: self.0[2],
            rows: size(3),
            cols: size(4),
            box_rows: size(5),
        }
    }
}

/// Starts a copy of the box whose first element is (`row`, `col`) to shared memory; its arrival counts at
/// `barrier`, `128 box_rows` bytes wherever the box lies.
///
/// # Safety
/// `map` is the address of a map within the kernel's arguments; `to` is valid for the box and 1024-byte
/// aligned; the barrier expects its bytes.
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
#[inline(always)]
pub unsafe fn copy_box(
    to: SharedPtr<u8>,
    map: *const TensorMap,
    row: u32,
    col: u32,
    barrier: SharedPtr<u64>,
) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{0}], [{1}, {{{2}, {3}}}], [{4}];",
            in(reg32) to.addr(), in(reg64) map as u64, in(reg32) col, in(reg32) row, in(reg32) barrier.addr(),
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        emulate(to, (*map).tiling(Copied::Box), row, col, barrier);
    }
}

/// Starts a copy of a box's rows from `row` on, all of their columns; `128 box_rows` bytes for each box. What is copied is the first to
/// leave the second-level cache.
///
/// # Safety
/// As [`copy_box`]; memory goes on behind the matrix to the end of its last row's last box.
#[cfg(any(not(target_arch = "nvptx64"), cuda_sm_90))]
#[inline(always)]
pub unsafe fn copy_rows(
    to: SharedPtr<u8>,
    map: *const TensorMap,
    row: u32,
    barrier: SharedPtr<u64>,
) {
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        asm!(
            "{{",
            ".reg .b64 policy;",
            "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;",
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [{0}], [{1}, {{{2}, {2}, {3}}}], [{4}], policy;",
            "}}",
            in(reg32) to.addr(), in(reg64) map as u64, in(reg32) 0u32, in(reg32) row, in(reg32) barrier.addr(),
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    unsafe {
        emulate(to, (*map).tiling(Copied::Rows), row, 0, barrier);
    }
}

/// What the copy engine does.
#[cfg(not(target_arch = "nvptx64"))]
unsafe fn emulate(to: SharedPtr<u8>, t: Tiling, row: u32, col: u32, barrier: SharedPtr<u64>) {
    if !to.addr().is_multiple_of(1024) || !(t.address | t.stride).is_multiple_of(16) {
        emulator::fail(format!(
            "a copy of a box to shared address {:#x} from {:#x} with rows of {} bytes: alignments are 1024, 16, 16",
            to.addr(),
            t.address,
            t.stride
        ));
    }
    let boxes = t.boxes();
    for line in 0..t.box_rows * boxes {
        for piece in 0..8 {
            let (y, x) = (
                row + line / boxes,
                col + line % boxes * BOX_COLS + 8 * piece,
            );
            let right = if boxes > 1 { boxes * BOX_COLS } else { t.cols };
            let inside = if y < t.rows {
                right.saturating_sub(x).min(8) * 2
            } else {
                0
            };
            let from = t.address + u64::from(y) * t.stride + u64::from(x) * 2;
            let place = to.addr() + line * 128 + (piece ^ (line % 8)) * 16;
            emulator::copy_async(place, from as *const u8, 16, inside);
        }
    }
    unsafe {
        emulator::wait_copies(0, true);
        crate::mbarrier::landed(barrier, t.box_rows * boxes * 128);
    }
}

/// The address of the argument struct `$arguments` of kernel `$kernel`, its only one.
#[macro_export]
macro_rules! argument {
    ($kernel:ident, $arguments:expr) => {{
        #[cfg(target_arch = "nvptx64")]
        {
            let _ = &$arguments;
            let address: u64;
            #[allow(unused_unsafe)]
            unsafe {
                ::core::arch::asm!(
                    ::core::concat!("// cuda_std argument\n{{ .reg .b64 p; mov.b64 p, ", ::core::stringify!($kernel), "_param_0; cvta.param.u64 {}, p; }}"),
                    out(reg64) address, options(pure, nomem, nostack, preserves_flags)
                );
            }
            $crate::tensor::of(&$arguments, address)
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            &raw const $arguments
        }
    }};
}

/// An address with the type of what lies there.
#[cfg(target_arch = "nvptx64")]
#[doc(hidden)]
#[inline(always)]
pub fn of<T>(_: &T, address: u64) -> *const T {
    address as *const T
}
