//! Checked little-endian reads from the head of a file.

/// Why a file is malformed; the path is added by the caller.
pub(crate) type Detail = String;

/// A position in a file's bytes. No read goes past the end; none allocates by an unchecked length.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    pos: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes, pos: 0 }
    }

    /// The offset of the next read, in bytes from the start of the file.
    pub(crate) fn pos(&self) -> usize {
        self.pos
    }

    /// Bytes left in the file.
    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len() - self.pos
    }

    /// The next `len` bytes. `what` names the field in the error.
    pub(crate) fn take(
        &mut self,
        len: usize,
        what: &dyn Fn() -> String,
    ) -> Result<&'a [u8], Detail> {
        let rest = &self.bytes[self.pos..];
        match rest.get(..len) {
            Some(taken) => {
                self.pos += len;
                Ok(taken)
            }
            None => Err(format!(
                "the file is cut off: {} needs {len} bytes at offset {}, but the file ends at {}",
                what(),
                self.pos,
                self.bytes.len()
            )),
        }
    }

    fn array<const N: usize>(&mut self, what: &dyn Fn() -> String) -> Result<[u8; N], Detail> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    pub(crate) fn u32(&mut self, what: &dyn Fn() -> String) -> Result<u32, Detail> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &dyn Fn() -> String) -> Result<u64, Detail> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `min_bytes` each, checked against what is left of the
    /// file: after this check the count is safe to loop over and to reserve memory by.
    pub(crate) fn count(
        &mut self,
        min_bytes: usize,
        what: &dyn Fn() -> String,
    ) -> Result<usize, Detail> {
        let count = self.u64(what)?;
        let limit = (self.remaining() / min_bytes) as u64;
        if count > limit {
            return Err(format!(
                "{} is {count}, but the {} bytes left in the file hold at most {limit}",
                what(),
                self.remaining()
            ));
        }
        Ok(count as usize)
    }

    /// A length-prefixed string, as bytes.
    pub(crate) fn string(&mut self, what: &dyn Fn() -> String) -> Result<&'a [u8], Detail> {
        let len = self.count(1, &|| format!("the length of {}", what()))?;
        self.take(len, what)
    }
}
