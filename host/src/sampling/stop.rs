//! Stop strings, matched across token boundaries.
//!
//! Text that may yet become a stop string is held back until it is decided, so that no part of a stop
//! string ever reaches the client, and nothing is held back longer than needed.

/// Watches a stream of text for the first stop string.
///
/// The match that ends first wins; of those that end at the same place, the longest. The outcome
/// therefore does not depend on how the text is cut into pieces.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text received and not yet given out: always a proper prefix of some stop string.
    held: String,
    stopped: bool,
}

/// What a [`StopMatcher::push`] lets through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Emit {
    /// Text that can be shown; possibly empty.
    pub text: String,
    /// The index of the stop string that was reached, as given to [`StopMatcher::new`].
    pub stopped: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these stop strings. Empty ones never match.
    pub fn new<S: Into<String>>(stops: impl IntoIterator<Item = S>) -> Self {
        Self {
            stops: stops.into_iter().map(Into::into).collect(),
            held: String::new(),
            stopped: false,
        }
    }

    /// Takes the next piece of text. After a stop string was reached, everything is dropped.
    pub fn push(&mut self, text: &str) -> Emit {
        if self.stopped {
            return Emit::default();
        }
        self.held.push_str(text);
        if let Some((start, index)) = self.first_match() {
            self.stopped = true;
            self.held.truncate(start);
            return Emit {
                text: std::mem::take(&mut self.held),
                stopped: Some(index),
            };
        }
        let keep_from = self.undecided_from();
        let undecided = self.held.split_off(keep_from);
        Emit {
            text: std::mem::replace(&mut self.held, undecided),
            stopped: None,
        }
    }

    /// The stream ended: gives out what was held back.
    #[must_use]
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the winning match starts, and its stop string.
    fn first_match(&self) -> Option<(usize, usize)> {
        self.stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(i, stop)| {
                let start = self.held.find(stop.as_str())?;
                Some((start + stop.len(), start, i))
            })
            .min()
            .map(|(_, start, i)| (start, i))
    }

    /// The start of the longest suffix that begins some stop string.
    fn undecided_from(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let earliest = self.held.len().saturating_sub(longest.saturating_sub(1));
        (earliest..self.held.len())
            .filter(|&at| self.held.is_char_boundary(at))
            .find(|&at| self.stops.iter().any(|s| s.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<usize>, String) {
        let mut m = StopMatcher::new(stops.iter().copied());
        let mut texts = Vec::new();
        let mut stopped = None;
        for piece in pieces {
            let emit = m.push(piece);
            texts.push(emit.text);
            stopped = stopped.or(emit.stopped);
        }
        (texts, stopped, m.finish())
    }

    #[test]
    fn without_stops_everything_passes_at_once() {
        let (texts, stopped, rest) = run(&[], &["ab", "", "c"]);
        assert_eq!(texts, ["ab", "", "c"]);
        assert_eq!((stopped, rest.as_str()), (None, ""));
        assert_eq!(run(&[""], &["ab"]).0, ["ab"]);
    }

    #[test]
    fn a_stop_across_pieces_is_found_and_never_shown() {
        let (texts, stopped, rest) = run(&["END"], &["say E", "N", "D more", "x"]);
        assert_eq!(texts, ["say ", "", "", ""]);
        assert_eq!((stopped, rest.as_str()), (Some(0), ""));
    }

    #[test]
    fn held_text_is_given_out_when_it_cannot_match() {
        let (texts, stopped, rest) = run(&["\n\nUser:"], &["hi\n", "\nUs", "ual\n"]);
        assert_eq!(texts, ["hi", "", "\n\nUsual"]);
        assert_eq!((stopped, rest.as_str()), (None, "\n"));
    }

    #[test]
    fn a_failed_start_may_contain_the_next() {
        let (texts, stopped, _) = run(&["aab"], &["a", "a", "a", "b"]);
        assert_eq!(texts.concat(), "a");
        assert_eq!(stopped, Some(0));
    }

    #[test]
    fn the_first_to_end_wins_then_the_longest() {
        assert_eq!(
            run(&["abcd", "bc"], &["xabcd"]),
            (vec!["xa".into()], Some(1), String::new())
        );
        assert_eq!(
            run(&["c", "abc"], &["xabc"]),
            (vec!["x".into()], Some(1), String::new())
        );
    }

    #[test]
    fn characters_of_several_bytes() {
        let (texts, stopped, _) = run(&["季語"], &["春の季", "節", "季", "語。"]);
        assert_eq!(texts, ["春の", "季節", "", ""]);
        assert_eq!(stopped, Some(0));
    }

    /// All text and all stops at once, the definition itself.
    fn reference(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in (0..=text.len()).filter(|&e| text.is_char_boundary(e)) {
            let mut hits: Vec<(usize, usize)> = stops
                .iter()
                .enumerate()
                .filter(|(_, s)| !s.is_empty() && text[..end].ends_with(s.as_str()))
                .map(|(i, s)| (end - s.len(), i))
                .collect();
            hits.sort_unstable();
            if let Some(&(start, i)) = hits.first() {
                return (text[..start].into(), Some(i));
            }
        }
        (text.into(), None)
    }

    proptest! {
        #[test]
        fn the_cut_into_pieces_does_not_matter(
            pieces in prop::collection::vec("[abé]{0,5}", 0..12),
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
        ) {
            let mut m = StopMatcher::new(stops.clone());
            let mut shown = String::new();
            let mut stopped = None;
            for piece in &pieces {
                let emit = m.push(piece);
                shown.push_str(&emit.text);
                stopped = stopped.or(emit.stopped);
                // What is held back must be able to become a stop string, else it is late.
                prop_assert!(m.held.is_empty() || stops.iter().any(|s| s.len() > m.held.len() && s.starts_with(&m.held)));
            }
            shown.push_str(&m.finish());
            prop_assert_eq!((shown, stopped), reference(&stops, &pieces.concat()));
        }
    }
}
