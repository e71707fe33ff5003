//! What the system says about its processor and memory.

use std::fs;

/// `(total, free)` bytes of memory: the machine's, or what a control group leaves of it.
///
/// Free is what may be allocated without swapping (`MemAvailable`).
pub(super) fn memory() -> Option<(u64, u64)> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let (total, free) = parse_meminfo(&info)?;
    // Version 2, then version 1.
    let groups = [
        (
            "/sys/fs/cgroup/memory.max",
            "/sys/fs/cgroup/memory.current",
            "/sys/fs/cgroup/memory.stat",
        ),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "/sys/fs/cgroup/memory/memory.stat",
        ),
    ];
    for (limit, usage, stat) in groups {
        let Some(limit) = read_number(limit) else {
            continue;
        };
        let usage = read_number(usage).unwrap_or(0);
        // Cached files count as used but make room when memory is asked for.
        let cached = fs::read_to_string(stat).map_or(0, |stat| inactive_file(&stat));
        let left = limit.saturating_sub(usage.saturating_sub(cached));
        return Some((total.min(limit), free.min(left)));
    }
    Some((total, free))
}

fn read_number(path: &str) -> Option<u64> {
    // "max" is no number: there is no limit.
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn inactive_file(stat: &str) -> u64 {
    let line = stat.lines().find_map(|l| l.strip_prefix("inactive_file "));
    line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

fn parse_meminfo(info: &str) -> Option<(u64, u64)> {
    let field = |name: &str| {
        let line = info.lines().find_map(|l| l.strip_prefix(name))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    let total = field("MemTotal:")?;
    Some((total, field("MemAvailable:").or_else(|| field("MemFree:"))?))
}

/// The processor's own name.
pub(super) fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    parse_cpuinfo(&info).unwrap_or_else(|| format!("{} processor", std::env::consts::ARCH))
}

fn parse_cpuinfo(info: &str) -> Option<String> {
    let line = info.lines().find(|l| l.starts_with("model name"))?;
    let name = line.split_once(':')?.1.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_linux_writes() {
        let info = "MemTotal:       24689456 kB\nMemFree:  1 kB\nMemAvailable:   20000000 kB\n";
        assert_eq!(
            parse_meminfo(info),
            Some((24689456 * 1024, 20000000 * 1024))
        );
        assert_eq!(
            parse_meminfo("MemTotal: 8 kB\nMemFree: 4 kB"),
            Some((8192, 4096))
        );
        assert_eq!(parse_meminfo("MemTotal: much"), None);
        let cpu = "processor\t: 0\nmodel name\t: AMD EPYC\nflags : x\n";
        assert_eq!(parse_cpuinfo(cpu).as_deref(), Some("AMD EPYC"));
        assert_eq!(parse_cpuinfo("processor : 0"), None);
        assert_eq!(inactive_file("anon 5\ninactive_file 77\n"), 77);
    }
}
