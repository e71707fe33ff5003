use super::float::*;
use super::*;

/// f32.
pub struct F32;
float_weights!(F32, 0, 4);

impl Sixteen for F32 {
    const WEIGHTS: usize = 4;

    #[inline(always)]
    fn unpack_sixteen(v: [u32; 4]) -> [f32; 8] {
        unrolled!(8, |i| if i < 4 { f32::from_bits(v[i]) } else { 0.0 })
    }
}
