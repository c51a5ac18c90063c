//! Writing safetensors: the layout is planned before the first byte, tensors come in any order.

mod plan;
#[cfg(test)]
mod tests;

pub use plan::{ShardPlan, TensorSpec};

use crate::error::{FormatError, Result};
use crate::fs::{require_space, sync_directory, write_atomic};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const INDEX_NAME: &str = "model.safetensors.index.json";

/// Writes the tensors of a [`ShardPlan`] into a directory, in any order and each exactly once.
///
/// The files have their full size and header from the start; what is not written yet reads as zeros. Write into an
/// [`crate::OutputDir`] so that nobody takes them for whole.
#[derive(Debug)]
pub struct ShardWriter {
    directory: PathBuf,
    plan: ShardPlan,
    files: Vec<File>,
    /// Bytes written so far, by shard and position.
    progress: Vec<Vec<u64>>,
}

impl ShardWriter {
    /// Creates the files, replacing those that are there, and the index where there are several: the directory can be
    /// opened as a checkpoint from then on, though tensors not yet written read as zeros.
    ///
    /// # Errors
    /// If the disk has no room for them, or a file cannot be created, given its size, or written.
    pub fn create(directory: &Path, plan: ShardPlan) -> Result<Self> {
        require_space(directory, plan.files().map(|(_, bytes)| bytes).sum())?;
        let mut files = Vec::with_capacity(plan.shards.len());
        for shard in &plan.shards {
            let path = directory.join(&shard.name);
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .open(&path)
                .map_err(FormatError::io("create", &path))?;
            file.set_len(shard.file_bytes())
                .and_then(|()| file.write_all_at(&shard.header, 0))
                .map_err(FormatError::io("write", &path))?;
            files.push(file);
        }
        if let Some(index) = plan.index() {
            write_atomic(&directory.join(INDEX_NAME), format!("{index:#}\n").as_bytes())?;
        }
        let progress = plan.shards.iter().map(|s| vec![0; s.tensors.len()]).collect();
        Ok(Self { directory: directory.to_owned(), plan, files, progress })
    }

    /// Opens the files that an interrupted run created by the same plan; `written` are the tensors that are whole.
    ///
    /// # Errors
    /// If a file is missing, has another size or header than planned, or a name is not planned.
    pub fn reopen<'a>(
        directory: &Path,
        plan: ShardPlan,
        written: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self> {
        let mut files = Vec::with_capacity(plan.shards.len());
        for shard in &plan.shards {
            let path = directory.join(&shard.name);
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(FormatError::io("open", &path))?;
            let differs = |reason: &str| FormatError::Safetensors {
                path: path.clone(),
                reason: format!("{reason} than this run plans; start afresh"),
            };
            let meta = file.metadata().map_err(FormatError::io("read", &path))?;
            if meta.len() != shard.file_bytes() {
                return Err(differs("it has another size"));
            }
            let mut header = vec![0; shard.header.len()];
            file.read_exact_at(&mut header, 0).map_err(FormatError::io("read", &path))?;
            if header != shard.header {
                return Err(differs("it has another header"));
            }
            files.push(file);
        }
        let progress = plan.shards.iter().map(|s| vec![0; s.tensors.len()]).collect();
        let mut writer = Self { directory: directory.to_owned(), plan, files, progress };
        for name in written {
            let (shard, position) = writer.place(name)?;
            writer.progress[shard][position] = writer.plan.shards[shard].tensors[position].bytes;
        }
        Ok(writer)
    }

    /// Writes a whole tensor, row-major and little-endian.
    ///
    /// # Errors
    /// If it is not planned, was begun before, has another size, or the file cannot be written.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (shard, position) = self.place(name)?;
        let planned = self.plan.shards[shard].tensors[position].bytes;
        if bytes.len() as u64 != planned {
            return Err(write_error(
                name,
                &format!("it has {} bytes, but {planned} are planned", bytes.len()),
            ));
        }
        self.write_part(name, 0, bytes)
    }

    /// Writes the part of a tensor that starts at byte `offset`; parts follow each other from 0 to the end.
    ///
    /// # Errors
    /// If it is not planned, `offset` is not where the last part ended, it would become too long, or the file cannot be
    /// written.
    pub fn write_part(&mut self, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let (index, position) = self.place(name)?;
        let shard = &self.plan.shards[index];
        let tensor = &shard.tensors[position];
        let done = &mut self.progress[index][position];
        if offset != *done || (*done == tensor.bytes && tensor.bytes > 0) {
            let reason = if *done == tensor.bytes {
                "it is written already".to_owned()
            } else {
                format!("the part starts at byte {offset}, expected {done}")
            };
            return Err(write_error(name, &reason));
        }
        let end = offset + bytes.len() as u64;
        if end > tensor.bytes {
            let reason = format!("the part ends at byte {end} of {}", tensor.bytes);
            return Err(write_error(name, &reason));
        }
        let at = shard.header.len() as u64 + tensor.offset + offset;
        self.files[index]
            .write_all_at(bytes, at)
            .map_err(FormatError::io("write", &self.directory.join(&shard.name)))?;
        *done = end;
        Ok(())
    }

    /// Writes a whole tensor that may have been written before.
    ///
    /// # Errors
    /// If it is not planned, has another size, or the file cannot be written.
    pub fn replace(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.restart(name)?;
        self.write(name, bytes)
    }

    /// Takes a tensor as not written, so that it can be written again.
    ///
    /// # Errors
    /// If it is not planned.
    pub fn restart(&mut self, name: &str) -> Result<()> {
        let (shard, position) = self.place(name)?;
        self.progress[shard][position] = 0;
        Ok(())
    }

    /// Bytes of the tensors that are still to be written.
    pub fn bytes_left(&self) -> u64 {
        self.plan.total_bytes() - self.progress.iter().flatten().sum::<u64>()
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// If a file cannot be synced.
    pub fn sync(&self) -> Result<()> {
        for (file, shard) in self.files.iter().zip(&self.plan.shards) {
            file.sync_data().map_err(FormatError::io("sync", &self.directory.join(&shard.name)))?;
        }
        Ok(())
    }

    /// Checks that every tensor is whole, makes all durable. Returns all paths.
    ///
    /// # Errors
    /// If a tensor is missing or incomplete, or a file cannot be synced or written.
    pub fn finish(self) -> Result<Vec<PathBuf>> {
        for (shard, progress) in self.plan.shards.iter().zip(&self.progress) {
            for (tensor, &done) in shard.tensors.iter().zip(progress) {
                if done != tensor.bytes {
                    let reason = format!("{done} of {} bytes were written", tensor.bytes);
                    return Err(write_error(&tensor.spec.name, &reason));
                }
            }
        }
        for (file, shard) in self.files.iter().zip(&self.plan.shards) {
            file.sync_all().map_err(FormatError::io("sync", &self.directory.join(&shard.name)))?;
        }
        let mut paths: Vec<PathBuf> =
            self.plan.files().map(|(name, _)| self.directory.join(name)).collect();
        if self.plan.index().is_some() {
            paths.push(self.directory.join(INDEX_NAME));
        }
        sync_directory(&self.directory)?;
        Ok(paths)
    }

    fn place(&self, name: &str) -> Result<(usize, usize)> {
        self.plan.places.get(name).copied().ok_or_else(|| write_error(name, "it is not planned"))
    }
}

fn write_error(tensor: &str, reason: &str) -> FormatError {
    FormatError::ShardWrite { tensor: tensor.to_owned(), reason: reason.to_owned() }
}
