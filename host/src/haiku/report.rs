//! What a run leaves behind: a folder of artifacts, and a screen.

use super::attempt::{Asked, Attempt};
use crate::device::DeviceInfo;
use crate::error::{Error, Result};
use crate::model::ModelInfo;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A finished run.
pub struct Report {
    pub nonce: String,
    /// Seconds to load the model.
    pub load_s: f64,
    pub device: DeviceInfo,
    pub model: ModelInfo,
    pub exact: bool,
    pub asked: Asked,
}

impl Report {
    /// Whether the last attempt passed every check, the logits' included.
    pub fn passed(&self) -> bool {
        self.last().is_some_and(Attempt::passed)
    }

    fn last(&self) -> Option<&Attempt> {
        self.asked.attempts.last()
    }

    /// Writes the artifacts into a new folder under `results` and returns it.
    pub(super) fn write(&self, results: &Path) -> Result<PathBuf> {
        let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let run_id = format!("{}-{}", now.replace([':', '-'], ""), self.nonce);
        let folder = results.join(&run_id);
        std::fs::create_dir_all(&folder).map_err(|source| Error::Io {
            path: folder.clone(),
            source,
        })?;
        // Without the `..` that the results' folder may have come with.
        let folder = folder.canonicalize().unwrap_or(folder);
        let write = |name: &str, contents: String| {
            let path = folder.join(name);
            std::fs::write(&path, contents).map_err(|source| Error::Io { path, source })
        };
        write("verification.json", pretty(&self.verification(&run_id)))?;
        write("sse_transcript.ndjson", self.transcript())?;
        let metrics = json!({
            "before": self.asked.metrics_before,
            "after": self.asked.metrics_after,
        });
        write("metrics_snapshot.json", pretty(&metrics))?;
        write("gpu_env.json", pretty(&self.environment()))?;
        write("test_report.md", self.markdown(&run_id))?;
        Ok(folder)
    }

    fn verification(&self, run_id: &str) -> Value {
        json!({
            "run_id": run_id,
            "passed": self.passed(),
            "minute": self.last().map(|a| &a.minute),
            "nonce": self.nonce,
            "haiku": self.last().map(|a| &a.text),
            "model": self.model,
            "device": self.device,
            "exact": self.exact,
            "load_s": self.load_s,
            "elapsed_s": self.asked.elapsed.as_secs_f64(),
            "attempts": self.asked.attempts,
        })
    }

    /// Every event of every attempt, a line each.
    fn transcript(&self) -> String {
        let mut lines = String::new();
        for attempt in &self.asked.attempts {
            for event in &attempt.events {
                let mut line = json!({ "attempt": attempt.number });
                if let (Some(line), Ok(Value::Object(event))) =
                    (line.as_object_mut(), serde_json::to_value(event))
                {
                    line.extend(event);
                }
                lines.push_str(&line.to_string());
                lines.push('\n');
            }
        }
        lines
    }

    fn environment(&self) -> Value {
        json!({
            "device": self.device,
            "is_gpu": self.device.backend == "cuda",
            "os": std::env::consts::OS,
            "architecture": std::env::consts::ARCH,
            "cpus": std::thread::available_parallelism().map_or(0, usize::from),
            "kigo": env!("CARGO_PKG_VERSION"),
        })
    }

    fn markdown(&self, run_id: &str) -> String {
        let verdict = if self.passed() { "passed" } else { "failed" };
        let mut text = format!("# Haiku {run_id}: {verdict}\n\n");
        for (name, value) in self.facts() {
            // Strings cannot fail to be written to.
            let _ = writeln!(text, "- {name}: {value}");
        }
        for attempt in &self.asked.attempts {
            let _ = write!(
                text,
                "\n## Attempt {}, seed {}\n\n",
                attempt.number, attempt.seed
            );
            for line in attempt.text.lines() {
                let _ = writeln!(text, "> {line}  ");
            }
            text.push_str("\n| check | passed | found |\n| --- | --- | --- |\n");
            for check in &attempt.checks {
                let found = check.found.replace(['|', '\n'], " ");
                let passed = if check.passed { "yes" } else { "NO" };
                let _ = writeln!(text, "| {} | {passed} | {found} |", check.name);
            }
        }
        text
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let attempts = self.asked.attempts.len();
        let mut facts = Vec::new();
        if let Some(last) = self.last() {
            facts.push(("minute", last.minute.clone()));
        }
        facts.push(("nonce", self.nonce.clone()));
        if let Some(last) = self.last() {
            facts.push(("tokens", last.tokens.to_string()));
        }
        facts.push(("attempts", attempts.to_string()));
        let (asking, loading) = (self.asked.elapsed.as_secs_f64(), self.load_s);
        facts.push(("time", format!("{asking:.2} s, and {loading:.2} s to load")));
        facts.push(("model", self.model.name.clone()));
        facts.push((
            "device",
            format!("{} ({})", self.device.name, self.device.backend),
        ));
        if let Some(last) = self.last() {
            facts.push(("speed", format!("{:.1} tokens/s", last.tokens_per_s)));
        }
        facts
    }

    /// What a person reads at the end.
    pub(super) fn screen(&self, folder: &Path) -> String {
        let verdict = if self.passed() { "PASSED" } else { "FAILED" };
        let rule = "─".repeat(64);
        let mut text = format!("\n{rule}\n  {verdict}\n\n");
        for (name, value) in self.facts() {
            let _ = writeln!(text, "  {name:<10}{value}");
        }
        text.push('\n');
        for attempt in &self.asked.attempts {
            for check in attempt.checks.iter().filter(|c| !c.passed) {
                let number = attempt.number;
                let _ = writeln!(
                    text,
                    "  attempt {number}: not so: {} ({})",
                    check.name, check.found
                );
            }
        }
        for line in self.last().map_or("", |a| a.text.trim()).lines() {
            let _ = writeln!(text, "      {}", line.trim());
        }
        let _ = write!(
            text,
            "\n  {:<10}{}\n{rule}\n",
            "artifacts",
            folder.display()
        );
        text
    }
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
