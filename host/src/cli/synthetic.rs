//! Model files of random weights in the shapes of real ones, for `kigo bench --synthetic`: speed depends on
//! shapes and tensor types alone, so it can be measured without a download.

use crate::cache;
use crate::error::{Error, Result};
use gguf::{Array, GgmlType, Value, Writer};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Goes up when the same shape is given other bytes, so that files of an older Kigo are made anew.
const FORMAT: u32 = 1;

/// Bytes of random blocks of one type; tensors repeat them, each from another block on.
const PATTERN_BYTES: usize = 1 << 20;

/// Standard deviation of the weights: that of an initialised transformer, so that logits stay in the
/// range of a real model's.
const DEVIATION: f32 = 0.02;

/// A model that a file is made for.
#[derive(Clone)]
struct Shape {
    name: &'static str,
    architecture: &'static str,
    /// `tokenizer.ggml.pre`.
    pre: &'static str,
    layers: usize,
    embedding: u64,
    feed_forward: u64,
    heads: u32,
    kv_heads: u32,
    head_dim: u64,
    vocabulary: u64,
    context: u32,
    rope_base: f32,
    rms_eps: f32,
    types: Types,
}

/// The tensor types of a file, as its quantisation recipe gives them.
#[derive(Clone, Copy)]
struct Types {
    embedding: GgmlType,
    /// `None` where the embedding table serves as the output matrix.
    output: Option<GgmlType>,
    /// Q, K, attention output, gate, up.
    plain: GgmlType,
    /// `attn_v` in the layers that get more bits, and in the others.
    value: [GgmlType; 2],
    /// `ffn_down`, likewise.
    down: [GgmlType; 2],
}

const fn all(ty: GgmlType) -> Types {
    Types {
        embedding: ty,
        output: None,
        plain: ty,
        value: [ty; 2],
        down: [ty; 2],
    }
}

/// Q4_K_M of a model whose rows are whole blocks of 256.
const Q4_K_M: Types = Types {
    embedding: GgmlType::Q4_K,
    output: Some(GgmlType::Q6_K),
    plain: GgmlType::Q4_K,
    value: [GgmlType::Q6_K, GgmlType::Q4_K],
    down: [GgmlType::Q6_K, GgmlType::Q4_K],
};

const SHAPES: &[Shape] = &[
    Shape {
        name: "smollm2-135m-q4_1",
        architecture: "llama",
        pre: "smollm",
        layers: 30,
        embedding: 576,
        feed_forward: 1536,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocabulary: 49_152,
        context: 8192,
        rope_base: 100_000.0,
        rms_eps: 1e-5,
        types: Types {
            embedding: GgmlType::Q8_0,
            ..all(GgmlType::Q4_1)
        },
    },
    // Rows of 896 are no whole blocks of 256: only `ffn_down` has K-quants.
    Shape {
        name: "qwen2.5-0.5b-q4_k_m",
        architecture: "qwen2",
        pre: "qwen2",
        layers: 24,
        embedding: 896,
        feed_forward: 4864,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        vocabulary: 151_936,
        context: 32_768,
        rope_base: 1_000_000.0,
        rms_eps: 1e-6,
        types: Types {
            embedding: GgmlType::Q5_0,
            output: Some(GgmlType::Q8_0),
            plain: GgmlType::Q5_0,
            value: [GgmlType::Q8_0, GgmlType::Q5_0],
            down: [GgmlType::Q6_K, GgmlType::Q4_K],
        },
    },
    Shape {
        name: "qwen2.5-1.5b-q4_k_m",
        architecture: "qwen2",
        pre: "qwen2",
        layers: 28,
        embedding: 1536,
        feed_forward: 8960,
        heads: 12,
        kv_heads: 2,
        head_dim: 128,
        vocabulary: 151_936,
        context: 32_768,
        rope_base: 1_000_000.0,
        rms_eps: 1e-6,
        types: Q4_K_M,
    },
    Shape {
        name: "llama-8b-q4_k_m",
        architecture: "llama",
        pre: "llama-bpe",
        layers: 32,
        embedding: 4096,
        feed_forward: 14_336,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocabulary: 128_256,
        context: 8192,
        rope_base: 500_000.0,
        rms_eps: 1e-5,
        types: Q4_K_M,
    },
    Shape {
        name: "qwen3-0.6b-q8_0",
        architecture: "qwen3",
        pre: "qwen2",
        layers: 28,
        embedding: 1024,
        feed_forward: 3072,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        vocabulary: 151_936,
        context: 40_960,
        rope_base: 1_000_000.0,
        rms_eps: 1e-6,
        types: all(GgmlType::Q8_0),
    },
    Shape {
        name: "qwen3-8b-q4_k_m",
        architecture: "qwen3",
        pre: "qwen2",
        layers: 36,
        embedding: 4096,
        feed_forward: 12_288,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocabulary: 151_936,
        context: 40_960,
        rope_base: 1_000_000.0,
        rms_eps: 1e-6,
        types: Q4_K_M,
    },
    // Llama 3.2 1B.
    Shape {
        name: "llama-1b-f16",
        architecture: "llama",
        pre: "llama-bpe",
        layers: 16,
        embedding: 2048,
        feed_forward: 8192,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocabulary: 128_256,
        context: 131_072,
        rope_base: 500_000.0,
        rms_eps: 1e-5,
        types: all(GgmlType::F16),
    },
];

/// The names of all shapes, for help and errors.
pub(super) fn names() -> String {
    let names: Vec<_> = SHAPES.iter().map(|s| s.name).collect();
    names.join(", ")
}

/// The path of the file of the shape `name` in the user's cache folder; makes it where it is not there whole.
///
/// # Errors
/// No such shape, or the file cannot be written.
pub(super) fn file(name: &str) -> Result<PathBuf> {
    let shape = SHAPES.iter().find(|s| s.name == name).ok_or_else(|| {
        Error::Request(format!(
            "--synthetic is {name:?}, expected one of {}",
            names()
        ))
    })?;
    let path = cache::dir().join("synthetic").join(format!("{name}.gguf"));
    make(shape, &path)?;
    Ok(path)
}

fn make(shape: &Shape, path: &Path) -> Result<()> {
    let tensors = shape.tensors();
    let mut writer = Writer::new();
    shape.metadata(&mut writer);
    for t in &tensors {
        writer.tensor(&t.name, &t.dims, t.ty)?;
    }
    // The header alone, to tell a file that is there from one of an older Kigo.
    let mut head = Vec::new();
    writer.clone().begin(&mut head)?;
    let bytes = |t: &Tensor| t.ty.bytes_for(t.dims.iter().product()).unwrap_or(0);
    let padded = |t| bytes(t).next_multiple_of(gguf::DEFAULT_ALIGNMENT);
    let total = head.len() as u64 + tensors.iter().map(padded).sum::<u64>();
    if is_whole(path, &head, total) {
        return Ok(());
    }
    tracing::info!(path = %path.display(), bytes = total, "making random weights");
    let io = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let write = |file: &mut File| -> Result<(), Failed> {
        let mut payload = writer.begin(file)?;
        let mut patterns: Vec<(GgmlType, Vec<u8>)> = Vec::new();
        for (i, t) in tensors.iter().enumerate() {
            let found = patterns.iter().position(|(ty, _)| *ty == t.ty);
            let at = found.unwrap_or_else(|| {
                patterns.push((t.ty, pattern(t.ty)));
                patterns.len() - 1
            });
            let pattern = &patterns[at].1;
            let blocks = pattern.len() / t.ty.block_bytes();
            // Any odd number far from a divisor of the pattern's length sends tensors apart.
            let mut from = i * 40_503 % blocks * t.ty.block_bytes();
            let mut left = bytes(t) as usize;
            if t.is_norm() {
                payload.write(&1f32.to_le_bytes().repeat(left / 4))?;
                left = 0;
            }
            while left > 0 {
                let piece = &pattern[from..pattern.len().min(from + left)];
                payload.write(piece)?;
                left -= piece.len();
                from = 0;
            }
        }
        payload.finish()?;
        Ok(())
    };
    cache::write_atomically(path, write).map_err(|failed| match failed {
        Failed::Io(source) => io(source),
        Failed::Gguf(error) => error.into(),
    })
}

/// What can go wrong while a file is written.
enum Failed {
    Io(std::io::Error),
    Gguf(gguf::Error),
}

impl From<std::io::Error> for Failed {
    fn from(e: std::io::Error) -> Self {
        Failed::Io(e)
    }
}

impl From<gguf::Error> for Failed {
    fn from(e: gguf::Error) -> Self {
        Failed::Gguf(e)
    }
}

/// Whether a file is there that begins with `head` and has `total` bytes. Files get their name only when they
/// are complete, so their data is right too.
fn is_whole(path: &Path, head: &[u8], total: u64) -> bool {
    let Ok(mut file) = File::open(path) else {
        return false;
    };
    let mut found = vec![0; head.len()];
    file.metadata().is_ok_and(|m| m.len() == total)
        && file.read_exact(&mut found).is_ok()
        && found == head
}

struct Tensor {
    name: String,
    /// Innermost first.
    dims: Vec<u64>,
    ty: GgmlType,
}

impl Tensor {
    fn is_norm(&self) -> bool {
        self.name.ends_with("norm.weight")
    }
}

impl Shape {
    fn metadata(&self, writer: &mut Writer) {
        let a = self.architecture;
        let count = self.vocabulary as usize;
        writer
            .metadata("general.architecture", a)
            .metadata("general.name", format!("{} (random weights)", self.name))
            .metadata("general.version", FORMAT.to_string())
            .metadata(format!("{a}.block_count"), self.layers as u32)
            .metadata(format!("{a}.context_length"), self.context)
            .metadata(format!("{a}.embedding_length"), self.embedding as u32)
            .metadata(format!("{a}.feed_forward_length"), self.feed_forward as u32)
            .metadata(format!("{a}.attention.head_count"), self.heads)
            .metadata(format!("{a}.attention.head_count_kv"), self.kv_heads)
            .metadata(
                format!("{a}.attention.layer_norm_rms_epsilon"),
                self.rms_eps,
            )
            .metadata(format!("{a}.rope.freq_base"), self.rope_base)
            .metadata(format!("{a}.rope.dimension_count"), self.head_dim as u32)
            .metadata("tokenizer.ggml.model", "gpt2")
            .metadata("tokenizer.ggml.pre", self.pre)
            .metadata(
                "tokenizer.ggml.tokens",
                Value::Array(Array::String(tokens(count))),
            )
            .metadata(
                "tokenizer.ggml.token_type",
                // 1 is normal text, 3 a control token.
                (0..count)
                    .map(|id| if id + 1 == count { 3 } else { 1 })
                    .collect::<Vec<i32>>(),
            )
            .metadata(
                "tokenizer.ggml.merges",
                Value::Array(Array::String(Vec::new())),
            )
            .metadata("tokenizer.ggml.eos_token_id", count as u32 - 1)
            .metadata("tokenizer.ggml.add_bos_token", false);
        if self.norms_heads() {
            // Heads need not be as wide as the embedding's share.
            for of in ["key_length", "value_length"] {
                writer.metadata(format!("{a}.attention.{of}"), self.head_dim as u32);
            }
        }
    }

    /// Whether queries and keys are normed head by head.
    fn norms_heads(&self) -> bool {
        self.architecture == "qwen3"
    }

    fn tensors(&self) -> Vec<Tensor> {
        let (d, ff, t) = (self.embedding, self.feed_forward, &self.types);
        let q_dim = u64::from(self.heads) * self.head_dim;
        let kv_dim = u64::from(self.kv_heads) * self.head_dim;
        let mut all = Vec::new();
        let mut add = |name: String, dims: &[u64], ty| {
            all.push(Tensor {
                name,
                dims: dims.to_vec(),
                ty,
            });
        };
        if let Some(ty) = t.output {
            add("output.weight".into(), &[d, self.vocabulary], ty);
        }
        add(
            "token_embd.weight".into(),
            &[d, self.vocabulary],
            t.embedding,
        );
        for i in 0..self.layers {
            let fewer = usize::from(!use_more_bits(i, self.layers));
            let mut add = |part: &str, dims: &[u64], ty| add(format!("blk.{i}.{part}"), dims, ty);
            add("attn_norm.weight", &[d], GgmlType::F32);
            add("ffn_down.weight", &[ff, d], t.down[fewer]);
            add("ffn_gate.weight", &[d, ff], t.plain);
            add("ffn_up.weight", &[d, ff], t.plain);
            add("ffn_norm.weight", &[d], GgmlType::F32);
            for (part, rows, ty) in [
                ("attn_k", kv_dim, t.plain),
                ("attn_q", q_dim, t.plain),
                ("attn_v", kv_dim, t.value[fewer]),
            ] {
                if self.architecture == "qwen2" {
                    add(&format!("{part}.bias"), &[rows], GgmlType::F32);
                }
                add(&format!("{part}.weight"), &[d, rows], ty);
            }
            if self.norms_heads() {
                for part in ["attn_q_norm.weight", "attn_k_norm.weight"] {
                    add(part, &[self.head_dim], GgmlType::F32);
                }
            }
            add("attn_output.weight", &[q_dim, d], t.plain);
        }
        add("output_norm.weight".into(), &[d], GgmlType::F32);
        all
    }
}

/// The layers that the K-quant recipes give more bits: the first and last eighth, and every third between
/// (`use_more_bits` in llama.cpp's `llama-quant.cpp`).
fn use_more_bits(layer: usize, layers: usize) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}

/// A vocabulary that can spell anything: one token for each byte in GPT-2's byte alphabet, then words that
/// stand for themselves, then the end of the text.
fn tokens(count: usize) -> Vec<String> {
    let bytes = (0..=255).map(|b| crate::tokenizer::byte_char(b).to_string());
    let words = (256..count.saturating_sub(1)).map(|id| format!("w{id}"));
    bytes.chain(words).chain(["<|end|>".into()]).collect()
}

/// Random blocks of a type, [`PATTERN_BYTES`] or a little less; elements have mean 0 and [`DEVIATION`].
fn pattern(ty: GgmlType) -> Vec<u8> {
    let mut random = super::bench::Random(FORMAT.into());
    let mut bytes = vec![0u8; PATTERN_BYTES / ty.block_bytes() * ty.block_bytes()];
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
    }
    // Quants stay random: uniform over `levels` values they deviate by `levels / sqrt(12)`, and the scales
    // below make DEVIATION of that. Every scale is drawn between 3/4 and 5/4 of its mean.
    let step = |levels: f32| DEVIATION / (levels / 12f32.sqrt());
    for block in bytes.chunks_exact_mut(ty.block_bytes()) {
        let vary = 0.75 + (random.next() % 512) as f32 / 1024.0;
        match ty {
            GgmlType::Q4_1 => {
                put_half(block, 0, vary * step(16.0));
                put_half(block, 2, -7.5 * vary * step(16.0));
            }
            GgmlType::Q5_0 => put_half(block, 0, vary * step(32.0)),
            GgmlType::Q8_0 => put_half(block, 0, vary * step(256.0)),
            GgmlType::Q4_K => {
                // 6-bit scales, 37 in root mean square; minimums equal to them centre the values.
                let d = vary * step(16.0) / 37.0;
                put_half(block, 0, d);
                put_half(block, 2, 7.5 * d);
                for j in 4..8 {
                    block[j + 4] = block[j];
                    block[j + 8] = block[j + 8] & 15 | block[j + 8] << 4;
                }
            }
            // Signed 8-bit scales, 74 in root mean square.
            GgmlType::Q6_K => put_half(block, 208, vary * step(64.0) / 74.0),
            GgmlType::F16 => {
                let value = (block[1] as f32 - 127.5) * vary * step(256.0);
                put_half(block, 0, value);
            }
            GgmlType::F32 => {
                let value = (block[1] as f32 - 127.5) * vary * step(256.0);
                block.copy_from_slice(&value.to_le_bytes());
            }
            other => unreachable!("no shape has a tensor of type {other}"),
        }
    }
    bytes
}

fn put_half(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_have_the_deviation_they_say() {
        for ty in [
            GgmlType::F32,
            GgmlType::F16,
            GgmlType::Q4_1,
            GgmlType::Q5_0,
            GgmlType::Q8_0,
            GgmlType::Q4_K,
            GgmlType::Q6_K,
        ] {
            let bytes = pattern(ty);
            let mut values = vec![0f32; bytes.len() / ty.block_bytes() * ty.block_len()];
            gguf::dequantize(ty, &bytes, &mut values).unwrap();
            let n = values.len() as f64;
            let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
            let square = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
            assert!(mean.abs() < 2e-3, "{ty}: mean {mean}");
            let deviation = square.sqrt();
            assert!((0.018..0.022).contains(&deviation), "{ty}: {deviation}");
        }
    }

    /// The first two sums are those of the catalog's files; the others follow from their releases' configurations.
    #[test]
    fn tensors_take_as_many_bytes_as_the_real_files() {
        for (name, expected) in [
            ("smollm2-135m-q4_1", 96_576_768),
            ("qwen2.5-0.5b-q4_k_m", 485_452_288),
            ("qwen2.5-1.5b-q4_k_m", 1_111_370_240),
            ("llama-8b-q4_k_m", 4_912_898_048),
            ("qwen3-8b-q4_k_m", 5_021_827_072),
            ("llama-1b-f16", 2_471_763_968),
        ] {
            let shape = SHAPES.iter().find(|s| s.name == name).unwrap();
            let bytes = |t: Tensor| t.ty.bytes_for(t.dims.iter().product()).unwrap();
            let total: u64 = shape.tensors().into_iter().map(bytes).sum();
            assert_eq!(total, expected, "{name}");
        }
    }

    #[test]
    fn a_file_is_made_once_and_mended_when_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        let shape = Shape {
            layers: 2,
            vocabulary: 300,
            ..SHAPES[0].clone()
        };
        let modified = |p: &Path| std::fs::metadata(p).unwrap().modified().unwrap();
        make(&shape, &path).unwrap();
        let first = modified(&path);
        let model = gguf::Gguf::open(&path).unwrap();
        crate::model::Config::from_gguf(&model).unwrap();
        let tokenizer = crate::tokenizer::Tokenizer::from_gguf(&model).unwrap();
        let ids = tokenizer
            .encode("any bytes: \u{1f600}", false, false)
            .unwrap();
        assert_eq!(tokenizer.decode_lossy(&ids), "any bytes: \u{1f600}");
        make(&shape, &path).unwrap();
        assert_eq!(modified(&path), first);
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(1000)
            .unwrap();
        make(&shape, &path).unwrap();
        assert_eq!(
            gguf::Gguf::open(&path).unwrap().file_bytes(),
            model.file_bytes()
        );
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let message = file("llama-9b").unwrap_err().to_string();
        for shape in SHAPES {
            assert!(message.contains(shape.name), "{message}");
        }
    }
}
