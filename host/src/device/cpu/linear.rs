//! Weight matrices, and their products tile by tile.

use super::activations::{Activations, TILED_FROM};
use super::arena::{Arena, Part};
use super::float::{self, FloatRows};
use super::gemm::{self, ROWS, Tile};
use super::interleaved;
use super::pool::{Parts, Pool};
use super::quant::{self, Kernels};
use super::simd::Level;
use crate::error::{Error, Result};
use gguf::{GgmlType, Gguf};
use std::ops::Range;
use std::sync::Arc;

/// A matrix in the mapped file, as it lies there, and maybe a copy with its rows side by side.
pub struct Weight {
    file: Arc<Gguf>,
    name: String,
    ty: GgmlType,
    /// Row of the tensor that is the matrix's first.
    first: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    row_bytes: usize,
    /// `None` for plain types.
    kernels: Option<Kernels>,
    /// Tiles of [`ROWS`] rows as [`interleaved`] has them.
    tiles: Option<Part>,
}

/// Whether there are products with weights of this type.
pub fn multiplies(ty: GgmlType) -> bool {
    let plain = matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
    plain || quant::kernels(ty).is_some()
}

impl Weight {
    /// # Errors
    /// A type that has no products here.
    pub(super) fn new(
        tensor: gguf::Tensor<'_>,
        rows: Range<usize>,
        file: &Arc<Gguf>,
    ) -> Result<Weight> {
        let kernels = quant::kernels(tensor.ty());
        if !multiplies(tensor.ty()) {
            let what = format!(
                "tensor {} has type {}, which the CPU cannot multiply",
                tensor.name(),
                tensor.ty()
            );
            return Err(Error::Model {
                file: tensor.path().to_owned(),
                what,
            });
        }
        // The sizes are those of data in memory.
        Ok(Weight {
            file: Arc::clone(file),
            name: tensor.name().to_owned(),
            ty: tensor.ty(),
            first: rows.start,
            rows: rows.len(),
            cols: tensor.row_len() as usize,
            row_bytes: tensor.row_bytes() as usize,
            kernels,
            tiles: None,
        })
    }

    /// Brings the file's pages in now rather than in the first pass.
    pub(super) fn touch(&self, pool: &mut Pool) -> Result<()> {
        const PAGE: usize = 4096;
        let data = self.view(true)?.data;
        pool.for_ranges(data.len().div_ceil(PAGE), 256, |_, range| {
            for page in range {
                std::hint::black_box(data[page * PAGE]);
            }
        });
        Ok(())
    }

    /// Copies the matrix with its rows side by side, if its type and the processor have products for
    /// that. Returns whether they do: then only [`Weight::row`] and exact products read the file.
    ///
    /// # Errors
    /// The system has no memory for the copy.
    pub(super) fn interleave(
        &mut self,
        level: Level,
        pool: &mut Pool,
        scratch: &mut [Scratch],
        arena: &mut Arena,
    ) -> Result<bool> {
        let Some(kernels) = self.kernels.and_then(|kernels| kernels.interleaved) else {
            return Ok(false);
        };
        if !interleaved::used_at(level) {
            return Ok(false);
        }
        let view = self.view(false)?;
        let bytes = ROWS * self.row_bytes;
        let len = view.tiles() * bytes;
        let mut tiles = arena.take(len).map_err(|source| Error::Device {
            device: "cpu".to_owned(),
            what: format!(
                "no {len} bytes for a copy of tensor {}: {source}",
                self.name
            ),
        })?;
        let (scratch, out) = (Parts::new(scratch), Parts::new(tiles.bytes_mut()));
        pool.for_ranges(view.tiles(), 4, |thread, range| {
            // SAFETY: one thread has one number.
            let scratch = unsafe { &mut scratch.get(thread..thread + 1)[0] };
            for tile in range {
                let rows = view.tile_rows(tile);
                let data = &view.data[rows.start * self.row_bytes..rows.end * self.row_bytes];
                // SAFETY: a tile is written by one thread.
                let out = unsafe { out.get(tile * bytes..(tile + 1) * bytes) };
                (kernels.pack)(level, data, self.row_bytes, &mut scratch.tile, out);
            }
        });
        self.tiles = Some(tiles);
        self.file.release(&self.file.require(&self.name)?);
        Ok(true)
    }

    /// Whether products read a copy; see [`Weight::interleave`].
    #[cfg(test)]
    pub(super) fn is_copied(&self) -> bool {
        self.tiles.is_some()
    }

    /// Writes a row as f32.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let tensor = self.file.require(&self.name)?;
        Ok(tensor.dequantize_row((self.first + row) as u64, out)?)
    }

    /// The matrix, ready to be multiplied.
    pub(super) fn view(&self, exact: bool) -> Result<View<'_>> {
        let data = self.file.require(&self.name)?.data();
        Ok(View {
            weight: self,
            data: &data[self.first * self.row_bytes..(self.first + self.rows) * self.row_bytes],
            tiles: self.tiles.as_ref().map(Part::bytes),
            rows: self.rows,
            quantised: !exact && self.kernels.is_some(),
        })
    }
}

/// A [`Weight`] and its data.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    weight: &'a Weight,
    data: &'a [u8],
    /// Its copy with rows side by side.
    tiles: Option<&'a [u8]>,
    rows: usize,
    /// Activations are taken in 15 bits.
    quantised: bool,
}

/// Activations in the forms that an operation's weights take.
#[derive(Default)]
pub(super) struct Input {
    quantised: Activations,
    float: FloatRows,
}

impl Input {
    /// Takes `rows` rows of `cols` elements, which `fill` gives, for `weights`.
    pub fn fill<'x>(
        &mut self,
        level: Level,
        pool: &mut Pool,
        (rows, cols): (usize, usize),
        weights: &[View<'_>],
        fill: impl Fn(usize, &mut [f32]) -> Option<&'x [f32]> + Sync,
    ) {
        for view in weights {
            assert_eq!(view.weight.cols, cols, "columns of {}", view.weight.name);
        }
        if weights.iter().any(|w| w.quantised) {
            let tiled = rows >= TILED_FROM;
            self.quantised
                .quantize(level, pool, rows, cols, tiled, &fill);
        }
        if weights.iter().any(|w| !w.quantised) {
            self.float.fill(pool, rows, cols, &fill);
        }
    }
}

/// What a thread needs while it multiplies.
#[derive(Default)]
pub(super) struct Scratch {
    tile: Tile,
    float: Vec<f32>,
    /// Products: a row of 16 for each row of activations.
    pub out: Vec<[f32; ROWS]>,
    pub second: Vec<[f32; ROWS]>,
}

impl View<'_> {
    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.weight.cols
    }

    /// These rows alone.
    pub fn part(&self, rows: Range<usize>) -> Self {
        let row_bytes = self.weight.row_bytes;
        // A tile that begins before them has them in other lanes.
        let tiles = self.tiles.filter(|_| rows.start.is_multiple_of(ROWS));
        View {
            data: &self.data[rows.start * row_bytes..rows.end * row_bytes],
            tiles: tiles.map(|tiles| &tiles[rows.start * row_bytes..]),
            rows: rows.len(),
            ..*self
        }
    }

    /// Tiles of [`ROWS`] rows.
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// The rows of tile `tile`.
    pub fn tile_rows(&self, tile: usize) -> Range<usize> {
        tile * ROWS..(tile * ROWS + ROWS).min(self.rows)
    }

    /// Multiplies tile `tile` by the `n` rows of `input`; `scratch.out[row]` are the products, of
    /// which those past the matrix's last row mean nothing.
    pub fn multiply(
        &self,
        level: Level,
        tile: usize,
        input: &Input,
        n: usize,
        scratch: &mut Scratch,
    ) {
        let rows = self.tile_rows(tile);
        let row_bytes = self.weight.row_bytes;
        let data = &self.data[rows.start * row_bytes..rows.end * row_bytes];
        scratch.out.resize(n, [0.0; ROWS]);
        if !self.quantised {
            let Scratch {
                float: tile, out, ..
            } = scratch;
            let (ty, cols) = (self.weight.ty, self.weight.cols);
            float::unpack(
                level,
                ty,
                self.weight.kernels.as_ref(),
                data,
                row_bytes,
                cols,
                tile,
            );
            assert_eq!(input.float.rows, n);
            float::multiply(level, tile, &input.float.data, input.float.stride, out);
            return;
        }
        let Some(kernels) = self.weight.kernels else {
            return;
        };
        if let (Some(tiles), Some(kernels)) = (self.tiles, kernels.interleaved) {
            let bytes = ROWS * row_bytes;
            let data = &tiles[tile * bytes..(tile + 1) * bytes];
            match input.quantised.tiled() {
                Some(x) => {
                    (kernels.unpack)(level, data, &mut scratch.tile);
                    gemm::multiply(level, &scratch.tile, &x, &mut scratch.out);
                }
                None => {
                    assert_eq!(input.quantised.rows(), n);
                    for (row, out) in scratch.out.iter_mut().enumerate() {
                        (kernels.dot)(level, data, &input.quantised.row(row), out);
                    }
                }
            }
            return;
        }
        match input.quantised.tiled() {
            Some(x) => {
                (kernels.unpack)(level, data, row_bytes, &mut scratch.tile);
                gemm::multiply(level, &scratch.tile, &x, &mut scratch.out);
            }
            None => {
                assert_eq!(input.quantised.rows(), n);
                for (row, out) in scratch.out.iter_mut().enumerate() {
                    let x = input.quantised.row(row);
                    (kernels.dot)(level, data, &x, &mut out[..rows.len()]);
                }
            }
        }
    }
}
