//! Values of real models' tensors against another implementation's dequantisation, bit for bit,
//! through `kigo tensor`.

use kigo_tests::{GOLDEN_MODELS, model, read_golden, run_json};
use serde::Deserialize;

#[derive(Deserialize)]
struct Dequantised {
    tensors: Vec<Slice>,
}

#[derive(Deserialize)]
struct Slice {
    model: String,
    tensor: String,
    #[serde(rename = "type")]
    kind: String,
    element_offset: u64,
    values: Vec<f64>,
}

#[test]
fn tensors_of_real_models_bit_for_bit() {
    let golden: Dequantised = read_golden("dequant.json");
    let mut compared = 0;
    for slice in golden
        .tensors
        .iter()
        .filter(|slice| GOLDEN_MODELS.contains(&slice.model.as_str()))
    {
        let file = model(&slice.model);
        let output = run_json([
            "tensor",
            file.to_str().expect("a path in UTF-8"),
            &slice.tensor,
            "--offset",
            &slice.element_offset.to_string(),
            "--count",
            &slice.values.len().to_string(),
        ]);
        let ours: Vec<f32> =
            serde_json::from_value(output["values"].clone()).expect("values are numbers");
        let label = format!("{} {} ({})", slice.model, slice.tensor, slice.kind);
        assert_eq!(ours.len(), slice.values.len(), "{label}");
        for (i, (&ours, &reference)) in ours.iter().zip(&slice.values).enumerate() {
            assert_eq!(
                ours.to_bits(),
                (reference as f32).to_bits(),
                "{label}, element {}: {ours} instead of {reference}",
                slice.element_offset + i as u64
            );
        }
        compared += 1;
    }
    assert_eq!(compared, 10, "tensors of {GOLDEN_MODELS:?}");
}
