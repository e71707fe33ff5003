//! Shared helpers of the integration tests: where models, golden data and the `kigo` binary are, how to
//! run it, how far two outputs are apart ([`compare`]), and the worker as a process ([`worker`]).

pub mod compare;
pub mod worker;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use serde::de::DeserializeOwned;
use serde_json::Value;

/// The models that have golden logits, tokens and perplexities in `tests/golden`.
pub const GOLDEN_MODELS: [&str; 2] = [
    "qwen2.5-coder-0.5b-instruct-q4_k_m",
    "smollm2-135m-instruct-q4_1",
];

/// The golden data that is part of the repository.
pub fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// The folder of the fuller set of golden data, which holds `golden/` and `tiny/`. A relative path is
/// taken from the top of the repository.
fn shared_dir() -> Option<PathBuf> {
    let dir = std::env::var_os("KIGO_GOLDEN_DIR").filter(|dir| !dir.is_empty())?;
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    Some(top.join(dir))
}

/// The tiny models of the fuller set, where `KIGO_GOLDEN_DIR` is set.
pub fn shared_tiny_dir() -> Option<PathBuf> {
    Some(shared_dir()?.join("tiny"))
}

/// A golden file of the repository, else of the fuller set.
pub fn golden(file: &str) -> Option<PathBuf> {
    [Some(golden_dir()), shared_dir().map(|d| d.join("golden"))]
        .into_iter()
        .flatten()
        .map(|dir| dir.join(file))
        .find(|path| path.exists())
}

/// The contents of a golden file that the test cannot do without.
///
/// # Panics
/// When it is missing or not of this form.
pub fn read_golden<T: DeserializeOwned>(file: &str) -> T {
    let path = golden(file).unwrap_or_else(|| panic!("no golden file {file}"));
    read_json(&path)
}

/// The contents of a JSON file.
///
/// # Panics
/// When it cannot be read or is not of this form.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> T {
    let text = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The tiny models with a golden file whose name `wanted` accepts, in the repository and the fuller
/// set, each once, as paths without extension.
pub fn tiny_models(wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    let dirs = [Some(golden_dir().join("tiny")), shared_tiny_dir()];
    for dir in dirs.into_iter().flatten() {
        let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        for entry in entries {
            let file = entry.expect("a readable folder").file_name();
            let Some(name) = file.to_str().and_then(|f| f.strip_suffix(".golden.json")) else {
                continue;
            };
            if wanted(name) && !found.iter().any(|(n, _)| n == name) {
                found.push((name.to_owned(), dir.join(name)));
            }
        }
    }
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// The file of a catalog model.
///
/// # Panics
/// Says how to fetch it when it is not there.
pub fn model(name: &str) -> PathBuf {
    kigo::catalog::resolve(name).unwrap_or_else(|e| panic!("{e}"))
}

/// The device the golden tests run on: `KIGO_TEST_DEVICE`, else `cpu`.
pub fn device() -> String {
    std::env::var("KIGO_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned())
}

/// The `kigo` binary: `KIGO_BIN` where that is set, else the one in the target directory and profile
/// of the running test, which cargo brings up to date first.
///
/// # Panics
/// When it cannot be built.
pub fn kigo_bin() -> PathBuf {
    static BIN: OnceLock<PathBuf> = OnceLock::new();
    BIN.get_or_init(|| match std::env::var_os("KIGO_BIN") {
        Some(bin) if !bin.is_empty() => PathBuf::from(bin),
        _ => build_kigo(),
    })
    .clone()
}

fn build_kigo() -> PathBuf {
    // target/<profile>/deps/<test>-<hash>
    let test = std::env::current_exe().expect("the path of the running test");
    let profile_dir = test
        .ancestors()
        .nth(2)
        .expect("a test lies two folders deep");
    let target_dir = profile_dir.parent().expect("a profile has a folder");
    let profile = match profile_dir.file_name().and_then(OsStr::to_str) {
        None | Some("debug") => "dev",
        Some(profile) => profile,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let features: &[&str] = match cfg!(feature = "otel") {
        true => &["--features", "kigo/otel"],
        false => &[],
    };
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--bin", "kigo"])
        .args(features)
        .args(["--profile", profile, "--target-dir"])
        .arg(target_dir)
        // From the top cargo picks the same packages, hence features, as for `cargo run --bin kigo`.
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .status()
        .expect("cargo starts");
    assert!(status.success(), "cargo build of kigo: {status}");
    profile_dir.join("kigo")
}

/// Runs `kigo` with `args` and `stdin` to its end. One at a time: each run uses every core.
///
/// # Panics
/// When it cannot be started.
pub fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, stdin: &[u8]) -> Output {
    static ALONE: Mutex<()> = Mutex::new(());
    let bin = kigo_bin();
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut child = Command::new(&bin)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{}: {e}", bin.display()));
    std::thread::scope(|scope| {
        let pipe = child.stdin.take();
        scope.spawn(move || {
            use std::io::Write;
            // A command that does not read its input closes the pipe early.
            let _ = pipe.map(|mut pipe| pipe.write_all(stdin));
        });
        child
            .wait_with_output()
            .unwrap_or_else(|e| panic!("{}: {e}", bin.display()))
    })
}

/// Runs `kigo … --json`, insists on success, and returns the one JSON object on its stdout.
///
/// # Panics
/// With what it printed on stderr, when it fails or its stdout is anything else.
pub fn run_json<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Value {
    let mut args: Vec<_> = args
        .into_iter()
        .map(|arg| arg.as_ref().to_owned())
        .collect();
    args.push("--json".into());
    let output = run(&args, b"");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "kigo {args:?}: {}\n{stderr}",
        output.status
    );
    match serde_json::from_slice(&output.stdout) {
        Ok(value @ Value::Object(_)) => value,
        Ok(other) => panic!("kigo {args:?}: stdout is not a JSON object but {other}"),
        Err(e) => panic!(
            "kigo {args:?}: stdout is not one JSON value ({e}): {:.200}\n{stderr}",
            String::from_utf8_lossy(&output.stdout)
        ),
    }
}

/// `run_json` for a command on a model: adds `--model`, `--device` and, where asked for, `--exact`.
///
/// # Panics
/// As [`run_json`].
pub fn run_model(command: &str, model: &Path, device: &str, exact: bool, args: &[&str]) -> Value {
    let mut all: Vec<&OsStr> = vec![command.as_ref(), "--model".as_ref(), model.as_os_str()];
    all.extend(["--device", device].map(OsStr::new));
    if exact {
        all.push("--exact".as_ref());
    }
    all.extend(args.iter().map(OsStr::new));
    run_json(all)
}

/// All logits at the last of the positions `ids`, by `kigo logits`.
///
/// # Panics
/// As [`run_json`], or when the output has another form.
pub fn logits(model: &Path, device: &str, exact: bool, ids: &[u32]) -> Vec<f32> {
    let output = run_model("logits", model, device, exact, &["--ids", &join(ids)]);
    let n_vocab = output["n_vocab"].as_u64().expect("n_vocab is a count");
    let logits: Vec<f32> =
        serde_json::from_value(output["logits"].clone()).expect("logits are numbers");
    assert_eq!(
        logits.len() as u64,
        n_vocab,
        "one logit for each of the vocabulary"
    );
    logits
}

/// `ids` the way `--ids` takes them.
pub fn join(ids: &[u32]) -> String {
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    ids.join(",")
}
