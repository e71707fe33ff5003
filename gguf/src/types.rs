//! Every tensor type that ggml has given a number, with its block length and size.

use std::fmt;

macro_rules! ggml_types {
    ($($(#[$doc:meta])* $name:ident = $id:literal, $len:literal, $bytes:literal;)*) => {
        /// The type of a tensor's data, by ggml's number.
        ///
        /// Data is a row of blocks: [`block_len`](GgmlType::block_len) elements in
        /// [`block_bytes`](GgmlType::block_bytes) bytes. Plain types are blocks of one element. All
        /// types that ggml has assigned are known here, so that any file can be listed; the ones
        /// in [`crate::blocks`] can be dequantised. Source: `enum ggml_type` in ggml.h, block
        /// sizes as ggml's `docs/gguf.md` and its block structs give them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        #[allow(non_camel_case_types)]
        pub enum GgmlType {
            $($(#[$doc])* $name = $id,)*
        }

        impl GgmlType {
            /// Every known type, by ascending number.
            pub const ALL: &[GgmlType] = &[$(GgmlType::$name),*];

            /// The type with this number; none for removed and unassigned numbers.
            pub const fn from_u32(id: u32) -> Option<GgmlType> {
                match id {
                    $($id => Some(GgmlType::$name),)*
                    _ => None,
                }
            }

            /// ggml's name in capitals: "Q4_K".
            pub const fn name(self) -> &'static str {
                match self {
                    $(GgmlType::$name => stringify!($name),)*
                }
            }

            /// Elements in a block.
            pub const fn block_len(self) -> usize {
                match self {
                    $(GgmlType::$name => $len,)*
                }
            }

            /// Bytes in a block.
            pub const fn block_bytes(self) -> usize {
                match self {
                    $(GgmlType::$name => $bytes,)*
                }
            }
        }
    };
}

ggml_types! {
    F32 = 0, 1, 4;
    F16 = 1, 1, 2;
    Q4_0 = 2, 32, 18;
    Q4_1 = 3, 32, 20;
    Q5_0 = 6, 32, 22;
    Q5_1 = 7, 32, 24;
    Q8_0 = 8, 32, 34;
    /// Activations only: ggml makes it while computing and writes it to no file.
    Q8_1 = 9, 32, 36;
    Q2_K = 10, 256, 84;
    Q3_K = 11, 256, 110;
    Q4_K = 12, 256, 144;
    Q5_K = 13, 256, 176;
    Q6_K = 14, 256, 210;
    /// Activations only, like `Q8_1`.
    Q8_K = 15, 256, 292;
    IQ2_XXS = 16, 256, 66;
    IQ2_XS = 17, 256, 74;
    IQ3_XXS = 18, 256, 98;
    IQ1_S = 19, 256, 50;
    IQ4_NL = 20, 32, 18;
    IQ3_S = 21, 256, 110;
    IQ2_S = 22, 256, 82;
    IQ4_XS = 23, 256, 136;
    I8 = 24, 1, 1;
    I16 = 25, 1, 2;
    I32 = 26, 1, 4;
    I64 = 27, 1, 8;
    F64 = 28, 1, 8;
    IQ1_M = 29, 256, 56;
    BF16 = 30, 1, 2;
    TQ1_0 = 34, 256, 54;
    TQ2_0 = 35, 256, 66;
    MXFP4 = 39, 32, 17;
    NVFP4 = 40, 64, 36;
    Q1_0 = 41, 128, 18;
    Q2_0 = 42, 64, 18;
}

impl GgmlType {
    /// Bytes of `elements` elements: none if they are no whole number of blocks, or too many.
    pub const fn bytes_for(self, elements: u64) -> Option<u64> {
        let len = self.block_len() as u64;
        if !elements.is_multiple_of(len) {
            return None;
        }
        (elements / len).checked_mul(self.block_bytes() as u64)
    }

    /// Bits an element takes, scales included: 4.5 for Q4_K.
    pub fn bits_per_element(self) -> f64 {
        self.block_bytes() as f64 * 8.0 / self.block_len() as f64
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl serde::Serialize for GgmlType {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip() {
        for &ty in GgmlType::ALL {
            assert_eq!(GgmlType::from_u32(ty as u32), Some(ty));
        }
        for removed in [4, 5, 31, 32, 33, 36, 37, 38, 43, u32::MAX] {
            assert_eq!(GgmlType::from_u32(removed), None);
        }
    }

    #[test]
    fn sizes_of_partial_blocks_and_overflows_are_none() {
        assert_eq!(GgmlType::Q4_K.bytes_for(512), Some(288));
        assert_eq!(GgmlType::Q4_K.bytes_for(500), None);
        assert_eq!(GgmlType::F32.bytes_for(u64::MAX), None);
    }
}
