//! `kigo accuracy DIR`: every model of a folder against its reference logits, on every device that is here.
//!
//! A model is `NAME.gguf` beside `NAME.golden.json`: prompts of token ids, the logits after each prompt's
//! last id, and the ids that follow when the likeliest is taken each time, all from an fp32 implementation that is
//! not this one.

use super::{Common, load, print_json, stdout_error};
use crate::engine::Direct;
use crate::error::{Error, Result};
use crate::model::{DeviceChoice, LoadOptions};
use clap::Args;
use gguf::{GgmlType, Gguf};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Debug, Args)]
pub(super) struct AccuracyArgs {
    /// A folder of NAME.gguf and NAME.golden.json
    dir: PathBuf,
    /// Only models whose name starts with this
    #[arg(long, value_name = "PREFIX", default_value = "")]
    only: String,
    /// What another run said with --json, of other devices or on another machine, to be shown beside; may be
    /// given more than once
    #[arg(long, value_name = "FILE")]
    with: Vec<PathBuf>,
}

/// What a golden file must have; it may have more.
#[derive(Deserialize)]
struct Golden {
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    ids: Vec<u32>,
    /// One row: those after the last id.
    logits: Vec<Vec<f64>>,
    greedy: Vec<u32>,
    /// How far the likeliest id's logit is above the next, at each of them.
    #[serde(default)]
    margins: Vec<f64>,
}

impl Prompt {
    /// Root mean square of the logits.
    fn rms(&self) -> f64 {
        let row = &self.logits[0];
        (row.iter().map(|l| l * l).sum::<f64>() / row.len() as f64).sqrt()
    }
}

/// Ids of a prompt that the emulator is given one by one at most: each takes it as long as a whole prompt.
const MOST_SINGLE_EMULATED: usize = 8;

/// A device, and whether activations and cache are f32.
#[derive(Clone, Copy)]
struct Column {
    device: DeviceChoice,
    exact: bool,
}

impl Column {
    /// The column of a report.
    fn named(device: &str, exact: bool) -> Option<Self> {
        let device = match device {
            "CPU" => DeviceChoice::Cpu,
            "emulator" => DeviceChoice::Emulated,
            "GPU" => DeviceChoice::Cuda(0),
            _ => return None,
        };
        Some(Column { device, exact })
    }

    fn device_name(self) -> &'static str {
        match self.device {
            DeviceChoice::Cpu => "CPU",
            DeviceChoice::Emulated => "emulator",
            DeviceChoice::Cuda(_) | DeviceChoice::Auto => "GPU",
        }
    }

    fn name(self) -> String {
        let exact = if self.exact { ", exact" } else { "" };
        format!("{}{exact}", self.device_name())
    }

    /// The greatest error that is right. On a card, products of f32 have other orders of sums, and
    /// approximate functions; the CPU's activations of 15 bits cost less than its cache of f16, the 8-bit
    /// ones of the GPU's kernels cost what they cost.
    fn limit(self) -> f64 {
        match (self.exact, self.device) {
            (true, DeviceChoice::Cpu | DeviceChoice::Emulated) => 1e-5,
            (false, DeviceChoice::Cpu) | (true, _) => 1e-4,
            (false, _) => 2e-2,
        }
    }

    /// The margin below which an error of [`Column::limit`] may turn a choice, over the root mean square of
    /// the logits: the standard deviation of a difference of two of them.
    fn turning(self) -> f64 {
        (2.0 * self.limit()).sqrt()
    }
}

/// What a model did on one device.
enum Cell {
    Measured(Measured),
    /// Why it could not run.
    Failed(String),
}

struct Measured {
    /// The greatest normalised mean square error of a prompt's last logits, `Σ(a - b)² / Σb²`.
    nmse: f64,
    /// Ids that the reference chose too, given the reference's ids before them.
    equal: usize,
    greedy: usize,
    /// The greatest margin of the reference, over the root mean square of its logits, at an id that differs:
    /// infinite where the margin is not known.
    turned: Option<f64>,
}

impl Measured {
    fn is_right(&self, column: Column) -> bool {
        self.nmse <= column.limit() && self.turned.is_none_or(|m| m < column.turning())
    }
}

impl Cell {
    fn is_right(&self, column: Column) -> bool {
        match self {
            Cell::Measured(m) => m.is_right(column),
            Cell::Failed(_) => false,
        }
    }

    fn text(&self, column: Column) -> String {
        match self {
            Cell::Measured(m) => {
                let over = if m.is_right(column) { "" } else { " !" };
                let ids = if m.equal == m.greedy {
                    String::new()
                } else {
                    format!(" ({} of {} ids)", m.equal, m.greedy)
                };
                format!("{:.0e}{over}{ids}", m.nmse)
            }
            Cell::Failed(_) => "-".to_owned(),
        }
    }

    fn json(&self, column: Column) -> Value {
        let mut value = json!({
            "device": column.device_name(),
            "exact": column.exact,
            "limit": column.limit(),
            "right": self.is_right(column),
        });
        match self {
            Cell::Measured(m) => {
                value["nmse"] = json!(m.nmse);
                value["greedy"] = json!(m.greedy);
                value["greedy_equal"] = json!(m.equal);
                value["turned_margin"] = json!(m.turned);
            }
            Cell::Failed(why) => value["error"] = json!(why),
        }
        value
    }
}

/// A model's line of the table.
struct Line {
    name: String,
    architecture: String,
    /// Of the matrices, the commonest first.
    types: Vec<GgmlType>,
    cells: Vec<Cell>,
}

/// Whether every model was right on every device.
///
/// # Errors
/// A folder without models; a golden file that is none; no such device.
pub(super) fn run(common: &Common, args: &AccuracyArgs, out: &mut dyn Write) -> Result<bool> {
    let models = models(&args.dir, &args.only)?;
    let mut devices = match common.device {
        DeviceChoice::Auto => vec![
            DeviceChoice::Cpu,
            DeviceChoice::Emulated,
            DeviceChoice::Cuda(0),
        ],
        device => vec![device],
    };
    let mut lines = Vec::new();
    let progress = indicatif::ProgressBar::new(models.len() as u64);
    for path in &models {
        progress.inc(1);
        let golden: Golden = read_golden(&path.with_added_extension("golden.json"))?;
        let file = Gguf::open(path.with_added_extension("gguf")).map(Arc::new);
        let mut cells = Vec::new();
        let columns = columns(&devices, common.exact);
        for column in columns {
            let measured = match &file {
                Ok(file) => measure(common, column, file, &golden),
                Err(error) => Err(Error::Request(error.to_string())),
            };
            match measured {
                Ok(measured) => cells.push(Cell::Measured(measured)),
                // Only where nobody asked for it.
                Err(Error::NoDevice(_)) if common.device == DeviceChoice::Auto => {
                    devices.retain(|d| *d != column.device);
                }
                Err(error @ Error::NoDevice(_)) => return Err(error),
                Err(error) => cells.push(Cell::Failed(error.to_string())),
            }
        }
        let (architecture, types) = file.map_or_else(|_| Default::default(), |f| describe(&f));
        lines.push(Line {
            name: stem(path),
            architecture,
            types,
            cells,
        });
    }
    progress.finish_and_clear();
    lines.sort_by(|a, b| (&a.architecture, &a.name).cmp(&(&b.architecture, &b.name)));
    let mut columns = columns(&devices, common.exact);
    for path in &args.with {
        add_report(path, &mut lines, &mut columns)?;
    }
    if common.json {
        let models: Vec<_> = lines.iter().map(|line| line_json(line, &columns)).collect();
        print_json(out, &json!({ "models": models }))?;
    } else {
        write!(out, "{}", table(&lines, &columns)).map_err(stdout_error)?;
    }
    let right = |line: &Line| {
        let mut cells = line.cells.iter().zip(&columns);
        cells.all(|(cell, column)| cell.is_right(*column))
    };
    Ok(lines.iter().all(right))
}

/// What this command prints with `--json`.
#[derive(Deserialize)]
struct Report {
    models: Vec<ReportModel>,
}

#[derive(Deserialize)]
struct ReportModel {
    name: String,
    results: Vec<ReportCell>,
}

#[derive(Deserialize)]
struct ReportCell {
    device: String,
    exact: bool,
    nmse: Option<f64>,
    #[serde(default)]
    greedy: usize,
    #[serde(default)]
    greedy_equal: usize,
    turned_margin: Option<f64>,
    error: Option<String>,
}

impl ReportCell {
    fn cell(&self) -> Cell {
        if let Some(error) = &self.error {
            return Cell::Failed(error.clone());
        }
        // JSON has no number for what is none, or infinite.
        let turned = (self.greedy_equal < self.greedy).then_some(f64::INFINITY);
        Cell::Measured(Measured {
            nmse: self.nmse.unwrap_or(f64::NAN),
            equal: self.greedy_equal,
            greedy: self.greedy,
            turned: self.turned_margin.or(turned),
        })
    }
}

/// Adds the columns of another run's report.
fn add_report(path: &PathBuf, lines: &mut [Line], columns: &mut Vec<Column>) -> Result<()> {
    let origin = path.display().to_string();
    let text = super::read_file(path)?;
    let report: Report = super::parse_json(&text, &origin, "what kigo accuracy --json prints")?;
    let results = report.models.iter().flat_map(|m| &m.results);
    let mut own: Vec<(&str, bool)> = Vec::new();
    for result in results {
        let key = (result.device.as_str(), result.exact);
        if !own.contains(&key) {
            own.push(key);
        }
    }
    for (device, exact) in own {
        let column = Column::named(device, exact).ok_or_else(|| {
            Error::Request(format!(
                "{origin}: a result on {device:?}, expected \"CPU\", \"emulator\" or \"GPU\""
            ))
        })?;
        columns.push(column);
        for line in &mut *lines {
            let model = report.models.iter().find(|m| m.name == line.name);
            let mut results = model.iter().flat_map(|m| &m.results);
            let found = results.find(|r| (r.device.as_str(), r.exact) == (device, exact));
            line.cells.push(found.map_or_else(
                || Cell::Failed(format!("{origin} has no result of it")),
                ReportCell::cell,
            ));
        }
    }
    Ok(())
}

fn columns(devices: &[DeviceChoice], only_exact: bool) -> Vec<Column> {
    let both = |&device| [true, false].map(|exact| Column { device, exact });
    let wanted = |column: &Column| column.exact || !only_exact;
    devices.iter().flat_map(both).filter(wanted).collect()
}

/// Paths of the folder's models, without extension, in order.
fn models(dir: &Path, prefix: &str) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io {
        path: dir.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        let name = name.to_string_lossy();
        if let Some(stem) = name.strip_suffix(".golden.json")
            && stem.starts_with(prefix)
        {
            found.push(dir.join(stem));
        }
    }
    if found.is_empty() {
        return Err(Error::Request(format!(
            "{}: no file {prefix}*.golden.json; expected a folder of NAME.gguf beside NAME.golden.json",
            dir.display()
        )));
    }
    found.sort();
    Ok(found)
}

fn stem(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into()
}

fn read_golden(path: &Path) -> Result<Golden> {
    let text = super::read_file(&path.to_owned())?;
    let golden: Golden = super::parse_json(
        &text,
        &path.display().to_string(),
        "{\"prompts\": [{\"ids\", \"logits\", \"greedy\"}]}",
    )?;
    let sound = |p: &Prompt| p.logits.len() == 1 && !p.ids.is_empty();
    if golden.prompts.is_empty() || !golden.prompts.iter().all(sound) {
        return Err(Error::Request(format!(
            "{}: expected prompts of one id or more, each with one row of logits",
            path.display()
        )));
    }
    Ok(golden)
}

/// Architecture and the types of matrices.
fn describe(file: &Gguf) -> (String, Vec<GgmlType>) {
    let architecture = file
        .metadata()
        .str("general.architecture")
        .unwrap_or("?")
        .to_owned();
    let mut bytes: BTreeMap<GgmlType, u64> = BTreeMap::new();
    for tensor in file.tensors().filter(|t| t.dims().len() > 1) {
        *bytes.entry(tensor.ty()).or_default() += tensor.elements();
    }
    let mut types: Vec<_> = bytes.into_iter().collect();
    types.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    (architecture, types.into_iter().map(|(ty, _)| ty).collect())
}

/// `Σ(a - b)² / Σb²` with b the reference; NaN if any value is.
fn nmse(found: &[f32], reference: &[f64]) -> f64 {
    if found.len() != reference.len() {
        return f64::NAN;
    }
    let pairs = found.iter().zip(reference);
    let error: f64 = pairs.map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
    error / reference.iter().map(|b| b * b).sum::<f64>()
}

fn measure(common: &Common, column: Column, file: &Arc<Gguf>, golden: &Golden) -> Result<Measured> {
    let options = LoadOptions {
        device: column.device,
        exact: column.exact,
        threads: common.threads,
        // The model's own: some scale positions by it.
        context: common.ctx_size,
        cache_type: common.cache_type,
        adapters: common.lora.clone(),
        ..LoadOptions::default()
    };
    let mut direct = Direct::new(load::load_with_progress(file, &options)?.runner);
    let mut measured = Measured {
        nmse: 0.0,
        equal: 0,
        greedy: 0,
        turned: None,
    };
    for prompt in &golden.prompts {
        // One by one, then all at once: these are different kernels.
        let slow =
            column.device == DeviceChoice::Emulated && prompt.ids.len() > MOST_SINGLE_EMULATED;
        let chunks = [1, prompt.ids.len()];
        for &chunk in &chunks[usize::from(slow)..] {
            direct.reset();
            direct.expect(prompt.ids.len());
            for ids in prompt.ids.chunks(chunk) {
                direct.feed(ids)?;
            }
            let error = nmse(&direct.logits()?, &prompt.logits[0]);
            // A NaN is kept.
            if error.is_nan() || error > measured.nmse {
                measured.nmse = error;
            }
        }
        for (step, &id) in prompt.greedy.iter().enumerate() {
            measured.greedy += 1;
            let left = prompt.greedy.len() - step;
            if direct.sample_greedy_ahead(left)? == id {
                measured.equal += 1;
            } else {
                let margin = prompt.margins.get(step);
                let margin = margin.map_or(f64::INFINITY, |m| m / prompt.rms());
                measured.turned = Some(measured.turned.map_or(margin, |m| m.max(margin)));
            }
            direct.feed(&[id])?;
        }
    }
    Ok(measured)
}

fn line_json(line: &Line, columns: &[Column]) -> Value {
    let cells = line.cells.iter().zip(columns);
    json!({
        "name": line.name,
        "architecture": line.architecture,
        "types": line.types,
        "results": cells.map(|(cell, column)| cell.json(*column)).collect::<Vec<_>>(),
    })
}

/// A table in Markdown; below it, why models did not run.
fn table(lines: &[Line], columns: &[Column]) -> String {
    let mut text = "| architecture | model | weights |".to_owned();
    for column in columns {
        text.push_str(&format!(" {} |", column.name()));
    }
    text.push_str("\n| --- | --- | --- |");
    text.push_str(&" ---: |".repeat(columns.len()));
    text.push('\n');
    let mut reasons: Vec<String> = Vec::new();
    for line in lines {
        let types: Vec<&str> = line.types.iter().map(|ty| ty.name()).collect();
        let architecture = match line.architecture.as_str() {
            "" => "?",
            name => name,
        };
        text.push_str(&format!(
            "| {architecture} | {} | {} |",
            line.name,
            types.join(", ")
        ));
        for (cell, column) in line.cells.iter().zip(columns) {
            text.push_str(&format!(" {} |", cell.text(*column)));
            if let Cell::Failed(why) = cell {
                let why = format!("- {}: {why}\n", line.name);
                // Mostly the same on every device.
                if !reasons.contains(&why) {
                    reasons.push(why);
                }
            }
        }
        text.push('\n');
    }
    if !reasons.is_empty() {
        text.push_str("\nDid not run:\n\n");
        text.extend(reasons);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str) -> Line {
        Line {
            name: name.to_owned(),
            architecture: "llama".to_owned(),
            types: vec![GgmlType::Q8_0],
            cells: Vec::new(),
        }
    }

    #[test]
    fn other_runs_are_shown_beside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other.json");
        let gpu = Column::named("GPU", false).unwrap();
        let cells = [
            Cell::Measured(Measured {
                nmse: 2e-3,
                equal: 47,
                greedy: 48,
                turned: Some(0.05),
            }),
            Cell::Measured(Measured {
                nmse: 2e-3,
                equal: 47,
                greedy: 48,
                turned: Some(f64::INFINITY),
            }),
        ];
        let models: Vec<_> = ["a", "b"]
            .into_iter()
            .zip(cells)
            .map(|(name, cell)| {
                let line = Line {
                    cells: vec![cell],
                    ..line(name)
                };
                line_json(&line, &[gpu])
            })
            .collect();
        std::fs::write(&path, json!({ "models": models }).to_string()).unwrap();
        let (mut lines, mut columns) = (vec![line("a"), line("b"), line("c")], Vec::new());
        add_report(&path, &mut lines, &mut columns).unwrap();
        let text = table(&lines, &columns);
        for part in [
            "| weights | GPU |\n",
            // A margin that the error may turn; one that it may not; a model that the other run lacked.
            "| a | Q8_0 | 2e-3 (47 of 48 ids) |",
            "| b | Q8_0 | 2e-3 ! (47 of 48 ids) |",
            "| c | Q8_0 | - |",
            "has no result of it",
        ] {
            assert!(text.contains(part), "{text}\nhas no {part:?}");
        }
        std::fs::write(
            &path,
            r#"{"models":[{"name":"a","results":[{"device":"abacus","exact":true}]}]}"#,
        )
        .unwrap();
        let error = add_report(&path, &mut lines, &mut columns).unwrap_err();
        assert!(error.to_string().contains("abacus"), "{error}");
    }
}
