//! The real binary on tiny models: what it prints, what it writes, how it fails.

#![allow(missing_docs)]

use std::path::{Path, PathBuf};
use std::process::Command;

use gptq_testkit::{Expected, TinyLlama, World, assert_close, fixtures};
use serde_json::Value;

fn world() -> World {
    World::new(env!("CARGO_BIN_EXE_gptq"))
}

const CALIBRATION: &str = "--calibration text.txt --nsamples 4 --seqlen 64";

#[test]
fn every_setting_quantizes_and_opens_again() {
    let world = world();
    let mut sizes = Vec::new();
    for (i, settings) in [
        "--bits 2 --group-size 16 --no-sym",
        "--bits 3 --group-size 32",
        "--bits 4 --group-size -1",
        "--bits 4 --group-size 24 --mse 2.4 --static-groups",
        "--bits 3 --group-size 16 --order act-static --scale-search hessian --signed-scales --refine 2",
        "--bits 4 --group-size 32 --order desc-act --no-sym --scale-search mse --refine 1",
        "--bits 4 --group-size 48 --desc-act --no-sym --format gptq_v2",
        "--bits 8 --group-size 64 --no-act-group-aware --no-true-sequential",
        "--bits 4 --group-size 16 --method obq",
        "--bits 4 --group-size 16 --method rtn --no-sym",
    ]
    .iter()
    .enumerate()
    {
        let out = format!("out{i}");
        let report =
            world.json(&format!("quantize model -o {out} {CALIBRATION} {settings} --json -q"));
        assert_eq!(report["modules"].as_array().unwrap().len(), 14, "{settings}");
        assert!(report["bits_per_weight"].as_f64().unwrap() > 2.0);
        sizes.push(report["totals"]["output_bytes"].as_u64().unwrap());
        let eval = world.json(&format!(
            "eval {out} --perplexity text.txt --seqlen 64 --max-windows 4 --reference model --json -q"
        ));
        let kl = eval["kl_mean"].as_f64().unwrap();
        assert!(kl > 0.0 && kl < 2.0, "{settings}: {kl}");
        for file in [
            "config.json",
            "quantize_config.json",
            "tokenizer.json",
            "quant_log.jsonl",
            "quant_report.json",
            "README.md",
            "generation_config.json",
        ] {
            assert!(world.path(&out).join(file).exists(), "{settings}: {file}");
        }
        // Rounding measures no errors.
        for file in ["plots/loss.svg", "plots/error.svg"] {
            let plotted = world.path(&out).join(file).exists();
            assert_eq!(plotted, !settings.contains("rtn"), "{settings}: {file}");
        }
        let inspect = world.json(&format!("inspect {out} --json"));
        assert_eq!(inspect["modules"].as_array().unwrap().len(), 14);
        assert!(!world.path(&format!(".{out}.partial")).exists());
    }
    assert!(sizes[0] < sizes[7], "2 bits are smaller than 8");
}

#[test]
fn the_report_tells_the_work_of_a_run() {
    let world = world();
    let run = |out: &str, options: &str| {
        world.json(&format!("quantize model -o {out} {options} --json -q"))
    };
    let rounded = run("rtn", "--method rtn");
    assert_eq!(rounded["f32_rate_fraction"], Value::Null);
    assert_eq!(
        (&rounded["plan"]["operations"], &rounded["plan"]["writing_seconds"]),
        (&0.0.into(), &0.0.into())
    );
    let solved = run("text", CALIBRATION);
    assert!(solved["f32_rate_fraction"].as_f64().unwrap() > 0.0);
    assert!(solved["plan"]["operations"].as_f64().unwrap() > 1e6);
    assert_eq!(solved["plan"]["writing_seconds"], 0.0);
    let windows = "--seqlen 32 --group-size 32";
    let own = run("own", &format!("--calibration self --nsamples 8 {windows}"));
    let part = run(
        "part",
        &format!("--calibration text.txt --calibration self@0.33 --nsamples 8 {windows}"),
    );
    let plan = |report: &Value, key: &str| report["plan"][key].as_f64().unwrap();
    let [part, own] = [part, own].map(|report| {
        plan(&report, "writing_seconds") * plan(&report, "f32_operations_per_second")
    });
    assert!((part / own - 0.25).abs() < 1e-9, "{part} {own}");
}

/// Only as much of a text is tokenized as is scored; that changes nothing.
#[test]
fn the_first_windows_of_a_long_text_are_those_of_a_short_one() {
    let world = world();
    let short = "the quick brown fox jumps over the lazy dog. ".repeat(100);
    world.write("long.txt", short.repeat(200));
    world.write("short.txt", short);
    let [long, short] = ["long", "short"].map(|text| {
        let options = "--seqlen 64 --max-windows 5 --json -q";
        world.json(&format!("eval model --perplexity {text}.txt {options}"))["perplexity"].clone()
    });
    assert_eq!(long, short);
}

#[test]
fn the_same_bytes_for_any_number_of_threads_and_in_shards() {
    let world = world();
    let settings = format!("{CALIBRATION} --group-size 32 -q");
    world.ok(&format!("quantize model -o one {settings} --threads 1"));
    world.ok(&format!("quantize model -o three {settings} --threads 3"));
    assert_eq!(world.read("one/model.safetensors"), world.read("three/model.safetensors"));

    world.ok(&format!("quantize model -o shards {settings} --max-shard-size 30KiB"));
    let index = world.read_json("shards/model.safetensors.index.json");
    assert!(index["weight_map"].as_object().unwrap().len() > 50);
    let line = "--perplexity text.txt --seqlen 32 --max-windows 2 --json -q";
    let whole = world.json(&format!("eval one {line}"));
    let parts = world.json(&format!("eval shards {line}"));
    assert_eq!(whole["perplexity"], parts["perplexity"]);
}

#[test]
fn self_calibration_is_reproducible() {
    let world = world();
    for out in ["a", "b"] {
        world.ok(&format!(
            "quantize model -o {out} --nsamples 3 --seqlen 20 --group-size 16 --seed 5 -q"
        ));
    }
    let [a, b] = ["a", "b"].map(|out| world.read_json(&format!("{out}/quant_report.json")));
    assert_eq!(a["calibration"]["fingerprint"], b["calibration"]["fingerprint"]);
    assert_eq!(a["calibration"]["sources"][0]["kind"], "self");
    assert_eq!(world.read("a/model.safetensors"), world.read("b/model.safetensors"));
}

#[test]
fn dry_run_plans_and_writes_nothing() {
    let world = world();
    let plan = world.json(&format!("quantize model --dry-run {CALIBRATION} --json"));
    assert!(plan["plan"]["peak_rss_bytes"].as_u64().unwrap() > 1 << 20);
    assert_eq!(plan["totals"]["modules"], 14);
    assert_eq!(std::fs::read_dir(world.dir()).unwrap().count(), 2);
}

#[test]
fn errors_name_the_problem_and_leave_nothing_behind() {
    let world = world();
    world.write("short.txt", "too short");
    world.write("binary.txt", [0xff, 0xfe, 0x00]);
    std::fs::create_dir(world.path("full")).unwrap();
    world.write("full/file", "kept");
    for (line, expected) in [
        ("quantize nowhere -o out", "nowhere"),
        ("quantize nobody/nothing -o out -q", "put the model into a directory"),
        ("quantize text.txt -o out", "text.txt"),
        ("quantize model -o out --calibration short.txt --seqlen 64 -q", "short.txt"),
        ("quantize model -o out --calibration binary.txt -q", "binary.txt"),
        ("quantize model -o out --calibration missing.txt -q", "missing.txt"),
        ("quantize model -o out --group-size 12 -q", "group_size"),
        ("quantize model -o out --damp-percent 1.5 -q", "damp_percent"),
        ("quantize model -o out --desc-act --act-group-aware -q", "act_group_aware"),
        ("quantize model -o full --calibration text.txt --nsamples 2 --seqlen 32 -q", "full"),
        ("eval model --perplexity short.txt -q", "tokens"),
        ("eval model --perplexity text.txt --seqlen 1 -q", "--seqlen 2"),
        ("generate model --prompt a --temperature=-1 -q", "temperature"),
        ("inspect text.txt", "text.txt"),
    ] {
        let stderr = world.fails(line);
        assert!(stderr.contains(expected), "gptq {line}: {stderr}");
        assert!(!world.path("out").exists() && !world.path(".out.partial").exists(), "gptq {line}");
    }
    assert_eq!(std::fs::read_to_string(world.path("full/file")).unwrap(), "kept");
    assert_eq!(
        world.gptq("quantize model -o out --bits 5").status.code(),
        Some(2),
        "usage errors exit with 2"
    );
}

#[test]
fn a_quantized_model_is_not_quantized_again() {
    let world = world();
    world.ok("quantize model -o once --method rtn --group-size 32 -q");
    let stderr = world.fails("quantize once -o twice --method rtn -q");
    assert!(stderr.contains("already") && stderr.contains("once"), "{stderr}");
}

#[test]
fn generates_text_json_and_the_same_text_for_the_same_seed() {
    let world = world();
    let line = "generate model --prompt hello --max-new-tokens 12 --temperature 1 --seed 3";
    let text = world.ok(line);
    assert!(!text.is_empty());
    assert_eq!(text, world.ok(line));
    let json = world.json(&format!("{line} --json"));
    assert_eq!(format!("{}\n", json["text"].as_str().unwrap()), text);
    assert_eq!(json["prompt_tokens"], 5);
    assert!(json["new_tokens"].as_u64().unwrap() <= 12);
    world.ok("generate model --chat hi --system be-brief --max-new-tokens 3 --temperature 0");
}

#[test]
fn bench_reports_its_keys() {
    let world = world();
    let json = world.json("bench model --prompt-tokens 16 --new-tokens 8 --batch 2 --json -q");
    for key in [
        "load_seconds",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "per_token_ms_p50",
        "peak_rss_bytes",
        "read_bandwidth_bytes_per_second",
        "bytes_per_token",
        "bandwidth_fraction",
    ] {
        assert!(json[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {json}");
    }
}

/// `gptq logits` on fixtures, through files alone: what it writes of a decoder, of a masked language model and of encoders
/// that have no head, where the mask is 1.
#[test]
fn raw_outputs_equal_transformers() {
    for (fixture, names) in [
        ("llama", &["logits"][..]),
        ("mixtral", &["logits"]),
        ("bert_mlm", &["logits"]),
        ("bert", &["last_hidden_state", "pooler_output"]),
        ("distilbert", &["last_hidden_state"]),
    ] {
        let Some(directory) = fixtures::dir(fixture) else { continue };
        let world = world();
        let file = directory.join("expected.safetensors");
        let line = format!(
            "logits {} --input {} --output out.safetensors",
            directory.display(),
            file.display()
        );
        world.ok(&line);
        let (written, expected) =
            (Expected::open(world.path("out.safetensors")), Expected::open(&file));
        assert_eq!(written.names(), names, "{fixture}");
        for name in names {
            let ((shape, got), (want_shape, want)) = (written.f32(name), expected.f32(name));
            assert_eq!(shape, want_shape, "{fixture} {name}");
            let masked = shape.len() == 3 && expected.has("attention_mask");
            let mask = if masked {
                expected.i64("attention_mask").1
            } else {
                vec![1; shape[..shape.len() - 1].iter().product()]
            };
            let width = shape[shape.len() - 1];
            for (row, real) in mask.into_iter().enumerate() {
                let want: &[f32] = &want[row * width..][..width];
                let want = if real == 1 { want.to_vec() } else { vec![0.0; width] };
                let got = &got[row * width..][..width];
                assert_close(&format!("{fixture} {name} {row}"), got, &want, 1e-4);
            }
        }
    }
}

#[test]
fn tied_heads_and_ragged_groups() {
    let world = world();
    let shape = TinyLlama { hidden: 96, intermediate: 160, tied: true, ..TinyLlama::default() };
    shape.write(&world.path("ragged"), 3);
    world.ok(&format!("quantize ragged -o out {CALIBRATION} --group-size 64 -q"));
    let eval = world.json(
        "eval out --perplexity text.txt --seqlen 64 --max-windows 2 --reference ragged --json -q",
    );
    assert!(eval["kl_mean"].as_f64().unwrap() < 0.5);
}

fn help(command: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args(command)
        .arg("--help")
        .env("COLUMNS", "100")
        .output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

/// docs/reference/cli.md is generated: run with GPTQ_UPDATE_DOCS=1 to write it.
#[test]
fn the_command_line_reference_is_up_to_date() {
    let main = help(&[]);
    let commands = main
        .lines()
        .skip_while(|l| !l.starts_with("Commands:"))
        .skip(1)
        .take_while(|l| !l.is_empty())
        .filter_map(|l| {
            l.strip_prefix("  ")?.split(' ').next().filter(|w| !w.is_empty() && *w != "help")
        });
    let mut text = String::from(
        "# Command line\n\nGenerated from `--help`; a test fails when it is out of date.\n",
    );
    let mut section = |title: &str, help: &str| {
        text += &["\n## ", title, "\n\n```text\n", help.trim_end(), "\n```\n"].concat();
    };
    section("gptq", &main);
    for command in commands {
        section(&format!("gptq {command}"), &help(&[command]));
    }
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/cli.md");
    if std::env::var_os("GPTQ_UPDATE_DOCS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == text, "run GPTQ_UPDATE_DOCS=1 cargo test -p gptq-cli --test cli");
}
