use super::float::*;
use super::*;

/// The upper half of an f32.
pub struct Bf16;
float_weights!(Bf16, 30, 2);

impl Eight for Bf16 {
    #[inline(always)]
    unsafe fn eight(m: &Matrix, e: usize) -> [f32; 8] {
        let v = unsafe { read::words4(m, 0, e) };
        unrolled!(8, |i| {
            f32::from_bits(if i % 2 == 0 {
                v[i / 2] << 16
            } else {
                v[i / 2] & 0xffff_0000
            })
        })
    }
}
