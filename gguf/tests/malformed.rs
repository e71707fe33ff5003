//! Files that break the format: each gets an error that names the field or tensor; none panics,
//! takes long or makes the parser allocate by a number that the file claims.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use gguf::{Array, GgmlType, Gguf, Value, Writer};
use proptest::prelude::*;

/// Counts what the current thread has allocated at most at a time.
struct Counting;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: hands everything to the system's allocator; the counters do not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.get().wrapping_add(layout.size());
        LIVE.set(live);
        PEAK.set(PEAK.get().max(live));
        // SAFETY: the caller's layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get().saturating_sub(layout.size()));
        // SAFETY: the caller's pointer and layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `f` and returns the most bytes that it had allocated at a time.
fn peak<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let out = f();
    (out, PEAK.get().saturating_sub(before))
}

fn sample_writer() -> Writer {
    let mut w = Writer::new();
    w.metadata("general.architecture", "llama");
    w.metadata("general.name", "sample");
    w.metadata("llama.block_count", 1u32);
    w.metadata("x.bool", true);
    w.metadata("x.u8", 200u8)
        .metadata("x.i8", -3i8)
        .metadata("x.u16", 60000u16)
        .metadata("x.i16", -9i16);
    w.metadata("x.u64", u64::MAX)
        .metadata("x.i64", i64::MIN)
        .metadata("x.f32", 1e-5f32)
        .metadata("x.f64", 0.1f64);
    w.metadata(
        "x.strings",
        vec!["a".to_owned(), String::new(), "季語".to_owned()],
    );
    w.metadata("x.i32s", vec![1i32, -1, 7]);
    w.metadata("x.bools", Value::Array(Array::Bool(vec![true, false])));
    let inner = vec![Array::F32(vec![0.5]), Array::String(vec!["deep".into()])];
    w.metadata("x.nested", Value::Array(Array::Array(inner)));
    w.tensor("a.weight", &[32, 2], GgmlType::Q4_0).unwrap();
    w.tensor("b.weight", &[5], GgmlType::F32).unwrap();
    w.tensor("c.weight", &[256, 1, 2, 1], GgmlType::Q6_K)
        .unwrap();
    w
}

/// A valid file with every metadata type and three tensors.
fn sample() -> Vec<u8> {
    let mut payload = sample_writer().begin(Vec::new()).unwrap();
    payload
        .write(&(0..36 + 20 + 420).map(|i| i as u8).collect::<Vec<u8>>())
        .unwrap();
    payload.finish().unwrap()
}

fn open(bytes: Vec<u8>) -> Result<Gguf, gguf::Error> {
    Gguf::from_bytes("sample.gguf", bytes)
}

fn refusal(bytes: Vec<u8>) -> String {
    open(bytes).expect_err("the file was accepted").to_string()
}

/// Reads all that an accepted file offers.
fn use_all(file: &Gguf) {
    for (key, value) in file.metadata().iter() {
        assert!(file.metadata().get(key).is_some());
        let _ = (value.to_string(), serde_json::to_string(value).unwrap());
        let m = file.metadata();
        let _ = (
            m.u32(key),
            m.f32(key),
            m.str(key),
            m.strings(key).map(|s| s.len()),
            m.i32s(key).map(|s| s.len()),
        );
    }
    for t in file.tensors() {
        assert_eq!(t.data().len() as u64, t.row_bytes() * t.rows());
        let mut out = vec![0.0; 300.min(t.elements() as usize)];
        let _ = t.dequantize_into(t.elements() - out.len() as u64, &mut out);
    }
}

/// The bytes with `old` replaced by `new` of the same length; `old` must occur exactly once.
fn patch(old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut bytes = sample();
    assert_eq!(old.len(), new.len());
    let at: Vec<usize> = (0..bytes.len() - old.len())
        .filter(|&i| &bytes[i..i + old.len()] == old)
        .collect();
    assert_eq!(at.len(), 1, "{old:?} must occur once");
    bytes[at[0]..at[0] + new.len()].copy_from_slice(new);
    bytes
}

/// The sample with `value` written `skip` bytes after the only occurrence of `marker`'s end.
fn poke(marker: &str, skip: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = sample();
    let at = bytes
        .windows(marker.len())
        .position(|w| w == marker.as_bytes())
        .unwrap()
        + marker.len()
        + skip;
    bytes[at..at + value.len()].copy_from_slice(value);
    bytes
}

#[test]
fn the_sample_reads_back_as_written() {
    let file = open(sample()).unwrap();
    let m = file.metadata();
    assert_eq!((file.version(), file.alignment(), m.len()), (3, 32, 16));
    assert_eq!(m.str("general.architecture").unwrap(), "llama");
    assert_eq!(m.get("x.f64"), Some(&Value::F64(0.1)));
    assert_eq!(m.get("x.i64"), Some(&Value::I64(i64::MIN)));
    assert_eq!(m.strings("x.strings").unwrap(), ["a", "", "季語"]);
    let nested = Array::Array(vec![
        Array::F32(vec![0.5]),
        Array::String(vec!["deep".into()]),
    ]);
    assert_eq!(m.get("x.nested"), Some(&Value::Array(nested)));
    assert_eq!(m.iter().map(|(k, _)| k).nth(1), Some("general.name"));

    let names: Vec<_> = file.tensors().map(|t| t.name().to_owned()).collect();
    assert_eq!(names, ["a.weight", "b.weight", "c.weight"]);
    let c = file.require("c.weight").unwrap();
    assert_eq!(
        (c.dims(), c.rows(), c.row_len(), c.row_bytes()),
        (&[256, 1, 2, 1][..], 2, 256, 210)
    );
    assert_eq!(c.data()[0], 56);
    assert_eq!(c.blocks::<gguf::blocks::Q6K>().unwrap().len(), 2);
    assert!(
        c.blocks::<gguf::blocks::Q4_0>()
            .unwrap_err()
            .to_string()
            .contains("has type Q6_K, expected Q4_0")
    );
    let missing = file.require("d.weight").unwrap_err().to_string();
    assert_eq!(missing, "sample.gguf: tensor \"d.weight\" is missing");
    use_all(&file);
}

#[test]
fn version_2_reads_the_same() {
    let mut bytes = sample();
    bytes[4] = 2;
    let file = open(bytes).unwrap();
    assert_eq!((file.version(), file.tensors().len()), (2, 3));
}

#[test]
fn errors_name_the_field_the_value_and_the_limit() {
    let max = u64::MAX.to_le_bytes();
    let b_entry = |dims: &[u64], ty: u32, offset: u64| {
        // b.weight: number of dims, one dim, type, offset.
        let mut new = (dims.len() as u32).to_le_bytes().to_vec();
        dims.iter().for_each(|d| new.extend(d.to_le_bytes()));
        new.extend(ty.to_le_bytes());
        new.extend(offset.to_le_bytes());
        poke("b.weight", 0, &new)
    };
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (b"GGUG".repeat(10), &["not a GGUF file", "GGUG"]),
        (vec![], &["empty"]),
        (poke("GGUF", 0, &99u32.to_le_bytes()), &["version 99"]),
        (poke("GGUF", 0, &1u32.to_le_bytes()), &["version 1 "]),
        (poke("GGUF", 0, &3u32.to_be_bytes()), &["big-endian"]),
        (
            poke("GGUF", 4, &max),
            &["tensor count", "18446744073709551615", "at most"],
        ),
        (
            poke("GGUF", 12, &max),
            &["metadata count", "18446744073709551615", "at most"],
        ),
        (
            poke("GGUF", 20, &max),
            &["length of metadata key 0", "18446744073709551615"],
        ),
        (
            poke("general.name", 4, &max),
            &["general.name", "18446744073709551615"],
        ),
        (
            poke("general.name", 0, &13u32.to_le_bytes()),
            &["general.name", "type 13"],
        ),
        (poke("x.bool", 4, &[2]), &["x.bool", "stored as 2"]),
        (
            poke("x.strings", 8, &(1u64 << 60).to_le_bytes()),
            &["element count", "x.strings", "1152921504606846976"],
        ),
        (
            poke("x.i32s", 8, &(u64::MAX / 4 + 2).to_le_bytes()),
            &["element count", "x.i32s"],
        ),
        (patch(b"x.u16", b"x.i16"), &["x.i16", "twice"]),
        (patch(b"x.u16", b"x.u1\xff"), &["metadata key", "UTF-8"]),
        (
            patch(b"b.weight", b"a.weight"),
            &["tensor name", "a.weight", "twice"],
        ),
        (
            poke("b.weight", 0, &5u32.to_le_bytes()),
            &["b.weight", "5 dimensions", "at most 4"],
        ),
        (b_entry(&[0], 0, 64), &["b.weight", "0 elements"]),
        (b_entry(&[1 << 63], 0, 64), &["b.weight", "2^63"]),
        (b_entry(&[1 << 62], 0, 64), &["b.weight", "64 bits"]),
        (b_entry(&[5], 4, 64), &["b.weight", "type 4"]),
        (
            b_entry(&[5], 8, 64),
            &["b.weight", "Q8_0", "block length 32"],
        ),
        (
            b_entry(&[5], 0, 65),
            &["b.weight", "offset 65", "alignment 32"],
        ),
        (b_entry(&[5], 0, 1 << 40), &["b.weight", "1099511627776"]),
        (
            b_entry(&[5], 0, u64::MAX - 31),
            &["b.weight", "18446744073709551584"],
        ),
        (b_entry(&[5], 0, 32), &["a.weight", "b.weight", "overlap"]),
    ];
    for (bytes, parts) in cases {
        let message = refusal(bytes);
        for part in parts {
            assert!(message.contains(part), "{message:?} does not say {part:?}");
        }
    }
}

#[test]
fn alignment_is_a_power_of_two() {
    for (value, ok) in [
        (0u32, false),
        (1, true),
        (3, false),
        (8, true),
        (48, false),
        (4096, true),
    ] {
        let mut w = sample_writer();
        w.metadata("general.alignment", value);
        if ok {
            w.alignment(value).unwrap();
        }
        let mut payload = w.begin(Vec::new()).unwrap();
        payload.write(&[0; 476]).unwrap();
        match open(payload.finish().unwrap()) {
            Ok(file) => assert!(
                ok && file.alignment() == u64::from(value) && file.tensor("c.weight").is_some()
            ),
            Err(e) => assert!(
                !ok && e
                    .to_string()
                    .contains(&format!("general.alignment\" is {value}")),
                "{e}"
            ),
        }
    }
    let mut w = sample_writer();
    w.metadata("general.alignment", "32");
    let mut payload = w.begin(Vec::new()).unwrap();
    payload.write(&[0; 476]).unwrap();
    assert!(refusal(payload.finish().unwrap()).contains("string \"32\""));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = sample();
    let data_end = open(whole.clone())
        .unwrap()
        .require("c.weight")
        .map(|t| t.file_offset() as usize + t.data().len())
        .unwrap();
    for len in 0..data_end {
        assert!(
            open(whole[..len].to_vec()).is_err(),
            "cut to {len} of {data_end} bytes"
        );
    }
    // The padding behind the last tensor is not needed, and more than that does not hurt.
    open(whole[..data_end].to_vec()).unwrap();
    open([whole, vec![0xaa; 4096]].concat()).unwrap();
}

#[test]
fn invalid_utf8_in_values_is_kept_as_bytes() {
    let file = open(patch("季語".as_bytes(), b"\xff\xfe\xfdabc")).unwrap();
    let e = file
        .metadata()
        .strings("x.strings")
        .unwrap_err()
        .to_string();
    assert!(e.contains("index 2") && e.contains("UTF-8"), "{e}");
    let raw = file
        .metadata()
        .opt_byte_strings("x.strings")
        .unwrap()
        .unwrap();
    assert_eq!(raw, [&b"a"[..], b"", b"\xff\xfe\xfdabc"]);
}

#[test]
fn dequantisation_from_any_offset_equals_the_whole() {
    let file = open(sample()).unwrap();
    for t in file.tensors() {
        let n = t.elements() as usize;
        let mut whole = vec![0.0; n];
        t.dequantize_into(0, &mut whole).unwrap();
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for offset in (0..n).step_by(7) {
            for len in [0, 1, 5, 31, 33, 300].iter().map(|&l| l.min(n - offset)) {
                let mut out = vec![f32::NAN; len];
                t.dequantize_into(offset as u64, &mut out).unwrap();
                assert_eq!(
                    bits(&out),
                    bits(&whole[offset..offset + len]),
                    "{t:?} {offset}+{len}"
                );
            }
        }
        let mut row = vec![0.0; t.row_len() as usize];
        t.dequantize_row(t.rows() - 1, &mut row).unwrap();
        assert_eq!(bits(&row), bits(&whole[n - row.len()..]));
        assert!(t.dequantize_row(t.rows(), &mut row).is_err());
        assert!(t.dequantize_into(n as u64, &mut [0.0]).is_err());
        assert!(t.dequantize_into(u64::MAX, &mut [0.0]).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn flipped_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = sample();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let size = bytes.len();
        let (file, peak) = peak(|| open(bytes));
        prop_assert!(peak < 64 * size, "{peak} bytes for a file of {size}");
        if let Ok(file) = file {
            use_all(&file);
        }
    }

    #[test]
    fn wild_numbers_never_panic(
        at in any::<prop::sample::Index>(),
        value in prop_oneof![
            any::<u64>(), 0..40u64, Just(u64::MAX), (0..64u32).prop_map(|s| 1 << s), (0..64u32).prop_map(|s| (1 << s) - 1)
        ],
        width in prop_oneof![Just(4usize), Just(8)],
    ) {
        let mut bytes = sample();
        let at = at.index(bytes.len() - 8);
        bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        let size = bytes.len();
        let (file, peak) = peak(|| open(bytes));
        prop_assert!(peak < 64 * size, "{peak} bytes for a file of {size}");
        if let Ok(file) = file {
            use_all(&file);
        }
    }
}

/// What the container format has to refuse of the reference set of malformed files: name and a part of
/// the message. The others are wrong as models, not as files, or may load.
const REFUSED: &[(&str, &str)] = &[
    ("alignment-0", "general.alignment"),
    ("alignment-3", "general.alignment"),
    ("alignment-wrong-type", "general.alignment"),
    ("array-elem-string-huge", "tokenizer.ggml.tokens\"[2]"),
    ("array-length-u64max", "x.arr"),
    ("array-of-strings-2e60", "tokenizer.ggml.tokens"),
    ("bad-magic", "not a GGUF file"),
    ("big-endian-file", "big-endian"),
    ("bool-value-2", "add_bos_token"),
    ("dim-negative", "blk.0.ffn_up.weight"),
    ("dim-zero", "blk.0.ffn_up.weight"),
    ("dims-product-overflow", "blk.0.ffn_up.weight"),
    ("directory", "a directory"),
    ("empty-file", "empty"),
    ("key-70000-bytes", "70000"),
    ("key-empty", "empty"),
    ("key-length-2e63", "9223372036854775808"),
    ("kv-type-unknown-13", "type 13"),
    ("kv-type-unknown-u32max", "type 4294967295"),
    ("magic-ggml-legacy", "not a GGUF file"),
    ("magic-only", "4 bytes"),
    ("n-dims-5", "5 dimensions"),
    ("n-dims-u32max", "4294967295 dimensions"),
    ("n-kv-one-more", "tensor 0"),
    ("n-kv-u64max", "metadata count"),
    ("n-tensors-4e9", "4000000000"),
    ("n-tensors-huge", "tensor count"),
    ("nested-arrays-10000", "deeper"),
    ("offset-beyond-eof", "blk.0.ffn_up.weight"),
    ("offset-last-tensor-straddles-eof", "blk.0.ffn_up.weight"),
    ("offset-unaligned", "alignment 32"),
    ("overlapping-tensors", "overlap"),
    ("string-length-beyond-eof", "1000000000"),
    ("string-length-u64max", "general.architecture"),
    ("tensor-name-70000-bytes", "70000"),
    ("tensor-name-empty", "empty"),
    ("tensor-type-i32-weight", "blk.0.ffn_up.weight"),
    ("tensor-type-removed", "type 4"),
    ("truncated-after-metadata", "output_norm.weight"),
    ("truncated-header", "12 bytes"),
    ("truncated-in-tensor-infos", "name of tensor 9"),
    ("truncated-tensor-data", "blk.0.ffn_up.weight"),
    ("truncated-tensor-data-half", "blk.0.attn_output.weight"),
    ("version-1", "version 1 "),
    ("version-99", "version 99"),
];

/// The whole reference set, where `KIGO_GOLDEN_DIR` says that it is.
#[test]
fn the_reference_set_of_malformed_files() {
    let Some(dir) = std::env::var_os("KIGO_GOLDEN_DIR") else {
        eprintln!("KIGO_GOLDEN_DIR is not set: only the files made here were tested");
        return;
    };
    let dir = PathBuf::from(dir).join("tiny/bad");
    let manifest = std::fs::read_to_string(dir.join("manifest.json")).unwrap();
    let manifest: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&manifest).unwrap();
    assert!(manifest.len() >= 102, "{} files", manifest.len());
    for (name, about) in &manifest {
        let path = dir.join(format!("{name}.gguf"));
        let size = std::fs::metadata(&path).unwrap().len() as usize;
        let start = Instant::now();
        let (result, peak) = peak(|| {
            let file = Gguf::open(&path)?;
            use_all(&file);
            Ok::<Gguf, gguf::Error>(file)
        });
        assert!(
            start.elapsed() < Duration::from_secs(1),
            "{name} took {:?}",
            start.elapsed()
        );
        assert!(peak < (64 << 20) + size, "{name} took {peak} bytes");
        let refused = REFUSED.iter().find(|(n, _)| n == name);
        match (result, refused) {
            (Ok(_), None) => {}
            (Err(e), Some((_, part))) => {
                assert_ne!(about["expect"], "load", "{name}: {e}");
                assert!(
                    e.to_string().contains(part),
                    "{name}: {e} does not say {part:?}"
                );
            }
            (Ok(_), Some(_)) => panic!("{name} was accepted: {about}"),
            (Err(e), None) => panic!("{name} was refused, though only the model can know: {e}"),
        }
    }
}
