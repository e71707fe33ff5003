//! Random weights of any type, for the tests of both backends.

use gguf::GgmlType;
use gguf::blocks::MAX_LEN;

/// The greatest magnitude that a block's values should have: between these.
const PEAK: std::ops::Range<f32> = 0.02..4.0;

/// Appends one block of `ty`. All of its bits are random but those of plain floats, whose values are
/// between -1 and 1: where a type keeps its scales need not be known, as blocks are drawn until the
/// values are of ordinary size.
///
/// # Panics
/// The type cannot be dequantised.
pub(super) fn random_block(ty: GgmlType, bits: &mut dyn FnMut() -> u64, out: &mut Vec<u8>) {
    let value = (bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
    match ty {
        GgmlType::F32 => return out.extend(value.to_le_bytes()),
        GgmlType::F16 => return out.extend(half::f16::from_f32(value).to_le_bytes()),
        GgmlType::BF16 => return out.extend(half::bf16::from_f32(value).to_le_bytes()),
        _ => {}
    }
    let start = out.len();
    let mut values = [0.0; MAX_LEN];
    let values = &mut values[..ty.block_len()];
    loop {
        out.extend((0..ty.block_bytes()).map(|_| (bits() >> 32) as u8));
        if let Err(error) = gguf::dequantize(ty, &out[start..], values) {
            panic!("no random blocks of type {ty}: {error}");
        }
        let peak = values.iter().fold(0.0, |peak: f32, v| {
            // Infinite and undefined values are too large.
            if v.is_finite() {
                peak.max(v.abs())
            } else {
                f32::INFINITY
            }
        });
        if PEAK.contains(&peak) {
            return;
        }
        out.truncate(start);
    }
}
