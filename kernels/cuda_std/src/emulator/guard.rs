//! Buffers for tests, with guarded ends.

use std::fmt;

/// Bytes before and after the data that nobody may write.
const GUARD: usize = 256;
const CANARY: u8 = 0xC3;
/// Fills fresh data: NaN in every float format, -1 in every signed integer.
const POISON: u8 = 0xFF;

/// Something wrote outside a [`GuardedBuffer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardViolation {
    /// First changed byte, counted from the data's first byte; negative: before it.
    pub byte_offset: isize,
    /// Length of the data in bytes.
    pub bytes: usize,
}

impl fmt::Display for GuardViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "a write outside a buffer of {} bytes, at byte {}",
            self.bytes, self.byte_offset
        )
    }
}

impl std::error::Error for GuardViolation {}

/// An array for a kernel under test: 256-byte aligned as device memory is, poisoned, and with
/// canaries on both ends. Dropping it checks them and panics if something wrote there.
pub struct GuardedBuffer<T> {
    memory: Vec<u128>,
    /// Offset of the data in `memory`, in bytes.
    start: usize,
    len: usize,
    _type: std::marker::PhantomData<T>,
}

impl<T: Copy> GuardedBuffer<T> {
    /// `len` poisoned elements. `T` must allow every bit pattern.
    pub fn new(len: usize) -> Self {
        let bytes = len * size_of::<T>();
        let mut memory = vec![0u128; (bytes + 2 * GUARD + 256).div_ceil(16)];
        let base = memory.as_mut_ptr().cast::<u8>();
        let total = memory.len() * 16;
        // The last guard begins right behind the data, however odd its length.
        let start = GUARD + base.wrapping_add(GUARD).align_offset(256);
        // Safety: within the vector.
        unsafe {
            base.write_bytes(CANARY, total);
            base.add(start).write_bytes(POISON, bytes);
        }
        Self {
            memory,
            start,
            len,
            _type: std::marker::PhantomData,
        }
    }

    /// A copy of `data`.
    pub fn from_slice(data: &[T]) -> Self {
        let mut buffer = Self::new(data.len());
        buffer.as_mut_slice().copy_from_slice(data);
        buffer
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first element, for a kernel parameter.
    pub fn as_ptr(&self) -> *const T {
        self.memory
            .as_ptr()
            .cast::<u8>()
            .wrapping_add(self.start)
            .cast()
    }

    /// The first element, for a kernel parameter.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.memory
            .as_mut_ptr()
            .cast::<u8>()
            .wrapping_add(self.start)
            .cast()
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        // Safety: initialised by `new`.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }

    /// The elements.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // Safety: as above.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len) }
    }

    /// Checks both ends.
    ///
    /// # Errors
    /// The first byte that something changed.
    pub fn verify(&self) -> Result<(), GuardViolation> {
        check(&self.memory, self.start, self.len * size_of::<T>())
    }
}

fn check(memory: &[u128], start: usize, bytes: usize) -> Result<(), GuardViolation> {
    // Safety: `u128` has no padding.
    let all =
        unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<u8>(), memory.len() * 16) };
    for (at, byte) in all.iter().enumerate() {
        if !(start..start + bytes).contains(&at) && *byte != CANARY {
            return Err(GuardViolation {
                byte_offset: at as isize - start as isize,
                bytes,
            });
        }
    }
    Ok(())
}

impl<T> Drop for GuardedBuffer<T> {
    fn drop(&mut self) {
        if !std::thread::panicking()
            && let Err(violation) = check(&self.memory, self.start, self.len * size_of::<T>())
        {
            panic!("{violation}");
        }
    }
}
