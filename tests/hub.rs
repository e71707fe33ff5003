//! Models from the hub, against a small local server that speaks the hub's API: chosen by file and by type,
//! resumed, checked, split files together, tokens, and the cache without a hub.

use gguf::{Gguf, Writer};
use kigo_tests::{golden_dir, kigo_bin};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

const REPOSITORY: &str = "kigo/tiny-GGUF";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Where the first download of a file stops, if it is cut.
const CUT: usize = 100_000;

struct File {
    data: Vec<u8>,
    sha256: String,
}

#[derive(Default)]
struct State {
    files: HashMap<String, File>,
    /// The file whose first download breaks off.
    cut: Option<String>,
    token: Option<String>,
    /// Path, and first byte asked for, of downloads.
    downloads: Vec<(String, usize)>,
    requests: usize,
}

struct Hub {
    endpoint: String,
    state: Arc<Mutex<State>>,
}

impl Hub {
    fn start(state: State) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                // A client that goes away ends its thread.
                std::thread::spawn(move || serve(stream, &state).ok());
            }
        });
        Hub { endpoint, state }
    }

    fn downloads(&self) -> Vec<(String, usize)> {
        self.state.lock().expect("no panic").downloads.clone()
    }

    fn requests(&self) -> usize {
        self.state.lock().expect("no panic").requests
    }

    /// Runs `kigo` with this hub and a cache in `home`.
    fn kigo(&self, home: &Path, variables: &[(&str, &str)], args: &[&str]) -> Output {
        let mut command = Command::new(kigo_bin());
        for name in [
            "HF_TOKEN",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HUGGING_FACE_HUB_TOKEN",
        ] {
            command.env_remove(name);
        }
        command
            .env("HF_ENDPOINT", &self.endpoint)
            .env("HF_HOME", home)
            .env("KIGO_MODELS_DIR", home.join("models"))
            .envs(variables.iter().copied())
            .args(args)
            .output()
            .expect("kigo starts")
    }
}

/// One connection, one request after the other.
fn serve(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let (mut range, mut token) = (None, None);
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let Some((name, value)) = header.trim().split_once(':') else {
                break;
            };
            match name.to_lowercase().as_str() {
                "range" => range = value.trim().strip_prefix("bytes=").map(str::to_owned),
                "authorization" => token = Some(value.trim().to_owned()),
                _ => {}
            }
        }
        let mut state = state.lock().expect("no panic");
        state.requests += 1;
        let wanted = state.token.as_ref().map(|token| format!("Bearer {token}"));
        if wanted.is_some() && wanted != token {
            write!(
                stream,
                "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n"
            )?;
            continue;
        }
        if path == format!("/api/models/{REPOSITORY}/revision/main") {
            let siblings: Vec<Value> = state
                .files
                .keys()
                .map(|name| json!({ "rfilename": name }))
                .collect();
            let body = json!({ "sha": COMMIT, "siblings": siblings }).to_string();
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json";
            write!(
                stream,
                "{head}\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )?;
            continue;
        }
        let prefix = format!("/{REPOSITORY}/resolve/main/");
        let name = path.strip_prefix(&prefix).unwrap_or_default().to_owned();
        let Some(file) = state.files.get(&name) else {
            write!(
                stream,
                "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
            )?;
            continue;
        };
        let total = file.data.len();
        let range = range.unwrap_or_else(|| "0-".into());
        let (from, to) = range.split_once('-').expect("a range");
        let from: usize = from.parse().expect("a number");
        let end = to.parse::<usize>().map_or(total, |last| last + 1);
        let body = file.data[from..end].to_vec();
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes \
             {from}-{}/{total}\r\nx-repo-commit: {COMMIT}\r\netag: \"{}\"\r\n\r\n",
            body.len(),
            end - 1,
            file.sha256
        )?;
        if to.is_empty() {
            state.downloads.push((name.clone(), from));
            if state.cut.as_ref() == Some(&name) {
                state.cut = None;
                stream.write_all(&body[..CUT])?;
                return Ok(());
            }
        }
        drop(state);
        stream.write_all(&body)?;
    }
}

fn file(data: Vec<u8>) -> File {
    use sha2::{Digest, Sha256};
    let sha256 = Sha256::digest(&data)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    File { data, sha256 }
}

fn tiny(name: &str) -> Vec<u8> {
    std::fs::read(golden_dir().join("tiny").join(name)).expect("a tiny model")
}

fn state(files: Vec<(&str, File)>) -> State {
    State {
        files: files
            .into_iter()
            .map(|(name, file)| (name.to_owned(), file))
            .collect(),
        ..State::default()
    }
}

/// The logits that `kigo logits --json` printed.
#[track_caller]
fn logits(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let json: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    json["logits"].clone()
}

const RUN: [&str; 6] = ["logits", "--device", "cpu", "--ids", "1,2,3", "--json"];

fn run<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&RUN[..], &["--model", model], more].concat()
}

#[test]
fn a_type_is_found_downloaded_resumed_and_then_here() {
    let home = tempfile::tempdir().expect("a folder");
    let mut state = state(vec![
        ("README.md", file(b"hello".to_vec())),
        ("tiny-F16.gguf", file(tiny("qwen2-F16.gguf"))),
        ("tiny-Q8_0.gguf", file(tiny("qwen2-Q8_0.gguf"))),
    ]);
    state.cut = Some("tiny-Q8_0.gguf".into());
    let hub = Hub::start(state);
    let model = format!("hf:{REPOSITORY}:Q8_0");
    let found = logits(&hub.kigo(home.path(), &[], &run(&model, &[])));
    let path = golden_dir().join("tiny/qwen2-Q8_0.gguf");
    let path = path.to_str().expect("UTF-8");
    assert_eq!(found, logits(&hub.kigo(home.path(), &[], &run(path, &[]))));
    let name = "tiny-Q8_0.gguf".to_owned();
    let downloads = hub.downloads();
    assert_eq!(downloads.len(), 2, "{downloads:?}");
    assert_eq!(downloads[0], (name.clone(), 0));
    assert!(downloads[1].1 > 0 && downloads[1].1 <= CUT, "{downloads:?}");

    // Where the hub's other tools look for it.
    let cached = home
        .path()
        .join("hub/models--kigo--tiny-GGUF/snapshots")
        .join(COMMIT)
        .join(&name);
    assert!(cached.exists());
    let offline = [("HF_HUB_OFFLINE", "1")];
    let before = hub.requests();
    assert_eq!(
        found,
        logits(&hub.kigo(home.path(), &offline, &run(&model, &[])))
    );
    assert_eq!(hub.requests(), before);
    // A hub out of reach is no hindrance either.
    let away = [("HF_ENDPOINT", "http://127.0.0.1:1")];
    assert_eq!(
        found,
        logits(&hub.kigo(home.path(), &away, &run(&model, &[])))
    );
    assert_eq!(hub.downloads().len(), 2);

    let list = hub.kigo(home.path(), &[], &["models", "list", "--json"]);
    let list: Value = serde_json::from_slice(&list.stdout).expect("one JSON object");
    let listed = list["models"].as_array().expect("a list");
    let wanted = format!("hf:{REPOSITORY}:{name}");
    let entry = listed.iter().find(|m| m["name"] == wanted.as_str());
    let entry = entry.unwrap_or_else(|| panic!("{wanted} is not in {list}"));
    assert_eq!(entry["bytes"], tiny("qwen2-Q8_0.gguf").len());
}

#[test]
fn what_is_not_what_the_hub_says_is_refused_and_deleted() {
    let home = tempfile::tempdir().expect("a folder");
    let mut wrong = file(tiny("qwen2-Q8_0.gguf"));
    wrong.data[70_000] ^= 1;
    let hub = Hub::start(state(vec![("tiny.gguf", wrong)]));
    let model = format!("hf:{REPOSITORY}");
    let output = hub.kigo(home.path(), &[], &run(&model, &[]));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && stderr.contains("sha256"),
        "{stderr}"
    );
    let blobs = home.path().join("hub/models--kigo--tiny-GGUF/blobs");
    let left: Vec<_> = std::fs::read_dir(blobs)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name())
        .filter(|name| !name.to_string_lossy().ends_with(".lock"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_repository_that_needs_a_token() {
    let home = tempfile::tempdir().expect("a folder");
    let mut state = state(vec![("tiny.gguf", file(tiny("qwen2-Q8_0.gguf")))]);
    state.token = Some("secret".into());
    let hub = Hub::start(state);
    let model = format!("hf:{REPOSITORY}:tiny.gguf");
    let output = hub.kigo(home.path(), &[], &run(&model, &[]));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && stderr.contains("HF_TOKEN"),
        "{stderr}"
    );
    let token = [("HF_TOKEN", "secret")];
    logits(&hub.kigo(home.path(), &token, &run(&model, &[])));
}

/// The tensors of a file in two parts, as the hub splits large ones.
fn split(data: Vec<u8>) -> [Vec<u8>; 2] {
    let whole = Gguf::from_bytes("whole", data).expect("a model");
    let count = whole.tensors().len();
    [0, 1].map(|no| {
        let mut writer = Writer::new();
        if no == 0 {
            for (key, value) in whole.metadata().iter() {
                writer.metadata(key, value.clone());
            }
        }
        writer.metadata("split.no", no as u16);
        writer.metadata("split.count", 2u16);
        writer.metadata("split.tensors.count", count as i32);
        let mine = |i: usize| (i < count / 2) == (no == 0);
        let tensors: Vec<_> = whole
            .tensors()
            .enumerate()
            .filter(|(i, _)| mine(*i))
            .map(|(_, t)| t)
            .collect();
        for t in &tensors {
            writer.tensor(t.name(), t.dims(), t.ty()).expect("a tensor");
        }
        let mut payload = writer.begin(Vec::new()).expect("a header");
        for t in &tensors {
            payload.write(t.data()).expect("its data");
        }
        payload.finish().expect("a file")
    })
}

#[test]
fn parts_of_a_split_file_come_together() {
    let home = tempfile::tempdir().expect("a folder");
    let [first, second] = split(tiny("qwen2-Q8_0.gguf"));
    let hub = Hub::start(state(vec![
        ("Q8_0/tiny-Q8_0-00001-of-00002.gguf", file(first)),
        ("Q8_0/tiny-Q8_0-00002-of-00002.gguf", file(second)),
        ("mmproj-F16.gguf", file(b"GGUF".to_vec())),
    ]));
    let model = format!("hf:{REPOSITORY}:q8_0");
    let found = logits(&hub.kigo(home.path(), &[], &run(&model, &[])));
    let path = golden_dir().join("tiny/qwen2-Q8_0.gguf");
    let path = path.to_str().expect("UTF-8");
    assert_eq!(found, logits(&hub.kigo(home.path(), &[], &run(path, &[]))));
    assert_eq!(hub.downloads().len(), 2);
}

#[test]
fn what_cannot_be_meant_is_said() {
    let home = tempfile::tempdir().expect("a folder");
    let hub = Hub::start(state(vec![
        ("tiny-Q8_0.gguf", file(b"x".to_vec())),
        ("tiny-Q5_0.gguf", file(b"x".to_vec())),
    ]));
    for (model, says) in [
        (format!("hf:{REPOSITORY}"), "tiny-Q5_0.gguf, tiny-Q8_0.gguf"),
        (
            format!("hf:{REPOSITORY}:F16"),
            "tiny-Q5_0.gguf, tiny-Q8_0.gguf",
        ),
        ("hf:kigo/none".into(), "404"),
        ("hf:kigo".into(), "OWNER/REPO"),
    ] {
        let output = hub.kigo(home.path(), &[], &run(&model, &[]));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && stderr.contains(says),
            "{stderr}"
        );
    }
    assert!(hub.downloads().is_empty());
}
