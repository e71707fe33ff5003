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
//! A new type is one file here and one line in [`type_list!`].

use crate::unrolled;
use core::marker::PhantomData;
use cuda_std::half::{Half2, hfma2, hsub2};
use cuda_std::int::prmt;
use cuda_std::memory::{
    ldg_u8_l2, ldg_u16_l2, ldg_u32_l2, ldg_v2_u32_l2, ldg_v4_u32, ldg_v4_u32_here, ldg_v4_u32_l2,
};

mod float;
mod grid;
mod layout;
mod read;
mod write;

pub use float::Sixteen;
pub use layout::{EIGHT, Layout, PAD, Plane, STRIP};
pub(crate) use read::four_weights;

/// An array of 1 to 32 elements (a power of two, or 7), each written out with its index: what goes through a closure and a
/// loop, as with `core::array::from_fn`, may end up in local memory instead of registers.
#[macro_export]
macro_rules! unrolled {
    (1, |$i:ident| $e:expr) => { $crate::unrolled!(@ $i, $e, 0) };
    (2, |$i:ident| $e:expr) => { $crate::unrolled!(@ $i, $e, 0 1) };
    (4, |$i:ident| $e:expr) => { $crate::unrolled!(@ $i, $e, 0 1 2 3) };
    (7, |$i:ident| $e:expr) => { $crate::unrolled!(@ $i, $e, 0 1 2 3 4 5 6) };
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

/// A weight matrix in device memory, in [strips](STRIP) if it is of a quantised type.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// The first row, 16-byte aligned.
    pub base: *const u8,
    pub rows: u32,
    /// Weights per row, padded with zeros to a multiple of 32.
    pub cols: u32,
    /// Bytes from row to row in a whole strip, a multiple of 16; no matter where there is none.
    pub row_bytes: u32,
    /// The same in the strip behind the whole ones, if there is one; of other types that is all of a row.
    pub tail_bytes: u32,
    /// Bytes from eight to eight of rows.
    pub eight_bytes: u32,
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
    tail_bytes: 0,
    eight_bytes: 0,
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

    /// Its layout, unless it is [`NO_MATRIX`].
    fn layout(&self) -> Option<&'static Layout> {
        LAYOUTS.iter().find(|l| l.ty == self.ty)
    }

    /// Bytes of a row's weights.
    pub fn length(&self) -> u32 {
        let layout = self.layout();
        layout.map_or(0, |l| l.row_bytes(self.cols as usize) as u32)
    }

    /// Whole strips of a row.
    pub fn whole_strips(&self) -> u32 {
        let layout = self.layout();
        layout.map_or(0, |l| l.strips(self.cols as usize).0 as u32)
    }

    /// Its columns of `strips` strips from strip `first` on, or of all from there on.
    pub fn columns(&self, first: u32, strips: Option<u32>) -> Matrix {
        const WIDTH: u32 = (STRIP * GROUP) as u32;
        let before = first * EIGHT as u32 * self.row_bytes;
        let rest = self.cols - first * WIDTH;
        Matrix {
            base: self.base.wrapping_add(before as usize),
            cols: strips.map_or(rest, |strips| strips * WIDTH),
            tail_bytes: if strips.is_some() { 0 } else { self.tail_bytes },
            ..*self
        }
    }

    /// Row `r` of a float type, which lies in one piece.
    #[inline(always)]
    fn start(&self, r: usize) -> *const u8 {
        self.base.wrapping_add(r * self.tail_bytes as usize)
    }

    /// Where tile `tile` of row `r` begins, in a matrix of type `layout`.
    #[inline(always)]
    pub fn tile_at(&self, layout: &Layout, r: usize, tile: usize) -> *const u8 {
        if !layout.quantised {
            return self.start(r).wrapping_add(tile * layout.tile_bytes(TILE));
        }
        let (eight, within) = (r / EIGHT, r % EIGHT);
        let (strip, tile) = (tile / STRIP_TILES, tile % STRIP_TILES);
        let row_bytes = if strip < self.groups() / STRIP {
            self.row_bytes
        } else {
            self.tail_bytes
        };
        let before = eight * self.eight_bytes as usize
            + strip * EIGHT * self.row_bytes as usize
            + within * row_bytes as usize;
        self.base
            .wrapping_add(before + tile * layout.tile_bytes(TILE))
    }

    /// Row `r` of a matrix of type `T`.
    #[inline(always)]
    pub unsafe fn row<T>(&self, r: usize) -> MatrixRow<'_, T> {
        MatrixRow {
            matrix: self,
            r,
            weights: PhantomData,
        }
    }
}

/// Tiles of a strip.
const STRIP_TILES: usize = STRIP / TILE;

/// A row of a matrix of type `T` in global memory. Elements of planes are counted over the row.
pub struct MatrixRow<'m, T> {
    matrix: &'m Matrix,
    r: usize,
    weights: PhantomData<T>,
}

impl<T: Weights> MatrixRow<'_, T> {
    /// Element `index` of plane `plane`.
    #[inline(always)]
    unsafe fn at(&self, plane: usize, index: usize) -> *const u8 {
        let layout = T::LAYOUT;
        let per_tile = layout.tile_elements(plane);
        let (tile, element) = (index / per_tile, index % per_tile);
        let left = self.matrix.groups() - tile * TILE;
        let groups = if left < TILE { left } else { TILE };
        let offset = layout.plane_offset(plane, groups) + element * layout.planes[plane].bytes;
        self.matrix
            .tile_at(&layout, self.r, tile)
            .wrapping_add(offset)
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

/// `d[h] * level + m[h]`, with `h = 0` for a group's first 16 weights and 1 for its last 16.
#[derive(Clone, Copy)]
pub struct Affine {
    pub d: [f32; 2],
    pub m: [f32; 2],
}

impl Affine {
    /// The same scale and offset for both halves.
    #[inline(always)]
    fn uniform(d: f32, m: f32) -> Affine {
        Affine {
            d: [d, d],
            m: [m, m],
        }
    }

    /// `d * (level - offset)`.
    #[inline(always)]
    fn centred(d: [f32; 2], offset: f32) -> Affine {
        Affine {
            d,
            m: [-offset * d[0], -offset * d[1]],
        }
    }
}

/// A type of weights.
pub trait Weights {
    const LAYOUT: Layout;

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

    /// The same, but those of the second half [`RAISED`](Self::RAISED) times as large, where they lie so: a shift less for
    /// each word.
    #[inline(always)]
    fn raised_levels(raw: Self::Raw) -> [u32; 8] {
        Self::levels(raw)
    }
    /// 1, or 16 for nibbles.
    const RAISED: u8 = 1;

    /// The scales of a group; `g` is its number in the row, or in a tile.
    fn affine(raw: Self::Raw, g: usize) -> Affine;

    /// Whether both halves of a group always share their scales.
    const UNIFORM: bool;
}

macro_rules! quantised_weights {
    ($(#[$doc:meta])* $name:ident, $ty:literal, block $block:literal of $bytes:literal, planes [$($per:ident $plane:literal),*],
     uniform $uniform:literal,
     load |$lm:ident, $lg:ident| -> $raw:ty { $load:expr }
     $(levels |$lr:pat_param| $levels:expr,)?
     $(nibbles |$nr:pat_param| $nibbles:expr,)?
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

            $(#[inline(always)]
            fn levels($lr: $raw) -> [u32; 8] {
                $levels
            })?

            $(#[inline(always)]
            fn levels($nr: $raw) -> [u32; 8] {
                read::nibbles($nibbles)
            }

            #[inline(always)]
            fn raised_levels($nr: $raw) -> [u32; 8] {
                read::raised_nibbles($nibbles)
            }
            const RAISED: u8 = 16;)?

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
            unsafe fn repack($s: *const u8, m: &Matrix, r: usize, $rb: usize, _valid: usize) {
                unsafe {
                    let $rm = &m.row::<Self>(r);
                    $repack
                }
            }
        }
    };
}

/// Calls `$then!` with every type: `GGML number => file and Rust type, kind`. Kinds are `float` and `quantised`.
macro_rules! type_list {
    ($then:ident $(, $arg:ident)*) => {
        $then! {
            $(($arg))*
            0 => float32::F32, float;
            1 => float16::F16, float;
            2 => q4_0::Q4_0, quantised;
            3 => q4_1::Q4_1, quantised;
            6 => q5_0::Q5_0, quantised;
            7 => q5_1::Q5_1, quantised;
            8 => q8_0::Q8_0, quantised;
            10 => q2_k::Q2K, quantised;
            11 => q3_k::Q3K, quantised;
            12 => q4_k::Q4K, quantised;
            13 => q5_k::Q5K, quantised;
            14 => q6_k::Q6K, quantised;
            16 => iq2_xxs::Iq2Xxs, quantised;
            17 => iq2_xs::Iq2Xs, quantised;
            18 => iq3_xxs::Iq3Xxs, quantised;
            19 => iq1_s::Iq1S, quantised;
            20 => iq4_nl::Iq4Nl, quantised;
            21 => iq3_s::Iq3S, quantised;
            22 => iq2_s::Iq2S, quantised;
            23 => iq4_xs::Iq4Xs, quantised;
            29 => iq1_m::Iq1M, quantised;
            30 => bfloat16::Bf16, float;
            34 => tq1_0::Tq1_0, quantised;
            35 => tq2_0::Tq2_0, quantised;
            39 => mxfp4::Mxfp4, quantised;
        }
    };
}
pub(crate) use type_list;

/// Passes a list of types on without their files.
macro_rules! without_files {
    (($then:ident) $($ty:literal => $module:ident::$name:ident, $kind:ident;)*) => {
        $then! { $($ty => $name, $kind;)* }
    };
}
pub(crate) use without_files;

/// Calls `$then!` with every type: `GGML number => Rust type, kind`.
macro_rules! for_each_type {
    ($then:ident) => {
        $crate::types::type_list!(without_files, $then);
    };
}
pub(crate) use for_each_type;

// rustfmt does not look into a macro's modules: format these files by name.
macro_rules! files {
    ($($ty:literal => $module:ident::$name:ident, $kind:ident;)*) => {$(
        mod $module;
        pub use $module::$name;
    )*};
}
type_list!(files);

macro_rules! layouts {
    ($($ty:literal => $name:ident, $kind:ident;)*) => {
        /// Every type that kernels can read.
        pub const LAYOUTS: &[Layout] = &[$($name::LAYOUT),*];
        $(const _: () = assert!($name::LAYOUT.ty == $ty);)*

        /// The set of the types of plain floats.
        pub const FLOATS: u32 = 0 $(| if $name::LAYOUT.quantised { 0 } else { type_bit($ty) })*;

        /// A bit for each type, in a set of them; none for what is no type.
        pub const fn type_bit(ty: u32) -> u32 {
            let mut i = 0;
            while i < LAYOUTS.len() {
                if LAYOUTS[i].ty == ty {
                    return 1 << i;
                }
                i += 1;
            }
            0
        }

        /// Whether a type is of plain floats.
        #[inline(always)]
        pub(crate) const fn is_float(ty: u32) -> bool {
            false $(|| (ty == $ty && !$name::LAYOUT.quantised))*
        }
    };
}
for_each_type!(layouts);

macro_rules! by_type {
    ($($ty:literal => $name:ident, $kind:ident;)*) => {
        /// Levels and scales of a group of a quantised type. Types come together here rather than at weights,
        /// which would take four times the registers and, for each type, code of its own.
        #[inline(always)]
        unsafe fn levels(m: &Matrix, r: usize, g: usize) -> ([u32; 8], Affine) {
            unsafe {
                match m.ty {
                    $($ty => by_type!(@$kind levels $name, m, r, g),)*
                    _ => ([0; 8], Affine::uniform(0.0, 0.0)),
                }
            }
        }

        /// The 32 weights of group `g` of row `r`.
        #[inline(always)]
        pub unsafe fn unpack(m: &Matrix, r: usize, g: usize) -> [f32; 32] {
            unsafe {
                if is_float(m.ty) {
                    return match m.ty {
                        $($ty => by_type!(@$kind unpack $name, m, r, g, [0.0; 32]),)*
                        _ => [0.0; 32],
                    };
                }
                let (levels, affine) = levels(m, r, g);
                weights(levels, affine)
            }
        }

        /// The same in f16, two to a word, rounded.
        #[inline(always)]
        pub unsafe fn unpack_f16(m: &Matrix, r: usize, g: usize) -> [u32; 16] {
            unsafe {
                if is_float(m.ty) {
                    return match m.ty {
                        $($ty => by_type!(@$kind unpack_f16 $name, m, r, g, [0; 16]),)*
                        _ => [0; 16],
                    };
                }
                let (levels, affine) = levels(m, r, g);
                weights_f16(levels, affine)
            }
        }

        /// Weights `4 w .. 4 w + 4` of group `g` of row `r`.
        #[inline(always)]
        pub unsafe fn unpack_four(m: &Matrix, r: usize, g: usize, w: usize) -> [f32; 4] {
            unsafe {
                if is_float(m.ty) {
                    return match m.ty {
                        $($ty => by_type!(@$kind unpack_four $name, m, r, g, w, [0.0; 4]),)*
                        _ => [0.0; 4],
                    };
                }
                let (levels, affine) = levels(m, r, g);
                four_weights(levels, affine, w)
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
    (@float levels $name:ident, $($arg:expr),*) => { ([0; 8], Affine::uniform(0.0, 0.0)) };
    (@quantised levels $name:ident, $m:expr, $r:expr, $g:expr) => {{
        let raw = $name::load(&$m.row::<$name>($r), $g);
        ($name::levels(raw), $name::affine(raw, $g))
    }};
    (@float unpack_four $name:ident, $m:expr, $r:expr, $g:expr, $w:expr, $none:expr) => {
        $name::unpack_four($m, $r, $g, $w)
    };
    (@quantised unpack_four $name:ident, $m:expr, $r:expr, $g:expr, $w:expr, $none:expr) => {
        $none
    };
    (@float $unpack:ident $name:ident, $m:expr, $r:expr, $g:expr, $none:expr) => { $name::$unpack($m, $r, $g) };
    (@quantised $unpack:ident $name:ident, $m:expr, $r:expr, $g:expr, $none:expr) => { $none };
}
for_each_type!(by_type);

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
    unsafe fn single(&self, plane: usize, index: usize) -> u8;
}

impl<T: Weights> Planes for MatrixRow<'_, T> {
    #[inline(always)]
    unsafe fn words4(&self, plane: usize, index: usize) -> [u32; 4] {
        unsafe { ldg_v4_u32_l2(self.at(plane, index)) }
    }

    #[inline(always)]
    unsafe fn words2(&self, plane: usize, index: usize) -> [u32; 2] {
        unsafe { ldg_v2_u32_l2(self.at(plane, index)) }
    }

    #[inline(always)]
    unsafe fn word(&self, plane: usize, index: usize) -> u32 {
        unsafe { ldg_u32_l2(self.at(plane, index).cast()) }
    }

    #[inline(always)]
    unsafe fn half_word(&self, plane: usize, index: usize) -> u16 {
        unsafe { ldg_u16_l2(self.at(plane, index).cast()) }
    }

    #[inline(always)]
    unsafe fn single(&self, plane: usize, index: usize) -> u8 {
        unsafe { ldg_u8_l2(self.at(plane, index)) }
    }
}

/// Groups of a block of 256 weights.
const BLOCK_GROUPS: usize = 256 / GROUP;

/// `d * level + m` of a group.
#[inline(always)]
fn weights(levels: [u32; 8], a: Affine) -> [f32; 32] {
    unrolled!(32, |i| a.d[i / 16] * read::byte(&levels, i) as f32
        + a.m[i / 16])
}

/// A group's levels and scales, to become f16.
#[derive(Clone, Copy)]
pub(crate) struct Halves {
    levels: [u32; 8],
    d: [Half2; 2],
    m: [Half2; 2],
}

impl Halves {
    #[inline(always)]
    pub fn of(levels: [u32; 8], a: Affine) -> Halves {
        Halves {
            levels,
            d: unrolled!(2, |h| Half2::from_f32(a.d[h], a.d[h])),
            m: unrolled!(2, |h| Half2::from_f32(a.m[h], a.m[h])),
        }
    }

    /// Weights `2 i` and `2 i + 1`: a byte `q` set into the mantissa of 1024 is the f16 `1024 + q`; subtracting 1024 is
    /// exact, and one fused multiply-add applies the scales.
    #[inline(always)]
    pub fn pair(&self, i: usize) -> u32 {
        let selector = if i % 2 == 0 { 0x4140 } else { 0x4342 };
        let q = prmt(self.levels[i / 2], 0x0000_0064, selector);
        let q = hsub2(Half2(q), Half2(0x6400_6400));
        hfma2(q, self.d[i / 8], self.m[i / 8]).0
    }
}

/// [`weights`] in f16, two to a word.
#[inline(always)]
fn weights_f16(levels: [u32; 8], a: Affine) -> [u32; 16] {
    let halves = Halves::of(levels, a);
    unrolled!(16, |i| halves.pair(i))
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

/// An unaligned little-endian u32.
#[inline(always)]
unsafe fn u32_at(source: *const u8, offset: usize) -> u32 {
    unsafe { u32::from(u16_at(source, offset)) | (u32::from(u16_at(source, offset + 2)) << 16) }
}
