//! `gptq quantize`.

use std::cell::Cell;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::ValueEnum;
use gptq_compute::sweep::ScaleSearch;
use gptq_format::{Bits, Checkpoint, CheckpointFormat, Dynamic};
use gptq_model::{ActivationType, SentencePooling, Spec};
use gptq_quantize::pipeline::{Job, MixedReport, apply_target, check_target, sensitivity};
use gptq_quantize::report::PlanSummary;
use gptq_quantize::{
    CalibrationOptions, Correction, Method, MoeFallback, Plan, QuantizeOptions, TokenWeights,
    Windows, plan, quantize_as_planned,
};
use serde_json::{Value, json};

use super::runtime::ActivationsArg;
use super::{calibration, open, pool, progress};
use crate::Global;
use crate::output::progress::catch_interrupts;
use crate::output::table::{Align, Table, colour_allowed};
use crate::output::{json as json_output, plot, size};

/// Quantize a float model to 8, 4, 3 or 2 bits and write a GPTQ checkpoint.
///
/// The output appears under its name only when it is whole, with a report, a log of all layers and plots
/// of their losses and errors (plots/loss.svg, plots/error.svg). Options have the names that transformers and
/// GPTQModel give them. Bits, group size, grid, order and damping have GPTQModel's defaults; scales, token weights and
/// the correction of input errors go beyond it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Float model: directory, .gguf file or hub id.
    model: String,
    /// Directory to write.
    #[arg(long, short, value_name = "DIR", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// How weights become codes: gptq; rtn rounds to nearest without data; awq rounds to nearest with
    /// activation-aware scales and clipped ranges; obq is the exact greedy baseline of the paper, for
    /// small models.
    #[arg(long, value_enum, default_value_t = MethodArg::Gptq)]
    method: MethodArg,
    /// Bits per weight: 2, 3, 4 or 8.
    #[arg(long, default_value = "4", value_parser = parse_bits)]
    bits: Bits,
    /// Mixed precision: bits of each module chosen so that the divergence from the original is least
    /// and quantized weights take at most so many bits each, scales, zeros and group indices included.
    /// The same bits for linears that engines fuse; written as rules of `dynamic`.
    #[arg(long, value_name = "BITS", conflicts_with = "bits", value_parser = parse_target)]
    pub(super) target_bpw: Option<f64>,
    /// Inputs that share a scale: a multiple of 8, or -1 for the whole row.
    #[arg(long, default_value_t = 128, allow_negative_numbers = true, value_name = "N")]
    group_size: i64,
    /// Symmetric grid (the default).
    #[arg(long, overrides_with = "no_sym")]
    sym: bool,
    /// Asymmetric grid: a zero point per group.
    #[arg(long)]
    no_sym: bool,
    /// Order in which columns are quantized: group-aware (GAR: by descending activation inside and
    /// among groups), act-static (by activation over all groups, whose scales are found before),
    /// natural (left to right), or desc-act (by activation with groups along that order: engines must
    /// reorder inputs). [default: group-aware; natural with --group-size -1]
    #[arg(
        long,
        value_enum,
        hide_possible_values = true,
        conflicts_with_all = ["desc_act", "act_group_aware", "no_act_group_aware"]
    )]
    order: Option<OrderArg>,
    /// The same as --order desc-act.
    #[arg(long)]
    desc_act: bool,
    /// The same as --order group-aware.
    #[arg(long, overrides_with = "no_act_group_aware")]
    act_group_aware: bool,
    /// The same as --order natural.
    #[arg(long)]
    no_act_group_aware: bool,
    /// Find all scales before the first column is quantized.
    #[arg(long)]
    static_groups: bool,
    /// Share of the Hessian's mean diagonal that is added to its diagonal. auto: every eighth calibration
    /// window is held out; each stage takes the damping that errs least on it, and the share of the
    /// Hessian's off-diagonal elements that is left out.
    #[arg(long, default_value = "0.05", value_parser = parse_damping, value_name = "P|auto")]
    damp_percent: Damping,
    /// Added to the damping while the factorization fails.
    #[arg(long, default_value_t = 0.01, value_name = "P")]
    damp_auto_increment: f64,
    /// What scales are chosen for: minmax (the range of the group), mse (the least rounding error to
    /// the power of --mse) or hessian (the least squared error as the solver weighs columns).
    /// [default: hessian; minmax for the methods rtn, obq and awq]
    #[arg(long, value_enum, hide_possible_values = true)]
    scale_search: Option<ScaleSearchArg>,
    /// Exponent of --scale-search mse, which it implies (2.4 is usual).
    #[arg(long, value_name = "NORM")]
    mse: Option<f32>,
    /// Symmetric grids: let scales be negative, so that the larger weights of a group get the step
    /// that the grid has more below zero. On by default for --method gptq.
    #[arg(long, overrides_with = "no_signed_scales")]
    signed_scales: bool,
    /// Symmetric grids: positive scales only.
    #[arg(long)]
    no_signed_scales: bool,
    /// After the sweep, rounds of best scales for the codes and best codes for the scales: a lower
    /// loss on the calibration text, if rarely a better model.
    #[arg(long, default_value_t = QuantizeOptions::default().refine, value_name = "ROUNDS")]
    refine: usize,
    /// When a block has its codes, tune its scales and the weights of its norms by gradient
    /// towards the output of the float block, in so many passes over about 16384 calibration tokens.
    /// Lowers the loss most at 2 bits with --correction none, little behind qep, and costs nothing at
    /// inference, but minutes of the run; 3 are enough.
    #[arg(long, default_value_t = QuantizeOptions::default().tune_blocks, value_name = "PASSES")]
    tune_blocks: usize,
    /// Scale the inputs of each stage by AWQ before it is quantized: weights of large inputs become
    /// larger, and the norm or linear before them smaller by as much. Costs nothing at inference.
    #[arg(long)]
    awq_scales: bool,
    /// Let all stages of a block see what its float linears compute behind the quantized blocks before, instead of what
    /// those of its own stages that are quantized already compute.
    #[arg(long)]
    no_true_sequential: bool,
    /// What to do with an expert of a mixture that fewer calibration tokens were routed to than a
    /// quarter of its inputs: round it to nearest, or solve it on all tokens.
    #[arg(long, value_enum, default_value_t = MoeFallbackArg::Rtn)]
    moe_fallback: MoeFallbackArg,
    /// How much each calibration token counts: all the same as in the paper, or balanced: the first
    /// token of a window, to which all others attend, counts for a quarter of it in the inputs of
    /// q, k and v; inputs of the output and down projections count by direction, not by size.
    /// [default: balanced; uniform for the methods obq and awq]
    #[arg(long, value_enum)]
    token_weights: Option<TokenWeightsArg>,
    /// How linears that are quantized already take their inputs while the calibration tokens pass through
    /// them. Unless f32, the inputs of Hessians and both sides of attention's and of the float model's products
    /// are rounded to 16 bits, too, where the processor multiplies pairs of these.
    #[arg(long, value_enum, default_value_t = ActivationsArg::Bf16, value_name = "TYPE")]
    activations: ActivationsArg,
    /// How the activations of the calibration tokens are kept between stages: f16 takes half the
    /// memory and rounds them.
    #[arg(long, value_enum, default_value_t = ActivationTypeArg::F32, value_name = "TYPE")]
    activation_dtype: ActivationTypeArg,
    /// How linears make up for inputs that are not those of the float model any more: not at all, by
    /// weights that are moved before they are solved (qep), column by column in the sweep (gptaq), or by
    /// a best first column and a fresh start behind it (qronos). Down projections are left out. Unless none, the
    /// model is run as floats, too, which takes six to eight tenths of the time again and twice the memory for activations.
    /// [default: qep; none for the methods rtn, obq and awq and with --awq-scales]
    #[arg(long, value_enum)]
    correction: Option<CorrectionArg>,
    /// Share of the input error that is corrected, above 0 and at most 1. [default: qep 0.5, gptaq
    /// 0.25, qronos 1 as published; with the default scales and token weights 0.5 is better]
    #[arg(long, value_name = "A")]
    correction_strength: Option<f64>,
    /// Calibration text, or `self`: the model writes it. A .txt file is one text; lines of .jsonl and rows of .parquet
    /// have `text`, `messages` (which go through the chat template) or `input_ids`. Given several
    /// times, windows are drawn from each in proportion to the weights: `--calibration a.txt
    /// --calibration self@0.5` takes two thirds from the file. Encoders take each line (of .txt) or
    /// row as a window of its own, with its special tokens.
    #[arg(long, value_name = "FILE|self[@WEIGHT]", default_value = "self", num_args = 1)]
    calibration: Vec<String>,
    /// Calibration windows. [default: 128; of encoders, whose windows are short, 1024]
    #[arg(long, value_name = "N", hide_default_value = true)]
    nsamples: Option<usize>,
    /// Tokens per window; of encoders the most, at most what the model reads.
    #[arg(long, default_value_t = 2048, value_name = "N")]
    seqlen: usize,
    /// Seed of the windows and of self calibration.
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Self calibration: sampling temperature.
    #[arg(long, default_value_t = 1.0, value_name = "T")]
    calibration_temperature: f32,
    /// Self calibration: sample among so many most likely tokens; 0 for all.
    #[arg(long, default_value_t = 50, value_name = "K")]
    calibration_top_k: usize,
    /// Zero-point convention: gptq (v1), which all engines know (asymmetric not GPTQModel; which bits and grids each
    /// reads: `gptq verify`), or `gptq_v2`, exact for every zero point, but not read by TGI.
    #[arg(long, value_enum, default_value_t = FormatArg::Gptq)]
    format: FormatArg,
    /// JSON file of overrides, regex of module names to settings: bits, group_size, sym, desc_act,
    /// act_group_aware, static_groups, damp_percent, mse; `-:regex` leaves modules as floats:
    /// `{"-:model\\.layers\\.0\\.": {}, ".*down_proj": {"bits": 8}}`. Patterns match from the start of the name. Those with
    /// `-:` come first, then the others as they stand; the first that matches holds.
    #[arg(long, value_name = "FILE")]
    dynamic: Option<PathBuf>,
    /// Largest weight file.
    #[arg(long, default_value = "4GiB", value_parser = size::parse_bytes, value_name = "SIZE")]
    max_shard_size: u64,
    /// Quantize the head too: to 8 bits in groups of 32, unless a rule of --dynamic names it. Not for
    /// a head that is tied to the embedding.
    #[arg(long)]
    lm_head: bool,
    /// Most memory to use, such as 4GiB: activations that do not fit go to a scratch file beside the
    /// output. Changes nothing in the result. [default: what is available, for activations]
    #[arg(long, value_parser = size::parse_bytes, value_name = "SIZE")]
    max_memory: Option<u64>,
    /// Replace the output directory if it exists.
    #[arg(long)]
    overwrite: bool,
    /// Go on with what an interrupted run of the same command left behind.
    #[arg(long)]
    resume: bool,
    /// Show what the run would need and stop. With --target-bpw the bits are chosen first: that takes the calibration
    /// text, which the model may have to write, and minutes of measuring.
    #[arg(long)]
    dry_run: bool,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum MethodArg {
    Gptq,
    Rtn,
    Obq,
    Awq,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum OrderArg {
    Natural,
    GroupAware,
    ActStatic,
    DescAct,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum ScaleSearchArg {
    Minmax,
    Mse,
    Hessian,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum MoeFallbackArg {
    Rtn,
    AllTokens,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TokenWeightsArg {
    Uniform,
    Balanced,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum CorrectionArg {
    None,
    Qep,
    Gptaq,
    Qronos,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ActivationTypeArg {
    F32,
    F16,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FormatArg {
    Gptq,
    #[value(name = "gptq_v2")]
    GptqV2,
}

/// The value of `--damp-percent`.
#[derive(Debug, Clone, Copy)]
enum Damping {
    Auto,
    Share(f64),
}

fn parse_damping(text: &str) -> Result<Damping, String> {
    if text == "auto" {
        return Ok(Damping::Auto);
    }
    text.parse().map(Damping::Share).map_err(|_| format!("`{text}` is neither a number nor auto"))
}

pub(super) fn parse_bits(text: &str) -> Result<Bits, String> {
    let bits: u8 = text.parse().map_err(|_| format!("`{text}` is not a number"))?;
    Bits::try_from(bits).map_err(|e| e.to_string())
}

fn parse_target(text: &str) -> Result<f64, String> {
    let target: f64 = text.parse().map_err(|_| format!("`{text}` is not a number"))?;
    if target > 0.0 && target.is_finite() {
        Ok(target)
    } else {
        Err("expected a number of bits above 0".to_owned())
    }
}

/// Calibration tokens whose ids take 16 GiB.
const MOST_TOKENS: usize = 1 << 32;

impl Args {
    pub(super) fn options(&self) -> anyhow::Result<QuantizeOptions> {
        let dynamic = match &self.dynamic {
            None => Dynamic::default(),
            Some(path) => {
                let Value::Object(rules) = gptq_format::fs::read_json(path)? else {
                    bail!("{}: expected a JSON object of rules", path.display());
                };
                Dynamic::from_map(&rules).with_context(|| path.display().to_string())?
            }
        };
        let method = match self.method {
            MethodArg::Gptq => Method::Gptq,
            MethodArg::Rtn => Method::Rtn,
            MethodArg::Obq => Method::Obq,
            MethodArg::Awq => Method::Awq,
        };
        let defaults = QuantizeOptions::for_method(method);
        let order = self.order();
        let correction = self.correction(&defaults);
        if self.correction_strength.is_some() && correction == Correction::None {
            bail!("--correction-strength goes with --correction qep, gptaq or qronos");
        }
        Ok(QuantizeOptions {
            method,
            bits: self.bits,
            group_size: self.group_size,
            sym: !self.no_sym,
            desc_act: order == OrderArg::DescAct,
            act_group_aware: order == OrderArg::GroupAware || self.act_group_aware,
            act_order_static: order == OrderArg::ActStatic,
            static_groups: self.static_groups,
            damp_percent: match self.damp_percent {
                Damping::Auto => defaults.damp_percent,
                Damping::Share(share) => share,
            },
            damp_auto: matches!(self.damp_percent, Damping::Auto),
            damp_auto_increment: self.damp_auto_increment,
            scale_search: self.scale_search(&defaults)?,
            signed_scales: self.signed_scales || (defaults.signed_scales && !self.no_signed_scales),
            refine: self.refine,
            tune_blocks: self.tune_blocks,
            true_sequential: !self.no_true_sequential,
            moe_fallback: match self.moe_fallback {
                MoeFallbackArg::Rtn => MoeFallback::Rtn,
                MoeFallbackArg::AllTokens => MoeFallback::AllTokens,
            },
            token_weights: match self.token_weights {
                None => defaults.token_weights,
                Some(TokenWeightsArg::Uniform) => TokenWeights::Uniform,
                Some(TokenWeightsArg::Balanced) => TokenWeights::Balanced,
            },
            activations: self.activations.into(),
            activation_dtype: match self.activation_dtype {
                ActivationTypeArg::F32 => ActivationType::F32,
                ActivationTypeArg::F16 => ActivationType::F16,
            },
            correction,
            correction_strength: self.correction_strength,
            awq_scales: self.awq_scales,
            format: match self.format {
                FormatArg::Gptq => CheckpointFormat::Gptq,
                FormatArg::GptqV2 => CheckpointFormat::GptqV2,
            },
            dynamic,
            mixed: None,
            max_shard_bytes: self.max_shard_size,
            lm_head: self.lm_head,
            max_memory: self.max_memory,
            overwrite: self.overwrite,
            resume: self.resume,
        })
    }

    /// The order asked for by its name or by the flags that GPTQModel's users know.
    fn order(&self) -> OrderArg {
        match self.order {
            Some(order) => order,
            None if self.desc_act => OrderArg::DescAct,
            None if self.act_group_aware => OrderArg::GroupAware,
            None if self.no_act_group_aware || self.group_size < 0 => OrderArg::Natural,
            None => OrderArg::GroupAware,
        }
    }

    fn correction(&self, defaults: &QuantizeOptions) -> Correction {
        match self.correction {
            // The float model is not folded.
            None if self.awq_scales => Correction::None,
            None => defaults.correction,
            Some(CorrectionArg::None) => Correction::None,
            Some(CorrectionArg::Qep) => Correction::Qep,
            Some(CorrectionArg::Gptaq) => Correction::Gptaq,
            Some(CorrectionArg::Qronos) => Correction::Qronos,
        }
    }

    fn scale_search(&self, defaults: &QuantizeOptions) -> anyhow::Result<ScaleSearch> {
        Ok(match (self.scale_search, self.mse) {
            (None, None) => defaults.scale_search,
            (None | Some(ScaleSearchArg::Mse), norm) => ScaleSearch::Power(norm.unwrap_or(2.4)),
            (Some(_), Some(_)) => bail!("--mse goes with --scale-search mse only"),
            (Some(ScaleSearchArg::Minmax), None) => ScaleSearch::MinMax,
            (Some(ScaleSearchArg::Hessian), None) => ScaleSearch::Hessian,
        })
    }

    /// The calibration windows for a model.
    pub(super) fn calibration(
        &self,
        checkpoint: &Checkpoint,
    ) -> anyhow::Result<calibration::Request> {
        let (kind, windows) = self.windows(checkpoint)?;
        let CalibrationOptions { nsamples, seqlen, .. } = windows;
        if nsamples.checked_mul(seqlen).is_none_or(|tokens| tokens > MOST_TOKENS) {
            bail!(
                "--nsamples {nsamples} of --seqlen {seqlen} are too many tokens; 128 of 2048 are usual"
            );
        }
        Ok(calibration::Request {
            sources: self.calibration.clone(),
            kind,
            windows,
            temperature: self.calibration_temperature,
            top_k: self.calibration_top_k,
        })
    }

    /// Kind, number and length of the windows for a model.
    fn windows(&self, checkpoint: &Checkpoint) -> anyhow::Result<(Windows, CalibrationOptions)> {
        let spec = Spec::for_checkpoint(checkpoint)?;
        if spec.attention.causal {
            let nsamples = self.nsamples.unwrap_or(128);
            let options = CalibrationOptions { nsamples, seqlen: self.seqlen, seed: self.seed };
            return Ok((Windows::Cuts, options));
        }
        let trained = SentencePooling::from_dir(&checkpoint.path)?.max_tokens;
        let longest = spec.max_positions.min(trained.unwrap_or(usize::MAX));
        let options = CalibrationOptions {
            nsamples: self.nsamples.unwrap_or(1024),
            seqlen: self.seqlen.min(longest),
            seed: self.seed,
        };
        Ok((Windows::Records, options))
    }
}

pub(crate) fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let view = progress(global);
    let options = args.options()?;
    options.check()?;
    // With --overwrite it may be the output that is to be replaced.
    let resume = args.resume && !args.overwrite;
    if let Some(output) = args.output.as_deref().filter(|o| resume && is_finished(o)) {
        check_finished(output, args, &options)?;
        tracing::warn!("{} is finished already", output.display());
        return Ok(());
    }
    catch_interrupts();
    let checkpoint = open(&args.model, &view)?;
    if let Some(target) = args.target_bpw {
        check_target(&checkpoint, &options, target)?;
    }
    let tokenizer = checkpoint.tokenizer();
    let pool = pool(global);
    // What was planned before the model wrote its text.
    let announced = Cell::new(None);
    let announce = |plan: &Plan, job: &Job<'_>| {
        view.finish();
        if !global.quiet {
            show_plan(plan, job);
        }
        announced.set(Some(plan.summary));
    };
    let calibration = if options.method.needs_calibration() {
        let tokenizer = match &tokenizer {
            Ok(tokenizer) => tokenizer,
            Err(error) => bail!("calibration needs the model's tokenizer: {error}"),
        };
        let target = calibration::Target {
            model: &args.model,
            checkpoint: &checkpoint,
            tokenizer,
            pool: &pool,
            options: &options,
            // Bits are chosen from what real windows show.
            dry_run: args.dry_run && args.target_bpw.is_none(),
            announce: &announce,
        };
        Some(calibration::load(&args.calibration(&checkpoint)?, &target, &view)?)
    } else {
        None
    };
    let output = args.output.clone().unwrap_or_else(|| "dry-run".into());
    let mut chosen = options.clone();
    let mut job = Job {
        checkpoint: &checkpoint,
        tokenizer: tokenizer.as_ref().ok(),
        model: &args.model,
        calibration: calibration.as_ref(),
        options: &options,
        output: &output,
        plots: Some(plots),
        float_stream: None,
        pool: &pool,
    };
    if let Some(target) = args.target_bpw {
        apply_target(&job, &sensitivity(&job, &view)?, target, &mut chosen)?;
        job.options = &chosen;
    }
    let mut plan = plan(&job)?;
    // What the model needed to write its text was planned.
    if announced.get().is_none() {
        plan = plan.after_reading(options.max_memory)?;
    }
    view.finish();
    match announced.get().filter(|_| args.target_bpw.is_none()) {
        // Whether the activations spill is decided by what is resident now.
        Some(shown) => {
            plan.summary = PlanSummary { scratch_bytes: plan.summary.scratch_bytes, ..shown };
        }
        None if global.quiet => (),
        None => show_plan(&plan, &job),
    }
    if args.dry_run {
        if args.json {
            json_output::print(&json!({
                "model": args.model,
                "method": options.method.name(),
                "quantize_config": plan.config.to_json(),
                "threads": pool.threads(),
                "plan": plan.summary,
                "mixed_precision": job.options.mixed,
                "totals": { "blocks": plan.blocks, "modules": plan.modules },
            }))?;
        }
        return Ok(());
    }
    let report = quantize_as_planned(&job, &plan, &view)?;
    view.finish();
    if args.json {
        return json_output::print(&report);
    }
    if !global.quiet {
        for warning in &report.warnings {
            tracing::warn!("{warning}");
        }
        eprint_summary(&report, &output);
    }
    Ok(())
}

/// Whether a run into `output` has come to its end: only then does the directory have its name.
pub(super) fn is_finished(output: &Path) -> bool {
    output.join("quant_report.json").exists()
        && !gptq_format::OutputDir::partial_path(output).is_ok_and(|partial| partial.exists())
}

/// Refuses to take a finished run for that of `options` where it is of another model or has other settings.
fn check_finished(output: &Path, args: &Args, options: &QuantizeOptions) -> anyhow::Result<()> {
    let report = gptq_format::fs::read_json(&output.join("quant_report.json"))?;
    let (then, now) = (&report["quantize_config"], options.config().to_json());
    let mut fields = vec![
        ("model", report["model"].clone(), json!(args.model)),
        ("method", report["method"].clone(), json!(options.method.name())),
        ("target_bpw", report["mixed_precision"]["target_bpw"].clone(), json!(args.target_bpw)),
    ];
    let mut keys =
        vec!["group_size", "sym", "desc_act", "checkpoint_format", "damp_percent", "lm_head"];
    // These were chosen for a size, or hold a rule for the head.
    if args.target_bpw.is_none() {
        keys.push("bits");
        if !options.lm_head {
            keys.push("dynamic");
        }
    }
    fields.extend(keys.iter().map(|key| (*key, then[*key].clone(), now[*key].clone())));
    let meta = ["order", "scale_search", "signed_scales", "refine", "token_weights", "correction"];
    let of = |config: &Value, key: &str| config["meta"][key].clone();
    fields.extend(meta.iter().map(|key| (*key, of(then, key), of(&now, key))));
    for (key, then, now) in fields {
        if then != now {
            bail!(
                "{} is finished, with {key} = {then} and not {now}; choose another --output, or --overwrite it",
                output.display()
            );
        }
    }
    Ok(())
}

#[allow(clippy::print_stderr)] // The plan is for people, not data.
fn show_plan(plan: &Plan, job: &Job<'_>) {
    let o = job.options;
    let group = if o.group_size < 0 { "rows".to_owned() } else { format!("g{}", o.group_size) };
    let grid = if o.sym { "sym" } else { "asym" };
    eprintln!(
        "Plan  {} blocks, {} modules · {} {}-bit {group} {grid} · {:.2} bits per weight",
        plan.blocks,
        plan.modules,
        o.method.name(),
        o.bits.as_u32(),
        plan.bits_per_weight
    );
    if let Some(mixed) = &o.mixed {
        eprintln!("Bits  {}", mixed_precision(mixed));
    }
    if let Some(c) = job.calibration {
        let names: Vec<&str> = c.report.sources.iter().map(|s| s.name.as_str()).collect();
        let names = if names.is_empty() { "self".to_owned() } else { names.join(", ") };
        let (windows, seqlen) = (c.report.windows, c.report.seqlen);
        // Windows that are still to be written hold one token only.
        let different = match c.report.distinct_tokens {
            0..=1 => String::new(),
            n => format!(", {n} different tokens"),
        };
        eprintln!("Data  {names} · {windows} windows of {seqlen} tokens{different}");
        if let Some(note) = &c.report.note {
            eprintln!("      {note}");
        }
    }
    let s = &plan.summary;
    let time = |seconds| size::duration(Duration::from_secs_f64(seconds));
    let writing = if s.writing_seconds > 0.0 {
        format!(", and {} before to write the text", time(s.writing_seconds))
    } else {
        String::new()
    };
    eprintln!(
        "Need  {} memory · {} disk · about {} on {} threads{writing}",
        size::bytes(s.peak_rss_bytes),
        size::bytes(s.output_bytes),
        time(s.seconds),
        job.pool.threads()
    );
    if s.scratch_bytes > 0 {
        eprintln!(
            "Spill the activations of {} tokens: a scratch file of {} beside the output until the run ends",
            plan.tokens,
            size::bytes(s.scratch_bytes)
        );
    }
    if std::io::stderr().is_terminal() || job.output == Path::new("dry-run") {
        let mut table = Table::new([("memory", Align::Left), ("size", Align::Right)]);
        for (part, bytes) in &plan.memory {
            table.row([(*part).to_owned(), size::bytes(*bytes)]);
        }
        eprint!("{}", table.render(colour_allowed(&std::io::stderr())));
    }
}

/// Which share of the weights got how many bits.
fn mixed_precision(mixed: &MixedReport) -> String {
    let all: u64 = mixed.groups.iter().map(|group| group.weights).sum();
    let share = |bits: u32| {
        let of = mixed.groups.iter().filter(|group| group.bits == bits);
        let weights: u64 = of.map(|group| group.weights).sum();
        let percent = 100.0 * weights as f64 / all.max(1) as f64;
        (weights > 0).then(|| format!("{bits} bits {percent:.1} %"))
    };
    let shares: Vec<String> = [2, 3, 4, 8].into_iter().filter_map(share).collect();
    format!(
        "{} of the weights · expected divergence {:.4} nats per token",
        shares.join(", "),
        mixed.expected_kl
    )
}

#[allow(clippy::print_stderr)] // As above.
fn eprint_summary(report: &gptq_quantize::QuantReport, output: &Path) {
    eprintln!(
        "Done  {} · {} in {}, peak memory {}",
        output.display(),
        size::bytes(report.totals.output_bytes),
        size::duration(Duration::from_secs_f64(report.seconds)),
        report.peak_rss_bytes.map_or_else(|| "unknown".to_owned(), size::bytes)
    );
}

/// Plots of a run's losses and errors by file name; none of one that measured none, as rounding does.
pub(super) fn plots(modules: &[gptq_quantize::ModuleRecord]) -> Vec<(&'static str, String)> {
    if modules.iter().all(|module| module.relative_output_error.is_none()) {
        return Vec::new();
    }
    vec![("loss.svg", plot::loss_by_layer(modules)), ("error.svg", plot::error_map(modules))]
}
