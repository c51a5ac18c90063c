//! `gptq embed`, `gptq families` and `--family` through the real binary.

#![allow(missing_docs)]

use std::path::PathBuf;
use std::process::{Command, Output};

use gptq_testkit::{fixtures, tiny_llama};
use serde_json::{Value, json};

struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// A directory with a tiny Llama and some lines of text.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        tiny_llama(&dir.path().join("model"), 7);
        let lines = (0..64).map(|i| format!("line {} of {} words\n", i, "some ".repeat(i % 7)));
        std::fs::write(dir.path().join("lines.txt"), lines.collect::<String>()).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A copy of the fixture `name` with the tiny Llama's tokenizer, as `encoder`.
    fn encoder(&self, name: &str) -> Option<()> {
        let from = fixtures::dir(name)?;
        let to = self.path("encoder");
        std::fs::create_dir(&to).unwrap();
        let model = self.path("model");
        let files =
            [(&from, "config.json"), (&from, "model.safetensors"), (&model, "tokenizer.json")];
        for (directory, file) in files {
            std::fs::copy(directory.join(file), to.join(file)).unwrap();
        }
        Some(())
    }

    fn write(&self, name: &str, value: &Value) {
        std::fs::write(self.path(name), value.to_string()).unwrap();
    }

    /// Makes `encoder` one of sentence-transformers that takes the first token, scaled to length 1.
    fn describe_pooling(&self) {
        std::fs::create_dir(self.path("encoder/1_Pooling")).unwrap();
        let step = |path: &str, kind: &str| json!({ "path": path, "type": format!("sentence_transformers.models.{kind}") });
        let steps = [
            step("", "Transformer"),
            step("1_Pooling", "Pooling"),
            step("2_Normalize", "Normalize"),
        ];
        self.write("encoder/modules.json", &json!(steps));
        self.write("encoder/1_Pooling/config.json", &json!({ "pooling_mode_cls_token": true }));
    }

    fn gptq(&self, line: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_gptq"))
            .args(line.split(' '))
            .current_dir(self.dir.path())
            .env("HF_HUB_OFFLINE", "1")
            .env_remove("GPTQ_LOG")
            .output()
            .unwrap()
    }

    fn ok(&self, line: &str) -> String {
        let output = self.gptq(line);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "gptq {line}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, line: &str) -> String {
        let output = self.gptq(line);
        assert_eq!(output.status.code(), Some(1), "gptq {line} must fail");
        String::from_utf8(output.stderr).unwrap()
    }

    /// The vectors that `gptq embed` prints.
    fn embed(&self, line: &str) -> Vec<Vec<f64>> {
        let lines = self.ok(&format!("embed {line}"));
        let vector = |line: &str| -> Vec<f64> {
            let line: Value = serde_json::from_str(line).unwrap();
            line["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
        };
        lines.lines().map(vector).collect()
    }
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn vectors_do_not_depend_on_the_batch_and_obey_the_pooling() {
    let world = World::new();
    if world.encoder("bert").is_none() {
        return;
    }
    let alone = world.embed("encoder --file lines.txt --batch-size 1");
    let together = world.embed("encoder --file lines.txt --batch-size 64");
    assert_eq!((alone.len(), alone[0].len()), (64, 64));
    for (one, other) in alone.iter().zip(&together) {
        assert!(1.0 - cosine(one, other) < 1e-9);
    }
    assert!(cosine(&alone[0], &alone[1]) < 0.9999);
    let cls = world.embed("encoder --text word --pooling cls");
    assert_ne!(cls, world.embed("encoder --text word --pooling mean"));
    world.describe_pooling();
    let found = world.embed("encoder --text word");
    let length: f64 = found[0].iter().map(|x| x * x).sum();
    assert!((length - 1.0).abs() < 1e-5 && 1.0 - cosine(&found[0], &cls[0]) < 1e-9, "{length}");
    world.write("encoder/sentence_bert_config.json", &json!({ "max_seq_length": 3 }));
    assert_eq!(world.embed("encoder --text word"), world.embed("encoder --text wordy"));
}

#[test]
fn prompts_stand_before_each_text() {
    let world = World::new();
    if world.encoder("bert").is_none() {
        return;
    }
    let (plain, query) = (world.embed("encoder --text word"), world.embed("encoder --text q:word"));
    assert_ne!(plain, query);
    let prompts = json!({ "prompts": { "query": "q:" }, "default_prompt_name": "query" });
    world.write("encoder/config_sentence_transformers.json", &prompts);
    assert_eq!(world.embed("encoder --text word"), query);
    assert_eq!(world.embed("encoder --text word --prompt="), plain);
    assert_eq!(world.embed("encoder --text ord --prompt q:w"), query);
    assert_eq!(world.embed("encoder --text word --prompt-name query"), query);
    let error = world.fails("embed encoder --text word --prompt-name document");
    assert!(error.contains("document") && error.contains("query"), "{error}");
    // Prompts whose tokens the model leaves out of its vectors.
    world.describe_pooling();
    let pooling = json!({ "pooling_mode_cls_token": true, "include_prompt": false });
    world.write("encoder/1_Pooling/config.json", &pooling);
    assert!(world.fails("embed encoder --text word").contains("include_prompt"));
    world.ok("embed encoder --text word --prompt=");
}

#[test]
fn encoders_are_calibrated_line_by_line_and_embed_nearly_as_before() {
    let world = World::new();
    if world.encoder("bert").is_none() {
        return;
    }
    world.ok("quantize encoder -o small --bits 8 --group-size 32 --calibration lines.txt");
    let report = std::fs::read(world.path("small/quant_report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    let source = &report["calibration"]["sources"][0];
    assert_eq!((&source["documents"], &source["windows"]), (&json!(64), &json!(64)), "{source}");
    assert_eq!(source["records"], json!(true));
    let (before, after) = (world.embed("encoder --text hello"), world.embed("small --text hello"));
    assert!(cosine(&before[0], &after[0]) > 0.999);
}

#[test]
fn the_output_pools_as_the_model_does() {
    let world = World::new();
    if world.encoder("bert").is_none() {
        return;
    }
    world.describe_pooling();
    world.ok("quantize encoder -o small --bits 8 --group-size 32 --calibration lines.txt");
    world.ok("convert small --to gptq_v2 -o second");
    for output in ["small", "second"] {
        let found = world.embed(&format!("{output} --text hello"));
        assert_eq!(found, world.embed(&format!("{output} --text hello --pooling cls --normalize")));
        assert_ne!(
            found,
            world.embed(&format!("{output} --text hello --pooling mean --normalize"))
        );
    }
}

#[test]
fn decoders_embed_by_their_last_token() {
    let world = World::new();
    let last = world.embed("model --text abc --text abd --pooling last-token --normalize");
    assert!(cosine(&last[0], &last[1]) < 0.9999);
    let error = world.fails("embed model --file model/config.toml");
    assert!(error.contains("config.toml"), "{error}");
}

#[test]
fn a_family_of_a_file_computes_what_the_built_in_one_does() {
    let world = World::new();
    let table = world.ok("families llama");
    assert!(table.contains("qkv = [\"self_attn.q_proj\""), "{table}");
    std::fs::write(world.path("same.toml"), &table).unwrap();
    let plain = world.ok("generate model --prompt abc --max-new-tokens 8 --temperature 0");
    let same = world
        .ok("generate model --prompt abc --max-new-tokens 8 --temperature 0 --family same.toml");
    assert_eq!(plain, same);

    // The same model under another model_type, with another name for a key.
    let config = world.path("model/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let other = text.replace("\"llama\"", "\"mine\"").replace("\"hidden_size\"", "\"d_model\"");
    std::fs::write(&config, other).unwrap();
    let error = world.fails("generate model --prompt abc");
    assert!(error.contains("mine") && error.contains("--family"), "{error}");
    let mine = "model_type = \"mine\"\nbase = \"llama\"\n[config]\nhidden_size = \"d_model\"\n";
    std::fs::write(world.path("mine.toml"), mine).unwrap();
    let found = world
        .ok("generate model --prompt abc --max-new-tokens 8 --temperature 0 --family mine.toml");
    assert_eq!(plain, found);
    world.ok("quantize model -o small --bits 8 --group-size 16 --method rtn --family mine.toml");
    world.ok("generate small --prompt abc --max-new-tokens 8 --temperature 0 --family mine.toml");

    std::fs::write(world.path("bad.toml"), "base = \"llama\"\n[stages]\nqvk = []\n").unwrap();
    let error = world.fails("generate model --prompt abc --family bad.toml");
    assert!(error.contains("bad.toml") && error.contains("qvk"), "{error}");
}

#[test]
fn families_are_listed() {
    let world = World::new();
    let list = world.ok("families");
    let all: Vec<Value> = serde_json::from_str(&world.ok("families --json")).unwrap();
    assert!(all.len() > 40 && list.lines().count() == all.len() + 1, "{list}");
    for family in &all {
        let name = family["model_type"].as_str().unwrap();
        assert!(list.contains(name) && !family["about"].as_str().unwrap().is_empty());
        assert!(family["config_keys"].as_array().unwrap().len() > 5, "{name}");
    }
    let error = world.fails("families lama");
    assert!(error.contains("lama") && error.contains("llama"), "{error}");
}
