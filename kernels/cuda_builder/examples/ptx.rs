//! Builds a crate of kernels without a build script:
//! `cargo run -p cuda_builder --example ptx -- kernels target/kernels.ptx [sm_80|sm_90|sm_90a …]`

use cuda_builder::{CudaBuilder, NvvmArch};

fn main() {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(out)) = (args.next(), args.next()) else {
        eprintln!("usage: ptx CRATE_FOLDER OUTPUT.ptx [sm_80|sm_90|sm_90a …]");
        std::process::exit(2);
    };
    let mut builder = CudaBuilder::new(path).copy_to(out);
    for name in args {
        let Some(arch) = NvvmArch::from_name(&name) else {
            eprintln!("unknown architecture `{name}`");
            std::process::exit(2);
        };
        builder = builder.arch(arch);
    }
    match builder.build() {
        Ok(built) => built
            .ptx
            .iter()
            .for_each(|(arch, path)| println!("{}: {}", arch.name(), path.display())),
        Err(error) => {
            eprintln!("error: {error}");
            std::process::exit(1);
        }
    }
}
