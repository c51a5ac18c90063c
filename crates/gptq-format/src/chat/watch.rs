//! A bound on the memory and time of a template.
//!
//! The engine counts instructions, not bytes: `s ~ s` doubles a text with each of them, so that thirty are enough to fill
//! any machine, and a comparison of lists that share their elements takes ages within one. No hook of the engine sees
//! that. So a template runs in a thread of its own, and the caller looks at what the process holds.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// By how much the memory of the process may grow while a template runs, in bytes. A long conversation takes some MiB.
const MAX_GROWTH: u64 = 256 << 20;
/// How long a template may run. The longest published ones take milliseconds.
const MAX_TIME: Duration = Duration::from_secs(20);
/// How often memory is looked at: it grows by a few MiB meanwhile.
const INTERVAL: Duration = Duration::from_millis(1);
/// Stack of the thread, in bytes: that of a main thread.
const STACK: usize = 8 << 20;

/// The result of `work`, or why it was given up. What was given up runs on until it fails by itself or the process ends:
/// a thread cannot be ended from outside. Where the platform does not tell the memory of a process, only time is limited.
/// What other threads allocate meanwhile counts too.
pub(super) fn watched<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let (start, before) = (Instant::now(), anonymous_bytes());
    let (sender, receiver) = sync_channel(1);
    thread::Builder::new()
        .name("chat-template".to_owned())
        .stack_size(STACK)
        .spawn(move || {
            // Nobody waits for a result that was given up.
            let _ = sender.send(work());
        })
        .map_err(|error| format!("no thread to run it: {error}"))?;
    loop {
        match receiver.recv_timeout(INTERVAL) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Disconnected) => return Err("the engine failed".to_owned()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        let growth =
            anonymous_bytes().zip(before).map_or(0, |(now, then)| now.saturating_sub(then));
        if growth > MAX_GROWTH {
            return Err(format!(
                "it takes more than {} MiB of memory; use another template",
                MAX_GROWTH >> 20
            ));
        }
        if start.elapsed() > MAX_TIME {
            return Err(format!(
                "it takes more than {} seconds; use another template",
                MAX_TIME.as_secs()
            ));
        }
    }
}

/// Memory of this process that no file backs, in bytes.
fn anonymous_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

// Memory is that of the whole process: what exceeds it is tested with a process of its own, the real binary.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_in_time_gives_its_result() {
        assert_eq!(watched(|| 7), Ok(7));
        assert!(watched(|| thread::sleep(INTERVAL * 20)).is_ok());
    }
}
