//! `/v1/embeddings` on a model that names a pooling: what the output matrix makes of an embedding must point where
//! the logits of an independent implementation point.

use kigo::engine::Direct;
use kigo::gguf::{Gguf, Value as Meta, Writer};
use kigo::model::{DeviceChoice, LoadOptions, load};
use kigo_tests::worker::Worker;
use kigo_tests::{golden_dir, read_json};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    ids: Vec<u32>,
    /// Of the last position.
    logits: Vec<Vec<f32>>,
}

fn tiny() -> PathBuf {
    golden_dir().join("tiny/llama-F16.gguf")
}

/// The tiny model with a pooling in its metadata.
fn with_pooling(pooling: u32, path: &Path) {
    let file = Gguf::open(tiny()).expect("a tiny model");
    let mut writer = Writer::new();
    for (key, value) in file.metadata().iter() {
        if !matches!((key, value), ("general.alignment", Meta::U32(_))) {
            writer.metadata(key, value.clone());
        }
    }
    writer.metadata("llama.pooling_type", pooling);
    for tensor in file.tensors() {
        let announced = writer.tensor(tensor.name(), tensor.dims(), tensor.ty());
        announced.expect("a tensor");
    }
    let out = std::fs::File::create(path).expect("a file");
    let mut payload = writer
        .begin(std::io::BufWriter::new(out))
        .expect("a header");
    for tensor in file.tensors() {
        payload.write(tensor.data()).expect("room");
    }
    payload.finish().expect("a file");
}

/// The output matrix times a vector.
fn logits_of(vector: &[f64]) -> Vec<f64> {
    let file = Gguf::open(tiny()).expect("a tiny model");
    let head = file.require("output.weight").expect("an output matrix");
    let mut row = vec![0.0; vector.len()];
    let vocabulary = head.dims()[1];
    (0..vocabulary)
        .map(|i| {
            head.dequantize_row(i, &mut row).expect("a row");
            row.iter().zip(vector).map(|(w, x)| f64::from(*w) * x).sum()
        })
        .collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The logits of every position, by a run of this project; those of the last are checked against the reference.
fn mean_logits(ids: &[u32]) -> Vec<f64> {
    let file = Arc::new(Gguf::open(tiny()).expect("a tiny model"));
    let options = LoadOptions {
        device: DeviceChoice::Cpu,
        exact: true,
        ..LoadOptions::default()
    };
    let mut direct = Direct::new(load(&file, &options, &mut |_| {}).expect("a runner"));
    let mut sum = Vec::new();
    direct
        .feed_each(ids, |logits| {
            sum.resize(logits.len(), 0.0);
            sum.iter_mut()
                .zip(logits)
                .for_each(|(s, l)| *s += f64::from(l));
        })
        .expect("a run");
    sum
}

#[test]
fn an_embedding_is_what_the_logits_are_made_of() {
    let golden: Golden = read_json(&golden_dir().join("tiny/llama-F16.golden.json"));
    let folder = tempfile::tempdir().expect("a folder");
    for (name, pooling) in [("mean", 1), ("last", 3)] {
        let path = folder.path().join(format!("{name}.gguf"));
        with_pooling(pooling, &path);
        let worker = Worker::start_on(&path, "cpu", &["--exact"]);
        let (_, about) = worker.ask("GET /v1/worker", "");
        assert!(about.contains("\"embeddings\":true"), "{about}");
        // All at once, which is in an order of their own.
        let inputs: Vec<&[u32]> = golden.prompts.iter().map(|p| &p.ids[..]).collect();
        let body = json!({ "model": name, "input": inputs });
        let (status, text) = worker.ask("POST /v1/embeddings", &body.to_string());
        assert_eq!(status, 200, "{text}");
        let answer: Value = serde_json::from_str(&text).expect("JSON");
        let tokens: usize = inputs.iter().map(|i| i.len()).sum();
        assert_eq!(answer["usage"]["prompt_tokens"], tokens);
        for (i, prompt) in golden.prompts.iter().enumerate() {
            let vector: Vec<f64> =
                serde_json::from_value(answer["data"][i]["embedding"].clone()).expect("numbers");
            let length = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
            assert!((length - 1.0).abs() < 1e-5, "{length}");
            let expected = if name == "last" {
                prompt.logits[0].iter().map(|&l| f64::from(l)).collect()
            } else {
                mean_logits(&prompt.ids)
            };
            let found = cosine(&logits_of(&vector), &expected);
            assert!(found > 1.0 - 1e-6, "{name}, prompt {i}: {found}");
        }
        // The two poolings differ, so that neither passes for the other.
        let long = &golden.prompts[2];
        let last: Vec<f64> = long.logits[0].iter().map(|&l| f64::from(l)).collect();
        assert!(cosine(&mean_logits(&long.ids), &last) < 0.99);
    }
}

#[test]
fn a_model_without_a_pooling_says_so() {
    let worker = Worker::start_on(&tiny(), "cpu", &[]);
    let body = json!({ "model": "llama-F16", "input": "The old pond" });
    let (status, text) = worker.ask("POST /v1/embeddings", &body.to_string());
    assert_eq!(status, 400);
    assert!(text.contains("pooling_type"), "{text}");
}
