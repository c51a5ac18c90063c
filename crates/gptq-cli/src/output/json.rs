//! Machine-readable results: one JSON object on stdout.

use std::io::Write;

use anyhow::Context;
use serde::Serialize;

/// Prints `value` as one indented JSON object and a line feed. Floats that are not finite become
/// `null`.
///
/// # Errors
/// If stdout cannot be written to.
pub(crate) fn print(value: &impl Serialize) -> anyhow::Result<()> {
    let mut text =
        serde_json::to_string_pretty(value).context("cannot write the result as JSON")?;
    text.push('\n');
    std::io::stdout().lock().write_all(text.as_bytes()).context("cannot write to stdout")
}
