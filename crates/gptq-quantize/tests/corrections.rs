//! Corrections and the choice of damping through the whole pipeline.

#![allow(missing_docs)]

use std::path::Path;
use std::sync::Arc;

use gptq_compute::sweep::ScaleSearch;
use gptq_compute::{Activations, Pool, Scratch, Tensor, linear};
use gptq_format::{Bits, Checkpoint, Dynamic};
use gptq_model::{Block, BlockState, Ctx, Embedder, LinearSource, Spec, Stage, load_linear};
use gptq_quantize::pipeline::{FloatStream, Job};
use gptq_quantize::{
    CalibrationOptions, CalibrationReport, CalibrationSet, Correction, ModuleRecord, QuantReport,
    QuantizeOptions, TokenWeights, quantize,
};
use gptq_testkit::fixtures;

const LENGTH: usize = 48;

fn windows(vocab: usize) -> Vec<Vec<u32>> {
    let token = |i: usize| (i * i * 31 + i * 17 + i / 7) as u32 % vocab as u32;
    (0..16).map(|w| (0..LENGTH).map(|i| token(w * 1009 + i)).collect()).collect()
}

fn run(source: &Path, output: &Path, threads: usize, options: QuantizeOptions) -> QuantReport {
    run_with(source, output, threads, options, None)
}

fn run_with(
    source: &Path,
    output: &Path,
    threads: usize,
    options: QuantizeOptions,
    float_stream: Option<&FloatStream>,
) -> QuantReport {
    let checkpoint = Checkpoint::open(source).unwrap();
    let vocab = Spec::for_checkpoint(&checkpoint).unwrap().vocab;
    let windows = windows(vocab);
    let sizes = CalibrationOptions { nsamples: windows.len(), seqlen: LENGTH, seed: 0 };
    let report = CalibrationReport::new(Vec::new(), &windows, &sizes, vocab);
    let options = QuantizeOptions { group_size: 32, overwrite: true, ..options };
    let job = Job {
        checkpoint: &checkpoint,
        tokenizer: None,
        model: "fixture",
        calibration: Some(&CalibrationSet::from_windows(windows, report)),
        options: &options,
        output,
        plots: None,
        float_stream,
        pool: &Arc::new(Pool::new(threads)),
    };
    quantize(&job, &()).unwrap()
}

fn bytes(directory: &Path) -> Vec<u8> {
    std::fs::read(directory.join("model.safetensors")).unwrap()
}

/// Codes differ from those of the plain run behind the first stage alone, where both streams are the
/// same, whatever the threads.
#[test]
fn corrections_change_what_has_quantized_inputs() {
    for name in ["llama", "mixtral", "gptj"] {
        let Some(source) = fixtures::dir(name) else { continue };
        let folder = tempfile::tempdir().unwrap();
        let output = |name: &str| folder.path().join(name);
        let options =
            QuantizeOptions { bits: Bits::B3, correction: Correction::None, ..Default::default() };
        let plain = run(&source, &output("plain"), 2, options.clone());
        for correction in [Correction::Qep, Correction::Gptaq, Correction::Qronos] {
            for true_sequential in [true, false] {
                let options = QuantizeOptions { correction, true_sequential, ..options.clone() };
                let report = run(&source, &output("two"), 2, options.clone());
                assert_eq!(report.quantize_config["meta"]["correction"], correction.name());
                assert!(report.quantize_config["meta"]["correction_strength"].is_f64());
                run(&source, &output("one"), 1, options);
                assert!(bytes(&output("one")) == bytes(&output("two")), "{name} {correction:?}");
                assert!(bytes(&output("one")) != bytes(&output("plain")));
                if !true_sequential {
                    continue;
                }
                for (got, want) in report.modules.iter().zip(&plain.modules) {
                    // The inputs of the first stage are those of the float model, up to the type that
                    // the embedding is saved in, which makes a few codes round the other way.
                    let first = want.layer == 0 && want.module.contains("q_proj");
                    let same = (got.loss / want.loss - 1.0).abs() < 5e-3;
                    assert!(!first || same, "{name} {correction:?}: {got:?} {want:?}");
                }
            }
        }
    }
}

/// Inputs of the second block's first stage, where the first block is that of `directory`.
fn inputs_of_second_block(source: &Path, directory: &Path) -> Vec<Tensor> {
    let ctx = &mut Ctx::new(Arc::new(Pool::new(2)));
    let [source, first] = [source, directory].map(|path| Checkpoint::open(path).unwrap());
    let spec = Arc::new(Spec::for_checkpoint(&source).unwrap());
    let embedder = Embedder::load(&source, &spec, LinearSource::Copied).unwrap();
    let first = Block::load(&first, &spec, 0, LinearSource::Copied).unwrap();
    let second = Block::load(&source, &spec, 1, LinearSource::Copied).unwrap();
    let of = |ids: Vec<u32>| {
        let mut state = BlockState::default();
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        embedder.forward(ctx, &ids, &positions, &mut state.hidden).unwrap();
        first.run_whole(ctx, &mut state, std::slice::from_ref(&(0..ids.len()))).unwrap();
        second.begin(ctx, &mut state);
        state.input
    };
    windows(spec.vocab).into_iter().map(of).collect()
}

/// The weights `[out][in]` of a projection of the second block.
fn weights(directory: &Path, index: usize) -> Vec<Vec<f64>> {
    let checkpoint = Checkpoint::open(directory).unwrap();
    let spec = Spec::for_checkpoint(&checkpoint).unwrap();
    let linears = spec.stage_linears(1, Stage::Qkv);
    let loaded = load_linear(&checkpoint, &spec, &linears[index], LinearSource::Copied).unwrap();
    let (inputs, outputs) = (linears[index].in_features, linears[index].out_features);
    let mut one = Tensor::zeros(inputs, inputs);
    (0..inputs).for_each(|i| one.row_mut(i)[i] = 1.0);
    let mut columns = Tensor::default();
    linear(&Pool::new(1), &one, &mut [(&loaded, &mut columns)], &mut Scratch::default());
    let row = |o: usize| (0..inputs).map(|i| f64::from(columns.row(i)[o])).collect();
    (0..outputs).map(row).collect()
}

/// x with x A = b, A symmetric, by elimination.
fn solve(a: &[Vec<f64>], b: &[f64]) -> Vec<f64> {
    let (mut a, mut b, n) = (a.to_vec(), b.to_vec(), b.len());
    for p in 0..n {
        for i in p + 1..n {
            let (above, below) = a.split_at_mut(i);
            let factor = below[0][p] / above[p][p];
            below[0].iter_mut().zip(&above[p]).skip(p).for_each(|(x, y)| *x -= factor * y);
            b[i] -= factor * b[p];
        }
    }
    for p in (0..n).rev() {
        let rest: f64 = (p + 1..n).map(|j| a[p][j] * b[j]).sum();
        b[p] = (b[p] - rest) / a[p][p];
    }
    b
}

/// Behind a block of 2 bits, 8 bits are next to nothing: what the next stage becomes is W + α W D H⁻¹, with D and H of
/// both models' own inputs, in f64, in which the first token of a window counts for a quarter of it.
#[test]
fn weights_move_for_the_inputs_of_the_float_model() {
    let Some(source) = fixtures::dir("llama") else { return };
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let rules = r#"{"-:model\\.layers\\.1\\.(self_attn\\.o_proj|mlp)": {}, "model\\.layers\\.1": {"bits": 8}}"#;
    let weighted = TokenWeights::Balanced;
    for (true_sequential, token_weights, first_counts) in [
        (true, TokenWeights::Uniform, 1.0),
        (true, weighted, LENGTH as f64 / 4.0),
        (false, weighted, LENGTH as f64 / 4.0),
    ] {
        let options = QuantizeOptions {
            bits: Bits::B2,
            dynamic: Dynamic::from_map(&serde_json::from_str(rules).unwrap()).unwrap(),
            activations: Activations::F32,
            token_weights,
            correction: Correction::Qep,
            correction_strength: Some(0.5),
            true_sequential,
            ..Default::default()
        };
        let damp = options.damp_percent;
        run(&source, &output, 2, options);
        let float = inputs_of_second_block(&source, &source);
        let quantized = inputs_of_second_block(&source, &output);
        let n = float[0].cols();
        let (mut h, mut d) = (vec![vec![0.0; n]; n], vec![vec![0.0; n]; n]);
        for (x, y) in float.iter().zip(&quantized) {
            for t in 0..x.rows() {
                let size = if t == 0 { f64::sqrt(first_counts) } else { 1.0 };
                let f64s =
                    |x: &Tensor| x.row(t).iter().map(|v| size * f64::from(*v)).collect::<Vec<_>>();
                let (x, y) = (f64s(x), f64s(y));
                for i in 0..n {
                    for j in 0..n {
                        h[i][j] += y[i] * y[j];
                        d[i][j] += (x[i] - y[i]) * y[j];
                    }
                }
            }
        }
        let mean = (0..n).map(|i| h[i][i]).sum::<f64>() / n as f64;
        (0..n).for_each(|i| h[i][i] += damp * mean);
        for index in 0..3 {
            let (before, after) = (weights(&source, index), weights(&output, index));
            let (mut moved, mut off) = (0.0, 0.0);
            for (w, got) in before.iter().zip(&after) {
                let wd: Vec<f64> = (0..n).map(|j| (0..n).map(|i| w[i] * d[i][j]).sum()).collect();
                for ((w, shift), got) in w.iter().zip(solve(&h, &wd)).zip(got) {
                    moved += (0.5 * shift).powi(2);
                    off += (w + 0.5 * shift - got).powi(2);
                }
            }
            // Rounding to 8 bits; the opposite sign would be 4.
            assert!(off < 0.01 * moved, "{token_weights:?} {index}: {off} {moved}");
        }
    }
}

/// What the first run keeps of the float model, others read: the same bytes, with other bits, corrections and grids, too,
/// in memory or on disk, and nothing stays behind. Runs with other settings compute their own.
#[test]
fn runs_share_what_the_float_model_computes() {
    for name in ["llama", "gptj", "mixtral"] {
        let Some(source) = fixtures::dir(name) else { continue };
        let folder = tempfile::tempdir().unwrap();
        let shared = FloatStream::new(folder.path());
        let base = QuantizeOptions { bits: Bits::B3, ..Default::default() };
        let f32s = QuantizeOptions { activations: Activations::F32, ..base.clone() };
        let cases = [
            base.clone(),
            base.clone(),
            QuantizeOptions { correction: Correction::Gptaq, bits: Bits::B4, ..base.clone() },
            QuantizeOptions { correction: Correction::Qronos, sym: false, ..base.clone() },
            QuantizeOptions { damp_auto: true, ..base.clone() },
            QuantizeOptions { token_weights: TokenWeights::Uniform, ..base.clone() },
            QuantizeOptions { true_sequential: false, ..base.clone() },
            f32s,
        ];
        for (index, options) in cases.into_iter().enumerate() {
            let [one, two] = ["one", "two"].map(|out| folder.path().join(out));
            let phases = |report: QuantReport| {
                report.phases.into_iter().any(|phase| phase.phase == "scratch")
            };
            assert!(!phases(run(&source, &one, 2, options.clone())), "{name} {index}");
            let used = phases(run_with(&source, &two, 3, options, Some(&shared)));
            assert_eq!(used, name != "mixtral" && index < 6, "{name} {index}");
            assert!(bytes(&one) == bytes(&two), "{name} {index}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}

/// Where its file cannot be written, the float model is computed again.
#[test]
fn a_float_stream_that_cannot_be_written_costs_time_alone() {
    let Some(source) = fixtures::dir("llama") else { return };
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("float-stream.scratch")).unwrap();
    let shared = FloatStream::new(folder.path());
    let options = QuantizeOptions { bits: Bits::B3, ..Default::default() };
    let outputs = ["alone", "first", "second"].map(|out| folder.path().join(out));
    run(&source, &outputs[0], 2, options.clone());
    for output in &outputs[1..] {
        run_with(&source, output, 2, options.clone(), Some(&shared));
        assert!(bytes(output) == bytes(&outputs[0]));
    }
}

/// Where nothing but down projections is quantized, there is nothing to correct, whatever comes in.
#[test]
fn inputs_of_down_projections_are_not_corrected() {
    for name in ["llama", "mixtral", "gptj"] {
        let Some(source) = fixtures::dir(name) else { continue };
        let folder = tempfile::tempdir().unwrap();
        let output = |name: &str| folder.path().join(name);
        let others = "[qkvo]_proj|out_proj|gate_proj|up_proj|w1|w3|fc_in";
        let rules = format!(r#"{{"-:.*\\.({others})$": {{}}}}"#);
        let dynamic = Dynamic::from_map(&serde_json::from_str(&rules).unwrap()).unwrap();
        for true_sequential in [true, false] {
            let options = QuantizeOptions {
                bits: Bits::B3,
                correction: Correction::None,
                true_sequential,
                dynamic: dynamic.clone(),
                ..Default::default()
            };
            let report = run(&source, &output("plain"), 2, options.clone());
            assert!(report.modules.iter().any(|module| module.layer > 0));
            let options = QuantizeOptions { correction: Correction::Qep, ..options };
            run(&source, &output("qep"), 2, options);
            assert!(bytes(&output("plain")) == bytes(&output("qep")), "{name} {true_sequential}");
        }
    }
}

/// Refined codes come nearer to what the correction aims at, not back to the weights that it started from.
#[test]
fn refinement_has_the_aim_of_the_correction() {
    let Some(source) = fixtures::dir("llama") else { return };
    let folder = tempfile::tempdir().unwrap();
    for damp_auto in [false, true] {
        let error = |refine| {
            let options = QuantizeOptions {
                bits: Bits::B2,
                correction_strength: Some(1.0),
                scale_search: ScaleSearch::MinMax,
                signed_scales: false,
                damp_auto,
                refine,
                ..Default::default()
            };
            let report = run(&source, &folder.path().join("out"), 2, options);
            let corrected = report.modules.iter().filter(|record| {
                record.layer > 0
                    && ["q_proj", "k_proj", "v_proj"].iter().any(|end| record.module.ends_with(end))
            });
            corrected.map(|record| record.relative_output_error.unwrap()).sum::<f64>()
        };
        let (before, after) = (error(0), error(2));
        assert!(after < 0.9 * before, "{damp_auto}: {after} {before}");
    }
}

#[test]
fn held_out_windows_choose_the_damping_of_each_stage() {
    for name in ["llama", "mixtral"] {
        let Some(source) = fixtures::dir(name) else { continue };
        let folder = tempfile::tempdir().unwrap();
        let options = QuantizeOptions { bits: Bits::B3, damp_auto: true, ..Default::default() };
        let report = run(&source, &folder.path().join("two"), 2, options.clone());
        assert_eq!(report.quantize_config["meta"]["damp_percent_auto"], true);
        assert!(report.quantize_config.get("damp_percent").is_none());
        let tried = [0.01, 0.025, 0.05, 0.1, 0.2, 0.4];
        for record in &report.modules {
            assert!(tried.contains(&record.damp_percent), "{record:?}");
            assert!([0.0, 0.02, 0.05, 0.1, 0.2].contains(&record.shrink), "{record:?}");
            // In the end all windows count.
            if record.expert.is_none() {
                assert_eq!(record.nsamples as usize, 16 * LENGTH);
            }
        }
        // Few random tokens deserve more than the usual damping.
        assert!(report.modules.iter().any(|record| record.damp_percent > 0.05));
        assert!(report.modules.iter().any(|record| record.shrink > 0.0));
        run(&source, &folder.path().join("one"), 1, options.clone());
        assert!(bytes(&folder.path().join("one")) == bytes(&folder.path().join("two")));
        let options = QuantizeOptions { true_sequential: false, ..options };
        run(&source, &folder.path().join("together"), 2, options.clone());
        // A damping that a rule gives is that, with nothing that was chosen for another.
        let rules = r#"{".*[qv]_proj$": {"damp_percent": 0.025}}"#;
        let dynamic = Dynamic::from_map(&serde_json::from_str(rules).unwrap()).unwrap();
        let options = QuantizeOptions { dynamic, ..options };
        let report = run(&source, &folder.path().join("rules"), 2, options);
        let of_rule = |record: &&ModuleRecord| {
            record.module.ends_with("q_proj") || record.module.ends_with("v_proj")
        };
        assert!(report.modules.iter().filter(of_rule).count() > 0);
        for record in report.modules.iter().filter(of_rule) {
            assert_eq!((record.damp_percent, record.shrink), (0.025, 0.0), "{record:?}");
        }
    }
}
