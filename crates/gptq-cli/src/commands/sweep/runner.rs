//! Runs the rows: calibration once for all that share it, then each row by the functions of `gptq
//! quantize` and `gptq eval`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use gptq_compute::Pool;
use gptq_compute::arch::isa;
use gptq_format::{Checkpoint, Tokenizer};
use gptq_quantize::pipeline::{
    FloatStream, Job, MixedReport, Sensitivity, apply_target, check_target, sensitivity,
};
use gptq_quantize::{
    CalibrationReport, CalibrationSet, ModuleRecord, QuantReport, QuantizeError, QuantizeOptions,
    plan, quantize_as_planned,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::super::{calibration, progress, quantize};
use super::rows::Row;
use super::store::Store;
use super::texts::{EvalSettings, TextResult, Texts};
use crate::Global;
use crate::output::progress::{LogWriter, ProgressView};
use crate::output::size;

/// The result of a row, and what its file holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct RowResult {
    pub(super) name: String,
    /// What rows that differ in size alone have in common.
    pub(super) series: String,
    /// What makes the same checkpoint.
    pub(super) command: String,
    pub(super) settings: Map<String, Value>,
    pub(super) method: String,
    pub(super) bits_per_weight: f64,
    pub(super) output_bytes: u64,
    /// Wall time of the quantization.
    pub(super) seconds: f64,
    /// Where that was: platform and instruction set, on which the last digits depend.
    pub(super) machine: String,
    pub(super) warnings: Vec<String>,
    /// Where the checkpoint is, if it was kept.
    pub(super) checkpoint: Option<PathBuf>,
    pub(super) evaluations: Vec<TextResult>,
    pub(super) calibration: Option<CalibrationReport>,
    pub(super) mixed_precision: Option<MixedReport>,
    pub(super) modules: Vec<ModuleRecord>,
}

/// The results of a sweep.
#[derive(Debug, Serialize)]
pub(super) struct Results {
    pub(super) gptq_version: &'static str,
    pub(super) platform: String,
    pub(super) model: String,
    /// Bytes of the original's tensors.
    pub(super) input_bytes: u64,
    /// What the original has.
    pub(super) original: Vec<TextResult>,
    /// Those that are finished.
    pub(super) rows: Vec<RowResult>,
    pub(super) failed: Vec<FailedRow>,
    /// Wall time of this call; finished rows that were found cost none.
    pub(super) seconds: f64,
}

/// A row that could not be run.
#[derive(Debug, Serialize)]
pub(super) struct FailedRow {
    pub(super) name: String,
    pub(super) command: String,
    pub(super) error: String,
}

/// What a row would need.
#[derive(Debug, Serialize)]
pub(super) struct PlannedRow {
    pub(super) name: String,
    pub(super) command: String,
    /// `null` where the bits are chosen from measurements.
    pub(super) bits_per_weight: Option<f64>,
    pub(super) plan: gptq_quantize::report::PlanSummary,
    /// It is finished and will not run again.
    pub(super) done: bool,
}

/// All rows of a sweep.
#[derive(Debug, Serialize)]
pub(super) struct Planned {
    pub(super) model: String,
    pub(super) rows: Vec<PlannedRow>,
}

/// What rows are run with.
pub(super) struct Runner<'a> {
    model: &'a str,
    checkpoint: &'a Checkpoint,
    pool: &'a Arc<Pool>,
    store: &'a Store,
    global: &'a Global,
    keep: bool,
    /// Windows that were made, and what they were asked for by; the last are those of the row.
    calibration: Vec<(calibration::Request, CalibrationSet, FloatStream)>,
    /// Whether other rows need what the float model computes on these, too.
    sharing: bool,
    /// What bits are chosen from, and the request and the options that it was measured with.
    sensitivities: Vec<(String, Sensitivity)>,
}

impl<'a> Runner<'a> {
    pub(super) fn new(
        model: &'a str,
        checkpoint: &'a Checkpoint,
        pool: &'a Arc<Pool>,
        store: &'a Store,
        global: &'a Global,
        keep: bool,
    ) -> Self {
        Self {
            model,
            checkpoint,
            pool,
            store,
            global,
            keep,
            calibration: Vec::new(),
            sharing: false,
            sensitivities: Vec::new(),
        }
    }

    /// What the rows would need.
    ///
    /// # Errors
    /// As [`Runner::run`], as far as headers and options tell.
    pub(super) fn plan(&mut self, rows: &[Row]) -> anyhow::Result<Planned> {
        let tokenizer = self.checkpoint.tokenizer();
        let view = ProgressView::new(true, false);
        let mut planned = Vec::with_capacity(rows.len());
        for row in rows {
            let options = row.args.options()?;
            self.calibrate(row, &options, tokenizer.as_ref().ok(), true, &view)?;
            let job = self.job(&options, tokenizer.as_ref().ok(), Path::new("row"));
            let plan = plan(&job).with_context(|| format!("row {}", row.name))?;
            let id = self.store.result_id(&self.store.checkpoint_id(row)?);
            planned.push(PlannedRow {
                name: row.name.clone(),
                command: self.command(row),
                bits_per_weight: row.args.target_bpw.is_none().then_some(plan.bits_per_weight),
                plan: plan.summary,
                done: self.store.read::<RowResult>(&id).is_some(),
            });
        }
        Ok(Planned { model: self.model.to_owned(), rows: planned })
    }

    /// Refuses what cannot be, before hours of work.
    ///
    /// # Errors
    /// The message names the row.
    pub(super) fn check(rows: &[Row]) -> anyhow::Result<()> {
        for row in rows {
            let options = row.args.options()?;
            options.check().with_context(|| format!("row {}", row.name))?;
        }
        Ok(())
    }

    /// The same of sizes that bits cannot be chosen for, which depends on the model.
    ///
    /// # Errors
    /// The message names the row.
    pub(super) fn check_targets(rows: &[Row], checkpoint: &Checkpoint) -> anyhow::Result<()> {
        for row in rows {
            if let Some(target) = row.args.target_bpw {
                check_target(checkpoint, &row.args.options()?, target)
                    .with_context(|| format!("row {}", row.name))?;
            }
        }
        Ok(())
    }

    /// Runs the rows that are not finished. A row that fails is left behind; with what is finished comes why the
    /// others are not.
    ///
    /// # Errors
    /// What concerns all rows: the texts, the original, the directory.
    pub(super) fn run(
        &mut self,
        rows: &[Row],
        paths: &[PathBuf],
        settings: &EvalSettings,
    ) -> anyhow::Result<(Results, anyhow::Result<()>)> {
        let start = Instant::now();
        let ids: Vec<String> =
            rows.iter().map(|row| self.store.checkpoint_id(row)).collect::<Result<_, _>>()?;
        let mut found: Vec<Option<RowResult>> =
            ids.iter().map(|id| self.store.read(&self.store.result_id(id))).collect();
        let original_id = self.store.result_id("");
        let mut original: Option<Vec<TextResult>> = self.store.read(&original_id);
        let mut texts = None;
        if !paths.is_empty() && (original.is_none() || found.iter().any(Option::is_none)) {
            let view = progress(self.global);
            let made = Texts::new(self.checkpoint, self.pool, paths, settings, &view)?;
            // The figures are the same; the times are those of the first run.
            if original.is_none() {
                self.store.write("original", &original_id, &made.original)?;
                original = Some(made.original.clone());
            }
            texts = Some(made);
        }
        // What the pending rows need of the float model.
        let streams: Vec<Option<(calibration::Request, String)>> = rows
            .iter()
            .zip(&found)
            .map(|(row, found)| found.is_none().then(|| self.float_inputs(row)).flatten())
            .collect();
        let mut clock = Clock::default();
        let (mut failed, mut end) = (Vec::new(), Ok(()));
        for (index, row) in rows.iter().enumerate() {
            let id = &ids[index];
            if found[index].is_none() && ids[..index].contains(id) {
                // The same by another name.
                found[index] = self.store.read(&self.store.result_id(id));
            }
            if let Some(result) = &mut found[index] {
                self.rename(row, id, result);
                continue;
            }
            let left: Vec<&Row> = rows
                .iter()
                .zip(&found)
                .skip(index)
                .filter(|(_, r)| r.is_none())
                .map(|(r, _)| r)
                .collect();
            if !self.global.quiet {
                clock.announce(index, rows.len(), row, &left);
            }
            let stream = streams[index].as_ref();
            let shared_from = |first: usize| {
                let others = streams.iter().skip(first).flatten();
                others.filter(|other| Some(*other) == stream).count()
            };
            self.sharing = shared_from(0) > 1;
            let row_start = Instant::now();
            match self.row(row, id, texts.as_mut()) {
                Ok(result) => found[index] = Some(result),
                Err(error) => {
                    if let Some(stopped) = stopped(row, &error) {
                        end = Err(stopped);
                        break;
                    }
                    tracing::error!("row {}: {error:#}", row.name);
                    let (name, command) = (row.name.clone(), self.command(row));
                    failed.push(FailedRow { name, command, error: format!("{error:#}") });
                }
            }
            clock.stop(row, row_start.elapsed());
            if let Some((request, _)) = stream.filter(|_| shared_from(index + 1) == 0) {
                // The last that needs it; its space is free again.
                for (.., kept) in self.calibration.iter_mut().filter(|(of, ..)| of == request) {
                    *kept = FloatStream::new(self.store.directory());
                }
            }
        }
        if end.is_ok()
            && let Some(first) = failed.first()
        {
            let (count, all) = (failed.len(), rows.len());
            end = Err(anyhow::anyhow!(
                "{count} of {all} rows failed, the first of them {}: {}",
                first.name,
                first.error
            ));
        }
        let results = Results {
            gptq_version: env!("CARGO_PKG_VERSION"),
            platform: gptq_quantize::report::platform(),
            model: self.model.to_owned(),
            input_bytes: self.checkpoint.tensors.total_bytes(),
            original: original.unwrap_or_default(),
            rows: found.into_iter().flatten().collect(),
            failed,
            seconds: start.elapsed().as_secs_f64(),
        };
        Ok((results, end))
    }

    /// A result found under another name gets the name that it has in this sweep.
    fn rename(&self, row: &Row, id: &str, result: &mut RowResult) {
        result.name.clone_from(&row.name);
        result.series.clone_from(&row.series);
        let checkpoint = self.store.checkpoint(&row.name, id);
        let kept = result.checkpoint.take().filter(|path| path.exists());
        result.checkpoint = kept.or_else(|| checkpoint.exists().then_some(checkpoint));
    }

    fn row(
        &mut self,
        row: &Row,
        id: &str,
        texts: Option<&mut Texts<'_>>,
    ) -> anyhow::Result<RowResult> {
        let directory = self.store.checkpoint(&row.name, id);
        let keep = self.keep || self.store.keeps(&directory);
        let report = self.quantize(row, &directory)?;
        let view = progress(self.global);
        let evaluations = texts.map_or_else(|| Ok(Vec::new()), |t| t.measure(&directory, &view))?;
        view.finish();
        let settings = row.settings.iter().map(|(o, v)| (o.clone(), json!(v))).collect();
        let result = RowResult {
            name: row.name.clone(),
            series: row.series.clone(),
            command: self.command(row),
            settings,
            method: report.method,
            bits_per_weight: report.bits_per_weight,
            output_bytes: report.totals.output_bytes,
            seconds: report.seconds,
            machine: format!("{}, {}", gptq_quantize::report::platform(), isa().name()),
            warnings: report.warnings,
            checkpoint: keep.then(|| directory.clone()),
            evaluations,
            calibration: report.calibration,
            mixed_precision: report.mixed_precision,
            modules: report.modules,
        };
        self.store.write(&row.name, &self.store.result_id(id), &result)?;
        if !keep && let Err(error) = std::fs::remove_dir_all(&directory) {
            tracing::warn!("cannot remove {}: {error}", directory.display());
        }
        Ok(result)
    }

    /// Writes the checkpoint of a row, or finds the one that an interrupted sweep has written.
    fn quantize(&mut self, row: &Row, directory: &Path) -> anyhow::Result<QuantReport> {
        if quantize::is_finished(directory) {
            let report = gptq_format::fs::read_json(&directory.join("quant_report.json"))?;
            return serde_json::from_value(report)
                .with_context(|| format!("{}: quant_report.json", directory.display()));
        }
        let view = progress(self.global);
        let options = QuantizeOptions { resume: true, overwrite: false, ..row.args.options()? };
        let tokenizer = self.checkpoint.tokenizer();
        let tokenizer = tokenizer.as_ref().ok();
        self.calibrate(row, &options, tokenizer, false, &view)?;
        let options = match row.args.target_bpw {
            Some(target) => self.choose_bits(&options, target, tokenizer, &view)?,
            None => options,
        };
        let job = self.job(&options, tokenizer, directory);
        let plan = plan(&job)?;
        let report = match quantize_as_planned(&job, &plan, &view) {
            Err(QuantizeError::ResumeDiffers { field, .. }) => {
                tracing::info!("row {} starts again: it was begun with another {field}", row.name);
                let options = QuantizeOptions { resume: false, ..options.clone() };
                quantize_as_planned(&self.job(&options, tokenizer, directory), &plan, &view)
            }
            other => other,
        }?;
        view.finish();
        Ok(report)
    }

    /// The options with bits for a size. What they are chosen from is measured once for all rows that have the same.
    fn choose_bits(
        &mut self,
        options: &QuantizeOptions,
        target: f64,
        tokenizer: Option<&Tokenizer>,
        view: &ProgressView,
    ) -> anyhow::Result<QuantizeOptions> {
        let request = self.calibration.last().map(|(request, ..)| request);
        let key = format!("{} {request:?}", Sensitivity::key(options));
        let job = self.job(options, tokenizer, Path::new(""));
        let mut chosen = options.clone();
        if let Some((_, measured)) = self.sensitivities.iter().find(|(of, _)| *of == key) {
            apply_target(&job, measured, target, &mut chosen)?;
        } else {
            let measured = sensitivity(&job, view)?;
            apply_target(&job, &measured, target, &mut chosen)?;
            self.sensitivities.push((key, measured));
        }
        Ok(chosen)
    }

    fn job<'j>(
        &'j self,
        options: &'j QuantizeOptions,
        tokenizer: Option<&'j Tokenizer>,
        output: &'j Path,
    ) -> Job<'j> {
        let windows = self.calibration.last().filter(|_| options.method.needs_calibration());
        Job {
            checkpoint: self.checkpoint,
            tokenizer,
            model: self.model,
            calibration: windows.map(|(_, set, _)| set),
            options,
            output,
            plots: Some(quantize::plots),
            float_stream: windows.filter(|_| self.sharing).map(|(.., stream)| stream),
            pool: self.pool,
        }
    }

    /// Sees to it that the windows of `row` are there.
    fn calibrate(
        &mut self,
        row: &Row,
        options: &QuantizeOptions,
        tokenizer: Option<&Tokenizer>,
        dry_run: bool,
        view: &ProgressView,
    ) -> anyhow::Result<()> {
        if !options.method.needs_calibration() {
            return Ok(());
        }
        let request = row.args.calibration(self.checkpoint)?;
        if let Some(known) = self.calibration.iter().position(|(made, ..)| *made == request) {
            let known = self.calibration.remove(known);
            self.calibration.push(known);
            return Ok(());
        }
        let Some(tokenizer) = tokenizer else { bail!("calibration needs the model's tokenizer") };
        let target = calibration::Target {
            announce: &|_, _| (),
            model: self.model,
            checkpoint: self.checkpoint,
            tokenizer,
            pool: self.pool,
            options,
            dry_run,
        };
        let set = calibration::load(&request, &target, view)?;
        self.calibration.push((request, set, FloatStream::new(self.store.directory())));
        Ok(())
    }

    /// What the float model computes for a row; rows with the same can share it.
    fn float_inputs(&self, row: &Row) -> Option<(calibration::Request, String)> {
        let settings = FloatStream::settings(&row.args.options().ok()?)?;
        Some((row.args.calibration(self.checkpoint).ok()?, settings))
    }

    fn command(&self, row: &Row) -> String {
        let quote = |text: &String| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./+@,:".contains(c);
            if text.chars().all(plain) {
                text.clone()
            } else {
                format!("'{}'", text.replace('\'', "'\\''"))
            }
        };
        let family = self.global.family.iter().map(|file| format!("--family={}", file.display()));
        let words = [self.model.to_owned()].into_iter().chain(row.line.iter().cloned());
        let words = words.chain(family);
        let words: Vec<String> = words.map(|word| quote(&word)).collect();
        format!("gptq quantize {} -o DIR", words.join(" "))
    }
}

/// Why a sweep ends in a row that it was stopped in, not failed: it goes on without being told to.
fn stopped(row: &Row, error: &anyhow::Error) -> Option<anyhow::Error> {
    match error.downcast_ref() {
        Some(QuantizeError::Interrupted { done, total }) => Some(anyhow::anyhow!(
            "stopped in row {} after {done} of {total} blocks; run the same command to go on",
            row.name
        )),
        _ => None,
    }
}

/// How long rows take, by method.
#[derive(Debug, Default)]
struct Clock(Vec<(String, Duration)>);

impl Clock {
    fn method(row: &Row) -> String {
        let method = row.settings.iter().find(|(option, _)| option == "method");
        method.map_or_else(|| "gptq".to_owned(), |(_, method)| method.clone())
    }

    fn stop(&mut self, row: &Row, span: Duration) {
        self.0.push((Self::method(row), span));
    }

    /// The mean of the finished rows of the same method, else of all; `None` before the first.
    fn expect(&self, row: &Row) -> Option<Duration> {
        let mean = |of: &dyn Fn(&str) -> bool| {
            let spans: Vec<Duration> =
                self.0.iter().filter(|(method, _)| of(method)).map(|(_, span)| *span).collect();
            let count = u32::try_from(spans.len()).ok().filter(|&count| count > 0)?;
            Some(spans.iter().sum::<Duration>() / count)
        };
        let method = Self::method(row);
        mean(&|other| other == method).or_else(|| mean(&|_| true))
    }

    fn announce(&self, index: usize, total: usize, row: &Row, left: &[&Row]) {
        let rest: Option<Duration> = left.iter().map(|row| self.expect(row)).sum();
        let eta = rest.map_or_else(String::new, |rest| format!("  {} to go", size::clock(rest)));
        // Progress is not worth failing for when stderr is closed.
        let _ = writeln!(LogWriter, "row {}/{total}  {}{eta}", index + 1, row.name);
    }
}
