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
];

/// A build without the feature `cuda` embeds no module.
#[cfg(not(feature = "cuda"))]
pub static MODULES: &[(&str, &str)] = &[];

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
