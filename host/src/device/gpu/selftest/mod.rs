//! Every kernel against a plain reference, on whatever [`Driver`] carries it.
//!
//! The same checks run in the tests, on the emulator, and as `kigo selftest --device cuda` on a card:
//! random data drawn anew each time, outputs poisoned, memory guarded at both ends.

mod attention;
mod bench;
mod choice;
mod decode;
mod decode_attention;
mod experts;
mod hand_off;
mod products;
mod rows;
mod variants;

use super::{Address, Allocation, Driver};
use crate::error::Result;
use std::io::Write;

/// What one check found.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub kernel: &'static str,
    /// The shape or type it ran on.
    pub case: String,
    /// Normalised mean square error against the reference; NaN where an output was not written.
    pub error: f64,
    pub limit: f64,
}

impl Outcome {
    pub fn passed(&self) -> bool {
        self.error <= self.limit
    }
}

/// Runs every check and hands each outcome to `each`.
///
/// # Errors
/// The driver's. A wrong result is an [`Outcome`], not an error.
pub fn run<D: Driver>(driver: D, seed: u64, each: &mut dyn FnMut(Outcome)) -> Result<()> {
    let mut bench = bench::Bench {
        driver,
        random: bench::Random(seed | 1),
        each,
        decode_kernel: D::DECODE_KERNELS[0],
        programs: 0,
    };
    products::run(&mut bench)?;
    for kernel in D::DECODE_KERNELS {
        bench.decode_kernel = kernel;
        decode::run(&mut bench)?;
    }
    rows::run(&mut bench)?;
    variants::run(&mut bench)?;
    experts::run(&mut bench)?;
    attention::run(&mut bench)?;
    choice::run(&mut bench)?;
    hand_off::run(&mut bench)
}

/// Prints a line per check; whether all passed.
pub(super) fn report<D: Driver>(driver: D, out: &mut dyn Write) -> Result<bool> {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |d| d.as_nanos() as u64);
    let io = |source| crate::error::Error::Io {
        path: "standard output".into(),
        source,
    };
    writeln!(out, "device {}, seed {seed}", driver.info().name).map_err(io)?;
    let (mut passed, mut failed) = (0, 0);
    let mut broken = None;
    run(driver, seed, &mut |o: Outcome| {
        let verdict = if o.passed() { "ok  " } else { "FAIL" };
        let line = format!(
            "{verdict} {:<16} {:<44} error {:9.2e}, limit {:.0e}",
            o.kernel, o.case, o.error, o.limit
        );
        if let Err(e) = writeln!(out, "{line}") {
            broken.get_or_insert(e);
        }
        *(if o.passed() { &mut passed } else { &mut failed }) += 1;
    })?;
    if let Some(e) = broken {
        return Err(io(e));
    }
    writeln!(out, "{passed} passed, {failed} failed").map_err(io)?;
    Ok(failed == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::gpu::Emulated;

    #[test]
    fn every_kernel_agrees_with_its_reference_on_the_emulator() {
        let mut failures = Vec::new();
        let mut kernels = std::collections::BTreeSet::new();
        run(Emulated::new(), 0x6b69_676f, &mut |o| {
            kernels.insert(o.kernel);
            if !o.passed() {
                failures.push(format!("{o:?}"));
            }
        })
        .expect("the emulator runs every kernel");
        assert!(failures.is_empty(), "{}", failures.join("\n"));
        for kernel in kernels::all() {
            assert!(
                kernels.contains(kernel.name),
                "kernel {} is not checked",
                kernel.name
            );
        }
    }

    #[test]
    fn an_output_that_was_not_written_fails() {
        let outcome = Outcome {
            kernel: "k",
            case: String::new(),
            error: bench::nmse(&[f32::NAN], &[1.0]),
            limit: 1.0,
        };
        assert!(!outcome.passed());
    }
}
