//! Checkpoints that GPTQModel wrote: read, dequantized and written again to the bit.

#![allow(clippy::print_stderr, reason = "a test that cannot find its data says so")]

use gptq_format::{
    Bits, Checkpoint, CheckpointFormat, Config, FormatError, GptqLinear, QuantizeConfig,
    TensorStore,
};
use half::bf16;
use std::path::{Path, PathBuf};

/// The folder of fixtures: `$GPTQ_SHARED/fixtures`, `shared/fixtures` beside the checkout, or the copies in it.
fn fixtures() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let candidates = [
        std::env::var_os("GPTQ_SHARED").map(|s| PathBuf::from(s).join("fixtures")),
        Some(manifest.join("../../../shared/fixtures")),
    ];
    let found = candidates.into_iter().flatten().find(|p| p.is_dir());
    found.unwrap_or_else(|| manifest.join("../../testdata/fixtures"))
}

/// Directories of `quant/` whose format is `gptq` or `gptq_v2`, or the planar ones.
fn checkpoints(planar: bool) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(fixtures().join("quant"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_dir() && p.extension().is_some_and(|e| (e == "gptq_p") == planar))
        .collect();
    found.sort();
    found
}

fn name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

fn modules(store: &TensorStore) -> Vec<&str> {
    store.names().filter_map(|n| n.strip_suffix(".qweight")).collect()
}

#[test]
fn configs_say_what_the_names_say() {
    let found = checkpoints(false);
    assert!(found.len() >= 12);
    for path in found {
        let from_config = Checkpoint::open(&path).unwrap().quantize_config.unwrap();
        let file = path.join("quantize_config.json");
        let value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let config = QuantizeConfig::from_json(&file, &value).unwrap();
        let empty = Config::new(&path.join("config.json"), serde_json::Map::new());
        assert_eq!(QuantizeConfig::load(&path, &empty).unwrap(), Some(config.clone()));
        for config in [config, from_config] {
            let (settings, format) = name(&path).split_once('.').unwrap();
            let parts: Vec<&str> = settings.split('_').collect();
            assert_eq!(format!("b{}", config.bits), parts[0], "{settings}");
            let group = config.group_size.to_string().replace('-', "m");
            assert_eq!(format!("g{group}"), parts[1], "{settings}");
            assert_eq!(config.sym, parts[2] == "sym", "{settings}");
            assert_eq!(config.desc_act, parts.contains(&"desc"), "{settings}");
            assert_eq!(config.format.as_str(), format, "{settings}");
            assert_eq!(config.damp_percent, Some(0.05), "{settings}");
        }
    }
}

#[test]
fn planar_checkpoints_are_refused() {
    let found = checkpoints(true);
    assert!(!found.is_empty());
    for path in found {
        let message = Checkpoint::open(&path).unwrap_err().to_string();
        assert!(message.contains("not supported"), "{message}");
    }
}

#[test]
fn dequantized_weights_are_equal_to_the_bit() {
    for path in checkpoints(false) {
        let checkpoint = Checkpoint::open(&path).unwrap();
        let config = checkpoint.quantize_config.as_ref().unwrap();
        let expected = TensorStore::open_file(&path.join("expected.safetensors")).unwrap();
        let mut compared = 0;
        for key in expected.names().filter(|n| n.starts_with("dequant.")) {
            let module = &key["dequant.".len()..];
            let shape = expected.info(key).unwrap().shape.clone();
            let size = Some([shape[0], shape[1]]);
            let linear = GptqLinear::load(&checkpoint.tensors, module, config, size).unwrap();
            let got: Vec<u32> = linear.dequantize().iter().map(|w| w.to_bits()).collect();
            let want = expected.read_f32(key, &shape).unwrap();
            // The reference multiplies too, so that 0 times a negative step is -0 in both.
            assert!(
                got.iter().zip(&want).all(|(g, w)| *g == w.to_bits()),
                "{} {module}",
                name(&path)
            );
            compared += 1;
        }
        assert_eq!(compared, 3, "{}", name(&path));
    }
}

#[test]
fn packed_tensors_are_written_as_they_were_read() {
    let mut refused = 0;
    for path in checkpoints(false) {
        let checkpoint = Checkpoint::open(&path).unwrap();
        let (store, config) = (&checkpoint.tensors, checkpoint.quantize_config.as_ref().unwrap());
        let modules = modules(store);
        assert_eq!(modules.len(), 14);
        for module in modules {
            let linear = GptqLinear::load(store, module, config, None).unwrap();
            let encoded = match linear.encode(module, config.format) {
                Ok(encoded) => encoded,
                Err(FormatError::ZeroPointZero { .. }) => {
                    assert_eq!(config.format, CheckpointFormat::Gptq);
                    assert!(linear.zeros.contains(&0));
                    refused += 1;
                    // Still, v2 holds the same weights.
                    linear.encode(module, CheckpointFormat::GptqV2).unwrap();
                    continue;
                }
                Err(other) => panic!("{other}"),
            };
            assert_eq!(encoded.len(), 4);
            for (spec, bytes) in encoded {
                let info = store.info(&spec.name).unwrap();
                assert_eq!((info.dtype, &info.shape), (spec.dtype, &spec.shape), "{}", spec.name);
                let stored = store.bytes(&spec.name).unwrap();
                assert!(stored.as_ref() == bytes, "{} {}", name(&path), spec.name);
            }
        }
    }
    assert!(refused > 0, "the asymmetric v1 fixtures hold zero points of 0");
}

#[test]
fn both_formats_of_one_model_hold_the_same_numbers() {
    for path in checkpoints(false) {
        let v2 = path.with_extension("gptq_v2");
        if v2 == path || !v2.is_dir() {
            continue;
        }
        let (a, b) = (Checkpoint::open(&path).unwrap(), Checkpoint::open(&v2).unwrap());
        for module in modules(&a.tensors) {
            let load = |c: &Checkpoint| {
                GptqLinear::load(&c.tensors, module, c.quantize_config.as_ref().unwrap(), None)
                    .unwrap()
            };
            assert!(load(&a) == load(&b), "{} {module}", name(&path));
        }
    }
}

#[test]
fn activation_order_and_ragged_groups_are_seen() {
    let load = |name: &str, module: &str| {
        let checkpoint = Checkpoint::open(&fixtures().join("quant").join(name)).unwrap();
        let config = checkpoint.quantize_config.as_ref().unwrap();
        GptqLinear::load(&checkpoint.tensors, module, config, None).unwrap()
    };
    let down = "model.layers.0.mlp.down_proj";
    let tail = load("b4_g64_sym_tail.gptq", down);
    assert_eq!((tail.bits, tail.in_features, tail.groups), (Bits::B4, 160, 3));
    assert_eq!(tail.g_idx[159], 2);
    let ordered = load("b4_g32_sym_desc.gptq", down);
    assert!(!ordered.g_idx.is_sorted());
    assert_eq!(load("b4_gm1_sym.gptq", down).groups, 1);
}

#[test]
fn a_module_of_other_size_than_the_model_needs_is_refused() {
    let checkpoint = Checkpoint::open(&fixtures().join("quant/b4_g64_sym_tail.gptq")).unwrap();
    let config = checkpoint.quantize_config.as_ref().unwrap();
    let module = "model.layers.0.mlp.down_proj";
    let load = |size| GptqLinear::load(&checkpoint.tensors, module, config, Some(size));
    assert!(load([96, 160]).is_ok());
    let message = load([96, 192]).unwrap_err().to_string();
    assert!(message.contains("[96, 160]") && message.contains("[96, 192]"), "{message}");
}

#[test]
fn shards_of_bf16_hold_the_rounded_model() {
    let (rounded, exact) = (fixtures().join("llama_bf16_sharded"), fixtures().join("llama"));
    if !rounded.is_dir() || !exact.is_dir() {
        eprintln!("skipped: no fixtures of sharded bf16 models here");
        return;
    }
    let open = |path: &Path| Checkpoint::open(path).unwrap().tensors;
    let (rounded, exact) = (open(&rounded), open(&exact));
    assert!(rounded.names().eq(exact.names()));
    for name in exact.names() {
        let shape = &exact.info(name).unwrap().shape;
        let want = exact.read_f32(name, shape).unwrap();
        let got = rounded.read_f32(name, shape).unwrap();
        assert!(got.iter().zip(want).all(|(g, w)| *g == bf16::from_f32(w).to_f32()), "{name}");
    }
}
