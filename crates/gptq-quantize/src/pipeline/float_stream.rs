//! The inputs of the float model's stages on disk, for runs that differ only in how they quantize: the first that is
//! corrected keeps them, the others need not compute the float model.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use gptq_compute::Tensor;
use gptq_format::FormatError;
use gptq_format::fs::require_space;
use gptq_model::{ActivationType, BlockState, Spec};

use super::native::is_corrected;
use super::{Job, QuantizeOptions};
use crate::error::Result;
use crate::solver::Correction;

/// Its name until it is made.
const NAME: &str = "float-stream.scratch";

/// Layer, place of the stage in the order of the block, and chunk.
pub(super) type Place = (usize, usize, usize);

/// What [`super::Job::float_stream`] lends to the runs of one model on one calibration.
#[derive(Debug)]
pub struct FloatStream {
    directory: PathBuf,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Of the first run that took it, on which the inputs depend.
    settings: Option<String>,
    /// Without a name, so that its space is free again however the process ends.
    file: Option<File>,
    /// Where in the file inputs begin.
    starts: HashMap<Place, u64>,
    end: u64,
    /// Inputs in all.
    whole: usize,
    /// They could not be written: nobody uses it any more.
    failed: bool,
}

/// What a run does with a [`FloatStream`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// All inputs are there.
    Read,
    /// It keeps those that it computes.
    Write,
    /// Other settings, or no room for it.
    Nothing,
}

impl FloatStream {
    /// Nothing yet, to be kept in a file in `directory`.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), kept: Mutex::default() }
    }

    /// What decides on the inputs beside model and calibration; `None` where runs have no use for it: without a
    /// correction, and where the stream itself is needed, too, as without true-sequential order or with a quantized head.
    pub fn settings(options: &QuantizeOptions) -> Option<String> {
        let needed = options.correction != Correction::None;
        (needed && options.true_sequential && !options.lm_head)
            .then(|| format!("{} {}", options.activations.name(), options.activation_dtype.name()))
    }

    /// What a run of `job` with `chunks` chunks of `tokens` tokens in all does with it. The experts of a mixture are
    /// compared on the tokens that the quantized router sends to them.
    pub(super) fn use_of(&self, job: &Job<'_>, spec: &Spec, chunks: usize, tokens: usize) -> Use {
        let settings = Self::settings(job.options).filter(|_| spec.moe.is_none());
        let (Some(settings), Some(set)) = (settings, job.calibration) else { return Use::Nothing };
        let settings = format!("{settings} {} {}", set.report.seqlen, set.report.fingerprint);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.failed {
            return Use::Nothing;
        }
        if kept.settings.is_none() {
            let stages = (0..spec.layer_count()).flat_map(|layer| spec.stages(layer));
            let widths = stages.filter(|stage| is_corrected(stage.stage));
            let widths = widths.filter_map(|stage| stage.linears.first().map(|l| l.in_features));
            let (count, width) =
                widths.fold((0, 0), |(count, sum), width| (count + 1, sum + width));
            kept.whole = count * chunks;
            let bytes = (width * tokens * size_of::<f32>()) as u64;
            // The run has to write its result, and perhaps its activations, beside it.
            let beside = bytes / 8 + job.checkpoint.tensors.total_bytes();
            if let Err(error) = require_space(&self.directory, bytes + beside) {
                tracing::info!("the float model is computed for each run: {error}");
                return Use::Nothing;
            }
            kept.settings = Some(settings.clone());
        }
        if kept.settings.as_ref() != Some(&settings) {
            return Use::Nothing;
        }
        if kept.starts.len() == kept.whole { Use::Read } else { Use::Write }
    }

    /// Keeps the inputs of a stage. Where the disk has no room any more, they are not.
    pub(super) fn put(&self, place: Place, input: &mut Tensor) {
        let kept = &mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.failed || kept.starts.contains_key(&place) {
            return;
        }
        let mut state = BlockState::default();
        std::mem::swap(&mut state.input, input);
        let written = self.write(kept, &state);
        std::mem::swap(&mut state.input, input);
        match written {
            Ok(end) => {
                kept.starts.insert(place, kept.end);
                kept.end = end;
            }
            Err(error) => {
                let path = self.directory.join(NAME);
                tracing::warn!("{}: {error}; the float model is computed again", path.display());
                *kept = Kept { failed: true, ..Kept::default() };
            }
        }
    }

    fn write(&self, kept: &mut Kept, state: &BlockState) -> io::Result<u64> {
        if kept.file.is_none() {
            let path = self.directory.join(NAME);
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create(true).truncate(true).open(&path)?;
            std::fs::remove_file(&path)?;
            kept.file = Some(file);
        }
        let Some(file) = &mut kept.file else { return Ok(0) };
        file.seek(SeekFrom::Start(kept.end))?;
        state.save(file, ActivationType::F32)?;
        file.stream_position()
    }

    /// The inputs of a stage, into `state`.
    pub(super) fn get(&self, place: Place, state: &mut BlockState) -> Result<()> {
        let kept = &mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let mut read = || {
            let start = kept.starts.get(&place).ok_or_else(missing)?;
            let file = kept.file.as_mut().ok_or_else(missing)?;
            file.seek(SeekFrom::Start(*start))?;
            state.restore(file, ActivationType::F32)
        };
        Ok(read().map_err(FormatError::io("read", &self.directory.join(NAME)))?)
    }
}
