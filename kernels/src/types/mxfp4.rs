use super::*;
use gguf_codebooks::{MXFP4_VALUES, mxfp4_scale};

/// 16 more than the values.
const TABLE: [u32; 4] = grid::table(MXFP4_VALUES, 16);

quantised_weights! {
    /// `2^(e - 128) * value[q]`.
    Mxfp4, 39, block 32 of 17, planes [group 16, group 1],
    uniform true,
    load |m, g| -> ([u32; 4], u8) { (read::words4(m, 0, g), read::single(m, 1, g)) }
    levels |(qs, _)| grid::look_up(qs, TABLE),
    affine |(_, e), _| {
        let d = mxfp4_scale(e);
        Affine::centred([d, d], 16.0)
    },
    repack |s, m, b| {
        grid::write_nibbles(m, b, |i| write::nibble(s.add(1), i));
        write::single(m, 1, b, *s);
    }
}
