//! `core` for the device, compiled from its source into a sysroot of our own.
//!
//! cargo's `-Zbuild-std` would do, but it resolves the whole standard library's workspace and
//! fetches crates that `core` never uses. `core` and `compiler_builtins` need none: two calls of
//! rustc make them, without a network.

use crate::toolchain::Toolchain;
use crate::{Error, NvvmArch};
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// rustc's name of the device.
pub(crate) const TARGET: &str = "nvptx64-nvidia-cuda";

/// A folder that rustc takes as `--sysroot`.
pub(crate) struct Sysroot {
    pub path: PathBuf,
}

/// What every crate for the device is compiled with. Equal flags let LLVM inline across crates.
pub(crate) fn codegen_flags(arch: NvvmArch, ptx_version: u32) -> Vec<String> {
    vec![
        format!("-Ctarget-cpu={}", arch.name()),
        format!("-Ctarget-feature=+ptx{ptx_version}"),
    ]
}

impl Sysroot {
    /// The sysroot for this compiler and architecture; built on first use.
    pub fn ensure(
        toolchain: &Toolchain,
        dir: &Path,
        arch: NvvmArch,
        ptx_version: u32,
    ) -> Result<Self, Error> {
        let mut hash = DefaultHasher::new();
        (&toolchain.version, &toolchain.std_source, arch, ptx_version).hash(&mut hash);
        let path = dir.join(format!("sysroot-{}-{:016x}", arch.name(), hash.finish()));
        if path.is_dir() {
            return Ok(Self { path });
        }
        // Built aside and renamed: an interrupted or a concurrent build leaves nothing half made.
        let partial = dir.join(format!("sysroot-partial-{}", std::process::id()));
        let _ = fs::remove_dir_all(&partial);
        let lib = partial.join("lib/rustlib").join(TARGET).join("lib");
        fs::create_dir_all(&lib).map_err(|e| Error::io("create", &lib, e))?;
        let core = toolchain.std_source.join("core/src/lib.rs");
        let builtins = toolchain
            .std_source
            .join("compiler-builtins/compiler-builtins/src/lib.rs");
        let flags = codegen_flags(arch, ptx_version);
        compile(toolchain, &partial, "core", &core, &lib, &flags, &[])?;
        let features = [
            "--cfg=feature=\"compiler-builtins\"",
            "--cfg=feature=\"mem\"",
        ];
        compile(
            toolchain,
            &partial,
            "compiler_builtins",
            &builtins,
            &lib,
            &flags,
            &features,
        )?;
        if let Err(e) = fs::rename(&partial, &path) {
            let _ = fs::remove_dir_all(&partial);
            if !path.is_dir() {
                return Err(Error::io("create", &path, e));
            }
        }
        Ok(Self { path })
    }
}

fn compile(
    toolchain: &Toolchain,
    sysroot: &Path,
    name: &str,
    source: &Path,
    lib: &Path,
    flags: &[String],
    extra: &[&str],
) -> Result<(), Error> {
    let mut command = Command::new(&toolchain.rustc);
    crate::clean_environment(&mut command);
    let output = command
        .env("RUSTC_BOOTSTRAP", "1")
        .args([
            "--edition",
            "2024",
            "--crate-type",
            "lib",
            "--target",
            TARGET,
            "--crate-name",
            name,
        ])
        .arg(source)
        .arg("--sysroot")
        .arg(sysroot)
        .args([
            "-Copt-level=3",
            "-Cpanic=abort",
            "-Cembed-bitcode=yes",
            "-Ccodegen-units=1",
        ])
        .args(["-Zforce-unstable-if-unmarked", "--cap-lints", "allow"])
        .args(flags)
        .args(extra)
        .arg("-o")
        .arg(lib.join(format!("lib{name}.rlib")))
        .output()
        .map_err(|e| Error::Spawn {
            program: toolchain.rustc.display().to_string(),
            source: e,
        })?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Compile {
        what: format!("{name} from {}", source.display()),
        output: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
