//! `--lm-head` by the real binary: what is written opens everywhere and is what was computed.

#![allow(missing_docs)]

use gptq_format::Checkpoint;
use gptq_testkit::{Expected, TinyLlama, World, assert_close};
use serde_json::json;

fn world() -> World {
    World::new(env!("CARGO_BIN_EXE_gptq"))
}

/// Of logits of up to 7: the dequantized weights are rounded to f16, 5e-4 of each.
const TOLERANCE: f64 = 3e-2;
const LINE: &str = "--calibration text.txt --nsamples 12 --seqlen 64 --group-size 32 --lm-head -q";

#[test]
fn a_quantized_head_opens_in_every_command() {
    let world = world();
    let report = world.json(&format!("quantize model -o out {LINE} --json"));
    let modules = report["modules"].as_array().unwrap();
    assert_eq!(modules.len(), 15);
    let head = &modules[14];
    assert_eq!(
        [&head["layer"], &head["module"], &head["bits"], &head["group_size"], &head["nsamples"]],
        [&json!(2), &json!("lm_head"), &json!(8), &json!(32), &json!(12 * 64)]
    );
    assert!(head["relative_output_error"].as_f64().unwrap() < 1e-3, "{head}");

    let checkpoint = Checkpoint::open(&world.path("out")).unwrap();
    let names: Vec<&str> =
        checkpoint.tensors.names().filter(|name| name.starts_with("lm_head.")).collect();
    assert_eq!(names, ["lm_head.g_idx", "lm_head.qweight", "lm_head.qzeros", "lm_head.scales"]);
    for file in ["config.json", "quantize_config.json"] {
        let value = world.read_json(&format!("out/{file}"));
        let config = value.get("quantization_config").unwrap_or(&value);
        assert_eq!(config["lm_head"], true, "{file}");
        let rule =
            json!({ "bits": 8, "group_size": 32, "sym": true, "desc_act": false, "mse": 2.4 });
        assert_eq!(config["dynamic"]["lm_head"], rule, "{file}");
    }

    world.ok("verify out");
    let seen = world.json("inspect out --json");
    assert_eq!(seen["modules"].as_array().unwrap().len(), 15);
    let eval = "--perplexity text.txt --seqlen 64 --max-windows 4 --json -q";
    let quantized = world.json(&format!("eval out {eval} --reference model"));
    assert!(quantized["kl_mean"].as_f64().unwrap() < 0.1, "{quantized}");
    world.ok("generate out --prompt 123 --max-new-tokens 4 --temperature 0");

    // Dequantized, and in llama.cpp's format without loss, it computes the same.
    world.ok("convert out --to hf -o floats");
    world.ok("convert out --to gptq_v2 -o v2");
    world.ok("verify v2");
    world.ok("convert out --to gguf -o out.gguf");
    let perplexity = |value: &serde_json::Value| value["perplexity"].as_f64().unwrap();
    let expected = perplexity(&quantized);
    for (other, tolerance) in [("floats", 2e-3), ("v2", 1e-9), ("out.gguf", 2e-3)] {
        let got = perplexity(&world.json(&format!("eval {other} {eval}")));
        assert!((got / expected - 1.0).abs() < tolerance, "{other}: {got} {expected}");
    }
}

/// Logits through the packed codes and through the floats that they stand for.
#[test]
fn what_is_evaluated_is_what_is_saved() {
    let world = world();
    world.ok(&format!("quantize model -o out {LINE}"));
    world.ok("convert out --to hf -o floats");
    let ids: Vec<u8> = (0..48i64).flat_map(|i| (i * 31 % 256).to_le_bytes()).collect();
    let view =
        safetensors::tensor::TensorView::new(safetensors::Dtype::I64, vec![1, 48], &ids).unwrap();
    let bytes = safetensors::serialize([("input_ids", view)], None).unwrap();
    world.write("ids.safetensors", bytes);
    for model in ["out", "floats"] {
        world.ok(&format!("logits {model} --input ids.safetensors --output {model}.logits"));
    }
    let logits = |name: &str| Expected::open(world.path(&format!("{name}.logits"))).f32("logits");
    let ((shape, got), (_, want)) = (logits("out"), logits("floats"));
    assert_eq!(shape, [1, 48, 256]);
    assert_close("logits", &got, &want, TOLERANCE);
}

#[test]
fn rules_of_dynamic_name_the_head() {
    let world = world();
    let rule = |text: &str| world.write("rules.json", text);
    rule(r#"{ "lm_head": { "bits": 4, "group_size": 16, "sym": false } }"#);
    let line = format!("quantize model -o out {LINE} --dynamic rules.json --format gptq_v2");
    let report = world.json(&format!("{line} --method rtn --json"));
    let head = &report["modules"][14];
    assert_eq!([&head["bits"], &head["group_size"]], [&json!(4), &json!(16)]);
    world.ok("verify out");
    world.ok("eval out --perplexity text.txt --seqlen 64 --max-windows 1 -q");
    std::fs::remove_dir_all(world.path("out")).unwrap();
    rule(r#"{ "-:lm_head": {} }"#);
    world.refuses(&line, &["leaves lm_head out"]);
}

#[test]
fn a_tied_head_is_refused_with_what_to_do() {
    let world = world();
    TinyLlama { tied: true, ..TinyLlama::default() }.write(&world.path("tied"), 2);
    for extra in ["", " --dry-run", " --method rtn"] {
        let line = format!("quantize tied -o out {LINE}{extra}");
        world.refuses(&line, &["tie_word_embeddings", "untie it first", "run without --lm-head"]);
    }
}
