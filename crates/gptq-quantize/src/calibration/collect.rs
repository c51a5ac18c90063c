//! Joins documents into one run of tokens, or keeps their borders, checking every token.

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use gptq_format::Tokenizer;
use gptq_format::chat::Message;

use super::{CalibrationError, SourceKind, SourceReport};

/// Text that is joined before it is tokenized, at least.
const PENDING_BYTES: usize = 512 << 10;

/// 26 July 2024, see the module above.
const DATE: Duration = Duration::from_secs(1_721_952_000);

/// Takes the documents of one file and holds the tokens they give.
pub(super) struct Collector<'a> {
    path: &'a Path,
    tokenizer: &'a Tokenizer,
    vocab_size: usize,
    /// Reading stops when so many tokens are there.
    budget: usize,
    /// Documents are kept apart and cut to so many tokens.
    record: Option<usize>,
    tokens: Vec<u32>,
    ends: Vec<usize>,
    /// Text not yet tokenized.
    pending: String,
    documents: usize,
    characters: u64,
    /// Whether the last document was text, which the next text is joined to.
    after_text: bool,
    cut: bool,
}

/// The tokens of a file.
pub(super) struct Documents {
    /// All tokens.
    pub(super) tokens: Vec<u32>,
    /// The end of each record in `tokens`, where records are kept apart.
    pub(super) ends: Vec<usize>,
}

impl Documents {
    /// Where record number `index` lies in the tokens.
    pub(super) fn record(&self, index: usize) -> Range<usize> {
        index.checked_sub(1).map_or(0, |before| self.ends[before])..self.ends[index]
    }
}

impl<'a> Collector<'a> {
    /// With `record` documents are kept apart, with the special tokens of a text, and cut to so many tokens.
    pub(super) fn new(
        path: &'a Path,
        tokenizer: &'a Tokenizer,
        vocab_size: usize,
        budget: usize,
        record: Option<usize>,
    ) -> Self {
        Self {
            path,
            tokenizer,
            vocab_size,
            budget,
            record,
            tokens: Vec::new(),
            ends: Vec::new(),
            pending: String::new(),
            documents: 0,
            characters: 0,
            after_text: false,
            cut: false,
        }
    }

    /// The file, for errors.
    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// Whether documents are kept apart.
    pub(super) fn keeps_records(&self) -> bool {
        self.record.is_some()
    }

    /// Whether more documents are of no use.
    pub(super) fn is_full(&self) -> bool {
        self.tokens.len() >= self.budget
    }

    /// Notes that the end of the file was not read.
    pub(super) fn cut(&mut self) {
        self.cut = true;
    }

    /// Adds a document of text; `place` says where it was found.
    pub(super) fn text(
        &mut self,
        text: String,
        place: impl Fn() -> String,
    ) -> Result<(), CalibrationError> {
        if let Some(longest) = self.record {
            return self.record(&text, longest, &place);
        }
        self.documents += 1;
        self.characters += text.chars().count() as u64;
        if self.after_text {
            self.pending.push_str("\n\n");
        }
        self.after_text = true;
        if self.pending.is_empty() {
            self.pending = text;
        } else {
            self.pending.push_str(&text);
        }
        if self.pending.len() > PENDING_BYTES { self.flush(&place) } else { Ok(()) }
    }

    /// Adds a chat, as the chat template renders it.
    pub(super) fn chat(
        &mut self,
        messages: &[Message],
        place: impl Fn() -> String,
    ) -> Result<(), CalibrationError> {
        let rendered = self
            .tokenizer
            .apply_chat_template(messages, false, UNIX_EPOCH + DATE)
            .map_err(|error| self.tokenizer_failed(&place, &error))?;
        if let Some(longest) = self.record {
            return self.record(&rendered, longest, &place);
        }
        self.begin_tokens(&place)?;
        self.characters += rendered.chars().count() as u64;
        self.pending = rendered;
        self.flush(&place)
    }

    /// Adds token ids.
    pub(super) fn ids(
        &mut self,
        ids: impl IntoIterator<Item = i64>,
        place: impl Fn() -> String,
    ) -> Result<(), CalibrationError> {
        self.begin_tokens(&place)?;
        for id in ids.into_iter().take(self.record.unwrap_or(usize::MAX)) {
            let token = self.checked(id, &place)?;
            self.tokens.push(token);
        }
        self.end_record();
        Ok(())
    }

    /// All tokens, and the report of the source but for its windows.
    pub(super) fn finish(
        mut self,
        kind: SourceKind,
    ) -> Result<(Documents, SourceReport), CalibrationError> {
        self.flush(&|| "at its end".to_owned())?;
        let report = SourceReport {
            name: self
                .path
                .file_name()
                .unwrap_or(self.path.as_os_str())
                .to_string_lossy()
                .into_owned(),
            kind: kind.name().to_owned(),
            documents: self.documents,
            characters: self.characters,
            tokens: self.tokens.len(),
            cut: self.cut,
            records: self.record.is_some(),
            ..SourceReport::default()
        };
        Ok((Documents { tokens: self.tokens, ends: self.ends }, report))
    }

    /// Adds a text as a record of its own, if there is anything in it.
    fn record(
        &mut self,
        text: &str,
        longest: usize,
        place: &dyn Fn() -> String,
    ) -> Result<(), CalibrationError> {
        if text.trim().is_empty() {
            return Ok(());
        }
        self.documents += 1;
        self.characters += text.chars().count() as u64;
        let encoded = self
            .tokenizer
            .encode_truncated(text, longest)
            .map_err(|error| self.tokenizer_failed(place, &error))?;
        for token in encoded {
            let token = self.checked(i64::from(token), place)?;
            self.tokens.push(token);
        }
        self.end_record();
        Ok(())
    }

    fn end_record(&mut self) {
        if self.record.is_some() && self.tokens.len() > self.ends.last().copied().unwrap_or(0) {
            self.ends.push(self.tokens.len());
        }
    }

    fn begin_tokens(&mut self, place: &dyn Fn() -> String) -> Result<(), CalibrationError> {
        self.documents += 1;
        self.after_text = false;
        self.flush(place)
    }

    /// Tokenizes the pending text, part by part.
    fn flush(&mut self, place: &dyn Fn() -> String) -> Result<(), CalibrationError> {
        let pending = std::mem::take(&mut self.pending);
        for part in self.tokenizer.encode_long(&pending) {
            if self.is_full() {
                self.cut();
                break;
            }
            for token in part.map_err(|error| self.tokenizer_failed(place, &error))? {
                let token = self.checked(i64::from(token), place)?;
                self.tokens.push(token);
            }
        }
        Ok(())
    }

    fn checked(&self, token: i64, place: &dyn Fn() -> String) -> Result<u32, CalibrationError> {
        u32::try_from(token).ok().filter(|&id| (id as usize) < self.vocab_size).ok_or_else(|| {
            CalibrationError::Vocabulary {
                path: self.path.to_owned(),
                place: place(),
                token,
                vocab_size: self.vocab_size,
            }
        })
    }

    fn tokenizer_failed(
        &self,
        place: &dyn Fn() -> String,
        error: &dyn std::fmt::Display,
    ) -> CalibrationError {
        CalibrationError::Tokenize {
            path: self.path.to_owned(),
            place: place(),
            reason: error.to_string(),
        }
    }
}
