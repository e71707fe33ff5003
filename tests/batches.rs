//! Rows of several sequences in one step: what comes of a row depends neither on who nor on how many the others are, bit
//! for bit, and is what it would be alone but for rounding. In the emulator (the GPU's kernels, run on the host), or with
//! `KIGO_TEST_DEVICE=cuda` on a GPU, in larger companies.

use kigo::device::{Batch, CacheType, SampleRow, Span};
use kigo::engine::kv::{BlockPool, BlockTable};
use kigo::gguf::Gguf;
use kigo::model::{CacheSize, DeviceChoice, LoadOptions, Runner, load};
use kigo::sampling::{SamplingParams, sample};
use kigo_tests::golden_dir;
use std::sync::Arc;

/// A sequence in the cache, and the token that its next step is of.
struct Sequence {
    table: BlockTable,
    past: usize,
    next: u32,
}

impl Sequence {
    fn span(&self, start: usize, past: usize, len: usize) -> Span {
        Span {
            start,
            len,
            past,
            blocks: self.table.covering(past + len).to_vec(),
            ring: self.table.ring().to_vec(),
            horizon: 0,
        }
    }
}

/// The CPU has batches of one.
fn device() -> DeviceChoice {
    match kigo_tests::device().parse().expect("a device") {
        DeviceChoice::Cpu => DeviceChoice::Emulated,
        device => device,
    }
}

fn id(i: usize, number: usize) -> u32 {
    (5 + (i * 31 + i / 7 + number * 53) % 200) as u32
}

/// Puts all but the last of so many tokens of each sequence into the cache.
fn sequences(runner: &mut dyn Runner, lengths: &[usize]) -> Vec<Sequence> {
    let mut pool = BlockPool::new(runner.cache_blocks(), runner.ring());
    let mut all = Vec::new();
    for (number, &length) in lengths.iter().enumerate() {
        let mut table = BlockTable::default();
        assert!(table.grow(length, &mut pool), "the cache is too small");
        let (past, next) = (length - 1, id(length - 1, number));
        let sequence = Sequence { table, past, next };
        if past > 0 {
            let batch = Batch {
                tokens: (0..past).map(|i| id(i, number)).collect(),
                spans: vec![sequence.span(0, 0, past)],
                outputs: Vec::new(),
                ..Batch::default()
            };
            runner.forward(&batch).expect("a step of a prompt");
        }
        all.push(sequence);
    }
    all
}

/// The logits of a step of these sequences, a row each.
fn logits(runner: &mut dyn Runner, sequences: &[Sequence], members: &[usize]) -> Vec<Vec<f32>> {
    let rows = members.iter().map(|&m| &sequences[m]).enumerate();
    let batch = Batch {
        tokens: members.iter().map(|&m| sequences[m].next).collect(),
        spans: rows.map(|(i, s)| s.span(i, s.past, 1)).collect(),
        // In another order than the rows.
        outputs: (0..members.len()).rev().collect(),
        ..Batch::default()
    };
    runner.forward(&batch).expect("a step of several");
    let mut logits: Vec<Vec<f32>> = (0..members.len())
        .map(|i| runner.logits(i).expect("logits"))
        .collect();
    logits.reverse();
    logits
}

fn greatest(logits: &[f32]) -> usize {
    let order = |a: &usize, b: &usize| logits[*a].total_cmp(&logits[*b]).then(b.cmp(a));
    (0..logits.len()).max_by(order).expect("logits")
}

fn root_mean_square(values: impl ExactSizeIterator<Item = f32>) -> f64 {
    let count = values.len() as f64;
    let squares = values.map(|v| f64::from(v) * f64::from(v));
    (squares.sum::<f64>() / count).sqrt()
}

/// The root mean square of `a - b`, in that of `b`.
fn difference(a: &[f32], b: &[f32]) -> f64 {
    let error = root_mean_square(a.iter().zip(b).map(|(a, b)| a - b));
    error / root_mean_square(b.iter().copied())
}

/// Companies of two to five.
const TOGETHER: [&[usize]; 6] = [
    &[0, 1],
    &[2, 3],
    &[4, 2],
    &[3, 1, 0],
    &[2, 4, 3, 1],
    &[4, 3, 2, 1, 0],
];

/// Lengths within a split of attention, at its end, behind it, and of three.
const LENGTHS: [usize; 5] = [2, 128, 129, 37, 260];

/// The largest error of a few hundred logits, in their root mean square.
const LARGEST_ERROR: f64 = 4.0;

/// `limit`: how far a row beside others may be from the same row alone, about twice what was measured. Products of several
/// rows take activations in f16.
fn check(name: &str, exact: bool, cache_type: Option<CacheType>, limit: f64) {
    let path = golden_dir().join("tiny").join(name);
    let file = Arc::new(Gguf::open(&path).expect("a model"));
    let options = LoadOptions {
        device: device(),
        exact,
        context: Some(288),
        cache: CacheSize::UpTo(64 * 288),
        cache_type,
        ..LoadOptions::default()
    };
    let mut runner = load(&file, &options, &mut |_| {}).expect("a runner");
    let runner = &mut *runner;
    let most = runner.max_batch();
    assert!(most >= LENGTHS.len());
    let lengths: Vec<usize> = LENGTHS.into_iter().cycle().take(most).collect();
    let all = sequences(runner, &lengths);
    let mut companies: Vec<Vec<usize>> = TOGETHER.iter().map(|c| c.to_vec()).collect();
    // Eights of rows, and one more than that.
    let larger = [8, 9, 16, 33, 64].into_iter().filter(|&n| n <= most);
    companies.extend(larger.map(|n| (most - n..most).rev().collect()));
    companies.push((0..most).collect());
    let mut first: Vec<Option<Vec<f32>>> = vec![None; most];
    for members in &companies {
        for (&m, found) in members.iter().zip(logits(runner, &all, members)) {
            assert!(found.iter().all(|l| l.is_finite()));
            let first = first[m].get_or_insert_with(|| found.clone());
            let pairs = first.iter().zip(&found);
            let differing = pairs.filter(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differing.count(), 0, "{name}: sequence {m} in {members:?}");
        }
    }
    let mut worst: f64 = 0.0;
    for (m, together) in first.iter().enumerate() {
        let together = together.as_deref().expect("every sequence was in a step");
        let alone = &logits(runner, &all, &[m])[0];
        // Models of random weights have near ties, which rounding may turn round. Then two logits are off, one up and one
        // down, by at most so many times the root mean square of all errors, which are about normal.
        let scale = limit * root_mean_square(alone.iter().copied());
        let short = together[greatest(together)] - together[greatest(alone)];
        let most = 2.0 * LARGEST_ERROR * scale;
        assert!(f64::from(short) <= most, "{name}: sequence {m}: {short}");
        worst = worst.max(difference(together, alone));
    }
    println!("{name} exact={exact}: {worst:.1e} from alone");
    assert!(worst <= limit, "{name} exact={exact}: {worst:.1e}");
}

/// Tokens of several rows are chosen as the definition has it, each by its own parameters.
#[test]
fn choices_of_several_rows() {
    let path = golden_dir().join("tiny/llama-Q8_0.gguf");
    let file = Arc::new(Gguf::open(&path).expect("a model"));
    let options = LoadOptions {
        device: device(),
        context: Some(64),
        cache: CacheSize::UpTo(5 * 64),
        ..LoadOptions::default()
    };
    let mut runner = load(&file, &options, &mut |_| {}).expect("a runner");
    let all = sequences(&mut *runner, &[1, 5, 9, 2, 33]);
    logits(&mut *runner, &all, &[0, 1, 2, 3, 4]);
    let logits: Vec<_> = (0..5).map(|i| runner.logits(i).expect("logits")).collect();
    let greedy = SamplingParams::greedy;
    let params = [
        greedy(),
        SamplingParams {
            temperature: 0.9,
            top_k: 0,
            ..SamplingParams::default()
        },
        SamplingParams {
            repetition_penalty: 1.8,
            ..greedy()
        },
        SamplingParams {
            temperature: 2.0,
            top_k: 30,
            top_p: 0.9,
            repetition_penalty: 1.3,
            ..SamplingParams::default()
        },
        greedy(),
    ];
    let seen: Vec<Vec<u32>> = (0..5).map(|i| (0..100 * i).collect()).collect();
    // The first so many of them, as rows that the host chooses for come last.
    for n in 1..=5 {
        for turn in 0..4 {
            let rows: Vec<SampleRow<'_>> = (0..n)
                .map(|i| SampleRow {
                    params: &params[i],
                    seed: turn,
                    index: i as u64,
                    seen: &seen[i],
                    ahead: 0,
                })
                .collect();
            let expected: Vec<u32> = rows
                .iter()
                .zip(&logits)
                .map(|(row, logits)| sample(row.params, row.u(), row.seen, &mut logits.clone()))
                .collect();
            assert_eq!(runner.sample(&rows).expect("choices"), expected);
        }
    }
}

#[test]
fn plain_models() {
    check("llama-F16.gguf", false, None, 2e-3);
    check("qwen2-256-Q4_K_M.gguf", false, None, 4e-3);
    check("qwen3-Q8_0.gguf", false, None, 4e-3);
}

#[test]
fn windows_caps_and_sinks() {
    check("gemma2-Q8_0.gguf", false, None, 3e-3);
    check("gemma3-Q8_0.gguf", false, None, 5e-3);
    check("gpt-oss-F16.gguf", false, None, 1e-3);
}

#[test]
fn experts() {
    check("mixtral-F16.gguf", false, None, 1e-3);
}

#[test]
fn exact_arithmetic_and_a_cache_of_eight_bits() {
    check("llama-256-Q4_K_M.gguf", true, None, 2e-6);
    check("llama-Q8_0.gguf", false, Some(CacheType::Q8_0), 5e-3);
}
