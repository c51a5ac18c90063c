//! The journal of a run: what it works on and how far it is, so that an interrupted run can go on.
//!
//! A block is entered only when its tensors are durable. On resume everything but the finished
//! blocks is computed again: the activations by running the calibration windows through the
//! finished blocks as they are saved, which gives the very numbers that the interrupted run had.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use gptq_format::fs::{read_json_if_exists, write_atomic};
use gptq_format::{Checkpoint, FormatError};
use gptq_model::Spec;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Job;
use crate::error::{QuantizeError, Result};
use crate::report::{ModuleRecord, TuningRecord};

const NAME: &str = "journal.json";

/// What is known of a run in an unfinished directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Journal {
    /// Everything that decides the bytes of the output, by name.
    fingerprint: Map<String, Value>,
    /// Blocks that are durable; the head counts as one more.
    pub(crate) blocks_done: usize,
    /// Their modules.
    pub(crate) records: Vec<ModuleRecord>,
    /// How they were tuned.
    #[serde(default)]
    pub(crate) tuning: Vec<TuningRecord>,
}

impl Journal {
    pub(crate) fn new(job: &Job<'_>) -> Result<Self> {
        Ok(Self {
            fingerprint: fingerprint(job)?,
            blocks_done: 0,
            records: Vec::new(),
            tuning: Vec::new(),
        })
    }

    /// The journal in `directory`, if there is one and it belongs to this job.
    pub(crate) fn read(directory: &Path, job: &Job<'_>) -> Result<Option<Self>> {
        let path = directory.join(NAME);
        let Some(value) = read_json_if_exists(&path)? else { return Ok(None) };
        let (now, empty) = (fingerprint(job)?, Map::new());
        // First: the journal of another version may hold other things.
        let before = value["fingerprint"].as_object().unwrap_or(&empty);
        for field in before.keys().chain(now.keys()) {
            let of =
                |map: &Map<String, Value>| map.get(field).map_or("none".into(), Value::to_string);
            let (then, now) = (of(before), of(&now));
            if then != now {
                let (path, field) = (directory.to_owned(), field.clone());
                return Err(QuantizeError::ResumeDiffers { path, field, then, now });
            }
        }
        let journal = serde_json::from_value(value);
        Ok(Some(journal.map_err(|error| FormatError::io("understand", &path)(error.into()))?))
    }

    /// The journal with all blocks up to `layer` finished.
    pub(crate) fn with_block(
        &self,
        layer: usize,
        records: &[ModuleRecord],
        tuning: &[TuningRecord],
    ) -> Self {
        let fingerprint = self.fingerprint.clone();
        let (records, tuning) = (records.to_vec(), tuning.to_vec());
        Self { fingerprint, blocks_done: layer + 1, records, tuning }
    }

    pub(crate) fn write(&self, directory: &Path) -> Result<()> {
        Ok(write_atomic(&directory.join(NAME), json!(self).to_string().as_bytes())?)
    }

    pub(crate) fn remove(directory: &Path) -> Result<()> {
        let path = directory.join(NAME);
        Ok(std::fs::remove_file(&path).map_err(FormatError::io("remove", &path))?)
    }
}

/// Raised with kernels that round otherwise than those before, or add up in another order.
const NUMERICS: u32 = 2;

/// What results depend on besides settings and calibration, by name: this program, its kernels, and the model as its files
/// and its family describe it.
///
/// # Errors
/// If a file of the model cannot be read or its architecture is not supported.
pub fn model_fingerprint(checkpoint: &Checkpoint) -> Result<Map<String, Value>> {
    let mut config = DefaultHasher::new();
    config.write(json!(checkpoint.config.map()).to_string().as_bytes());
    // What it means, by a table of families that may be the user's own.
    config.write(format!("{:?}", Spec::for_checkpoint(checkpoint)?).as_bytes());
    Ok(Map::from_iter([
        ("gptq-rs version".to_owned(), json!(env!("CARGO_PKG_VERSION"))),
        ("numerics".to_owned(), json!(NUMERICS)),
        ("model files".to_owned(), model_files(checkpoint)?),
        ("model config".to_owned(), json!(format!("{:016x}", config.finish()))),
    ]))
}

/// Everything that decides the bytes of the output.
fn fingerprint(job: &Job<'_>) -> Result<Map<String, Value>> {
    let options = job.options;
    let mut map = model_fingerprint(job.checkpoint)?;
    let mut set = |key: &str, value: Value| map.insert(key.to_owned(), value);
    // Sums are rounded differently by different instruction sets.
    set("instruction set", json!(format!("{:?}", gptq_compute::arch::isa())));
    set("method", json!(options.method.name()));
    if let Value::Object(config) = options.config().to_json() {
        for (key, value) in config {
            set(&key, value);
        }
    }
    // Of rules that name the same module the first counts.
    set("dynamic", json!(json!(options.dynamic.source()).to_string()));
    set("tune_blocks", json!(options.tune_blocks));
    // The checkpoint says it of symmetric runs; single modules may be symmetric in others.
    set("signed_scales", json!(options.signed_scales));
    set("damp_auto", json!(options.damp_auto));
    set("damp_auto_increment", json!(options.damp_auto_increment));
    set("moe_fallback", json!(format!("{:?}", options.moe_fallback)));
    set("token_weights", json!(options.token_weights.name()));
    set("activations", json!(options.activations.name()));
    set("activation_dtype", json!(options.activation_dtype.name()));
    set("correction", json!(options.correction.name()));
    set("correction_strength", json!(options.correction_share()));
    set("max_shard_size", json!(options.max_shard_bytes));
    let calibration = job.calibration.filter(|_| options.method.needs_calibration());
    set("calibration", json!(calibration.map(|c| c.report.fingerprint.clone())));
    // Windows go through a block in chunks, of which this decides the size.
    set("seqlen", json!(calibration.map(|c| c.report.seqlen)));
    Ok(map)
}

/// Name, size and time of every file that holds tensors.
fn model_files(checkpoint: &Checkpoint) -> Result<Value> {
    let tensors = &checkpoint.tensors;
    let mut files: BTreeSet<PathBuf> = BTreeSet::new();
    let mut names = DefaultHasher::new();
    for name in tensors.names() {
        let info = tensors.info(name)?;
        names.write(format!("{name} {} {:?}", info.dtype, info.shape).as_bytes());
        files.insert(info.file.clone());
    }
    let mut parts = vec![format!("{:016x}", names.finish())];
    for file in files {
        let meta = std::fs::metadata(&file).map_err(FormatError::io("read", &file))?;
        let time = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        let name = file.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        parts.push(format!("{name} {} {}", meta.len(), time.map_or(0, |t| t.as_nanos())));
    }
    Ok(json!(parts.join("; ")))
}
