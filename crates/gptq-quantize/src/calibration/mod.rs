//! Calibration data: from files of text, chats or token ids to windows of tokens.
//!
//! As in the GPTQ paper's data loader, all documents of a source are tokenized and joined into one
//! run of tokens, and windows of `seqlen` tokens are cut from it at random offsets. What was read
//! and drawn is told in a [`CalibrationReport`]; the same files, tokenizer and options give the
//! same windows on every platform.
//!
//! | file | one document is | documents are joined |
//! |---|---|---|
//! | text | the whole file | – |
//! | JSON lines, Parquet: `text` | one row | by two line feeds, before tokenizing |
//! | JSON lines, Parquet: `messages` | one row, through the chat template | as tokens |
//! | JSON lines, Parquet: `input_ids` | one row | as tokens |
//!
//! No special tokens are added; chat templates contain their own. Those that ask for the date are told 26 July 2024, the one
//! that Llama 3.1 takes without a clock: windows would be others the next day.
//!
//! Encoders read texts one by one, so their windows are the records themselves ([`Windows::Records`]): each line of a text
//! file and each row of the others is tokenized with the special tokens that the tokenizer puts around a text, cut to
//! `seqlen` tokens, and never joined with another.

mod collect;
mod error;
mod jsonl;
mod parquet;
mod report;
mod share;
mod source;
mod text;
mod windows;

use std::ops::Range;

use gptq_format::Tokenizer;

pub use error::CalibrationError;
pub use report::SELF;
pub use report::{CalibrationReport, SourceReport};
pub use share::{shares, split_weight};
pub use source::{CalibrationSource, SourceKind};

use collect::Collector;
use windows::SplitMix64;

/// How many windows of which length are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CalibrationOptions {
    /// Number of windows.
    pub nsamples: usize,
    /// Tokens per window; of records the most.
    pub seqlen: usize,
    /// Seed of the offsets, or of the choice of records.
    pub seed: u64,
}

/// What a window is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    /// A cut of `seqlen` tokens out of all documents joined: for models that read on and on.
    Cuts,
    /// One record with its special tokens: for models that read one text at a time. Windows differ in length. A source with
    /// fewer records than asked for gives all it has.
    Records,
}

impl Default for CalibrationOptions {
    /// The paper's choice: 128 windows of 2048 tokens, seed 0.
    fn default() -> Self {
        Self { nsamples: 128, seqlen: 2048, seed: 0 }
    }
}

/// Windows of token ids and how they came about.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibrationSet {
    /// Token ids, all below the model's vocabulary size.
    pub windows: Vec<Vec<u32>>,
    /// What was read and drawn.
    pub report: CalibrationReport,
}

impl CalibrationSet {
    /// Reads `sources` and draws `options.nsamples` windows, from each source as many as its weight
    /// asks for ([`shares`]). `vocab_size` is the model's: every token has to have an embedding.
    ///
    /// Of very long sources only the beginning is read, as much as 64 times the tokens that are
    /// drawn (but never less than 16 Mi tokens); the report says so.
    ///
    /// # Errors
    /// If a file cannot be read or is malformed (naming file and line), holds a token outside the
    /// vocabulary, is shorter than one window, or has a weight too small for a window.
    pub fn load(
        sources: &[CalibrationSource],
        tokenizer: &Tokenizer,
        vocab_size: usize,
        kind: Windows,
        options: &CalibrationOptions,
    ) -> Result<Self, CalibrationError> {
        let weights = sources.iter().map(|source| {
            let name = source.path().display().to_string();
            (name, source.weight())
        });
        let shares = shares(&weights.collect::<Vec<_>>(), options.nsamples)?;
        Self::load_shares(sources, &shares, tokenizer, vocab_size, kind, options)
    }

    /// As [`CalibrationSet::load`] with the number of windows of each source given, which
    /// `options.nsamples` is the sum of.
    ///
    /// # Errors
    /// As [`CalibrationSet::load`].
    pub fn load_shares(
        sources: &[CalibrationSource],
        shares: &[usize],
        tokenizer: &Tokenizer,
        vocab_size: usize,
        kind: Windows,
        options: &CalibrationOptions,
    ) -> Result<Self, CalibrationError> {
        let CalibrationOptions { nsamples, seqlen, seed } = *options;
        if sources.is_empty() || nsamples == 0 || seqlen == 0 {
            return Err(CalibrationError::NothingAsked {
                sources: sources.len(),
                nsamples,
                seqlen,
            });
        }
        let budget = nsamples.saturating_mul(seqlen).saturating_mul(BUDGET_FACTOR).max(MIN_BUDGET);
        let mut generator = SplitMix64::new(seed);
        let mut windows = Vec::new();
        let mut reports = Vec::with_capacity(sources.len());
        for (source, &share) in sources.iter().zip(shares) {
            let record = (kind == Windows::Records).then_some(seqlen);
            let mut collector =
                Collector::new(source.path(), tokenizer, vocab_size, budget, record);
            source.read(&mut collector)?;
            let (documents, mut report) = collector.finish(source.kind())?;
            let tokens = &documents.tokens;
            let shortest = if record.is_some() { 1 } else { seqlen };
            if tokens.len() < shortest {
                return Err(CalibrationError::TooShort {
                    path: source.path().to_owned(),
                    tokens: tokens.len(),
                    seqlen,
                    nsamples,
                });
            }
            let drawn: Vec<Range<usize>> = match kind {
                Windows::Cuts => windows::draw(tokens.len(), seqlen, share, &mut generator)
                    .into_iter()
                    .map(|offset| offset..offset + seqlen)
                    .collect(),
                Windows::Records => windows::choose(documents.ends.len(), share, &mut generator)
                    .into_iter()
                    .map(|record| documents.record(record))
                    .collect(),
            };
            report.windows = drawn.len();
            report.weight = source.weight();
            report.coverage = windows::coverage(tokens.len(), &drawn);
            windows.extend(drawn.into_iter().map(|range| tokens[range].to_vec()));
            reports.push(report);
        }
        let report = CalibrationReport::new(reports, &windows, options, vocab_size);
        Ok(Self { windows, report })
    }

    /// The windows of `self` followed by those of `other`, both drawn for a model of `vocab_size`
    /// tokens with the same length and seed.
    #[must_use]
    pub fn followed_by(mut self, other: Self, vocab_size: usize) -> Self {
        self.windows.extend(other.windows);
        let mut sources = self.report.sources;
        sources.extend(other.report.sources);
        let options = CalibrationOptions {
            nsamples: self.windows.len(),
            seqlen: self.report.seqlen,
            seed: self.report.seed,
        };
        let report = CalibrationReport::new(sources, &self.windows, &options, vocab_size);
        Self { windows: self.windows, report }
    }

    /// Windows that came about in another way, such as the model's own samples.
    pub fn from_windows(windows: Vec<Vec<u32>>, report: CalibrationReport) -> Self {
        Self { windows, report }
    }
}

/// Tokens read per token drawn, at most: enough for offsets that hardly overlap, without reading a
/// terabyte.
const BUDGET_FACTOR: usize = 64;

/// Tokens that are read whatever is drawn, so that usual corpora (WikiText-2 train: 2.4 M tokens)
/// are never cut.
const MIN_BUDGET: usize = 16 << 20;

#[cfg(test)]
mod tests;
