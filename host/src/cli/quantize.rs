//! `kigo quantize IN OUT --type T`: a file of plain floats, its matrices as blocks.

use super::{Common, load, print_json, stdout_error};
use crate::error::{Error, Result};
use clap::Args;
use gguf::{GgmlType, Gguf, Tensor, Value, Writer};
use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::thread;

#[derive(Debug, Args)]
pub(super) struct QuantizeArgs {
    /// A GGUF file of F32, F16 or BF16 weights, or a name from `kigo models list`
    input: String,
    /// The file to be written
    output: PathBuf,
    /// The blocks to make: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, MXFP4;
    /// F16 and BF16 too. Matrices whose rows are no whole blocks get the nearest type that fits
    #[arg(long = "type", value_name = "TYPE", value_parser = block_type)]
    ty: GgmlType,
    /// Replace OUTPUT if it is there
    #[arg(long)]
    force: bool,
}

fn block_type(name: &str) -> Result<GgmlType, String> {
    let known = || gguf::quantizable().filter(|ty| *ty != GgmlType::F32);
    let found = known().find(|ty| ty.name().eq_ignore_ascii_case(name));
    found.ok_or_else(|| {
        let names: Vec<&str> = known().map(GgmlType::name).collect();
        let names = names.join(", ");
        if GgmlType::ALL
            .iter()
            .any(|ty| ty.name().eq_ignore_ascii_case(name))
        {
            format!("there is no quantiser for {name}; expected one of {names}")
        } else {
            format!("no such type; expected one of {names}")
        }
    })
}

/// What becomes of a tensor.
struct Plan<'a> {
    tensor: Tensor<'a>,
    to: GgmlType,
}

impl Plan<'_> {
    fn changes(&self) -> bool {
        self.to != self.tensor.ty()
    }
}

/// The type of a tensor in the new file.
fn plan(tensor: &Tensor<'_>, ty: GgmlType) -> GgmlType {
    let name = tensor.name();
    // Small beside the matrices, and much depends on them.
    let kept = tensor.dims().len() < 2
        || !name.ends_with(".weight")
        || [
            "_norm.",
            "ffn_gate_inp",
            "rope_f",
            "position_embd",
            "token_types",
        ]
        .iter()
        .any(|part| name.contains(part));
    if kept {
        return tensor.ty();
    }
    let ends = matches!(name, "token_embd.weight" | "output.weight");
    let mut ty = match ty {
        // Three values are too few for what nothing was trained to make up for.
        GgmlType::TQ1_0 | GgmlType::TQ2_0 if ends => GgmlType::Q8_0,
        ty => ty,
    };
    while !tensor.row_len().is_multiple_of(ty.block_len() as u64) {
        ty = match ty {
            GgmlType::Q2_K | GgmlType::Q3_K | GgmlType::IQ4_XS => GgmlType::IQ4_NL,
            GgmlType::TQ1_0 | GgmlType::TQ2_0 => GgmlType::Q4_0,
            GgmlType::Q4_K => GgmlType::Q5_0,
            GgmlType::Q5_K => GgmlType::Q5_1,
            GgmlType::Q6_K => GgmlType::Q8_0,
            _ => GgmlType::F16,
        };
    }
    ty
}

/// `general.file_type` of a file that is mostly of a type (`llama_ftype` in llama.h); none has been given a
/// number for Q2_0 and the like.
fn file_type(ty: GgmlType) -> Option<u32> {
    Some(match ty {
        GgmlType::F32 => 0,
        GgmlType::F16 => 1,
        GgmlType::Q4_0 => 2,
        GgmlType::Q4_1 => 3,
        GgmlType::Q8_0 => 7,
        GgmlType::Q5_0 => 8,
        GgmlType::Q5_1 => 9,
        GgmlType::Q2_K => 10,
        GgmlType::Q3_K => 11,
        GgmlType::Q4_K => 14,
        GgmlType::Q5_K => 16,
        GgmlType::Q6_K => 18,
        GgmlType::IQ4_NL => 25,
        GgmlType::IQ4_XS => 30,
        GgmlType::BF16 => 32,
        GgmlType::TQ1_0 => 36,
        GgmlType::TQ2_0 => 37,
        GgmlType::MXFP4 => 38,
        _ => return None,
    })
}

/// What a tensor's values lost.
#[derive(Clone, Copy, Default)]
struct Loss {
    error: f64,
    square: f64,
}

impl Loss {
    /// `Σ(x - y)² / Σx²`.
    fn nmse(self) -> f64 {
        if self.square > 0.0 {
            self.error / self.square
        } else {
            0.0
        }
    }

    fn add(&mut self, other: Loss) {
        self.error += other.error;
        self.square += other.square;
    }
}

pub(super) fn run(common: &Common, args: &QuantizeArgs, out: &mut dyn Write) -> Result<()> {
    let input = load::open_named(&args.input)?;
    let plans = plans(&input, args)?;
    if args.output.exists() && !args.force {
        return Err(Error::Request(format!(
            "{} is there already; remove it, name another file, or pass --force",
            args.output.display()
        )));
    }
    let threads = common
        .threads
        .unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    // Beside the new file, which takes its name once it is whole.
    let mut partial = args.output.clone().into_os_string();
    partial.push(".partial");
    let partial = Partial(partial.into());
    let losses = write_file(&input, &plans, args.ty, threads, &partial.0)?;
    // What was written must be a file that can be read.
    let bytes = Gguf::open(&partial.0)?.file_bytes();
    std::fs::rename(&partial.0, &args.output).map_err(io_error(&args.output))?;
    report(&input, args, &plans, &losses, bytes, common.json, out)
}

/// A file that is removed unless it was renamed.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        // Gone if all went well.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    |source| Error::Io { path, source }
}

fn plans<'a>(input: &'a Gguf, args: &QuantizeArgs) -> Result<Vec<Plan<'a>>> {
    let mut plans = Vec::new();
    for tensor in input.tensors() {
        let to = plan(&tensor, args.ty);
        let plain = matches!(tensor.ty(), GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
        if to != tensor.ty() && !plain {
            return Err(Error::Model {
                file: tensor.path().to_owned(),
                what: format!(
                    "tensor {} is of type {} already, expected F32, F16 or BF16: quantising twice would add \
                     both errors; use the file that this one was made from",
                    tensor.name(),
                    tensor.ty()
                ),
            });
        }
        plans.push(Plan { tensor, to });
    }
    if !plans.iter().any(Plan::changes) {
        let what = format!("no tensor would change its type to {}", args.ty);
        let file = input.path().to_owned();
        return Err(Error::Model { file, what });
    }
    Ok(plans)
}

fn write_file(
    input: &Gguf,
    plans: &[Plan<'_>],
    ty: GgmlType,
    threads: usize,
    path: &Path,
) -> Result<Vec<Loss>> {
    let mut writer = Writer::new();
    for (key, value) in input.metadata().iter() {
        match (key, value) {
            ("general.alignment", Value::U32(alignment)) => {
                writer.alignment(*alignment)?;
            }
            // One file comes out.
            ("split.no" | "split.count" | "split.tensors.count", _) => {}
            _ => {
                writer.metadata(key, value.clone());
            }
        }
    }
    writer.metadata("general.quantization_version", 2u32);
    if let Some(number) = file_type(ty) {
        writer.metadata("general.file_type", number);
    }
    for plan in plans {
        writer.tensor(plan.tensor.name(), plan.tensor.dims(), plan.to)?;
    }
    let file = File::create(path).map_err(io_error(path))?;
    let mut payload = writer.begin(BufWriter::new(file))?;
    let style = ProgressStyle::with_template(
        "quantising {wide_bar} {decimal_bytes}/{decimal_total_bytes} {eta}",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar());
    let total = plans.iter().map(|p| p.tensor.data().len() as u64).sum();
    let bar = ProgressBar::new(total).with_style(style);
    let mut losses = Vec::new();
    for plan in plans {
        let mut loss = Loss::default();
        if plan.changes() {
            quantize(plan, threads, |blocks, part, bytes_read| {
                payload.write(blocks)?;
                loss.add(part);
                bar.inc(bytes_read);
                Ok(())
            })?;
        } else {
            payload.write(plan.tensor.data())?;
            bar.inc(plan.tensor.data().len() as u64);
        }
        losses.push(loss);
    }
    bar.finish_and_clear();
    payload.finish()?;
    Ok(losses)
}

/// Values that a thread takes at a time.
const PIECE: usize = 1 << 18;

/// Quantises a tensor piece by piece; `each` gets the pieces in order, with what they lost and how many
/// bytes of the input they were.
fn quantize(
    plan: &Plan<'_>,
    threads: usize,
    mut each: impl FnMut(&[u8], Loss, u64) -> Result<()>,
) -> Result<()> {
    let tensor = plan.tensor;
    // Rows are whole blocks.
    let row = tensor.row_len();
    let piece = (PIECE as u64 / row).max(1) * row;
    let starts: Vec<u64> = (0..tensor.elements()).step_by(piece as usize).collect();
    for starts in starts.chunks(threads.max(1)) {
        let results: Vec<_> = thread::scope(|scope| {
            let work = |&start: &u64| {
                let n = piece.min(tensor.elements() - start);
                scope.spawn(move || quantize_piece(&tensor, plan.to, start, n as usize))
            };
            let running: Vec<_> = starts.iter().map(work).collect();
            running
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
                .collect()
        });
        for (result, start) in results.into_iter().zip(starts) {
            let (blocks, loss) = result?;
            let n = piece.min(tensor.elements() - start);
            let bytes = n * tensor.ty().block_bytes() as u64;
            each(&blocks, loss, bytes)?;
        }
    }
    Ok(())
}

/// Blocks of `n` values from `start` on, and what they lost by the format's own dequantisation.
fn quantize_piece(
    tensor: &Tensor<'_>,
    ty: GgmlType,
    start: u64,
    n: usize,
) -> Result<(Vec<u8>, Loss)> {
    let mut values = vec![0.0; n];
    tensor.dequantize_into(start, &mut values)?;
    let mut blocks = Vec::new();
    gguf::quantize(ty, &values, &mut blocks).map_err(|e| Error::Model {
        file: tensor.path().to_owned(),
        what: format!("tensor {}, from value {start} on: {e}", tensor.name()),
    })?;
    let mut back = vec![0.0; n];
    gguf::dequantize(ty, &blocks, &mut back)?;
    let mut loss = Loss::default();
    for (x, y) in values.iter().zip(&back) {
        loss.error += f64::from(x - y).powi(2);
        loss.square += f64::from(*x).powi(2);
    }
    Ok((blocks, loss))
}

/// Tensors of one type in the new file.
#[derive(Default)]
struct Group<'a> {
    tensors: usize,
    loss: Loss,
    /// The greatest loss and whose it is.
    worst: Option<(f64, &'a str)>,
}

fn report(
    input: &Gguf,
    args: &QuantizeArgs,
    plans: &[Plan<'_>],
    losses: &[Loss],
    bytes: u64,
    as_json: bool,
    out: &mut dyn Write,
) -> Result<()> {
    if as_json {
        let tensors = plans.iter().zip(losses).map(|(plan, loss)| {
            let changed = plan.changes().then(|| loss.nmse());
            json!({
                "name": plan.tensor.name(),
                "from": plan.tensor.ty(),
                "to": plan.to,
                "nmse": changed,
            })
        });
        let tensors: Vec<_> = tensors.collect();
        let value =
            json!({ "out": args.output, "type": args.ty, "bytes": bytes, "tensors": tensors });
        return print_json(out, &value);
    }
    let mut text = format!(
        "{}: {}, was {}\n",
        args.output.display(),
        DecimalBytes(bytes),
        DecimalBytes(input.file_bytes())
    );
    // Changed ones first.
    let mut groups: BTreeMap<(bool, GgmlType), Group> = BTreeMap::new();
    for (plan, loss) in plans.iter().zip(losses) {
        let group = groups.entry((!plan.changes(), plan.to)).or_default();
        group.tensors += 1;
        group.loss.add(*loss);
        if group.worst.is_none_or(|(worst, _)| loss.nmse() > worst) {
            group.worst = Some((loss.nmse(), plan.tensor.name()));
        }
    }
    for ((unchanged, ty), group) in groups {
        text.push_str(&format!("{:8} {:5} tensors", ty.name(), group.tensors));
        match group.worst {
            Some((worst, name)) if !unchanged => text.push_str(&format!(
                ", normalised mean square error {:.1e}, at most {worst:.1e} in {}",
                group.loss.nmse(),
                name.escape_debug()
            )),
            _ => text.push_str(" as they were"),
        }
        text.push('\n');
    }
    write!(out, "{text}").map_err(stdout_error)
}
