//! A block's shared memory: dynamic at [`DYNAMIC_START`], static arrays behind it.

use super::thread::{current, fail};
use crate::shared::SharedPtr;
use std::cell::{Cell, RefCell};
use std::sync::atomic::AtomicU32;

/// Shared memory a block can have, in bytes, static and dynamic together: that of sm_90.
pub const SHARED_LIMIT: u32 = 227 * 1024;

/// The address of dynamic shared memory: not zero, as on a device, where a kernel that takes offsets for
/// addresses goes wrong too.
pub const DYNAMIC_START: u32 = 1024;

/// What uninitialised shared memory holds: NaN in every float format.
const POISON: u8 = 0xFF;
/// Bytes behind dynamic shared memory and behind each static array that nobody may write.
const GAP: u32 = 256;
const CANARY: u8 = 0xA5;
/// Room for the limit, and for a gap behind each of many static arrays.
const CAPACITY: usize = SHARED_LIMIT as usize + 128 * 1024;

#[derive(Clone, Copy)]
struct Region {
    /// Tells one static array from another; null: dynamic shared memory.
    key: *const AtomicU32,
    start: u32,
    bytes: u32,
}

pub(crate) struct SharedMemory {
    /// Zeroed pages that are not touched take no memory.
    memory: Box<[Cell<u8>]>,
    dynamic: Region,
    statics: RefCell<Vec<Region>>,
}

impl SharedMemory {
    pub fn new(dynamic_bytes: u32) -> Self {
        let memory: Box<[u8]> = vec![0; CAPACITY + 128].into_boxed_slice();
        // Safety: `Cell<u8>` has the layout of `u8`.
        let memory = unsafe { Box::from_raw(Box::into_raw(memory) as *mut [Cell<u8>]) };
        let dynamic = Region {
            key: std::ptr::null(),
            start: DYNAMIC_START,
            bytes: dynamic_bytes,
        };
        Self {
            memory,
            dynamic,
            statics: RefCell::default(),
        }
    }

    /// The 128-byte-aligned start.
    fn base(&self) -> *mut u8 {
        let start = self.memory.as_ptr().cast::<u8>().cast_mut();
        start.wrapping_add(start.align_offset(128))
    }

    /// The memory of a new block: poisoned, without static arrays.
    pub fn reset(&self) {
        self.statics.borrow_mut().clear();
        self.poison(self.dynamic);
    }

    fn poison(&self, region: Region) {
        let end = end_of(region);
        // Safety: a region and its gap lie within the allocation.
        unsafe {
            let start = self.base().add(region.start as usize);
            std::ptr::write_bytes(start, POISON, region.bytes as usize);
            std::ptr::write_bytes(
                start.add(region.bytes as usize),
                CANARY,
                (end - region.start - region.bytes) as usize,
            );
        }
    }

    /// The address of the static array that `key` stands for; made on first use in a block.
    fn static_array(&self, key: *const AtomicU32, bytes: u32) -> Result<u32, String> {
        let mut statics = self.statics.borrow_mut();
        if let Some(found) = statics.iter().find(|r| r.key == key) {
            return Ok(found.start);
        }
        let used: u32 = statics.iter().map(|r| r.bytes.div_ceil(128) * 128).sum();
        let total = u64::from(used) + u64::from(self.dynamic.bytes) + u64::from(bytes);
        let start = end_of(statics.last().copied().unwrap_or(self.dynamic));
        if total > u64::from(SHARED_LIMIT)
            || start as usize + bytes as usize + 2 * GAP as usize > CAPACITY
        {
            return Err(format!(
                "{total} bytes of static and dynamic shared memory; a block has {SHARED_LIMIT}"
            ));
        }
        let region = Region { key, start, bytes };
        self.poison(region);
        statics.push(region);
        Ok(start)
    }

    /// The host address of `bytes` bytes at a shared address, if they lie in one region.
    pub fn check(
        &self,
        address: u32,
        bytes: usize,
        align: usize,
        what: &str,
    ) -> Result<*mut u8, String> {
        let inside = |r: &Region| {
            address >= r.start
                && u64::from(address) + bytes as u64 <= u64::from(r.start) + u64::from(r.bytes)
        };
        if !(address as usize).is_multiple_of(align) {
            return Err(format!(
                "{what} of {bytes} bytes at shared address {address:#x}: must be aligned to {align}"
            ));
        }
        if inside(&self.dynamic) || self.statics.borrow().iter().any(inside) {
            return Ok(self.pointer(address));
        }
        let statics: Vec<String> = self
            .statics
            .borrow()
            .iter()
            .map(|r| format!("{:#x}..{:#x}", r.start, r.start + r.bytes))
            .collect();
        Err(format!(
            "{what} of {bytes} bytes at shared address {address:#x} is out of range: dynamic shared memory is \
             {:#x}..{:#x}, static arrays are [{}]",
            self.dynamic.start,
            self.dynamic.start + self.dynamic.bytes,
            statics.join(", ")
        ))
    }

    pub fn pointer(&self, address: u32) -> *mut u8 {
        self.base().wrapping_add(address as usize)
    }

    pub fn address(&self, pointer: *const u8) -> Result<u32, String> {
        let offset = pointer.addr().wrapping_sub(self.base().addr());
        if offset < CAPACITY {
            Ok(offset as u32)
        } else {
            Err(format!(
                "pointer {pointer:p} is not in this block's shared memory"
            ))
        }
    }

    /// Whether something wrote behind the end of a region.
    pub fn check_ends(&self) -> Result<(), String> {
        for region in self.statics.borrow().iter().chain([&self.dynamic]) {
            for address in region.start + region.bytes..end_of(*region) {
                // Safety: within the allocation; no fiber runs.
                if unsafe { self.pointer(address).read() } != CANARY {
                    let kind = if region.key.is_null() {
                        "dynamic shared memory"
                    } else {
                        "a static shared array"
                    };
                    return Err(format!(
                        "wrote behind {kind} of {} bytes: {} bytes past its end",
                        region.bytes,
                        address - region.start - region.bytes
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Where the next region may begin.
fn end_of(region: Region) -> u32 {
    (region.start + region.bytes).div_ceil(128) * 128 + GAP
}

/// Checks an access of the current thread to shared memory, and gives its host address.
pub(crate) fn access(address: u32, bytes: usize, align: usize, what: &str) -> *mut u8 {
    match current().0.shared.check(address, bytes, align, what) {
        Ok(pointer) => pointer,
        Err(message) => fail(message),
    }
}

/// The static array of the current block that `key` stands for (`shared_array!` calls this).
#[doc(hidden)]
pub fn static_shared<T>(key: &'static AtomicU32) -> SharedPtr<T> {
    match current().0.shared.static_array(key, size_of::<T>() as u32) {
        Ok(address) => SharedPtr::from_addr(address),
        Err(message) => fail(message),
    }
}
