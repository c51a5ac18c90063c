//! What was read and drawn, for quant_report.json and the model card.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::{CalibrationOptions, windows};

/// What one source gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceReport {
    /// File name, or `self` for text that the model wrote.
    pub name: String,
    /// `text`, `jsonl`, `parquet` or `self`.
    pub kind: String,
    /// Documents (rows; 1 for a text file).
    pub documents: usize,
    /// Unicode characters tokenized; 0 for rows of token ids.
    pub characters: u64,
    /// Tokens they gave.
    pub tokens: usize,
    /// Whether reading stopped before the end because there was far more than is drawn.
    pub cut: bool,
    /// Its weight among the sources: windows are shared in proportion.
    #[serde(default = "one")]
    pub weight: f64,
    /// Windows drawn from it.
    pub windows: usize,
    /// Share of its tokens that are in at least one window, in 0..=1.
    pub coverage: f64,
    /// Each window is a document by itself (encoders) and not a cut through all of them.
    #[serde(default)]
    pub records: bool,
}

impl Default for SourceReport {
    /// Of a nameless source of weight 1 that gave nothing.
    fn default() -> Self {
        Self {
            name: String::new(),
            kind: String::new(),
            documents: 0,
            characters: 0,
            tokens: 0,
            cut: false,
            weight: one(),
            windows: 0,
            coverage: 0.0,
            records: false,
        }
    }
}

fn one() -> f64 {
    1.0
}

/// What the calibration windows are made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CalibrationReport {
    /// One entry per source, in the order given.
    pub sources: Vec<SourceReport>,
    /// Number of windows.
    pub windows: usize,
    /// Tokens per window; of records the most.
    pub seqlen: usize,
    /// Tokens in all windows.
    pub tokens: usize,
    /// The seed they were drawn with.
    pub seed: u64,
    /// Different token ids in the windows.
    pub distinct_tokens: usize,
    /// `distinct_tokens` over the vocabulary size.
    pub vocabulary_coverage: f64,
    /// What the user should know about the text, such as windows that must overlap; `null` where
    /// there is nothing.
    pub note: Option<String>,
    /// 64-bit FNV-1a hash of the windows (each as its length and its tokens in 4 little-endian
    /// bytes), 16 hexadecimal digits: equal windows, equal calibration.
    pub fingerprint: String,
}

impl CalibrationReport {
    /// The report of `windows`, drawn from `sources` with `options` for a model of `vocab_size`
    /// tokens.
    pub fn new(
        sources: Vec<SourceReport>,
        windows: &[Vec<u32>],
        options: &CalibrationOptions,
        vocab_size: usize,
    ) -> Self {
        let distinct: HashSet<u32> = windows.iter().flatten().copied().collect();
        Self {
            note: note(&sources, options),
            windows: windows.len(),
            seqlen: options.seqlen,
            tokens: windows.iter().map(Vec::len).sum(),
            seed: options.seed,
            distinct_tokens: distinct.len(),
            vocabulary_coverage: distinct.len() as f64 / vocab_size.max(1) as f64,
            fingerprint: format!("{:016x}", windows::fingerprint(windows)),
            sources,
        }
    }
}

fn note(sources: &[SourceReport], options: &CalibrationOptions) -> Option<String> {
    let mut notes = Vec::new();
    for source in sources {
        let apart = source.tokens / options.seqlen.max(1);
        if apart < source.windows && source.kind != SELF && !source.records {
            notes.push(format!(
                "{} holds {} tokens, {apart} windows of {} without overlap: the {} windows drawn overlap",
                source.name, source.tokens, options.seqlen, source.windows
            ));
        }
        if source.cut {
            notes.push(format!(
                "{} is longer than needed: only its first {} tokens were read",
                source.name, source.tokens
            ));
        }
    }
    if notes.is_empty() { None } else { Some(notes.join("; ")) }
}

/// Name and kind of text that the model wrote itself.
pub const SELF: &str = "self";
