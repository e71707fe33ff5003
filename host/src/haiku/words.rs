//! A minute in words, and whole words in a text.

const UNITS: [&str; 20] = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
];
const TENS: [&str; 6] = ["", "", "twenty", "thirty", "forty", "fifty"];

/// `minute` (0 to 59) in English: `forty-two`. What is past an hour wraps around.
pub fn minute_in_words(minute: u64) -> String {
    let minute = (minute % 60) as usize;
    match (minute / 10, minute % 10) {
        (0 | 1, _) => UNITS[minute].to_owned(),
        (tens, 0) => TENS[tens].to_owned(),
        (tens, units) => format!("{}-{}", TENS[tens], UNITS[units]),
    }
}

/// How often `word` (lowercase) stands in `text` as a whole word, in any case. A word is letters with
/// hyphens or apostrophes between them: "six" is in neither "sixteen" nor "twenty-six".
pub fn count_word(text: &str, word: &str) -> usize {
    let text: String = text
        .to_lowercase()
        .chars()
        .map(|c| match c {
            '\u{2010}' | '\u{2011}' => '-',
            '\u{2019}' => '\'',
            c => c,
        })
        .collect();
    text.split(|c: char| !(c.is_alphanumeric() || c == '-' || c == '\''))
        .map(|w| w.trim_matches(['-', '\'']))
        // Two hyphens are a dash, which joins no words.
        .flat_map(|w| w.split("--"))
        .filter(|w| *w == word)
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minutes_in_words() {
        for (minute, word) in [
            (0, "zero"),
            (6, "six"),
            (10, "ten"),
            (16, "sixteen"),
            (19, "nineteen"),
            (20, "twenty"),
            (21, "twenty-one"),
            (40, "forty"),
            (59, "fifty-nine"),
            (61, "one"),
        ] {
            assert_eq!(minute_in_words(minute), word);
        }
        let all: std::collections::HashSet<_> = (0..60).map(minute_in_words).collect();
        assert_eq!(all.len(), 60);
    }

    #[test]
    fn only_whole_words_count() {
        for (text, word, count) in [
            ("Six crows, six.", "six", 2),
            ("sixteen crows", "six", 0),
            ("twenty-six crows", "six", 0),
            ("At Twenty-One it rains", "twenty-one", 1),
            ("At twenty\u{2011}one it rains", "twenty-one", 1),
            ("twenty one", "twenty-one", 0),
            ("twenty-one", "twenty", 0),
            ("the clock: \"ten\"", "ten", 1),
            ("'ten'", "ten", 1),
            ("wait--ten--go", "ten", 1),
            ("ten- or so", "ten", 1),
            ("often", "ten", 0),
            ("ten's", "ten", 0),
            ("éten", "ten", 0),
            ("", "ten", 0),
        ] {
            assert_eq!(count_word(text, word), count, "{word} in {text}");
        }
    }
}
