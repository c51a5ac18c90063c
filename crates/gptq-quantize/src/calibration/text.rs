//! Text files.

use std::fs::File;
use std::io::Read;

use super::CalibrationError;
use super::collect::Collector;

/// Reads a UTF-8 file as one document, or as one a line where records are kept apart; of a file over [`MAX_TEXT_BYTES`]
/// only the beginning.
pub(super) fn read(file: File, collector: &mut Collector<'_>) -> Result<(), CalibrationError> {
    let path = collector.path();
    let mut bytes = Vec::new();
    file.take(MAX_TEXT_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| CalibrationError::Io { path: path.to_owned(), source })?;
    let cut = bytes.len() as u64 > MAX_TEXT_BYTES;
    if cut {
        bytes.pop();
        collector.cut();
    }
    let mut text = match String::from_utf8(bytes) {
        Ok(text) => text,
        // The limit may have fallen inside a character.
        Err(error) if cut && error.utf8_error().error_len().is_none() => {
            let end = error.utf8_error().valid_up_to();
            let mut bytes = error.into_bytes();
            bytes.truncate(end);
            String::from_utf8_lossy(&bytes).into_owned()
        }
        Err(error) => {
            let offset = error.utf8_error().valid_up_to() as u64;
            return Err(CalibrationError::NotUtf8 { path: path.to_owned(), offset });
        }
    };
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    if collector.keeps_records() {
        for (index, line) in text.lines().enumerate() {
            if collector.is_full() {
                collector.cut();
                break;
            }
            collector.text(line.to_owned(), || format!("line {}", index + 1))?;
        }
        return Ok(());
    }
    if text.is_empty() { Ok(()) } else { collector.text(text, || "in its text".to_owned()) }
}

/// Most bytes of a text file that are read; a run of 128 windows of 2048 tokens needs about one
/// MiB.
const MAX_TEXT_BYTES: u64 = 256 << 20;
