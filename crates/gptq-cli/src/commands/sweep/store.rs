//! The directory of a sweep: finished rows, each a file that says by its name what it is the result
//! of, so that no row is run twice and none is taken for another.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::Context;
use gptq_format::Checkpoint;
use gptq_format::fs::{read_json, write_atomic};
use gptq_quantize::calibration::{SELF, split_weight};
use gptq_quantize::model_fingerprint;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::rows::{Row, sources};
use super::texts::EvalSettings;

/// Where results are kept.
#[derive(Debug)]
pub(super) struct Store {
    directory: PathBuf,
    /// What all rows have in common: this program and the model.
    model: String,
    /// What is measured.
    evaluation: String,
}

impl Store {
    /// Of a sweep over `checkpoint` into `directory`, which need not exist.
    ///
    /// # Errors
    /// If a file of the model or a text cannot be read.
    pub(super) fn new(
        directory: &Path,
        name: &str,
        checkpoint: &Checkpoint,
        settings: &EvalSettings,
        texts: &[PathBuf],
    ) -> anyhow::Result<Self> {
        let mut model = format!("{name}\n{}", json!(model_fingerprint(checkpoint)?));
        // The tokenizer and its chat template, which may be several files.
        let beside = std::fs::read_dir(&checkpoint.path).into_iter().flatten();
        let of_tokenizer = |path: &PathBuf| {
            let ends = |end: &str| path.extension().is_some_and(|extension| extension == end);
            path.is_file() && ["json", "txt", "model", "jinja"].into_iter().any(ends)
        };
        let files = beside.filter_map(|entry| Some(entry.ok()?.path())).filter(of_tokenizer);
        let mut files: Vec<PathBuf> = files.collect();
        files.sort_unstable();
        for file in files {
            write_stamp(&mut model, &file)?;
        }
        let mut evaluation = format!("{settings:?}");
        for text in texts {
            write_content(&mut evaluation, text)?;
        }
        Ok(Self { directory: directory.to_owned(), model, evaluation })
    }

    /// Where all is kept.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the directories.
    ///
    /// # Errors
    /// If that fails.
    pub(super) fn create(&self) -> anyhow::Result<()> {
        for part in ["rows", "checkpoints", "plots"] {
            let path = self.directory.join(part);
            std::fs::create_dir_all(&path)
                .with_context(|| format!("cannot create {}", path.display()))?;
        }
        Ok(())
    }

    /// What tells the checkpoint of a row from all others, in 16 hexadecimal digits.
    ///
    /// # Errors
    /// If a calibration file cannot be read.
    pub(super) fn checkpoint_id(&self, row: &Row) -> anyhow::Result<String> {
        // The options as they are meant today: what a row does not set may have another default tomorrow.
        let mut text = format!("{}\n{:?}\n{:?}", self.model, row.line, row.args.options()?);
        for (option, value) in &row.settings {
            let files: Vec<&str> = match option.as_str() {
                "calibration" => {
                    sources(value).into_iter().map(|source| split_weight(source).0).collect()
                }
                "dynamic" => vec![value],
                _ => continue,
            };
            for file in files.into_iter().filter(|file| *file != SELF) {
                write_content(&mut text, Path::new(file))?;
            }
        }
        Ok(hash(text.as_bytes()))
    }

    /// The same for what is measured on a checkpoint; of no checkpoint: on the original.
    pub(super) fn result_id(&self, checkpoint_id: &str) -> String {
        hash(format!("{}\n{}\n{checkpoint_id}", self.model, self.evaluation).as_bytes())
    }

    /// The checkpoint of a row while it is there, finished or not, whatever the row was called when it was begun.
    pub(super) fn checkpoint(&self, name: &str, id: &str) -> PathBuf {
        let checkpoints = self.directory.join("checkpoints");
        let known = std::fs::read_dir(&checkpoints).into_iter().flatten().filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let unfinished = name.strip_prefix('.').and_then(|name| name.strip_suffix(".partial"));
            let name = unfinished.unwrap_or(&name);
            name.ends_with(&format!("-{id}")).then(|| checkpoints.join(name))
        });
        known.min().unwrap_or_else(|| checkpoints.join(format!("{name}-{id}")))
    }

    /// A finished result, whatever its row was called then. One that cannot be read is none.
    pub(super) fn read<T: DeserializeOwned>(&self, id: &str) -> Option<T> {
        let end = format!("-{id}.json");
        let of_id = |path: &PathBuf| path.to_string_lossy().ends_with(&end);
        let read = |path: &Path| Ok::<T, anyhow::Error>(serde_json::from_value(read_json(path)?)?);
        self.results().into_iter().filter(of_id).find_map(|path| {
            let ignored = |error: &anyhow::Error| {
                tracing::warn!("{}: {error:#}; it counts as none", path.display());
            };
            read(&path).inspect_err(ignored).ok()
        })
    }

    /// Whether a finished row has kept this checkpoint, under whatever name.
    pub(super) fn keeps(&self, checkpoint: &Path) -> bool {
        self.results().into_iter().filter_map(|path| read_json(&path).ok()).any(|result| {
            let kept = result["checkpoint"].as_str().map(Path::new);
            kept.is_some_and(|kept| kept.file_name() == checkpoint.file_name())
        })
    }

    /// The files of results, in the order of their names.
    fn results(&self) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.directory.join("rows")).into_iter().flatten();
        let mut files: Vec<PathBuf> = files.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.sort_unstable();
        files
    }

    /// Keeps a result: afterwards the file is there whole, or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn write(
        &self,
        name: &str,
        id: &str,
        result: &impl Serialize,
    ) -> anyhow::Result<()> {
        let path = self.directory.join("rows").join(format!("{name}-{id}.json"));
        let text = serde_json::to_string_pretty(result).context("cannot write a row as JSON")?;
        Ok(write_atomic(&path, (text + "\n").as_bytes())?)
    }
}

/// Name, size and time of a file, which may take long to read.
fn write_stamp(text: &mut String, file: &Path) -> anyhow::Result<()> {
    let meta =
        std::fs::metadata(file).with_context(|| format!("cannot read {}", file.display()))?;
    let time = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    let time = time.map_or(0, |time| time.as_nanos());
    // Writing to a string cannot fail.
    let _ = write!(text, "\n{} {} {time}", file.display(), meta.len());
    Ok(())
}

/// Name and content of a text or a table, which may be copied between two calls.
fn write_content(text: &mut String, file: &Path) -> anyhow::Result<()> {
    let content = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    // Writing to a string cannot fail.
    let _ = write!(text, "\n{} {} {}", file.display(), content.len(), hash(&content));
    Ok(())
}

/// 64-bit FNV-1a, in 16 hexadecimal digits.
fn hash(bytes: &[u8]) -> String {
    let value = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{value:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_published_one() {
        assert_eq!(hash(b""), "cbf29ce484222325");
        assert_eq!(hash(b"a"), "af63dc4c8601ec8c");
    }
}
