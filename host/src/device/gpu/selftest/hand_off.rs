//! The kernel that times hand-offs: that its rounds go through, and bytes come meanwhile.

use super::Driver;
use super::bench::Bench;
use crate::error::Result;
use kernels::hand_off::{FLYING_UNIT, HandOffArgs, ROWS, THREADS, WORDS};

const BLOCKS: u32 = 2;
const ROUNDS: u32 = 5;

pub fn run<D: Driver>(b: &mut Bench<'_, D>) -> Result<()> {
    for flying in [0, FLYING_UNIT] {
        let stream_bytes = 2 * FLYING_UNIT;
        let stream = b.upload(&vec![0u8; (BLOCKS * stream_bytes) as usize])?;
        let rows = b.upload(&[0u32; (ROWS * BLOCKS * WORDS) as usize])?;
        let out = b.upload(&[0u32; 2 * BLOCKS as usize])?;
        let args = HandOffArgs {
            rows: rows.ptr(),
            rounds: ROUNDS,
            flying,
            stream: stream.ptr(),
            stream_bytes,
            out: out.ptr(),
        };
        b.driver
            .launch_cooperative("hand_off", BLOCKS, THREADS, flying as usize, &args)?;
        let rows: Vec<u32> = b.take("hand_off", rows)?;
        let out: Vec<u32> = b.take("hand_off", out)?;
        b.take::<u8>("hand_off", stream)?;
        // Each row's last round, of all blocks.
        let last = |row: u32| (ROUNDS - ROWS + 1..=ROUNDS).find(|round| round % ROWS == row);
        let expected = (0..ROWS).flat_map(|row| vec![last(row); (BLOCKS * WORDS) as usize]);
        let wrong = rows
            .iter()
            .zip(expected)
            .filter(|(found, e)| Some(**found) != *e);
        let untimed = out
            .chunks(2)
            .filter(|o| o[0] == 0 || (o[1] > 0) != (flying > 0));
        let error = (wrong.count() + untimed.count()) as f64;
        b.report(
            "hand_off",
            format!("{flying} bytes on their way"),
            error,
            0.0,
        );
    }
    Ok(())
}
