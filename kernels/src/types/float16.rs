use super::float::*;
use super::*;

/// IEEE half precision.
pub struct F16;
float_weights!(F16, 1, 2);

impl Sixteen for F16 {
    const WEIGHTS: usize = 8;

    #[inline(always)]
    fn unpack_sixteen(v: [u32; 4]) -> [f32; 8] {
        unrolled!(8, |i| read::f16((v[i / 2] >> (16 * (i % 2))) as u16))
    }

    #[inline(always)]
    unsafe fn eight_f16(m: &Matrix, r: usize, e: usize) -> [u32; 4] {
        unsafe { ldg_v4_u32_here(m.start(r).add(16 * e)) }
    }
}
