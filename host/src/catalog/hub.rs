//! Models from the Hugging Face hub: `hf:OWNER/REPO`, `hf:OWNER/REPO:FILE`, `hf:OWNER/REPO:QUANT`.
//!
//! The crate `hf-hub` does the talking. Its cache is the one that the hub's other tools share
//! (`HF_HOME`, `HF_HUB_CACHE`), its endpoint that of `HF_ENDPOINT`, its token that of `HF_TOKEN` or of
//! `huggingface-cli login`; with `HF_HUB_OFFLINE` nothing but the cache is looked at. An interrupted
//! download goes on where it stopped, and a file counts only once its sha256 is right.

use std::io::Read;
use std::path::{Path, PathBuf};

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo};
use sha2::{Digest, Sha256};

use super::{Error, Event, Listed, State};

/// What models from the hub are called by.
pub const PREFIX: &str = "hf:";

/// A file, or files, of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reference {
    /// `OWNER/REPO`.
    repository: String,
    /// A file's name, or a type of weights that is part of one.
    pick: Option<String>,
}

/// A type of weights that is taken where the user names none and there are several.
const USUAL: &str = "Q4_K_M";

impl Reference {
    /// `text` as the user typed it, [`PREFIX`] included.
    fn parse(text: &str) -> Result<Reference, Error> {
        let bad = || Error::Hub {
            model: text.to_owned(),
            what: "expected hf:OWNER/REPO, hf:OWNER/REPO:FILE or hf:OWNER/REPO:QUANT".into(),
        };
        let rest = text.strip_prefix(PREFIX).ok_or_else(bad)?;
        let (repository, pick) = match rest.split_once(':') {
            Some((repository, pick)) => (repository, Some(pick)),
            None => (rest, None),
        };
        let name = |part: &str| {
            let known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(known)
        };
        let named = repository
            .split_once('/')
            .is_some_and(|(owner, repo)| name(owner) && name(repo));
        let inside = |pick: &str| {
            !pick.is_empty() && pick.split('/').all(|part| !part.is_empty() && part != "..")
        };
        if !named || !pick.is_none_or(inside) {
            return Err(bad());
        }
        Ok(Reference {
            repository: repository.to_owned(),
            pick: pick.map(str::to_owned),
        })
    }

    fn error(&self, what: String) -> Error {
        let pick = self
            .pick
            .as_ref()
            .map_or(String::new(), |p| format!(":{p}"));
        Error::Hub {
            model: format!("{PREFIX}{}{pick}", self.repository),
            what,
        }
    }

    /// The files of a repository that make up the model, in order: one, or all parts of one.
    fn choose(&self, files: &[String]) -> Result<Vec<String>, Error> {
        // The vision part of a model that sees is no model.
        let projector = |file: &str| file.to_lowercase().contains("mmproj");
        let mut models: Vec<&String> = files
            .iter()
            .filter(|file| file.to_lowercase().ends_with(".gguf") && !projector(file))
            .collect();
        models.sort();
        if models.is_empty() {
            return Err(self.error("the repository has no GGUF files".into()));
        }
        // Of a split file, the first part stands for all.
        let first = |file: &&String| split(file).is_none_or(|(_, number, _)| number == 1);
        let firsts: Vec<&String> = models.iter().copied().filter(first).collect();
        let with = |quant: &str| -> Vec<&String> {
            let has = |file: &&&String| has_quant(file, quant);
            firsts.iter().filter(has).copied().collect()
        };
        let found = match &self.pick {
            Some(pick) if pick.to_lowercase().ends_with(".gguf") => {
                files.iter().filter(|file| *file == pick).collect()
            }
            Some(quant) => with(quant),
            None if firsts.len() == 1 => firsts.clone(),
            None => with(USUAL),
        };
        let [file] = found[..] else {
            let list: Vec<&str> = firsts.iter().map(|file| file.as_str()).collect();
            let which = match found.len() {
                0 => "no file of the repository is meant",
                _ => "several files of the repository could be meant",
            };
            return Err(self.error(format!("{which}; name one of them: {}", list.join(", "))));
        };
        let Some((stem, _, count)) = split(file) else {
            return Ok(vec![file.clone()]);
        };
        (1..=count)
            .map(|number| {
                let part = format!("{stem}-{number:05}-of-{count:05}.gguf");
                match files.contains(&part) {
                    true => Ok(part),
                    false => Err(self.error(format!("the repository lacks {part}"))),
                }
            })
            .collect()
    }
}

/// Stem, number and count of a part of a split file, `STEM-00001-of-00003.gguf`.
fn split(file: &str) -> Option<(&str, usize, usize)> {
    let rest = file.strip_suffix(".gguf")?;
    let (rest, count) = rest.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let number_of = |text: &str| (text.len() == 5).then(|| text.parse().ok()).flatten();
    Some((stem, number_of(number)?, number_of(count)?))
}

/// Whether a file's name, or its folder's, has `quant` as a word of it.
fn has_quant(file: &str, quant: &str) -> bool {
    let (file, quant) = (file.to_lowercase(), quant.to_lowercase());
    let ends = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && c != '_');
    file.match_indices(&quant).any(|(at, _)| {
        ends(file[..at].chars().next_back()) && ends(file[at + quant.len()..].chars().next())
    })
}

/// The hub as the environment describes it.
struct Hub {
    cache: Cache,
    /// `None` where nothing but the cache is to be looked at.
    api: Option<Api>,
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Where the hub's tools keep what they downloaded.
fn cache() -> Cache {
    match variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE")) {
        Some(dir) => Cache::new(dir.into()),
        None => Cache::from_env(),
    }
}

impl Hub {
    fn from_env() -> Result<Hub, ApiError> {
        let cache = cache();
        let offline = variable("HF_HUB_OFFLINE")
            .is_some_and(|v| matches!(v.to_lowercase().as_str(), "1" | "on" | "yes" | "true"));
        if offline {
            return Ok(Hub { cache, api: None });
        }
        let token = variable("HF_TOKEN")
            .or_else(|| variable("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| cache.token());
        let api = ApiBuilder::from_env()
            .with_cache_dir(cache.path().clone())
            .with_token(token)
            .with_progress(false)
            .with_retries(3)
            .with_user_agent("kigo", env!("CARGO_PKG_VERSION"))
            .build()?;
        Ok(Hub {
            cache,
            api: Some(api),
        })
    }
}

/// The names of the GGUF files of a repository's current snapshot in the cache.
fn cached_files(cache: &Cache, repository: &str) -> Vec<String> {
    let mut folder = cache.path().clone();
    folder.push(Repo::model(repository.to_owned()).folder_name());
    let Ok(commit) = std::fs::read_to_string(folder.join("refs/main")) else {
        return Vec::new();
    };
    let snapshot = folder.join("snapshots").join(commit.trim());
    let mut files = Vec::new();
    gguf_files(&snapshot, &snapshot, &mut files);
    files
}

/// GGUF files below `dir`, by their paths from `top`.
fn gguf_files(top: &Path, dir: &Path, files: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        // Through links, of which a snapshot consists; one that leads nowhere is no file.
        let Ok(found) = std::fs::metadata(&path) else {
            continue;
        };
        if found.is_dir() {
            gguf_files(top, &path, files);
        } else if path.extension().is_some_and(|e| e == "gguf")
            && let Some(name) = path.strip_prefix(top).ok().and_then(Path::to_str)
        {
            files.push(name.to_owned());
        }
    }
}

/// The file behind a reference to the hub (of a split model, its first part), downloaded as far as it is not
/// in the cache yet.
///
/// # Errors
/// [`Error::Hub`]: a reference that means no file or several, a hub that cannot be reached or refuses, contents that are
/// not what the hub says they are.
pub fn fetch(text: &str, progress: &mut dyn FnMut(Event<'_>)) -> Result<PathBuf, Error> {
    let reference = Reference::parse(text)?;
    let hub = Hub::from_env().map_err(|e| reference.error(explain(&e)))?;
    let repo = Repo::model(reference.repository.clone());
    let in_cache = cached_files(&hub.cache, &reference.repository);
    let Some(api) = &hub.api else {
        if in_cache.is_empty() {
            let dir = hub.cache.path().display();
            return Err(reference.error(format!(
                "HF_HUB_OFFLINE is set, and no file of the repository is in {dir}"
            )));
        }
        return cached(&hub.cache, &repo, &reference, &in_cache);
    };
    let handle = api.repo(repo.clone());
    let files: Vec<String> = match handle.info() {
        Ok(info) => info.siblings.into_iter().map(|s| s.rfilename).collect(),
        // What is here already needs no hub.
        Err(error) => {
            return cached(&hub.cache, &repo, &reference, &in_cache)
                .map_err(|_| reference.error(explain(&error)));
        }
    };
    let chosen = reference.choose(&files)?;
    let count = chosen.len();
    let mut paths = Vec::with_capacity(count);
    for (i, file) in chosen.iter().enumerate() {
        if let Some(path) = hub.cache.repo(repo.clone()).get(file) {
            paths.push(path);
            continue;
        }
        progress(Event::Piece {
            index: i + 1,
            count,
            package: file,
        });
        let bar = Bar {
            progress: &mut *progress,
            done: 0,
            total: 0,
        };
        let path = handle
            .download_with_progress(file, bar)
            .map_err(|e| reference.error(format!("{file}: {}", explain(&e))))?;
        verify(&reference, file, &path, progress)?;
        paths.push(path);
    }
    paths
        .into_iter()
        .next()
        .ok_or_else(|| reference.error("the repository has no such file".into()))
}

/// The model's first file from the cache, if all of it is there.
fn cached(
    cache: &Cache,
    repo: &Repo,
    reference: &Reference,
    files: &[String],
) -> Result<PathBuf, Error> {
    let chosen = reference.choose(files)?;
    let first = chosen
        .first()
        .and_then(|file| cache.repo(repo.clone()).get(file));
    first.ok_or_else(|| reference.error("the file is not in the cache".into()))
}

/// Large files are stored under their sha256, which is what the hub says they have.
fn verify(
    reference: &Reference,
    file: &str,
    path: &Path,
    progress: &mut dyn FnMut(Event<'_>),
) -> Result<(), Error> {
    let blob = std::fs::canonicalize(path).map_err(Error::io("read", path))?;
    let expected = blob
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default();
    if expected.len() != 64 || !expected.bytes().all(|b| b.is_ascii_hexdigit()) {
        // A small file, which the hub keeps under another kind of number.
        return Ok(());
    }
    let total = std::fs::metadata(&blob)
        .map_err(Error::io("read", &blob))?
        .len();
    let mut from = std::fs::File::open(&blob).map_err(Error::io("read", &blob))?;
    let (mut hash, mut done, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        let n = from.read(&mut buffer).map_err(Error::io("read", &blob))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        done += n as u64;
        progress(Event::Verify { done, total });
    }
    let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    if found == expected {
        return Ok(());
    }
    // Nothing that is not the model stays under its name.
    std::fs::remove_file(path).map_err(Error::io("delete", path))?;
    std::fs::remove_file(&blob).map_err(Error::io("delete", &blob))?;
    Err(reference.error(format!(
        "what was downloaded as {file} has sha256 {found}, and the hub says {expected}; it was \
         deleted, try again"
    )))
}

/// An error of the hub, in words that say what to do.
fn explain(error: &ApiError) -> String {
    let text = error.to_string();
    let hint = if text.contains("401") || text.contains("403") {
        "; the repository does not exist, or needs a token (HF_TOKEN, or huggingface-cli login)"
    } else if text.contains("404") {
        "; there is no such repository or file"
    } else {
        "; check the network and HF_ENDPOINT"
    };
    format!("the hub could not be asked: {text}{hint}")
}

struct Bar<'p> {
    progress: &'p mut dyn FnMut(Event<'_>),
    done: u64,
    total: u64,
}

impl Progress for Bar<'_> {
    fn init(&mut self, size: usize, _file: &str) {
        (self.done, self.total) = (0, size as u64);
        self.update(0);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.progress)(Event::Download {
            done: self.done,
            total: self.total,
        });
    }

    fn finish(&mut self) {}
}

/// The GGUF models in the hub's cache, by their names.
pub(super) fn list() -> Vec<Listed> {
    list_in(&cache())
}

fn list_in(cache: &Cache) -> Vec<Listed> {
    let mut all = Vec::new();
    let folders = std::fs::read_dir(cache.path())
        .into_iter()
        .flatten()
        .flatten();
    for folder in folders {
        let name = folder.file_name();
        let Some((owner, repo)) = name
            .to_str()
            .and_then(|name| name.strip_prefix("models--"))
            .and_then(|name| name.split_once("--"))
        else {
            continue;
        };
        let repository = format!("{owner}/{repo}");
        for file in cached_files(cache, &repository) {
            let later = split(&file).is_some_and(|(_, number, _)| number > 1);
            let handle = cache.repo(Repo::model(repository.clone()));
            let Some(path) = handle.get(&file).filter(|_| !later) else {
                continue;
            };
            all.push(Listed {
                name: format!("{PREFIX}{repository}:{file}"),
                state: State::Present,
                bytes: std::fs::metadata(&path).map_or(0, |found| found.len()),
                path,
                default: false,
                licence: None,
                upstream: Some(format!("{repository}/{file}")),
                sha256: None,
            });
        }
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<(String, Option<String>)> {
        let reference = Reference::parse(text).ok()?;
        Some((reference.repository, reference.pick))
    }

    #[test]
    fn references() {
        let is = |repository: &str, pick: Option<&str>| {
            Some((repository.to_owned(), pick.map(str::to_owned)))
        };
        assert_eq!(parse("hf:a/b-GGUF"), is("a/b-GGUF", None));
        assert_eq!(parse("hf:a/b:Q4_K_M"), is("a/b", Some("Q4_K_M")));
        assert_eq!(parse("hf:a/b:sub/x.gguf"), is("a/b", Some("sub/x.gguf")));
        for bad in [
            "hf:",
            "hf:a",
            "hf:a/",
            "hf:/b",
            "hf:a/b/c",
            "hf:a/b:",
            "hf:../b",
            "hf:a/b:../x",
            "a/b",
            "hf:a/b c",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn files_are_chosen_by_name_by_type_or_as_the_only_one() {
        let files: Vec<String> = [
            "README.md",
            "x-Q4_K_M.gguf",
            "x-Q4_K_S.gguf",
            "x.IQ4_NL.gguf",
            "Q8_0/x-Q8_0-00001-of-00002.gguf",
            "Q8_0/x-Q8_0-00002-of-00002.gguf",
            "mmproj-x-F16.gguf",
        ]
        .map(str::to_owned)
        .to_vec();
        let choose = |text: &str| Reference::parse(text).unwrap().choose(&files);
        assert_eq!(choose("hf:a/x").unwrap(), ["x-Q4_K_M.gguf"]);
        assert_eq!(choose("hf:a/x:q4_k_s").unwrap(), ["x-Q4_K_S.gguf"]);
        assert_eq!(choose("hf:a/x:iq4_nl").unwrap(), ["x.IQ4_NL.gguf"]);
        assert_eq!(choose("hf:a/x:x-Q4_K_S.gguf").unwrap(), ["x-Q4_K_S.gguf"]);
        assert_eq!(choose("hf:a/x:Q8_0").unwrap().len(), 2);
        for (text, says) in [
            ("hf:a/x:Q4", "no file"),
            ("hf:a/x:F16", "no file"),
            ("hf:a/x:y.gguf", "x-Q4_K_M.gguf, x-Q4_K_S.gguf"),
        ] {
            let error = choose(text).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let one = ["z.gguf".to_owned()];
        let reference = Reference::parse("hf:a/z").unwrap();
        assert_eq!(reference.choose(&one).unwrap(), one);
        assert!(
            reference
                .choose(&[])
                .unwrap_err()
                .to_string()
                .contains("no GGUF")
        );
    }
}
