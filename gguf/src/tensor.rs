//! Views of tensors in mapped files.

use std::path::Path;

use crate::{Block, Error, GgmlType, blocks};

/// A tensor's entry in the header, checked.
#[derive(Debug, Clone)]
pub(crate) struct TensorInfo {
    pub(crate) name: String,
    /// 1 to 4.
    pub(crate) n_dims: u32,
    pub(crate) dims: [u64; 4],
    pub(crate) ty: GgmlType,
    pub(crate) elements: u64,
    /// Index of the file that holds the data.
    pub(crate) part: usize,
    /// Offset of the data from the start of that file.
    pub(crate) start: u64,
    /// Size of the data.
    pub(crate) bytes: u64,
}

/// A tensor: a view into the mapped file, free to copy.
///
/// The data is a row-major array of [`rows`](Tensor::rows) rows of
/// [`row_len`](Tensor::row_len) elements; a row is a whole number of blocks.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    pub(crate) info: &'a TensorInfo,
    pub(crate) data: &'a [u8],
    pub(crate) path: &'a Path,
}

impl<'a> Tensor<'a> {
    /// The tensor's name.
    pub fn name(&self) -> &'a str {
        &self.info.name
    }

    /// One to four sizes, innermost first, none of them 0.
    pub fn dims(&self) -> &'a [u64] {
        &self.info.dims[..self.info.n_dims as usize]
    }

    /// Elements in a row: `dims()[0]`, a multiple of the type's block length.
    pub fn row_len(&self) -> u64 {
        self.info.dims[0]
    }

    /// Number of rows: the product of all dims but the first.
    pub fn rows(&self) -> u64 {
        self.info.elements / self.info.dims[0]
    }

    /// The type of the data.
    pub fn ty(&self) -> GgmlType {
        self.info.ty
    }

    /// Number of elements: the product of the dims.
    pub fn elements(&self) -> u64 {
        self.info.elements
    }

    /// The data, as it lies in the file.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Bytes in a row.
    pub fn row_bytes(&self) -> u64 {
        self.row_len() / self.ty().block_len() as u64 * self.ty().block_bytes() as u64
    }

    /// The file (of a split model, the part) that holds the data.
    pub fn path(&self) -> &'a Path {
        self.path
    }

    /// Offset of the data from the start of [`path`](Tensor::path), in bytes.
    pub fn file_offset(&self) -> u64 {
        self.info.start
    }

    /// The data as blocks of type `B`.
    ///
    /// # Errors
    /// The tensor is of another type.
    pub fn blocks<B: Block>(&self) -> Result<&'a [B], Error> {
        if self.ty() != B::TYPE {
            return Err(self.error(format!("has type {}, expected {}", self.ty(), B::TYPE)));
        }
        bytemuck::try_cast_slice(self.data)
            .map_err(|e| self.error(format!("its data are no {} blocks: {e}", B::TYPE)))
    }

    /// Writes elements `offset..offset + out.len()` of the flat array as f32. `offset` may lie
    /// inside a block.
    ///
    /// # Errors
    /// The range ends past the last element, or the type has no dequantisation.
    pub fn dequantize_into(&self, offset: u64, out: &mut [f32]) -> Result<(), Error> {
        let end = offset.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > self.elements()) {
            return Err(self.error(format!(
                "has {} elements, asked for {} from {offset}",
                self.elements(),
                out.len()
            )));
        }
        let ty = self.ty();
        // Below the tensor's element count, which its bytes in memory back.
        let mut block = (offset / ty.block_len() as u64) as usize;
        let skip = (offset % ty.block_len() as u64) as usize;
        let mut out = out;
        let mut scratch = [0.0; blocks::MAX_LEN];
        let scratch = &mut scratch[..ty.block_len().min(blocks::MAX_LEN)];

        if skip > 0 {
            let (head, rest) = out.split_at_mut(out.len().min(ty.block_len() - skip));
            self.dequantize_blocks(block, scratch)?;
            head.copy_from_slice(&scratch[skip..skip + head.len()]);
            out = rest;
            block += 1;
        }
        let whole = out.len() / ty.block_len();
        let (body, tail) = out.split_at_mut(whole * ty.block_len());
        self.dequantize_blocks(block, body)?;
        if !tail.is_empty() {
            self.dequantize_blocks(block + whole, scratch)?;
            tail.copy_from_slice(&scratch[..tail.len()]);
        }
        Ok(())
    }

    /// Writes row `row` as f32; `out` must have [`row_len`](Tensor::row_len) elements.
    ///
    /// # Errors
    /// There is no such row, `out` has another length, or the type has no dequantisation.
    pub fn dequantize_row(&self, row: u64, out: &mut [f32]) -> Result<(), Error> {
        if row >= self.rows() || out.len() as u64 != self.row_len() {
            return Err(self.error(format!(
                "has {} rows of {} elements, asked for row {row} in a buffer of {}",
                self.rows(),
                self.row_len(),
                out.len()
            )));
        }
        self.dequantize_into(row * self.row_len(), out)
    }

    /// Fills `out`, a whole number of blocks, from block `first` on.
    fn dequantize_blocks(&self, first: usize, out: &mut [f32]) -> Result<(), Error> {
        let size = self.ty().block_bytes();
        let start = first * size;
        let end = start + out.len() / self.ty().block_len() * size;
        match crate::dequantize(self.ty(), &self.data[start..end], out) {
            Err(e @ Error::UnsupportedType { .. }) => Err(self.error(e.to_string())),
            other => other,
        }
    }

    fn error(&self, detail: String) -> Error {
        Error::Tensor {
            path: self.path.to_owned(),
            tensor: self.name().to_owned(),
            detail,
        }
    }
}

impl std::fmt::Debug for Tensor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Tensor({:?} {} {:?})",
            self.name(),
            self.ty(),
            self.dims()
        )
    }
}
