//! Models split over several files.

use std::path::{Path, PathBuf};

use gguf::{GgmlType, Gguf, Value, Writer};

/// An empty folder of its own for each test.
fn folder(test: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("splits-{test}"));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn name(dir: &Path, number: usize, count: usize) -> PathBuf {
    dir.join(format!("tiny-{number:05}-of-{count:05}.gguf"))
}

/// Writes a part that holds the named tensors, each of 4 values equal to the part's index.
fn write(path: &Path, keys: &[(&str, Value)], no: u16, tensors: &[&str]) {
    let mut w = Writer::new();
    for (key, value) in keys {
        w.metadata(*key, value.clone());
    }
    for tensor in tensors {
        w.tensor(*tensor, &[4], GgmlType::F32).unwrap();
    }
    let mut payload = w.begin(Vec::new()).unwrap();
    payload
        .write(&f32::from(no).to_le_bytes().repeat(4 * tensors.len()))
        .unwrap();
    std::fs::write(path, payload.finish().unwrap()).unwrap();
}

fn keys(no: u16, count: u16, tensors: i32) -> Vec<(&'static str, Value)> {
    let mut keys = vec![
        ("split.no", no.into()),
        ("split.count", count.into()),
        ("split.tensors.count", tensors.into()),
    ];
    if no == 0 {
        keys.push(("general.architecture", "llama".into()));
    }
    keys
}

/// Three parts: the first without tensors, as gguf-split's --no-tensor-first-split makes it.
fn three(dir: &Path) {
    write(&name(dir, 1, 3), &keys(0, 3, 3), 0, &[]);
    write(&name(dir, 2, 3), &keys(1, 3, 3), 1, &["a", "b"]);
    write(&name(dir, 3, 3), &keys(2, 3, 3), 2, &["c"]);
}

fn refusal(path: &Path) -> String {
    Gguf::open(path)
        .expect_err("the split was accepted")
        .to_string()
}

#[test]
fn any_part_opens_all() {
    let dir = folder("any");
    three(&dir);
    for number in 1..=3 {
        let path = name(&dir, number, 3);
        let file = Gguf::open(&path).unwrap();
        assert_eq!(file.path(), path);
        assert_eq!(
            file.paths().collect::<Vec<_>>(),
            [name(&dir, 1, 3), name(&dir, 2, 3), name(&dir, 3, 3)]
        );
        assert_eq!(
            file.metadata().str("general.architecture").unwrap(),
            "llama"
        );
        assert_eq!(
            file.tensors().map(|t| t.name()).collect::<Vec<_>>(),
            ["a", "b", "c"]
        );
        let bytes: u64 = file
            .paths()
            .map(|p| std::fs::metadata(p).unwrap().len())
            .sum();
        assert_eq!(file.file_bytes(), bytes);
        for (tensor, value) in [("a", 1.0), ("b", 1.0), ("c", 2.0)] {
            let t = file.require(tensor).unwrap();
            let mut out = [0.0; 4];
            file.prefault(&t);
            t.dequantize_into(0, &mut out).unwrap();
            assert_eq!(out, [value; 4], "{tensor} of part {number}");
            file.release(&t);
            t.dequantize_into(0, &mut out).unwrap();
            assert_eq!(out, [value; 4], "{tensor} of part {number}, released");
        }
        assert_eq!(file.require("c").unwrap().path(), name(&dir, 3, 3));
    }
}

#[test]
fn a_missing_part_is_named() {
    let dir = folder("missing");
    three(&dir);
    std::fs::remove_file(name(&dir, 3, 3)).unwrap();
    let e = refusal(&name(&dir, 2, 3));
    assert!(
        e.contains("tiny-00003-of-00003.gguf") && e.contains("part 3 of 3"),
        "{e}"
    );
}

#[test]
fn a_renamed_part_says_what_its_name_must_be() {
    let dir = folder("renamed");
    three(&dir);
    let path = dir.join("model.gguf");
    std::fs::rename(name(&dir, 2, 3), &path).unwrap();
    let e = refusal(&path);
    assert!(e.contains("-00002-of-00003.gguf"), "{e}");
    // A part under another part's name.
    std::fs::rename(&path, name(&dir, 3, 3)).unwrap();
    let e = refusal(&name(&dir, 3, 3));
    assert!(e.contains("-00002-of-00003.gguf"), "{e}");
}

#[test]
fn parts_must_agree_with_their_names_and_the_counts() {
    let dir = folder("agree");
    three(&dir);
    let second = name(&dir, 2, 3);
    type Wrong<'a> = (Vec<(&'a str, Value)>, &'a [&'a str], &'a str);
    let wrong: [Wrong; 6] = [
        (keys(2, 3, 3), &["a", "b"], "\"split.no\" is 2, expected 1"),
        (
            keys(1, 4, 3),
            &["a", "b"],
            "\"split.count\" is 4, expected 3",
        ),
        (
            keys(1, 3, 3),
            &["a"],
            "\"split.tensors.count\" is 3, but the 3 files hold 2",
        ),
        (keys(1, 3, 3), &["a", "c"], "tensor \"c\" is also in"),
        (vec![], &["a", "b"], "\"split.no\" is missing"),
        (
            vec![("split.no", "x".into())],
            &["a", "b"],
            "\"split.no\" is string",
        ),
    ];
    for (keys, tensors, message) in wrong {
        write(&second, &keys, 1, tensors);
        let e = refusal(&name(&dir, 1, 3));
        assert!(e.contains(message), "{e:?} does not say {message:?}");
    }
    write(&second, &keys(7, 3, 3), 1, &["a", "b"]);
    let e = refusal(&second);
    assert!(e.contains("split.no is 7") && e.contains('3'), "{e}");
}

#[test]
fn a_split_of_one_is_a_file_like_others() {
    let dir = folder("one");
    let path = dir.join("plain.gguf");
    write(&path, &keys(0, 1, 1), 0, &["a"]);
    assert_eq!(Gguf::open(&path).unwrap().paths().len(), 1);
    // And a file without split keys may have any name.
    let path = name(&dir, 1, 2);
    write(
        &path,
        &[("general.architecture", "llama".into())],
        0,
        &["a"],
    );
    assert_eq!(Gguf::open(&path).unwrap().paths().len(), 1);
}

#[test]
fn part_of_a_split_does_not_open_from_memory() {
    let dir = folder("memory");
    three(&dir);
    let bytes = std::fs::read(name(&dir, 2, 3)).unwrap();
    let e = Gguf::from_bytes("m", bytes).unwrap_err().to_string();
    assert!(e.contains("3 parts"), "{e}");
}
