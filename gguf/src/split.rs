//! Models split over several files: `NAME-00001-of-0000N.gguf`, with `split.no`, `split.count` and
//! `split.tensors.count` in the metadata of each (the naming and keys of ggml's gguf-split tool).

use std::path::{Path, PathBuf};

/// The parts of a split file's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SplitName {
    dir: PathBuf,
    prefix: String,
    /// From 1.
    pub(crate) number: u32,
    pub(crate) count: u32,
}

impl SplitName {
    /// Reads `PREFIX-00001-of-00003.gguf`; none if the name is of another form.
    pub(crate) fn parse(path: &Path) -> Option<SplitName> {
        let stem = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let digits = |s: &str| {
            let plain = s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| s.parse::<u32>().ok()).flatten()
        };
        let (number, count) = (digits(number)?, digits(count)?);
        (1..=count).contains(&number).then(|| SplitName {
            dir: path.parent().unwrap_or(Path::new("")).to_owned(),
            prefix: prefix.to_owned(),
            number,
            count,
        })
    }

    /// The path of part `number` (from 1) of the same model.
    pub(crate) fn part(&self, number: u32) -> PathBuf {
        self.dir.join(format!(
            "{}-{number:05}-of-{:05}.gguf",
            self.prefix, self.count
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let name = SplitName::parse(Path::new("/m/big-q4-00002-of-00012.gguf")).unwrap();
        assert_eq!((name.number, name.count), (2, 12));
        assert_eq!(name.part(11), Path::new("/m/big-q4-00011-of-00012.gguf"));
        for other in [
            "big.gguf",
            "big-2-of-12.gguf",
            "big-00000-of-00012.gguf",
            "big-00013-of-00012.gguf",
            "big-00001-of-00002.bin",
            "big-+0001-of-00002.gguf",
        ] {
            assert_eq!(SplitName::parse(Path::new(other)), None, "{other}");
        }
    }
}
