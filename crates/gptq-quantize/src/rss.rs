//! Resident memory of this process, as the kernel counts it, and what is left.

/// Bytes resident now, or `None` where the platform has no `/proc/self/status`.
pub fn current_bytes() -> Option<u64> {
    field(&status()?, "VmRSS:")
}

/// The most bytes that were ever resident, or `None` where the platform has no `/proc/self/status`.
pub fn peak_bytes() -> Option<u64> {
    field(&status()?, "VmHWM:")
}

/// Bytes that this process may take beside what is resident: what the kernel calls available, or less where a container
/// (cgroup v2) has a limit. `None` where the platform does not tell.
pub fn available_bytes() -> Option<u64> {
    let of_machine = field(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max");
    // "max" where there is none.
    let limit: Option<u64> = limit.ok().and_then(|text| text.trim().parse().ok());
    let of_container = limit.map(|limit| limit.saturating_sub(current_bytes().unwrap_or(0)));
    Some(of_container.map_or(of_machine, |bytes| bytes.min(of_machine)))
}

fn status() -> Option<String> {
    std::fs::read_to_string("/proc/self/status").ok()
}

/// The value of a line such as `VmRSS:     1234 kB`, in bytes.
fn field(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_lines() {
        let text = "Name:\tgptq\nVmHWM:\t    2048 kB\nVmRSS:\t     100 kB\n";
        assert_eq!(field(text, "VmHWM:"), Some(2048 * 1024));
        assert_eq!(field(text, "VmRSS:"), Some(100 * 1024));
        assert_eq!(field(text, "VmSwap:"), None);
        assert_eq!(field("VmRSS: x kB", "VmRSS:"), None);
    }

    #[test]
    fn what_is_available_is_part_of_the_machines_memory() {
        let Some(available) = available_bytes() else { return };
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
        assert!(available > 0 && available < field(&meminfo, "MemTotal:").unwrap());
    }

    #[test]
    fn the_peak_is_at_least_what_is_resident() {
        if let (Some(now), Some(peak)) = (current_bytes(), peak_bytes()) {
            assert!(now > 0 && peak >= now / 2, "now {now}, peak {peak}");
        }
    }
}
