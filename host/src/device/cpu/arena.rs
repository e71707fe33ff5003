//! Memory for copies of weights.

use memmap2::{MmapOptions, MmapRaw};
use std::ops::Range;
use std::sync::Arc;

/// Where a part begins: at a cache line, which vectors fill.
const ALIGN: usize = 64;

/// Bytes asked of the system at once. They become memory when they are written, in pages of 2 MiB
/// where the system has those, so matrices that are smaller lie beside others.
const CHUNK: usize = 256 << 20;

/// Hands out parts of large maps.
#[derive(Default)]
pub(super) struct Arena {
    /// The map that is in use, and how much of it.
    chunk: Option<(Arc<MmapRaw>, usize)>,
}

/// Bytes of an [`Arena`], zeros at first.
pub(super) struct Part {
    map: Arc<MmapRaw>,
    range: Range<usize>,
}

impl Arena {
    /// A part of `len` bytes.
    ///
    /// # Errors
    /// The system has no room for it.
    pub fn take(&mut self, len: usize) -> std::io::Result<Part> {
        let room = |chunk: &(Arc<MmapRaw>, usize)| chunk.0.len() - chunk.1;
        let chunk = match self.chunk.take().filter(|chunk| room(chunk) >= len) {
            Some(chunk) => chunk,
            None => {
                let map = MmapOptions::new().len(len.max(CHUNK)).map_anon()?;
                // A hint: with small pages, reading waits for many more translations of addresses.
                #[cfg(target_os = "linux")]
                if let Err(error) = map.advise(memmap2::Advice::HugePage) {
                    tracing::debug!(%error, "no huge pages for weights");
                }
                (Arc::new(map.into()), 0)
            }
        };
        let (map, used) = chunk;
        let part = Part {
            map: Arc::clone(&map),
            range: used..used + len,
        };
        let used = (used + len).next_multiple_of(ALIGN).min(map.len());
        self.chunk = Some((map, used));
        Ok(part)
    }
}

impl Part {
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `take` hands out ranges inside the map, each once, so that only `bytes_mut` of this
        // part writes here.
        unsafe {
            std::slice::from_raw_parts(self.map.as_ptr().add(self.range.start), self.range.len())
        }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let start = self.map.as_mut_ptr();
        // SAFETY: as above; the map may be written.
        unsafe { std::slice::from_raw_parts_mut(start.add(self.range.start), self.range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_apart() {
        let mut arena = Arena::default();
        let lens = [1, 64, 100, 0, CHUNK, 7, CHUNK + 1, 3];
        let mut parts: Vec<_> = lens.map(|len| arena.take(len).unwrap()).into();
        for (i, part) in parts.iter_mut().enumerate() {
            assert_eq!(part.bytes().as_ptr() as usize % ALIGN, 0);
            // The large ones' ends only: they need not become memory.
            if let [first, .., last] = part.bytes_mut() {
                assert_eq!((*first, *last), (0, 0));
                (*first, *last) = (i as u8 + 1, i as u8 + 1);
            }
        }
        for (i, (part, len)) in parts.iter().zip(lens).enumerate() {
            assert_eq!(part.bytes().len(), len);
            if let [first, .., last] = part.bytes() {
                assert_eq!((*first, *last), (i as u8 + 1, i as u8 + 1));
            }
        }
    }
}
