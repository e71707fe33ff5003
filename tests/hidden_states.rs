//! Hidden states, which embeddings are made of: the output matrix makes the logits of them.

use kigo::device::{Batch, Span};
use kigo::gguf::Gguf;
use kigo::model::{DeviceChoice, LoadOptions, load};
use kigo_tests::golden_dir;
use std::sync::Arc;

/// The greatest difference between the logits of the last row and the output matrix times its hidden state.
fn difference(device: DeviceChoice, tokens: &[u32]) -> f32 {
    let file = Gguf::open(golden_dir().join("tiny/llama-F16.gguf")).expect("a tiny model");
    let file = Arc::new(file);
    let options = LoadOptions {
        device,
        exact: true,
        ..LoadOptions::default()
    };
    let mut runner = load(&file, &options, &mut |_| {}).expect("a runner");
    let n = tokens.len();
    let batch = Batch {
        tokens: tokens.to_vec(),
        spans: vec![Span {
            start: 0,
            len: n,
            past: 0,
            blocks: vec![0, 1],
            ..Span::default()
        }],
        outputs: vec![n - 1],
        ..Batch::default()
    };
    runner.forward(&batch).expect("a step");
    let logits = runner.logits(0).expect("logits");
    let hidden = runner.hidden(n - 1).expect("a hidden state");
    let head = match file.tensor("output.weight") {
        Some(head) => head,
        None => file.require("token_embd.weight").expect("an embedding"),
    };
    let mut row = vec![0.0; hidden.len()];
    let mut worst = 0f32;
    for (i, logit) in logits.iter().enumerate() {
        head.dequantize_row(i as u64, &mut row).expect("a row");
        let product: f32 = row.iter().zip(&hidden).map(|(a, b)| a * b).sum();
        worst = worst.max((product - logit).abs());
    }
    worst
}

#[test]
fn the_output_matrix_makes_logits_of_hidden_states() {
    for device in [DeviceChoice::Cpu, DeviceChoice::Emulated] {
        for tokens in [&[5u32][..], &[3, 1, 4, 1, 5, 9, 2]] {
            let worst = difference(device, tokens);
            assert!(worst < 1e-3, "{device:?}, {} rows: {worst}", tokens.len());
        }
    }
}
