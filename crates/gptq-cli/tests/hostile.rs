//! Malformed and malicious input through the real binary: one message that names the file and what is wrong, exit code 1, no
//! panic, nothing left behind, and all of it in 2 GiB of address space.

#![allow(missing_docs)]

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Output};

use gptq_testkit::tiny_llama;
use serde_json::{Map, Value, json};

/// Address space of every run, in KiB: room for threads and mapped files, none for what a file merely claims to hold.
const ADDRESS_SPACE: u32 = 2 << 20;

struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// A directory with a tiny model and some text.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        tiny_llama(&dir.path().join("model"), 7);
        let text: String =
            (0..3000).flat_map(|i| [(i * 37 % 101).to_string(), " ".to_owned()]).collect();
        std::fs::write(dir.path().join("text.txt"), text).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    fn gptq(&self, line: &str) -> Output {
        let limited = format!("ulimit -v {ADDRESS_SPACE}; exec \"$0\" \"$@\"");
        Command::new("sh")
            .args(["-c", &limited, env!("CARGO_BIN_EXE_gptq")])
            .args(line.split(' '))
            .args(["--threads", "2"])
            .current_dir(self.dir.path())
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", self.path("hub"))
            .env("RUST_BACKTRACE", "0")
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

    /// Runs a line that must fail with one message that holds all `parts`, and must leave no file behind.
    fn fails(&self, line: &str, parts: &[&str]) {
        let before = self.files();
        let output = self.gptq(line);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "gptq {line}: {stderr}");
        assert!(output.stdout.is_empty(), "gptq {line} wrote to stdout");
        assert!(!stderr.contains("panicked"), "gptq {line}: {stderr}");
        assert_eq!(stderr.matches("error:").count(), 1, "gptq {line}: {stderr}");
        for part in parts {
            assert!(stderr.contains(part), "gptq {line}: no {part:?} in {stderr}");
        }
        assert_eq!(self.files(), before, "gptq {line} left something behind");
    }

    /// Every file with its size and time of change.
    fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut open = vec![self.dir.path().to_owned()];
        while let Some(dir) = open.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let meta = path.symlink_metadata().unwrap();
                found.push(format!("{} {} {:?}", path.display(), meta.len(), meta.modified()));
                if meta.is_dir() {
                    open.push(path);
                }
            }
        }
        found.sort();
        found
    }

    /// Changes the JSON object in a file.
    fn edit(&self, name: &str, change: impl FnOnce(&mut Map<String, Value>)) {
        let mut value: Value = serde_json::from_slice(&self.read(name)).unwrap();
        change(value.as_object_mut().unwrap());
        self.write(name, value.to_string());
    }

    /// Changes the header of a safetensors file; the data stay.
    fn edit_header(&self, name: &str, change: impl FnOnce(&mut Map<String, Value>)) {
        let bytes = self.read(name);
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
        change(header.as_object_mut().unwrap());
        self.write(name, safetensors_file(&header.to_string(), &bytes[start..]));
    }

    /// Puts the pristine model back.
    fn restore(&self) {
        std::fs::remove_dir_all(self.path("model")).unwrap();
        tiny_llama(&self.path("model"), 7);
    }
}

fn safetensors_file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

const QUANTIZE: &str =
    "quantize model -o out --calibration text.txt --nsamples 4 --seqlen 64 --group-size 32 -q";
const EVAL: &str = "eval model --perplexity text.txt --seqlen 64 --max-windows 2 -q";
const GENERATE: &str = "generate model --prompt ab --max-new-tokens 4 -q";
const Q_PROJ: &str = "model.layers.0.self_attn.q_proj.weight";

#[test]
fn safetensors_whose_tensors_overlap_or_lie_about_their_size() {
    let world = World::new();
    let name = "model/model.safetensors";
    let set = |key: &'static str, value: Value| {
        move |header: &mut Map<String, Value>| header[Q_PROJ][key] = value
    };
    for (key, value) in [
        ("data_offsets", json!([0, 16384])),
        ("data_offsets", json!([1_u64 << 62, (1_u64 << 62) + 16384])),
        ("data_offsets", json!([16384, 0])),
        ("shape", json!([1_u64 << 40, 1_u64 << 40])),
        ("shape", json!([64, 63])),
        ("shape", json!([-64, -64])),
        ("dtype", json!("F33")),
    ] {
        world.edit_header(name, set(key, value));
        for line in [QUANTIZE, EVAL, "inspect model"] {
            world.fails(line, &["model.safetensors"]);
        }
        world.restore();
    }
}

#[test]
fn shard_indices_that_point_elsewhere_or_at_nothing() {
    let world = World::new();
    world.ok("quantize model -o shards --method rtn --group-size 32 --max-shard-size 60KiB -q");
    let index = "shards/model.safetensors.index.json";
    let whole = world.read(index);
    let tensor = "model.norm.weight";
    let eval = "eval shards --perplexity text.txt --seqlen 64 --max-windows 2 -q";
    let absolute = world.path("model/model.safetensors").display().to_string();
    for target in ["../model/model.safetensors", "/etc/passwd", &absolute, "..", ""] {
        world.edit(index, |map| map["weight_map"][tensor] = json!(target));
        for line in [eval, "inspect shards", "generate shards --prompt a -q"] {
            world.fails(line, &["index.json", tensor, "not a plain file name"]);
        }
        world.write(index, &whole);
    }
    world.edit(index, |map| map["weight_map"][tensor] = json!("model-00099.safetensors"));
    world.fails(eval, &["model-00099.safetensors", tensor, "download"]);
    world.write(index, &whole);
    world.edit(index, |map| map["weight_map"]["stranger"] = map["weight_map"][tensor].clone());
    world.fails(eval, &["index.json", "stranger"]);
    for bytes in [&b"{"[..], b"[]", b"\xff\xfe", b"{\"weight_map\": 7}"] {
        world.write(index, bytes);
        world.fails(eval, &["index.json"]);
    }
    world.write(index, &whole);
    std::fs::remove_file(world.path("shards/model-00002-of-00003.safetensors")).unwrap_or_else(
        |_| {
            let any = std::fs::read_dir(world.path("shards")).unwrap().filter_map(Result::ok);
            let shard = any.map(|e| e.path()).find(|p| p.to_string_lossy().contains("-00002-of-"));
            std::fs::remove_file(shard.unwrap()).unwrap();
        },
    );
    world.fails(eval, &["model-00002-of-", "missing"]);
}

#[test]
fn tokenizers_that_are_malformed() {
    let world = World::new();
    for (name, bytes) in [
        ("tokenizer.json", &b"{"[..]),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff"),
        (
            "tokenizer.json",
            b"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": -1}, \"merges\": []}}",
        ),
        ("tokenizer_config.json", b"7"),
        ("tokenizer_config.json", b"{\"a\""),
        ("special_tokens_map.json", b"{\"a\""),
    ] {
        world.write(&format!("model/{name}"), bytes);
        for line in [QUANTIZE, EVAL, GENERATE] {
            world.fails(line, &[name]);
        }
        world.restore();
    }
}

#[test]
fn texts_that_cannot_be_calibrated_with() {
    let world = World::new();
    std::fs::create_dir(world.path("folder.txt")).unwrap();
    for (name, bytes, part) in [
        ("empty.txt", &b""[..], "0 tokens"),
        ("blank.jsonl", b"\n\n\n", "0 tokens"),
        ("bytes.txt", b"abc\xff\xfedef", "not UTF-8"),
        ("cut.jsonl", b"{\"text\": \"abc", "line 1"),
        ("keys.jsonl", b"{\"txt\": \"abc\"}", "line 1"),
        ("ids.jsonl", b"{\"input_ids\": [1, 99999]}", "99999"),
        ("deep.jsonl", "{\"text\":".repeat(50_000).as_bytes(), "line 1"),
        ("short.parquet", b"PAR1", "Parquet"),
        ("footer.parquet", b"PAR1\xff\xff\xff\x7fPAR1", "Parquet"),
        ("zip.txt", b"\x1f\x8b\x08\x00", "gzip"),
    ] {
        world.write(name, bytes);
        world.fails(&QUANTIZE.replace("text.txt", name), &[name, part]);
    }
    world.fails(&QUANTIZE.replace("text.txt", "folder.txt"), &["folder.txt"]);
    world.fails(&QUANTIZE.replace("--nsamples 4", "--nsamples 0"), &["nothing to draw"]);
    for (name, part) in
        [("empty.txt", "0 tokens"), ("bytes.txt", "UTF-8"), ("folder.txt", "folder")]
    {
        world.fails(&EVAL.replace("text.txt", name), &[part]);
    }
}

#[test]
fn output_that_cannot_be_written() {
    let world = World::new();
    world.write("file", "kept");
    symlink(world.path("loop"), world.path("loop")).unwrap();
    for output in ["file", "file/out", "loop/out", "/proc/nowhere/out"] {
        let name = output.split('/').find(|part| !part.is_empty()).unwrap();
        world.fails(&QUANTIZE.replace("-o out", &format!("-o {output}")), &[name]);
    }
    assert_eq!(world.read("file"), b"kept");
    world.ok("quantize model -o q --method rtn --group-size 32 -q");
    for output in ["file/out", "loop/out", "loop"] {
        let name = output.split('/').next().unwrap();
        world.fails(&format!("convert q --to hf -o {output} -q"), &[name]);
        world.fails(&format!("convert q --to gguf -o {output}/x.gguf -q"), &[name]);
    }
}

#[test]
fn input_that_is_read_only_is_read_and_left_as_it_was() {
    let world = World::new();
    let chmod = |name: &str, mode: u32| {
        std::fs::set_permissions(world.path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let names: Vec<String> = std::fs::read_dir(world.path("model"))
        .unwrap()
        .map(|entry| format!("model/{}", entry.unwrap().file_name().to_string_lossy()))
        .collect();
    for name in &names {
        chmod(name, 0o444);
    }
    chmod("text.txt", 0o444);
    chmod("model", 0o555);
    let before = world.files();
    for line in [EVAL, GENERATE, "inspect model"] {
        world.ok(line);
    }
    assert_eq!(world.files(), before);
    world.ok(QUANTIZE);
    world.ok(&format!("{QUANTIZE} --overwrite"));
    let after = world.files();
    let of_the_model = |files: &[String]| -> Vec<String> {
        let prefix = world.path("model").display().to_string();
        files.iter().filter(|line| line.starts_with(&prefix)).cloned().collect()
    };
    assert_eq!(of_the_model(&after), of_the_model(&before));
    chmod("model", 0o755);
}

/// Files without content that say they are huge, under a limit that their sizes exceed by far.
#[test]
fn what_files_claim_takes_no_memory() {
    let world = World::new();
    let sparse = |name: &str, start: &[u8], bytes: u64| {
        world.write(name, start);
        let file = std::fs::OpenOptions::new().write(true).open(world.path(name)).unwrap();
        file.set_len(bytes).unwrap();
    };
    let huge = 1_u64 << 38;
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    {
        sparse(&format!("model/{name}"), b"{", huge);
        world.fails(GENERATE, &[name, "more than the 100000000 bytes"]);
        world.restore();
    }
    let name = "model/model.safetensors";
    sparse(name, &99_999_999_u64.to_le_bytes(), 100_000_007);
    world.fails(GENERATE, &["model.safetensors", "header"]);
    let header = format!(
        "{{\"model.embed_tokens.weight\":{{\"dtype\":\"F32\",\"shape\":[256,64],\"data_offsets\":[0,65536]}},\
         \"{Q_PROJ}\":{{\"dtype\":\"F32\",\"shape\":[{},64],\"data_offsets\":[65536,{}]}}}}",
        huge / 256,
        huge + 65536
    );
    let start = safetensors_file(&header, b"");
    sparse(name, &start, start.len() as u64 + huge + 65536);
    for line in [QUANTIZE, EVAL, GENERATE] {
        world.fails(line, &["model.safetensors"]);
    }
    world.restore();
    sparse("big.txt", b"text", huge);
    world.fails(&EVAL.replace("text.txt", "big.txt"), &["big.txt"]);
    sparse("big.jsonl", b"{\"text\": \"", huge);
    world.fails(&QUANTIZE.replace("text.txt", "big.jsonl"), &["big.jsonl", "64 MiB"]);
    let counts = [&b"GGUF\x03\0\0\0"[..], &[0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0]].concat();
    sparse("big.gguf", &[&counts[..], &counts[8..]].concat(), huge);
    world.fails("generate big.gguf --prompt a -q", &["big.gguf"]);
    sparse("rules.json", b"{", huge);
    world.fails(&format!("{QUANTIZE} --dynamic rules.json"), &["rules.json", "100000000"]);
}
