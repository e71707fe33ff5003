use super::float::*;
use super::*;

/// f32.
pub struct F32;
float_weights!(F32, 0, 4);

impl Eight for F32 {
    #[inline(always)]
    unsafe fn eight(m: &Matrix, e: usize) -> [f32; 8] {
        unsafe {
            let (a, b) = (read::words4(m, 0, 2 * e), read::words4(m, 0, 2 * e + 1));
            unrolled!(8, |i| f32::from_bits(if i < 4 { a[i] } else { b[i - 4] }))
        }
    }
}
