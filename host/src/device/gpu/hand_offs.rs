//! The time of a [hand-off](kernels::hand_off) on this card.

use super::{Allocation, Driver};
use crate::device::HandOff;
use crate::error::Result;
use kernels::hand_off::{FLYING_UNIT, GROUPS, HandOffArgs, ROWS, THREADS, WORDS};

/// Bytes that are on their way to each block meanwhile, in one measurement after the other.
const FLYING: [u32; 6] = [0, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10];
const ROUNDS: u32 = 2000;
/// Bytes of each block that are brought again and again: of all blocks more than a second-level cache holds.
const STREAM: u32 = 2 << 20;
const _: () = {
    let mut i = 0;
    while i < FLYING.len() {
        assert!(FLYING[i].is_multiple_of(FLYING_UNIT));
        assert!(FLYING[i] == 0 || STREAM.is_multiple_of(FLYING[i]));
        i += 1;
    }
};

/// Hand-offs with more and more bytes on their way; none where a model has left no memory for these.
pub(super) fn measure<D: Driver>(driver: &mut D) -> Result<Vec<HandOff>> {
    let blocks = driver.multiprocessors();
    let bytes = blocks as usize * STREAM as usize;
    let mut all = Vec::new();
    if driver.free_bytes()? < 2 * bytes as u64 {
        return Ok(all);
    }
    let stream = driver.alloc(bytes)?;
    for flying in FLYING {
        let [ns, groups] = rounds(driver, blocks, &stream, flying, ROUNDS)?;
        let ns = ns.iter().copied().max().unwrap_or(0).max(1);
        let brought: u64 = groups.iter().map(|n| u64::from(*n)).sum();
        all.push(HandOff {
            flying: u64::from(flying),
            ns: f64::from(ns) / f64::from(ROUNDS - 1),
            bytes_per_s: brought as f64 * f64::from(flying / GROUPS) * 1e9 / f64::from(ns),
        });
    }
    driver.free(stream);
    Ok(all)
}

/// One launch: each block's nanoseconds, and groups of bytes.
fn rounds<D: Driver>(
    driver: &mut D,
    blocks: u32,
    stream: &Allocation,
    flying: u32,
    rounds: u32,
) -> Result<[Vec<u32>; 2]> {
    let row_bytes = (ROWS * blocks * WORDS * 4) as usize;
    let out_bytes = blocks as usize * 8;
    let rows = driver.alloc(row_bytes)?;
    let out = driver.alloc(out_bytes)?;
    driver.write(rows.address, &vec![0; row_bytes])?;
    driver.write(out.address, &vec![0; out_bytes])?;
    let args = HandOffArgs {
        rows: rows.address as *mut u32,
        rounds,
        flying,
        stream: stream.address as *const u8,
        stream_bytes: STREAM,
        out: out.address as *mut u32,
    };
    driver.launch_cooperative("hand_off", blocks, THREADS, flying as usize, &args)?;
    let mut words = vec![[0u32; 2]; blocks as usize];
    driver.read(out.address, bytemuck::cast_slice_mut(&mut words))?;
    driver.free(rows);
    driver.free(out);
    Ok([0, 1].map(|i| words.iter().map(|w| w[i]).collect()))
}
