//! What the tests of this backend share.

use gguf::GgmlType;

/// Pseudo-random numbers (splitmix64), the same on every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Uniform in `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Near enough to normal: mean 0, variance 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f64 = (0..12)
            .map(|_| (self.bits() >> 11) as f64 / (1u64 << 53) as f64)
            .sum();
        (sum - 6.0) as f32
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// Blocks of a type with random bits and scales of ordinary size, or plain values.
    pub fn weights(&mut self, ty: GgmlType, elements: usize) -> Vec<u8> {
        let blocks = elements / ty.block_len();
        assert_eq!(blocks * ty.block_len(), elements);
        let halves: &[usize] = match ty {
            GgmlType::F32 => {
                return (0..elements)
                    .flat_map(|_| self.normal().to_le_bytes())
                    .collect();
            }
            GgmlType::BF16 => {
                let bits = |x: f32| (x.to_bits() >> 16) as u16;
                return (0..elements)
                    .flat_map(|_| bits(self.normal()).to_le_bytes())
                    .collect();
            }
            GgmlType::F16 | GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => &[0],
            GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
            GgmlType::Q2_K => &[80, 82],
            GgmlType::Q3_K => &[108],
            GgmlType::Q6_K => &[208],
            other => panic!("no random blocks of type {other}"),
        };
        let mut bytes: Vec<u8> = (0..blocks * ty.block_bytes())
            .map(|_| self.bits() as u8)
            .collect();
        for block in bytes.chunks_exact_mut(ty.block_bytes()) {
            for &at in halves {
                let scale = half::f16::from_f32(self.normal() * 0.05);
                block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        bytes
    }
}

/// The values of weights, by the file format's own definition.
pub fn values(ty: GgmlType, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_len()];
    gguf::dequantize(ty, bytes, &mut out).unwrap();
    out
}
