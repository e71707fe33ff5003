//! Dequantisation against values of an independent implementation, bit for bit.

use std::collections::BTreeSet;

use gguf::{Error, GgmlType, blocks};
use serde_json::Value;

fn golden() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/dequant.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn hex(s: &str) -> Vec<u8> {
    (0..s.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap())
        .collect()
}

fn values(case: &Value) -> Vec<f32> {
    case["values"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap() as f32)
        .collect()
}

#[test]
fn every_supported_type_equals_the_reference_bit_for_bit() {
    let golden = golden();
    let mut covered = BTreeSet::new();
    for case in ["tensors", "synthetic"]
        .iter()
        .flat_map(|set| golden[set].as_array().unwrap())
    {
        let id = case["ggml_type"].as_u64().unwrap() as u32;
        let ty = GgmlType::from_u32(id).unwrap_or_else(|| panic!("type {id}"));
        assert_eq!(ty.name(), case["type"].as_str().unwrap());
        if let (Some(len), Some(bytes)) = (case["block_size"].as_u64(), case["type_size"].as_u64())
        {
            assert_eq!(
                (ty.block_len() as u64, ty.block_bytes() as u64),
                (len, bytes),
                "{ty}"
            );
        }
        let (raw, expected) = (hex(case["raw_hex"].as_str().unwrap()), values(case));
        let mut out = vec![f32::NAN; expected.len()];
        let result = gguf::dequantize(ty, &raw, &mut out);
        if !blocks::SUPPORTED.contains(&ty) {
            assert!(matches!(result, Err(Error::UnsupportedType { ty: t }) if t == ty));
            assert!(result.unwrap_err().to_string().contains(ty.name()));
            continue;
        }
        result.unwrap();
        for (i, (got, want)) in out.iter().zip(&expected).enumerate() {
            assert_eq!(
                got.to_bits(),
                want.to_bits(),
                "{ty} element {i}: {got} is not {want}"
            );
        }
        covered.insert(ty);
    }
    let all: BTreeSet<_> = blocks::SUPPORTED.iter().copied().collect();
    assert_eq!(covered, all, "a supported type has no golden values");
}

#[test]
fn every_half_and_bfloat_is_exact() {
    for bits in 0..=u16::MAX {
        let (half, bf) = (
            blocks::F16::from_bits(bits).to_f32(),
            f32::from_bits(u32::from(bits) << 16),
        );
        // The value by the definition of the format, in f64.
        let (exp, frac) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
        let magnitude = match exp {
            0 => frac * 2f64.powi(-24),
            31 if frac == 0.0 => f64::INFINITY,
            31 => f64::NAN,
            _ => (1024.0 + frac) * 2f64.powi(exp - 25),
        };
        let want = if bits >> 15 == 1 {
            -magnitude
        } else {
            magnitude
        };
        assert!(
            f64::from(half).to_bits() == want.to_bits() || (half.is_nan() && want.is_nan()),
            "{bits:04x}"
        );
        let mut out = [0.0];
        gguf::dequantize(GgmlType::BF16, &bits.to_le_bytes(), &mut out).unwrap();
        assert!(out[0].to_bits() == bf.to_bits(), "{bits:04x}");
    }
}

#[test]
fn lengths_must_match() {
    let mut out = [0.0; 32];
    for bytes in [0, 17, 19, 36] {
        let e = gguf::dequantize(GgmlType::Q4_0, &vec![0; bytes], &mut out).unwrap_err();
        assert!(matches!(e, Error::Buffer { .. }), "{bytes} bytes: {e}");
    }
    gguf::dequantize(GgmlType::Q4_0, &[0; 18], &mut out).unwrap();
    gguf::dequantize(GgmlType::Q4_0, &[], &mut []).unwrap();
}
