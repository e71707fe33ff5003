//! Other people's clients against a live worker: the official `openai` packages, schemathesis, a browser. They
//! are Python and Node programs in `clients/`, installed by `./setup.sh clients` into `.tools/`.

use kigo_tests::model;
use kigo_tests::worker::Worker;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn top() -> PathBuf {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    top.canonicalize().expect("the repository")
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients")
}

/// A program of the virtual environment.
fn tool(name: &str) -> PathBuf {
    let path = top().join(".tools/clients/bin").join(name);
    assert!(
        path.exists(),
        "{} is missing: ./setup.sh clients",
        path.display()
    );
    path
}

/// Where artifacts go.
fn results(name: &str) -> PathBuf {
    let path = top().join(".test-results").join(name);
    std::fs::create_dir_all(&path).expect("a folder");
    path
}

/// Runs a client to its end; what it prints is shown when it fails.
fn passes(command: &mut Command) -> String {
    let output = command
        .env("NO_PROXY", "127.0.0.1")
        .env("no_proxy", "127.0.0.1")
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{said}\n{errors}",
        output.status
    );
    said
}

fn real_model() -> PathBuf {
    model(kigo_tests::GOLDEN_MODELS[0])
}

#[test]
fn the_openai_package_for_python() {
    let worker = Worker::start(&real_model(), &[]);
    let said = passes(
        Command::new(tool("python"))
            .arg(scripts().join("openai_client.py"))
            .arg(worker.url()),
    );
    assert!(said.contains("17 passed"), "{said}");
}

#[test]
fn the_openai_package_for_node() {
    let worker = Worker::start(&real_model(), &[]);
    let folder = top().join(".tools/node");
    assert!(
        folder.join("node_modules/openai").exists(),
        "./setup.sh clients"
    );
    let script = scripts().join("openai_client.mjs");
    let said = passes(
        Command::new("node")
            .arg(script)
            .arg(worker.url())
            .arg(folder),
    );
    assert!(said.contains("7 passed"), "{said}");
}

#[test]
#[ignore = "minutes; make test-clients"]
fn a_hundred_answers_in_json() {
    let worker = Worker::start(&real_model(), &[]);
    let said = passes(
        Command::new(tool("python"))
            .arg(scripts().join("json_schema.py"))
            .arg(worker.url())
            .arg("100"),
    );
    assert!(said.contains("100 of 100"), "{said}");
}

/// Generated requests, valid and not, against the OpenAPI document.
fn schemathesis(cases: u32) {
    let worker = Worker::start(
        &real_model(),
        &["--max-tokens-out", "2", "--ctx-size", "1024"],
    );
    let said = passes(
        Command::new(tool("python"))
            .arg(scripts().join("schemathesis_run.py"))
            .arg(worker.url())
            .arg(cases.to_string())
            .arg(results("schemathesis")),
    );
    println!("{said}");
    worker.wait_idle(std::time::Duration::from_secs(10));
}

#[test]
#[ignore = "minutes; make test-clients"]
fn schemathesis_finds_nothing() {
    schemathesis(2000);
}

#[test]
#[ignore = "needs a browser; make test-page"]
fn the_page_in_a_browser() {
    let worker = Worker::start(&real_model(), &[]);
    let said = passes(
        Command::new(tool("python"))
            .arg(scripts().join("page.py"))
            .arg(worker.url())
            .arg(results("page")),
    );
    assert!(said.contains("passed"), "{said}");
}
