//! Which file is read how.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::collect::Collector;
use super::{CalibrationError, jsonl, parquet, text};

/// How a calibration file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceKind {
    /// UTF-8 text, the whole file one document.
    Text,
    /// One JSON object a line.
    JsonLines,
    /// Apache Parquet.
    Parquet,
}

impl SourceKind {
    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::JsonLines => "jsonl",
            Self::Parquet => "parquet",
        }
    }

    fn from_extension(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "txt" | "text" | "md" => Some(Self::Text),
            "jsonl" | "ndjson" => Some(Self::JsonLines),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }

    fn from_content(start: &[u8]) -> Self {
        if start.starts_with(b"PAR1") {
            return Self::Parquet;
        }
        let first = start.trim_ascii_start();
        let like_object =
            first.strip_prefix(b"{").is_some_and(|rest| rest.trim_ascii_start().starts_with(b"\""));
        if like_object { Self::JsonLines } else { Self::Text }
    }
}

/// One calibration file and the way it is read.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibrationSource {
    path: PathBuf,
    kind: SourceKind,
    weight: f64,
}

impl CalibrationSource {
    /// The file at `path`, read as its extension says (`txt`, `text`, `md`; `jsonl`, `ndjson`;
    /// `parquet`) or, with another extension, as its first bytes look.
    ///
    /// # Errors
    /// If the file cannot be opened or is compressed.
    pub fn file(path: impl Into<PathBuf>) -> Result<Self, CalibrationError> {
        let path = path.into();
        let mut start = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(SNIFF_BYTES).read_to_end(&mut start))
            .map_err(|source| CalibrationError::Io { path: path.clone(), source })?;
        for (magic, format) in [(&b"\x1f\x8b"[..], "gzip"), (b"\x28\xb5\x2f\xfd", "zstd")] {
            if start.starts_with(magic) {
                return Err(CalibrationError::Compressed { path, format });
            }
        }
        let kind =
            SourceKind::from_extension(&path).unwrap_or_else(|| SourceKind::from_content(&start));
        Ok(Self { path, kind, weight: 1.0 })
    }

    /// The same file with `weight` instead of 1: windows are shared among sources in proportion.
    #[must_use]
    pub fn with_weight(self, weight: f64) -> Self {
        Self { weight, ..self }
    }

    /// Its weight among several sources.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The way it is read.
    pub fn kind(&self) -> SourceKind {
        self.kind
    }

    /// Feeds the documents to `collector` until the end or until it has enough.
    pub(super) fn read(&self, collector: &mut Collector<'_>) -> Result<(), CalibrationError> {
        let file = File::open(&self.path)
            .map_err(|source| CalibrationError::Io { path: self.path.clone(), source })?;
        match self.kind {
            SourceKind::Text => text::read(file, collector),
            SourceKind::JsonLines => jsonl::read(file, collector),
            SourceKind::Parquet => parquet::read(file, collector),
        }
    }
}

/// How much of a file is looked at to tell its kind.
const SNIFF_BYTES: u64 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_tells_the_kind() {
        assert_eq!(SourceKind::from_content(b"PAR1\x15"), SourceKind::Parquet);
        assert_eq!(SourceKind::from_content(b" \n{ \"text\": 1}"), SourceKind::JsonLines);
        assert_eq!(SourceKind::from_content(b"{braces} in prose"), SourceKind::Text);
        assert_eq!(SourceKind::from_content(b""), SourceKind::Text);
    }

    #[test]
    fn the_extension_wins_over_the_content() {
        let folder = tempfile::tempdir().unwrap();
        for (name, kind) in [
            ("a.txt", SourceKind::Text),
            ("a.JSONL", SourceKind::JsonLines),
            ("a.json", SourceKind::JsonLines),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, "{\"text\": \"x\"}").unwrap();
            assert_eq!(CalibrationSource::file(path).unwrap().kind(), kind, "{name}");
        }
        let zipped = folder.path().join("c4.json.gz");
        std::fs::write(&zipped, b"\x1f\x8b\x08").unwrap();
        let message = CalibrationSource::file(zipped).unwrap_err().to_string();
        assert!(message.contains("gzip compressed"), "{message}");
    }
}
