//! `kigo quantize`: what it writes is what the quantisers give, runs, and is near the file it was made from.

use gguf::{GgmlType, Gguf, Value, Writer};
use kigo_tests::{compare, golden_dir, logits, run, run_json};
use std::path::{Path, PathBuf};

fn tiny() -> PathBuf {
    golden_dir().join("tiny/llama-F16.gguf")
}

fn quantized(input: &Path, dir: &Path, ty: &str) -> PathBuf {
    let out = dir.join(format!("{ty}.gguf"));
    let report = run_json([
        "quantize".as_ref(),
        input.as_os_str(),
        out.as_os_str(),
        "--type".as_ref(),
        ty.as_ref(),
    ]);
    assert_eq!(report["bytes"], out.metadata().expect("the new file").len());
    out
}

fn fails(args: &[&str]) -> String {
    let output = run(args, b"");
    assert_eq!(output.status.code(), Some(1), "kigo {args:?}");
    assert!(output.stdout.is_empty());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn models_stay_near_what_they_were() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let ids: Vec<u32> = (1..30).collect();
    let reference: Vec<f64> = logits(&tiny(), "cpu", true, &ids)
        .into_iter()
        .map(f64::from)
        .collect();
    // Logits of random weights move by many times what the weights do; another model is at 2.
    for (ty, limit) in [
        ("BF16", 1e-4),
        ("Q8_0", 1e-3),
        ("Q6_K", 2e-2),
        ("Q5_1", 5e-2),
        ("Q4_K", 0.1),
        ("IQ4_NL", 0.3),
        ("MXFP4", 0.5),
    ] {
        let out = quantized(&tiny(), dir.path(), ty);
        let error = compare::nmse(&logits(&out, "cpu", true, &ids), &reference);
        println!("{ty}: {error:.1e}");
        assert!(error > 0.0 && error < limit, "{ty}: {error}");
        let small = out.metadata().expect("the new file").len();
        assert!(ty == "BF16" || small < tiny().metadata().expect("the model").len() * 2 / 3);
    }
}

/// A file with a matrix of each plain type, wide enough for all blocks, and what is to stay as it is.
fn sample(path: &Path) -> Vec<f32> {
    let values: Vec<f32> = (0..768 * 3)
        .map(|i: i32| ((i * 7919) % 1009 - 504) as f32 / 1024.0)
        .collect();
    let mut writer = Writer::new();
    writer.alignment(64).expect("a power of two");
    writer.metadata("general.architecture", "llama");
    writer.metadata("general.file_type", 0u32);
    writer.metadata("x.list", Value::Array(gguf::Array::F32(vec![1.5, -2.0])));
    let tensors: [(&str, &[u64], GgmlType); 6] = [
        ("blk.0.ffn_up.weight", &[768, 3], GgmlType::F32),
        ("blk.0.ffn_down.weight", &[256, 9], GgmlType::BF16),
        ("blk.0.ffn_up_exps.weight", &[256, 3, 3], GgmlType::F16),
        ("blk.0.attn_q.weight", &[96, 24], GgmlType::F32),
        ("blk.0.ffn_gate_inp.weight", &[768, 3], GgmlType::F32),
        ("blk.0.attn_norm.weight", &[2304], GgmlType::F32),
    ];
    for (name, dims, ty) in tensors {
        writer.tensor(name, dims, ty).expect("sound dims");
    }
    let file = std::fs::File::create(path).expect("a new file");
    let mut payload = writer.begin(file).expect("writes a header");
    for (_, _, ty) in tensors {
        let mut bytes = Vec::new();
        gguf::quantize(ty, &values, &mut bytes).expect("plain floats");
        payload.write(&bytes).expect("writes data");
    }
    payload.finish().expect("all tensors");
    values
}

#[test]
fn every_tensor_is_what_the_quantisers_give() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let input = dir.path().join("in.gguf");
    sample(&input);
    let before = Gguf::open(&input).expect("the sample");
    for ty in gguf::quantizable().filter(|ty| *ty != GgmlType::F32) {
        let after = Gguf::open(quantized(&input, dir.path(), ty.name())).expect("the new file");
        assert_eq!(after.alignment(), 64);
        assert_eq!(
            after.metadata().get("x.list"),
            before.metadata().get("x.list")
        );
        assert_ne!(
            after.metadata().u32("general.file_type").expect("a number"),
            0
        );
        let mut changed = 0;
        for tensor in before.tensors() {
            let new = after.require(tensor.name()).expect("the tensor");
            assert_eq!(new.dims(), tensor.dims());
            let mut values = vec![0.0; tensor.elements() as usize];
            tensor
                .dequantize_into(0, &mut values)
                .expect("plain floats");
            let mut blocks = Vec::new();
            gguf::quantize(new.ty(), &values, &mut blocks).expect("a quantiser");
            assert_eq!(new.data(), blocks, "{ty} {}", tensor.name());
            let kept = tensor.dims().len() == 1 || tensor.name().contains("gate_inp");
            if kept {
                assert_eq!(new.ty(), tensor.ty());
            } else if tensor.row_len().is_multiple_of(ty.block_len() as u64) {
                assert_eq!(new.ty(), ty);
                changed += 1;
            } else {
                assert_eq!(new.ty().block_len(), 32, "{ty} {}", tensor.name());
            }
        }
        assert!(changed >= 3, "{ty}");
    }
}

#[test]
fn what_cannot_be_done_is_said_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let (input, out) = (path("in.gguf"), path("out.gguf"));
    sample(Path::new(&input));
    for (ty, word) in [
        ("IQ2_XS", "no quantiser"),
        ("Q9_Z", "no such type"),
        ("f32", "Q4_K"),
    ] {
        let output = run(["quantize", &input, &out, "--type", ty], b"");
        assert_eq!(output.status.code(), Some(2), "{ty}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(word), "{ty}: {said}");
    }
    let small = quantized(Path::new(&input), dir.path(), "Q8_0");
    let small = small.to_str().expect("UTF-8");
    let said = fails(&["quantize", small, &out, "--type", "Q4_0"]);
    assert!(
        said.contains("blk.0.ffn_up.weight") && said.contains("Q8_0"),
        "{said}"
    );
    let said = fails(&["quantize", &input, small, "--type", "Q4_0"]);
    assert!(said.contains("--force"), "{said}");
    // The first tensor's data begin with a value that is no number.
    let mut bytes = std::fs::read(&input).expect("the sample");
    let start = Gguf::open(&input)
        .expect("the sample")
        .tensors()
        .next()
        .expect("one")
        .file_offset();
    bytes[start as usize..start as usize + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    let damaged = path("damaged.gguf");
    std::fs::write(&damaged, bytes).expect("writes a file");
    let said = fails(&["quantize", &damaged, &out, "--type", "Q4_0"]);
    assert!(
        said.contains("blk.0.ffn_up.weight") && said.contains("NaN"),
        "{said}"
    );
    let mut names: Vec<_> = std::fs::read_dir(dir.path())
        .expect("the folder")
        .map(|e| e.expect("an entry").file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["Q8_0.gguf", "damaged.gguf", "in.gguf"]);
}
