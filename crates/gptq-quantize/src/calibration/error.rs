//! Why calibration data could not be used.

use std::path::PathBuf;

/// Why no windows could be drawn. Messages name the file, the place in it, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrationError {
    /// The operating system refused to read a file.
    #[error("cannot read calibration file `{}`: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The options ask for no window at all.
    #[error(
        "nothing to draw: {sources} calibration sources, {nsamples} windows of {seqlen} tokens; all three must be at least 1"
    )]
    NothingAsked {
        /// Number of sources given.
        sources: usize,
        /// Number of windows asked for.
        nsamples: usize,
        /// Tokens per window asked for.
        seqlen: usize,
    },
    /// A weight is not a positive number, or too small for a window.
    #[error("calibration source `{name}`: weight {weight} {reason}")]
    Weight {
        /// The source as the user named it.
        name: String,
        /// Its weight.
        weight: f64,
        /// What is wrong with it.
        reason: String,
    },
    /// The file is gzip or zstd compressed.
    #[error("calibration file `{}` is {format} compressed; decompress it first", path.display())]
    Compressed {
        /// The file.
        path: PathBuf,
        /// `gzip` or `zstd`.
        format: &'static str,
    },
    /// Text is not UTF-8.
    #[error("calibration file `{}` is not UTF-8: bad byte at offset {offset}", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first bad byte from the start of the file.
        offset: u64,
    },
    /// A line of a JSON lines file, or a row of a Parquet file, is malformed.
    #[error("calibration file `{}`, {place}: {reason}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// `line N` or `row N`, counted from 1.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A Parquet file is malformed or has none of the columns.
    #[error("calibration file `{}` cannot be read as Parquet: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The tokenizer or the chat template failed.
    #[error("cannot tokenize calibration file `{}`, {place}: {reason}", path.display())]
    Tokenize {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        place: String,
        /// The tokenizer's words.
        reason: String,
    },
    /// A token has no embedding.
    #[error(
        "calibration file `{}`, {place}: token {token} is outside the model's vocabulary of {vocab_size}; \
         tokenize with the model's own tokenizer",
        path.display()
    )]
    Vocabulary {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        place: String,
        /// The token id.
        token: i64,
        /// The model's vocabulary size.
        vocab_size: usize,
    },
    /// The text is shorter than one window.
    #[error(
        "calibration file `{}` holds {tokens} tokens, less than one window of {seqlen} ({nsamples} windows were asked for); \
         give a longer text, lower --seqlen, or use `--calibration self`",
        path.display()
    )]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Tokens found.
        tokens: usize,
        /// Tokens per window.
        seqlen: usize,
        /// Windows asked for.
        nsamples: usize,
    },
}
