//! Text files, and cutting long text into pieces that tokenize as the whole does.

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

/// Splits text into pieces of at most [`PIECE_BYTES`], so that the tokenizer's tables, some hundred
/// bytes a token, stay small. A piece ends behind a line feed where byte-level pre-tokenizers split
/// anyway, if there is one.
pub(super) fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (piece, tail) = rest.split_at(piece_end(rest, PIECE_BYTES));
        rest = tail;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Where the first piece of `text` ends: its length, or a character boundary in 1..=limit.
fn piece_end(text: &str, limit: usize) -> usize {
    if text.len() <= limit {
        return text.len();
    }
    let bytes = text.as_bytes();
    let mut line_ends = (1..=limit).rev().filter(|&end| bytes[end - 1] == b'\n');
    let last_line_end = line_ends.clone().next();
    line_ends.find(|&end| splits_words(bytes, end)).or(last_line_end).unwrap_or_else(|| {
        // Characters have at most 4 bytes, and `limit` is larger.
        (1..=limit).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(text.len())
    })
}

/// Whether white space before `end`, which is behind a line feed, and the word behind it are never
/// one token: the expressions of GPT-2's heirs give a run of white space its own token but leave
/// its last space to the next word.
fn splits_words(bytes: &[u8], end: usize) -> bool {
    let space = |index: usize| bytes.get(index).is_none_or(u8::is_ascii_whitespace);
    let lone_line_feed = !space(end) && end >= 2 && !space(end - 2);
    let spaced_word = bytes[end] == b' ' && !space(end + 1);
    lone_line_feed || spaced_word
}

/// Most bytes of a text file that are read; a run of 128 windows of 2048 tokens needs about one
/// MiB.
const MAX_TEXT_BYTES: u64 = 256 << 20;

/// Bytes tokenized at once.
pub(super) const PIECE_BYTES: usize = 512 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_to_the_whole() {
        let line = "Das große Haus stand am See – still.\n";
        for text in [line.repeat(40_000), "ä".repeat(700_000), " \n".repeat(600_000), String::new()]
        {
            let all: Vec<&str> = pieces(&text).collect();
            assert_eq!(all.concat(), text);
            assert!(all.iter().all(|piece| !piece.is_empty() && piece.len() <= PIECE_BYTES));
        }
    }

    #[test]
    fn pieces_end_where_tokens_end() {
        for (text, end) in [
            ("one\ntwo\nthree", 8),    // lone line feeds
            ("one\ntwo\n\nthree", 4),  // not inside or behind a run
            (" \n = Head\n text", 10), // a spaced word behind a line feed
            ("one \n\n two three", 6),
            ("a\n\n\n\n\n\n\n\n\n\n\n\nb", 10), // no good place: the last line feed
            ("abcdefghijklmnop", 10),
        ] {
            assert_eq!(piece_end(text, 10), end, "{text:?}");
        }
    }
}
