//! The whole line on a real model: a haiku about this minute, over HTTP, that no prepared answer can
//! be. [`kigo::haiku`] makes the checks; this decides where they must hold.

use kigo::haiku::{self, Options};
use kigo::model::{DeviceChoice, LoadOptions};
use std::path::Path;

fn run(device: DeviceChoice, require_gpu: bool) {
    let options = Options {
        model: std::env::var("KIGO_MODEL").ok(),
        load: LoadOptions {
            device,
            ..LoadOptions::default()
        },
        require_gpu,
        results: Path::new(env!("CARGO_MANIFEST_DIR")).join("../.test-results/haiku"),
    };
    match haiku::run(&options, &mut std::io::stdout()) {
        Ok(report) => {
            let checks: Vec<_> = report
                .asked
                .attempts
                .iter()
                .flat_map(|a| &a.checks)
                .collect();
            assert!(report.passed(), "{checks:#?}");
        }
        Err(error) => panic!("{error}"),
    }
}

/// On a GPU, and on nothing else. Run with `REQUIRE_REAL_LLAMA=1 cargo test --test
/// haiku_generation_anti_cheat test_haiku_generation_anti_cheat --features cuda --release -- --ignored
/// --nocapture --test-threads=1`.
#[test]
#[ignore = "needs a GPU"]
fn test_haiku_generation_anti_cheat() {
    let required = std::env::var("REQUIRE_REAL_LLAMA").is_ok_and(|v| v == "1");
    assert!(
        required,
        "set REQUIRE_REAL_LLAMA=1: this test asks a real model on a real GPU"
    );
    run(DeviceChoice::Auto, true);
}

/// On the CPU. `make test` fetches the model.
#[test]
fn a_haiku_on_the_cpu() {
    run(DeviceChoice::Cpu, false);
}
