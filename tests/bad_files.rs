//! Malformed files, made for this: each is refused with an error that names what is wrong with it, or runs,
//! as its manifest says, within a second and 64 MB; and none makes the worker panic, hang or crash.
//!
//! They are in the fuller golden set: without `KIGO_GOLDEN_DIR` there is nothing to do. `KIGO_BIN` chooses
//! another binary, such as a debug build's.

use kigo_tests::{kigo_bin, read_json, shared_tiny_dir};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

#[derive(Deserialize)]
struct Entry {
    expect: String,
    what: String,
}

fn manifest() -> Option<(PathBuf, BTreeMap<String, Entry>)> {
    let dir = shared_tiny_dir()?.join("bad");
    let manifest = read_json(&dir.join("manifest.json"));
    Some((dir, manifest))
}

struct Ran {
    /// None for a signal.
    code: Option<i32>,
    stderr: String,
    stdout: Vec<u8>,
    time: Duration,
    /// Of processors.
    busy: Duration,
    /// Most memory resident, in bytes.
    memory: u64,
}

/// Runs `kigo` and measures it.
// `wait4` below waits for the child, and says what it used.
#[allow(clippy::zombie_processes)]
fn run(args: &[&str], file: &Path, stdin: &str) -> Ran {
    let bin = kigo_bin();
    let started = Instant::now();
    let mut child = Command::new(bin)
        .args(args)
        .args(["--device", "cpu", "--threads", "2", "--model"])
        .arg(file)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kigo starts");
    let mut input = child.stdin.take().expect("a pipe");
    // A command that fails early may not read it.
    let _ = input.write_all(stdin.as_bytes());
    drop(input);
    let (mut out, mut err) = (
        child.stdout.take().expect("a pipe"),
        child.stderr.take().expect("a pipe"),
    );
    let errors = thread::spawn(move || {
        let mut text = Vec::new();
        err.read_to_end(&mut text).expect("stderr");
        text
    });
    let mut stdout = Vec::new();
    out.read_to_end(&mut stdout).expect("stdout");
    let stderr = errors.join().expect("reads stderr");
    let mut status = 0;
    // SAFETY: plain data, to be written by the call.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: this process's child, which nobody else waits for.
    let pid = unsafe { libc::wait4(child.id() as i32, &mut status, 0, &mut usage) };
    assert_eq!(pid, child.id() as i32);
    Ran {
        code: libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
        stdout,
        time: started.elapsed(),
        busy: seconds(usage.ru_utime) + seconds(usage.ru_stime),
        // Kilobytes on Linux.
        memory: usage.ru_maxrss as u64 * 1024,
    }
}

fn seconds(t: libc::timeval) -> Duration {
    Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64)
}

/// What is wrong with how a run went, whatever it was to do.
fn fault(ran: &Ran, file: &Path) -> Option<String> {
    let size = std::fs::metadata(file).map_or(0, |m| m.len());
    let Some(code) = ran.code else {
        return Some(format!("ended by a signal: {}", ran.stderr));
    };
    if !matches!(code, 0 | 1) || ran.stderr.contains("panicked") {
        return Some(format!("exit code {code}: {}", ran.stderr));
    }
    if code == 1 && (ran.stderr.trim().is_empty() || !ran.stdout.is_empty()) {
        return Some(format!("an error of {:?}", ran.stderr));
    }
    // A busy machine may make it wait, but not for long.
    if ran.time.min(ran.busy) > Duration::from_secs(1) || ran.time > Duration::from_secs(20) {
        return Some(format!("took {:?}, busy for {:?}", ran.time, ran.busy));
    }
    let beyond = ran.memory.saturating_sub(size);
    (beyond > 64 << 20).then(|| format!("took {} MB", beyond >> 20))
}

const LOGITS: &[&str] = &["logits", "--ids", "1,2,3", "--top", "3"];
const CHAT: &str = r#"{"messages": [{"role": "user", "content": "hi"}]}"#;

#[test]
fn each_is_handled_as_its_manifest_says() {
    let Some((dir, manifest)) = manifest() else {
        return println!("KIGO_GOLDEN_DIR is not set: nothing to refuse");
    };
    let mut wrong = Vec::new();
    let mut blame = |name: &str, what: String| wrong.push(format!("{name}: {what}"));
    for (name, entry) in &manifest {
        println!("{name}: {}", entry.what);
        let file = dir.join(name).with_added_extension("gguf");
        let ran = run(LOGITS, &file, "");
        if let Some(fault) = fault(&ran, &file) {
            blame(name, fault);
        }
        let expected: &[i32] = match entry.expect.as_str() {
            "reject" => &[1],
            "load" | "load-template-must-fail-bounded" => &[0],
            "load-or-reject" | "reject-or-load" => &[0, 1],
            other => panic!("{name}: the manifest expects {other}"),
        };
        let code = ran.code.unwrap_or(-1);
        if !expected.contains(&code) {
            blame(
                name,
                format!("exit code {code}, {}: {}", entry.expect, ran.stderr),
            );
        }
        if code == 1 && !ran.stderr.contains(name.as_str()) {
            blame(name, format!("the file is not named: {}", ran.stderr));
        }
        if code == 0 {
            // What loads must generate too, even of weights that are not numbers, and render or refuse.
            let args = [
                "generate",
                "--ids",
                "1,2,3",
                "--max-tokens",
                "4",
                "--seed",
                "1",
            ];
            let generated = run(&args, &file, "");
            let rendered = run(&["chat-template"], &file, CHAT);
            for (what, ran) in [("generate", &generated), ("chat-template", &rendered)] {
                if let Some(fault) = fault(ran, &file) {
                    blame(name, format!("{what}: {fault}"));
                }
            }
            if entry.expect.starts_with("load-template") && rendered.code != Some(1) {
                blame(name, "its template rendered".into());
            }
        }
    }
    assert_eq!(manifest.len(), 102);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What the error must name: the field, the tensor or the number that is wrong.
const NAMED: &[(&str, &[&str])] = &[
    ("bad-magic", &["GGUG", "GGUF"]),
    ("version-1", &["version 1"]),
    ("version-99", &["version 99"]),
    ("truncated-tensor-data", &["blk.0.ffn_up.weight", "cut off"]),
    ("n-kv-u64max", &["18446744073709551615"]),
    ("n-tensors-huge", &["4611686018427387904"]),
    ("n-tensors-zero", &["token_embd.weight"]),
    ("string-length-beyond-eof", &["general.name", "1000000000"]),
    ("string-length-u64max", &["general.architecture"]),
    ("array-length-u64max", &["x.arr"]),
    ("array-of-strings-2e60", &["tokenizer.ggml.tokens"]),
    ("array-elem-string-huge", &["tokenizer.ggml.tokens", "[2]"]),
    ("kv-type-unknown-13", &["x.t", "13"]),
    (
        "dims-product-overflow",
        &["blk.0.ffn_up.weight", "4294967296"],
    ),
    ("dim-zero", &["blk.0.ffn_up.weight", "0 elements"]),
    ("n-dims-5", &["blk.0.ffn_up.weight", "5 dimensions"]),
    ("tensor-type-removed", &["blk.0.ffn_up.weight", "type 4"]),
    ("offset-unaligned", &["blk.0.ffn_up.weight", "55169"]),
    (
        "offset-beyond-eof",
        &["blk.0.ffn_up.weight", "1099511627776"],
    ),
    ("alignment-0", &["general.alignment", "0"]),
    ("alignment-3", &["general.alignment", "3"]),
    ("missing-architecture", &["general.architecture"]),
    ("architecture-wrong-type", &["general.architecture", "5"]),
    ("missing-embedding-length", &["llama.embedding_length"]),
    (
        "missing-feed-forward-length",
        &["llama.feed_forward_length"],
    ),
    (
        "missing-layer-norm-rms-epsilon",
        &["llama.attention.layer_norm_rms_epsilon"],
    ),
    ("missing-tokenizer-model", &["tokenizer.ggml.model"]),
    ("unknown-tokenizer-model", &["tokenizer.ggml.model", "quux"]),
    ("block-count-string", &["llama.block_count"]),
    ("block-count-negative", &["llama.block_count", "-1"]),
    ("block-count-2e31", &["2147483648"]),
    ("block-count-2", &["blk.1."]),
    ("head-count-0", &["llama.attention.head_count"]),
    (
        "head-count-2e31",
        &["llama.attention.head_count", "2147483648"],
    ),
    ("head-count-array-short", &["llama.attention.head_count"]),
    ("head-count-kv-0", &["llama.attention.head_count_kv"]),
    ("head-count-kv-gt-head-count", &["head_count_kv", "4", "2"]),
    ("key-length-huge", &["key_length", "2147483648"]),
    ("embedding-length-0", &["llama.embedding_length"]),
    ("rms-eps-negative", &["layer_norm_rms_epsilon", "-1"]),
    ("rope-dims-odd", &["llama.rope.dimension_count", "63"]),
    ("rope-freq-base-0", &["llama.rope.freq_base"]),
    ("rope-freq-base-nan", &["llama.rope.freq_base", "NaN"]),
    (
        "rope-scaling-type-unknown",
        &["llama.rope.scaling.type", "quux"],
    ),
    ("vocab-size-mismatch", &["288", "289"]),
    (
        "tensor-shape-mismatch",
        &["blk.0.attn_q.weight", "[64, 64]", "[64, 128]"],
    ),
    (
        "tensor-shape-transposed",
        &["attn_output.weight", "[64, 128]", "[128, 64]"],
    ),
    ("missing-tensor", &["blk.0.attn_k.weight"]),
    ("missing-token-embd", &["token_embd.weight"]),
    ("tokens-not-array", &["tokenizer.ggml.tokens", "abc"]),
    ("merges-wrong-elem-type", &["tokenizer.ggml.merges", "i32"]),
    (
        "scores-length-mismatch",
        &["tokenizer.ggml.scores", "3", "288"],
    ),
    ("directory", &["directory"]),
];

#[test]
fn errors_name_what_is_wrong() {
    let Some((dir, _)) = manifest() else {
        return println!("KIGO_GOLDEN_DIR is not set: nothing to refuse");
    };
    let mut wrong = Vec::new();
    for (name, words) in NAMED {
        let file = dir.join(name).with_added_extension("gguf");
        let said = run(LOGITS, &file, "").stderr;
        for word in words.iter().filter(|word| !said.contains(**word)) {
            wrong.push(format!("{name}: {word:?} is not in: {said}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
