//! `kigo ptx list`, `kigo ptx show NAME`, `kigo ptx stats`: the kernels embedded in this binary.

use crate::device::ptx::MODULES;
use crate::error::{Error, Result};
use serde_json::json;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

/// Prints the name of every kernel, a line each; with `json` `{"kernels": [{"name", "arch"}]}`.
///
/// # Errors
/// A binary without kernels; `out` cannot be written.
pub fn list(json: bool, out: &mut dyn Write) -> Result<()> {
    let modules = embedded()?;
    let named = |(arch, text): &(&'static str, &'static str)| {
        let arch = *arch;
        entries(text)
            .into_iter()
            .map(move |entry| (entry.name, arch))
            .collect::<Vec<_>>()
    };
    let mut kernels: Vec<(&str, &str)> = modules.iter().flat_map(named).collect();
    kernels.sort_unstable();
    let text = if json {
        let kernels: Vec<_> = kernels
            .iter()
            .map(|(name, arch)| json!({"name": name, "arch": arch}))
            .collect();
        format!("{}\n", json!({ "kernels": kernels }))
    } else {
        kernels.dedup_by_key(|(name, _)| *name);
        kernels
            .iter()
            .map(|(name, _)| format!("{name}\n"))
            .collect()
    };
    write(out, &text)
}

/// Prints the PTX of one kernel from each module; with `json` `{"name", "ptx": {ARCH: TEXT}}`.
///
/// # Errors
/// No kernel of this name; `out` cannot be written.
pub fn show(name: &str, json: bool, out: &mut dyn Write) -> Result<()> {
    let modules = embedded()?;
    let mut found = Vec::new();
    for (arch, text) in modules {
        if let Some(entry) = entries(text).into_iter().find(|entry| entry.name == name) {
            found.push((*arch, entry.text));
        }
    }
    if found.is_empty() {
        return Err(Error::Request(format!(
            "no kernel is named `{name}`; `kigo ptx list` names them all"
        )));
    }
    let text = if json {
        let ptx: serde_json::Map<_, _> = found
            .iter()
            .map(|(arch, text)| ((*arch).to_owned(), json!(text)))
            .collect();
        format!("{}\n", json!({"name": name, "ptx": ptx}))
    } else {
        found
            .iter()
            .map(|(arch, text)| format!("// for {arch}\n{text}\n"))
            .collect()
    };
    write(out, &text)
}

/// Assembles the embedded modules with `ptxas` and prints what each kernel takes: a table, or with
/// `json` `{"kernels": [{"name", "arch", "registers", "shared_bytes", "stack_bytes", "spill_bytes"}]}`.
///
/// # Errors
/// No `ptxas`; it refuses a module; a kernel spills registers.
pub fn stats(json: bool, out: &mut dyn Write) -> Result<()> {
    let ptxas = find_ptxas(|name| env::var_os(name))?;
    let usage = assemble_all(&ptxas, embedded()?)?;
    let text = if json {
        let kernels: Vec<_> = usage.iter().map(Usage::to_json).collect();
        format!("{}\n", json!({ "kernels": kernels }))
    } else {
        table(&usage)
    };
    write(out, &text)?;
    let spilling: Vec<String> = usage
        .iter()
        .filter(|u| u.spill_bytes > 0)
        .map(|u| format!("{} ({})", u.name, u.arch))
        .collect();
    if spilling.is_empty() {
        return Ok(());
    }
    Err(Error::Request(format!(
        "registers are spilled to memory in {}; none may be: use fewer live values or wider launch bounds",
        spilling.join(", ")
    )))
}

fn embedded() -> Result<&'static [(&'static str, &'static str)]> {
    if MODULES.is_empty() {
        return Err(Error::Request(
            "this binary has no kernels in it: build it with the feature `cuda`".into(),
        ));
    }
    Ok(MODULES)
}

fn write(out: &mut dyn Write, text: &str) -> Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // A reader that stops reading (`| head`) is no error.
        Err(source) if source.kind() != io::ErrorKind::BrokenPipe => Err(Error::Io {
            path: "stdout".into(),
            source,
        }),
        _ => Ok(()),
    }
}

/// One kernel in a module's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The kernel's name.
    pub name: &'a str,
    /// From `.visible .entry` to the closing brace.
    pub text: &'a str,
}

/// The kernels of a PTX module, in its order.
pub fn entries(module: &str) -> Vec<Entry<'_>> {
    let mut found = Vec::new();
    let mut start = None;
    let mut at = 0;
    for line in module.split_inclusive('\n') {
        let bare = line.trim();
        if let Some(rest) = bare
            .strip_prefix(".visible ")
            .unwrap_or(bare)
            .strip_prefix(".entry ")
        {
            let name = rest.split(['(', ' ']).next().unwrap_or(rest);
            start = Some((at, name));
        }
        at += line.len();
        // The compiler closes a function in the first column and nothing else.
        if line.trim_end() == "}"
            && let Some((from, name)) = start.take()
        {
            found.push(Entry {
                name,
                text: module[from..at].trim_end(),
            });
        }
    }
    found
}

/// What `ptxas` says about one kernel on one architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Usage {
    name: String,
    arch: String,
    /// Of the whole GPU thread.
    registers: u32,
    /// Static shared memory.
    shared_bytes: u32,
    stack_bytes: u32,
    /// Stores and loads together.
    spill_bytes: u32,
    /// A device function that was not inlined: it has no registers of its own.
    is_function: bool,
}

impl Usage {
    fn to_json(&self) -> serde_json::Value {
        json!({
            "name": self.name,
            "arch": self.arch,
            "registers": self.registers,
            "shared_bytes": self.shared_bytes,
            "stack_bytes": self.stack_bytes,
            "spill_bytes": self.spill_bytes,
        })
    }
}

fn table(usage: &[Usage]) -> String {
    let width = usage
        .iter()
        .map(|u| u.name.len())
        .max()
        .unwrap_or(0)
        .max("kernel".len());
    let mut text = format!(
        "{:width$}  {:>6}  {:>9}  {:>12}  {:>11}  {:>13}\n",
        "kernel", "arch", "registers", "shared bytes", "stack bytes", "spilled bytes"
    );
    for u in usage {
        let registers = if u.is_function {
            "-".to_owned()
        } else {
            u.registers.to_string()
        };
        text.push_str(&format!(
            "{:width$}  {:>6}  {:>9}  {:>12}  {:>11}  {:>13}\n",
            u.name, u.arch, registers, u.shared_bytes, u.stack_bytes, u.spill_bytes
        ));
    }
    text
}

/// `KIGO_PTXAS`, where set; else from `PATH`; else from a CUDA toolkit; else what `setup.sh` fetched.
fn find_ptxas(variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf> {
    if let Some(chosen) = variable("KIGO_PTXAS") {
        let chosen = PathBuf::from(chosen);
        return if chosen.is_file() {
            Ok(chosen)
        } else {
            Err(Error::Request(format!(
                "KIGO_PTXAS is {}, which is no file",
                chosen.display()
            )))
        };
    }
    let on_path = variable("PATH")
        .map(|path| env::split_paths(&path).collect::<Vec<_>>())
        .unwrap_or_default();
    let toolkits = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(&variable)
        .map(|p| Path::new(&p).join("bin"));
    let usual = [
        PathBuf::from("/usr/local/cuda/bin"),
        PathBuf::from(".tools"),
    ];
    on_path
        .into_iter()
        .chain(toolkits)
        .chain(usual)
        .map(|folder| folder.join("ptxas"))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            Error::Request(
                "no ptxas in PATH, CUDA_HOME or .tools: `make ptx` fetches it, KIGO_PTXAS may name another".into(),
            )
        })
}

/// The architectures whose figures count for a module of PTX.
fn targets(arch: &str) -> Vec<&str> {
    if arch == "sm_80" {
        vec!["sm_80", "sm_90"]
    } else {
        vec![arch]
    }
}

fn assemble_all(ptxas: &Path, modules: &[(&str, &str)]) -> Result<Vec<Usage>> {
    let folder = Scratch::new()?;
    let mut usage = Vec::new();
    for (arch, text) in modules {
        let input = folder.0.join("module.ptx");
        fs::write(&input, text).map_err(|source| Error::Io {
            path: input.clone(),
            source,
        })?;
        for target in targets(arch) {
            let output = Command::new(ptxas)
                .args(["-v", "-arch", target])
                .arg(&input)
                .arg("-o")
                .arg(folder.0.join("module.cubin"))
                .output()
                .map_err(|source| Error::Io {
                    path: ptxas.to_owned(),
                    source,
                })?;
            let log = format!(
                "{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
            if !output.status.success() {
                let what = format!(
                    "refuses the PTX of {arch} for {target}:\n{}",
                    log.trim_end()
                );
                return Err(Error::Device {
                    device: ptxas.display().to_string(),
                    what,
                });
            }
            let kernels = entries(text).len();
            let mut found = read_log(&log, target);
            let counted = found.iter().filter(|u| !u.is_function).count();
            if counted != kernels {
                let what =
                    format!("reports {counted} kernels for {target}, the module has {kernels}");
                return Err(Error::Device {
                    device: ptxas.display().to_string(),
                    what,
                });
            }
            usage.append(&mut found);
        }
    }
    usage.sort_by(|a, b| (a.is_function, &a.name, &a.arch).cmp(&(b.is_function, &b.name, &b.arch)));
    Ok(usage)
}

/// A folder that goes away with its value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = env::temp_dir().join(format!("kigo-ptxas-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|source| Error::Io {
            path: path.clone(),
            source,
        })?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays behind in the temporary folder harms nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Reads what `ptxas -v` prints.
///
/// For each kernel: `Compiling entry function 'NAME' for 'ARCH'`, `Function properties for NAME` with
/// its line of stack and spills, then such a pair for each function that it calls, and `Used N
/// registers, …` before or after those.
fn read_log(log: &str, target: &str) -> Vec<Usage> {
    let mut found: Vec<Usage> = Vec::new();
    let mut kernel = None;
    let mut function = None;
    for line in log.lines() {
        let line = line
            .trim()
            .trim_start_matches("ptxas info")
            .trim_start_matches([' ', ':']);
        if let Some(rest) = line.strip_prefix("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or(rest);
            kernel = Some(at(&mut found, name, target, false));
            function = kernel;
        } else if let Some(name) = line.strip_prefix("Function properties for ") {
            let is_kernel = kernel.is_some_and(|k: usize| found[k].name == name);
            function = if is_kernel {
                kernel
            } else {
                Some(at(&mut found, name, target, true))
            };
        } else if line.contains("bytes stack frame") {
            if let Some(f) = function {
                found[f].stack_bytes = number_before(line, " bytes stack frame");
                found[f].spill_bytes = number_before(line, " bytes spill stores")
                    + number_before(line, " bytes spill loads");
            }
        } else if line.starts_with("Used ")
            && let Some(k) = kernel
        {
            found[k].registers = number_before(line, " registers");
            found[k].shared_bytes = number_before(line, " bytes smem");
        }
    }
    found
}

fn at(found: &mut Vec<Usage>, name: &str, arch: &str, is_function: bool) -> usize {
    if let Some(at) = found
        .iter()
        .position(|u| u.name == name && u.is_function == is_function)
    {
        return at;
    }
    found.push(Usage {
        name: name.to_owned(),
        arch: arch.to_owned(),
        registers: 0,
        shared_bytes: 0,
        stack_bytes: 0,
        spill_bytes: 0,
        is_function,
    });
    found.len() - 1
}

/// The number that stands before `unit`; 0 where the unit is not mentioned.
fn number_before(line: &str, unit: &str) -> u32 {
    let Some(end) = line.find(unit) else { return 0 };
    let digits = line[..end]
        .rfind(|c: char| !c.is_ascii_digit())
        .map_or(0, |at| at + 1);
    line[digits..end].parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str = ".version 8.0\n.target sm_80\n.address_size 64\n.func helper()\n{\n\tret;\n}\n\
        .visible .entry add(\n\t.param .u64 add_param_0\n)\n.maxntid 256, 1, 1\n{\n\t{\n\t}\n\tret;\n}\n\
        .entry plain()\n{\n\tret;\n}\n";

    #[test]
    fn entries_have_their_name_and_text() {
        let found = entries(MODULE);
        assert_eq!(
            found.iter().map(|e| e.name).collect::<Vec<_>>(),
            ["add", "plain"]
        );
        assert!(
            found[0].text.starts_with(".visible .entry add("),
            "{}",
            found[0].text
        );
        assert!(found[0].text.ends_with("\tret;\n}"), "{}", found[0].text);
        assert_eq!(found[1].text, ".entry plain()\n{\n\tret;\n}");
    }

    const LOG: &str = "ptxas info    : 0 bytes gmem\n\
        ptxas info    : Compiling entry function 'gemv' for 'sm_90'\n\
        ptxas info    : Function properties for gemv\n    176 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads\n\
        ptxas info    : Used 48 registers, used 1 barriers, 176 bytes cumulative stack size, 4096 bytes smem\n\
        ptxas info    : Compile time = 13.953 ms\n\
        ptxas info    : Function properties for _ZN4core5slice\n    0 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads\n\
        ptxas info    : Compiling entry function 'add' for 'sm_90'\n\
        ptxas info    : Function properties for add\n    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
        ptxas info    : Used 12 registers, used 0 barriers, 380 bytes cmem[0]\n";

    #[test]
    fn the_assembler_log_is_read() {
        let usage =
            |name: &str, registers, shared_bytes, stack_bytes, spill_bytes, is_function| Usage {
                name: name.into(),
                arch: "sm_90".into(),
                registers,
                shared_bytes,
                stack_bytes,
                spill_bytes,
                is_function,
            };
        assert_eq!(
            read_log(LOG, "sm_90"),
            [
                usage("gemv", 48, 4096, 176, 40, false),
                usage("_ZN4core5slice", 0, 0, 0, 4, true),
                usage("add", 12, 0, 0, 0, false),
            ]
        );
    }

    #[test]
    fn the_table_is_aligned() {
        let text = table(&read_log(LOG, "sm_90"));
        let lengths: Vec<usize> = text.lines().map(str::len).collect();
        assert!(lengths.iter().all(|l| *l == lengths[0]), "{text}");
    }

    #[test]
    fn a_chosen_assembler_must_be_there() {
        let error =
            find_ptxas(|name| (name == "KIGO_PTXAS").then(|| "/nowhere/ptxas".into())).unwrap_err();
        assert!(error.to_string().contains("/nowhere/ptxas"), "{error}");
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn the_embedded_kernels_are_listed_and_shown() {
        let mut text = Vec::new();
        list(false, &mut text).unwrap();
        let names = String::from_utf8(text).unwrap();
        let names: Vec<&str> = names.lines().collect();
        assert!(names.len() > 1 && names.is_sorted(), "{names:?}");
        for name in names {
            let mut text = Vec::new();
            show(name, false, &mut text).unwrap();
            assert!(
                String::from_utf8(text)
                    .unwrap()
                    .contains(&format!(".entry {name}("))
            );
        }
        assert!(
            show("no_such_kernel", false, &mut Vec::new())
                .unwrap_err()
                .to_string()
                .contains("no_such_kernel")
        );
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn the_emulator_has_every_embedded_kernel() {
        let mut emulated: Vec<&str> = kernels::all().iter().map(|kernel| kernel.name).collect();
        // The form of `decode` that the module for sm_90 has under that name.
        emulated.retain(|name| *name != "decode_bulk");
        emulated.sort_unstable();
        for (capability, beside) in [(80, ""), (90, crate::device::ptx::beside(90).unwrap())] {
            let (arch, text) = crate::device::ptx::for_capability(capability).unwrap();
            let mut embedded: Vec<&str> = [text, beside]
                .into_iter()
                .flat_map(entries)
                .map(|entry| entry.name)
                .collect();
            embedded.sort_unstable();
            let mut emulated = emulated.clone();
            emulated.retain(|name| !beside.is_empty() || !name.starts_with("warpgroup_"));
            assert_eq!(embedded, emulated, "{arch}");
        }
    }
}
