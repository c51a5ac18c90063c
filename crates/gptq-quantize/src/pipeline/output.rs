//! The output directory while it is being written.

use std::path::Path;

use gptq_format::fs::write_atomic;
use gptq_format::{
    Checkpoint, CheckpointKind, DType, FormatError, GptqLinear, OutputDir, ShardWriter,
    copy_custom_code, copy_sentence_files,
};
use gptq_model::Spec;
use half::{bf16, f16};
use serde_json::{Map, Value, json};

use super::Job;
use super::journal::Journal;
use super::layout::{Copied, Layout};
use super::scratch::Scratch;
use crate::error::Result;
use crate::model_card::{CardDetails, Task, license_of_card, model_card};
use crate::report::{ModuleRecord, QuantReport, TuningRecord};

/// Bytes that are converted at a time when a tensor is copied.
const COPY_BYTES: usize = 1 << 20;

/// A directory that becomes a checkpoint.
pub(crate) struct Output {
    directory: OutputDir,
    writer: ShardWriter,
    journal: Journal,
    /// The directory opened as the checkpoint it is becoming: floats read from it are those that
    /// are saved.
    checkpoint: Checkpoint,
}

impl Output {
    /// Creates the directory with configs, tokenizer and all tensors that are not quantized, or
    /// opens the one that an interrupted run of the same job left behind.
    pub(crate) fn open(job: &Job<'_>, layout: &Layout) -> Result<Self> {
        if job.options.resume {
            let directory = OutputDir::resume(job.output, job.options.overwrite)?;
            match Journal::read(directory.path(), job) {
                Ok(Some(journal)) => return Self::resume(directory, journal, layout),
                Ok(None) => {}
                Err(error) => {
                    // The work in there belongs to another command line.
                    let mut directory = directory;
                    directory.keep();
                    return Err(error);
                }
            }
        }
        Self::create(job, layout)
    }

    fn create(job: &Job<'_>, layout: &Layout) -> Result<Self> {
        let directory = OutputDir::create(job.output, job.options.overwrite)?;
        let path = directory.path().to_owned();
        write_json(&path.join("config.json"), &config(job, layout))?;
        write_json(&path.join("quantize_config.json"), &layout.config.to_json())?;
        if let Some(generation) = &job.checkpoint.generation_config {
            write_json(&path.join("generation_config.json"), generation)?;
        }
        if let Some(tokenizer) = job.tokenizer {
            tokenizer.save(&path).map_err(FormatError::from)?;
        }
        if let CheckpointKind::HuggingFace = job.checkpoint.kind {
            copy_sentence_files(&job.checkpoint.path, &path)?;
            copy_custom_code(job.checkpoint.config.map(), &job.checkpoint.path, &path)?;
        }
        let mut writer = ShardWriter::create(&path, layout.plan.clone())?;
        for tensor in &layout.copied {
            copy(job.checkpoint, tensor, &mut writer)?;
        }
        let checkpoint = Checkpoint::open(&path)?;
        writer.sync()?;
        let journal = Journal::new(job)?;
        journal.write(&path)?;
        Ok(Self { directory, writer, journal, checkpoint })
    }

    fn resume(mut directory: OutputDir, journal: Journal, layout: &Layout) -> Result<Self> {
        directory.keep();
        let path = directory.path();
        Scratch::remove_left_over(path)?;
        let copied = layout.copied.iter().map(|c| c.name.clone());
        let solved =
            layout.plan.tensors().map(|t| t.name.clone()).filter(|name| {
                layout.layer_of(name).is_some_and(|layer| layer < journal.blocks_done)
            });
        let written: Vec<String> = copied.chain(solved).collect();
        let names = written.iter().map(String::as_str);
        let writer = ShardWriter::reopen(path, layout.plan.clone(), names)?;
        let checkpoint = Checkpoint::open(path)?;
        Ok(Self { directory, writer, journal, checkpoint })
    }

    /// Leaves the unfinished directory in place for a later `--resume`.
    pub(crate) fn keep(&mut self) {
        self.directory.keep();
    }

    /// Refuses to go on where the disk has no room for the tensors that are left and `more` bytes beside them.
    pub(crate) fn require_space(&self, more: u64) -> Result<()> {
        Ok(gptq_format::fs::require_space(self.directory(), self.writer.bytes_left() + more)?)
    }

    /// The unfinished directory.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Blocks that were finished before this run; the head counts as one more.
    pub(crate) fn blocks_done(&self) -> usize {
        self.journal.blocks_done
    }

    /// The modules of the finished blocks.
    pub(crate) fn records(&self) -> Vec<ModuleRecord> {
        self.journal.records.clone()
    }

    /// How the finished blocks were tuned.
    pub(crate) fn tuning(&self) -> Vec<TuningRecord> {
        self.journal.tuning.clone()
    }

    /// The model as it is saved so far.
    pub(crate) fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Writes the tensors of a quantized module.
    pub(crate) fn write_linear(
        &mut self,
        module: &str,
        linear: &GptqLinear,
        layout: &Layout,
    ) -> Result<()> {
        for (spec, bytes) in linear.encode(module, layout.config.format)? {
            self.writer.write(&spec.name, &bytes)?;
        }
        Ok(())
    }

    /// Writes a tensor anew.
    pub(crate) fn replace(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        Ok(self.writer.replace(name, bytes)?)
    }

    /// Copies a tensor of the model once more.
    pub(crate) fn copy_again(&mut self, model: &Checkpoint, tensor: &Copied) -> Result<()> {
        self.writer.restart(&tensor.name)?;
        copy(model, tensor, &mut self.writer)
    }

    /// Makes a finished block durable: its tensors first, then the journal that counts it.
    pub(crate) fn block_done(
        &mut self,
        layer: usize,
        records: &[ModuleRecord],
        tuning: &[TuningRecord],
    ) -> Result<()> {
        self.writer.sync()?;
        let journal = self.journal.with_block(layer, records, tuning);
        journal.write(self.directory.path())?;
        self.journal = journal;
        Ok(())
    }

    /// Writes the reports and gives the directory its name.
    pub(crate) fn commit(mut self, job: &Job<'_>, report: &QuantReport) -> Result<()> {
        // All blocks are in there: nothing that fails from now on may delete them.
        self.keep();
        let path = self.directory.path().to_owned();
        let mut log = String::new();
        for record in &report.modules {
            log.push_str(&json!(record).to_string());
            log.push('\n');
        }
        write_atomic(&path.join("quant_log.jsonl"), log.as_bytes())?;
        write_json(&path.join("quant_report.json"), &json!(report))?;
        if let Some(plots) = job.plots {
            let directory = path.join("plots");
            std::fs::create_dir_all(&directory).map_err(FormatError::io("create", &directory))?;
            for (name, svg) in plots(&report.modules) {
                write_atomic(&directory.join(name), svg.as_bytes())?;
            }
        }
        let name = job.output.file_name().map_or("model".into(), |n| n.to_string_lossy());
        let base_card = std::fs::read_to_string(job.checkpoint.path.join("README.md")).ok();
        let license = base_card.as_deref().and_then(license_of_card);
        // Without the revision, which is no part of the id.
        let id = job.model.split_once('@').map_or(job.model, |(id, _)| id);
        let is_hub_id = !Path::new(job.model).exists() && id.split('/').count() == 2;
        let causal = Spec::for_checkpoint(job.checkpoint)?.attention.causal;
        let named = job.checkpoint.config.map().get("architectures");
        let architecture = named.and_then(|names| names.get(0)?.as_str()).unwrap_or_default();
        let details = CardDetails {
            name: &name,
            task: Task::new(causal, architecture),
            base_model: is_hub_id.then_some(id),
            license: license.as_deref(),
            results: &[],
        };
        write_atomic(&path.join("README.md"), model_card(report, &details).as_bytes())?;
        self.writer.finish()?;
        // The files are mapped: close them before they move.
        drop(self.checkpoint);
        // Until the directory has its name, the journal is what makes it worth resuming.
        Journal::remove(&self.directory.commit()?)
    }
}

/// config.json of the output: the model's, with the settings of the quantization.
fn config(job: &Job<'_>, layout: &Layout) -> Value {
    let mut config: Map<String, Value> = job.checkpoint.config.map().clone();
    let dtype = layout.float_type();
    if config.contains_key("dtype") {
        config.insert("dtype".into(), json!(dtype));
    }
    config.insert("torch_dtype".into(), json!(dtype));
    config.insert("quantization_config".into(), layout.config.to_json());
    Value::Object(config)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    Ok(write_atomic(path, format!("{value:#}\n").as_bytes())?)
}

/// Copies a tensor piece by piece, narrowing its floats where the output has a narrower type.
fn copy(checkpoint: &Checkpoint, tensor: &Copied, writer: &mut ShardWriter) -> Result<()> {
    let store = &checkpoint.tensors;
    let info = store.info(&tensor.name)?;
    if info.dtype == tensor.dtype && store.is_identity(&tensor.name) {
        store.check_finite(&tensor.name)?;
        let mut piece = vec![0u8; COPY_BYTES.min(info.bytes)];
        let mut at = 0;
        while at < info.bytes {
            let len = piece.len().min(info.bytes - at);
            store.copy_bytes(&tensor.name, at, &mut piece[..len])?;
            writer.write_part(&tensor.name, at as u64, &piece[..len])?;
            at += len;
        }
        if info.bytes == 0 {
            writer.write(&tensor.name, &[])?;
        }
        return Ok(());
    }
    let &[rows, cols] = tensor.shape.as_slice() else {
        let floats = store.read_f32(&tensor.name, &tensor.shape)?;
        return Ok(writer.write(&tensor.name, &narrow(tensor, &floats)?)?);
    };
    let step = (COPY_BYTES / cols.max(1)).max(1);
    let mut floats = vec![0.0; step.min(rows) * cols];
    for row in (0..rows).step_by(step) {
        let len = step.min(rows - row);
        store.read_rows_f32(&tensor.name, row..row + len, &mut floats[..len * cols])?;
        let bytes = narrow(tensor, &floats[..len * cols])?;
        writer.write_part(&tensor.name, (row * cols * tensor.dtype.unit().1) as u64, &bytes)?;
    }
    Ok(())
}

fn narrow(tensor: &Copied, floats: &[f32]) -> Result<Vec<u8>> {
    if let Some(index) = floats.iter().position(|x| x.is_finite() && !f16::from_f32(*x).is_finite())
    {
        return Err(crate::QuantizeError::Option {
            option: "dtype",
            reason: format!(
                "{}: value {} does not fit float16; store the model as bfloat16 first",
                tensor.name, floats[index]
            ),
        });
    }
    Ok(halves(tensor.dtype, floats))
}

/// Floats as the output stores them: bfloat16 where that is their type, else f16.
pub(super) fn halves(dtype: DType, floats: &[f32]) -> Vec<u8> {
    match dtype {
        DType::BF16 => floats.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => floats.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
    }
}
