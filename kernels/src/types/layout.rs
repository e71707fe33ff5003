//! How a type's rows are laid out.

use super::{GROUP, LAYOUTS, Matrix, TILE};

/// Bytes between rows that would else be an even number of 16 bytes apart: see [`Layout::strides`].
pub const PAD: u32 = 16;

/// Rows of a quantised type lie in eights, and of each eight in strips: the first [`STRIP`] groups of all its rows, then the next ones, and
/// so on. A decode step's turn takes a strip of two eights at most, each in one copy.
pub const EIGHT: usize = 8;

/// Groups of a row in a strip.
pub const STRIP: usize = 2 * TILE;

const _: () = {
    let mut i = 0;
    while i < LAYOUTS.len() {
        // Of the fewest groups that a row can end with.
        let groups = LAYOUTS[i].block.div_ceil(GROUP);
        let least = LAYOUTS[i].tile_bytes(groups);
        assert!(least > PAD as usize, "no tile is taken for padding");
        i += 1;
    }
};

/// A plane of a type's layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plane {
    /// Bytes of an element: 1, 2, 4, 8 or 16; of float types, whose element is a whole group, 64 or 128. Zero for no
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

    /// Elements of plane `plane` in so many groups.
    #[inline(always)]
    pub const fn elements(&self, plane: usize, groups: usize) -> usize {
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

    /// Whole strips of a row of `cols` weights, and how many weights of it lie in the last one, which is narrower.
    pub const fn strips(&self, cols: usize) -> (usize, usize) {
        if self.quantised {
            (cols / (STRIP * GROUP), cols % (STRIP * GROUP))
        } else {
            (0, cols)
        }
    }

    /// Bytes from row to row in a strip of `cols` weights: of quantised ones an odd number of 16 bytes, as they lie in a decode step's
    /// shared memory ([`crate::decode`]), so that one copy brings several.
    const fn stride(&self, cols: usize) -> usize {
        let bytes = self.row_bytes(cols);
        if self.quantised {
            bytes | PAD as usize
        } else {
            bytes
        }
    }

    /// Bytes from row to row in the strips of rows of `cols` weights: in a whole one, and in the last one, zero where that is whole.
    pub const fn strides(&self, cols: usize) -> (usize, usize) {
        let (_, rest) = self.strips(cols);
        let tail = if rest > 0 { self.stride(rest) } else { 0 };
        (self.stride(STRIP * GROUP), tail)
    }

    /// Bytes of a matrix.
    pub const fn matrix_bytes(&self, rows: usize, cols: usize) -> usize {
        let (whole, _) = self.strips(cols);
        let (row, tail) = self.strides(cols);
        let rows = if self.quantised {
            rows.next_multiple_of(EIGHT)
        } else {
            rows
        };
        rows * (whole * row + tail)
    }

    /// A matrix of this type at `base`, which has room for [`Layout::matrix_bytes`].
    pub const fn matrix(&self, rows: usize, cols: usize, base: *const u8) -> Matrix {
        let (whole, _) = self.strips(cols);
        let (row, tail) = self.strides(cols);
        Matrix {
            base,
            rows: rows as u32,
            cols: cols as u32,
            row_bytes: if whole > 0 { row } else { 0 } as u32,
            tail_bytes: tail as u32,
            eight_bytes: (EIGHT * (whole * row + tail)) as u32,
            tile_bytes: self.tile_bytes(TILE) as u32,
            ty: self.ty,
            unused: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_of_every_row_has_its_own_bytes() {
        for layout in LAYOUTS.iter() {
            for (rows, groups) in [(1, 8), (19, 40), (8, 64), (9, 152), (16, 256), (3, 280)] {
                let cols = groups * GROUP;
                if !cols.is_multiple_of(layout.block) {
                    continue;
                }
                let matrix = layout.matrix(rows, cols, core::ptr::null());
                let mut spans = std::vec::Vec::new();
                for row in 0..rows {
                    for tile in 0..groups.div_ceil(TILE) {
                        let start = matrix.tile_at(layout, row, tile) as usize;
                        let bytes = layout.tile_bytes(TILE.min(groups - tile * TILE));
                        spans.push((start, start + bytes));
                    }
                }
                spans.sort_unstable();
                let case = (layout.ty, rows, groups);
                assert!(spans.windows(2).all(|two| two[0].1 <= two[1].0), "{case:?}");
                let end = spans.last().map_or(0, |span| span.1);
                assert!(end <= layout.matrix_bytes(rows, cols), "{case:?}");
            }
        }
    }

    #[test]
    fn an_eight_of_a_strip_is_one_run_of_bytes() {
        let layout = LAYOUTS.iter().find(|l| l.quantised).unwrap();
        let matrix = layout.matrix(32, 5 * TILE * GROUP, core::ptr::null());
        assert_eq!(matrix.whole_strips(), 2);
        for (tile, stride) in [
            (0, matrix.row_bytes),
            (2, matrix.row_bytes),
            (4, matrix.tail_bytes),
        ] {
            for row in 8..15 {
                let [a, b] = [row, row + 1].map(|r| matrix.tile_at(layout, r, tile) as usize);
                assert_eq!(b - a, stride as usize, "row {row}, tile {tile}");
            }
        }
        // The same where the columns are cut between strips.
        let rest = matrix.columns(1, None);
        assert_eq!(
            (rest.cols, rest.whole_strips()),
            (3 * (TILE * GROUP) as u32, 1)
        );
        for (r, tile) in [(0, 0), (13, 1), (31, 2)] {
            assert_eq!(
                rest.tile_at(layout, r, tile),
                matrix.tile_at(layout, r, tile + 2)
            );
        }
    }
}
