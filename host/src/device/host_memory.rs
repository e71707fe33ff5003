//! The machine's own memory, as the CPU and the emulator plan with it.

use crate::error::{Error, Result};

/// Bytes of memory, all of it; 0 where the system does not say.
pub fn total() -> u64 {
    field("MemTotal:").unwrap_or(0)
}

/// Bytes that can be had without swapping.
///
/// # Errors
/// The system does not say.
pub fn free() -> Result<u64> {
    field("MemAvailable:").ok_or_else(|| Error::Device {
        device: "cpu".into(),
        what: "/proc/meminfo does not tell how much memory is available".into(),
    })
}

fn field(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}
