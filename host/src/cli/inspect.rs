//! `kigo inspect FILE`: what is in a GGUF file, and whether it will run.
//!
//! Everything printed for a person is escaped: names and strings come from the file, and a terminal
//! obeys control characters.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};

use gguf::{GgmlType, Gguf, Metadata, Tensor, Value};
use serde::{Serialize, Serializer};

use crate::model::Verdict;

/// Prints a file: a summary with what is to be expected on each device, the metadata with long values shortened,
/// and the tensors. With `json` one object with everything in full.
///
/// # Errors
/// `out` fails.
pub fn inspect(
    file: &Gguf,
    verdicts: &[Verdict],
    json: bool,
    out: &mut (impl Write + ?Sized),
) -> io::Result<()> {
    let report = Report::new(file, verdicts);
    let mut out = io::BufWriter::new(out);
    if json {
        serde_json::to_writer(&mut out, &report)?;
        writeln!(out)?;
    } else {
        summary(&report, file, &mut out)?;
        for verdict in verdicts {
            writeln!(out, "{:<16}{}", verdict.backend, sentence(verdict))?;
        }
        metadata_table(file.metadata(), &mut out)?;
        tensor_table(file, &mut out)?;
    }
    out.flush()
}

/// What `inspect` says of a file; in JSON its fields by these names.
#[derive(Serialize)]
struct Report<'a> {
    /// What is to be expected on each device.
    devices: &'a [Verdict],
    path: String,
    files: Vec<String>,
    version: u32,
    alignment: u64,
    file_bytes: u64,
    architecture: Option<&'a str>,
    name: Option<&'a str>,
    /// Elements of all tensors together.
    parameters: u64,
    /// Bits a parameter takes on average.
    bits_per_parameter: f64,
    types: BTreeMap<GgmlType, TypeShare>,
    shape: Shape,
    #[serde(serialize_with = "metadata_as_map")]
    metadata: &'a Metadata,
    tensors: Vec<TensorRow<'a>>,
}

/// How much of a file is of one type.
#[derive(Serialize, Default)]
struct TypeShare {
    tensors: u64,
    elements: u64,
    bytes: u64,
}

/// The sizes that a reader asks for first; none where the file does not say, or says it in an
/// unexpected type.
#[derive(Serialize)]
struct Shape {
    context_length: Option<u64>,
    block_count: Option<u64>,
    embedding_length: Option<u64>,
    feed_forward_length: Option<u64>,
    head_count: Option<u64>,
    head_count_kv: Option<u64>,
    head_length: Option<u64>,
    expert_count: Option<u64>,
    expert_used_count: Option<u64>,
    vocabulary: Option<usize>,
}

#[derive(Serialize)]
struct TensorRow<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    ty: GgmlType,
    dims: &'a [u64],
    bytes: usize,
    /// Of the data, from the start of its file.
    file_offset: u64,
    file: String,
}

impl<'a> Report<'a> {
    fn new(file: &'a Gguf, verdicts: &'a [Verdict]) -> Report<'a> {
        let metadata = file.metadata();
        let string = |key| metadata.opt_str(key).ok().flatten();
        let mut types: BTreeMap<GgmlType, TypeShare> = BTreeMap::new();
        for t in file.tensors() {
            let share = types.entry(t.ty()).or_default();
            share.tensors += 1;
            share.elements += t.elements();
            share.bytes += t.data().len() as u64;
        }
        let parameters = types.values().map(|s| s.elements).sum();
        let bytes: u64 = types.values().map(|s| s.bytes).sum();
        let architecture = string("general.architecture");
        Report {
            devices: verdicts,
            path: file.path().display().to_string(),
            files: file.paths().map(|p| p.display().to_string()).collect(),
            version: file.version(),
            alignment: file.alignment(),
            file_bytes: file.file_bytes(),
            architecture,
            name: string("general.name"),
            parameters,
            bits_per_parameter: if parameters == 0 {
                0.0
            } else {
                bytes as f64 * 8.0 / parameters as f64
            },
            types,
            shape: Shape::new(metadata, architecture.unwrap_or_default()),
            metadata,
            tensors: file.tensors().map(TensorRow::new).collect(),
        }
    }
}

impl Shape {
    fn new(metadata: &Metadata, architecture: &str) -> Shape {
        let number = |key: &str| {
            metadata
                .opt_u64(&format!("{architecture}.{key}"))
                .ok()
                .flatten()
        };
        let (embedding_length, head_count) =
            (number("embedding_length"), number("attention.head_count"));
        let derived = match (embedding_length, head_count) {
            (Some(width), Some(heads)) if heads > 0 => Some(width / heads),
            _ => None,
        };
        Shape {
            context_length: number("context_length"),
            block_count: number("block_count"),
            embedding_length,
            feed_forward_length: number("feed_forward_length"),
            head_count,
            head_count_kv: number("attention.head_count_kv").or(head_count),
            head_length: number("attention.key_length").or(derived),
            expert_count: number("expert_count"),
            expert_used_count: number("expert_used_count"),
            vocabulary: match metadata.get("tokenizer.ggml.tokens") {
                Some(Value::Array(tokens)) => Some(tokens.len()),
                _ => None,
            },
        }
    }
}

impl<'a> TensorRow<'a> {
    fn new(t: Tensor<'a>) -> TensorRow<'a> {
        TensorRow {
            name: t.name(),
            ty: t.ty(),
            dims: t.dims(),
            bytes: t.data().len(),
            file_offset: t.file_offset(),
            file: t.path().display().to_string(),
        }
    }
}

/// "will run: …", or "will not run: …".
fn sentence(verdict: &Verdict) -> String {
    let memory = match (verdict.context, verdict.required_bytes) {
        (Some(context), Some(required)) => {
            let free = verdict
                .free_bytes
                .map_or(String::new(), |free| format!(", {} free", bytes(free)));
            let part = |n: Option<u64>| bytes(n.unwrap_or(0));
            format!(
                "{} for {context} tokens (weights {}, KV cache {}, working memory {}){free}",
                bytes(required),
                part(verdict.weights_bytes),
                part(verdict.cache_bytes),
                part(verdict.working_bytes)
            )
        }
        _ => String::new(),
    };
    match &verdict.reason {
        None => format!("will run, in {memory}"),
        Some(reason) if memory.is_empty() => format!("will not run: {}", Plain(reason)),
        Some(reason) => format!("will not run: {}; {memory}", Plain(reason)),
    }
}

fn metadata_as_map<S: Serializer>(metadata: &&Metadata, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(metadata.iter())
}

fn summary(report: &Report<'_>, file: &Gguf, out: &mut impl Write) -> io::Result<()> {
    let mut line = |label: &str, text: String| writeln!(out, "{label:<16}{text}");
    line("file", Plain(&report.path).to_string())?;
    if report.files.len() > 1 {
        line(
            "split",
            format!(
                "{} files, of which the first is {}",
                report.files.len(),
                Plain(&report.files[0])
            ),
        )?;
    }
    line(
        "format",
        format!(
            "GGUF v{}, {}, aligned to {}",
            report.version,
            bytes(report.file_bytes),
            report.alignment
        ),
    )?;
    line(
        "architecture",
        report
            .architecture
            .map_or("(not said)".into(), |s| Plain(s).to_string()),
    )?;
    if let Some(name) = report.name {
        line("name", Plain(name).to_string())?;
    }
    line(
        "parameters",
        format!(
            "{} in {}, {:.2} bits each",
            count(report.parameters),
            tensors(report.tensors.len() as u64),
            report.bits_per_parameter
        ),
    )?;
    let mut types: Vec<_> = report.types.iter().collect();
    types.sort_by_key(|(_, share)| std::cmp::Reverse(share.bytes));
    for (i, (ty, share)) in types.iter().enumerate() {
        let label = if i == 0 { "types" } else { "" };
        line(
            label,
            format!(
                "{ty:<8}{:>10} in {}",
                bytes(share.bytes),
                tensors(share.tensors)
            ),
        )?;
    }

    let shape = &report.shape;
    let mut number = |label: &str, value: Option<u64>, unit: &str| match value {
        Some(n) => line(label, format!("{n}{unit}")),
        None => Ok(()),
    };
    number("context", shape.context_length, " tokens")?;
    number("layers", shape.block_count, "")?;
    number("embedding", shape.embedding_length, "")?;
    number("feed-forward", shape.feed_forward_length, "")?;
    if let (Some(heads), Some(kv), Some(len)) =
        (shape.head_count, shape.head_count_kv, shape.head_length)
    {
        line("heads", format!("{heads} query, {kv} key-value, of {len}"))?;
    }
    if let (Some(experts), Some(used)) = (shape.expert_count, shape.expert_used_count) {
        line("experts", format!("{experts}, {used} used for a token"))?;
    }
    let metadata = file.metadata();
    if let Some(n) = shape.vocabulary {
        let kinds: Vec<String> = ["tokenizer.ggml.model", "tokenizer.ggml.pre"]
            .iter()
            .filter_map(|key| metadata.opt_str(key).ok().flatten())
            .map(|kind| Plain(kind).to_string())
            .collect();
        line("vocabulary", format!("{n} tokens ({})", kinds.join(", ")))?;
    }
    let template = metadata.opt_str("tokenizer.chat_template").ok().flatten();
    line(
        "chat template",
        template.map_or("none".into(), |t| {
            format!("{} characters", t.chars().count())
        }),
    )
}

fn metadata_table(metadata: &Metadata, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "\nmetadata: {} keys", metadata.len())?;
    let rows = metadata.iter().map(|(key, value)| {
        let ty = match value {
            Value::Array(a) => format!("{}[{}]", a.element_type_name(), a.len()),
            scalar => scalar.type_name(),
        };
        [Plain(key).to_string(), ty, value.to_string()]
    });
    table(rows.collect(), &[Side::Left; 3], out)
}

fn tensor_table(file: &Gguf, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "\ntensors: {}", file.tensors().len())?;
    let rows = file.tensors().map(|t| {
        [
            Plain(t.name()).to_string(),
            t.ty().to_string(),
            dims(t.dims()),
            bytes(t.data().len() as u64),
        ]
    });
    table(
        rows.collect(),
        &[Side::Left, Side::Left, Side::Left, Side::Right],
        out,
    )
}

#[derive(Clone, Copy)]
enum Side {
    Left,
    Right,
}

/// Columns as wide as their widest cell (but for outliers, which push their own line only).
fn table<const N: usize>(
    rows: Vec<[String; N]>,
    sides: &[Side; N],
    out: &mut impl Write,
) -> io::Result<()> {
    const MAX_WIDTH: usize = 48;
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().clamp(*width, MAX_WIDTH.max(*width));
        }
    }
    for row in &rows {
        let mut line = String::from(" ");
        for ((cell, &width), side) in row.iter().zip(&widths).zip(sides) {
            line += &match side {
                Side::Left => format!(" {cell:<width$} "),
                Side::Right => format!(" {cell:>width$} "),
            };
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// Text from a file, with control and other unprintable characters escaped.
pub(super) struct Plain<'a>(pub &'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '\'' | '"' | '\\' => write!(f, "{c}")?,
                _ => write!(f, "{}", c.escape_debug())?,
            }
        }
        Ok(())
    }
}

/// "896 x 4864", innermost first.
pub(super) fn dims(dims: &[u64]) -> String {
    let dims: Vec<String> = dims.iter().map(u64::to_string).collect();
    dims.join(" x ")
}

/// "468.6 MiB"
fn bytes(n: u64) -> String {
    scaled(n, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// "494.0 M"
fn count(n: u64) -> String {
    scaled(n, 1000.0, &["", "K", "M", "B", "T"])
}

/// "1 tensor", "2 tensors"
fn tensors(n: u64) -> String {
    format!("{n} tensor{}", if n == 1 { "" } else { "s" })
}

fn scaled(n: u64, step: f64, units: &[&str]) -> String {
    let mut value = n as f64;
    let mut unit = 0;
    while value >= step && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    match unit {
        0 => format!("{n} {}", units[0]).trim_end().to_owned(),
        _ => format!("{value:.1} {}", units[unit]),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn sample() -> Gguf {
        let mut w = gguf::Writer::new();
        w.metadata("general.architecture", "llama");
        w.metadata("general.name", "bad \u{1b}[31m name");
        w.metadata("llama.context_length", 2048u32);
        w.metadata("llama.embedding_length", 64u32);
        w.metadata("llama.attention.head_count", 4u32);
        w.metadata(
            "tokenizer.ggml.tokens",
            (0..9).map(|i| format!("t{i}")).collect::<Vec<_>>(),
        );
        w.tensor("a.weight", &[2, 3], GgmlType::F32).unwrap();
        w.tensor("b.weight", &[32], GgmlType::Q8_0).unwrap();
        w.tensor("c.weight", &[256], GgmlType::Q8_K).unwrap();
        let mut payload = w.begin(Vec::new()).unwrap();
        for v in [0.1f32, -0.0, 1e-45, f32::MAX, f32::NAN, f32::NEG_INFINITY] {
            payload.write(&v.to_le_bytes()).unwrap();
        }
        payload.write(&[1; 34 + 292]).unwrap();
        Gguf::from_bytes("sample.gguf", payload.finish().unwrap()).unwrap()
    }

    pub fn printed<E: fmt::Debug>(f: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> String {
        let mut out = Vec::new();
        f(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn verdicts() -> Vec<Verdict> {
        crate::model::verdicts(
            &sample().into(),
            &crate::model::LoadOptions {
                device: crate::model::DeviceChoice::Cpu,
                ..Default::default()
            },
        )
    }

    #[test]
    fn text_is_readable_and_harmless() {
        let text = printed(|out| inspect(&sample(), &verdicts(), false, out));
        for part in [
            "architecture    llama",
            "name            bad \\u{1b}[31m name",
            "context         2048 tokens",
            "heads           4 query, 4 key-value, of 16",
            "vocabulary      9 tokens",
            "string[9]",
            "... 3 more",
            "Q8_K         292 B in 1 tensor\n",
            "2 x 3",
            "cpu             will not run: ",
            "llama.block_count",
        ] {
            assert!(text.contains(part), "{text}\ndoes not say {part:?}");
        }
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn json_is_whole() {
        let text = printed(|out| inspect(&sample(), &verdicts(), true, out));
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["metadata"]["llama.context_length"], 2048);
        assert_eq!(
            json["metadata"]["tokenizer.ggml.tokens"]
                .as_array()
                .unwrap()
                .len(),
            9
        );
        assert_eq!(json["types"]["Q8_0"]["bytes"], 34);
        assert_eq!(json["tensors"][2]["type"], "Q8_K");
        assert_eq!(json["tensors"][0]["dims"], serde_json::json!([2, 3]));
        assert_eq!(json["shape"]["head_length"], 16);
        assert_eq!(json["devices"][0]["backend"], "cpu");
        assert_eq!(json["devices"][0]["runs"], false);
    }
}
