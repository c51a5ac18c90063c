//! `gptq inspect`, `verify` and `convert` by the real binary: exit codes, text and JSON.

#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use gptq_testkit::fixtures;
use serde_json::Value;

/// Runs `gptq` with `line` split at blanks, inside `dir`.
fn gptq(dir: &Path, line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args(line.split(' '))
        .current_dir(dir)
        .env("HF_HUB_OFFLINE", "1")
        .env_remove("GPTQ_LOG")
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn ok(dir: &Path, line: &str) -> String {
    let output = gptq(dir, line);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "gptq {line}: {stderr}");
    stdout(&output)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// A copy of a quantized fixture as `in`, with a tokenizer.
fn world(name: &str) -> Option<(tempfile::TempDir, PathBuf)> {
    let source = fixtures::dir(&format!("quant/{name}"))?;
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("in");
    std::fs::create_dir(&copy).unwrap();
    for name in ["config.json", "quantize_config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), copy.join(name)).unwrap();
    }
    let tokenizer = gptq_testkit::byte_level_tokenizer().to_string();
    std::fs::write(copy.join("tokenizer.json"), tokenizer).unwrap();
    Some((dir, copy))
}

#[test]
fn a_sound_checkpoint_is_inspected_verified_and_converted() {
    let Some((dir, _)) = world("b4_gm1_sym.gptq") else { return };
    let dir = dir.path();
    let seen = json(&ok(dir, "inspect in --json"));
    assert_eq!((&seen["format"], &seen["blocks"]), (&"gptq".into(), &2.into()));
    assert_eq!(seen["modules"].as_array().unwrap().len(), 14);
    assert_eq!(seen["not_quantized"].as_array().unwrap().len(), 7);
    let text = ok(dir, "inspect in");
    assert!(text.contains("model.layers.*.self_attn.q_proj"), "{text}");
    let stats = json(&ok(dir, "inspect in --tensor model.norm.weight --json"));
    assert_eq!((&stats["dtype"], &stats["nan"]), (&"F16".into(), &0.into()));

    let report = json(&ok(dir, "verify in --json"));
    assert_eq!(report["passed"], true);
    assert_eq!(report["engines"].as_array().unwrap().len(), 5);
    let text = ok(dir, "verify in");
    assert!(text.contains("vLLM          yes") && text.contains("0 errors"), "{text}");

    let written = json(&ok(dir, "convert in --to gguf -o out.gguf --json -q"));
    assert_eq!(written["modules"][0]["to"], "Q4_0");
    assert_eq!(written["modules"][0]["exact"], true);
    assert_eq!(json(&ok(dir, "inspect out.gguf --json"))["format"], "gguf");
    ok(dir, "convert in --to gptq_v2 -o v2 -q");
    assert_eq!(gptq(dir, "verify v2 --engine tgi").status.code(), Some(1));
    ok(dir, "verify v2 --engine vllm --engine gptqmodel");
    ok(dir, "convert out.gguf --to hf -o floats -q");
    assert_eq!(json(&ok(dir, "inspect floats --json"))["format"], "safetensors");
}

#[test]
fn findings_fail_the_command_and_stay_readable() {
    let Some((dir, copy)) = world("b4_gm1_sym.gptq") else { return };
    let dir = dir.path();
    for name in ["config.json", "quantize_config.json"] {
        let mut config = json(&std::fs::read_to_string(copy.join(name)).unwrap());
        let inside = config.get("quantization_config").is_some();
        let settings = if inside { &mut config["quantization_config"] } else { &mut config };
        settings["checkpoint_format"] = "gptq_v2".into();
        settings["format"] = "gptq_v2".into();
        std::fs::write(copy.join(name), config.to_string()).unwrap();
    }
    let output = gptq(dir, "verify in");
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    assert!(text.contains("off by one step") && text.contains("and 13 more like it"), "{text}");
    assert!(text.contains("14 errors") && text.contains("hint:"), "{text}");
    assert!(!text.contains('\x1b'));
    let report = json(&stdout(&gptq(dir, "verify in --json")));
    assert_eq!(report["findings"][0]["code"], "zero-point-label");
    assert_eq!(report["findings"][0]["severity"], "error");
    assert_eq!(report["passed"], false);
}

#[test]
fn refusals_name_the_module_and_leave_nothing() {
    let Some((dir, _)) = world("b4_g32_asym.gptq_v2") else { return };
    let dir = dir.path();
    for (line, parts) in [
        ("convert in --to gguf -o out -q", ["model.layers.0.", "--lossy would"]),
        ("convert in --to gptq -o out -q", ["zero point 0", "gptq_v2"]),
        ("convert nowhere --to hf -o out -q", ["nowhere", ""]),
        ("verify nowhere -q", ["nowhere", ""]),
        ("inspect in --tensor nothing -q", ["nothing", ""]),
    ] {
        let output = gptq(dir, line);
        assert_eq!(output.status.code(), Some(1), "gptq {line}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(parts.iter().all(|part| stderr.contains(part)), "gptq {line}: {stderr}");
        assert_eq!(std::fs::read_dir(dir).unwrap().count(), 1, "gptq {line}");
    }
    let text = ok(dir, "convert in --to gguf -o out.gguf --lossy -q");
    assert!(text.contains("14 quantized modules to Q4_1, rounded"), "{text}");
    assert!(text.contains("  model.layers.1.mlp.down_proj"), "{text}");
    assert_eq!(gptq(dir, "convert in --to hf -o out.gguf -q").status.code(), Some(1));
}
