//! Finishes the PTX text that rustc wrote.

/// The comment that `#[kernel(launch_bounds(…))]` leaves in an entry's body.
const MARKER: &str = "// cuda_std launch_bounds ";

/// The comment that `argument!` leaves in the body of an entry whose argument struct's address is taken: it may
/// hold what the copy engine wants at a multiple of 64 bytes, more than the compiler aligns arguments to.
const ARGUMENT: &str = "// cuda_std argument";

/// Puts `.maxntid` and `.minnctapersm` on the entries that carry a launch-bounds marker, aligns argument structs
/// whose address is taken, and drops comments and blank lines.
///
/// # Errors
/// An undefined function (the driver would refuse the module), or a marker that cannot be read.
pub fn finish(text: &str) -> Result<String, String> {
    let lines: Vec<&str> = text.lines().collect();
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < lines.len() {
        let line = lines[i].trim_end();
        let bare = line.trim_start();
        if let Some(rest) = bare.strip_prefix(".extern .func") {
            return Err(format!(
                "it calls a function that nothing defines:{rest} (a panic with a message, or an intrinsic of the host?)"
            ));
        }
        if bare.starts_with(".visible .entry") || bare.starts_with(".entry") {
            let open = (i..lines.len())
                .find(|&j| lines[j].trim() == "{")
                .ok_or_else(|| format!("an entry without a body: {bare}"))?;
            let close = (open..lines.len())
                .find(|&j| lines[j] == "}")
                .unwrap_or(lines.len());
            let aligned = lines[open..close].iter().any(|l| l.trim() == ARGUMENT);
            for header in &lines[i..open] {
                match header.split_once(".param .align 16 ") {
                    Some((indent, rest)) if aligned => {
                        push(&mut out, &format!("{indent}.param .align 64 {rest}"));
                    }
                    _ => push(&mut out, header),
                }
            }
            if let Some(bounds) = lines[open..close]
                .iter()
                .find_map(|l| l.trim().strip_prefix(MARKER))
            {
                out.push_str(&directives(bounds)?);
            }
            i = open;
            continue;
        }
        push(&mut out, line);
        i += 1;
    }
    Ok(out)
}

fn push(out: &mut String, line: &str) {
    let line = line.trim_end();
    let bare = line.trim_start();
    if bare.is_empty() || bare.starts_with("//") {
        return;
    }
    out.push_str(line);
    out.push('\n');
}

fn directives(bounds: &str) -> Result<String, String> {
    let numbers: Vec<u32> = bounds
        .split_whitespace()
        .map_while(|n| n.parse().ok())
        .collect();
    let [max_threads, min_blocks] = numbers[..] else {
        return Err(format!("unreadable launch bounds `{bounds}`"));
    };
    let mut text = format!(".maxntid {max_threads}, 1, 1\n");
    if min_blocks > 0 {
        text.push_str(&format!(".minnctapersm {min_blocks}\n"));
    }
    Ok(text)
}

/// The names of the entries of a PTX module, in its order.
pub fn entries(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let rest = line
            .trim_start()
            .trim_start_matches(".visible ")
            .strip_prefix(".entry ")?;
        Some(rest.split(['(', ' ']).next().unwrap_or(rest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str = "//\n// Generated\n//\n\n.version 8.0\n.target sm_80\n\n\t// .globl\ta\n\
        .visible .entry a(\n\t.param .u32 a_param_0\n)\n{\n\t.reg .b32 \t%r<2>;\n\t// begin inline asm\n\
        \t// cuda_std launch_bounds 256 2\n\t// end inline asm\n\tret;\n\n}\n\
        .visible .entry b()\n{\n\tret;\n\n}\n";

    #[test]
    fn launch_bounds_go_on_their_entry_only() {
        let text = finish(MODULE).unwrap();
        assert_eq!(
            text,
            ".version 8.0\n.target sm_80\n.visible .entry a(\n\t.param .u32 a_param_0\n)\n.maxntid 256, 1, 1\n\
             .minnctapersm 2\n{\n\t.reg .b32 \t%r<2>;\n\tret;\n}\n.visible .entry b()\n{\n\tret;\n}\n"
        );
        assert_eq!(entries(&text).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn an_argument_struct_whose_address_is_taken_is_aligned() {
        let entry = |body: &str| {
            format!(
                ".visible .entry a(\n\t.param .align 16 .b8 a_param_0[272]\n)\n{{\n{body}\tret;\n}}\n"
            )
        };
        let text = finish(&entry("\t// cuda_std argument\n")).unwrap();
        assert_eq!(text, entry("").replace("align 16", "align 64"));
        assert_eq!(finish(&entry("")).unwrap(), entry(""));
    }

    #[test]
    fn an_undefined_function_is_an_error() {
        let error = finish(".version 8.0\n.extern .func memcmp\n").unwrap_err();
        assert!(error.contains("memcmp"), "{error}");
    }

    #[test]
    fn a_broken_marker_is_an_error() {
        assert!(finish(&MODULE.replace("256 2", "256 x")).is_err());
    }
}
