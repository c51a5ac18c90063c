//! JSON lines: one object a line with `text`, `messages` or `input_ids`.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};

use gptq_format::chat::Message;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::CalibrationError;
use super::collect::Collector;

/// A line; the first of the three that is there counts, whatever the others are.
#[derive(Deserialize)]
struct Line<'a> {
    text: Option<String>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    input_ids: Option<&'a RawValue>,
}

pub(super) fn read(file: File, collector: &mut Collector<'_>) -> Result<(), CalibrationError> {
    let path = collector.path();
    let io = |source| CalibrationError::Io { path: path.to_owned(), source };
    let mut reader = BufReader::new(file);
    let (mut line, mut offset) = (Vec::new(), 0u64);
    for number in 1u64.. {
        line.clear();
        let read =
            reader.by_ref().take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line).map_err(io)?;
        if read == 0 {
            break;
        }
        if collector.is_full() {
            collector.cut();
            break;
        }
        let place = || format!("line {number}");
        let bad = |reason: String| CalibrationError::Row {
            path: path.to_owned(),
            place: place(),
            reason,
        };
        if line.len() as u64 > MAX_LINE_BYTES {
            return Err(bad(format!("longer than {} MiB", MAX_LINE_BYTES >> 20)));
        }
        let content = std::str::from_utf8(&line).map_err(|error| CalibrationError::NotUtf8 {
            path: path.to_owned(),
            offset: offset + error.valid_up_to() as u64,
        })?;
        offset += read as u64;
        let content = content.trim_start_matches('\u{feff}').trim();
        if content.is_empty() {
            continue;
        }
        if content.starts_with('[') {
            return Err(bad("a JSON array; write one object per line".to_owned()));
        }
        let parsed: Line<'_> =
            serde_json::from_str(content).map_err(|error| bad(reason(&error, 0)))?;
        if let Some(text) = parsed.text {
            collector.text(text, place)?;
        } else if let Some(messages) = parsed.messages {
            let messages: Vec<Message> = value(messages, content).map_err(bad)?;
            collector.chat(&messages, place)?;
        } else if let Some(ids) = parsed.input_ids {
            let ids: Vec<i64> = value(ids, content).map_err(bad)?;
            collector.ids(ids, place)?;
        } else {
            return Err(bad("none of the keys `text`, `messages`, `input_ids`".to_owned()));
        }
    }
    Ok(())
}

/// The value of a key of `line`.
fn value<'a, T: Deserialize<'a>>(raw: &'a RawValue, line: &str) -> Result<T, String> {
    let before = raw.get().as_ptr().addr() - line.as_ptr().addr();
    serde_json::from_str(raw.get()).map_err(|error| reason(&error, before))
}

/// The parser's words without its line number, which is always 1 here, on what begins behind `before` bytes of the line.
fn reason(error: &serde_json::Error, before: usize) -> String {
    let message = error.to_string();
    let words = message.rsplit_once(" at line ").map_or(message.as_str(), |(words, _)| words);
    format!("not a valid object: {words} (column {})", before + error.column())
}

/// Longest line accepted, in bytes: memory must not follow a file without line ends.
const MAX_LINE_BYTES: u64 = 64 << 20;
