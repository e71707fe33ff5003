//! Finds a compiler that has the source of the standard library.

use crate::Error;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names a compiler to use before all others.
pub(crate) const RUSTC_VARIABLE: &str = "CUDA_BUILDER_RUSTC";

/// Where Debian's `rustc-web` puts its compiler; `rust-web-src` puts the source beside it.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// A compiler and its library source.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// The compiler.
    pub rustc: PathBuf,
    /// `library/`, which holds `core` and `compiler-builtins`.
    pub std_source: PathBuf,
    /// All of `rustc -vV`: tells one compiler from another.
    pub version: String,
}

impl Toolchain {
    /// In this order: `CUDA_BUILDER_RUSTC`; the active toolchain; Debian's.
    ///
    /// # Errors
    /// [`Error::NoRustSrc`] says which compilers were tried and what to install.
    pub fn find() -> Result<Self, Error> {
        let chosen = env::var_os(RUSTC_VARIABLE).map(PathBuf::from);
        let active = env::var_os("RUSTC").map_or_else(|| PathBuf::from("rustc"), PathBuf::from);
        let mut looked_at = Vec::new();
        for rustc in chosen
            .into_iter()
            .chain([active, PathBuf::from(DEBIAN_RUSTC)])
        {
            match Self::at(&rustc) {
                Ok(found) => return Ok(found),
                Err(reason) => looked_at.push(format!("{} ({reason})", rustc.display())),
            }
        }
        Err(Error::NoRustSrc {
            looked_at: looked_at.join(", "),
        })
    }

    fn at(rustc: &Path) -> Result<Self, String> {
        let sysroot = PathBuf::from(ask(rustc, &["--print", "sysroot"])?.trim());
        let std_source = sysroot.join("lib/rustlib/src/rust/library");
        if !std_source.join("core/src/lib.rs").is_file() {
            return Err("no rust-src".to_owned());
        }
        let version = ask(rustc, &["-vV"])?;
        // A rustup proxy picks a toolchain by its environment, which the nested build clears.
        let own = sysroot.join("bin/rustc");
        let rustc = if own.is_file() { own } else { rustc.to_owned() };
        Ok(Self {
            rustc,
            std_source,
            version,
        })
    }
}

fn ask(rustc: &Path, args: &[&str]) -> Result<String, String> {
    let output = Command::new(rustc)
        .args(args)
        .output()
        .map_err(|e| e.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}
