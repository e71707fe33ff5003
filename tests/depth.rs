//! Decode far into a sequence, where a GPU's step splits attention among all its blocks and several steps go in one launch:
//! every token, and the last one's logits, are what the CPU has for the same tokens. In the emulator (the GPU's kernels, run on the
//! host), or with `KIGO_TEST_DEVICE=cuda` on a GPU.

use kigo::device::CacheType;
use kigo::engine::Direct;
use kigo::gguf::Gguf;
use kigo::model::{DeviceChoice, LoadOptions, load};
use kigo_tests::golden_dir;
use std::sync::Arc;

/// Past where attention is split, and not at the end of a block of the cache.
const PROMPT: usize = 571;
/// Several launches of several steps each, over the ends of blocks.
const STEPS: usize = 45;

fn direct(name: &str, device: DeviceChoice, cache_type: Option<CacheType>) -> Direct {
    let path = golden_dir().join("tiny").join(name);
    let file = Arc::new(Gguf::open(&path).expect("a model"));
    let options = LoadOptions {
        device,
        context: Some(PROMPT + STEPS),
        cache_type,
        ..LoadOptions::default()
    };
    Direct::new(load(&file, &options, &mut |_| {}).expect("a runner"))
}

fn rms(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0.0), |(sum, n), v| (sum + v * v, n + 1.0));
    f64::sqrt(sum / n)
}

/// `limit`: how far logits may be from the CPU's, in these' root mean square; about twice what was measured. The prompt's products take
/// activations in f16.
fn check(name: &str, cache_type: Option<CacheType>, limit: f64) {
    let device = match kigo_tests::device().parse().expect("a device") {
        DeviceChoice::Cpu => DeviceChoice::Emulated,
        device => device,
    };
    let prompt: Vec<u32> = (0..PROMPT)
        .map(|i| (5 + (i * 31 + i / 7) % 200) as u32)
        .collect();
    let mut gpu = direct(name, device, cache_type);
    gpu.feed(&prompt).expect("a prompt");
    let mut tokens = vec![gpu.sample_greedy().expect("a token")];
    for left in (0..STEPS - 1).rev() {
        gpu.feed(&tokens[tokens.len() - 1..]).expect("a step");
        // The last step's logits are read.
        tokens.push(match left {
            0 => gpu.sample_greedy().expect("a token"),
            left => gpu.sample_greedy_ahead(left).expect("a token"),
        });
    }
    let found = gpu.logits().expect("logits");

    let mut cpu = direct(name, DeviceChoice::Cpu, cache_type);
    cpu.feed(&prompt).expect("a prompt");
    let mut expected = vec![cpu.logits().expect("logits")];
    let fed = &tokens[..tokens.len() - 1];
    cpu.feed_each(fed, |logits| expected.push(logits))
        .expect("steps");
    for (i, (&token, logits)) in tokens.iter().zip(&expected).enumerate() {
        let scale = rms(logits.iter().map(|&l| f64::from(l)));
        let greatest = logits.iter().copied().fold(f32::MIN, f32::max);
        let behind = f64::from(greatest - logits[token as usize]);
        assert!(
            behind <= 8.0 * limit * scale,
            "{name}: token {i} is {behind} behind the likeliest"
        );
    }
    let last = expected.last().expect("the last one's");
    let differences = found.iter().zip(last).map(|(&a, &b)| f64::from(a - b));
    let error = rms(differences) / rms(last.iter().map(|&l| f64::from(l)));
    println!("{name}: {error:.1e} from the CPU");
    assert!(error <= limit, "{name}: {error:.1e}");
}

#[test]
fn keys_rotated_by_products() {
    check("llama-256-Q4_K_M.gguf", None, 5e-3);
}

#[test]
fn keys_normed_by_attention() {
    check("qwen3-Q8_0.gguf", None, 3e-3);
}

#[test]
fn weights_in_f16() {
    check("qwen2-F16.gguf", None, 1e-3);
}

#[test]
fn a_cache_of_eight_bits() {
    let cache_type = Some(CacheType::Q8_0);
    check("qwen2-F16.gguf", cache_type, 1e-2);
    check("llama-256-Q4_K_M.gguf", cache_type, 2.2e-2);
    check("qwen3-Q8_0.gguf", cache_type, 1.4e-2);
}
