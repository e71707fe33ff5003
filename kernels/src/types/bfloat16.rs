use super::float::*;
use super::*;

/// The upper half of an f32.
pub struct Bf16;
float_weights!(Bf16, 30, 2);

impl Sixteen for Bf16 {
    const WEIGHTS: usize = 8;

    #[inline(always)]
    fn unpack_sixteen(v: [u32; 4]) -> [f32; 8] {
        unrolled!(8, |i| {
            f32::from_bits(if i % 2 == 0 {
                v[i / 2] << 16
            } else {
                v[i / 2] & 0xffff_0000
            })
        })
    }
}
