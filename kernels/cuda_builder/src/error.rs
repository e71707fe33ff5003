//! What can go wrong in a build of kernels.

use std::io;
use std::path::{Path, PathBuf};

/// Why a build of kernels failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No compiler has the standard library's source.
    #[error(
        "the kernels need a Rust compiler with the source of `core` beside it, and none was found.\n\
         looked at: {looked_at}\n\
         do one of these, then build again:\n\
         \x20 rustup component add rust-src\n\
         \x20 apt-get install rustc-web rust-web-src        (Debian)\n\
         or build without the `cuda` feature: --no-default-features"
    )]
    NoRustSrc {
        /// Each compiler tried and why it would not do.
        looked_at: String,
    },
    /// A compiler said no.
    #[error("compiling {what} failed:\n{output}")]
    Compile {
        /// What was compiled.
        what: String,
        /// The compiler's messages.
        output: String,
    },
    /// The compiler's PTX cannot be used.
    #[error("the PTX in {path} cannot be used: {reason}")]
    Ptx {
        /// The compiler's output.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A program could not be started.
    #[error("cannot start `{program}`: {source}")]
    Spawn {
        /// The program.
        program: String,
        /// Why not.
        source: io::Error,
    },
    /// A file or folder could not be used.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// Ends a build script: prints `error` the way cargo shows it, and exits with status 1.
pub fn fail(error: &Error) -> ! {
    for line in error.to_string().lines() {
        println!("cargo::error={line}");
    }
    std::process::exit(1)
}
