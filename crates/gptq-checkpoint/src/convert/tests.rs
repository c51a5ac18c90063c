use std::path::Path;

use gptq_format::gguf::{GgufFile, GgufValue};
use gptq_format::{Checkpoint, CheckpointFormat, DType, GptqLinear};
use gptq_model::Spec;
use serde_json::{Value, json};

use super::*;
use crate::testing::Edit;
use crate::verify;

fn options(target: Target) -> ConvertOptions {
    ConvertOptions { target, lossy: false, overwrite: false, max_shard_bytes: u64::MAX }
}

const GGUF: Target = Target::Gguf;

fn run(from: &Path, to: &Path, options: &ConvertOptions) -> Result<Converted> {
    convert(&Checkpoint::open(from).unwrap(), to, options, &|done, total| assert!(done < total))
}

/// A fixture with the tokenizer of its source; `None` where there is none.
fn with_tokenizer(name: &str) -> Option<(tempfile::TempDir, Edit)> {
    let edit = Edit::fixture(&format!("quant/{name}"))?;
    let dir = tempfile::tempdir().unwrap();
    edit.write(dir.path(), u64::MAX);
    write_tokenizer(dir.path());
    Some((dir, edit))
}

fn write_tokenizer(dir: &Path) {
    let tokenizer = gptq_testkit::byte_level_tokenizer().to_string();
    std::fs::write(dir.join("tokenizer.json"), tokenizer).unwrap();
    let config = json!({"bos_token": "\"", "eos_token": "#", "pad_token": "!"});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

fn modules(checkpoint: &Checkpoint) -> Vec<(String, GptqLinear)> {
    let config = checkpoint.quantize_config.as_ref().unwrap();
    let names = crate::modules::quantized(checkpoint, &[]);
    let load = |name: &String| GptqLinear::load(&checkpoint.tensors, name, config, None).unwrap();
    names.iter().map(|name| (name.clone(), load(name))).collect()
}

#[test]
fn lossless_cases_are_equal_to_the_bit() {
    for (name, to) in [
        ("b4_g32_sym.gptq", "Q4_0"),
        ("b4_g128_sym.gptq", "Q4_0"),
        ("b4_gm1_sym.gptq", "Q4_0"),
        ("b4_gm1_sym_desc.gptq", "Q4_0"),
        ("b4_g64_sym_tail.gptq_v2", "Q4_0"),
        ("b8_g32_sym.gptq", "Q8_0"),
    ] {
        let Some((dir, _)) = with_tokenizer(name) else { continue };
        let path = dir.path().join("m.gguf");
        let converted = run(dir.path(), &path, &options(GGUF)).unwrap();
        assert_eq!(converted.modules.len(), 14, "{name}");
        assert!(converted.modules.iter().all(|m| m.to == to && m.exact), "{name}");
        let source = Checkpoint::open(dir.path()).unwrap();
        let gguf = Checkpoint::open(&path).unwrap();
        for (module, linear) in modules(&source) {
            let shape = [linear.out_features, linear.in_features];
            let read = gguf.tensors.read_f32(&format!("{module}.weight"), &shape).unwrap();
            let same =
                linear.dequantize().iter().zip(&read).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name}: {module}");
        }
        for tensor in ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"] {
            let shape = &source.tensors.info(tensor).unwrap().shape;
            assert_eq!(
                source.tensors.read_f32(tensor, shape).unwrap(),
                gguf.tensors.read_f32(tensor, shape).unwrap()
            );
        }
        let stored = |name: &str| gguf.tensors.info(name).unwrap().dtype;
        assert_eq!(stored("model.embed_tokens.weight"), DType::F16);
        assert_eq!(stored("model.norm.weight"), DType::F32);
        assert_eq!(Spec::for_checkpoint(&gguf).unwrap(), Spec::for_checkpoint(&source).unwrap());
        let (old, new) = (source.tokenizer().unwrap(), gguf.tokenizer().unwrap());
        assert_eq!(old.encode("a b, 12", true).unwrap(), new.encode("a b, 12", true).unwrap());
        assert_eq!((old.bos_id(), old.eos_id()), (new.bos_id(), new.eos_id()));
    }
}

#[test]
fn llama_cpp_finds_the_keys_that_it_asks_for() {
    let Some((dir, _)) = with_tokenizer("b4_gm1_sym.gptq") else { return };
    let path = dir.path().join("m.gguf");
    run(dir.path(), &path, &options(GGUF)).unwrap();
    let gguf = GgufFile::open(&path).unwrap();
    for (key, value) in [
        ("llama.block_count", 2),
        ("llama.context_length", 128),
        ("llama.embedding_length", 128),
        ("llama.feed_forward_length", 256),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.rope.dimension_count", 32),
        ("llama.vocab_size", 256),
        ("general.file_type", 2),
        ("general.quantization_version", 2),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
    ] {
        assert_eq!(gguf.value(key), Some(&GgufValue::Uint(value)), "{key}");
    }
    assert_eq!(gguf.value("llama.rope.freq_base"), Some(&GgufValue::F32(10000.0)));
    assert_eq!(gguf.str("general.architecture").unwrap(), Some("llama"));
    assert_eq!(gguf.str("tokenizer.ggml.pre").unwrap(), Some("gpt-2"));
    assert!(
        gguf.tensor("blk.1.ffn_down.weight").is_some() && gguf.tensor("output.weight").is_some()
    );
}

#[test]
fn what_is_not_lossless_is_refused_by_module_and_said_with_lossy() {
    for (name, part, to, exact, worst) in [
        ("b4_g32_asym.gptq", "asymmetric", "Q4_1", false, 1e-3),
        ("b4_g32_sym_desc.gptq", "activation order", "Q8_0", false, 1e-2),
        ("b8_g32_asym.gptq", "asymmetric", "Q8_0", false, 1e-2),
        ("b2_g32_sym.gptq", "2-bit", "Q8_0", true, 0.0),
        ("b3_g32_asym.gptq", "3-bit", "Q8_0", true, 0.0),
        ("b3_g32_asym_desc.gptq", "activation order", "Q8_0", false, 1e-2),
    ] {
        let Some((dir, _)) = with_tokenizer(name) else { continue };
        let path = dir.path().join("m.gguf");
        let message = run(dir.path(), &path, &options(GGUF)).unwrap_err().to_string();
        assert!(message.contains("model.layers.0."), "{message}");
        assert!(message.contains(part) && message.contains("--lossy would"), "{message}");
        assert!(!path.exists());

        let lossy = ConvertOptions { lossy: true, ..options(GGUF) };
        let converted = run(dir.path(), &path, &lossy).unwrap();
        assert!(converted.modules.iter().any(|m| m.to == to && m.exact == exact), "{name}");
        assert_eq!(converted.notes.is_empty(), exact, "{name}: {:?}", converted.notes);
        let gguf = Checkpoint::open(&path).unwrap();
        for (module, linear) in modules(&Checkpoint::open(dir.path()).unwrap()) {
            let shape = [linear.out_features, linear.in_features];
            let read = gguf.tensors.read_f32(&format!("{module}.weight"), &shape).unwrap();
            let weights = linear.dequantize();
            let largest = weights.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let error = weights.iter().zip(&read).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(error <= worst * largest, "{name}: {module}: {error} of {largest}");
        }
    }
}

#[test]
fn the_zero_point_conventions_are_exchanged() {
    for (from, to, format) in [
        ("b4_g32_sym_desc.gptq", "b4_g32_sym_desc.gptq_v2", CheckpointFormat::GptqV2),
        ("b4_g32_sym_desc.gptq_v2", "b4_g32_sym_desc.gptq", CheckpointFormat::Gptq),
        ("b4_g64_sym_tail.gptq", "b4_g64_sym_tail.gptq_v2", CheckpointFormat::GptqV2),
        ("b4_g64_sym_tail.gptq_v2", "b4_g64_sym_tail.gptq", CheckpointFormat::Gptq),
        ("b4_g32_asym.gptq", "b4_g32_asym.gptq_v2", CheckpointFormat::GptqV2),
        ("b2_g32_asym.gptq", "b2_g32_asym.gptq_v2", CheckpointFormat::GptqV2),
        ("b3_g32_asym.gptq", "b3_g32_asym.gptq_v2", CheckpointFormat::GptqV2),
        ("b8_g32_asym.gptq", "b8_g32_asym.gptq_v2", CheckpointFormat::GptqV2),
    ] {
        let (Some(source), Some(expected)) = (
            gptq_testkit::fixtures::dir(&format!("quant/{from}")),
            Edit::fixture(&format!("quant/{to}")),
        ) else {
            continue;
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        run(&source, &path, &options(Target::Gptq(format))).unwrap();
        // GPTQModel wrote both, so every tensor has to be equal.
        let written = Checkpoint::open(&path).unwrap();
        assert_eq!(written.tensors.names().count(), expected.tensors.len(), "{from}");
        for (name, (dtype, shape, bytes)) in &expected.tensors {
            let info = written.tensors.info(name).unwrap();
            assert_eq!((&info.dtype, &info.shape), (dtype, shape), "{from}: {name}");
            assert_eq!(&*written.tensors.bytes(name).unwrap(), bytes.as_slice(), "{from}: {name}");
        }
        let config = written.quantize_config.as_ref().unwrap();
        assert_eq!(config.format, format);
        assert_eq!(config.meta["quantizer"][0].as_str().unwrap()[..8], *"gptq-rs:");
        assert!(verify(&path).unwrap().is_sound(), "{from}");
    }
}

#[test]
fn a_true_zero_of_zero_has_no_form_in_v1() {
    let Some(source) = gptq_testkit::fixtures::dir("quant/b4_g32_asym.gptq_v2") else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let v1 = options(Target::Gptq(CheckpointFormat::Gptq));
    let message = run(&source, &path, &v1).unwrap_err().to_string();
    assert!(message.contains("_proj") && message.contains("gptq_v2"), "{message}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn group_indices_that_early_writers_left_out_are_written() {
    let Some(mut edit) = Edit::fixture("quant/b8_g32_sym.gptq") else { return };
    let (q, k) = ("model.layers.0.self_attn.q_proj.g_idx", "model.layers.0.self_attn.k_proj.g_idx");
    let whole = edit.tensors[q].clone();
    edit.tensors.remove(q);
    edit.put_words(k, [0; 128]);
    edit.config["quantization_config"]["model_file_base_name"] = json!("gptq_model-8bit-32g");
    let dir = tempfile::tempdir().unwrap();
    edit.write(&dir.path().join("in"), 200_000);
    let out = dir.path().join("out");
    let options = ConvertOptions {
        max_shard_bytes: 300_000,
        ..options(Target::Gptq(CheckpointFormat::Gptq))
    };
    run(&dir.path().join("in"), &out, &options).unwrap();
    let written = Checkpoint::open(&out).unwrap();
    for name in [q, k] {
        assert_eq!(&*written.tensors.bytes(name).unwrap(), whole.2.as_slice());
    }
    assert!(out.join("model.safetensors.index.json").exists());
    assert!(written.quantize_config.unwrap().other.is_empty());
    assert!(verify(&out).unwrap().findings.is_empty());
}

#[test]
fn floats_are_the_dequantized_weights_rounded_to_f16() {
    for name in ["b4_g32_asym.gptq", "b3_g32_asym_desc.gptq", "b4_gm1_sym.gptq"] {
        let Some((source, _)) = with_tokenizer(name) else { continue };
        let out = source.path().join("out");
        let converted = run(source.path(), &out, &options(Target::Hf)).unwrap();
        assert_eq!(converted.modules.len(), 14);
        let written = Checkpoint::open(&out).unwrap();
        assert!(written.quantize_config.is_none());
        assert!(!out.join("quantize_config.json").exists() && out.join("tokenizer.json").exists());
        assert_eq!(written.config.str("dtype").unwrap(), "float16");
        assert_eq!(written.tensors.total_bytes(), converted.output_bytes);
        let checkpoint = Checkpoint::open(source.path()).unwrap();
        for (module, linear) in modules(&checkpoint) {
            let shape = [linear.out_features, linear.in_features];
            let read = written.tensors.read_f16(&format!("{module}.weight"), &shape).unwrap();
            let rounded = linear.dequantize().into_iter().map(half::f16::from_f32);
            assert!(read.iter().copied().eq(rounded), "{name}: {module}");
        }
        gptq_model::Model::load(&written).unwrap();
    }
}

#[test]
fn gguf_is_imported_as_floats() {
    let Some((dir, _)) = with_tokenizer("b4_gm1_sym.gptq") else { return };
    let (gguf, out) = (dir.path().join("m.gguf"), dir.path().join("hf"));
    run(dir.path(), &gguf, &options(GGUF)).unwrap();
    run(&gguf, &out, &options(Target::Hf)).unwrap();
    let direct = dir.path().join("direct");
    run(dir.path(), &direct, &options(Target::Hf)).unwrap();
    let (through, direct) = (Checkpoint::open(&out).unwrap(), Checkpoint::open(&direct).unwrap());
    assert_eq!(
        through.tensors.names().collect::<Vec<_>>(),
        direct.tensors.names().collect::<Vec<_>>()
    );
    for name in direct.tensors.names() {
        let shape = &direct.tensors.info(name).unwrap().shape;
        let read = |c: &Checkpoint| c.tensors.read_f32(name, shape).unwrap();
        assert_eq!(read(&through), read(&direct), "{name}");
    }
    assert_eq!(Spec::for_checkpoint(&through).unwrap(), Spec::for_checkpoint(&direct).unwrap());
    assert!(through.tokenizer().is_ok());
    for target in [GGUF, Target::Gptq(CheckpointFormat::Gptq)] {
        assert!(run(&gguf, &dir.path().join("x"), &options(target)).is_err());
    }
}

#[test]
fn architectures_of_the_fixtures_are_written_or_refused() {
    for (name, path) in gptq_testkit::fixtures::all() {
        let Ok(checkpoint) = Checkpoint::open(&path) else { continue };
        let Ok(spec) = Spec::for_checkpoint(&checkpoint) else { continue };
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&path).unwrap().flatten() {
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        std::fs::remove_file(dir.path().join("expected.safetensors")).unwrap();
        let mut tokenizer = gptq_testkit::byte_level_tokenizer();
        tokenizer["added_tokens"] = json!([]);
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let out = dir.path().join("m.gguf");
        let lossy = ConvertOptions { lossy: true, ..options(GGUF) };
        let result = run(dir.path(), &out, &lossy);
        let writable = ["llama", "mistral", "qwen2", "qwen3"].contains(&spec.family)
            && !["llama_rope_dynamic"].contains(&name.as_str());
        match result {
            Ok(converted) => {
                assert!(writable, "{name}");
                let mut again = Spec::for_checkpoint(&Checkpoint::open(&out).unwrap()).unwrap();
                // The vocabulary of a fixture may be larger than its 256 tokens; windows are left out.
                if !converted.notes.is_empty() {
                    assert!(converted.notes[0].contains("attends to all"), "{name}");
                    (again.family, again.layers) = (spec.family, spec.layers.clone());
                }
                assert_eq!(again, spec, "{name}");
            }
            Err(error) => assert!(!writable, "{name}: {error}"),
        }
    }
}

#[test]
fn an_existing_output_stays_unless_it_may_be_replaced() {
    let Some((dir, _)) = with_tokenizer("b4_gm1_sym.gptq") else { return };
    let out = dir.path().join("out");
    for target in [GGUF, Target::Hf, Target::Gptq(CheckpointFormat::GptqV2)] {
        let overwrite = ConvertOptions { overwrite: true, ..options(target) };
        run(dir.path(), &out, &options(target)).unwrap();
        assert!(run(dir.path(), &out, &options(target)).is_err());
        run(dir.path(), &out, &overwrite).unwrap();
        if out.is_dir() { std::fs::remove_dir_all(&out) } else { std::fs::remove_file(&out) }
            .unwrap();
    }
    let names: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .flatten()
        .map(|e| e.file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert_eq!(names, [""; 0]);
}

#[test]
fn float_checkpoints_are_told_to_quantize() {
    let dir = tempfile::tempdir().unwrap();
    gptq_testkit::tiny_llama(dir.path(), 5);
    let out = dir.path().join("out");
    let message = run(dir.path(), &out, &options(Target::Gptq(CheckpointFormat::Gptq)));
    assert!(message.unwrap_err().to_string().contains("gptq quantize"));
    // Floats can be written as floats.
    run(dir.path(), &dir.path().join("m.gguf"), &options(GGUF)).unwrap();
    run(dir.path(), &out, &options(Target::Hf)).unwrap();
    let written: Value =
        serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(written["torch_dtype"], "float16");
}

#[test]
fn configs_and_tensors_that_disagree_are_refused() {
    let refused = |change: &dyn Fn(&mut Edit), part: &str| {
        let Some(mut edit) = Edit::fixture("quant/b4_gm1_sym.gptq") else { return };
        change(&mut edit);
        let dir = tempfile::tempdir().unwrap();
        edit.write(&dir.path().join("in"), u64::MAX);
        write_tokenizer(&dir.path().join("in"));
        for target in [GGUF, Target::Hf] {
            let result = run(&dir.path().join("in"), &dir.path().join("out"), &options(target));
            match (target, result) {
                (GGUF, result) => {
                    let message = result.unwrap_err().to_string();
                    assert!(message.contains(part), "{message}");
                }
                // Floats are written as they are, whatever the config says of them.
                (_, Err(error)) => assert!(error.to_string().contains("model"), "{error}"),
                (_, Ok(_)) => {}
            }
            if target == GGUF {
                assert!(!dir.path().join("out").exists());
            }
        }
    };
    let q = "model.layers.0.self_attn.q_proj";
    let remove = |name: String| move |e: &mut Edit| drop(e.tensors.remove(&name));
    refused(&|e| e.config["vocab_size"] = json!(1 << 20), "embed_tokens");
    refused(&|e| e.config["hidden_size"] = json!(64), "embed_tokens");
    refused(&|e| e.config["intermediate_size"] = json!(512), "down_proj");
    refused(&remove(format!("{q}.scales")), "scales");
    refused(&remove("model.layers.1.input_layernorm.weight".into()), "input_layernorm");
    refused(&remove("lm_head.weight".into()), "lm_head");
    refused(&remove("model.norm.weight".into()), "model.norm");
    refused(&|e| e.config["hidden_act"] = json!("relu"), "SiLU");
    refused(
        &|e| {
            let bias = (DType::F16, vec![64], vec![0; 128]);
            e.tensors.insert(format!("{q}.bias"), bias);
        },
        "q_proj.bias",
    );
    refused(&|e| e.bytes(&format!("{q}.scales"))[1] = 0x7C, "finite");
    refused(&|e| e.put_words(&format!("{q}.g_idx"), [9; 128]), "group 9");
}
