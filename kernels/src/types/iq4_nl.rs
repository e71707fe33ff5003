use super::*;
use gguf_codebooks::IQ4_VALUES;

/// 128 more than the values, for [`Iq4Xs`] too.
pub const TABLE: [u32; 4] = grid::table(IQ4_VALUES, 128);

quantised_weights! {
    /// `d * value[q]`.
    Iq4Nl, 20, block 32 of 18, planes [group 16, group 2],
    uniform true,
    load |m, g| -> ([u32; 4], u16) { (read::words4(m, 0, g), read::half_word(m, 1, g)) }
    levels |(qs, _)| grid::look_up(qs, TABLE),
    affine |(_, d), _| {
        let d = read::f16(d);
        Affine::centred([d, d], 128.0)
    },
    repack |s, m, b| {
        grid::write_nibbles(m, b, |i| write::nibble(s.add(2), i));
        write::half_word(m, 1, b, u16_at(s, 0));
    }
}
