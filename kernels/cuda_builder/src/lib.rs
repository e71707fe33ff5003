//! Builds a crate of kernels to PTX with rustc's own NVPTX back end.
//!
//! The API is rust-cuda's `cuda_builder`; the way is another. rustc carries LLVM's NVPTX back end,
//! and a stable compiler runs it under `RUSTC_BOOTSTRAP=1`. So no nightly, no libnvvm and no CUDA
//! toolkit are needed: only a compiler that has the standard library's source (`rust-src`) beside
//! it, for `core`.
//!
//! ```no_run
//! use cuda_builder::{CudaBuilder, NvvmArch};
//!
//! // in build.rs
//! let built = CudaBuilder::new("../kernels")
//!     .arch(NvvmArch::Compute80)
//!     .copy_to(format!("{}/kernels.ptx", std::env::var("OUT_DIR").unwrap()))
//!     .build();
//! if let Err(error) = built {
//!     cuda_builder::fail(&error);
//! }
//! ```
//!
//! Steps: [`toolchain`] finds a compiler; [`sysroot`] compiles `core` for one architecture, once
//! per compiler; a nested cargo builds the crate as one LTO module; [`ptx`] finishes the text.

mod error;
pub mod ptx;
mod sysroot;
mod toolchain;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub use error::{Error, fail};
use sysroot::Sysroot;
pub use toolchain::Toolchain;

/// The target of a build: a virtual architecture of PTX.
///
/// PTX for `Compute80` runs on every later GPU too; `Compute90a` runs on Hopper only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NvvmArch {
    Compute75,
    Compute80,
    Compute86,
    Compute89,
    Compute90,
    Compute90a,
}

impl NvvmArch {
    const ALL: [Self; 6] = [
        Self::Compute75,
        Self::Compute80,
        Self::Compute86,
        Self::Compute89,
        Self::Compute90,
        Self::Compute90a,
    ];

    /// The architecture of this name, e.g. `sm_80`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|arch| arch.name() == name)
    }

    /// The architecture as PTX and `ptxas` name it, e.g. `sm_80`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compute75 => "sm_75",
            Self::Compute80 => "sm_80",
            Self::Compute86 => "sm_86",
            Self::Compute89 => "sm_89",
            Self::Compute90 => "sm_90",
            Self::Compute90a => "sm_90a",
        }
    }

    /// Whether the instructions of Hopper (programmatic launch, clusters) may be used.
    fn is_sm_90(self) -> bool {
        matches!(self, Self::Compute90 | Self::Compute90a)
    }
}

/// What one [`CudaBuilder::build`] made.
#[derive(Clone, Debug)]
pub struct BuildOutput {
    /// One finished PTX file per architecture, in the order asked for.
    pub ptx: Vec<(NvvmArch, PathBuf)>,
}

/// Builds one crate to PTX. See the [crate's documentation](crate).
#[derive(Clone, Debug)]
pub struct CudaBuilder {
    path: PathBuf,
    archs: Vec<NvvmArch>,
    copy_to: Option<PathBuf>,
    target_dir: Option<PathBuf>,
    features: Vec<String>,
    ptx_version: u32,
    emit_cargo_directives: bool,
}

impl CudaBuilder {
    /// A build of the crate whose `Cargo.toml` lies in `path`.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            archs: Vec::new(),
            copy_to: None,
            target_dir: None,
            features: Vec::new(),
            ptx_version: 80,
            emit_cargo_directives: env::var_os("OUT_DIR").is_some(),
        }
    }

    /// Builds for `arch`; may be called several times. Without it: [`NvvmArch::Compute80`].
    pub fn arch(mut self, arch: NvvmArch) -> Self {
        if !self.archs.contains(&arch) {
            self.archs.push(arch);
        }
        self
    }

    /// Copies the finished PTX to `path`. With several architectures, each file's name gets the
    /// architecture before its extension: `kernels.ptx` becomes `kernels.sm_90.ptx`.
    pub fn copy_to(mut self, path: impl AsRef<Path>) -> Self {
        self.copy_to = Some(path.as_ref().to_owned());
        self
    }

    /// Where the nested build keeps its files. Without it: `nvptx/` in the outer target directory.
    pub fn target_dir(mut self, path: impl AsRef<Path>) -> Self {
        self.target_dir = Some(path.as_ref().to_owned());
        self
    }

    /// Turns on a cargo feature of the crate.
    pub fn feature(mut self, name: impl Into<String>) -> Self {
        self.features.push(name.into());
        self
    }

    /// The PTX ISA version times ten; 80 (the default) needs a driver of CUDA 12.0 or later.
    pub fn ptx_version(mut self, version: u32) -> Self {
        self.ptx_version = version;
        self
    }

    /// Builds the crate for every architecture.
    ///
    /// # Errors
    /// No compiler with `rust-src`; the crate does not compile; its PTX leaves a function
    /// undefined; a file cannot be read or written.
    pub fn build(self) -> Result<BuildOutput, Error> {
        let crate_dir = self
            .path
            .canonicalize()
            .map_err(|e| Error::io("find the crate of kernels", &self.path, e))?;
        if self.emit_cargo_directives {
            self.rerun_if_changed(&crate_dir);
        }
        let toolchain = Toolchain::find()?;
        let target_dir = self
            .target_dir
            .clone()
            .unwrap_or_else(|| default_target_dir(&crate_dir));
        let archs = if self.archs.is_empty() {
            vec![NvvmArch::Compute80]
        } else {
            self.archs.clone()
        };
        let mut ptx = Vec::new();
        for arch in &archs {
            let text = self.build_one(&toolchain, &crate_dir, &target_dir, *arch)?;
            let path = match &self.copy_to {
                Some(path) if archs.len() == 1 => path.clone(),
                Some(path) => with_arch(path, *arch),
                None => target_dir.join(arch.name()).join("kernels.ptx"),
            };
            write_if_changed(&path, &text)?;
            ptx.push((*arch, path));
        }
        Ok(BuildOutput { ptx })
    }

    fn build_one(
        &self,
        toolchain: &Toolchain,
        crate_dir: &Path,
        target_dir: &Path,
        arch: NvvmArch,
    ) -> Result<String, Error> {
        let sysroot = Sysroot::ensure(toolchain, target_dir, arch, self.ptx_version)?;
        let arch_dir = target_dir.join(arch.name());
        fs::create_dir_all(&arch_dir).map_err(|e| Error::io("create", &arch_dir, e))?;
        let asm = arch_dir.join("module.s");

        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        clean_environment(&mut command);
        command
            .current_dir(crate_dir)
            .env("RUSTC", &toolchain.rustc)
            .env("RUSTC_BOOTSTRAP", "1")
            .env(
                "CARGO_ENCODED_RUSTFLAGS",
                target_flags(&sysroot, arch, self.ptx_version).join("\x1f"),
            )
            // LTO makes one module; the host's proc macros keep cargo's defaults.
            .env("CARGO_PROFILE_RELEASE_LTO", "fat")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "none")
            .env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "false")
            .env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "false")
            .args([
                "rustc",
                "--release",
                "--lib",
                "--crate-type",
                "cdylib",
                "--target",
                sysroot::TARGET,
            ])
            // The outer build has fetched all that the crate needs.
            .arg("--offline")
            .arg("--target-dir")
            .arg(arch_dir.join("build"));
        if !self.features.is_empty() {
            command.arg("--features").arg(self.features.join(","));
        }
        // `linker=true`: the module is taken as assembly text, so linking does nothing (/bin/true).
        command
            .arg("--")
            .arg(format!("--emit=asm={}", asm.display()))
            .args(["-C", "linker=true"]);

        // Cargo deems a build fresh by its own outputs and would not write a lost module again.
        if !asm.is_file() {
            let _ = fs::remove_dir_all(arch_dir.join("build").join(sysroot::TARGET));
        }
        let output = command.output().map_err(|e| Error::Spawn {
            program: "cargo".into(),
            source: e,
        })?;
        if !output.status.success() {
            return Err(Error::Compile {
                what: format!("{} for {}", crate_dir.display(), arch.name()),
                output: String::from_utf8_lossy(&output.stderr).into_owned(),
            });
        }
        let text =
            fs::read_to_string(&asm).map_err(|e| Error::io("read the compiler's PTX", &asm, e))?;
        ptx::finish(&text).map_err(|reason| Error::Ptx { path: asm, reason })
    }

    fn rerun_if_changed(&self, crate_dir: &Path) {
        println!("cargo:rerun-if-changed={}", crate_dir.display());
        if let Some(lock) = crate_dir
            .ancestors()
            .map(|d| d.join("Cargo.lock"))
            .find(|p| p.is_file())
        {
            println!("cargo:rerun-if-changed={}", lock.display());
        }
        println!("cargo:rerun-if-env-changed={}", toolchain::RUSTC_VARIABLE);
    }
}

/// Flags for what is compiled for the device (with `--target`, cargo keeps them from proc macros).
fn target_flags(sysroot: &Sysroot, arch: NvvmArch, ptx_version: u32) -> Vec<String> {
    let mut flags = vec!["--sysroot".to_owned(), sysroot.path.display().to_string()];
    flags.extend(sysroot::codegen_flags(arch, ptx_version));
    flags.push("-Cllvm-args=-nvptx-fma-level=2 -unroll-threshold=4000".to_owned());
    if arch.is_sm_90() {
        flags.push("--cfg=cuda_sm_90".to_owned());
    }
    if arch == NvvmArch::Compute90a {
        flags.push("--cfg=cuda_sm_90a".to_owned());
    }
    flags
}

/// Takes from a nested command what an outer cargo or rustup says about the outer build.
fn clean_environment(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let kept = matches!(
            &*text,
            "CARGO_HOME" | "CARGO_HTTP_PROXY" | "CARGO_TERM_COLOR"
        );
        let outer =
            text.starts_with("CARGO") || text.starts_with("RUSTC") || text.starts_with("DEP_");
        let flags = matches!(
            &*text,
            "RUSTFLAGS" | "RUSTDOCFLAGS" | "RUSTUP_TOOLCHAIN" | "RUSTDOC"
        );
        let build_script = matches!(
            &*text,
            "OUT_DIR"
                | "TARGET"
                | "HOST"
                | "PROFILE"
                | "OPT_LEVEL"
                | "DEBUG"
                | "NUM_JOBS"
                | "LD_LIBRARY_PATH"
        );
        if (outer && !kept) || flags || build_script {
            command.env_remove(&name);
        }
    }
}

/// `nvptx/` in the outer build's target directory, so that every outer profile shares it.
fn default_target_dir(crate_dir: &Path) -> PathBuf {
    let out_dir = env::var_os("OUT_DIR").map(PathBuf::from);
    let outer = out_dir
        .as_deref()
        .and_then(|out| out.ancestors().find(|d| d.join("CACHEDIR.TAG").is_file()));
    match (outer, &out_dir) {
        (Some(target), _) => target.join("nvptx"),
        (None, Some(out)) => out.join("nvptx"),
        (None, None) => match env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => PathBuf::from(dir).join("nvptx"),
            None => crate_dir.join("target").join("nvptx"),
        },
    }
}

fn with_arch(path: &Path, arch: NvvmArch) -> PathBuf {
    let mut name = path.file_stem().map(OsString::from).unwrap_or_default();
    name.push(format!(".{}", arch.name()));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

/// Leaves an equal file alone, so that what includes it is not compiled again.
fn write_if_changed(path: &Path, text: &str) -> Result<(), Error> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, e))?;
    }
    fs::write(path, text).map_err(|e| Error::io("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arch_goes_before_the_extension() {
        assert_eq!(
            with_arch(Path::new("/a/kernels.ptx"), NvvmArch::Compute90a),
            Path::new("/a/kernels.sm_90a.ptx")
        );
        assert_eq!(
            with_arch(Path::new("kernels"), NvvmArch::Compute80),
            Path::new("kernels.sm_80")
        );
    }
}
