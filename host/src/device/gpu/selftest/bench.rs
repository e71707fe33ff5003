//! The bench that kernels are put on: random data, guarded memory, error measures.

use super::{Address, Allocation, Driver, Outcome};
use crate::device::random_blocks::random_block;
use crate::error::{Error, Result};
use gguf::GgmlType;
use kernels::types::{GROUP, LAYOUTS, Layout, Matrix};

/// A small generator (xorshift*, Vigna 2016): checks need variety, not quality.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    /// Uniform in `-1.0 .. 1.0`.
    pub fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.signed()).collect()
    }
}

/// Bytes around every allocation that no kernel may touch.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xa5;
/// NaN as f32 and as f16.
const POISON: u8 = 0xff;

/// Device memory with guards; call [`Bench::check_guard`] after use.
pub struct Guarded {
    allocation: Allocation,
    bytes: usize,
}

impl Guarded {
    pub fn address(&self) -> Address {
        self.allocation.address + GUARD as Address
    }

    pub fn ptr<T>(&self) -> *mut T {
        self.address() as *mut T
    }
}

pub struct Bench<'a, D: Driver> {
    pub driver: D,
    pub random: Random,
    pub each: &'a mut dyn FnMut(Outcome),
    /// The form of the kernel `decode` that is checked.
    pub decode_kernel: &'static str,
    /// Programs of that kernel so far.
    pub programs: u32,
}

/// A weight matrix on the device, and its values as the reference has them.
pub struct TestMatrix {
    pub matrix: Matrix,
    pub values: Vec<f32>,
    pub rows: usize,
    pub cols: usize,
    pub ty: GgmlType,
}

impl TestMatrix {
    /// The sum of the squares of all terms of `W x`.
    pub fn typical(&self, x: &[f32]) -> f64 {
        self.values
            .chunks(self.cols)
            .flat_map(|row| row.iter().zip(x))
            .map(|(w, x)| (f64::from(*w) * f64::from(*x)).powi(2))
            .sum()
    }

    /// `W x` in f64.
    pub fn times(&self, x: &[f32]) -> Vec<f64> {
        self.values
            .chunks(self.cols)
            .map(|row| {
                row.iter()
                    .zip(x)
                    .map(|(w, x)| f64::from(*w) * f64::from(*x))
                    .sum()
            })
            .collect()
    }
}

/// Normalised mean square error; NaN if any value is.
pub fn nmse(found: &[f32], expected: &[f64]) -> f64 {
    nmse_at_least(found, expected, 0.0)
}

/// The same where the expected values are sums whose terms may cancel: `typical`, the sum of their terms'
/// squares, is what they would measure if none did, and the least that errors are measured by.
pub fn nmse_at_least(found: &[f32], expected: &[f64], typical: f64) -> f64 {
    let error: f64 = found
        .iter()
        .zip(expected)
        .map(|(f, e)| (f64::from(*f) - e).powi(2))
        .sum();
    let scale: f64 = expected.iter().map(|e| e * e).sum();
    if found.len() != expected.len() {
        f64::NAN
    } else {
        error / scale.max(typical).max(1e-30)
    }
}

impl<D: Driver> Bench<'_, D> {
    pub fn report(&mut self, kernel: &'static str, case: String, error: f64, limit: f64) {
        (self.each)(Outcome {
            kernel,
            case,
            error,
            limit,
        });
    }

    /// Poisoned memory between guards.
    pub fn alloc(&mut self, bytes: usize) -> Result<Guarded> {
        let allocation = self.driver.alloc(bytes + 2 * GUARD)?;
        let mut content = vec![POISON; bytes + 2 * GUARD];
        content[..GUARD].fill(GUARD_BYTE);
        content[GUARD + bytes..].fill(GUARD_BYTE);
        self.driver.write(allocation.address, &content)?;
        Ok(Guarded { allocation, bytes })
    }

    pub fn upload<T: bytemuck::Pod>(&mut self, values: &[T]) -> Result<Guarded> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let memory = self.alloc(bytes.len())?;
        self.driver.write(memory.address(), bytes)?;
        Ok(memory)
    }

    /// Reads `memory` back, checks its guards, frees it.
    ///
    /// # Errors
    /// A guard that was written over.
    pub fn take<T: bytemuck::Pod>(&mut self, kernel: &str, memory: Guarded) -> Result<Vec<T>> {
        let mut content = vec![0u8; memory.bytes + 2 * GUARD];
        self.driver.read(memory.allocation.address, &mut content)?;
        let (before, rest) = content.split_at(GUARD);
        let (inside, after) = rest.split_at(memory.bytes);
        if before.iter().chain(after).any(|b| *b != GUARD_BYTE) {
            return Err(Error::Device {
                device: self.driver.info().name.clone(),
                what: format!("kernel {kernel} wrote outside its {} bytes", memory.bytes),
            });
        }
        let mut values = vec![T::zeroed(); inside.len() / size_of::<T>()];
        bytemuck::cast_slice_mut::<T, u8>(&mut values).copy_from_slice(inside);
        self.driver.free(memory.allocation);
        Ok(values)
    }

    /// A random matrix of type `ty`, repacked on the device by the kernel for that.
    pub fn matrix(&mut self, ty: GgmlType, rows: usize, cols: usize) -> Result<TestMatrix> {
        let layout = layout(ty);
        let per_row = cols / layout.block;
        let mut file = Vec::with_capacity(rows * per_row * layout.block_bytes);
        for _ in 0..rows * per_row {
            random_block(ty, &mut || self.random.next(), &mut file);
        }
        let mut values = vec![0.0; rows * cols];
        gguf::dequantize(ty, &file, &mut values)?;
        let matrix = self.repack(ty, &file, rows, cols)?;
        Ok(TestMatrix {
            matrix,
            values,
            rows,
            cols,
            ty,
        })
    }

    /// Repacks in two launches, the second from the middle of the matrix, as the loader slices it.
    fn repack(&mut self, ty: GgmlType, file: &[u8], rows: usize, cols: usize) -> Result<Matrix> {
        let layout = layout(ty);
        let padded = cols.next_multiple_of(GROUP);
        let memory = self.alloc(layout.matrix_bytes(rows, padded))?;
        let matrix = layout.matrix(rows, padded, memory.ptr::<u8>());
        let blocks = padded / layout.block.max(GROUP);
        let block_bytes = layout.block_bytes * (layout.block.max(GROUP) / layout.block);
        let row_bytes = file.len() / rows;
        let half = rows / 2;
        for (first, last) in [(0, half), (half, rows)] {
            let n = (last - first) * blocks;
            if n == 0 {
                continue;
            }
            let source = self.upload(&file[first * row_bytes..last * row_bytes])?;
            let args = kernels::types::RepackArgs {
                source: source.ptr::<u8>(),
                matrix,
                first: first as u32,
                rows: (last - first) as u32,
                file_row_bytes: row_bytes as u32,
                blocks: blocks as u32,
                block_bytes: block_bytes as u32,
            };
            self.driver
                .launch("repack_kernel", (n.div_ceil(64) as u32, 1), 64, 0, &args)?;
            self.take::<u8>("repack_kernel", source)?;
        }
        Ok(matrix)
    }
}

pub fn layout(ty: GgmlType) -> Layout {
    match LAYOUTS.iter().find(|l| l.ty == ty as u32) {
        Some(layout) => *layout,
        None => unreachable!("{ty} is not among the kernels' types"),
    }
}

/// Every type that the kernels read.
pub fn types() -> impl Iterator<Item = GgmlType> {
    LAYOUTS.iter().filter_map(|l| GgmlType::from_u32(l.ty))
}
