//! AWQ through the pipeline: what is saved is a checkpoint like any other, whatever the threads, the
//! memory, and the interruptions.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use common::{Stop, calibration};
use gptq_compute::{Pool, Tensor};
use gptq_format::{Bits, Checkpoint};
use gptq_model::{EncodeInput, Model, Session, Spec};
use gptq_quantize::pipeline::Job;
use gptq_quantize::{Correction, Method, Progress, QuantReport, QuantizeOptions, quantize};
use gptq_testkit::{TinyLlama, difference, fixtures, safetensors_file};

const WINDOWS: usize = 8;
const LENGTH: usize = 48;

fn run(
    source: &Path,
    output: &Path,
    options: &QuantizeOptions,
    threads: usize,
    progress: &dyn Progress,
) -> gptq_quantize::Result<QuantReport> {
    let checkpoint = Checkpoint::open(source).unwrap();
    let vocab = Spec::for_checkpoint(&checkpoint).unwrap().vocab;
    let job = Job {
        checkpoint: &checkpoint,
        tokenizer: None,
        model: "fixture",
        calibration: Some(&calibration(vocab, WINDOWS, LENGTH)),
        options,
        output,
        plots: None,
        float_stream: None,
        pool: &Arc::new(Pool::new(threads)),
    };
    quantize(&job, progress)
}

fn hidden(directory: &Path) -> Tensor {
    let model = Model::load(&Checkpoint::open(directory).unwrap()).unwrap();
    let mut session = Session::new(Arc::new(Pool::new(2)));
    let ids: Vec<u32> = (0..40).map(|i| (i * 7 + 3) % 200).collect();
    let input = EncodeInput { ids: &ids, ..EncodeInput::default() };
    model.encode(&mut session, &[input]).unwrap().hidden.clone()
}

/// A small Llama some of whose channels are much larger than the others, as in large models.
fn outliers(dir: &Path) {
    TinyLlama::default().write(dir, 3);
    let path = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    for layer in 0..2 {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            let name = format!("model.layers.{layer}.{norm}.weight");
            let range = safetensors_file::range(&bytes, &name);
            for x in bytes[range].chunks_exact_mut(4).step_by(9) {
                let value = f32::from_le_bytes([x[0], x[1], x[2], x[3]]) * 12.0;
                x.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    std::fs::write(path, bytes).unwrap();
}

fn options(method: Method, bits: Bits) -> QuantizeOptions {
    QuantizeOptions {
        bits,
        group_size: 32,
        overwrite: true,
        awq_scales: method != Method::Awq,
        correction: Correction::None,
        ..QuantizeOptions::for_method(method)
    }
}

#[test]
fn the_model_stays_the_same_and_its_norms_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("model"), folder.path().join("out"));
    outliers(&source);
    let want = hidden(&source);
    let norm = "model.layers.1.input_layernorm.weight";
    let weights =
        |dir: &Path| Checkpoint::open(dir).unwrap().tensors.read_f32(norm, &[64]).unwrap();
    let nearest = QuantizeOptions { awq_scales: false, ..options(Method::Rtn, Bits::B8) };
    run(&source, &output, &nearest, 2, &()).unwrap();
    let rounded = difference(hidden(&output).as_slice(), want.as_slice()).rms;
    for method in [Method::Awq, Method::Gptq] {
        for true_sequential in [true, false] {
            let options = QuantizeOptions { true_sequential, ..options(method, Bits::B8) };
            let report = run(&source, &output, &options, 2, &()).unwrap();
            assert_eq!(report.quantize_config["meta"]["awq_scales"], true);
            let error = difference(hidden(&output).as_slice(), want.as_slice()).rms;
            // What is folded and does not cancel is off by as much as the outputs are large.
            assert!(error < 2.0 * rounded, "{method:?}: {error}, rounded to nearest {rounded}");
            assert!(difference(&weights(&output), &weights(&source)).rms > 0.1);
            for record in &report.modules {
                let awq = record.awq.as_ref().unwrap();
                assert!(awq.skipped.is_none() && awq.loss.unwrap() <= 1.0, "{record:?}");
                if record.module.contains("q_proj") {
                    assert!(awq.alpha.unwrap() > 0.0 && awq.loss.unwrap() < 0.9, "{record:?}");
                }
                assert!(record.relative_output_error.unwrap() < 1e-3, "{record:?}");
            }
        }
    }
    // Fewer errors than without, where channels are as unlike as these.
    let error = |options: &QuantizeOptions| {
        run(&source, &output, options, 2, &()).unwrap();
        difference(hidden(&output).as_slice(), want.as_slice()).rms
    };
    let awq = error(&options(Method::Awq, Bits::B4));
    let rtn = QuantizeOptions { awq_scales: false, ..options(Method::Rtn, Bits::B4) };
    assert!(awq < 0.9 * error(&rtn), "{awq} {}", error(&rtn));
}

#[test]
fn scales_are_found_on_all_windows() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("model"), folder.path().join("out"));
    outliers(&source);
    let alphas = |damp_auto| {
        let options = QuantizeOptions { damp_auto, ..options(Method::Gptq, Bits::B4) };
        let report = run(&source, &output, &options, 2, &()).unwrap();
        report.modules.iter().map(|m| m.awq.as_ref().unwrap().alpha).collect::<Vec<_>>()
    };
    // Of the first block, behind which the models differ; windows that are held out to choose a damping are not left out.
    assert_eq!(alphas(true)[..7], alphas(false)[..7]);
}

#[test]
fn bytes_depend_on_nothing_but_the_settings() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("model"), folder.path().join("out"));
    outliers(&source);
    for method in [Method::Awq, Method::Gptq] {
        let base = options(method, Bits::B4);
        let bytes = || std::fs::read(output.join("model.safetensors")).unwrap();
        run(&source, &output, &base, 1, &()).unwrap();
        let want = bytes();
        run(&source, &output, &base, 2, &()).unwrap();
        assert!(bytes() == want, "threads");
        // As little as a run with its activations on disk needs.
        let tight = QuantizeOptions { max_memory: Some(1), ..base.clone() };
        let refused = run(&source, &output, &tight, 2, &()).unwrap_err().to_string();
        assert!(refused.contains("--max-memory"), "{refused}");
        // Stopped behind the first block, with a norm of the second already changed.
        std::fs::remove_dir_all(&output).unwrap();
        let resume = QuantizeOptions { resume: true, overwrite: false, ..base };
        let stop = Stop(AtomicBool::new(true));
        let error = run(&source, &output, &resume, 2, &stop).unwrap_err().to_string();
        assert!(error.contains("stopped after 1 of 2"), "{error}");
        let unfinished: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path().join("model.safetensors"))
            .filter(|path| path.is_file() && !path.starts_with(&source))
            .collect();
        let [unfinished] = unfinished.as_slice() else { panic!("{unfinished:?}") };
        let mut half = std::fs::read(unfinished).unwrap();
        let name = "model.layers.1.input_layernorm.weight";
        let range = safetensors_file::range(&half, name);
        half[range].fill(0x11);
        std::fs::write(unfinished, half).unwrap();
        let report = run(&source, &output, &resume, 1, &()).unwrap();
        assert!(bytes() == want, "resumed");
        assert!(report.modules.iter().all(|record| record.awq.is_some()));
    }
}

#[test]
fn what_cannot_be_folded_is_left_and_told() {
    for (name, why) in [("mixtral", "router"), ("bert", "norm")] {
        let Some(source) = fixtures::dir(name) else { continue };
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let report = run(&source, &output, &options(Method::Gptq, Bits::B8), 2, &()).unwrap();
        let told = |w: &String| w.contains("AWQ") && w.contains(why);
        assert!(report.warnings.iter().any(told), "{name}: {:?}", report.warnings);
        let skipped = |r: &gptq_quantize::ModuleRecord| r.awq.as_ref().unwrap().skipped.is_some();
        assert!(report.modules.iter().any(skipped) && !report.modules.iter().all(skipped));
        assert!(hidden(&output).as_slice().iter().all(|x| x.is_finite()));
    }
}
