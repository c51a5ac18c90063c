//! Mixtures of experts and encoders through the pipeline: every expert is solved on its own tokens, and what is saved is
//! what was computed.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use gptq_compute::{Pool, Tensor};
use gptq_format::{Bits, Checkpoint};
use gptq_model::{EncodeInput, Model, Session, Spec};
use gptq_quantize::pipeline::Job;
use gptq_quantize::{
    CalibrationOptions, CalibrationReport, CalibrationSet, MoeFallback, QuantReport,
    QuantizeOptions, quantize,
};
use gptq_testkit::{difference, fixtures};
use serde_json::json;

const WINDOWS: usize = 16;
const LENGTH: usize = 48;

/// Relative error of the last hidden state at 8 bits: these random models are sensitive, and a Llama of this kind is at 0.027.
const LARGEST_ERROR: f64 = 0.06;
/// Relative error of a linear's output at 8 bits: that of the linears outside the experts is at most 2.4e-5.
const LARGEST_LINEAR_ERROR: f64 = 4e-5;

/// Windows of pseudo-random tokens.
fn calibration(vocab: usize, windows: usize) -> CalibrationSet {
    let token = |i: usize| (i * i * 31 + i * 17 + i / 7) as u32 % vocab as u32;
    let windows: Vec<Vec<u32>> =
        (0..windows).map(|w| (0..LENGTH).map(|i| token(w * 1009 + i)).collect()).collect();
    let options = CalibrationOptions { nsamples: windows.len(), seqlen: LENGTH, seed: 0 };
    let report = CalibrationReport::new(Vec::new(), &windows, &options, vocab);
    CalibrationSet::from_windows(windows, report)
}

fn run(source: &Path, output: &Path, windows: usize, options: QuantizeOptions) -> QuantReport {
    let checkpoint = Checkpoint::open(source).unwrap();
    let vocab = Spec::for_checkpoint(&checkpoint).unwrap().vocab;
    let options = QuantizeOptions { group_size: 32, overwrite: true, ..options };
    let job = Job {
        checkpoint: &checkpoint,
        tokenizer: None,
        model: "fixture",
        calibration: Some(&calibration(vocab, windows)),
        options: &options,
        output,
        plots: None,
        float_stream: None,
        pool: &Arc::new(Pool::new(2)),
    };
    quantize(&job, &()).unwrap()
}

/// The last hidden state of a text that is not among the windows.
fn hidden(directory: &Path) -> Tensor {
    let model = Model::load(&Checkpoint::open(directory).unwrap()).unwrap();
    let mut session = Session::new(Arc::new(Pool::new(2)));
    let ids: Vec<u32> = (0..40).map(|i| (i * 7 + 3) % model.spec().vocab.min(200) as u32).collect();
    let input = EncodeInput { ids: &ids, ..EncodeInput::default() };
    model.encode(&mut session, &[input]).unwrap().hidden.clone()
}

/// The median over the tokens of the relative error: in random models some tokens lie between two experts, and the
/// smallest error sends them to the other one.
fn error_of(source: &Path, output: &Path) -> f64 {
    let (got, want) = (hidden(output), hidden(source));
    let mut errors: Vec<f64> =
        (0..got.rows()).map(|row| difference(got.row(row), want.row(row)).rms).collect();
    errors.sort_by(f64::total_cmp);
    errors[errors.len() / 2]
}

#[test]
fn experts_are_solved_on_the_tokens_routed_to_them() {
    for (name, top_k, blocks) in
        [("mixtral", 2, 0..2), ("qwen2_moe", 2, 0..2), ("qwen3_moe", 2, 1..2)]
    {
        let Some(source) = fixtures::dir(name) else { continue };
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let options = QuantizeOptions { bits: Bits::B8, ..Default::default() };
        let report = run(&source, &output, WINDOWS, options);
        for layer in blocks {
            let ends = ["down_proj", "w2"];
            let of_experts = report.modules.iter().filter(|record| {
                record.layer == layer && ends.iter().any(|end| record.module.ends_with(end))
            });
            let tokens: Vec<u64> = of_experts
                .filter_map(|record| record.expert.as_ref().map(|expert| expert.tokens))
                .collect();
            assert!(tokens.len() >= 4, "{name}: {tokens:?}");
            assert_eq!(tokens.iter().sum::<u64>() as usize, top_k * WINDOWS * LENGTH, "{name}");
        }
        for record in &report.modules {
            let linear_error = record.relative_output_error.unwrap();
            assert!(linear_error < LARGEST_LINEAR_ERROR, "{name}: {record:?}");
            let last = record.module.rsplit('.').next();
            assert_ne!(last, Some("gate"), "{name}: the router stays a float");
            assert_eq!(record.expert.is_some(), record.module.contains(".experts."), "{name}");
            if let Some(expert) = &record.expert {
                assert_eq!(record.nsamples, expert.tokens, "{name} {}", record.module);
                assert_eq!(expert.fallback, None);
            }
        }
        // transformers 4 has routers among its linears and is told that they are none of ours.
        let config = Checkpoint::open(&output).unwrap().quantize_config.unwrap();
        let listed: Vec<Vec<String>> =
            serde_json::from_value(config.modules_in_block_to_quantize.unwrap()).unwrap();
        let listed: HashSet<String> = listed.into_iter().flatten().collect();
        let quantized = report.modules.iter().map(|record| record.module.clone()).collect();
        assert_eq!(listed, quantized, "{name}");
        let error = error_of(&source, &output);
        assert!(error < LARGEST_ERROR, "{name}: {error}");
    }
}

#[test]
fn an_expert_without_tokens_falls_back_as_asked() {
    let Some(source) = fixtures::dir("qwen2_moe") else { return };
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    for true_sequential in [true, false] {
        for moe_fallback in [MoeFallback::Rtn, MoeFallback::AllTokens] {
            // 48 tokens for 6 experts whose stages have 64 and 32 inputs.
            let report = run(
                &source,
                &output,
                1,
                QuantizeOptions {
                    bits: Bits::B8,
                    true_sequential,
                    moe_fallback,
                    ..Default::default()
                },
            );
            let mut starved = 0;
            for record in &report.modules {
                let Some(expert) = &record.expert else { continue };
                let few = expert.tokens == 0 || expert.tokens * 4 < record.shape[1] as u64;
                let want = few.then(|| moe_fallback.name().to_owned());
                assert_eq!(expert.fallback, want, "{record:?}");
                let fitted = match (few, moe_fallback) {
                    (false, _) => expert.tokens,
                    (true, MoeFallback::Rtn) => 0,
                    (true, MoeFallback::AllTokens) => LENGTH as u64,
                };
                assert_eq!(record.nsamples, fitted, "{record:?}");
                starved += usize::from(few);
            }
            assert!(starved > 0, "no expert saw too few tokens");
            let told = report.warnings.iter().filter(|w| w.contains(moe_fallback.name())).count();
            assert!((1..=2).contains(&told), "{:?}", report.warnings);
            let error = error_of(&source, &output);
            assert!(error < LARGEST_ERROR, "{moe_fallback:?}: {error}");
        }
    }
}

#[test]
fn encoders_are_quantized_like_decoders() {
    for (name, blocks) in [
        ("bert", "encoder.layer"),
        ("bert_mlm", "bert.encoder.layer"),
        ("roberta", "encoder.layer"),
        ("distilbert", "transformer.layer"),
        ("deberta_v2", "deberta.encoder.layer"),
        ("deberta_v2_own", "deberta.encoder.layer"),
    ] {
        let Some(source) = fixtures::dir(name) else { continue };
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let options = QuantizeOptions { bits: Bits::B8, ..Default::default() };
        let report = run(&source, &output, WINDOWS, options);
        assert_eq!(report.modules.len(), 2 * 6, "{name}");
        // transformers does not find the blocks of an encoder by itself.
        let config = Checkpoint::open(&output).unwrap().quantize_config.unwrap();
        assert_eq!(config.other["block_name_to_quantize"], blocks, "{name}");
        // Nor does it know which linears of a block stay floats.
        let listed = config.modules_in_block_to_quantize.map(|listed| listed[1].clone());
        let out = (name == "deberta_v2_own").then(|| json!(["attention.output.dense"]));
        assert_eq!(listed, out, "{name}");
        assert!(report.modules.iter().all(|r| r.nsamples == (WINDOWS * LENGTH) as u64));
        let error = error_of(&source, &output);
        assert!(error < LARGEST_ERROR, "{name}: {error}");
    }
}
