//! Quantisers: what comes back from blocks is near what went in, and as near as the block's scales allow.

use gguf::{Error, GgmlType, dequantize, quantizable, quantize};

/// Near enough to normal, the same on every run.
fn normals(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..n)
        .map(|_| ((0..12).map(|_| uniform()).sum::<f64>() - 6.0) as f32 * 0.03)
        .collect()
}

fn there_and_back(ty: GgmlType, x: &[f32]) -> Vec<f32> {
    let mut blocks = Vec::new();
    quantize(ty, x, &mut blocks).unwrap();
    assert_eq!(Some(blocks.len() as u64), ty.bytes_for(x.len() as u64));
    let mut back = vec![f32::NAN; x.len()];
    dequantize(ty, &blocks, &mut back).unwrap();
    back
}

fn nmse(x: &[f32], y: &[f32]) -> f64 {
    let pairs = x.iter().zip(y);
    let error: f64 = pairs.map(|(x, y)| f64::from(x - y).powi(2)).sum();
    error / x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>()
}

/// The greatest error that each type may have on normal values: that of gguf-py's quantiser where it has one,
/// else what is measured here.
const LIMITS: &[(GgmlType, f64)] = &[
    (GgmlType::F32, 0.0),
    (GgmlType::F16, 4.4e-8),
    (GgmlType::BF16, 2.9e-6),
    (GgmlType::Q4_0, 7.16e-3),
    (GgmlType::Q4_1, 6.04e-3),
    (GgmlType::Q5_0, 1.8e-3),
    (GgmlType::Q5_1, 1.41e-3),
    (GgmlType::Q8_0, 2.8e-5),
    (GgmlType::Q2_K, 6.9e-2),
    (GgmlType::Q3_K, 2.05e-2),
    (GgmlType::Q4_K, 5.1e-3),
    (GgmlType::Q5_K, 1.25e-3),
    (GgmlType::Q6_K, 2.75e-4),
    (GgmlType::IQ4_NL, 5.3e-3),
    (GgmlType::IQ4_XS, 5.4e-3),
    (GgmlType::TQ1_0, 0.19),
    (GgmlType::TQ2_0, 0.19),
    (GgmlType::MXFP4, 1.36e-2),
];

#[test]
fn errors_on_normal_values_are_no_greater_than_others() {
    let x = normals(256 * 64, 1);
    for ty in quantizable() {
        let error = nmse(&x, &there_and_back(ty, &x));
        let Some((_, limit)) = LIMITS.iter().find(|(t, _)| *t == ty) else {
            panic!("no limit for {ty}: {error:.2e}");
        };
        assert!(error <= *limit, "{ty}: {error}");
    }
    assert_eq!(quantizable().count(), LIMITS.len());
}

#[test]
fn values_that_levels_hold_come_back() {
    for ty in quantizable() {
        let zeros = [0.0; 256];
        assert_eq!(there_and_back(ty, &zeros), zeros, "{ty}");
        // Of one size, below what halves hold as scales, beside one that is larger than all others.
        for value in [1.0, -0.37, 3e-3] {
            let x = [value; 256];
            let error = nmse(&x, &there_and_back(ty, &x));
            assert!(error < 1e-2, "{ty} {value}: {error}");
        }
        for tiny in [1e-30, -1e-42] {
            let back = there_and_back(ty, &[tiny; 256]);
            assert!(back.iter().all(|v| v.abs() <= 2e-30), "{ty} {tiny}");
        }
        let mut x = normals(256, 5);
        x[100] = 40.0;
        let back = there_and_back(ty, &x);
        // MXFP4 has 32 and 48.
        assert!((back[100] - 40.0).abs() <= 8.0, "{ty}: {}", back[100]);
    }
}

#[test]
fn every_level_of_a_type_survives() {
    // Values on a type's own grid with an exact scale.
    for (ty, levels) in [
        (GgmlType::Q4_0, -8..=7),
        (GgmlType::Q5_0, -16..=15),
        (GgmlType::TQ1_0, -1..=1),
        (GgmlType::TQ2_0, -1..=1),
        (GgmlType::Q8_0, -127..=127),
    ] {
        let n = levels.clone().count();
        let x: Vec<f32> = (0..256)
            .map(|i| 0.25 * (levels.start() + ((i * 7 + i / 32) % n) as i32) as f32)
            .collect();
        // A block of 32 must have the ends, or its best scale is another.
        let whole = |block: &[f32]| block.iter().any(|v| *v == 0.25 * *levels.start() as f32);
        let back = there_and_back(ty, &x);
        for (x, back) in x.chunks(32).zip(back.chunks(32)).filter(|(x, _)| whole(x)) {
            assert_eq!(x, back, "{ty}");
        }
    }
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let mut out = Vec::new();
    for ty in [
        GgmlType::IQ1_S,
        GgmlType::IQ2_XS,
        GgmlType::IQ3_S,
        GgmlType::I32,
    ] {
        let error = quantize(ty, &[0.0; 256], &mut out).unwrap_err();
        assert!(matches!(error, Error::NoQuantizer { ty: t } if t == ty));
        assert!(error.to_string().contains("Q4_K"), "{error}");
    }
    let error = quantize(GgmlType::Q4_K, &[0.0; 100], &mut out).unwrap_err();
    assert!(error.to_string().contains("256"), "{error}");
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = [0.5; 256];
        x[77] = bad;
        let error = quantize(GgmlType::Q6_K, &x, &mut out).unwrap_err();
        assert!(error.to_string().contains("77"), "{error}");
    }
    let error = quantize(GgmlType::Q4_0, &[3e38; 32], &mut out).unwrap_err();
    assert!(error.to_string().contains("too large"), "{error}");
    assert!(out.is_empty());
}
