//! Bad input gets an error that says what is wrong: a non-zero exit, a message on stderr, nothing on
//! stdout, no panic.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use kigo_tests::{golden_dir, run};

/// Runs `kigo`, insists that it fails as it should, and returns what it said.
fn fails<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, stdin: &str) -> String {
    let args: Vec<_> = args
        .into_iter()
        .map(|arg| arg.as_ref().to_owned())
        .collect();
    let output = run(&args, stdin.as_bytes());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // A signal has no code; a panic exits with 101.
    let code = output.status.code();
    assert!(
        matches!(code, Some(1..=100)),
        "kigo {args:?}: {}\n{said}",
        output.status
    );
    assert!(!said.contains("panicked"), "kigo {args:?}: {said}");
    assert!(!said.trim().is_empty(), "kigo {args:?} said nothing");
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "",
        "kigo {args:?} printed on stdout"
    );
    said
}

/// As [`fails`], and what it says contains each of `words`.
fn fails_saying<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, words: &[&str]) {
    let said = fails(args, "");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

fn tiny() -> String {
    let path = golden_dir().join("tiny/llama-F16.gguf");
    path.to_str().expect("a path in UTF-8").to_owned()
}

/// The tiny llama, changed by `change`, as a file in `dir`.
fn changed(dir: &Path, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let mut bytes = std::fs::read(tiny()).expect("the tiny llama");
    change(&mut bytes);
    let path = dir.join(name);
    std::fs::write(&path, bytes).expect("writes a file");
    path
}

#[test]
fn no_such_model() {
    fails_saying(
        ["logits", "--model", "smollm3", "--ids", "1"],
        &["smollm3", "smollm2-135m-instruct-q4_1"],
    );
    fails_saying(
        ["logits", "--model", "nowhere/at-all.gguf", "--ids", "1"],
        &["nowhere/at-all.gguf"],
    );
    fails_saying(["inspect", "nowhere.gguf"], &["nowhere.gguf"]);
    fails_saying(["models", "fetch", "no-such-model"], &["no-such-model"]);
}

#[test]
fn a_folder_or_another_file_is_no_model() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    fails_saying(
        [OsStr::new("inspect"), dir.path().as_os_str()],
        &["directory"],
    );
    let text = dir.path().join("poem.gguf");
    std::fs::write(&text, "the old pond\n").expect("writes a file");
    fails_saying([OsStr::new("inspect"), text.as_os_str()], &["poem.gguf"]);
    let empty = dir.path().join("empty.gguf");
    std::fs::write(&empty, "").expect("writes a file");
    fails_saying([OsStr::new("inspect"), empty.as_os_str()], &["empty.gguf"]);
}

#[test]
fn a_damaged_file_is_refused_before_anything_is_used() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let damaged = [
        changed(dir.path(), "magic.gguf", |bytes| bytes[3] = b'X'),
        changed(dir.path(), "version.gguf", |bytes| bytes[4] = 99),
        changed(dir.path(), "tensors.gguf", |bytes| bytes[15] = 0x7f),
        changed(dir.path(), "keys.gguf", |bytes| bytes[23] = 0x7f),
        changed(dir.path(), "header.gguf", |bytes| bytes.truncate(20)),
        changed(dir.path(), "metadata.gguf", |bytes| bytes.truncate(500)),
        changed(dir.path(), "data.gguf", |bytes| {
            bytes.truncate(bytes.len() / 2);
        }),
    ];
    for file in damaged {
        let name = file.file_name().and_then(OsStr::to_str).expect("a name");
        fails_saying([OsStr::new("inspect"), file.as_os_str()], &[name]);
        let args = ["logits", "--device", "cpu", "--ids", "1", "--model"].map(OsStr::new);
        fails_saying(args.into_iter().chain([file.as_os_str()]), &[name]);
    }
}

#[test]
fn ids_that_cannot_be_fed() {
    let tiny = tiny();
    for (ids, word) in [("512", "512"), ("1,4294967296", "4294967296"), ("1,x", "x")] {
        fails_saying(["logits", "--model", &tiny, "--ids", ids], &[word]);
    }
    for ids in ["", "-1", "1,,2"] {
        fails(["logits", "--model", &tiny, &format!("--ids={ids}")], "");
    }
}

#[test]
fn more_tokens_than_the_context_holds() {
    let ids = vec!["1"; 100].join(",");
    fails_saying(
        [
            "logits",
            "--model",
            &tiny(),
            "--ctx-size",
            "64",
            "--ids",
            &ids,
        ],
        &["100", "64"],
    );
}

#[test]
fn ids_files_that_are_no_list_of_ids() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, text) in [
        ("words.json", "[\"one\"]"),
        ("cut.json", "[1, 2"),
        ("object.json", "{}"),
        ("negative.json", "[-1, 2]"),
        ("outside.json", "[1, 512]"),
        ("one.json", "[1]"),
        ("none.json", "[]"),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("writes a file");
        let path = path.to_str().expect("a path in UTF-8");
        fails(["perplexity", "--model", &tiny(), "--ids-file", path], "");
    }
    fails_saying(
        [
            "perplexity",
            "--model",
            &tiny(),
            "--ids-file",
            "nowhere.json",
        ],
        &["nowhere.json"],
    );
}

#[test]
fn flags_out_of_range() {
    let tiny = tiny();
    for (flag, value) in [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "1.5"),
        ("--min-p", "-0.1"),
        ("--repetition-penalty", "0"),
        ("--max-tokens", "many"),
        ("--device", "tpu"),
        ("--threads", "0"),
        ("--ctx-size", "0"),
    ] {
        let flag_value = format!("{flag}={value}");
        fails(
            ["generate", "--model", &tiny, "--ids", "1", &flag_value],
            "",
        );
    }
}

/// Before anything is measured, and without a file that looks as if there had been something to draw.
#[test]
fn plots_of_what_nothing_times() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("step.svg");
    let plot = path.to_str().expect("UTF-8");
    let tiny = tiny();
    let bench = ["bench", "--model", &tiny, "--plot", plot, "--device"];
    for more in [
        ["cpu"].as_slice(),
        &["cpu", "--json"],
        &["emulated", "--exact"],
    ] {
        fails_saying([&bench, more].concat(), &["--plot", plot, "not on the CPU"]);
        assert!(!path.exists(), "{more:?} wrote {plot}");
    }
}

/// The other way round: on a device that times its steps the file is there, and tells the model.
#[test]
fn plots_of_what_the_emulator_times() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("step.svg");
    let plot = path.to_str().expect("UTF-8");
    let tiny = golden_dir().join("tiny/llama-256-Q4_K_M.gguf");
    let tiny = tiny.to_str().expect("UTF-8");
    let bench = [
        "bench", "--json", "--device", "emulated", "-p", "0", "-n", "0", "--depth", "3",
    ];
    let output = run(
        [bench.as_slice(), &["--model", tiny, "--plot", plot]].concat(),
        b"",
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(report["memory_bytes_per_s"].is_null(), "{report}");
    let rows = report["profile"].as_array().expect("a profile");
    let row = |name: &str| {
        let row = rows.iter().find(|r| r["name"] == name);
        row.unwrap_or_else(|| panic!("no {name} in {report}"))
    };
    assert!(row("qkv")["of_peak"].is_null(), "{report}");
    for row in rows {
        for key in ["bytes", "operations"] {
            assert!(row[key].as_u64().is_some_and(|n| n > 0), "{key}: {row}");
        }
    }
    let svg = std::fs::read_to_string(&path).expect("the plot");
    let title = svg.split("<title>").nth(1).expect("a title");
    let model = report["model"].as_str().expect("a name");
    assert!(
        title.starts_with(&format!("Decode step of {model}, ")),
        "{title}"
    );
    for label in ["qkv: ", "gate, up: ", "whole step: "] {
        assert!(svg.contains(label), "no {label} in {svg}");
    }
}

#[test]
fn tensors_that_are_not_there() {
    let tiny = tiny();
    fails_saying(["tensor", &tiny, "no.such.tensor"], &["no.such.tensor"]);
    fails(
        [
            "tensor",
            &tiny,
            "output_norm.weight",
            "--offset",
            "999999999",
            "--count",
            "1",
        ],
        "",
    );
}

#[test]
fn templates_of_requests_that_are_no_json() {
    fails(["chat-template", "--model", &tiny()], "not json");
    fails(["chat-template", "--model", &tiny()], "{\"messages\": 3}");
}

#[test]
fn folders_that_hold_no_references() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().to_str().expect("a path in UTF-8");
    fails_saying(["accuracy", "nowhere"], &["nowhere"]);
    fails_saying(["accuracy", path], &[path, "golden.json"]);
    let golden = dir.path().join("a.golden.json");
    std::fs::write(&golden, "{\"prompts\": [{\"ids\": []}]}").expect("writes a file");
    fails_saying(
        ["accuracy", path, "--device", "cpu"],
        &["a.golden.json", "logits"],
    );
}

/// Memory is planned before it is asked for, and what does not fit is refused with the numbers.
#[test]
fn a_context_that_no_memory_holds() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = changed(dir.path(), "long.gguf", |bytes| {
        let key = b"llama.context_length";
        let at = bytes.windows(key.len()).position(|w| w == key);
        // The value's type lies between.
        let value = at.expect("the key") + key.len() + 4;
        bytes[value..value + 4].copy_from_slice(&250_000_000u32.to_le_bytes());
    });
    let path = path.to_str().expect("UTF-8");
    // Two layers of keys and values of two heads of 64 halves: a kilobyte a token.
    for (cache_type, mib) in [("f16", "244140"), ("q8_0", "137329")] {
        let args = ["logits", "--model", path, "--ids", "1", "--device", "cpu"];
        let more = ["--ctx-size", "250000000", "--cache-type", cache_type];
        fails_saying(
            [args.as_slice(), &more].concat(),
            &[
                "long.gguf",
                "250000000 tokens",
                &format!("{mib} MiB"),
                "free",
            ],
        );
        let mut inspect = vec!["inspect", path, "--device", "cpu"];
        inspect.extend(more);
        let output = run(&inspect, b"");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success());
        assert!(said.contains("will not run: it needs"), "{said}");
    }
}

/// A chat template that fails is an error, unless a fallback is asked for.
#[test]
fn a_template_that_does_not_render() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let chat =
        r#"{"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": true}"#;
    let path = changed(dir.path(), "broken.gguf", |bytes| {
        let start = b"{{ bos_token }}";
        let at = bytes.windows(start.len()).position(|w| w == start);
        let at = at.expect("the template");
        bytes[at..at + start.len()].copy_from_slice(b"{{ bos_token( }");
    });
    let args = ["chat-template", "--model", path.to_str().expect("UTF-8")];
    let said = fails(args, chat);
    assert!(said.contains("tokenizer.chat_template"), "{said}");
    assert!(said.contains("--template-fallback"), "{said}");
    let args = [args.as_slice(), &["--template-fallback"]].concat();
    let output = run(&args, chat.as_bytes());
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("ChatML"), "{said}");
}
