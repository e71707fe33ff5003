//! A stream of ids as whole characters.

use std::sync::Arc;

use super::Table;

/// Turns ids into text as they come. A character whose bytes lie in several tokens appears with the
/// last of them, never in parts. Control tokens give nothing.
#[derive(Clone)]
pub struct Detokenizer {
    table: Arc<Table>,
    /// The beginning of a character that is not complete: at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl std::fmt::Debug for Detokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Detokenizer")
            .field("pending", &self.pending)
            .finish_non_exhaustive()
    }
}

impl Detokenizer {
    pub(super) fn new(table: Arc<Table>) -> Self {
        Self {
            table,
            pending: Vec::new(),
        }
    }

    /// Takes the next id; returns the text that is now certain, possibly none. Bytes that cannot
    /// become UTF-8 are shown as U+FFFD, as `String::from_utf8_lossy` would over the whole.
    pub fn push(&mut self, id: u32) -> String {
        if self.table.is_control(id) {
            return String::new();
        }
        self.pending.extend_from_slice(self.table.bytes(id));
        take_decided(&mut self.pending)
    }

    /// The stream ended: an incomplete character becomes U+FFFD.
    #[must_use]
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// Takes from `bytes` all but an incomplete last character.
fn take_decided(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut undecided = 0;
    let mut chunks = bytes.utf8_chunks().peekable();
    while let Some(chunk) = chunks.next() {
        text.push_str(chunk.valid());
        let invalid = chunk.invalid();
        if invalid.is_empty() {
            continue;
        }
        // Only the last chunk can be the beginning of a character: then it alone is "incomplete".
        let incomplete = chunks.peek().is_none()
            && std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
        if incomplete {
            undecided = invalid.len();
        } else {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
    bytes.drain(..bytes.len() - undecided);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream(pieces: &[&[u8]]) -> (Vec<String>, String) {
        let mut pending = Vec::new();
        let texts = pieces
            .iter()
            .map(|piece| {
                pending.extend_from_slice(piece);
                take_decided(&mut pending)
            })
            .collect();
        (texts, String::from_utf8_lossy(&pending).into_owned())
    }

    #[test]
    fn a_character_comes_whole() {
        let (texts, rest) = stream(&[b"a\xf0", b"\x9f", b"\x98\x80b", b"\xe5\xad"]);
        assert_eq!(texts, ["a", "", "😀b", ""]);
        assert_eq!(rest, "\u{fffd}");
    }

    #[test]
    fn what_cannot_become_a_character_is_shown_at_once() {
        assert_eq!(
            stream(&[b"\xff", b"\xf0", b"x"]).0,
            ["\u{fffd}", "", "\u{fffd}x"]
        );
        assert_eq!(
            stream(&[b"\xe5\xad", b"\xe5\xad\xa3"]).0,
            ["", "\u{fffd}季"]
        );
    }

    proptest! {
        #[test]
        fn the_cut_does_not_matter(
            pieces in prop::collection::vec(prop_oneof![
                prop::collection::vec(any::<u8>(), 0..4),
                "[a季😀é]{1,2}".prop_map(String::into_bytes),
                prop::sample::select(vec![b"\xf0".to_vec(), b"\x9f\x98".to_vec(), b"\x80".to_vec(), b"\xe5\xad".to_vec()]),
            ], 0..20)
        ) {
            let slices: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let (texts, rest) = stream(&slices);
            let whole = String::from_utf8_lossy(&pieces.concat()).into_owned();
            prop_assert_eq!(texts.concat() + &rest, whole);
        }
    }
}
