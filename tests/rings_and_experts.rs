//! What a step need not read: tokens that no window sees any more, and experts that no row picked.

use gguf::Gguf;
use kigo::device::{BLOCK_TOKENS, CacheType};
use kigo::engine::Direct;
use kigo::model::{DeviceChoice, LoadOptions};
use kigo_tests::golden_dir;
use std::sync::Arc;

fn tiny(name: &str) -> Gguf {
    let path = golden_dir().join("tiny").join(name);
    Gguf::open(path.with_added_extension("gguf")).expect("it opens")
}

fn load(file: &Arc<Gguf>, options: &LoadOptions) -> Direct {
    Direct::new(kigo::model::load(file, options, &mut |_| ()).expect("it loads"))
}

/// Layers that see a window keep no more of the sequence: past the point where their part of the cache begins again, the
/// logits are bit by bit those that room for everything gives, of prompts in steps and of tokens one by one.
fn check_rings(names: &[&str], device: DeviceChoice, exact: bool, cache_type: Option<CacheType>) {
    const STEP: usize = 32;
    for name in names {
        let file = Arc::new(tiny(name));
        let run = |step_rows| {
            let options = LoadOptions {
                device,
                exact,
                cache_type,
                threads: Some(2),
                context: Some(320),
                step_rows,
                ..LoadOptions::default()
            };
            let mut direct = load(&file, &options);
            let ring = direct.runner().ring();
            let mut all = Vec::new();
            let ids: Vec<u32> = (0..136).map(|i| (i * 31 + i * i % 17) % 250).collect();
            for (at, ids) in ids.chunks(STEP).enumerate() {
                // The fourth step writes its blocks a second time; the fifth reads across the seam.
                let len = if at == 3 { 1 } else { STEP };
                for ids in ids.chunks(len) {
                    direct.feed(ids).expect("it runs");
                    all.push(direct.logits().expect("there are logits"));
                }
            }
            (ring, all)
        };
        let (ring, wrapped) = run(Some(STEP));
        let ring = ring.expect("windows have a part of the cache for themselves");
        assert!(ring.len * BLOCK_TOKENS <= 96, "{name}: {ring:?}");
        let (none, whole) = run(None);
        assert_eq!(none, None, "{name}: room for everything");
        assert!(whole.iter().flatten().all(|l| l.is_finite()));
        assert!(wrapped == whole, "{name} {device:?} exact={exact}");
    }
}

#[test]
fn rings_cpu() {
    let names = ["gemma2-Q8_0", "gemma3-Q8_0", "gpt-oss-F16", "cohere2-F16"];
    check_rings(&names, DeviceChoice::Cpu, true, None);
    check_rings(&names, DeviceChoice::Cpu, false, None);
    check_rings(&names, DeviceChoice::Cpu, true, Some(CacheType::Q8_0));
}

#[test]
fn rings_emulated() {
    check_rings(&["gemma3-Q8_0"], DeviceChoice::Emulated, true, None);
    let q8_0 = Some(CacheType::Q8_0);
    check_rings(&["gpt-oss-F16"], DeviceChoice::Emulated, true, q8_0);
}

#[test]
fn rings_emulated_with_quantised_activations() {
    check_rings(
        &["gemma3-Q8_0", "gpt-oss-F16"],
        DeviceChoice::Emulated,
        false,
        None,
    );
}

/// A token's logits depend on as many experts of each layer as it uses, and on no others: with others' weights no
/// numbers they are the same, bit by bit.
fn check_experts(device: DeviceChoice, exact: bool) {
    for name in [
        "qwen3moe-Q8_0",
        "mixtral-F16",
        "granitemoe-F16",
        "gpt-oss-F16",
    ] {
        let file = tiny(name);
        let of = |what: &str| {
            let architecture = file.metadata().str("general.architecture").expect("a name");
            let key = format!("{architecture}.{what}");
            file.metadata().u64(&key).expect("a number")
        };
        let (count, used) = (of("expert_count"), of("expert_used_count"));
        assert!(used < count);
        let bytes = std::fs::read(file.path()).expect("it can be read");
        let logits = |bytes: Vec<u8>| {
            let file = Gguf::from_bytes("tiny.gguf", bytes).expect("it opens");
            let options = LoadOptions {
                device,
                exact,
                threads: Some(2),
                context: Some(32),
                ..LoadOptions::default()
            };
            let mut direct = load(&Arc::new(file), &options);
            direct.feed(&[65]).expect("it runs");
            direct.logits().expect("there are logits")
        };
        let right = logits(bytes.clone());
        assert!(right.iter().all(|l| l.is_finite()));
        for layer in 0..of("block_count") {
            let mut picked = 0;
            for expert in 0..count {
                let mut bytes = bytes.clone();
                for part in ["gate", "up", "down"] {
                    let tensor = file
                        .require(&format!("blk.{layer}.ffn_{part}_exps.weight"))
                        .expect("experts");
                    assert_eq!(tensor.dims()[2], count);
                    let len = tensor.data().len() / count as usize;
                    let start = tensor.file_offset() as usize + expert as usize * len;
                    for half in bytes[start..start + len].chunks_exact_mut(2) {
                        half.copy_from_slice(&NAN);
                    }
                }
                let ours = logits(bytes);
                if ours.iter().any(|l| l.is_nan()) {
                    picked += 1;
                } else {
                    assert_eq!(ours, right, "{name} layer {layer} expert {expert}");
                }
            }
            assert_eq!(
                picked, used,
                "{name} {device:?} exact={exact}, layer {layer}"
            );
        }
    }
}

/// A half that is no number: of blocks, the scale too.
const NAN: [u8; 2] = 0x7e00u16.to_le_bytes();

#[test]
fn experts_cpu() {
    check_experts(DeviceChoice::Cpu, false);
    check_experts(DeviceChoice::Cpu, true);
}

#[test]
fn experts_emulated() {
    check_experts(DeviceChoice::Emulated, false);
    check_experts(DeviceChoice::Emulated, true);
}
