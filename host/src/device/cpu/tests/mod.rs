//! The CPU's operations against plain f64 arithmetic.

mod operations;
mod products;

use super::*;
use gguf::{GgmlType, Writer};

/// A file of matrices: name, `[cols, rows]`, type, data.
fn file_of(tensors: &[(&str, [u64; 2], GgmlType, Vec<u8>)]) -> Arc<Gguf> {
    let mut writer = Writer::new();
    writer.metadata("general.architecture", "llama");
    for (name, dims, ty, _) in tensors {
        writer.tensor(*name, dims, *ty).unwrap();
    }
    let mut payload = writer.begin(Vec::new()).unwrap();
    for (_, _, _, data) in tensors {
        payload.write(data).unwrap();
    }
    Arc::new(Gguf::from_bytes("test.gguf", payload.finish().unwrap()).unwrap())
}

#[test]
fn samples_and_reads_logits() {
    let mut cpu = Cpu::new(Some(1), false).unwrap();
    let logits = cpu.upload(&[0.0, 3.0, 1.0, 5.0, 4.0, 5.0]).unwrap();
    let params = crate::sampling::SamplingParams::greedy();
    let row = SampleRow {
        ahead: 0,
        params: &params,
        seed: 1,
        index: 0,
        seen: &[],
    };
    assert_eq!(
        cpu.sample(&logits, 3, &[row.clone(), row.clone()]).unwrap(),
        [1, 0]
    );
    assert_eq!(cpu.sample(&logits, 3, &[row]).unwrap(), [1]);
    let mut out = [0.0; 2];
    cpu.read(&logits, 3, &mut out).unwrap();
    assert_eq!(out, [5.0, 4.0]);
    let error = cpu.read(&logits, 5, &mut out).unwrap_err();
    assert!(error.to_string().contains("buffer of 6"), "{error}");
}

#[test]
fn refuses_thread_counts_that_make_no_sense() {
    for threads in [0, 1025, usize::MAX] {
        let error = Cpu::new(Some(threads), false).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("--threads"), "{error}");
    }
}

#[test]
fn names_itself_and_its_memory() {
    let cpu = Cpu::new(Some(1), true).unwrap();
    assert_eq!(cpu.info().backend, "cpu");
    assert!(!cpu.info().name.is_empty());
    assert_eq!(cpu.info().architecture, Level::best().name());
    assert!(cpu.free_bytes().unwrap() > 0);
}
