//! SentencePiece's character map: which characters a text is normalised to before it is cut into pieces.
//!
//! `tokenizer.ggml.precompiled_charsmap` is what a SentencePiece model calls `precompiled_charsmap`: the
//! size of a trie in bytes (u32), the trie, then the replacements, each ended by a zero byte. The trie
//! is a double array as Darts-clone writes it, from the bytes of a text to the offset of what replaces
//! them.
//!
//! Own code: the reader that the `tokenizers` crate uses takes the shortest match where SentencePiece
//! takes the longest, and panics on a map whose offsets lead out of it.

/// Bit of a unit that holds an offset of a replacement rather than a transition.
const IS_VALUE: u32 = 1 << 31;

/// Rules of replacement, by the longest match from the left.
pub(super) struct Charsmap {
    units: Vec<u32>,
    replacements: String,
}

impl Charsmap {
    /// Reads a map.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        let Some((size, rest)) = bytes.split_first_chunk() else {
            return Err(format!(
                "is {} bytes long, shorter than its header of 4",
                bytes.len()
            ));
        };
        let size = u32::from_le_bytes(*size) as usize;
        if !size.is_multiple_of(4) || size == 0 || size > rest.len() {
            return Err(format!(
                "says that its trie has {size} bytes, expected a multiple of 4 up to the {} that follow",
                rest.len()
            ));
        }
        let (trie, replacements) = rest.split_at(size);
        let replacements = std::str::from_utf8(replacements).map_err(|e| {
            format!(
                "holds replacements that are not valid UTF-8 at byte {}",
                4 + size + e.valid_up_to()
            )
        })?;
        let units: Vec<u32> = trie
            .chunks_exact(4)
            .map(|unit| u32::from_le_bytes([unit[0], unit[1], unit[2], unit[3]]))
            .collect();
        for (i, unit) in units.iter().enumerate() {
            let offset = (unit & !IS_VALUE) as usize;
            if unit & IS_VALUE != 0
                && (offset >= replacements.len() || !replacements.is_char_boundary(offset))
            {
                return Err(format!(
                    "leads in unit {i} to byte {offset} of its replacements, where none of the {} bytes begins one",
                    replacements.len()
                ));
            }
        }
        Ok(Self {
            units,
            replacements: replacements.to_owned(),
        })
    }

    /// The text with all rules applied.
    pub fn normalise(&self, text: &str) -> String {
        let mut normal = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let replaced = self.longest(rest.as_bytes()).and_then(|(len, offset)| {
                // A damaged trie might match a part of a character.
                let after = rest.get(len..)?;
                let replacement = self.replacements.get(offset..)?;
                Some((after, replacement.split('\0').next()?))
            });
            rest = if let Some((after, replacement)) = replaced {
                normal.push_str(replacement);
                after
            } else {
                normal.push(first);
                &rest[first.len_utf8()..]
            };
        }
        normal
    }

    /// Length of the longest match at the beginning of `text`, and the offset of its replacement.
    fn longest(&self, text: &[u8]) -> Option<(usize, usize)> {
        let unit = |at: usize| self.units.get(at).copied();
        // Units: 8 bits of label, a bit whether a value follows, then how far away children are.
        let children = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
        let mut found = None;
        let mut at = children(unit(0)?);
        for (i, &byte) in text.iter().enumerate() {
            at ^= usize::from(byte);
            // Zero is the label of values.
            let Some(here) =
                unit(at).filter(|u| byte != 0 && u & (IS_VALUE | 0xff) == u32::from(byte))
            else {
                break;
            };
            at ^= children(here);
            if here & (1 << 8) != 0
                && let Some(value) = unit(at)
            {
                found = Some((i + 1, (value & !IS_VALUE) as usize));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A trie of one transition, from `from` to `to`.
    fn map(from: u8, to: &str) -> Vec<u8> {
        let mut units = vec![0u32; 512];
        // The root's children lie at 256 ^ byte, that child's value at 511.
        units[0] = 256 << 10;
        let child = 256 ^ usize::from(from);
        units[child] = u32::from(from) | 1 << 8 | ((child as u32 ^ 511) << 10);
        units[511] = IS_VALUE;
        let mut bytes = (4 * units.len() as u32).to_le_bytes().to_vec();
        bytes.extend(units.iter().flat_map(|u| u.to_le_bytes()));
        bytes.extend(to.bytes());
        bytes.push(0);
        bytes
    }

    #[test]
    fn characters_are_replaced() {
        let map = Charsmap::read(&map(b'a', "é!")).unwrap();
        assert_eq!(map.normalise("banana 季\0"), "bé!né!né! 季\0");
        assert_eq!(map.normalise(""), "");
    }

    #[test]
    fn damaged_maps_are_refused_or_match_nothing() {
        let error = |bytes: &[u8]| Charsmap::read(bytes).err().unwrap();
        assert!(error(&[1, 2]).contains("2 bytes long"));
        assert!(error(&[7, 0, 0, 0, 1, 2, 3, 4]).contains("trie has 7 bytes"));
        assert!(error(&[0xff; 12]).contains("4294967295"));
        let mut bytes = map(b'a', "é!");
        bytes[4 + 511 * 4] = 1;
        assert!(error(&bytes).contains("unit 511 to byte 1"));
        bytes[4 + 511 * 4] = 9;
        assert!(error(&bytes).contains("byte 9 of its replacements"));
        // Transitions out of the array.
        let mut bytes = map(b'a', "x");
        bytes[4..8].fill(0x7f);
        assert_eq!(Charsmap::read(&bytes).unwrap().normalise("aé"), "aé");
    }
}
