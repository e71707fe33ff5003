//! The binary. All of it is in the library's [`kigo::cli`].

fn main() -> std::process::ExitCode {
    kigo::cli::main()
}
