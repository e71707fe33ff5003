//! The kernels' PTX, embedded in the binary.

/// `(architecture, text)` of each module, oldest architecture first.
#[cfg(feature = "cuda")]
pub static MODULES: &[(&str, &str)] = &[
    (
        "sm_80",
        include_str!(concat!(env!("OUT_DIR"), "/kernels.sm_80.ptx")),
    ),
    // The copy engine brings the weights of a decode step.
    (
        "sm_90",
        include_str!(concat!(env!("OUT_DIR"), "/kernels.sm_90.ptx")),
    ),
    // What Hopper alone has: loaded beside another.
    (
        "sm_90a",
        include_str!(concat!(env!("OUT_DIR"), "/kernels.sm_90a.ptx")),
    ),
];

/// A build without the feature `cuda` embeds no module.
#[cfg(not(feature = "cuda"))]
pub static MODULES: &[(&str, &str)] = &[];

/// `text` as it is with number `id` settled (`cuda_std::settled`).
pub fn settle(text: &str, id: u32, number: u32) -> String {
    let marked = |number: u32| format!("0x{number:08x}; // cuda_std settled {id}\n");
    text.replace(&marked(u32::MAX), &marked(number))
}

/// Two modules out of one: without the kernel `name`, and with it alone.
pub fn part(text: &str, name: &str) -> (String, String) {
    const ENTRY: &str = ".visible .entry ";
    const FUNCTION: &str = "\n.func ";
    // What comes before the first kernel belongs to all, and so do functions.
    let mut kernels = text.split(ENTRY);
    let shared = kernels.next().unwrap_or_default();
    let (mut others, mut alone) = (shared.to_owned(), shared.to_owned());
    for kernel in kernels {
        let to = if kernel.split('(').next() == Some(name) {
            &mut alone
        } else {
            &mut others
        };
        let (kernel, functions) = kernel.split_at(kernel.find(FUNCTION).unwrap_or(kernel.len()));
        to.push_str(ENTRY);
        to.push_str(kernel);
        others.push_str(functions);
        alone.push_str(functions);
    }
    (others, alone)
}

/// The newest module that runs on compute capability `capability` (90 for 9.0).
pub fn for_capability(capability: u32) -> Option<(&'static str, &'static str)> {
    MODULES
        .iter()
        .rev()
        .find(|(arch, _)| {
            arch.strip_prefix("sm_")
                .and_then(|n| n.parse().ok())
                .is_some_and(|n: u32| n <= capability)
        })
        .copied()
}

/// The module for compute capability `capability` alone, to be loaded beside [that one](for_capability).
pub fn beside(capability: u32) -> Option<&'static str> {
    let name = format!("sm_{capability}a");
    let module = MODULES.iter().find(|(arch, _)| *arch == name);
    module.map(|(_, text)| *text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = ".version 8.0\n.global .b8 table[4];\n.visible .entry first(\n.param .b32 a)\n{\n}\n\
        .visible .entry second()\n{\nmov.b32 %r1, 0xffffffff; // cuda_std settled 0\nmov.b32 %r2, 0xffffffff;\n\
        mov.b32 %r3, 0xffffffff; // cuda_std settled 10\n}\n.visible .entry second_more()\n{\n}\n.func helper()\n{\n}\n";

    #[test]
    fn a_number_is_settled_where_it_is_marked() {
        let settled = settle(TEXT, 0, 5);
        assert_eq!(
            settled,
            TEXT.replacen("%r1, 0xffffffff", "%r1, 0x00000005", 1)
        );
        assert_eq!(settle(TEXT, 1, 5), TEXT);
    }

    #[test]
    fn a_kernel_is_parted_from_the_others() {
        let (others, second) = part(TEXT, "second");
        assert!(second.contains("entry second()") && !second.contains("second_more"));
        assert!(others.contains("entry first(") && others.contains("entry second_more("));
        assert!(!others.contains("entry second()"));
        for text in [others, second] {
            assert!(text.starts_with(".version 8.0\n.global .b8 table[4];\n"));
            assert!(text.ends_with("\n.func helper()\n{\n}\n"));
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn the_types_of_a_decode_step_can_be_settled() {
        for capability in [80, 90] {
            let (_, text) = for_capability(capability).unwrap();
            let (_, decode) = part(text, "decode");
            for id in kernels::decode::NEEDS {
                assert_ne!(settle(&decode, id, 1), decode);
            }
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn who_may_begin_early_waits_and_nobody_else() {
        let (_, text) = for_capability(90).unwrap();
        let waits = |name: &str| part(text, name).1.contains("griddepcontrol.wait");
        for kernel in kernels::all() {
            // Of the emulator alone, or of another module.
            if !text.contains(&format!(".entry {}(", kernel.name)) {
                continue;
            }
            let early = kernels::WAITING.contains(&kernel.name);
            assert_eq!(waits(kernel.name), early, "{}", kernel.name);
        }
    }
}
