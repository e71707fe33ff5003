//! What the tests of this backend share.

use crate::device::random_blocks::random_block;
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

    /// Blocks of a type, their values of ordinary size.
    pub fn weights(&mut self, ty: GgmlType, elements: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..elements / ty.block_len() {
            random_block(ty, &mut || self.bits(), &mut bytes);
        }
        assert_eq!(bytes.len() as u64, ty.bytes_for(elements as u64).unwrap());
        bytes
    }
}

/// The values of weights, by the file format's own definition.
pub fn values(ty: GgmlType, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_len()];
    gguf::dequantize(ty, bytes, &mut out).unwrap();
    out
}
