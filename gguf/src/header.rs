//! Parses and validates the head of one file: everything before the tensor data.

use std::collections::HashSet;
use std::path::Path;

use crate::cursor::{Cursor, Detail};
use crate::error::quote;
use crate::tensor::TensorInfo;
use crate::{DEFAULT_ALIGNMENT, Error, GgmlType, Metadata, Value};

/// The smallest head: magic, version, two counts.
const MIN_BYTES: usize = 24;
/// The longest key that the format allows, in bytes; tensor names are held to it too. (The format
/// asks for 64 in tensor names, which tools for other models than text ones exceed.)
const MAX_NAME: usize = 65535;
/// The most dimensions that a tensor may have.
const MAX_DIMS: u32 = 4;

/// The head of one file, valid as far as that file alone tells.
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) metadata: Metadata,
    /// Of tensor data, in bytes: a power of two.
    pub(crate) alignment: u64,
    /// In file order; every one inside the file, aligned, apart from the others.
    pub(crate) tensors: Vec<TensorInfo>,
}

impl Header {
    /// Parses the head of the whole file `bytes`; `part` is stored in the tensors.
    pub(crate) fn parse(path: &Path, bytes: &[u8], part: usize) -> Result<Header, Error> {
        let malformed = |detail| Error::Malformed {
            path: path.to_owned(),
            detail,
        };
        let mut cursor = Cursor::new(bytes);
        let version = magic_and_version(&mut cursor, bytes).map_err(malformed)?;
        let n_tensors = cursor
            .u64(&|| "the tensor count".into())
            .map_err(malformed)?;
        // A pair takes at least a length, a type and a byte.
        let n_pairs = cursor
            .count(13, &|| "the metadata count".into())
            .map_err(malformed)?;

        let mut entries = Vec::new();
        for i in 0..n_pairs {
            entries.push(pair(i, &mut cursor).map_err(malformed)?);
        }
        let metadata = Metadata::new(path, entries)?;
        let alignment = alignment(&metadata)?;

        // A tensor's entry takes at least a name's length, the number of dims, a type, an offset.
        let limit = (cursor.remaining() / 24) as u64;
        if n_tensors > limit {
            return Err(malformed(format!(
                "the tensor count is {n_tensors}, but the {} bytes after the metadata hold at most {limit}",
                cursor.remaining()
            )));
        }
        let mut tensors = Vec::new();
        let mut names = HashSet::new();
        for i in 0..n_tensors {
            let info = tensor_info(i, &mut cursor, part).map_err(malformed)?;
            if !names.insert(info.name.clone()) {
                return Err(malformed(format!(
                    "tensor name {} occurs twice",
                    quote(&info.name)
                )));
            }
            tensors.push(info);
        }
        place(&mut tensors, cursor.pos(), bytes.len(), alignment).map_err(malformed)?;
        Ok(Header {
            version,
            metadata,
            alignment,
            tensors,
        })
    }
}

fn magic_and_version(cursor: &mut Cursor<'_>, bytes: &[u8]) -> Result<u32, Detail> {
    if bytes.is_empty() {
        return Err("the file is empty, not a GGUF file".into());
    }
    let magic = &bytes[..bytes.len().min(4)];
    if magic != b"GGUF" {
        let hint = match magic {
            b"tjgg" | b"fmgg" | b"lmgg" => " (an older ggml format: convert the model to GGUF)",
            b"FUGG" => " (big-endian, which is not supported)",
            _ => "",
        };
        return Err(format!(
            "not a GGUF file: it begins with \"{}\", expected \"GGUF\"{hint}",
            magic.escape_ascii()
        ));
    }
    if bytes.len() < MIN_BYTES {
        return Err(format!(
            "the file is cut off: it has {} bytes, a GGUF header at least {MIN_BYTES}",
            bytes.len()
        ));
    }
    cursor.take(4, &|| "the magic".into())?;
    let version = cursor.u32(&|| "the version".into())?;
    match version {
        2 | 3 => Ok(version),
        v if matches!(v.swap_bytes(), 1..=3) => Err(format!(
            "GGUF version {} in big-endian byte order: only little-endian files are supported",
            v.swap_bytes()
        )),
        1 => Err("GGUF version 1 is not supported, only 2 and 3: convert the model again".into()),
        v => Err(format!("GGUF version {v} is not supported, only 2 and 3")),
    }
}

fn pair(i: usize, cursor: &mut Cursor<'_>) -> Result<(String, Value), Detail> {
    let key = name(cursor, &|| format!("metadata key {i}"))?;
    let what = || format!("metadata key {}", quote(&key));
    let id = cursor.u32(&|| format!("the value type of {}", what()))?;
    let value = Value::read(id, cursor, &what)?;
    Ok((key, value))
}

/// A key or a tensor's name: valid UTF-8, not empty, not too long.
fn name(cursor: &mut Cursor<'_>, what: &dyn Fn() -> String) -> Result<String, Detail> {
    let at = cursor.pos();
    let bytes = cursor.string(what)?;
    if bytes.is_empty() {
        return Err(format!("{} (at offset {at}) is empty", what()));
    }
    if bytes.len() > MAX_NAME {
        return Err(format!(
            "{} has {} bytes, at most {MAX_NAME} are allowed",
            what(),
            bytes.len()
        ));
    }
    match std::str::from_utf8(bytes) {
        Ok(s) => Ok(s.to_owned()),
        Err(_) => Err(format!(
            "{} is not valid UTF-8: {}",
            what(),
            quote(&bytes.escape_ascii().to_string())
        )),
    }
}

fn alignment(metadata: &Metadata) -> Result<u64, Error> {
    const KEY: &str = "general.alignment";
    let alignment = metadata.opt_u32(KEY)?.map_or(DEFAULT_ALIGNMENT, u64::from);
    if alignment.is_power_of_two() {
        return Ok(alignment);
    }
    Err(Error::Key {
        path: metadata.path().to_owned(),
        key: KEY.into(),
        detail: format!("is {alignment}, expected a power of two"),
    })
}

/// One tensor's entry. `start` is the offset as the file gives it until [`place`] has checked it.
fn tensor_info(i: u64, cursor: &mut Cursor<'_>, part: usize) -> Result<TensorInfo, Detail> {
    let name = name(cursor, &|| format!("the name of tensor {i}"))?;
    let what = || format!("tensor {}", quote(&name));
    let n_dims = cursor.u32(&|| format!("the number of dimensions of {}", what()))?;
    if n_dims > MAX_DIMS {
        return Err(format!(
            "{} has {n_dims} dimensions, at most {MAX_DIMS} are allowed",
            what()
        ));
    }
    let mut dims = [1; MAX_DIMS as usize];
    for (d, dim) in dims.iter_mut().enumerate().take(n_dims as usize) {
        *dim = cursor.u64(&|| format!("dimension {d} of {}", what()))?;
    }
    let id = cursor.u32(&|| format!("the type of {}", what()))?;
    let offset = cursor.u64(&|| format!("the offset of {}", what()))?;

    // A scalar has no dims in the file; give it one, of one element.
    let shape = &dims[..(n_dims as usize).max(1)];
    if let Some(d) = shape.iter().position(|&dim| dim == 0) {
        return Err(format!("{} has 0 elements in dimension {d}", what()));
    }
    let elements = shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim));
    let Some(elements) = elements.filter(|&n| n <= i64::MAX as u64) else {
        return Err(format!(
            "{} has dims {shape:?}: more elements than 2^63-1",
            what()
        ));
    };
    let Some(ty) = GgmlType::from_u32(id) else {
        return Err(format!(
            "{} has type {id}, which is unknown or was removed from the format",
            what()
        ));
    };
    if !shape[0].is_multiple_of(ty.block_len() as u64) {
        return Err(format!(
            "{} has rows of {} elements, no multiple of {ty}'s block length {}",
            what(),
            shape[0],
            ty.block_len()
        ));
    }
    let Some(bytes) = ty.bytes_for(elements) else {
        return Err(format!(
            "{} has dims {shape:?}: its size in bytes exceeds 64 bits",
            what()
        ));
    };
    Ok(TensorInfo {
        n_dims: n_dims.max(1),
        dims,
        ty,
        elements,
        part,
        start: offset,
        bytes,
        name,
    })
}

/// Turns offsets in the data section into offsets in the file, and checks that every tensor lies
/// inside the file, aligned, apart from all others.
fn place(
    tensors: &mut [TensorInfo],
    head: usize,
    file: usize,
    alignment: u64,
) -> Result<(), Detail> {
    let (head, file) = (head as u64, file as u64);
    // `alignment` is below 2^32 and `head` at most the file's size: no overflow.
    let data = head.next_multiple_of(alignment);
    for t in tensors.iter_mut() {
        let offset = t.start;
        if !offset.is_multiple_of(alignment) {
            return Err(format!(
                "tensor {} has offset {offset}, no multiple of the alignment {alignment}",
                quote(&t.name)
            ));
        }
        let end = data
            .checked_add(offset)
            .and_then(|start| start.checked_add(t.bytes));
        if end.is_none_or(|end| end > file) {
            return Err(format!(
                "tensor {} needs {} bytes at offset {offset} of the data section, which has {}: the file is cut off or damaged",
                quote(&t.name),
                t.bytes,
                file.saturating_sub(data)
            ));
        }
        t.start = data + offset;
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|t| t.start);
    for pair in order.windows(2) {
        if pair[0].start + pair[0].bytes > pair[1].start {
            return Err(format!(
                "tensors {} and {} overlap: bytes {} to {} and from {}",
                quote(&pair[0].name),
                quote(&pair[1].name),
                pair[0].start,
                pair[0].start + pair[0].bytes,
                pair[1].start
            ));
        }
    }
    Ok(())
}
