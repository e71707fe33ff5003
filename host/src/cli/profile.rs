//! `kigo bench --profile`: where the time of a decode step goes.

use crate::engine::Direct;
use crate::error::Result;
use serde::Serialize;

/// Steps that are timed.
const STEPS: usize = 32;

/// All operations of one name.
#[derive(Serialize)]
pub(super) struct Row {
    name: &'static str,
    /// Operations of a step.
    count: usize,
    /// Bytes of weights that all of them read.
    bytes: u64,
    /// Microseconds of a step: until the input was there, from then until the output was written, in all.
    wait_us: f64,
    work_us: f64,
    total_us: f64,
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
                rows.push(Row {
                    name: timing.name,
                    count: 0,
                    bytes: 0,
                    wait_us: 0.0,
                    work_us: 0.0,
                    total_us: 0.0,
                });
                rows.len() - 1
            });
            let row = &mut rows[index];
            if step == 0 {
                row.count += 1;
                row.bytes += timing.bytes;
            }
            let mean = |ns: u64| ns as f64 / 1e3 / STEPS as f64;
            row.wait_us += mean(timing.wait_ns);
            row.work_us += mean(timing.work_ns);
            row.total_us += mean(timing.total_ns);
        }
    }
    Ok(rows)
}

/// The rows as a table, with the rate at which each operation's weights were read.
pub(super) fn table(rows: &[Row]) -> String {
    if rows.is_empty() {
        return "profile  this device does not time its operations\n".into();
    }
    let mut text = format!(
        "{:<14} {:>5} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8}\n",
        "operation", "count", "MB", "us each", "waiting", "working", "us step", "GB/s"
    );
    let mut line = |name: &str, count: usize, bytes: u64, wait: f64, work: f64, total: f64| {
        let each = count.max(1) as f64;
        text.push_str(&format!(
            "{name:<14} {count:>5} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {total:>8.1} {:>8.0}\n",
            bytes as f64 / 1e6,
            total / each,
            wait / each,
            work / each,
            bytes as f64 / 1e3 / total.max(f64::MIN_POSITIVE),
        ));
    };
    for r in rows {
        line(r.name, r.count, r.bytes, r.wait_us, r.work_us, r.total_us);
    }
    let sum = |f: fn(&Row) -> f64| rows.iter().map(f).sum::<f64>();
    line(
        "all",
        rows.iter().map(|r| r.count).sum(),
        rows.iter().map(|r| r.bytes).sum(),
        sum(|r| r.wait_us),
        sum(|r| r.work_us),
        sum(|r| r.total_us),
    );
    text
}
