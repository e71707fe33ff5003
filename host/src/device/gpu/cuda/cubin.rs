//! The kernels' machine code: compiled from PTX by the driver once, then kept in the user's cache folder.

use crate::cache;
use cust::error::CudaResult;
use cust::link::Linker;
use cust::module::Module;
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Bytes of the checksum that a cached file begins with.
const CHECKSUM: usize = 32;

/// Loads `ptx` for compute capability `capability` (90 for 9.0), from the cache where it was compiled by this
/// driver before. The cache only saves time: one that cannot be read or written is as good as none.
///
/// # Errors
/// The driver does not compile or load the kernels.
pub(super) fn load(ptx: &str, driver: i32, capability: i32) -> CudaResult<Module> {
    let path = path(ptx, driver, capability);
    if let Some(cubin) = read(&path) {
        match Module::from_cubin(&cubin, &[]) {
            Ok(module) => return Ok(module),
            Err(error) => tracing::debug!(path = %path.display(), %error, "compiling anew"),
        }
    }
    let cubin = match compile(ptx) {
        Ok(cubin) => cubin,
        Err(error) => {
            tracing::debug!(%error, "the linker does not compile the kernels");
            return Module::from_ptx(ptx, &[]);
        }
    };
    let module = Module::from_cubin(&cubin, &[])?;
    if let Err(error) = write(&path, &cubin) {
        tracing::debug!(path = %path.display(), %error, "the compiled kernels are not kept");
    }
    Ok(module)
}

fn compile(ptx: &str) -> CudaResult<Vec<u8>> {
    let mut linker = Linker::new()?;
    // The driver reads up to a NUL, which cust does not add here.
    linker.add_ptx(format!("{ptx}\0"))?;
    linker.complete()
}

/// Another PTX, driver or architecture has another file.
fn path(ptx: &str, driver: i32, capability: i32) -> PathBuf {
    let hash = Sha256::digest(ptx);
    let hash: String = hash[..16].iter().map(|b| format!("{b:02x}")).collect();
    let name = format!("{hash}-sm_{capability}-driver_{driver}.cubin");
    cache::dir().join("cubin").join(name)
}

/// The code in a cached file; `None` where there is none or it was damaged.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let code = bytes.get(CHECKSUM..)?;
    if Sha256::digest(code)[..] != bytes[..CHECKSUM] {
        return None;
    }
    bytes.drain(..CHECKSUM);
    Some(bytes)
}

fn write(path: &Path, cubin: &[u8]) -> std::io::Result<()> {
    cache::write_atomically(path, |file| {
        file.write_all(&Sha256::digest(cubin))?;
        file.write_all(cubin)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_counts_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.cubin");
        assert_eq!(read(&path), None);
        write(&path, b"code").unwrap();
        assert_eq!(read(&path).unwrap(), b"code");
        for (at, len) in [(0, 36), (35, 36), (0, 20), (0, 0)] {
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[at] ^= 1;
            bytes.truncate(len);
            let damaged = dir.path().join("b.cubin");
            std::fs::write(&damaged, bytes).unwrap();
            assert_eq!(read(&damaged), None, "{at}, {len}");
        }
    }

    #[test]
    fn text_driver_and_architecture_have_files_of_their_own() {
        let first = path("a", 13_000, 90);
        assert_eq!(first, path("a", 13_000, 90));
        for other in [("b", 13_000, 90), ("a", 12_080, 90), ("a", 13_000, 80)] {
            assert_ne!(first, path(other.0, other.1, other.2));
        }
    }
}
