//! AutoAWQ's checkpoints: inspected, verified, and turned into GPTQ's without a change of a weight.

use gptq_format::{Checkpoint, CheckpointFormat, GptqLinear};
use gptq_testkit::{awq, fixtures, safetensors_file};
use serde_json::json;

use super::{ConvertOptions, Target, convert};
use crate::verify::{Engine, verify};

const MODULE: &str = "model.layers.1.mlp.down_proj";

#[test]
fn gptq_of_awq_has_the_same_codes() {
    let Some(source) = fixtures::dir("quant/b4_g32_asym.gptq_v2") else { return };
    let folder = tempfile::tempdir().unwrap();
    awq::rewrite(&source, folder.path());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let seen = crate::inspect::inspect(&checkpoint).unwrap();
    assert_eq!((seen.format, seen.modules.len()), ("awq", 14));
    assert_eq!(seen.quantization.unwrap().checkpoint_format, "awq");
    assert_eq!(seen.modules[0].shape, [128, 128]);
    let report = verify(folder.path()).unwrap();
    assert!(report.is_sound(), "{:?}", report.findings);
    assert_eq!((report.format, report.modules), (Some("awq"), 14));
    let opens = |engine| report.engines.iter().any(|v| v.engine == engine && v.opens);
    assert!(opens(Engine::Vllm) && opens(Engine::Transformers) && !opens(Engine::Exllama));

    let options = |format| ConvertOptions {
        target: Target::Gptq(format),
        lossy: false,
        overwrite: true,
        max_shard_bytes: u64::MAX,
    };
    let out = folder.path().join("out");
    convert(&checkpoint, &out, &options(CheckpointFormat::GptqV2), &|_, _| ()).unwrap();
    let (original, written) = (Checkpoint::open(&source).unwrap(), Checkpoint::open(&out).unwrap());
    let config = written.quantize_config.as_ref().unwrap();
    assert!(!config.sym && config.format == CheckpointFormat::GptqV2);
    assert!(!config.other.contains_key("version") && !config.other.contains_key("zero_point"));
    for tensor in original.tensors.names() {
        let [a, b] = [&original, &written].map(|c| {
            let mut bytes = vec![0; c.tensors.info(tensor).unwrap().bytes];
            c.tensors.copy_bytes(tensor, 0, &mut bytes).unwrap();
            bytes
        });
        assert!(a == b, "{tensor}");
    }
    assert!(verify(&out).unwrap().is_sound());
    // Zero points of 0 have no place in v1.
    let config = original.quantize_config.as_ref().unwrap();
    let zero =
        GptqLinear::load(&original.tensors, MODULE, config, None).unwrap().zeros.contains(&0);
    let v1 = convert(&checkpoint, &out, &options(CheckpointFormat::Gptq), &|_, _| ());
    match v1 {
        Err(error) => assert!(error.to_string().contains("zero point"), "{error}"),
        Ok(_) => assert!(!zero),
    }
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let Some(source) = fixtures::dir("quant/b4_g32_asym.gptq_v2") else { return };
    let folder = tempfile::tempdir().unwrap();
    awq::rewrite(&source, folder.path());
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let expected = [128, 256];
    for (part, change) in [
        ("qweight", json!({ "shape": [1, 256, 16] })),
        ("qweight", json!({ "shape": [128, 32] })),
        ("qweight", json!({ "shape": [4096, 1] })),
        ("qweight", json!({ "dtype": "F32" })),
        ("qzeros", json!({ "shape": [16, 8] })),
        ("qzeros", json!({ "dtype": "F32" })),
        ("scales", json!({ "shape": [4, 256] })),
        ("scales", json!({ "dtype": "I16" })),
    ] {
        let edited = safetensors_file::edited(&whole, |header| {
            for (key, value) in change.as_object().unwrap() {
                header[&format!("{MODULE}.{part}")][key] = value.clone();
            }
        });
        std::fs::write(&path, edited).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let config = checkpoint.quantize_config.as_ref().unwrap();
        let load = GptqLinear::load(&checkpoint.tensors, MODULE, config, Some(expected));
        let message = load.unwrap_err().to_string();
        assert!(message.contains(MODULE) && message.contains(part), "{change}: {message}");
        let report = verify(folder.path()).unwrap();
        let named = |f: &crate::verify::Finding| format!("{f:?}").contains(MODULE);
        assert!(!report.is_sound() && report.findings.iter().any(named), "{change}");
    }
}
