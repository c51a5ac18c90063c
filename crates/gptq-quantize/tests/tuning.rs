//! Block-wise tuning through the pipeline: what it may change, that it helps, and that the bytes depend on nothing
//! but the settings.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use common::{Stop, calibration};
use gptq_compute::{Pool, Tensor};
use gptq_format::{Bits, Checkpoint, CheckpointFormat, Dynamic};
use gptq_model::{
    Block, BlockState, Ctx, Embedder, EncodeInput, LinearSource, Model, NormPlace, Session, Spec,
};
use gptq_quantize::pipeline::Job;
use gptq_quantize::{
    CalibrationSet, Correction, Method, Progress, QuantReport, QuantizeOptions, quantize,
};
use gptq_testkit::{TinyLlama, fixtures, models_with_head_norms, safetensors_file};

const LENGTH: usize = 48;
/// Windows of one chunk, and of three of which the last is shorter than the others.
const FEW: usize = 8;
const MANY: usize = 100;

fn windows_for(spec: &Spec, count: usize) -> CalibrationSet {
    calibration(spec.vocab, count, LENGTH.min(spec.max_positions))
}

fn with_job<T>(
    source: &Path,
    output: &Path,
    options: &QuantizeOptions,
    (windows, threads): (usize, usize),
    work: impl FnOnce(&Job<'_>) -> T,
) -> T {
    let checkpoint = Checkpoint::open(source).unwrap();
    let spec = Spec::for_checkpoint(&checkpoint).unwrap();
    work(&Job {
        checkpoint: &checkpoint,
        tokenizer: None,
        model: "fixture",
        calibration: Some(&windows_for(&spec, windows)),
        options,
        output,
        plots: None,
        float_stream: None,
        pool: &Arc::new(Pool::new(threads)),
    })
}

fn run(source: &Path, output: &Path, options: &QuantizeOptions) -> QuantReport {
    with_job(source, output, options, (MANY, 2), |job| quantize(job, &())).unwrap()
}

fn options(bits: Bits) -> QuantizeOptions {
    QuantizeOptions {
        bits,
        group_size: 16,
        tune_blocks: 4,
        overwrite: true,
        ..QuantizeOptions::default()
    }
}

fn hidden(directory: &Path) -> Tensor {
    let model = Model::load(&Checkpoint::open(directory).unwrap()).unwrap();
    let mut session = Session::new(Arc::new(Pool::new(2)));
    let vocab = model.spec().vocab as u32;
    let ids: Vec<u32> = (0..12).map(|i| (i * 7 + 3) % vocab).collect();
    let input = EncodeInput { ids: &ids, ..EncodeInput::default() };
    model.encode(&mut session, &[input]).unwrap().hidden.clone()
}

/// Mean over the calibration tokens of the relative squared error of the first block's output, in f64.
fn error_of_first_block(source: &Path, output: &Path) -> f64 {
    let ctx = &mut Ctx::new(Arc::new(Pool::new(2)));
    let mut output_of = |directory: &Path| -> Vec<Tensor> {
        let checkpoint = Checkpoint::open(directory).unwrap();
        let spec = Arc::new(Spec::for_checkpoint(&checkpoint).unwrap());
        let embedder = Embedder::load(&checkpoint, &spec, LinearSource::Copied).unwrap();
        let block = Block::load(&checkpoint, &spec, 0, LinearSource::Copied).unwrap();
        let run = |ids: &Vec<u32>| {
            let mut state = BlockState::default();
            let positions: Vec<u32> = (0..ids.len() as u32).collect();
            embedder.forward(ctx, ids, &positions, &mut state.hidden).unwrap();
            // Both blocks read what the checkpoint holds, whose floats are f16.
            block.run_whole(ctx, &mut state, std::slice::from_ref(&(0..ids.len()))).unwrap();
            state.hidden
        };
        windows_for(&spec, MANY).windows.iter().map(run).collect()
    };
    let (float, quantized) = (output_of(source), output_of(output));
    let (mut sum, mut tokens) = (0.0, 0);
    for (float, quantized) in float.iter().zip(&quantized) {
        for row in 0..float.rows() {
            let squares = float.row(row).iter().zip(quantized.row(row)).map(|(x, y)| {
                (f64::from(*x) * f64::from(*x), (f64::from(*x) - f64::from(*y)).powi(2))
            });
            let (square, error) = squares.fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
            sum += error / square;
            tokens += 1;
        }
    }
    sum / f64::from(tokens)
}

fn bytes(directory: &Path, tensor: &str) -> Vec<u8> {
    let file = std::fs::read(directory.join("model.safetensors")).unwrap();
    file[safetensors_file::range(&file, tensor)].to_vec()
}

#[test]
fn scales_and_norms_move_and_nothing_else_does() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("model"), folder.path().join("out"));
    let plain = folder.path().join("plain");
    TinyLlama::default().write(&source, 3);
    for true_sequential in [true, false] {
        let tuned = QuantizeOptions { true_sequential, ..options(Bits::B4) };
        let report = run(&source, &output, &tuned);
        let without = QuantizeOptions { tune_blocks: 0, ..tuned };
        let report_without = run(&source, &plain, &without);
        assert!(report_without.tuning.is_empty());
        assert_eq!(report.tuning.iter().map(|t| t.layer).collect::<Vec<_>>(), [0, 1]);
        for tuning in &report.tuning {
            let part = tuning.error_after.unwrap() / tuning.error_before;
            assert!(tuning.kept && part < 0.95, "{tuning:?}");
        }
        assert_eq!(report.quantize_config["meta"]["tune_blocks"], 4);
        assert_eq!(report.bits_per_weight, report_without.bits_per_weight);
        // The first block read the same inputs, and was tuned when all of its codes were found.
        let checkpoint = Checkpoint::open(&output).unwrap();
        for name in checkpoint.tensors.names().filter(|name| !name.contains("layers.1.")) {
            let scale = name.ends_with(".scales") || name.contains("layernorm");
            let same = bytes(&output, name) == bytes(&plain, name);
            assert!(same != scale, "{name}");
        }
        // What is told is what the saved block computes.
        let first = report.tuning[0];
        for (directory, told) in [(&plain, Some(first.error_before)), (&output, first.error_after)]
        {
            let error = error_of_first_block(&source, directory);
            assert!((error / told.unwrap() - 1.0).abs() < 1e-4, "{error} {told:?}");
        }
    }
}

#[test]
fn a_block_without_errors_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("model"), folder.path().join("out"));
    let plain = folder.path().join("plain");
    TinyLlama::default().write(&source, 3);
    // Both sublayers of the second block give nothing.
    let path = source.join("model.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    for module in ["self_attn.o_proj", "mlp.down_proj"] {
        let range = safetensors_file::range(&file, &format!("model.layers.1.{module}.weight"));
        file[range].fill(0);
    }
    std::fs::write(path, file).unwrap();
    let report = run(&source, &output, &options(Bits::B3));
    let [first, second] = report.tuning.as_slice() else { panic!("{:?}", report.tuning) };
    assert!(first.kept && !second.kept);
    assert_eq!((second.error_before, second.error_after), (0.0, Some(0.0)));
    run(&source, &plain, &QuantizeOptions { tune_blocks: 0, ..options(Bits::B3) });
    let norm = "model.layers.1.post_attention_layernorm.weight";
    assert!(bytes(&output, norm) == bytes(&plain, norm));
    assert!(hidden(&output).as_slice().iter().all(|x| x.is_finite()));
}

#[test]
fn other_orders_formats_and_blocks_that_stay_floats() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("model"), folder.path().join("out"));
    TinyLlama::default().write(&source, 3);
    let rules = |json: &str| Dynamic::from_map(&serde_json::from_str(json).unwrap()).unwrap();
    let base = options(Bits::B4);
    let cases = [
        ("desc_act", QuantizeOptions { desc_act: true, act_group_aware: false, ..base.clone() }),
        ("v2", QuantizeOptions { format: CheckpointFormat::GptqV2, ..base.clone() }),
        ("damp", QuantizeOptions { damp_auto: true, ..base.clone() }),
        ("head", QuantizeOptions { lm_head: true, ..base.clone() }),
        ("asym", QuantizeOptions { sym: false, ..base.clone() }),
        ("float", QuantizeOptions { dynamic: rules(r#"{"-:.*q_proj": {}}"#), ..base.clone() }),
        ("block", QuantizeOptions { dynamic: rules(r#"{"-:.*layers\\.0\\..*": {}}"#), ..base }),
    ];
    for (name, options) in cases {
        let report = run(&source, &output, &options);
        let layers: Vec<usize> = report.tuning.iter().map(|tuning| tuning.layer).collect();
        let all = name != "block";
        assert_eq!(layers, if all { vec![0, 1] } else { vec![1] }, "{name}");
        assert!(report.tuning.iter().all(|tuning| tuning.kept), "{name}: {:?}", report.tuning);
        assert!(hidden(&output).as_slice().iter().all(|x| x.is_finite()), "{name}");
        if all {
            let error = error_of_first_block(&source, &output);
            let told = report.tuning[0].error_after.unwrap();
            // What is told comes from products of 16 bits where the processor has them.
            assert!((error / told - 1.0).abs() < 1e-3, "{name}: {error} {told}");
        }
    }
}

#[test]
fn bytes_depend_on_nothing_but_the_settings() {
    let folder = tempfile::tempdir().unwrap();
    let llama = folder.path().join("llama");
    TinyLlama::default().write(&llama, 3);
    let base = QuantizeOptions { tune_blocks: 2, ..options(Bits::B3) };
    let changed =
        ["model.layers.1.post_attention_layernorm.weight", "model.layers.1.mlp.up_proj.scales"];
    for (awq_scales, correction) in
        [(false, Correction::None), (true, Correction::None), (false, Correction::Qep)]
    {
        let options = QuantizeOptions { awq_scales, correction, ..base.clone() };
        check_bytes(&llama, &options, &changed);
    }
    let changed = [
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.mlp.experts.3.down_proj.scales",
        "model.layers.1.mlp.shared_expert.up_proj.scales",
    ];
    if let Some(experts) = fixtures::dir("qwen2_moe") {
        check_bytes(&experts, &base, &changed);
    }
    let changed = [
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.self_attn.q_layernorm.norms.1.weight",
    ];
    let models = models_with_head_norms(folder.path());
    for ((_, model), changed) in models.iter().zip(changed) {
        check_bytes(model, &base, &[changed]);
    }
}

/// The same bytes for any number of threads, and after a run that was stopped when it had `changed` these tensors of the
/// second block.
fn check_bytes(source: &Path, options: &QuantizeOptions, changed: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let all = || std::fs::read(output.join("model.safetensors")).unwrap();
    let once = |options: &QuantizeOptions, threads, progress: &dyn Progress| {
        with_job(source, &output, options, (MANY, threads), |job| quantize(job, progress))
    };
    let report = once(options, 1, &()).unwrap();
    let want = all();
    once(options, 3, &()).unwrap();
    assert!(all() == want, "threads");
    std::fs::remove_dir_all(&output).unwrap();
    let resume = QuantizeOptions { resume: true, overwrite: false, ..options.clone() };
    let stop = Stop(AtomicBool::new(true));
    let error = once(&resume, 2, &stop).unwrap_err().to_string();
    assert!(error.contains("stopped after 1 of 2"), "{error}");
    let unfinished: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path().join("model.safetensors"))
        .filter(|path| path.is_file())
        .collect();
    let [unfinished] = unfinished.as_slice() else { panic!("{unfinished:?}") };
    let mut half = std::fs::read(unfinished).unwrap();
    for name in changed {
        let range = safetensors_file::range(&half, name);
        half[range].fill(0x11);
    }
    std::fs::write(unfinished, half).unwrap();
    let resumed = once(&resume, 1, &()).unwrap();
    assert!(all() == want, "resumed");
    assert_eq!(resumed.tuning.len(), report.tuning.len());
    for (resumed, once) in resumed.tuning.iter().zip(&report.tuning) {
        // The journal's decimals may be a last place off.
        assert!((resumed.error_before / once.error_before - 1.0).abs() < 1e-12);
        assert_eq!(resumed.kept, once.kept);
    }
}

#[test]
fn every_family_with_gradients_is_tuned() {
    let mut tuned = 0;
    let models = tempfile::tempdir().unwrap();
    for (name, source) in fixtures::all().into_iter().chain(models_with_head_norms(models.path())) {
        let Ok(checkpoint) = Checkpoint::open(&source) else { continue };
        let Ok(spec) = Spec::for_checkpoint(&checkpoint) else { continue };
        if checkpoint.quantize_config.is_some() || name.starts_with("lora") {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let options = QuantizeOptions { tune_blocks: 4, ..options(Bits::B4) };
        let result = with_job(&source, &output, &options, (FEW, 2), |job| quantize(job, &()));
        if (0..spec.layer_count()).any(|layer| spec.check_gradients(layer).is_err()) {
            let error = result.unwrap_err().to_string();
            assert!(error.starts_with("tune_blocks: block "), "{name}: {error}");
            assert!(error.contains("no gradients of"), "{name}: {error}");
            assert!(!output.exists());
            continue;
        }
        let report = result.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(report.tuning.len(), spec.layer_count(), "{name}");
        let kept = report.tuning.iter().filter(|tuning| tuning.kept).count();
        assert_eq!(kept, spec.layer_count(), "{name}: {:?}", report.tuning);
        assert!(hidden(&output).as_slice().iter().all(|x| x.is_finite()), "{name}");
        let spec = Arc::new(spec);
        let block = |checkpoint| Block::load(checkpoint, &spec, 0, LinearSource::Copied).unwrap();
        let (before, after) = (block(&checkpoint), block(&Checkpoint::open(&output).unwrap()));
        for place in NormPlace::ALL {
            for (before, after) in before.norms(place).iter().zip(after.norms(place)) {
                let mut pairs =
                    before.weight.iter().zip(&after.weight).flat_map(|(x, y)| x.iter().zip(y));
                // By more than rounding to 16 bits.
                let moved = pairs.any(|(x, y)| (x - y).abs() > 1e-3 * x.abs());
                assert_eq!(moved, before.weight.is_some(), "{name}: {place:?}");
            }
        }
        tuned += 1;
    }
    // A clone without the shared data has a part of them.
    assert!(tuned >= 15 || fixtures::all().is_empty(), "{tuned} families");
}

#[test]
fn rounding_without_data_cannot_be_tuned() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("model"), folder.path().join("out"));
    TinyLlama::default().write(&source, 3);
    let rtn = QuantizeOptions { tune_blocks: 4, ..QuantizeOptions::for_method(Method::Rtn) };
    let error = with_job(&source, &output, &rtn, (FEW, 2), |job| quantize(job, &())).unwrap_err();
    assert!(error.to_string().starts_with("tune_blocks: needs calibration data"), "{error}");
    let many = QuantizeOptions { tune_blocks: 101, ..options(Bits::B4) };
    let error = with_job(&source, &output, &many, (FEW, 2), |job| quantize(job, &())).unwrap_err();
    assert!(error.to_string().starts_with("tune_blocks: at most 100"), "{error}");
}
