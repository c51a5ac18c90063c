//! `gptq sweep`, weighted calibration sources and mixed precision on tiny models.

#![allow(missing_docs)]

use gptq_testkit::World;
use serde_json::Value;

fn world() -> World {
    World::new(env!("CARGO_BIN_EXE_gptq"))
}

const CALIBRATION: &str = "--calibration text.txt --nsamples 4 --seqlen 64";
const EVAL: &str = "--eval text.txt --eval-seqlen 64 --max-windows 4";

fn names(results: &Value) -> Vec<&str> {
    results["rows"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect()
}

/// The rows of a sweep that were run, by what is announced of them.
fn announced(stderr: &str) -> usize {
    stderr.lines().filter(|line| line.starts_with("row ")).count()
}

#[test]
fn a_row_is_what_quantize_and_eval_do() {
    let world = world();
    let line = format!(
        "sweep model -o out --method gptq,rtn --bits 4,3 --group-size 32 --sym asym {CALIBRATION} {EVAL} --keep --json -q"
    );
    let results = world.json(&line);
    assert_eq!(names(&results), ["gptq-4bit", "gptq-3bit", "rtn-4bit", "rtn-3bit"]);
    for row in results["rows"].as_array().unwrap() {
        let name = row["name"].as_str().unwrap();
        let command = row["command"].as_str().unwrap().strip_prefix("gptq ").unwrap();
        world.ok(&format!("{} -q", command.replace("DIR", &format!("alone-{name}"))));
        let kept = row["checkpoint"].as_str().unwrap();
        for file in ["model.safetensors", "config.json", "quantize_config.json", "quant_log.jsonl"]
        {
            let (one, other) = (
                world.read(&format!("{kept}/{file}")),
                world.read(&format!("alone-{name}/{file}")),
            );
            // The log has times.
            assert!(file.ends_with("jsonl") || one == other, "{name}: {file}");
        }
        let eval = world.json(&format!(
            "eval alone-{name} --perplexity text.txt --seqlen 64 --max-windows 4 --reference model --json -q"
        ));
        for key in
            ["perplexity", "perplexity_stderr", "kl_mean", "kl_99_9", "top1_agreement", "tokens"]
        {
            assert_eq!(row["evaluations"][0][key], eval[key], "{name}: {key}");
        }
        let (original, expected) =
            (&results["original"][0]["perplexity"], &eval["reference_perplexity"]);
        assert_eq!(original, expected);
    }
    for file in [
        "results.md",
        "plots/perplexity-text.svg",
        "plots/kl-text.svg",
        "plots/kl.svg",
        "plots/loss.svg",
        "plots/loss-gptq-3bit.svg",
        "plots/error-gptq-3bit.svg",
    ] {
        assert!(world.path("out").join(file).exists(), "{file}");
    }
    assert_eq!(world.read_json("out/results.json")["rows"], results["rows"]);
    let table = String::from_utf8(world.read("out/results.md")).unwrap();
    assert!(table.contains("| gptq-3bit |") && table.contains("| original |"), "{table}");
}

#[test]
fn finished_rows_are_not_run_again() {
    let world = world();
    let line = format!("sweep model -o out --bits 4,3 --method rtn {EVAL}");
    let first = world.gptq(&line);
    assert_eq!(announced(&String::from_utf8_lossy(&first.stderr)), 2);
    assert_eq!(std::fs::read_dir(world.path("out/checkpoints")).unwrap().count(), 0, "not kept");
    let again = world.gptq(&line);
    assert_eq!(announced(&String::from_utf8_lossy(&again.stderr)), 0);
    assert_eq!(again.stdout, first.stdout, "the same table, with the times of the first run");

    // One row more is one run more; the others are found under their new names.
    let more = format!("sweep model -o out --bits 4,3,2 --method rtn --set sym=true,false {EVAL}");
    let planned = world.json(&format!("{more} --dry-run --json -q"));
    assert_eq!(planned["rows"].as_array().unwrap().len(), 6);
    let one = format!("sweep model -o out --bits 4,3,2 --method rtn {EVAL}");
    let planned = world.json(&format!("{one} --dry-run --json -q"));
    let done: Vec<bool> =
        planned["rows"].as_array().unwrap().iter().map(|r| r["done"].as_bool().unwrap()).collect();
    assert_eq!(done, [true, true, false]);
    assert_eq!(announced(&String::from_utf8_lossy(&world.gptq(&one).stderr)), 1);

    // A text that was copied is the same text.
    let text = world.read("text.txt");
    world.write("text.txt", &text);
    assert_eq!(announced(&String::from_utf8_lossy(&world.gptq(&one).stderr)), 0);

    // A row whose file is lost runs again; one whose text has changed as well.
    for entry in std::fs::read_dir(world.path("out/rows")).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("rtn-3bit") {
            std::fs::remove_file(path).unwrap();
        }
    }
    assert_eq!(announced(&String::from_utf8_lossy(&world.gptq(&one).stderr)), 1);
    world.write("text.txt", [b"A new beginning. ".as_slice(), &text].concat());
    assert_eq!(announced(&String::from_utf8_lossy(&world.gptq(&one).stderr)), 3);
}

#[test]
fn a_checkpoint_that_was_not_measured_yet_is_not_made_again() {
    let world = world();
    world.ok(&format!("sweep model -o out --bits 4 {CALIBRATION} {EVAL} --keep -q"));
    let rows = world.path("out/rows");
    for entry in std::fs::read_dir(&rows).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let kept = std::fs::read_dir(world.path("out/checkpoints")).unwrap().next().unwrap().unwrap();
    let weights = kept.path().join("model.safetensors");
    let before = std::fs::metadata(&weights).unwrap().modified().unwrap();
    // Nor if its row has another name now.
    for bits in ["4", "4,3"] {
        world.ok(&format!("sweep model -o out --bits {bits} {CALIBRATION} {EVAL} --keep -q"));
        assert_eq!(std::fs::metadata(&weights).unwrap().modified().unwrap(), before);
        std::fs::remove_dir_all(&rows).unwrap();
        std::fs::create_dir(&rows).unwrap();
    }
    assert_eq!(std::fs::read_dir(world.path("out/checkpoints")).unwrap().count(), 2);
}

#[test]
fn what_does_not_fit_any_more_is_run_again() {
    let world = world();
    let line = format!("sweep model -o out --bits 4 {CALIBRATION} {EVAL} --keep");
    let rows_run = || announced(&String::from_utf8_lossy(&world.gptq(&line).stderr));
    let files = |directory: &str| {
        let entries = std::fs::read_dir(world.path(directory)).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
    };
    assert_eq!((rows_run(), rows_run()), (1, 0));
    // A row that is no JSON.
    let row = files("out/rows").into_iter().find(|p| p.to_string_lossy().contains("4bit")).unwrap();
    let result = std::fs::read(&row).unwrap();
    std::fs::write(&row, "{").unwrap();
    assert_eq!((rows_run(), rows_run()), (1, 0));
    // A run that was begun by another build.
    let [checkpoint] = &files("out/checkpoints")[..] else { panic!("one row") };
    let name = checkpoint.file_name().unwrap().to_str().unwrap();
    std::fs::remove_dir_all(checkpoint).unwrap();
    std::fs::remove_file(&row).unwrap();
    let journal = r#"{"fingerprint": {"numerics": 0}, "blocks_done": 1, "records": []}"#;
    let partial = format!("out/checkpoints/.{name}.partial");
    std::fs::create_dir(world.path(&partial)).unwrap();
    world.write(&format!("{partial}/journal.json"), journal);
    assert_eq!((rows_run(), rows_run()), (1, 0));
    let figures = |bytes: &[u8]| {
        let row: Value = serde_json::from_slice(bytes).unwrap();
        row["evaluations"][0]["perplexity"].as_f64().unwrap()
    };
    assert_eq!(figures(&std::fs::read(&row).unwrap()), figures(&result));
    // A model that means something else.
    let mut config = world.read_json("model/config.json");
    config["rope_theta"] = 5000.0.into();
    world.write("model/config.json", config.to_string());
    assert_eq!((rows_run(), rows_run()), (1, 0));
    // Another chat template, which chats are calibrated through.
    world.write("model/chat_template.jinja", "{{ messages[0].content }}");
    assert_eq!((rows_run(), rows_run()), (1, 0));
}

#[test]
fn checkpoints_that_were_kept_stay() {
    let world = world();
    let line = format!("sweep model -o out --bits 4 --method rtn {EVAL} -q");
    world.ok(&format!("{line} --keep"));
    world.write("other.txt", world.read("text.txt"));
    world.ok(&format!("{line} --eval other.txt"));
    assert_eq!(std::fs::read_dir(world.path("out/checkpoints")).unwrap().count(), 1);
}

#[test]
fn rows_that_are_the_same_run_once() {
    let world = world();
    world.write(
        "rows.toml",
        "[[row]]\nname = \"a\"\n[[row]]\nname = \"b\"\nstatic-groups = false\n",
    );
    let line = format!("sweep model -o out --rows rows.toml --group-size 32 {CALIBRATION} {EVAL}");
    assert_eq!(announced(&String::from_utf8_lossy(&world.gptq(&line).stderr)), 1);
    assert_eq!(names(&world.read_json("out/results.json")), ["a", "b"]);
}

#[test]
fn without_texts_nothing_needs_a_tokenizer() {
    let world = world();
    std::fs::remove_file(world.path("model/tokenizer.json")).unwrap();
    let results = world.json("sweep model -o out --method rtn --bits 4,3 --keep --json -q");
    assert_eq!(names(&results), ["rtn-4bit", "rtn-3bit"]);
    assert!(results["original"].as_array().unwrap().is_empty());
}

#[test]
fn rows_come_from_files_and_wrong_ones_are_named() {
    let world = world();
    world.write(
        "rows.toml",
        "defaults = { group-size = 32, nsamples = 4, seqlen = 64 }\n\
         [[row]]\nname = \"paper\"\nscale-search = \"minmax\"\nsigned-scales = false\n\
         calibration = [[\"text.txt@3\", \"self\"]]\n\
         [[row]]\nmethod = \"rtn\"\n",
    );
    let results =
        world.json(&format!("sweep model -o out --rows rows.toml --bits 4 {EVAL} --json -q"));
    assert_eq!(names(&results)[1], "rtn-4bit");
    let sources = &results["rows"][0]["calibration"]["sources"];
    assert_eq!((&sources[0]["windows"], &sources[1]["windows"]), (&3.into(), &1.into()));
    assert_eq!((&sources[0]["weight"], &sources[1]["kind"]), (&3.0.into(), &"self".into()));
    for (line, expected) in [
        ("sweep model -o bad --bits 5", "5bit"),
        ("sweep model -o bad --set bitz=4", "bitz"),
        ("sweep model -o bad --set output=x", "sweep itself"),
        ("sweep model -o bad --bits 4 --group-size 12", "group_size"),
        ("sweep model -o bad --method rtn --eval missing.txt", "missing.txt"),
        ("sweep model -o bad --rows text.txt", "text.txt"),
        ("sweep model -o bad --method rtn --target-bpw 3.5", "target_bpw"),
        ("sweep model -o bad --method awq --target-bpw 4 --calibration missing.txt", "target_bpw"),
        ("sweep model -o bad --target-bpw 4,1.5 --calibration missing.txt", "cannot be reached"),
    ] {
        let stderr = world.fails(&format!("{line} -q"));
        assert!(stderr.contains(expected), "gptq {line}: {stderr}");
    }
}

#[test]
fn every_key_is_documented() {
    let world = world();
    let line = format!("sweep model --target-bpw 5 --group-size 32 {CALIBRATION} {EVAL} --json -q");
    let results = world.json(&format!("{line} -o out"));
    let planned = world.json(&format!("{line} --dry-run"));
    let text = include_str!("../../../docs/reference/json.md");
    let mut found = Vec::new();
    keys(&results, &mut found);
    keys(&planned, &mut found);
    for key in found {
        let named = [format!("`{key}"), format!(".{key}`")];
        assert!(named.iter().any(|name| text.contains(name)), "{key} is not in json.md");
    }
}

/// Every key, of nested objects too; those of settings are options, whose documentation is elsewhere.
fn keys(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                found.push(key.clone());
                if key != "settings" {
                    keys(inner, found);
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|inner| keys(inner, found)),
        _ => {}
    }
}

#[test]
fn weighted_sources_share_the_windows() {
    let world = world();
    let own =
        "--calibration text.txt@3 --calibration self@1 --nsamples 8 --seqlen 32 --group-size 16";
    for (out, threads) in [("a", 1), ("b", 3)] {
        world.ok(&format!("quantize model -o {out} {own} --threads {threads} -q"));
    }
    assert_eq!(world.read("a/model.safetensors"), world.read("b/model.safetensors"));
    let report = world.read_json("a/quant_report.json");
    let sources = report["calibration"]["sources"].as_array().unwrap();
    let told: Vec<_> = sources
        .iter()
        .map(|s| (s["name"].as_str().unwrap(), s["windows"].as_u64().unwrap()))
        .collect();
    assert_eq!(told, [("text.txt", 6), ("self", 2)]);
    assert_eq!(report["calibration"]["windows"], 8);
    let card = String::from_utf8(world.read("a/README.md")).unwrap();
    assert!(card.contains("text.txt (6)"), "{card}");
    for (line, expected) in [
        ("--calibration self --calibration self@2", "twice"),
        ("--calibration text.txt@0", "positive"),
        ("--calibration text.txt --calibration self@0.001 --nsamples 8", "none of 8"),
    ] {
        let stderr = world.fails(&format!("quantize model -o c {line} -q"));
        assert!(stderr.contains(expected), "{line}: {stderr}");
    }
}

#[test]
fn bits_are_chosen_for_a_size() {
    let world = world();
    let line = format!("quantize model {CALIBRATION} --group-size 32 -q");
    // What the ends of the range take, with their scales and indices.
    let size = |settings: &str, out: &str| {
        world.json(&format!("{line} {settings} -o {out} --json"))["bits_per_weight"]
            .as_f64()
            .unwrap()
    };
    let (three, four) = (size("--bits 3", "three"), size("--bits 4", "four"));
    let target = f64::midpoint(three, four);
    for (out, threads) in [("one", 1), ("two", 3)] {
        let reached = size(&format!("--target-bpw {target} --threads {threads}"), out);
        assert!(reached <= target && reached > target - 0.6, "{three} {four} {target} {reached}");
    }
    assert_eq!(world.read("one/model.safetensors"), world.read("two/model.safetensors"));
    assert_eq!(world.read("one/config.json"), world.read("two/config.json"));

    let report = world.read_json("one/quant_report.json");
    let mixed = &report["mixed_precision"];
    assert_eq!(mixed["bits_per_weight"], report["bits_per_weight"]);
    assert!(mixed["expected_kl"].as_f64().unwrap() > 0.0);
    // Two blocks of q/k/v, o, gate/up and down.
    assert_eq!(mixed["groups"].as_array().unwrap().len(), 8);
    for group in mixed["groups"].as_array().unwrap() {
        for module in group["modules"].as_array().unwrap() {
            let written = report["modules"]
                .as_array()
                .unwrap()
                .iter()
                .find(|m| m["layer"] == group["layer"] && m["module"] == *module);
            assert_eq!(written.unwrap()["bits"], group["bits"], "{module}");
        }
    }
    // Readers take the bits from the rules.
    let inspect = world.json("inspect one --json");
    let seen: Vec<u64> = inspect["modules"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["bits"].as_u64().unwrap())
        .collect();
    assert!(seen.iter().any(|&bits| bits != seen[0]), "{seen:?}");
    assert!(inspect["quantization"]["bits_per_weight"].as_f64().unwrap() <= target);
    world.ok("verify one -q");
    world.ok("eval one --perplexity text.txt --seqlen 64 --max-windows 2 -q");

    // Rules of the user hold, and what they name is no longer free.
    world.write("rules.json", r#"{"model\\.layers\\.0\\.mlp\\.down_proj": {"bits": 8}, "-:model\\.layers\\.1\\.mlp": {}}"#);
    let report = world.json(&format!("{line} --target-bpw 6 --dynamic rules.json -o ruled --json"));
    assert!(report["bits_per_weight"].as_f64().unwrap() <= 6.0);
    assert_eq!(report["mixed_precision"]["groups"].as_array().unwrap().len(), 5);
    let down = |r: &Value| {
        let of = |m: &&Value| m["layer"] == 0 && m["module"] == "mlp.down_proj";
        r["modules"].as_array().unwrap().iter().find(of).unwrap()["bits"].as_u64()
    };
    assert_eq!(down(&report), Some(8));

    // What is bound to a linear that stays as it is keeps the width that was counted for it.
    world.write("bound.json", r#"{"-:.*k_proj": {}}"#);
    let report = world.json(&format!("{line} --target-bpw 5 --dynamic bound.json -o bound --json"));
    assert_eq!(report["bits_per_weight"], report["mixed_precision"]["bits_per_weight"]);
    let modules = report["modules"].as_array().unwrap();
    let queries = modules.iter().filter(|m| m["module"] == "self_attn.q_proj");
    assert_eq!(queries.map(|m| m["bits"].as_u64().unwrap()).collect::<Vec<_>>(), [4, 4]);

    for (settings, expected) in [
        ("--target-bpw 1.5", "cannot be reached"),
        ("--target-bpw 4 --method rtn", "--method gptq"),
        ("--target-bpw 4 --method awq", "--method gptq"),
    ] {
        let stderr = world.fails(&format!("{line} {settings} -o none"));
        assert!(stderr.contains(expected), "{settings}: {stderr}");
    }
    let usage = world.gptq(&format!("{line} --target-bpw nan -o none"));
    let stderr = String::from_utf8_lossy(&usage.stderr);
    assert!(usage.status.code() == Some(2) && stderr.contains("above 0"), "{stderr}");
}

#[test]
fn the_float_stream_of_corrections_is_computed_once() {
    let world = world();
    // Alone, a row has nobody to share with.
    world.ok(&format!("sweep model -o alone --bits 3 --group-size 32 {CALIBRATION} --keep -q"));
    let line = format!(
        "sweep model -o out --bits 4,3 --group-size 32 --set correction=none,qep,gptaq {CALIBRATION} --keep --json -q"
    );
    let results = world.json(&line);
    let row = |bits: &str, correction: &str| {
        let is = |row: &&Value| {
            row["settings"]["bits"] == bits && row["settings"]["correction"] == correction
        };
        let rows = results["rows"].as_array().unwrap();
        rows.iter().find(is).unwrap()["checkpoint"].as_str().unwrap()
    };
    let alone = world.read_json("alone/results.json");
    let alone = alone["rows"][0]["checkpoint"].as_str().unwrap();
    assert_eq!(
        world.read(&format!("{}/model.safetensors", row("3", "qep"))),
        world.read(&format!("{alone}/model.safetensors"))
    );
    let shares = |directory: &str| {
        let report = world.read_json(&format!("{directory}/quant_report.json"));
        report["phases"].as_array().unwrap().iter().any(|phase| phase["phase"] == "scratch")
    };
    assert!(!shares(alone) && !shares(row("3", "none")));
    assert!(shares(row("4", "qep")) && shares(row("3", "gptaq")));
    // Other text; and a quantized head, which needs the stream itself.
    for varied in ["calibration-temperature=0.7,1.0", "lm-head=true,false"] {
        let line = format!("--set {varied} --bits 3 --group-size 32 --nsamples 4 --seqlen 64");
        let results = world.json(&format!("sweep model -o varied {line} --keep --json -q"));
        for row in results["rows"].as_array().unwrap() {
            assert!(!shares(row["checkpoint"].as_str().unwrap()), "{varied}");
        }
    }
}

#[test]
fn what_bits_are_chosen_from_is_measured_once() {
    let world = world();
    let line = format!(
        "sweep model -o out --target-bpw 5,6 --group-size 32 --sym both --set correction=none,qep {CALIBRATION} {EVAL}"
    );
    let run = world.gptq(&line);
    let stderr = String::from_utf8_lossy(&run.stderr);
    assert_eq!(announced(&stderr), 8, "{stderr}");
    // For each grid.
    assert_eq!(stderr.lines().filter(|line| *line == "sensitivity").count(), 2, "{stderr}");
    assert_eq!(stderr.lines().filter(|line| *line == "calibration").count(), 1, "{stderr}");
}

#[test]
fn a_row_that_fails_is_told_and_left_behind() {
    let world = world();
    world.write("short.txt", b"Too short.");
    let line = "sweep model -o out --method gptq,rtn --nsamples 4 --seqlen 64 --calibration short.txt \
                --calibration text.txt --eval text.txt --eval-seqlen 64 --max-windows 2";
    for ran in [3, 1] {
        let run = world.gptq(line);
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert!(!run.status.success() && stderr.contains("1 of 3 rows failed"), "{stderr}");
        assert_eq!(announced(&stderr), ran, "{stderr}");
        let results = world.read_json("out/results.json");
        assert_eq!(names(&results).len(), 2);
        assert!(results["failed"][0]["error"].as_str().unwrap().contains("short.txt"), "{results}");
        let table = String::from_utf8(world.read("out/results.md")).unwrap();
        assert!(table.contains("## Failed") && table.contains("short.txt"), "{table}");
    }
}
