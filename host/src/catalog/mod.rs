//! The models Kigo knows by name: where each is on this machine, and where it comes from.
//!
//! [`resolve`] turns what a user typed (a catalog name or a path to any GGUF) into a file;
//! [`fetch`] downloads a catalog model into [`models_dir`]; [`list`] says what is there.
//! The catalog itself is `models/catalog.toml`, embedded in the binary.

mod error;
mod fetch;
pub mod hub;

pub use error::Error;
pub use fetch::{Event, fetch};

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

/// The models Kigo knows by name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalog {
    #[serde(rename = "model")]
    models: Vec<Model>,
}

/// One model of the catalog.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// What the user types; the file is `<name>.gguf`.
    pub name: String,
    /// Hugging Face repository the file comes from originally.
    pub repository: String,
    /// The file's name there.
    pub file: String,
    /// Size of the whole file.
    pub bytes: u64,
    /// sha256 of the whole file, lowercase hex.
    pub sha256: String,
    /// SPDX identifier, or the name of the terms.
    pub licence: String,
    /// Whether this model is used when none is named.
    #[serde(default)]
    pub default: bool,
    /// The packages that carry the file, in order.
    pub pieces: Vec<Piece>,
}

/// A package that carries a slice of a model's file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Name of the Python package.
    pub package: String,
    /// Its exact version.
    pub version: String,
    /// Path of the slice inside the package's archive.
    pub member: String,
    /// Size of the slice, unpacked.
    pub bytes: u64,
    /// Size of the package.
    pub download: u64,
}

impl Model {
    /// Where the model's file is, or would be, in the models folder `dir`.
    pub fn path_in(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}.gguf", self.name))
    }
}

static BUILTIN: LazyLock<Catalog> = LazyLock::new(|| {
    toml::from_str(include_str!("../../../models/catalog.toml"))
        .expect("models/catalog.toml was checked by this module's tests when the binary was built")
});

impl Catalog {
    /// The catalog embedded in this binary.
    pub fn builtin() -> &'static Catalog {
        &BUILTIN
    }

    /// Every model, in the catalog's order.
    pub fn models(&self) -> &[Model] {
        &self.models
    }

    /// The model called `name`.
    pub fn get(&self, name: &str) -> Option<&Model> {
        self.models.iter().find(|m| m.name == name)
    }

    /// The model that is used when none is named.
    pub fn default_model(&self) -> &Model {
        self.models
            .iter()
            .find(|m| m.default)
            .unwrap_or(&self.models[0])
    }

    /// [`Catalog::get`], or the error that lists the known names and the near misses.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn require(&self, name: &str) -> Result<&Model, Error> {
        self.get(name).ok_or_else(|| self.unknown(name))
    }

    fn unknown(&self, name: &str) -> Error {
        Error::Unknown {
            name: name.to_owned(),
            near: self.near(name),
            known: self.models.iter().map(|m| m.name.clone()).collect(),
        }
    }

    /// Names that resemble `name`, closest first: those that contain it, else those that spell much
    /// alike.
    fn near(&self, name: &str) -> Vec<String> {
        let typed = name.to_lowercase();
        let mut scored: Vec<(f64, &str)> = self
            .models
            .iter()
            .map(|m| {
                let contains = !typed.is_empty() && m.name.contains(&typed);
                let alike = strsim::jaro_winkler(&typed, &m.name);
                (if contains { 1.0 + alike } else { alike }, m.name.as_str())
            })
            .filter(|(score, _)| *score > 0.8)
            .collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0));
        scored
            .into_iter()
            .take(2)
            .map(|(_, n)| n.to_owned())
            .collect()
    }

    /// [`resolve`] with this catalog and the models folder `dir`.
    ///
    /// # Errors
    /// As [`resolve`].
    pub fn resolve_in(&self, name_or_path: &str, dir: &Path) -> Result<PathBuf, Error> {
        if let Some(model) = self.get(name_or_path) {
            let path = model.path_in(dir);
            return match std::fs::metadata(&path) {
                Ok(found) if found.len() == model.bytes => Ok(path),
                Ok(found) => Err(Error::Size {
                    name: model.name.clone(),
                    path,
                    found: found.len(),
                    expected: model.bytes,
                }),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(Error::NotFetched {
                    name: model.name.clone(),
                    path,
                }),
                Err(e) => Err(Error::io("read", path)(e)),
            };
        }
        let path = PathBuf::from(name_or_path);
        match std::fs::metadata(&path) {
            Ok(found) if found.is_dir() => return Err(Error::Directory { path }),
            Ok(_) => return Ok(path),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => {}
            Err(e) => return Err(Error::io("read", path)(e)),
        }
        let path_like = name_or_path.contains('/');
        if !path_like && !name_or_path.is_empty() {
            // A file of the user's own in the models folder goes by its name too.
            for file in [name_or_path.to_owned(), format!("{name_or_path}.gguf")] {
                let there = dir.join(file);
                if there.is_file() {
                    return Ok(there);
                }
            }
        }
        if path_like || name_or_path.ends_with(".gguf") {
            return Err(Error::NoSuchFile { path });
        }
        Err(self.unknown(name_or_path))
    }
}

/// The file behind what a user typed where a model is asked for: a catalog name whose file is here,
/// a path to any GGUF, or the name of a file in the models folder.
///
/// Looks at names and sizes only; the file is opened and checked by `gguf`.
///
/// # Errors
/// [`Error::NotFetched`] and [`Error::Unknown`] say what to type instead; [`Error::Size`] for a
/// catalog name whose file has another size.
pub fn resolve(name_or_path: &str) -> Result<PathBuf, Error> {
    Catalog::builtin().resolve_in(name_or_path, &models_dir())
}

/// The folder that models are fetched into and looked up in: `KIGO_MODELS_DIR`; else `models/` of
/// the checkout the current directory lies in; else `kigo/models` in the user's data directory.
pub fn models_dir() -> PathBuf {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    if let Some(dir) = var("KIGO_MODELS_DIR") {
        return PathBuf::from(dir);
    }
    if let Ok(cwd) = std::env::current_dir()
        && let Some(dir) = checkout_models(&cwd)
    {
        return dir;
    }
    var("XDG_DATA_HOME")
        .map(PathBuf::from)
        .filter(|p| p.is_absolute())
        .or_else(|| var("HOME").map(|home| PathBuf::from(home).join(".local/share")))
        .unwrap_or_default()
        .join("kigo/models")
}

/// `models/` of the nearest folder at or above `from` whose catalog is a Kigo checkout's.
fn checkout_models(from: &Path) -> Option<PathBuf> {
    from.ancestors()
        .map(|dir| dir.join("models"))
        .find(|models| models.join("catalog.toml").is_file())
}

/// Whether a model's file is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Not here.
    Missing,
    /// Some of its pieces are.
    Partial,
    /// Here, with the right size; its contents were not checked.
    Present,
    /// Here, and its sha256 was checked since it was last written.
    Verified,
    /// Here, with another size than the catalog's.
    Damaged,
}

/// A line of [`list`].
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// What to type where a model is asked for.
    pub name: String,
    /// Whether it is here.
    pub state: State,
    /// Size of the whole file in bytes.
    pub bytes: u64,
    /// Where it is, or would be.
    pub path: PathBuf,
    /// Whether it is used when none is named.
    pub default: bool,
    /// Licence; `None` for a file that is not in the catalog.
    pub licence: Option<String>,
    /// Where the file comes from, `repository/file`; `None` for a file that is not in the catalog.
    pub upstream: Option<String>,
    /// sha256 of the whole file; `None` for a file that is not in the catalog.
    pub sha256: Option<String>,
}

/// The catalog's models in its order, then every other `*.gguf` in the folder `dir` by name, then
/// those in the hub's cache. A folder that is not there counts as empty.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be read.
pub fn list(dir: &Path) -> Result<Vec<Listed>, Error> {
    let mut all = list_in(dir)?;
    all.extend(hub::list());
    Ok(all)
}

/// [`list`] without the hub's cache.
fn list_in(dir: &Path) -> Result<Vec<Listed>, Error> {
    let catalog = Catalog::builtin();
    let mut all: Vec<Listed> = catalog
        .models
        .iter()
        .map(|m| Listed {
            name: m.name.clone(),
            state: state(m, dir),
            bytes: m.bytes,
            path: m.path_in(dir),
            default: m.default,
            licence: Some(m.licence.clone()),
            upstream: Some(format!("{}/{}", m.repository, m.file)),
            sha256: Some(m.sha256.clone()),
        })
        .collect();
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(all),
        Err(e) => return Err(Error::io("read", dir)(e)),
    };
    let mut others = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("read", dir))?.path();
        let (Some(stem), true) = (
            path.file_stem().and_then(|s| s.to_str()),
            path.extension().is_some_and(|e| e == "gguf"),
        ) else {
            continue;
        };
        // A dangling link or a file deleted a moment ago is not a model.
        let Ok(found) = std::fs::metadata(&path) else {
            continue;
        };
        if found.is_file() && catalog.get(stem).is_none() {
            others.push(Listed {
                name: stem.to_owned(),
                state: State::Present,
                bytes: found.len(),
                path,
                default: false,
                licence: None,
                upstream: None,
                sha256: None,
            });
        }
    }
    others.sort_by(|a, b| a.name.cmp(&b.name));
    all.append(&mut others);
    Ok(all)
}

fn state(model: &Model, dir: &Path) -> State {
    match std::fs::metadata(model.path_in(dir)) {
        Ok(found) if found.len() != model.bytes => State::Damaged,
        Ok(_) if Stamp::holds(model, dir) => State::Verified,
        Ok(_) => State::Present,
        Err(_) if std::fs::metadata(fetch::partial_file(model, dir)).is_ok_and(|f| f.len() > 0) => {
            State::Partial
        }
        Err(_) => State::Missing,
    }
}

/// A note beside the models that a file's sha256 was found right, and which file that was, so that
/// half a gigabyte is not read again each time somebody asks.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    sha256: String,
    bytes: u64,
    modified_ns: u128,
}

impl Stamp {
    /// The stamp the model's file in `dir` deserves if its contents are right.
    fn of(model: &Model, dir: &Path) -> Option<Stamp> {
        let found = std::fs::metadata(model.path_in(dir)).ok()?;
        let modified = found.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some(Stamp {
            sha256: model.sha256.clone(),
            bytes: found.len(),
            modified_ns: modified.as_nanos(),
        })
    }

    fn path(model: &Model, dir: &Path) -> PathBuf {
        dir.join(".partial")
            .join(format!("{}.verified", model.name))
    }

    /// Whether the model's file is the one that was verified.
    fn holds(model: &Model, dir: &Path) -> bool {
        let stamp = std::fs::read(Self::path(model, dir))
            .ok()
            .and_then(|text| serde_json::from_slice::<Stamp>(&text).ok());
        stamp.is_some() && stamp == Self::of(model, dir)
    }

    /// Notes that the model's file was verified. A folder that cannot be written to (a read-only
    /// mount) costs another check next time, nothing else.
    fn write(model: &Model, dir: &Path) {
        let Some(stamp) = Self::of(model, dir) else {
            return;
        };
        let path = Self::path(model, dir);
        if let Some(parent) = path.parent()
            && std::fs::create_dir_all(parent).is_ok()
            && let Ok(text) = serde_json::to_vec(&stamp)
        {
            let _ = std::fs::write(path, text);
        }
    }
}

#[cfg(test)]
mod tests;
