//! What a run leaves behind besides weights: one record per module, one report per run, and the
//! checks that turn records into warnings. Serialized, a [`ModuleRecord`] is a line of
//! quant_log.jsonl and a [`QuantReport`] is quant_report.json and what `quantize --json` prints;
//! the keys are documented in docs/reference/json.md and never renamed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::calibration::CalibrationReport;
use crate::pipeline::MixedReport;

/// What happened to one linear.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModuleRecord {
    /// Index of its block, from 0; modules behind the blocks (`lm_head`) have the number of blocks.
    pub layer: usize,
    /// Its name inside the block, for example `self_attn.q_proj`.
    pub module: String,
    /// `[out, in]` of the weight.
    pub shape: [usize; 2],
    /// Bits per code.
    pub bits: u32,
    /// Inputs that share a scale; -1 is all of them.
    pub group_size: i64,
    /// Half the Hessian-weighted squared error of the weights, ½·tr(ΔW·H·ΔWᵀ): GPTQ's own loss, as
    /// IST's gptq.py sums it.
    pub loss: f64,
    /// ‖ΔW·X‖² / ‖W·X‖² over the calibration inputs X; `null` for methods without calibration. Here and in the loss W are
    /// the weights that the codes are meant to come near to: the model's, or as `correction` moved them.
    pub relative_output_error: Option<f64>,
    /// The share of the Hessian's mean diagonal that was finally added to its diagonal.
    pub damp_percent: f64,
    /// Factorizations tried; 1 if the first damping sufficed.
    pub damp_tries: u32,
    /// Share of the off-diagonal elements of H that was left out (`--damp-percent auto`).
    pub shrink: f64,
    /// Calibration tokens behind the Hessian.
    pub nsamples: u64,
    /// Of an expert only: how it was calibrated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert: Option<ExpertRecord>,
    /// Of runs with AWQ's scales only: those of its inputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub awq: Option<AwqRecord>,
    /// Seconds spent on this module alone (solve and pack; shared work of its stage is in the
    /// phases of the report).
    pub seconds: f64,
    /// Resident memory after it, in bytes; `null` where the platform does not tell.
    pub rss_bytes: Option<u64>,
}

/// How an expert's linear was calibrated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExpertRecord {
    /// Calibration tokens that the router sent to the expert.
    pub tokens: u64,
    /// What was done because they were too few: `rtn` or `all-tokens`; `null` where they were enough.
    pub fallback: Option<String>,
}

/// How the inputs of a linear were scaled before it was quantized.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AwqRecord {
    /// The exponent α of the scales; `null` where there are none.
    pub alpha: Option<f64>,
    /// Error of the stage's outputs when rounded to nearest, over that without scales; `null` where
    /// there are none.
    pub loss: Option<f64>,
    /// Why the inputs were not scaled; `null` where they were.
    pub skipped: Option<String>,
}

/// How a block was tuned (`--tune-blocks`).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TuningRecord {
    /// Index of the block, from 0.
    pub layer: usize,
    /// Mean over tokens of ‖ŷ - y‖² / ‖y‖², with y the float block's output and ŷ the quantized one's, both from the
    /// inputs that the quantized blocks before compute.
    pub error_before: f64,
    /// The same with the tuned scales and norms; `null` if it is not a number.
    pub error_after: Option<f64>,
    /// Whether they were lower and were saved.
    pub kept: bool,
    /// Seconds that it took.
    pub seconds: f64,
}

/// What a run is expected to need, before it starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanSummary {
    /// Most resident memory, in bytes.
    pub peak_rss_bytes: u64,
    /// Size of the finished checkpoint, in bytes.
    pub output_bytes: u64,
    /// Disk space that is used during the run and freed at its end, in bytes.
    pub scratch_bytes: u64,
    /// Wall time of the run, in seconds.
    pub seconds: f64,
    /// Wall time before it that the model writes its calibration text, in seconds; 0 where it does not.
    #[serde(default)]
    pub writing_seconds: f64,
    /// Floating point operations of the forward passes and Hessians.
    #[serde(default)]
    pub operations: f64,
    /// The rate of f32 matrix products with all threads, measured before the run; 0 where there is
    /// nothing to multiply.
    #[serde(default)]
    pub f32_operations_per_second: f64,
}

/// Wall time of one kind of work, summed over all blocks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// Its name, as [`Progress::phase`](crate::progress::Progress::phase) gets it.
    pub phase: String,
    /// Seconds.
    pub seconds: f64,
}

/// Sizes of the model before and after.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Blocks of the model.
    pub blocks: usize,
    /// Linears that were quantized.
    pub modules: usize,
    /// Weights in those linears.
    pub quantized_weights: u64,
    /// All parameters of the model, quantized or not.
    pub parameters: u64,
    /// Bytes of the model's tensors as they were read.
    pub input_bytes: u64,
    /// Bytes of the written shards.
    pub output_bytes: u64,
}

/// The report of one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantReport {
    /// Version of gptq-rs.
    pub gptq_version: String,
    /// Architecture and operating system, for example `x86_64-linux`.
    pub platform: String,
    /// The model as the user named it.
    pub model: String,
    /// `gptq`, `rtn`, `obq` or `awq`.
    pub method: String,
    /// The object that quantize_config.json holds.
    pub quantize_config: Value,
    /// The calibration data; `null` for methods that need none.
    pub calibration: Option<CalibrationReport>,
    /// Threads used.
    pub threads: usize,
    /// The estimate made before the run.
    pub plan: PlanSummary,
    /// Wall time of the whole run, in seconds.
    pub seconds: f64,
    /// Wall time by kind of work.
    pub phases: Vec<PhaseTime>,
    /// The plan's operations per second of the run, as a share of its f32 rate: over 1 is possible
    /// with activations in 16 or 8 bits. `null` for a run that was resumed or has no calibration.
    #[serde(default)]
    pub f32_rate_fraction: Option<f64>,
    /// Most resident memory of the process, in bytes; `null` where the platform does not tell.
    pub peak_rss_bytes: Option<u64>,
    /// Sizes.
    pub totals: Totals,
    /// Bits per quantized weight, with codes, scales, zeros and group indices.
    pub bits_per_weight: f64,
    /// How bits were chosen for a size; `null` where all modules have what the settings say.
    #[serde(default)]
    pub mixed_precision: Option<MixedReport>,
    /// How each block was tuned; empty without `--tune-blocks`.
    #[serde(default)]
    pub tuning: Vec<TuningRecord>,
    /// What deserves a look, in sentences (see [`warnings`]).
    pub warnings: Vec<String>,
    /// One record per quantized linear, in the order of the work.
    pub modules: Vec<ModuleRecord>,
}

/// This build's platform as [`QuantReport::platform`] spells it.
pub fn platform() -> String {
    format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)
}

/// Sentences on modules that deserve a look: fewer calibration tokens than inputs (the Hessian has
/// no full rank), more damping than asked for, or a relative output error over [`OUTLIER_FACTOR`]
/// times the median of its kind.
pub fn warnings(modules: &[ModuleRecord]) -> Vec<String> {
    let mut medians: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for record in modules {
        let errors = medians.entry(&record.module).or_default();
        errors.extend(record.relative_output_error);
    }
    for errors in medians.values_mut() {
        errors.sort_by(f64::total_cmp);
    }
    let mut found = starved(modules);
    found.extend(unscaled(modules));
    for record in modules {
        let name = format!("layer {} {}", record.layer, record.module);
        let inputs = record.shape[1] as u64;
        if record.nsamples > 0 && record.nsamples < inputs {
            found.push(format!(
                "{name}: {} calibration tokens for {inputs} inputs; use more --nsamples",
                record.nsamples
            ));
        }
        if record.damp_tries > 1 {
            found.push(format!(
                "{name}: the Hessian needed a damping of {} ({} tries)",
                record.damp_percent, record.damp_tries
            ));
        }
        let Some(error) = record.relative_output_error else { continue };
        let errors = &medians[record.module.as_str()];
        let median = errors[errors.len() / 2];
        if errors.len() >= 3 && error > OUTLIER_FACTOR * median {
            found.push(format!(
                "{name}: relative output error {error:.2e}, {:.0} times the median of its kind",
                error / median
            ));
        }
        if !error.is_finite() || !record.loss.is_finite() {
            found.push(format!("{name}: the error is not finite"));
        }
    }
    found
}

/// One sentence per block in which experts saw too few tokens.
fn starved(modules: &[ModuleRecord]) -> Vec<String> {
    let mut layers: BTreeMap<usize, (&str, Vec<String>)> = BTreeMap::new();
    for record in modules {
        let Some(ExpertRecord { tokens, fallback: Some(how) }) = &record.expert else { continue };
        let (_, list) = layers.entry(record.layer).or_insert_with(|| (how, Vec::new()));
        list.push(format!("{} ({tokens})", record.module));
    }
    let sentence = |(layer, (how, list)): (usize, (&str, Vec<String>))| {
        const SHOWN: usize = 6;
        let more = if list.len() > SHOWN { ", …" } else { "" };
        format!(
            "layer {layer}: {} linears of experts saw too few calibration tokens and fell back to {how}: {}{more}; use \
             more --nsamples",
            list.len(),
            list[..list.len().min(SHOWN)].join(", ")
        )
    };
    layers.into_iter().map(sentence).collect()
}

/// One sentence per reason for which inputs were left without AWQ's scales.
fn unscaled(modules: &[ModuleRecord]) -> Vec<String> {
    let mut reasons: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for record in modules {
        let Some(AwqRecord { skipped: Some(reason), .. }) = &record.awq else { continue };
        reasons.entry(reason).or_insert((0, &record.module)).0 += 1;
    }
    let sentence = |(reason, (count, module)): (&str, (usize, &str))| {
        format!(
            "the inputs of {count} linears (the first is {module}) have no AWQ scales: {reason}"
        )
    };
    reasons.into_iter().map(sentence).collect()
}

/// How far above the median of its kind an error is called an outlier.
pub const OUTLIER_FACTOR: f64 = 5.0;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record(layer: usize, module: &str, error: f64) -> ModuleRecord {
        ModuleRecord {
            layer,
            module: module.into(),
            shape: [64, 32],
            bits: 4,
            group_size: 128,
            loss: error * 2.0,
            relative_output_error: Some(error),
            damp_percent: 0.05,
            damp_tries: 1,
            shrink: 0.0,
            nsamples: 4096,
            expert: None,
            awq: None,
            seconds: 0.5,
            rss_bytes: None,
        }
    }

    pub(crate) fn report() -> QuantReport {
        QuantReport {
            gptq_version: "0.1.0".into(),
            platform: "x86_64-linux".into(),
            model: "model.gguf".into(),
            method: "gptq".into(),
            quantize_config: serde_json::json!({ "bits": 4 }),
            calibration: None,
            threads: 2,
            plan: PlanSummary::default(),
            seconds: 12.5,
            f32_rate_fraction: Some(0.75),
            phases: vec![PhaseTime { phase: "hessian".into(), seconds: 3.5 }],
            peak_rss_bytes: Some(1 << 30),
            totals: Totals::default(),
            bits_per_weight: 4.15,
            mixed_precision: None,
            tuning: Vec::new(),
            warnings: Vec::new(),
            modules: vec![record(0, "mlp.up_proj", 0.5)],
        }
    }

    #[test]
    fn a_report_survives_json() {
        let text = serde_json::to_string(&report()).unwrap();
        assert_eq!(serde_json::from_str::<QuantReport>(&text).unwrap(), report());
        for key in ["seconds", "peak_rss_bytes", "bits_per_weight", "modules"] {
            assert!(text.contains(&format!("\"{key}\":")), "{key}");
        }
    }

    #[test]
    fn a_record_is_one_line_with_the_documented_keys() {
        let line = serde_json::to_string(&record(3, "mlp.up_proj", 0.5)).unwrap();
        assert_eq!(
            line,
            r#"{"layer":3,"module":"mlp.up_proj","shape":[64,32],"bits":4,"group_size":128,"loss":1.0,"relative_output_error":0.5,"damp_percent":0.05,"damp_tries":1,"shrink":0.0,"nsamples":4096,"seconds":0.5,"rss_bytes":null}"#
        );
        assert_eq!(
            serde_json::from_str::<ModuleRecord>(&line).unwrap(),
            record(3, "mlp.up_proj", 0.5)
        );
    }

    #[test]
    fn warns_of_rank_damping_and_outliers() {
        let mut modules: Vec<_> = (0..5).map(|layer| record(layer, "q", 0.01)).collect();
        assert_eq!(warnings(&modules), Vec::<String>::new());
        modules[1].nsamples = 8;
        modules[2].damp_tries = 3;
        modules[4].relative_output_error = Some(0.2);
        let found = warnings(&modules);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].starts_with("layer 1 q: 8 calibration tokens for 32 inputs"));
        assert!(found[1].contains("damping"));
        assert!(found[2].contains("20 times the median"));
    }

    /// Every key, of nested objects too.
    fn keys(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                for (key, inner) in map {
                    found.push(key.clone());
                    keys(inner, found);
                }
            }
            Value::Array(list) => list.iter().for_each(|inner| keys(inner, found)),
            _ => {}
        }
    }

    #[test]
    fn every_key_is_documented() {
        let mut run = report();
        run.calibration = Some(CalibrationReport::new(
            vec![crate::calibration::SourceReport::default()],
            &[],
            &crate::calibration::CalibrationOptions::default(),
            1,
        ));
        let mut found = Vec::new();
        keys(&serde_json::to_value(run).unwrap(), &mut found);
        let text = include_str!("../../../docs/reference/json.md");
        for key in found {
            let named = [format!("`{key}"), format!(".{key}`")];
            assert!(
                named.iter().any(|name| text.contains(name)),
                "{key} is not in docs/reference/json.md"
            );
        }
    }
}
