//! The byte alphabet of GPT-2: every byte as one printable character, so that BPE over text can
//! carry arbitrary bytes. Radford et al. 2019, `bytes_to_unicode` in their `encoder.py`.

use std::sync::LazyLock;

/// Bytes that stand for themselves; the others get the characters from U+0100 on, in order.
fn is_printable(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

static CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if is_printable(byte) {
            return char::from(byte);
        }
        next += 1;
        char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
    })
});

/// The inverse: the alphabet's characters lie below U+0144.
static BYTES: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut inverse = [None; 0x144];
    for (byte, &c) in CHARS.iter().enumerate() {
        inverse[c as usize] = Some(byte as u8);
    }
    inverse
});

/// The character that stands for a byte.
pub(crate) fn char_of(byte: u8) -> char {
    CHARS[usize::from(byte)]
}

/// The byte that a character stands for.
pub(super) fn byte_of(c: char) -> Option<u8> {
    BYTES.get(c as usize).copied().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn every_byte_has_one_character_and_back() {
        for byte in 0..=255 {
            assert_eq!(byte_of(char_of(byte)), Some(byte));
        }
        assert_eq!(char_of(b' '), 'Ġ');
        assert_eq!(char_of(b'\n'), 'Ċ');
        assert_eq!(byte_of(' '), None);
        assert_eq!(byte_of('\u{144}'), None);
        assert_eq!(byte_of('語'), None);
    }

    #[test]
    fn the_same_alphabet_as_the_tokenizers_crate() {
        let ours: std::collections::HashSet<char> = CHARS.iter().copied().collect();
        assert_eq!(ours, ByteLevel::alphabet().into_iter().collect());
    }
}
