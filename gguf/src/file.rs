//! Opening: map, parse, join the parts of a split model.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap};

use crate::error::quote;
use crate::header::Header;
use crate::split::SplitName;
use crate::tensor::TensorInfo;
use crate::{Error, Metadata, Tensor};

/// An open GGUF file, or all files of a split model: mapped and validated whole.
///
/// The files must not be cut short while they are open: reading a page that is gone ends the
/// process with SIGBUS, as with any mapped file.
pub struct Gguf {
    /// In order; more than one for a split model.
    parts: Vec<Part>,
    /// Index of the part whose path was given to `open`.
    opened: usize,
    version: u32,
    alignment: u64,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
}

struct Part {
    path: PathBuf,
    bytes: Bytes,
}

/// Where a file's bytes are.
enum Bytes {
    /// The map, and the file itself for [`Gguf::read`].
    Mapped(Mmap, File),
    Memory(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map, _) => map,
            Bytes::Memory(vec) => vec,
        }
    }
}

impl Gguf {
    /// Maps and validates a file. Of a split model any part will do: the others are looked for
    /// beside it.
    ///
    /// # Errors
    /// A file cannot be opened, or breaks the format; the error names the field or tensor, the
    /// value and the limit.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf, Error> {
        let path = path.as_ref();
        let (part, header) = load(path, 0, None)?;
        let count = header.metadata.opt_u32("split.count")?.unwrap_or(1);
        if count <= 1 {
            return Gguf::join((part, header), Vec::new(), 0);
        }

        let wrong = |detail| Error::Malformed {
            path: path.to_owned(),
            detail,
        };
        let number = header.metadata.u32("split.no")?.checked_add(1);
        let Some(number) = number.filter(|&n| n <= count) else {
            return Err(wrong(format!(
                "split.no is {}, expected less than split.count {count}",
                header.metadata.u32("split.no")?
            )));
        };
        let name = SplitName::parse(path).filter(|n| n.number == number && n.count == count);
        let Some(name) = name else {
            return Err(wrong(format!(
                "this is part {number} of {count} of a split model, so its name must end in \
                 -{number:05}-of-{count:05}.gguf for the other parts to be found beside it"
            )));
        };
        let mut opened = Some((part, header));
        let mut take = |n: u32| match opened.take_if(|_| n == number) {
            Some((part, mut header)) => {
                header
                    .tensors
                    .iter_mut()
                    .for_each(|t| t.part = n as usize - 1);
                Ok((part, header))
            }
            None => load(&name.part(n), n as usize - 1, Some((n, count))),
        };
        let first = take(1)?;
        let others = (2..=count).map(take).collect::<Result<_, _>>()?;
        Gguf::join(first, others, number as usize - 1)
    }

    /// Validates a file that is in memory, such as a [`crate::Writer`] makes; `path` is what errors
    /// name.
    ///
    /// # Errors
    /// The bytes break the format, or are one part of a split model.
    pub fn from_bytes(path: impl Into<PathBuf>, bytes: Vec<u8>) -> Result<Gguf, Error> {
        let path = path.into();
        let header = Header::parse(&path, &bytes, 0)?;
        let count = header.metadata.opt_u32("split.count")?.unwrap_or(1);
        if count > 1 {
            let detail = format!(
                "this is one of {count} parts of a split model: it must be opened as a file"
            );
            return Err(Error::Malformed { path, detail });
        }
        let bytes = Bytes::Memory(bytes);
        Gguf::join((Part { path, bytes }, header), Vec::new(), 0)
    }

    /// Puts the parts together; the first holds the model's metadata.
    fn join(
        first: (Part, Header),
        others: Vec<(Part, Header)>,
        opened: usize,
    ) -> Result<Gguf, Error> {
        let (part, header) = first;
        let Header {
            version,
            metadata,
            alignment,
            mut tensors,
        } = header;
        let count = others.len() as u32 + 1;
        let mut announced = Vec::from_iter(check_split(&part, &metadata, 0, count)?);
        let mut parts = vec![part];
        for (part, header) in others {
            announced.extend(check_split(
                &part,
                &header.metadata,
                parts.len() as u32,
                count,
            )?);
            tensors.extend(header.tensors);
            parts.push(part);
        }
        let found = tensors.len() as u64;
        if let Some((n, path)) = announced.into_iter().find(|(n, _)| *n != found) {
            return Err(Error::Key {
                path,
                key: "split.tensors.count".into(),
                detail: format!(
                    "is {n}, but the {count} files hold {} tensors",
                    tensors.len()
                ),
            });
        }
        let mut index = HashMap::with_capacity(tensors.len());
        for (i, t) in tensors.iter().enumerate() {
            if let Some(before) = index.insert(t.name.clone(), i) {
                let other = &parts[tensors[before].part].path;
                return Err(Error::Malformed {
                    path: parts[t.part].path.clone(),
                    detail: format!("tensor {} is also in {}", quote(&t.name), other.display()),
                });
            }
        }
        Ok(Gguf {
            parts,
            opened,
            version,
            alignment,
            metadata,
            tensors,
            index,
        })
    }

    /// The path that was given to [`Gguf::open`].
    pub fn path(&self) -> &Path {
        &self.parts[self.opened].path
    }

    /// All files of the model, in order.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.parts.iter().map(|p| p.path.as_path())
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The size of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.bytes.len() as u64).sum()
    }

    /// The alignment of tensor data in the first file, in bytes: a power of two.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// The key-value pairs (of a split model, those of the first file).
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.tensors.iter().map(|info| self.view(info))
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        self.index.get(name).map(|&i| self.view(&self.tensors[i]))
    }

    /// The tensor of that name, which must be there.
    ///
    /// # Errors
    /// It is not; the error names tensor and file.
    pub fn require(&self, name: &str) -> Result<Tensor<'_>, Error> {
        self.tensor(name).ok_or_else(|| Error::MissingTensor {
            path: self.path().to_owned(),
            tensor: name.to_owned(),
        })
    }

    fn view<'a>(&'a self, info: &'a TensorInfo) -> Tensor<'a> {
        let part = &self.parts[info.part];
        // The header's checks put both ends inside the map, so they fit usize.
        let start = info.start as usize;
        Tensor {
            info,
            data: &part.bytes[start..start + info.bytes as usize],
            path: &part.path,
        }
    }

    /// Tells the kernel that the files will be read from front to back: larger read-ahead. A hint;
    /// where it is not understood nothing happens.
    pub fn advise_sequential(&self) {
        for part in &self.parts {
            if let Bytes::Mapped(map, _) = &part.bytes {
                hint(map.advise(Advice::Sequential));
            }
        }
    }

    /// Starts reading a tensor's pages from disk, and returns at once. A hint.
    pub fn will_need(&self, tensor: &Tensor<'_>) {
        hint(self.advise(tensor, Advice::WillNeed));
    }

    /// Reads a tensor's pages from disk and maps them, and returns when they are there: one call
    /// instead of a page fault for every few pages. For a thread that runs ahead of the one that
    /// copies. Where the kernel lacks it (Linux before 5.14), the same as [`Gguf::will_need`].
    pub fn prefault(&self, tensor: &Tensor<'_>) {
        #[cfg(target_os = "linux")]
        if self.advise(tensor, Advice::PopulateRead).is_ok() {
            return;
        }
        self.will_need(tensor);
    }

    /// Gives back the memory of a tensor's mapped pages, for whoever has a copy: what is read again comes from the
    /// page cache, or from disk. A hint.
    pub fn release(&self, tensor: &Tensor<'_>) {
        #[cfg(unix)]
        if let Some(Bytes::Mapped(map, _)) = self.parts.get(tensor.info.part).map(|p| &p.bytes) {
            let (start, len) = (tensor.info.start as usize, tensor.info.bytes as usize);
            // SAFETY: the map is of a file and is never written, so its pages read the same when they are back.
            hint(unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len)
            });
        }
    }

    /// Copies a part of a tensor's data, from byte `offset` on, by reading the file: from a warm page cache
    /// that takes one system call, where reading the map takes a page fault for every few pages.
    ///
    /// # Errors
    /// The part reaches past the tensor's end, or the file cannot be read.
    pub fn read(&self, tensor: &Tensor<'_>, offset: usize, out: &mut [u8]) -> Result<(), Error> {
        let end = offset.saturating_add(out.len());
        let Some(data) = tensor.data.get(offset..end) else {
            return Err(Error::Tensor {
                path: tensor.path.to_owned(),
                tensor: tensor.info.name.clone(),
                detail: format!(
                    "bytes {offset}..{end} were asked for, it has {}",
                    tensor.data.len()
                ),
            });
        };
        #[cfg(unix)]
        if let Some(Bytes::Mapped(_, file)) = self.parts.get(tensor.info.part).map(|p| &p.bytes) {
            use std::os::unix::fs::FileExt;
            let at = tensor.info.start + offset as u64;
            return file.read_exact_at(out, at).map_err(|source| Error::Io {
                path: tensor.path.to_owned(),
                action: format!("read tensor {} of", quote(tensor.name())),
                source,
            });
        }
        out.copy_from_slice(data);
        Ok(())
    }

    fn advise(&self, tensor: &Tensor<'_>, advice: Advice) -> std::io::Result<()> {
        match self.parts.get(tensor.info.part).map(|part| &part.bytes) {
            Some(Bytes::Mapped(map, _)) => map.advise_range(
                advice,
                tensor.info.start as usize,
                tensor.info.bytes as usize,
            ),
            _ => Ok(()),
        }
    }
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf")
            .field("path", &self.path())
            .field("parts", &self.parts.len())
            .field("version", &self.version)
            .field("metadata", &self.metadata.len())
            .field("tensors", &self.tensors.len())
            .finish()
    }
}

/// Checks that a part is number `no` (from 0) of `count`; returns how many tensors it says the whole
/// model has, with its path for the error.
fn check_split(
    part: &Part,
    metadata: &Metadata,
    no: u32,
    count: u32,
) -> Result<Option<(u64, PathBuf)>, Error> {
    if count > 1 {
        for (key, expected) in [("split.no", no), ("split.count", count)] {
            let found = metadata.u32(key)?;
            if found != expected {
                return Err(Error::Key {
                    path: part.path.clone(),
                    key: key.into(),
                    detail: format!("is {found}, expected {expected} by the file's name"),
                });
            }
        }
    }
    let n = metadata.opt_u64("split.tensors.count")?;
    Ok(n.map(|n| (n, part.path.clone())))
}

/// Advice that the kernel does not take costs speed, not correctness.
fn hint(_: std::io::Result<()>) {}

/// Maps one file and parses its header. `no` is its index among the parts; `of` its number and the
/// count, for the error of a part that is not there.
fn load(path: &Path, no: usize, of: Option<(u32, u32)>) -> Result<(Part, Header), Error> {
    let io = |action: &str, source| Error::Io {
        path: path.to_owned(),
        action: match of {
            Some((n, count)) => format!("{action} part {n} of {count} of the model"),
            None => action.to_owned(),
        },
        source,
    };
    // Before opening: to open a FIFO would wait for a writer.
    let about = std::fs::metadata(path).map_err(|e| io("open", e))?;
    if !about.is_file() {
        let kind = if about.is_dir() {
            "a directory"
        } else {
            "not a regular file"
        };
        return Err(Error::Malformed {
            path: path.to_owned(),
            detail: format!("{kind}, expected a GGUF file"),
        });
    }
    let file = File::open(path).map_err(|e| io("open", e))?;
    // SAFETY: the map is read-only and private to this crate's shared slices. That nobody cuts the
    // file short meanwhile is the documented condition of `Gguf`; every engine that maps models
    // stands on it.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| io("map", e))?;
    let header = Header::parse(path, &map, no)?;
    let part = Part {
        path: path.to_owned(),
        bytes: Bytes::Mapped(map, file),
    };
    Ok((part, header))
}

#[cfg(test)]
mod tests {
    fn shared_between_threads<T: Send + Sync>() {}

    #[test]
    fn a_part_is_read_as_it_is_mapped() {
        let mut writer = crate::Writer::new();
        writer.metadata("general.architecture", "none");
        for name in ["a", "b"] {
            writer.tensor(name, &[5], crate::GgmlType::I8).unwrap();
        }
        let mut payload = writer.begin(Vec::new()).unwrap();
        payload.write(b"firstother").unwrap();
        let bytes = payload.finish().unwrap();
        let path = std::env::temp_dir().join(format!("gguf-read-{}.gguf", std::process::id()));
        std::fs::write(&path, &bytes).unwrap();
        let opened = super::Gguf::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let in_memory = super::Gguf::from_bytes("memory", bytes).unwrap();
        for file in [opened, in_memory] {
            let tensor = file.require("b").unwrap();
            let mut out = [0; 3];
            file.read(&tensor, 2, &mut out).unwrap();
            assert_eq!(&out, b"her");
            for offset in [3, usize::MAX] {
                let error = file.read(&tensor, offset, &mut out).unwrap_err();
                assert!(error.to_string().contains("\"b\""), "{error}");
            }
        }
    }

    #[test]
    fn gguf_is_send_and_sync() {
        shared_between_threads::<super::Gguf>();
    }
}
