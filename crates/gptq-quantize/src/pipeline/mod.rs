//! The run: plan, then block after block and stage after stage.

mod activations;
mod distances;
mod float_stream;
mod fold;
mod head;
mod held_out;
mod inputs;
mod journal;
mod layout;
mod linear;
mod memory;
mod mixed;
mod native;
mod options;
mod output;
mod plan;
mod scratch;
mod stage;
mod states;
mod tune;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use gptq_compute::Pool;
use gptq_format::{Checkpoint, FormatError, Tokenizer};
use gptq_model::{Block, Ctx, Embedder, HeadLayer, LinearRows, LinearSource, Spec, load_linear};

pub use float_stream::FloatStream;
pub use journal::model_fingerprint;
pub use mixed::{
    MixedGroup, MixedReport, Sensitivity, apply as apply_target, check_target, sensitivity,
};
pub use options::{Method, MoeFallback, QuantizeOptions};
pub use plan::{Plan, plan};

use crate::calibration::CalibrationSet;
use crate::error::{QuantizeError, Result};
use crate::progress::Progress;
use crate::report::{
    self, ModuleRecord, PhaseTime, PlanSummary, QuantReport, Totals, TuningRecord,
};
use crate::rss;
use crate::solver::Correction;
use activations::Activations;
use fold::Folded;
use inputs::StageInputs;
use layout::Layout;
use output::Output;

/// Wall time by kind of work.
#[derive(Debug, Default)]
pub(crate) struct Phases(Vec<PhaseTime>);

impl Phases {
    /// Runs `work` and books its time on `phase`.
    pub(crate) fn time<T>(&mut self, phase: &str, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.add(phase, start.elapsed().as_secs_f64());
        result
    }

    /// Books time on `phase`.
    pub(crate) fn add(&mut self, phase: &str, seconds: f64) {
        match self.0.iter_mut().find(|p| p.phase == phase) {
            Some(p) => p.seconds += seconds,
            None => self.0.push(PhaseTime { phase: phase.to_owned(), seconds }),
        }
    }
}

/// Draws plots of the modules of a run: file name and contents of each.
pub type Plots = fn(&[ModuleRecord]) -> Vec<(&'static str, String)>;

/// What a run works on.
pub struct Job<'a> {
    /// The float model.
    pub checkpoint: &'a Checkpoint,
    /// Its tokenizer, saved beside the weights; `None` leaves it out.
    pub tokenizer: Option<&'a Tokenizer>,
    /// The model as the user named it, for the report.
    pub model: &'a str,
    /// Calibration windows; [`Method::Rtn`] needs none.
    pub calibration: Option<&'a CalibrationSet>,
    /// The settings.
    pub options: &'a QuantizeOptions,
    /// The directory to write.
    pub output: &'a Path,
    /// Draws the plots that are saved beside the weights.
    pub plots: Option<Plots>,
    /// Where runs with a correction, of the same model and calibration, share what the float model computes.
    pub float_stream: Option<&'a FloatStream>,
    /// The threads. Results do not depend on their number.
    pub pool: &'a Arc<Pool>,
}

/// The state of a run.
pub(crate) struct Run<'a> {
    pub(crate) job: &'a Job<'a>,
    pub(crate) spec: &'a Arc<Spec>,
    pub(crate) layout: &'a Layout,
    pub(crate) output: Output,
    pub(crate) phases: Phases,
    pub(crate) progress: &'a dyn Progress,
    pub(crate) records: Vec<ModuleRecord>,
    pub(crate) tuning: Vec<TuningRecord>,
    /// What the block at work is multiplied with.
    pub(crate) folded: Folded,
}

/// Quantizes a model into a new directory, which appears under its name only when it is whole.
///
/// # Errors
/// [`QuantizeError`]: options out of range, a model that is not supported or damaged, an output
/// that cannot be written.
pub fn quantize(job: &Job<'_>, progress: &dyn Progress) -> Result<QuantReport> {
    quantize_as_planned(job, &plan(job)?, progress)
}

/// As [`quantize`], with the plan that [`plan()`] made of the same job.
///
/// # Errors
/// As [`quantize`].
pub fn quantize_as_planned(
    job: &Job<'_>,
    plan: &Plan,
    progress: &dyn Progress,
) -> Result<QuantReport> {
    let start = Instant::now();
    let spec = Arc::new(Spec::for_checkpoint(job.checkpoint)?);
    job.options.check()?;
    check_tuning(job.options, &spec)?;
    let layout = Layout::new(job.checkpoint, &spec, job.options)?;
    let mut phases = Phases::default();
    progress.phase("write");
    let output = phases.time("write", || Output::open(job, &layout))?;
    let (records, tuning) = (output.records(), output.tuning());
    let resumed = output.blocks_done() > 0;
    let folded = Folded::default();
    let layout = &layout;
    let mut run =
        Run { job, spec: &spec, layout, output, phases, progress, records, tuning, folded };
    if let Err(error) = run.units(plan) {
        // Another try can succeed: what is finished is worth keeping.
        let done = run.output.blocks_done();
        if done == 0 || !may_pass(&error) {
            return Err(error);
        }
        run.output.keep();
        return Err(kept(error, done, layout.units(&spec)));
    }

    let modules = std::mem::take(&mut run.records);
    let seconds = start.elapsed().as_secs_f64();
    let PlanSummary { operations, f32_operations_per_second: rate, .. } = plan.summary;
    let tensors = layout.plan.total_bytes();
    let report = QuantReport {
        gptq_version: env!("CARGO_PKG_VERSION").to_owned(),
        platform: report::platform(),
        model: job.model.to_owned(),
        method: job.options.method.name().to_owned(),
        quantize_config: layout.config.to_json(),
        calibration: job.calibration.map(|c| c.report.clone()),
        threads: job.pool.threads(),
        plan: plan.summary,
        seconds,
        f32_rate_fraction: (rate > 0.0 && !resumed).then(|| operations / seconds / rate),
        phases: std::mem::take(&mut run.phases.0),
        peak_rss_bytes: rss::peak_bytes(),
        totals: Totals {
            blocks: spec.layer_count(),
            modules: modules.len(),
            quantized_weights: layout.quantized_weights(),
            parameters: layout.parameters,
            input_bytes: job.checkpoint.tensors.total_bytes(),
            output_bytes: tensors,
        },
        bits_per_weight: layout.bits_per_weight(),
        mixed_precision: job.options.mixed.clone(),
        tuning: std::mem::take(&mut run.tuning),
        warnings: report::warnings(&modules),
        modules,
    };
    let total = layout.units(&spec);
    run.output.commit(job, &report).map_err(|error| kept(error, total, total))?;
    Ok(report)
}

/// Whether all blocks can be tuned, if they are to be.
fn check_tuning(options: &QuantizeOptions, spec: &Spec) -> Result<()> {
    let tuned = if options.tune_blocks > 0 { spec.layer_count() } else { 0 };
    for layer in 0..tuned {
        spec.check_gradients(layer).map_err(|error| QuantizeError::Option {
            option: "tune_blocks",
            reason: format!("{error}; leave it at 0 for this model"),
        })?;
    }
    Ok(())
}

/// The error of a run whose finished blocks are kept.
fn kept(error: QuantizeError, done: usize, total: usize) -> QuantizeError {
    match error {
        QuantizeError::Interrupted { .. } => error,
        other => QuantizeError::Kept { source: Box::new(other), done, total },
    }
}

/// Whether the same command may succeed another time: after an interruption, or when the disk was
/// full.
fn may_pass(error: &QuantizeError) -> bool {
    matches!(
        error,
        QuantizeError::Interrupted { .. }
            | QuantizeError::Format(FormatError::Io { .. } | FormatError::NoSpace { .. })
    )
}

impl Run<'_> {
    /// Quantizes all blocks that are not finished yet, and the head if it is to be.
    fn units(&mut self, plan: &Plan) -> Result<()> {
        let blocks = self.spec.layer_count();
        let total = self.layout.units(self.spec);
        let done = self.output.blocks_done();
        if done == total {
            return Ok(());
        }
        self.output.require_space(plan.summary.scratch_bytes)?;
        self.check_head()?;
        let mut ctx = Ctx::new(Arc::clone(self.job.pool));
        ctx.scratch.set_activations(self.job.options.activations);
        let mut activations = match self.job.calibration {
            Some(set) if self.job.options.method.needs_calibration() => {
                self.progress.phase("inputs");
                let model = self.output.checkpoint();
                let directory = plan.spill.then(|| self.output.directory());
                Some(self.phases.time("inputs", || {
                    let options = self.job.options;
                    let kept = (options.token_weights, options.activation_dtype);
                    let activations =
                        Activations::embed(&mut ctx, model, self.spec, set, kept, directory)?
                            .with_held_out(options.damp_auto);
                    let activations = if options.runs_blocks_again() {
                        activations.with_start(self.output.directory())?
                    } else {
                        activations
                    };
                    match options.correction {
                        Correction::None => Ok(activations),
                        _ => activations.with_native(&mut ctx, self.job, set, directory),
                    }
                })?)
            }
            _ => None,
        };
        for layer in 0..total {
            self.progress.block_started(layer, total);
            if layer < done {
                if let Some(activations) = &mut activations {
                    self.replay(&mut ctx, layer, activations)?;
                }
                self.progress.block_done(layer);
                if self.progress.interrupted() {
                    return Err(QuantizeError::Interrupted { done, total });
                }
                continue;
            }
            if layer < blocks {
                self.block(&mut ctx, layer, activations.as_mut())?;
                if layer + 1 == blocks {
                    self.check_outputs(&mut ctx, layer, activations.as_mut())?;
                }
            } else {
                self.head(&mut ctx, activations.as_mut())?;
            }
            self.progress.phase("write");
            let Self { output, records, tuning, phases, .. } = self;
            phases.time("write", || output.block_done(layer, records, tuning))?;
            self.progress.block_done(layer);
            if self.progress.interrupted() && layer + 1 < total {
                return Err(QuantizeError::Interrupted { done: layer + 1, total });
            }
        }
        Ok(())
    }

    /// No block needs the head, but a model with a wrong one must not come out as whole.
    fn check_head(&self) -> Result<()> {
        let source = self.job.checkpoint;
        if let Some(linear) = self.spec.head_linear().filter(|_| self.layout.config.lm_head) {
            LinearRows::open(source, self.spec, &linear)?;
            HeadLayer::load_without_projection(source, self.spec)?;
            return Ok(());
        }
        let embedder = Embedder::load(source, self.spec, LinearSource::Mapped)?;
        HeadLayer::load_on(self.job.pool, source, self.spec, &embedder)?;
        Ok(())
    }

    /// Takes the activations through a block that an earlier run finished.
    fn replay(
        &mut self,
        ctx: &mut Ctx,
        layer: usize,
        activations: &mut Activations<'_>,
    ) -> Result<()> {
        let model = self.output.checkpoint();
        let block = Block::load(model, self.spec, layer, LinearSource::Copied)?;
        self.progress.phase("inputs");
        activations.begin(ctx, &block, &mut self.phases)?;
        for stage in self.spec.stage_order(layer) {
            activations.advance(ctx, &block, stage, &mut self.phases)?;
        }
        Ok(())
    }

    fn block(
        &mut self,
        ctx: &mut Ctx,
        layer: usize,
        mut activations: Option<&mut Activations<'_>>,
    ) -> Result<()> {
        self.restore_norms(layer)?;
        self.fold(ctx, layer, activations.as_deref_mut())?;
        let checkpoint = self.output.checkpoint();
        let mut block = Block::load(checkpoint, self.spec, layer, LinearSource::Unset)?;
        // Modules that stay floats are taken from the output: as they were saved.
        let stages = self.spec.stage_order(layer);
        for &stage in &stages {
            for (i, linear) in self.spec.stage_linears(layer, stage).iter().enumerate() {
                if self.layout.settings(&linear.module).is_none() {
                    let linear = load_linear(checkpoint, self.spec, linear, LinearSource::Copied)?;
                    block.set_linear(stage, i, linear)?;
                }
            }
        }
        let Some(activations) = activations else {
            return stages.iter().try_for_each(|&stage| {
                self.solve_stage(&mut block, layer, stage, StageInputs::default())
            });
        };
        if self.job.options.true_sequential {
            activations.keep_start(ctx, &mut self.phases)?;
            activations.begin(ctx, &block, &mut self.phases)?;
            for &stage in &stages {
                let inputs = if self.layout.quantizes(self.spec, layer, stage) {
                    let fallback = self.job.options.moe_fallback;
                    activations.inputs(ctx, &block, stage, fallback, &mut self.phases)?
                } else {
                    StageInputs::default()
                };
                self.solve_stage(&mut block, layer, stage, inputs)?;
                // Behind the last stage of all only the head is solved, but what comes out is checked.
                self.progress.phase("inputs");
                activations.advance(ctx, &block, stage, &mut self.phases)?;
            }
            if self.tune(ctx, &mut block, activations)? {
                self.progress.phase("inputs");
                activations.run_again(ctx, &block, &mut self.phases)?;
            }
            return Ok(());
        }
        // All stages see what the float block computes.
        for &stage in &stages {
            for (i, linear) in self.spec.stage_linears(layer, stage).iter().enumerate() {
                if self.layout.settings(&linear.module).is_some() {
                    let source = self.job.checkpoint;
                    let float = load_linear(source, self.spec, linear, LinearSource::Copied)?;
                    block.set_linear(stage, i, self.folded.linear(&linear.module, float))?;
                }
            }
        }
        self.progress.phase("inputs");
        let fallback = self.job.options.moe_fallback;
        let (layout, spec) = (self.layout, self.spec);
        let wanted = |stage| layout.quantizes(spec, layer, stage);
        let inputs = activations.all_inputs(ctx, &block, wanted, fallback, &mut self.phases)?;
        for (&stage, inputs) in stages.iter().zip(inputs) {
            self.solve_stage(&mut block, layer, stage, inputs)?;
        }
        self.tune(ctx, &mut block, activations)?;
        self.progress.phase("inputs");
        activations.begin(ctx, &block, &mut self.phases)?;
        for &stage in &stages {
            activations.advance(ctx, &block, stage, &mut self.phases)?;
        }
        Ok(())
    }

    /// Whether what comes out of the last block, `layer`, is all numbers.
    fn check_outputs(
        &mut self,
        ctx: &mut Ctx,
        layer: usize,
        activations: Option<&mut Activations<'_>>,
    ) -> Result<()> {
        let Some(activations) = activations else { return Ok(()) };
        if activations.is_finite(ctx, &mut self.phases)? {
            return Ok(());
        }
        let stages = self.spec.stage_order(layer).into_iter().rev();
        let mut linears = stages.flat_map(|stage| self.spec.stage_linears(layer, stage));
        let module = linears.next().map_or_else(String::new, |linear| linear.module);
        Err(QuantizeError::OutputNotFinite { layer, module })
    }
}
