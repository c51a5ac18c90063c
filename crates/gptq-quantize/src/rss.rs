//! Resident memory of this process, as the kernel counts it.

/// Bytes resident now, or `None` where the platform has no `/proc/self/status`.
pub fn current_bytes() -> Option<u64> {
    field(&status()?, "VmRSS:")
}

/// The most bytes that were ever resident, or `None` where the platform has no `/proc/self/status`.
pub fn peak_bytes() -> Option<u64> {
    field(&status()?, "VmHWM:")
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
    fn the_peak_is_at_least_what_is_resident() {
        if let (Some(now), Some(peak)) = (current_bytes(), peak_bytes()) {
            assert!(now > 0 && peak >= now / 2, "now {now}, peak {peak}");
        }
    }
}
