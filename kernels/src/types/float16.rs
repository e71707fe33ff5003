use super::float::*;
use super::*;

/// IEEE half precision.
pub struct F16;
float_weights!(F16, 1, 2);

impl Eight for F16 {
    #[inline(always)]
    unsafe fn eight(m: &Matrix, e: usize) -> [f32; 8] {
        let v = unsafe { read::words4(m, 0, e) };
        unrolled!(8, |i| read::f16((v[i / 2] >> (16 * (i % 2))) as u16))
    }
}
