//! Builds the kernels to PTX where the feature `cuda` is on, to be embedded by `src/device/ptx.rs`.

use cuda_builder::{CudaBuilder, NvvmArch};
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for arch in [
        NvvmArch::Compute80,
        NvvmArch::Compute90,
        NvvmArch::Compute90a,
    ] {
        let built = CudaBuilder::new("../kernels")
            .arch(arch)
            .copy_to(out.join(format!("kernels.{}.ptx", arch.name())))
            .build();
        if let Err(error) = built {
            eprintln!("error: the GPU kernels could not be built: {error}");
            std::process::exit(1);
        }
    }
}
