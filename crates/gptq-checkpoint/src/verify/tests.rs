use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::testing::Edit;

const Q: &str = "model.layers.0.self_attn.q_proj";

fn report(edit: &Edit) -> Report {
    let dir = tempfile::tempdir().unwrap();
    edit.write(dir.path(), u64::MAX);
    verify(dir.path()).unwrap()
}

fn opens(report: &Report, engine: Engine) -> bool {
    report.engines.iter().any(|verdict| verdict.engine == engine && verdict.opens)
}

fn reason(report: &Report, engine: Engine) -> String {
    let verdict = report.engines.iter().find(|verdict| verdict.engine == engine).unwrap();
    verdict.reasons.join("; ")
}

/// Changes a fixture, and expects one kind of finding.
fn found(fixture: &str, change: impl Fn(&mut Edit), severity: Severity, code: &str, part: &str) {
    let Some(mut edit) = Edit::fixture(fixture) else { return };
    change(&mut edit);
    let report = report(&edit);
    let fits = |f: &&Finding| f.code == code && f.severity == severity;
    let finding =
        report.findings.iter().find(fits).unwrap_or_else(|| panic!("{code}: {report:#?}"));
    let text = format!("{:?} {} {:?}", finding.subject, finding.message, finding.hint);
    assert!(text.contains(part), "{text}");
}

const SYM: &str = "quant/b4_gm1_sym.gptq";
const G32: &str = "quant/b8_g32_sym.gptq";
const DESC: &str = "quant/b4_g32_sym_desc.gptq";
use Severity::{Error, Note, Warning};

#[test]
fn a_checkpoint_of_autoawq_is_sound() {
    let Some(path) = gptq_testkit::fixtures::dir("awq/b4_g32.gemm") else { return };
    let report = verify(&path).unwrap();
    assert!(report.is_sound() && report.modules == 14, "{:#?}", report.findings);
    assert!(opens(&report, Engine::Vllm) && !opens(&report, Engine::Exllama));
}

#[test]
fn fixtures_of_another_tool_are_sound() {
    for (name, path) in gptq_testkit::fixtures::quantized() {
        if name.ends_with("gptq_p") {
            let report = verify(&path).unwrap();
            assert!(report.findings[0].message.contains("gptq_p"), "{name}");
            continue;
        }
        let report = verify(&path).unwrap();
        assert!(report.is_sound(), "{name}: {:#?}", report.findings);
        assert_eq!(report.modules, 14, "{name}");
        assert!(
            opens(&report, Engine::Gptqmodel),
            "{name}: {}",
            reason(&report, Engine::Gptqmodel)
        );
        assert!(opens(&report, Engine::Transformers), "{name}");
        let codes: Vec<&str> = report.findings.iter().map(|f| f.code).collect();
        // The asymmetric ones without activation order were made to have zero points of 0.
        let zero = name.contains("_asym.gptq") && !name.ends_with("v2");
        assert_eq!(codes.contains(&"zero-point-zero"), zero, "{name}: {codes:?}");
        assert!(
            codes.iter().all(|c| *c == "zero-point-zero" || c.starts_with("scale-sub")),
            "{name}: {codes:?}"
        );
        assert_eq!(
            opens(&report, Engine::Tgi),
            !zero && !["b3", "v2", "tail"].iter().any(|part| name.contains(part)),
            "{name}: {}",
            reason(&report, Engine::Tgi)
        );
        if name.starts_with("b4_g") && name.contains("_sym") && !name.contains("tail") {
            assert!(opens(&report, Engine::Vllm), "{name}: {}", reason(&report, Engine::Vllm));
            assert!(
                opens(&report, Engine::Exllama),
                "{name}: {}",
                reason(&report, Engine::Exllama)
            );
        } else if !name.starts_with("b8_g32_sym") {
            assert!(!opens(&report, Engine::Vllm), "{name}");
        }
    }
}

#[test]
fn what_is_no_gptq_checkpoint_is_refused() {
    let message = |path: &Path| verify(path).unwrap_err().to_string();
    let dir = tempfile::tempdir().unwrap();
    assert!(message(&dir.path().join("absent")).contains("cannot open"));
    assert!(message(dir.path()).contains("no config.json"));
    gptq_testkit::tiny_llama(dir.path(), 3);
    assert!(message(dir.path()).contains("gptq quantize"));
    let Some(mut edit) = Edit::fixture(SYM) else { return };
    edit.config.as_object_mut().unwrap().remove("quantization_config");
    edit.quantize_config = Value::Null;
    let dir = tempfile::tempdir().unwrap();
    edit.write(dir.path(), u64::MAX);
    assert!(message(dir.path()).contains("says how"));
}

#[test]
fn a_checkpoint_that_cannot_be_opened_opens_nowhere() {
    let Some(edit) = Edit::fixture(SYM) else { return };
    let dir = tempfile::tempdir().unwrap();
    edit.write(dir.path(), 200_000);
    let shard = std::fs::read_dir(dir.path())
        .unwrap()
        .flatten()
        .find(|e| e.file_name().to_string_lossy().starts_with("model-00002"));
    std::fs::remove_file(shard.unwrap().path()).unwrap();
    let report = verify(dir.path()).unwrap();
    assert!(report.findings[0].message.contains("model-00002"), "{:?}", report.findings);
    assert_eq!(report.format, None);
    assert!(report.engines.iter().all(|verdict| !verdict.opens));
}

#[test]
fn settings_that_disagree_are_found() {
    found(SYM, |e| e.quantize_config["group_size"] = json!(64), Error, "config-mismatch", "64");
    found(
        SYM,
        |e| e.config["quantization_config"]["sym"] = Value::Null,
        Warning,
        "config-missing-key",
        "TGI",
    );
    let Some(mut edit) = Edit::fixture(SYM) else { return };
    edit.config.as_object_mut().unwrap().remove("quantization_config");
    let report = report(&edit);
    assert_eq!(report.findings[0].code, "no-quantization-config");
    assert!(report.is_sound() && !opens(&report, Engine::Transformers));
    assert!(opens(&report, Engine::Gptqmodel), "{}", reason(&report, Engine::Gptqmodel));
}

#[test]
fn wrong_shapes_and_dtypes_are_found() {
    found(
        SYM,
        |e| {
            e.set("bits", 8);
        },
        Error,
        "shape",
        "4-bit codes",
    );
    found(
        G32,
        |e| {
            e.set("group_size", 64);
        },
        Error,
        "shape",
        "group_size",
    );
    found(SYM, |e| e.config["intermediate_size"] = json!(512), Error, "shape", "512 outputs");
    let dtype = |e: &mut Edit, name: &str, dtype| e.tensors.get_mut(name).unwrap().0 = dtype;
    let i32s = gptq_format::DType::U32;
    found(SYM, |e| dtype(e, &format!("{Q}.qweight"), i32s), Error, "dtype", "U32");
    found(SYM, |e| dtype(e, &format!("{Q}.g_idx"), i32s), Error, "dtype", "g_idx");
    found(
        SYM,
        |e| dtype(e, &format!("{Q}.scales"), gptq_format::DType::BF16),
        Note,
        "dtype",
        "BF16",
    );
    found(
        SYM,
        |e| drop(e.tensors.remove(&format!("{Q}.qzeros"))),
        Error,
        "missing-tensor",
        "qzeros",
    );
}

#[test]
fn missing_and_unexpected_tensors_are_found() {
    found(
        SYM,
        |e| drop(e.tensors.remove("model.norm.weight")),
        Error,
        "model-tensor",
        "model.norm",
    );
    found(SYM, |e| drop(e.tensors.remove("lm_head.weight")), Error, "missing-tensor", "lm_head");
    found(
        SYM,
        |e| {
            for part in ["qweight", "qzeros", "scales", "g_idx"] {
                e.rename(&format!("{Q}.{part}"), &format!("model.layers.0.self_attn.query.{part}"));
            }
        },
        Error,
        "missing-tensor",
        Q,
    );
    found(
        SYM,
        |e| e.config["num_hidden_layers"] = json!(1),
        Warning,
        "unexpected-tensor",
        "1 blocks",
    );
    found(
        SYM,
        |e| {
            let weight = (gptq_format::DType::F16, vec![128, 128], vec![0; 2 * 128 * 128]);
            e.tensors.insert(format!("{Q}.weight"), weight);
        },
        Error,
        "both",
        Q,
    );
    found(
        SYM,
        |e| {
            let bias = (gptq_format::DType::F16, vec![128], vec![1; 256]);
            e.tensors.insert(format!("{Q}.bias"), bias);
        },
        Error,
        "unexpected-tensor",
        "no such bias",
    );
    found(
        SYM,
        |e| {
            e.set("dynamic", json!({"-:.*q_proj": {}}));
        },
        Error,
        "skipped-but-quantized",
        Q,
    );
    found(SYM, |e| e.config["model_type"] = json!("novel"), Note, "unknown-model", "novel");
}

#[test]
fn the_index_has_to_name_everything() {
    let Some(edit) = Edit::fixture(SYM) else { return };
    let dir = tempfile::tempdir().unwrap();
    edit.write(dir.path(), 200_000);
    let index = dir.path().join("model.safetensors.index.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&index).unwrap()).unwrap();
    value["weight_map"].as_object_mut().unwrap().remove(&format!("{Q}.scales"));
    std::fs::write(&index, value.to_string()).unwrap();
    let (first, _) = value["weight_map"].as_object().unwrap().iter().next().unwrap();
    let shard = value["weight_map"][first].as_str().unwrap();
    let stray = dir.path().join("model-00009-of-00009.safetensors");
    std::fs::copy(dir.path().join(shard), stray).unwrap();
    let report = verify(dir.path()).unwrap();
    let subjects: Vec<(&str, &str)> =
        report.findings.iter().map(|f| (f.code, f.subject.as_deref().unwrap())).collect();
    assert_eq!(
        subjects,
        [
            ("index-tensor", "model.layers.0.self_attn.q_proj.scales"),
            ("index-shard", "model-00009-of-00009.safetensors")
        ]
    );
}

#[test]
fn headers_without_a_framework_are_found() {
    let Some(dir) = gptq_testkit::fixtures::dir(SYM) else { return };
    let copy = tempfile::tempdir().unwrap();
    for name in ["config.json", "quantize_config.json"] {
        std::fs::copy(dir.join(name), copy.path().join(name)).unwrap();
    }
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let at = bytes.windows(4).position(|w| w == b"\"pt\"").unwrap();
    let mut changed = bytes.clone();
    changed[at + 1..at + 3].copy_from_slice(b"np");
    std::fs::write(copy.path().join("model.safetensors"), changed).unwrap();
    let report = verify(copy.path()).unwrap();
    assert_eq!(report.findings[0].code, "header-format");
    assert!(!opens(&report, Engine::Transformers) && opens(&report, Engine::Vllm));
}

#[test]
fn group_indices_are_checked() {
    let g_idx = format!("{Q}.g_idx");
    let order = |k: u32| k / 32;
    found(
        G32,
        |e| e.put_words(&g_idx, (0..128).map(|k| order(k) + 1)),
        Error,
        "g-idx-range",
        "group 4",
    );
    found(
        G32,
        |e| e.put_words(&g_idx, (0..128).map(|k| if k == 7 { u32::MAX } else { order(k) })),
        Error,
        "g-idx-range",
        "group -1",
    );
    found(
        G32,
        |e| e.put_words(&g_idx, (0..128).map(|k| order(127 - k))),
        Error,
        "g-idx-order",
        "input 0 is in group 3",
    );
    found(G32, |e| e.put_words(&g_idx, [0; 128]), Warning, "g-idx-zero", "GPTQModel");
    found(
        DESC,
        |e| e.put_words(&g_idx, (0..128).map(|k| u32::from(k < 40))),
        Error,
        "g-idx-groups",
        "group 0 has 88",
    );
    found(G32, |e| drop(e.tensors.remove(&g_idx)), Warning, "g-idx-missing", "k / group_size");
    found(DESC, |e| drop(e.tensors.remove(&g_idx)), Error, "g-idx-missing", "desc_act");
}

#[test]
fn zero_points_are_checked() {
    let qzeros = format!("{Q}.qzeros");
    // Stored as in v2, labelled as v1.
    found(SYM, |e| e.put_words(&qzeros, [0x8888_8888; 16]), Error, "zero-point-label", "gptq_v2");
    found(
        SYM,
        |e| {
            e.set("checkpoint_format", "gptq_v2").set("format", "gptq_v2");
        },
        Error,
        "zero-point-label",
        "`gptq`",
    );
    found(
        SYM,
        |e| e.put_words(&qzeros, (0..16).map(|i| 0x7777_7777 ^ i)),
        Error,
        "zero-points-vary",
        "differ",
    );
    found(SYM, |e| e.put_words(&qzeros, [0x3333_3333; 16]), Error, "zero-points-vary", "are 4");
    found("quant/b4_g32_asym.gptq", |_| {}, Warning, "zero-point-zero", "read 16");
    let Some(edit) = Edit::fixture("quant/b4_g32_asym.gptq") else { return };
    let report = report(&edit);
    assert!(report.is_sound());
    assert!(reason(&report, Engine::Tgi).contains("as 16"), "{}", reason(&report, Engine::Tgi));
    assert!(reason(&report, Engine::Vllm).contains("asymmetric"));
}

#[test]
fn asymmetric_v1_of_another_tool_is_refused_by_gptqmodel() {
    let Some(mut edit) = Edit::fixture("quant/b4_g32_asym.gptq") else { return };
    edit.set("meta", json!({"quantizer": ["gptq-rs:0.1.0"]}));
    assert!(reason(&report(&edit), Engine::Gptqmodel).contains("gptq_v2"));
}

#[test]
fn three_bit_zero_points_of_old_gptqmodels_are_recognised() {
    let Some(mut edit) = Edit::fixture("quant/b3_g32_asym.gptq") else { return };
    edit.set("sym", true).set("meta", json!({"quantizer": ["gptqmodel:5.8.0"]}));
    let names: Vec<String> =
        edit.tensors.keys().filter(|name| name.ends_with(".qzeros")).cloned().collect();
    for name in names {
        let words = edit.bytes(&name).len() / 4;
        // What GPTQModel 1 to 6 made of 4 everywhere, word by word.
        let old = [
            0x2492_4924u32 - 0x2492_4924,
            0x4924_9249u32.wrapping_sub(0x9249_2492),
            0x9249_2492 - 0x4924_9249,
        ];
        edit.put_words(&name, (0..words).map(|i| old[i % 3]));
    }
    let damaged = report(&edit);
    let codes: Vec<&str> = damaged.findings.iter().map(|f| f.code).collect();
    assert_eq!(codes, ["gptqmodel-3-bit"; 14]);
    edit.set("sym", false);
    edit.put_words(&format!("{Q}.qzeros"), [0x1234_5678; 48]);
    let unsure = report(&edit);
    assert!(unsure.findings.iter().any(|f| f.severity == Warning && f.code == "gptqmodel-3-bit"));
}

#[test]
fn scales_are_checked() {
    let scales = format!("{Q}.scales");
    let put = |at: usize, bits: u16| {
        let name = scales.clone();
        move |e: &mut Edit| e.bytes(&name)[2 * at..2 * at + 2].copy_from_slice(&bits.to_le_bytes())
    };
    found(G32, put(130, 0x7E00), Error, "scale-not-finite", "group 1, output 2");
    found(G32, put(0, 0x7C00), Error, "scale-not-finite", "inf");
    found(G32, put(0, 0), Warning, "scale-zero", "1 of 512");
    found(G32, put(0, 0x8001), Note, "scale-negative", "1 of 512");
    // Unless they are meant to be.
    if let Some(mut edit) = Edit::fixture(G32) {
        put(0, 0xA001)(&mut edit);
        let negative = |edit: &Edit| {
            report(edit).findings.iter().any(|finding| finding.code == "scale-negative")
        };
        assert!(negative(&edit));
        edit.quantize_config["meta"] = json!({ "signed_scales": true });
        edit.config["quantization_config"]["meta"] = json!({ "signed_scales": true });
        assert!(!negative(&edit));
    }
    found(G32, put(0, 0x0001), Note, "scale-subnormal", "of 512");
    found(G32, |e| e.bytes(&scales).fill(0), Error, "weights-unwritten", "scales");
    found(G32, |e| e.bytes(&format!("{Q}.qweight")).fill(0), Error, "weights-unwritten", "codes");
    found(
        G32,
        |e| e.bytes("model.embed_tokens.weight")[1] = 0x7C,
        Error,
        "value-not-finite",
        "embed",
    );
}

#[test]
fn fused_siblings_have_to_be_alike() {
    let Some(mut edit) = Edit::fixture(SYM) else { return };
    for part in ["qweight", "qzeros", "scales", "g_idx"] {
        edit.tensors.remove(&format!("{Q}.{part}"));
    }
    let weight = (gptq_format::DType::F16, vec![128, 128], vec![0; 2 * 128 * 128]);
    edit.tensors.insert(format!("{Q}.weight"), weight);
    let plain = report(&edit);
    let codes: Vec<&str> = plain.findings.iter().map(|f| f.code).collect();
    assert_eq!(codes, ["fused-settings", "not-quantized"]);
    assert!(
        reason(&plain, Engine::Vllm).contains("{q,k,v}_proj"),
        "{}",
        reason(&plain, Engine::Vllm)
    );
    edit.set("dynamic", json!({"-:.*0.self_attn.q_proj": {}}));
    assert_eq!(report(&edit).findings.len(), 1);

    found(
        DESC,
        |e| {
            let name = format!("{Q}.g_idx");
            e.bytes(&name).reverse();
            let words: Vec<u32> =
                e.bytes(&name).as_chunks::<4>().0.iter().map(|w| u32::from_be_bytes(*w)).collect();
            e.put_words(&name, words);
        },
        Warning,
        "fused-order",
        "{q,k,v}_proj",
    );

    let Some(mut edit) = Edit::fixture(SYM) else { return };
    edit.set("dynamic", json!({"+:.*q_proj": {"group_size": 128}}));
    let mixed = report(&edit);
    assert!(
        mixed
            .findings
            .iter()
            .any(|f| f.message.contains("group -1") && f.message.contains("group 128"))
    );
    for engine in [Engine::Vllm, Engine::Tgi, Engine::Transformers, Engine::Exllama] {
        assert!(!opens(&mixed, engine), "{engine:?}");
    }
    assert!(opens(&mixed, Engine::Gptqmodel));
}

#[test]
fn tied_and_quantized_heads_are_found() {
    let head = |e: &mut Edit| {
        for part in ["qweight", "qzeros", "scales", "g_idx"] {
            let mut tensor = e.tensors[&format!("{Q}.{part}")].clone();
            // 256 outputs instead of 128: every row twice.
            if part != "g_idx" {
                let columns = tensor.1[1] * tensor.0.unit().1;
                tensor.2 = tensor.2.chunks(columns).flat_map(|row| [row, row].concat()).collect();
                tensor.1[1] *= 2;
            }
            e.tensors.insert(format!("lm_head.{part}"), tensor);
        }
        e.tensors.remove("lm_head.weight");
    };
    found(SYM, |e| head(e), Error, "head-flag", "floats");
    found(
        SYM,
        |e| {
            e.set("lm_head", true);
        },
        Error,
        "head-flag",
        "no packed weights",
    );
    found(
        SYM,
        |e| {
            head(e);
            e.set("lm_head", true);
            e.config["tie_word_embeddings"] = json!(true);
        },
        Error,
        "tied-head",
        "lm_head",
    );
    let tie = |e: &mut Edit| e.config["tie_word_embeddings"] = json!(true);
    found(SYM, tie, Warning, "tied-head", "differs");
    let equal = |e: &mut Edit| {
        tie(e);
        let embedding = e.tensors["model.embed_tokens.weight"].clone();
        e.tensors.insert("lm_head.weight".to_owned(), embedding);
    };
    found(SYM, equal, Note, "tied-head", "not read");
    let Some(mut edit) = Edit::fixture(SYM) else { return };
    head(&mut edit);
    edit.set("lm_head", true);
    let report = report(&edit);
    assert!(report.is_sound(), "{:#?}", report.findings);
    assert!(opens(&report, Engine::Vllm) && opens(&report, Engine::Gptqmodel));
    assert!(reason(&report, Engine::Transformers).contains("head"));
}

#[test]
fn vllm_falls_back_to_a_kernel_with_conditions() {
    let Some(mut edit) = Edit::fixture("quant/b4_g64_sym_tail.gptq") else { return };
    // One group size that divides everything: 32 of 96 and 160 inputs.
    edit.set("group_size", 32);
    let names: Vec<String> =
        edit.tensors.keys().filter_map(|n| Some(n.strip_suffix(".scales")?.to_owned())).collect();
    for name in names {
        let inputs = edit.tensors[&format!("{name}.g_idx")].1[0];
        edit.put_words(&format!("{name}.g_idx"), (0..inputs as u32).map(|k| k / 32));
        for part in ["scales", "qzeros"] {
            let tensor = edit.tensors.get_mut(&format!("{name}.{part}")).unwrap();
            let row = tensor.2.len() / tensor.1[0];
            tensor.2 = tensor.2[..row].repeat(inputs / 32);
            tensor.1[0] = inputs / 32;
        }
    }
    let conditions = |edit: &Edit| {
        let report = report(edit);
        assert!(opens(&report, Engine::Vllm), "{report:#?}");
        report.engines[0].conditions.join("; ")
    };
    edit.config["dtype"] = json!("float16");
    assert_eq!(conditions(&edit), "");
    edit.config["dtype"] = json!("bfloat16");
    assert!(conditions(&edit).contains("--dtype float16, since 96 inputs"));
    edit.config["dtype"] = json!("float16");
    // The sign of the first scale.
    edit.bytes(&format!("{Q}.scales"))[1] |= 0x80;
    assert_eq!(
        conditions(&edit),
        "VLLM_MARLIN_INPUT_DTYPE unset or fp8, since int8 misreads negative scales"
    );
}

#[test]
fn awkward_sizes_are_told_by_engine() {
    let Some(edit) = Edit::fixture("quant/b4_g64_sym_tail.gptq") else { return };
    let report = report(&edit);
    assert!(report.is_sound());
    assert!(
        reason(&report, Engine::Vllm).contains("96 inputs are no multiple of its group size 64")
    );
    assert!(!opens(&report, Engine::Exllama));
    assert!(opens(&report, Engine::Gptqmodel), "{}", reason(&report, Engine::Gptqmodel));
}
