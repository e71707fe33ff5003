//! Any bytes as a GGUF file: what is refused is refused in order, and of what opens, everything can be read.

#![no_main]

use gguf::Gguf;
use kigo::model::{DeviceChoice, LoadOptions, verdicts};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;

fuzz_target!(|data: &[u8]| {
    let file = match Gguf::from_bytes("fuzz.gguf", data.to_vec()) {
        Ok(file) => Arc::new(file),
        Err(error) => {
            assert!(error.to_string().contains("fuzz.gguf"), "{error}");
            return;
        }
    };
    for tensor in file.tensors() {
        assert_eq!(
            tensor.data().len() as u64,
            tensor.row_bytes() * tensor.rows()
        );
        let mut values = vec![0.0; tensor.elements().min(600) as usize];
        let last = tensor.elements() - values.len() as u64;
        for offset in [0, last] {
            let read = tensor.dequantize_into(offset, &mut values);
            assert!(read.is_ok() == gguf::blocks::SUPPORTED.contains(&tensor.ty()));
        }
        assert!(file.require(tensor.name()).is_ok());
        let mut bytes = vec![0; tensor.data().len().min(100)];
        file.read(&tensor, 0, &mut bytes)
            .expect("inside the tensor");
        assert_eq!(bytes, tensor.data()[..bytes.len()]);
    }
    // Every check on the way to a model, and the memory it would take, with nothing loaded.
    let options = LoadOptions {
        device: DeviceChoice::Cpu,
        ..LoadOptions::default()
    };
    let verdicts = verdicts(&file, &options);
    for json in [false, true] {
        let mut text = Vec::new();
        kigo::cli::inspect::inspect(&file, &verdicts, json, &mut text).expect("memory takes it");
        let text = String::from_utf8(text).expect("what is printed is text");
        if json {
            serde_json::from_str::<serde_json::Value>(&text).expect("what is printed is JSON");
        } else {
            let control = |c: char| c.is_control() && c != '\n';
            assert!(!text.contains(control), "a terminal would obey {text:?}");
        }
    }
    // What reads the metadata on the way to a model.
    let _ = kigo::tokenizer::check(file.metadata());
    let _ = kigo::tokenizer::Tokenizer::from_gguf(&file);
    let _ = kigo::tokenizer::ChatTemplate::from_gguf(&file);
    let _ = kigo::model::Config::from_gguf(&file);
});
