//! Writes GGUF files: the header from a list, then the tensors' data as a stream.

use std::collections::HashSet;
use std::io::{self, Write};

use crate::error::quote;
use crate::value::write_string;
use crate::{DEFAULT_ALIGNMENT, Error, GgmlType, Value};

/// The header of a file to be written.
///
/// Metadata and tensors are announced first; [`Writer::begin`] then writes the header and returns a
/// [`Payload`], which takes the tensors' data in the same order. Nothing is held in memory but the
/// header.
///
/// ```
/// use gguf::{GgmlType, Writer};
/// let mut writer = Writer::new();
/// writer.metadata("general.architecture", "llama");
/// writer.tensor("output_norm.weight", &[4], GgmlType::F32)?;
/// let mut payload = writer.begin(Vec::new())?;
/// payload.write(&[0; 16])?;
/// let file = payload.finish()?;
/// assert_eq!(&file[..4], b"GGUF");
/// # Ok::<(), gguf::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Writer {
    entries: Vec<(String, Value)>,
    tensors: Vec<(String, Vec<u64>, GgmlType, u64)>,
    alignment: u64,
}

impl Default for Writer {
    fn default() -> Self {
        Writer::new()
    }
}

impl Writer {
    /// A file of version 3 with the format's usual alignment of 32.
    pub fn new() -> Writer {
        Writer {
            entries: Vec::new(),
            tensors: Vec::new(),
            alignment: DEFAULT_ALIGNMENT,
        }
    }

    /// Sets the alignment of the tensors' data, in bytes, and writes it to the metadata.
    ///
    /// # Errors
    /// It is no power of two.
    pub fn alignment(&mut self, alignment: u32) -> Result<&mut Writer, Error> {
        if !alignment.is_power_of_two() {
            return Err(refuse(format!("alignment {alignment} is no power of two")));
        }
        self.alignment = alignment.into();
        Ok(self.metadata("general.alignment", alignment))
    }

    /// Adds a pair, or replaces the value of a key that is there. `general.alignment` is set by
    /// [`Writer::alignment`].
    pub fn metadata(&mut self, key: impl Into<String>, value: impl Into<Value>) -> &mut Writer {
        let (key, value) = (key.into(), value.into());
        match self.entries.iter_mut().find(|(k, _)| *k == key) {
            Some((_, old)) => *old = value,
            None => self.entries.push((key, value)),
        }
        self
    }

    /// Announces a tensor: one to four dims, innermost first.
    ///
    /// # Errors
    /// The dims do not hold whole blocks of the type, or are not of the format.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        dims: &[u64],
        ty: GgmlType,
    ) -> Result<&mut Writer, Error> {
        let name = name.into();
        let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let whole = dims
            .first()
            .is_some_and(|d| d.is_multiple_of(ty.block_len() as u64));
        let bytes = elements.and_then(|n| ty.bytes_for(n)).filter(|&n| n > 0);
        match bytes {
            Some(bytes) if whole && dims.len() <= 4 => {
                self.tensors.push((name, dims.to_vec(), ty, bytes));
                Ok(self)
            }
            _ => Err(refuse(format!(
                "tensor {} of type {ty} cannot have dims {dims:?}",
                quote(&name)
            ))),
        }
    }

    /// Writes the header and returns what takes the data.
    ///
    /// # Errors
    /// A tensor's name occurs twice, or `out` fails.
    pub fn begin<W: Write>(self, mut out: W) -> Result<Payload<W>, Error> {
        let mut head = b"GGUF".to_vec();
        head.extend_from_slice(&3u32.to_le_bytes());
        head.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        head.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            write_string(key.as_bytes(), &mut head);
            head.extend_from_slice(&value.type_id().to_le_bytes());
            value.write(&mut head);
        }
        let mut names = HashSet::new();
        let mut offset = 0u64;
        for (name, dims, ty, bytes) in &self.tensors {
            if !names.insert(name) {
                return Err(refuse(format!("tensor name {} occurs twice", quote(name))));
            }
            write_string(name.as_bytes(), &mut head);
            head.extend_from_slice(&(dims.len() as u32).to_le_bytes());
            dims.iter()
                .for_each(|d| head.extend_from_slice(&d.to_le_bytes()));
            head.extend_from_slice(&(*ty as u32).to_le_bytes());
            head.extend_from_slice(&offset.to_le_bytes());
            offset = offset
                .checked_add(*bytes)
                .and_then(|end| end.checked_next_multiple_of(self.alignment))
                .ok_or_else(|| refuse("the tensors take more than 2^64 bytes".into()))?;
        }
        head.resize(head.len().next_multiple_of(self.alignment as usize), 0);
        out.write_all(&head).map_err(failed)?;
        Ok(Payload {
            out,
            sizes: self.tensors.iter().map(|t| t.3).collect(),
            current: 0,
            written: 0,
            alignment: self.alignment,
        })
    }
}

/// Takes the data of the announced tensors, in their order, in pieces of any size.
#[derive(Debug)]
pub struct Payload<W> {
    out: W,
    sizes: Vec<u64>,
    /// The tensor that the next byte belongs to.
    current: usize,
    /// Bytes of it that are written.
    written: u64,
    alignment: u64,
}

impl<W: Write> Payload<W> {
    /// Appends data: the rest of a tensor, a part of it, or several. Padding is added where a
    /// tensor ends.
    ///
    /// # Errors
    /// There is more than the tensors take, or the output fails.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let Some(&size) = self.sizes.get(self.current) else {
                return Err(refuse(format!(
                    "{} bytes more than the tensors take",
                    bytes.len()
                )));
            };
            let now = (size - self.written).min(bytes.len() as u64);
            let (piece, rest) = bytes.split_at(now as usize);
            self.out.write_all(piece).map_err(failed)?;
            self.written += now;
            bytes = rest;
            if self.written == size {
                let padding = size.next_multiple_of(self.alignment) - size;
                io::copy(&mut io::Read::take(io::repeat(0), padding), &mut self.out)
                    .map_err(failed)?;
                self.current += 1;
                self.written = 0;
            }
        }
        Ok(())
    }

    /// Flushes and returns the output.
    ///
    /// # Errors
    /// Data is missing, or the output fails.
    pub fn finish(mut self) -> Result<W, Error> {
        if self.current < self.sizes.len() {
            return Err(refuse(format!(
                "tensor {} of {} has {} of {} bytes",
                self.current + 1,
                self.sizes.len(),
                self.written,
                self.sizes[self.current]
            )));
        }
        self.out.flush().map_err(failed)?;
        Ok(self.out)
    }
}

fn refuse(detail: String) -> Error {
    Error::Write { detail }
}

fn failed(e: io::Error) -> Error {
    refuse(e.to_string())
}
