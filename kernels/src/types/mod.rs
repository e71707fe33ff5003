//! Weight types: how each lies in device memory, and how it is read.
//!
//! A matrix is cut into *groups* of 32 weights along a row. On the device every type is stored as up
//! to four *planes*, each holding one part of all groups in order, so that neighbouring threads, one
//! group each, load neighbouring 16-byte words. A type says how to read a group's integer levels
//! ([`Quantised::levels`]) and its scales ([`Quantised::affine`]): a weight is `d * level + m`, with
//! one `(d, m)` for the first 16 weights of a group and one for the last 16. Dot products, unpacking and
//! the tensor-core tiles follow from these two for every type.
//!
//! A new type is one file here and one line in [`for_each_type!`].

use crate::unrolled;
use cuda_std::memory::{ldg_u16_here, ldg_u32_here, ldg_v2_u32_here, ldg_v4_u32, ldg_v4_u32_here};

mod float;
mod k_quants;
mod legacy;

pub use float::{Bf16, F16, F32, Sixteen, to_f16};
pub use k_quants::{Q2K, Q3K, Q4K, Q5K, Q6K};
pub use legacy::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};

/// An array of 1 to 32 elements (a power of two), each written out with its index: what goes through a closure and a
/// loop, as with `core::array::from_fn`, may end up in local memory instead of registers.
#[macro_export]
macro_rules! unrolled {
    (1, |$i:ident| $e:expr) => { $crate::unrolled!(@ $i, $e, 0) };
    (2, |$i:ident| $e:expr) => { $crate::unrolled!(@ $i, $e, 0 1) };
    (4, |$i:ident| $e:expr) => { $crate::unrolled!(@ $i, $e, 0 1 2 3) };
    (8, |$i:ident| $e:expr) => { $crate::unrolled!(@ $i, $e, 0 1 2 3 4 5 6 7) };
    (16, |$i:ident| $e:expr) => {
        $crate::unrolled!(@ $i, $e, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (32, |$i:ident| $e:expr) => {
        $crate::unrolled!(@ $i, $e, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23
            24 25 26 27 28 29 30 31)
    };
    (@ $i:ident, $e:expr, $($n:literal)*) => {
        [$({
            #[allow(non_upper_case_globals)]
            const $i: usize = $n;
            $e
        }),*]
    };
}

/// Weights that one thread handles at a time.
pub const GROUP: usize = 32;

/// A weight matrix in device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Starts of the planes; unused ones are null.
    pub planes: [*const u8; 4],
    pub rows: u32,
    /// Weights per row, padded with zeros to a multiple of 32.
    pub cols: u32,
    /// GGML's number of the type.
    pub ty: u32,
    /// For each plane a byte, from the lowest on: its [`Plane::code`], zero where there is none.
    pub codes: u32,
}

/// An absent matrix.
pub const NO_MATRIX: Matrix = Matrix {
    planes: [core::ptr::null(); 4],
    rows: 0,
    cols: 0,
    ty: 0,
    codes: 0,
};

impl Matrix {
    #[inline(always)]
    pub fn groups(&self) -> usize {
        self.cols as usize / GROUP
    }
}

impl Layout {
    /// A matrix of this type whose planes are placed by `plane(number, bytes)`; unused planes stay null.
    pub fn matrix(
        &self,
        rows: usize,
        cols: usize,
        mut plane: impl FnMut(usize, usize) -> *const u8,
    ) -> Matrix {
        let blocks_per_row = cols / self.block.max(GROUP);
        let mut matrix = Matrix {
            rows: rows as u32,
            cols: cols as u32,
            ty: self.ty,
            ..NO_MATRIX
        };
        for (i, p) in self.planes.into_iter().enumerate() {
            let bytes = self.block_plane_bytes(i);
            if bytes > 0 {
                matrix.codes |= p.code() << (8 * i);
                matrix.planes[i] = plane(i, bytes * blocks_per_row * rows);
            }
        }
        matrix
    }

    /// Bytes of a block of the file (float types: of a group) in plane `i`.
    pub const fn block_plane_bytes(&self, i: usize) -> usize {
        let groups = if self.block > GROUP {
            self.block / GROUP
        } else {
            1
        };
        self.planes[i].bytes * if self.planes[i].per_block { 1 } else { groups }
    }
}

/// A plane of a type's layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plane {
    /// Bytes of an element: 2, 4, 8 or 16; of float types' groups 64 or 128. Zero for no plane.
    pub bytes: usize,
    /// Whether an element belongs to a block of the file rather than to a group.
    pub per_block: bool,
}

impl Plane {
    pub const NONE: Plane = Plane::group(0);

    pub const fn group(bytes: usize) -> Plane {
        Plane {
            bytes,
            per_block: false,
        }
    }

    pub const fn block(bytes: usize) -> Plane {
        Plane {
            bytes,
            per_block: true,
        }
    }

    /// Set in [`Plane::code`] of elements of blocks.
    pub const PER_BLOCK: u32 = 0x80;

    /// The plane in a byte: its element's size, and [`Plane::PER_BLOCK`].
    pub const fn code(self) -> u32 {
        // A float group of 128 bytes is all that would not fit; float types' sizes are read by nobody.
        let bytes = if self.bytes > 64 { 64 } else { self.bytes };
        bytes as u32 | if self.per_block { Plane::PER_BLOCK } else { 0 }
    }
}

/// What the host must know of a type to place a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// GGML's number of the type.
    pub ty: u32,
    /// Weights per block of the file.
    pub block: usize,
    /// Bytes per block of the file.
    pub block_bytes: usize,
    pub planes: [Plane; 4],
    /// Whether activations may be quantised before a product with it.
    pub quantised: bool,
}

/// `d[h] * level + m[h]`, with `h = 0` for a group's first 16 weights and 1 for its last 16.
#[derive(Clone, Copy)]
pub struct Affine {
    pub d: [f32; 2],
    pub m: [f32; 2],
}

/// A type of weights.
pub trait Weights {
    const LAYOUT: Layout;

    /// The 32 weights of group `g` (counted over the whole matrix).
    unsafe fn unpack(m: &Matrix, g: usize) -> [f32; 32];

    /// The same in f16, two to a word, rounded.
    unsafe fn unpack_f16(m: &Matrix, g: usize) -> [u32; 16];

    /// Writes file block number `block`, read at `source`, into the planes.
    ///
    /// `source` need not be aligned; `block` counts over the whole matrix, whose rows are whole blocks
    /// (float types: blocks of 32, and `valid` of them are there, the rest of a row's last are zeros).
    unsafe fn repack(source: *const u8, m: &Matrix, block: usize, valid: usize);
}

/// A type whose weights are small integers with scales.
pub trait Quantised: Weights {
    /// A group as it lies in memory. Loading is apart from unpacking, so that a kernel can load several
    /// groups before it waits for the first.
    type Raw: Copy;

    /// Loads group `g`.
    unsafe fn load<P: Planes>(planes: &P, g: usize) -> Self::Raw;

    /// The levels of a group, unsigned bytes in order.
    fn levels(raw: Self::Raw) -> [u32; 8];

    /// The scales of a group; `g` is its number.
    fn affine(raw: Self::Raw, g: usize) -> Affine;

    /// Whether both halves of a group always share their scales.
    const UNIFORM: bool;
}

/// Calls `$then!` with every type: `GGML number => Rust type, kind`.
#[macro_export]
macro_rules! for_each_type {
    ($then:ident $(, $arg:tt)*) => {
        $then! {
            $(($arg))*
            0 => F32, float;
            1 => F16, float;
            2 => Q4_0, quantised;
            3 => Q4_1, quantised;
            6 => Q5_0, quantised;
            7 => Q5_1, quantised;
            8 => Q8_0, quantised;
            10 => Q2K, quantised;
            11 => Q3K, quantised;
            12 => Q4K, quantised;
            13 => Q5K, quantised;
            14 => Q6K, quantised;
            30 => Bf16, float;
        }
    };
}

macro_rules! layouts {
    ($($ty:literal => $name:ident, $kind:ident;)*) => {
        /// Every type that kernels can read.
        pub const LAYOUTS: &[Layout] = &[$($name::LAYOUT),*];
        $(const _: () = assert!($name::LAYOUT.ty == $ty);)*
    };
}
for_each_type!(layouts);

macro_rules! unpack_f16_by_type {
    ($($ty:literal => $name:ident, $kind:ident;)*) => {
        /// [`Weights::unpack_f16`] of whatever type `m` has.
        #[inline(always)]
        pub unsafe fn unpack_f16(m: &Matrix, g: usize) -> [u32; 16] {
            unsafe {
                match m.ty {
                    $($ty => $name::unpack_f16(m, g),)*
                    _ => [0; 16],
                }
            }
        }

        /// [`Weights::unpack`] of whatever type `m` has.
        #[inline(always)]
        pub unsafe fn unpack(m: &Matrix, g: usize) -> [f32; 32] {
            unsafe {
                match m.ty {
                    $($ty => $name::unpack(m, g),)*
                    _ => [0.0; 32],
                }
            }
        }

        /// [`Weights::repack`] of whatever type `m` has.
        #[inline(always)]
        pub unsafe fn repack(source: *const u8, m: &Matrix, block: usize, valid: usize) {
            unsafe {
                match m.ty {
                    $($ty => $name::repack(source, m, block, valid),)*
                    _ => {}
                }
            }
        }
    };
}
for_each_type!(unpack_f16_by_type);

/// Arguments of [`repack_kernel`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RepackArgs {
    /// Blocks as the file holds them, from block `first` on.
    pub source: *const u8,
    pub matrix: Matrix,
    pub first: u64,
    pub blocks: u64,
    /// Weights per row in the file (float types pad them to 32).
    pub file_cols: u32,
    /// Bytes per block (float types: per weight).
    pub stride: u32,
}

/// Brings blocks from the file's layout into planes, one block per thread.
#[cuda_std::kernel]
pub unsafe fn repack_kernel(a: RepackArgs) {
    let i = cuda_std::thread::index_1d() as u64;
    if i >= a.blocks {
        return;
    }
    let block = a.first + i;
    unsafe {
        if matches!(a.matrix.ty, 0 | 1 | 30) {
            // Blocks of a float type are groups; a row's last may be short.
            let groups = a.matrix.groups() as u64;
            let (row, group) = (block / groups, block % groups);
            let offset = row * a.file_cols as u64 + group * GROUP as u64;
            let first_row = a.first / groups;
            let valid = (a.file_cols as u64 - group * GROUP as u64).min(GROUP as u64);
            let source = a
                .source
                .add(((offset - first_row * a.file_cols as u64) * a.stride as u64) as usize);
            repack(source, &a.matrix, block as usize, valid as usize);
        } else {
            repack(
                a.source.add((i * a.stride as u64) as usize),
                &a.matrix,
                block as usize,
                GROUP,
            );
        }
    }
}

/// Where the planes of a matrix are read: element `index` of a plane, whose size is in the name.
pub trait Planes {
    unsafe fn words4(&self, plane: usize, index: usize) -> [u32; 4];
    unsafe fn words2(&self, plane: usize, index: usize) -> [u32; 2];
    unsafe fn word(&self, plane: usize, index: usize) -> u32;
    unsafe fn half_word(&self, plane: usize, index: usize) -> u16;
}

/// In global memory.
impl Planes for Matrix {
    #[inline(always)]
    unsafe fn words4(&self, plane: usize, index: usize) -> [u32; 4] {
        unsafe { ldg_v4_u32_here(self.planes[plane].add(index * 16)) }
    }

    #[inline(always)]
    unsafe fn words2(&self, plane: usize, index: usize) -> [u32; 2] {
        unsafe { ldg_v2_u32_here(self.planes[plane].add(index * 8)) }
    }

    #[inline(always)]
    unsafe fn word(&self, plane: usize, index: usize) -> u32 {
        unsafe { ldg_u32_here(self.planes[plane].add(index * 4).cast()) }
    }

    #[inline(always)]
    unsafe fn half_word(&self, plane: usize, index: usize) -> u16 {
        unsafe { ldg_u16_here(self.planes[plane].add(index * 2).cast()) }
    }
}

/// Reads that the types share.
mod read {
    use super::*;

    #[inline(always)]
    pub unsafe fn words4(m: &impl Planes, plane: usize, index: usize) -> [u32; 4] {
        unsafe { m.words4(plane, index) }
    }

    #[inline(always)]
    pub unsafe fn words2(m: &impl Planes, plane: usize, index: usize) -> [u32; 2] {
        unsafe { m.words2(plane, index) }
    }

    #[inline(always)]
    pub unsafe fn word(m: &impl Planes, plane: usize, index: usize) -> u32 {
        unsafe { m.word(plane, index) }
    }

    #[inline(always)]
    pub unsafe fn half_word(m: &impl Planes, plane: usize, index: usize) -> u16 {
        unsafe { m.half_word(plane, index) }
    }

    #[inline(always)]
    pub fn f16(bits: u16) -> f32 {
        cuda_std::half::F16::from_bits(bits).to_f32()
    }

    /// Nibbles of 16 bytes: low nibbles are weights 0..16, high ones 16..32.
    #[inline(always)]
    pub fn nibbles(v: [u32; 4]) -> [u32; 8] {
        unrolled!(8, |w| (v[w % 4] >> (4 * (w / 4))) & 0x0f0f_0f0f)
    }

    /// Bit `8b + w` is one bit of weight `4w + b`.
    #[inline(always)]
    pub fn bits(v: u32) -> [u32; 8] {
        unrolled!(8, |w| (v >> w) & 0x0101_0101)
    }

    /// Two bits of each weight: weight `4w + b` has bits `8b + 2(w % 4)` of word `w / 4`.
    #[inline(always)]
    pub fn pairs(v: [u32; 2]) -> [u32; 8] {
        unrolled!(8, |w| (v[w / 4] >> (2 * (w % 4))) & 0x0303_0303)
    }

    #[inline(always)]
    pub fn byte(words: &[u32; 8], i: usize) -> u32 {
        (words[i / 4] >> (8 * (i % 4))) & 0xff
    }
}

/// Writes of [`Weights::repack`]: each takes `level(i)`, a weight's unsigned level.
mod write {
    use super::*;

    #[inline(always)]
    unsafe fn at<T>(m: &Matrix, plane: usize, index: usize) -> *mut T {
        unsafe { m.planes[plane].cast_mut().cast::<T>().add(index) }
    }

    #[inline(always)]
    pub unsafe fn word(m: &Matrix, plane: usize, index: usize, value: u32) {
        unsafe { at::<u32>(m, plane, index).write(value) }
    }

    #[inline(always)]
    pub unsafe fn half_word(m: &Matrix, plane: usize, index: usize, value: u16) {
        unsafe { at::<u16>(m, plane, index).write(value) }
    }

    /// What [`read::nibbles`] reads.
    #[inline(always)]
    pub unsafe fn nibbles(m: &Matrix, g: usize, level: impl Fn(usize) -> u32) {
        for w in 0..4 {
            let mut v = 0;
            for b in 0..4 {
                let i = 4 * w + b;
                v |= ((level(i) & 15) | ((level(i + 16) & 15) << 4)) << (8 * b);
            }
            unsafe { word(m, 0, g * 4 + w, v) }
        }
    }

    /// What [`read::bits`] reads; `level` gives 0 or 1.
    #[inline(always)]
    pub unsafe fn bits(m: &Matrix, plane: usize, index: usize, level: impl Fn(usize) -> u32) {
        let mut v = 0;
        for w in 0..8 {
            for b in 0..4 {
                v |= (level(4 * w + b) & 1) << (8 * b + w);
            }
        }
        unsafe { word(m, plane, index, v) }
    }

    /// What [`read::pairs`] reads; `level` gives 0 to 3.
    #[inline(always)]
    pub unsafe fn pairs(m: &Matrix, plane: usize, index: usize, level: impl Fn(usize) -> u32) {
        for half in 0..2 {
            let mut v = 0;
            for w in 0..4 {
                for b in 0..4 {
                    v |= (level(16 * half + 4 * w + b) & 3) << (8 * b + 2 * w);
                }
            }
            unsafe { word(m, plane, index * 2 + half, v) }
        }
    }
}

/// [`Weights::unpack`] of a quantised type.
#[inline(always)]
unsafe fn unpack_quantised<T: Quantised>(m: &Matrix, g: usize) -> [f32; 32] {
    let raw = unsafe { T::load::<Matrix>(m, g) };
    let (levels, a) = (T::levels(raw), T::affine(raw, g));
    unrolled!(32, |i| a.d[i / 16] * read::byte(&levels, i) as f32
        + a.m[i / 16])
}

/// [`Weights::unpack_f16`] of a quantised type: a byte `q` set into the mantissa of 1024 is the f16
/// `1024 + q`; subtracting 1024 is exact, and one fused multiply-add applies the scales.
#[inline(always)]
unsafe fn unpack_f16_quantised<T: Quantised>(m: &Matrix, g: usize) -> [u32; 16] {
    use cuda_std::half::{Half2, hfma2, hsub2};
    use cuda_std::int::prmt;
    let raw = unsafe { T::load::<Matrix>(m, g) };
    let (levels, a) = (T::levels(raw), T::affine(raw, g));
    let d = [
        Half2::from_f32(a.d[0], a.d[0]),
        Half2::from_f32(a.d[1], a.d[1]),
    ];
    let c = [
        Half2::from_f32(a.m[0], a.m[0]),
        Half2::from_f32(a.m[1], a.m[1]),
    ];
    unrolled!(16, |i| {
        let selector = if i % 2 == 0 { 0x4140 } else { 0x4342 };
        let q = hsub2(
            Half2(prmt(levels[i / 2], 0x0000_0064, selector)),
            Half2(0x6400_6400),
        );
        hfma2(q, d[i / 8], c[i / 8]).0
    })
}

/// Four consecutive floats at a 16-byte boundary.
#[inline(always)]
pub unsafe fn ldg_v4_f32(p: *const f32) -> [f32; 4] {
    let v = unsafe { ldg_v4_u32(p) };
    let f = f32::from_bits;
    [f(v[0]), f(v[1]), f(v[2]), f(v[3])]
}

/// An unaligned little-endian u16.
#[inline(always)]
unsafe fn u16_at(source: *const u8, offset: usize) -> u16 {
    unsafe { u16::from_le_bytes([*source.add(offset), *source.add(offset + 1)]) }
}
