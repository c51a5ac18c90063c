//! `gptq inspect`, `verify` and `convert` by the real binary: exit codes, text and JSON.

#![allow(clippy::unwrap_used, missing_docs)]

use gptq_testkit::{World, fixtures};
use serde_json::Value;

/// A copy of a quantized fixture as `in`, with a tokenizer.
fn world(name: &str) -> Option<World> {
    let source = fixtures::dir(&format!("quant/{name}"))?;
    let world = World::empty(env!("CARGO_BIN_EXE_gptq"));
    std::fs::create_dir(world.path("in")).unwrap();
    for name in ["config.json", "quantize_config.json", "model.safetensors"] {
        std::fs::copy(source.join(name), world.path("in").join(name)).unwrap();
    }
    world.write("in/tokenizer.json", gptq_testkit::byte_level_tokenizer().to_string());
    Some(world)
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

#[test]
fn a_sound_checkpoint_is_inspected_verified_and_converted() {
    let Some(world) = world("b4_gm1_sym.gptq") else { return };
    let seen = world.json("inspect in --json");
    assert_eq!((&seen["format"], &seen["blocks"]), (&"gptq".into(), &2.into()));
    assert_eq!(seen["modules"].as_array().unwrap().len(), 14);
    assert_eq!(seen["not_quantized"].as_array().unwrap().len(), 7);
    let text = world.ok("inspect in");
    assert!(text.contains("model.layers.*.self_attn.q_proj"), "{text}");
    let stats = world.json("inspect in --tensor model.norm.weight --json");
    assert_eq!((&stats["dtype"], &stats["nan"]), (&"F16".into(), &0.into()));

    let report = world.json("verify in --json");
    assert_eq!(report["passed"], true);
    assert_eq!(report["engines"].as_array().unwrap().len(), 5);
    let text = world.ok("verify in");
    assert!(text.contains("vLLM          yes") && text.contains("0 errors"), "{text}");

    let written = world.json("convert in --to gguf -o out.gguf --json -q");
    assert_eq!(written["modules"][0]["to"], "Q4_0");
    assert_eq!(written["modules"][0]["exact"], true);
    assert_eq!(world.json("inspect out.gguf --json")["format"], "gguf");
    world.ok("convert in --to gptq_v2 -o v2 -q");
    assert_eq!(world.gptq("verify v2 --engine tgi").status.code(), Some(1));
    world.ok("verify v2 --engine vllm --engine gptqmodel");
    world.ok("convert out.gguf --to hf -o floats -q");
    assert_eq!(world.json("inspect floats --json")["format"], "safetensors");
}

/// AutoAWQ's packing of the same codes is evaluated and talks as GPTQ's does.
#[test]
fn an_awq_checkpoint_runs() {
    let Some(world) = world("b4_g32_asym.gptq_v2") else { return };
    std::fs::create_dir(world.path("awq")).unwrap();
    gptq_testkit::awq::rewrite(&world.path("in"), &world.path("awq"));
    world.write("text.txt", "the quick brown fox jumps over the lazy dog. ".repeat(20));
    let [ours, theirs] = ["in", "awq"].map(|model| {
        let eval =
            format!("eval {model} --perplexity text.txt --seqlen 64 --max-windows 3 --json -q");
        let generate =
            format!("generate {model} --prompt fox --max-new-tokens 12 --temperature 0 -q");
        (world.json(&eval)["perplexity"].clone(), world.ok(&generate))
    });
    assert!(ours.0.as_f64().unwrap() > 1.0);
    assert_eq!(theirs, ours);
}

#[test]
fn findings_fail_the_command_and_stay_readable() {
    let Some(world) = world("b4_gm1_sym.gptq") else { return };
    for name in ["config.json", "quantize_config.json"] {
        let name = format!("in/{name}");
        let mut config = world.read_json(&name);
        let inside = config.get("quantization_config").is_some();
        let settings = if inside { &mut config["quantization_config"] } else { &mut config };
        settings["checkpoint_format"] = "gptq_v2".into();
        settings["format"] = "gptq_v2".into();
        world.write(&name, config.to_string());
    }
    let output = world.gptq("verify in");
    assert_eq!(output.status.code(), Some(1));
    let text = world.text(&output.stdout);
    assert!(text.contains("off by one step") && text.contains("and 13 more like it"), "{text}");
    assert!(text.contains("14 errors") && text.contains("hint:"), "{text}");
    assert!(!text.contains('\x1b'));
    let report = json(&world.gptq("verify in --json").stdout);
    assert_eq!(report["findings"][0]["code"], "zero-point-label");
    assert_eq!(report["findings"][0]["severity"], "error");
    assert_eq!(report["passed"], false);
}

#[test]
fn refusals_name_the_module_and_leave_nothing() {
    let Some(world) = world("b4_g32_asym.gptq_v2") else { return };
    for (line, parts) in [
        ("convert in --to gguf -o out -q", ["model.layers.0.", "--lossy would"]),
        ("convert in --to gptq -o out -q", ["zero point 0", "gptq_v2"]),
        ("convert nowhere --to hf -o out -q", ["nowhere", ""]),
        ("verify nowhere -q", ["nowhere", ""]),
        ("inspect in --tensor nothing -q", ["nothing", ""]),
    ] {
        world.refuses(line, &parts);
    }
    let text = world.ok("convert in --to gguf -o out.gguf --lossy -q");
    assert!(text.contains("14 quantized modules to Q4_1, rounded"), "{text}");
    assert!(text.contains("  model.layers.1.mlp.down_proj"), "{text}");
    assert_eq!(world.gptq("convert in --to hf -o out.gguf -q").status.code(), Some(1));
}
