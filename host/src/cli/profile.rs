//! `kigo bench --profile`: where the time of a decode step goes.

use crate::device::HandOff;
use crate::engine::Direct;
use crate::error::Result;
use serde::Serialize;

/// Why a profile is empty.
pub(super) const NOT_TIMED: &str = "operations are timed by a GPU's own clock, in decode steps that are one launch: \
     not on the CPU, nor with --exact, --lora or a --cache-type other than f16, nor of every architecture";

/// Steps that are timed.
const STEPS: usize = 32;
/// Tokens that all steps add to the cache.
pub(super) const TOKENS: usize = STEPS + 1;

/// All operations of one name.
#[derive(Serialize)]
pub(super) struct Row {
    pub name: &'static str,
    /// How many a step has.
    count: usize,
    /// Bytes of weights that all of them read, or of keys and values, and multiplications and additions with them.
    pub bytes: u64,
    pub operations: u64,
    /// Microseconds of a step: until the input was there, from then until the output was written, in all.
    wait_us: f64,
    work_us: f64,
    pub total_us: f64,
    /// What share of the bytes that the memory could have moved in that time these are: 1 is the floor, where the
    /// bus never waits. None where the device does not tell its bandwidth.
    of_peak: Option<f64>,
}

impl Row {
    fn new(name: &'static str) -> Self {
        Row {
            name,
            count: 0,
            bytes: 0,
            operations: 0,
            wait_us: 0.0,
            work_us: 0.0,
            total_us: 0.0,
            of_peak: None,
        }
    }

    /// One operation that took so long.
    #[cfg(test)]
    pub fn of(name: &'static str, bytes: u64, operations: u64, total_us: f64) -> Self {
        Row {
            count: 1,
            bytes,
            operations,
            total_us,
            ..Row::new(name)
        }
    }

    pub fn bytes_per_s(&self) -> f64 {
        self.bytes as f64 * 1e6 / self.total_us.max(f64::MIN_POSITIVE)
    }

    fn compare(&mut self, memory_bytes_per_s: Option<u64>) {
        self.of_peak = memory_bytes_per_s.map(|peak| self.bytes_per_s() / peak as f64);
    }
}

/// The step as a whole.
pub(super) fn whole(rows: &[Row], memory_bytes_per_s: Option<u64>) -> Row {
    let mut all = Row::new("all");
    for r in rows {
        all.count += r.count;
        all.bytes += r.bytes;
        all.operations += r.operations;
        all.wait_us += r.wait_us;
        all.work_us += r.work_us;
        all.total_us += r.total_us;
    }
    all.compare(memory_bytes_per_s);
    all
}

/// Means over some steps, in the order of a step's first operations; empty on a device without a clock.
pub(super) fn measure(direct: &mut Direct, depth: usize, first: u32) -> Result<Vec<Row>> {
    direct.reset();
    if depth > 0 {
        direct.feed(&vec![first; depth])?;
        direct.sample_greedy()?;
    }
    // Records the step's program, and asks for its times from then on.
    direct.feed(&[first])?;
    let mut id = direct.sample_greedy()?;
    direct.profile()?;
    let mut rows: Vec<Row> = Vec::new();
    for step in 0..STEPS {
        direct.feed(&[id])?;
        id = direct.sample_greedy()?;
        for timing in direct.profile()? {
            let index = rows.iter().position(|r| r.name == timing.name);
            let index = index.unwrap_or_else(|| {
                rows.push(Row::new(timing.name));
                rows.len() - 1
            });
            let row = &mut rows[index];
            if step == 0 {
                row.count += 1;
            }
            // An attention's grow from step to step.
            row.bytes += timing.bytes;
            row.operations += timing.operations;
            let mean = |ns: u64| ns as f64 / 1e3 / STEPS as f64;
            row.wait_us += mean(timing.wait_ns);
            row.work_us += mean(timing.work_ns);
            row.total_us += mean(timing.total_ns);
        }
    }
    let memory_bytes_per_s = direct.runner().device().memory_bytes_per_s;
    for row in &mut rows {
        row.bytes /= STEPS as u64;
        row.operations /= STEPS as u64;
        row.compare(memory_bytes_per_s);
    }
    Ok(rows)
}

/// The rows as a table, with the rate at which each operation's bytes were read, and how near that is to what the
/// memory can do.
pub(super) fn table(rows: &[Row], memory_bytes_per_s: Option<u64>) -> String {
    if rows.is_empty() {
        return format!("profile  {NOT_TIMED}\n");
    }
    let mut text = format!(
        "{:<14} {:>5} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>8}\n",
        "operation", "count", "MB", "us each", "waiting", "working", "us step", "GB/s", "of peak"
    );
    for r in rows.iter().chain([&whole(rows, memory_bytes_per_s)]) {
        let each = r.count.max(1) as f64;
        let of_peak = r
            .of_peak
            .map_or("none".into(), |share| format!("{:.1}%", 100.0 * share));
        text.push_str(&format!(
            "{:<14} {:>5} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>8.1} {:>8.0} {of_peak:>8}\n",
            r.name,
            r.count,
            r.bytes as f64 / 1e6,
            r.total_us / each,
            r.wait_us / each,
            r.work_us / each,
            r.total_us,
            r.bytes_per_s() / 1e9,
        ));
    }
    text.push_str(&match memory_bytes_per_s {
        Some(peak) => format!("peak           {:.0} GB/s of memory\n", peak as f64 / 1e9),
        None => "peak           none: this device does not tell its memory's bandwidth\n".into(),
    });
    text
}

/// Hand-offs as a table, below that of the operations.
pub(super) fn hand_offs(all: &[HandOff]) -> String {
    let mut text = String::new();
    if !all.is_empty() {
        text.push_str(
            "hand-off       us each, with so many KB on their way to each multiprocessor\n",
        );
    }
    for h in all {
        text.push_str(&format!(
            "{:<14} {:>7.2} {:>8} KB, {:.0} GB/s\n",
            "",
            h.ns / 1e3,
            h.flying >> 10,
            h.bytes_per_s / 1e9,
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &'static str, count: usize, bytes: u64, total_us: f64) -> Row {
        let mut row = Row {
            count,
            ..Row::of(name, bytes, 4 * bytes, total_us)
        };
        row.compare(Some(2_000_000_000));
        row
    }

    #[test]
    fn a_share_of_the_bandwidth_is_that_of_the_bytes_in_the_time() {
        // 1 and 0.5 GB/s of 2: half and a quarter, and in all 1.5 MB in 2 ms.
        let rows = [row("qkv", 3, 1_000_000, 1e3), row("head", 1, 500_000, 1e3)];
        assert_eq!(rows[0].of_peak, Some(0.5));
        let all = whole(&rows, Some(2_000_000_000));
        assert_eq!(
            (all.count, all.bytes, all.operations),
            (4, 1_500_000, 6_000_000)
        );
        assert_eq!(all.of_peak, Some(0.375));
        let table = table(&rows, Some(2_000_000_000));
        let ends: Vec<&str> = table
            .lines()
            .map(|l| l.rsplit(' ').next().unwrap_or(""))
            .collect();
        assert_eq!(
            ends,
            ["peak", "50.0%", "25.0%", "37.5%", "memory"],
            "{table}"
        );
    }

    #[test]
    fn no_bandwidth_no_share() {
        let mut row = row("qkv", 1, 1_000, 1.0);
        row.compare(None);
        let table = table(&[row], None);
        assert_eq!(table.matches("    none\n").count(), 2, "{table}");
        assert!(!table.contains('%'), "{table}");
    }
}
