//! What the user sees: data on stdout, all else on stderr.

pub(crate) mod json;
pub(crate) mod plot;
pub(crate) mod progress;
pub(crate) mod size;
pub(crate) mod table;

use std::io::{IsTerminal, Write};

/// Shows an error with its causes, each once: a cause that the message above it already tells is
/// left out.
pub(crate) fn error(error: &anyhow::Error) {
    let stderr = std::io::stderr();
    let (on, off) = if table::colour_allowed(&stderr) && stderr.is_terminal() {
        ("\x1b[1;31m", "\x1b[0m")
    } else {
        ("", "")
    };
    let mut text = format!("{on}error:{off} {error}");
    let mut told = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !told.contains(&cause) {
            text += "\n  because: ";
            text += &cause;
            told = cause;
        }
    }
    // Nothing can be done about an stderr that cannot be written.
    let _ = writeln!(progress::LogWriter, "{text}");
}

/// Writes text to stdout at once.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}
