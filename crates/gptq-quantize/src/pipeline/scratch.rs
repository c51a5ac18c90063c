//! The calibration activations on disk, for runs whose memory is limited.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use gptq_format::FormatError;
use gptq_model::{ActivationType, BlockState};

use crate::error::{QuantizeError, Result};

/// Its name in the unfinished output directory.
const NAME: &str = "activations.scratch";

/// A file with one slot for the state of each chunk.
pub(crate) struct Scratch {
    file: File,
    path: PathBuf,
    /// Bytes of a slot.
    slot: u64,
    kind: ActivationType,
}

impl Scratch {
    /// Makes the file in `directory`, with slots of `slot` bytes. It loses its name at once, so that
    /// its space is free again however the process ends.
    pub(crate) fn create(directory: &Path, slot: usize, kind: ActivationType) -> Result<Self> {
        let path = directory.join(NAME);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(FormatError::io("create", &path))?;
        std::fs::remove_file(&path).map_err(FormatError::io("remove", &path))?;
        Ok(Self { file, path, slot: slot as u64, kind })
    }

    /// Another file like this one.
    pub(crate) fn another(&self, directory: &Path) -> Result<Self> {
        Self::create(directory, self.slot as usize, self.kind)
    }

    /// Deletes what a process left that was killed before the file had lost its name.
    pub(crate) fn remove_left_over(directory: &Path) -> Result<()> {
        let path = directory.join(NAME);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(FormatError::io("remove", &path)(error).into())
            }
            _ => Ok(()),
        }
    }

    /// Replaces the state of chunk `index`.
    pub(crate) fn store(&self, index: usize, state: &BlockState) -> Result<()> {
        let mut file = &self.file;
        let mut write = || {
            file.seek(SeekFrom::Start(index as u64 * self.slot))?;
            state.save(&mut file, self.kind)
        };
        write().map_err(|error| not_kept(error, &self.path))
    }

    /// The state of chunk `index`, into `state`.
    pub(crate) fn load(&self, index: usize, state: &mut BlockState) -> Result<()> {
        let mut file = &self.file;
        let mut read = || {
            file.seek(SeekFrom::Start(index as u64 * self.slot))?;
            state.restore(&mut file, self.kind)
        };
        Ok(read().map_err(FormatError::io("read", &self.path))?)
    }
}

/// Why a state could not be kept: it does not fit the type, or writing to `path` failed.
pub(crate) fn not_kept(error: std::io::Error, path: &Path) -> QuantizeError {
    if error.kind() == std::io::ErrorKind::InvalidData {
        let reason = format!("{error}; use --activation-dtype f32");
        return QuantizeError::Option { option: "activation-dtype", reason };
    }
    FormatError::io("write", path)(error).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use gptq_compute::Tensor;

    #[test]
    fn states_come_back_and_no_name_stays() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(NAME), "left by a killed run").unwrap();
        Scratch::remove_left_over(folder.path()).unwrap();
        Scratch::remove_left_over(folder.path()).unwrap();
        let scratch = Scratch::create(folder.path(), 4096, ActivationType::F32).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let state = |x: f32| BlockState::new(Tensor::from_vec(2, 3, vec![x; 6]));
        for index in [2, 0, 1, 0] {
            scratch.store(index, &state(index as f32)).unwrap();
        }
        let mut back = BlockState::default();
        for index in [1, 2, 0] {
            scratch.load(index, &mut back).unwrap();
            assert_eq!(back.hidden.as_slice(), [index as f32; 6]);
        }
        assert!(scratch.load(3, &mut back).is_err(), "never stored");
    }
}
