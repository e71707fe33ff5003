//! Weight types: how each lies in device memory, and how it is read.
//!
//! A matrix row is cut into *groups* of 32 weights, and these into *tiles* of 32 groups, the last of which may be
//! smaller. A tile lies in one piece, so that a warp brings it in with few copies; in it every type is stored as up to
//! four *planes*, each holding one part of all groups in order, so that neighbouring threads, one group each, load
//! neighbouring 16-byte words. A type says how to read a group's integer levels ([`Quantised::levels`]) and its
//! scales ([`Quantised::affine`]): a weight is `d * level + m`, with one `(d, m)` for the first 16 weights of a group
//! and one for the last 16. Dot products, unpacking and the tensor-core tiles follow from these two for every
//! type.
//!
//! A new type is one file here and one line in [`for_each_type!`].

use crate::unrolled;
use core::marker::PhantomData;
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

/// Groups in a whole tile.
pub const TILE: usize = 32;

/// A weight matrix in device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// The first row, 16-byte aligned.
    pub base: *const u8,
    pub rows: u32,
    /// Weights per row, padded with zeros to a multiple of 32.
    pub cols: u32,
    /// Bytes from row to row, a multiple of 16.
    pub row_bytes: u32,
    /// Bytes of a whole tile, a multiple of 16.
    pub tile_bytes: u32,
    /// GGML's number of the type.
    pub ty: u32,
    pub unused: u32,
}

/// An absent matrix.
pub const NO_MATRIX: Matrix = Matrix {
    base: core::ptr::null(),
    rows: 0,
    cols: 0,
    row_bytes: 0,
    tile_bytes: 0,
    ty: 0,
    unused: 0,
};

impl Matrix {
    /// Groups in a row.
    #[inline(always)]
    pub fn groups(&self) -> usize {
        self.cols as usize / GROUP
    }

    /// Row `r`.
    #[inline(always)]
    unsafe fn start(&self, r: usize) -> *const u8 {
        unsafe { self.base.add(r * self.row_bytes as usize) }
    }

    /// Row `r` of a matrix of type `T`.
    #[inline(always)]
    pub unsafe fn row<T>(&self, r: usize) -> MatrixRow<T> {
        MatrixRow {
            start: unsafe { self.start(r) },
            groups: self.groups(),
            weights: PhantomData,
        }
    }
}

/// A row of a matrix of type `T` in global memory. Elements of planes are counted over the row.
pub struct MatrixRow<T> {
    start: *const u8,
    groups: usize,
    weights: PhantomData<T>,
}

impl<T: Weights> MatrixRow<T> {
    /// Element `index` of plane `plane`.
    #[inline(always)]
    unsafe fn at(&self, plane: usize, index: usize) -> *const u8 {
        let layout = T::LAYOUT;
        let per_tile = layout.tile_elements(plane);
        let (tile, element) = (index / per_tile, index % per_tile);
        let left = self.groups - tile * TILE;
        let groups = if left < TILE { left } else { TILE };
        let offset = tile * layout.tile_bytes(TILE)
            + layout.plane_offset(plane, groups)
            + element * layout.planes[plane].bytes;
        unsafe { self.start.add(offset) }
    }

    /// Number `index` of the plane's `E`s, elements being one or several of them.
    #[inline(always)]
    unsafe fn part<E>(&self, plane: usize, index: usize) -> *mut E {
        let per_element = T::LAYOUT.planes[plane].bytes / size_of::<E>();
        unsafe {
            self.at(plane, index / per_element)
                .cast_mut()
                .cast::<E>()
                .add(index % per_element)
        }
    }
}

/// A plane of a type's layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plane {
    /// Bytes of an element: 2, 4, 8 or 16; of float types, whose element is a whole group, 64 or 128. Zero for no
    /// plane.
    pub bytes: usize,
    /// Whether an element belongs to a block of the file rather than to a group.
    pub per_block: bool,
}

impl Plane {
    pub const NONE: Plane = Plane::group(0);

    /// An element of so many bytes for each group.
    pub const fn group(bytes: usize) -> Plane {
        Plane {
            bytes,
            per_block: false,
        }
    }

    /// An element of so many bytes for each block of the file.
    pub const fn block(bytes: usize) -> Plane {
        Plane {
            bytes,
            per_block: true,
        }
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

impl Layout {
    /// Elements of plane `plane` in a whole tile.
    pub const fn tile_elements(&self, plane: usize) -> usize {
        self.elements(plane, TILE)
    }

    const fn elements(&self, plane: usize, groups: usize) -> usize {
        if self.planes[plane].per_block {
            groups * GROUP / self.block
        } else {
            groups
        }
    }

    /// Where plane `plane` begins in a tile of so many groups, a multiple of 16; plane 4 is the end.
    #[inline(always)]
    pub const fn plane_offset(&self, plane: usize, groups: usize) -> usize {
        let mut bytes = 0;
        let mut i = 0;
        while i < plane {
            bytes += (self.elements(i, groups) * self.planes[i].bytes).next_multiple_of(16);
            i += 1;
        }
        bytes
    }

    /// Bytes of a tile of so many groups.
    #[inline(always)]
    pub const fn tile_bytes(&self, groups: usize) -> usize {
        self.plane_offset(4, groups)
    }

    /// Bytes of a row of `cols` weights, a multiple of 32.
    pub const fn row_bytes(&self, cols: usize) -> usize {
        let groups = cols / GROUP;
        groups / TILE * self.tile_bytes(TILE) + self.tile_bytes(groups % TILE)
    }

    /// A matrix of this type at `base`, which has room for `rows` times [`Layout::row_bytes`].
    pub const fn matrix(&self, rows: usize, cols: usize, base: *const u8) -> Matrix {
        Matrix {
            base,
            rows: rows as u32,
            cols: cols as u32,
            row_bytes: self.row_bytes(cols) as u32,
            tile_bytes: self.tile_bytes(TILE) as u32,
            ty: self.ty,
            unused: 0,
        }
    }
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

    /// The 32 weights of group `g` of row `r`.
    unsafe fn unpack(m: &Matrix, r: usize, g: usize) -> [f32; 32];

    /// The same in f16, two to a word, rounded.
    unsafe fn unpack_f16(m: &Matrix, r: usize, g: usize) -> [u32; 16];

    /// Writes block `block` of row `r` in the file, read at `source`, into the planes.
    ///
    /// `source` need not be aligned; rows are whole blocks (float types: blocks of 32, and `valid` of them are
    /// there, the rest of a row's last are zeros).
    unsafe fn repack(source: *const u8, m: &Matrix, r: usize, block: usize, valid: usize);
}

/// A type whose weights are small integers with scales.
pub trait Quantised: Weights {
    /// A group as it lies in memory. Loading is apart from unpacking, so that a kernel can load several
    /// groups before it waits for the first.
    type Raw: Copy;

    /// Loads group `g` of what `planes` are of.
    unsafe fn load<P: Planes>(planes: &P, g: usize) -> Self::Raw;

    /// The levels of a group, unsigned bytes in order.
    fn levels(raw: Self::Raw) -> [u32; 8];

    /// The scales of a group; `g` is its number in the row, or in a tile.
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
        pub unsafe fn unpack_f16(m: &Matrix, r: usize, g: usize) -> [u32; 16] {
            unsafe {
                match m.ty {
                    $($ty => $name::unpack_f16(m, r, g),)*
                    _ => [0; 16],
                }
            }
        }

        /// [`Weights::unpack`] of whatever type `m` has.
        #[inline(always)]
        pub unsafe fn unpack(m: &Matrix, r: usize, g: usize) -> [f32; 32] {
            unsafe {
                match m.ty {
                    $($ty => $name::unpack(m, r, g),)*
                    _ => [0.0; 32],
                }
            }
        }

        /// [`Weights::repack`] of whatever type `m` has.
        #[inline(always)]
        pub unsafe fn repack(source: *const u8, m: &Matrix, r: usize, block: usize, valid: usize) {
            unsafe {
                match m.ty {
                    $($ty => $name::repack(source, m, r, block, valid),)*
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
    /// Rows as the file holds them, from row `first` on.
    pub source: *const u8,
    pub matrix: Matrix,
    pub first: u32,
    pub rows: u32,
    /// Bytes of a row in the file.
    pub file_row_bytes: u32,
    /// Blocks of a row (float types: groups of 32).
    pub blocks: u32,
    /// Bytes of a block (float types: of a whole group).
    pub block_bytes: u32,
}

/// Brings blocks from the file's layout into planes, one block per thread.
#[cuda_std::kernel]
pub unsafe fn repack_kernel(a: RepackArgs) {
    let i = cuda_std::thread::index_1d() as u64;
    if i >= u64::from(a.rows) * u64::from(a.blocks) {
        return;
    }
    let (row, block) = (i / u64::from(a.blocks), i % u64::from(a.blocks));
    let offset = row * u64::from(a.file_row_bytes) + block * u64::from(a.block_bytes);
    // A row's last block of a float type may be short.
    let left = (u64::from(a.file_row_bytes) - block * u64::from(a.block_bytes))
        .min(u64::from(a.block_bytes));
    let valid = left as usize * GROUP / a.block_bytes as usize;
    unsafe {
        let source = a.source.add(offset as usize);
        let r = a.first as usize + row as usize;
        repack(source, &a.matrix, r, block as usize, valid);
    }
}

/// Where planes are read: element `index` of a plane, whose size is in the name.
pub trait Planes {
    unsafe fn words4(&self, plane: usize, index: usize) -> [u32; 4];
    unsafe fn words2(&self, plane: usize, index: usize) -> [u32; 2];
    unsafe fn word(&self, plane: usize, index: usize) -> u32;
    unsafe fn half_word(&self, plane: usize, index: usize) -> u16;
}

impl<T: Weights> Planes for MatrixRow<T> {
    #[inline(always)]
    unsafe fn words4(&self, plane: usize, index: usize) -> [u32; 4] {
        unsafe { ldg_v4_u32_here(self.at(plane, index)) }
    }

    #[inline(always)]
    unsafe fn words2(&self, plane: usize, index: usize) -> [u32; 2] {
        unsafe { ldg_v2_u32_here(self.at(plane, index)) }
    }

    #[inline(always)]
    unsafe fn word(&self, plane: usize, index: usize) -> u32 {
        unsafe { ldg_u32_here(self.at(plane, index).cast()) }
    }

    #[inline(always)]
    unsafe fn half_word(&self, plane: usize, index: usize) -> u16 {
        unsafe { ldg_u16_here(self.at(plane, index).cast()) }
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
    pub unsafe fn word<T: Weights>(m: &MatrixRow<T>, plane: usize, index: usize, value: u32) {
        unsafe { m.part::<u32>(plane, index).write(value) }
    }

    #[inline(always)]
    pub unsafe fn half_word<T: Weights>(m: &MatrixRow<T>, plane: usize, index: usize, value: u16) {
        unsafe { m.part::<u16>(plane, index).write(value) }
    }

    /// What [`read::nibbles`] reads.
    #[inline(always)]
    pub unsafe fn nibbles<T: Weights>(m: &MatrixRow<T>, g: usize, level: impl Fn(usize) -> u32) {
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
    pub unsafe fn bits<T: Weights>(
        m: &MatrixRow<T>,
        plane: usize,
        index: usize,
        level: impl Fn(usize) -> u32,
    ) {
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
    pub unsafe fn pairs<T: Weights>(
        m: &MatrixRow<T>,
        plane: usize,
        index: usize,
        level: impl Fn(usize) -> u32,
    ) {
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
unsafe fn unpack_quantised<T: Quantised>(m: &Matrix, r: usize, g: usize) -> [f32; 32] {
    let raw = unsafe { T::load(&m.row::<T>(r), g) };
    let (levels, a) = (T::levels(raw), T::affine(raw, g));
    unrolled!(32, |i| a.d[i / 16] * read::byte(&levels, i) as f32
        + a.m[i / 16])
}

/// [`Weights::unpack_f16`] of a quantised type: a byte `q` set into the mantissa of 1024 is the f16
/// `1024 + q`; subtracting 1024 is exact, and one fused multiply-add applies the scales.
#[inline(always)]
unsafe fn unpack_f16_quantised<T: Quantised>(m: &Matrix, r: usize, g: usize) -> [u32; 16] {
    use cuda_std::half::{Half2, hfma2, hsub2};
    use cuda_std::int::prmt;
    let raw = unsafe { T::load(&m.row::<T>(r), g) };
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
