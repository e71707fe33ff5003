//! `docs/api.md`: every curl line works, every endpoint has one, and the table of codes is the code's.

use kigo::engine::Code;
use kigo_tests::model;
use kigo_tests::worker::Worker;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/api.md")
}

fn text() -> String {
    let path = path();
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The commands of the document, each with the status it is to have.
fn commands() -> Vec<(String, u16)> {
    let text = text();
    let lines = text.lines().filter(|l| l.starts_with("curl "));
    lines
        .map(|line| match line.rsplit_once(" # ") {
            Some((command, status)) => (command.to_owned(), status.parse().expect("a status")),
            None if line.contains("/cancel") || line.contains("/shutdown") => {
                (line.to_owned(), 202)
            }
            None => (line.to_owned(), 200),
        })
        .collect()
}

#[test]
fn every_curl_line_works() {
    let mut worker = Worker::start(&model(kigo_tests::GOLDEN_MODELS[0]), &[]);
    for (command, status) in commands() {
        let command = command.replace("localhost:8080", &worker.address);
        let output = Command::new("bash")
            .args([
                "-c",
                &format!("{command} -sS --noproxy '*' -w '\\n%{{http_code}}'"),
            ])
            .output()
            .expect("bash and curl are there");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success(),
            "{command}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let (body, found) = said.rsplit_once('\n').expect("a status");
        assert_eq!(found, status.to_string(), "{command}: {body}");
        assert!(!body.is_empty(), "{command}");
        if command.contains("/execute") {
            assert!(
                body.contains("event:started") && body.contains("event:end"),
                "{body}"
            );
        }
    }
    assert_eq!(worker.wait(Duration::from_secs(10)).code(), Some(0));
}

#[test]
fn every_endpoint_has_a_line() {
    let worker = Worker::start_on(
        &kigo_tests::golden_dir().join("tiny/llama-F16.gguf"),
        "cpu",
        &[],
    );
    let (_, document) = worker.ask("GET /openapi.json", "");
    let document: serde_json::Value = serde_json::from_str(&document).expect("JSON");
    let commands = commands();
    let paths = document["paths"].as_object().expect("paths");
    assert!(paths.len() > 15);
    for path in paths.keys() {
        let path = path.trim_end_matches("{model}");
        let here = format!("localhost:8080{path}");
        let found = commands.iter().any(|(c, _)| {
            c.match_indices(&here).any(|(at, _)| {
                let rest = &c[at + here.len()..];
                path.ends_with('/') && path != "/" || rest.is_empty() || rest.starts_with(' ')
            })
        });
        assert!(found, "no curl line for {path}");
    }
}

/// `KIGO_UPDATE_DOCS=1` writes the table instead of comparing it.
#[test]
fn the_table_of_codes_is_the_code_s() {
    let text = text();
    let (before, rest) = text
        .split_once("<!-- codes -->\n")
        .expect("the table's beginning");
    let (table, after) = rest.split_once("<!-- /codes -->").expect("the table's end");
    if std::env::var_os("KIGO_UPDATE_DOCS").is_some() {
        let text = format!(
            "{before}<!-- codes -->\n{}<!-- /codes -->{after}",
            Code::table()
        );
        std::fs::write(path(), text).expect("a file to write");
        return;
    }
    assert_eq!(
        table,
        Code::table(),
        "run this test with KIGO_UPDATE_DOCS=1"
    );
}
