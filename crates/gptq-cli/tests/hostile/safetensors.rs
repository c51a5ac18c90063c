//! Safetensors files and shard indices.

use gptq_testkit::safetensors_file;
use serde_json::{Map, Value, json};

use crate::{EVAL, GENERATE, Q_PROJ, QUANTIZE, world};

const NAME: &str = "model/model.safetensors";

#[test]
fn truncated_files_and_huge_headers() {
    let world = world();
    let whole = world.read(NAME);
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let with_length = |length: u64| [&length.to_le_bytes(), &whole[8..]].concat();
    for (bytes, part) in [
        (Vec::new(), "0 bytes"),
        (whole[..5].to_vec(), "5 bytes"),
        (whole[..header / 2].to_vec(), "truncated"),
        (whole[..whole.len() - 1].to_vec(), "truncated"),
        ([&whole[..], b"!"].concat(), "damaged"),
        (with_length(u64::MAX), "more than the limit"),
        (with_length(99_999_999), "truncated"),
        (with_length(2), "header"),
        (safetensors_file::file(&"[".repeat(200_000), b""), "header"),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), "is it a safetensors file?"),
    ] {
        world.write(NAME, bytes);
        for line in [QUANTIZE, EVAL, GENERATE, "inspect model", "convert model --to gguf -o x -q"] {
            world.refuses(line, &["model.safetensors", part]);
        }
        // A verdict is the data of this command.
        let verdict = world.gptq("verify model");
        assert_eq!(verdict.status.code(), Some(1));
        let text = [world.text(&verdict.stdout), world.text(&verdict.stderr)].concat();
        assert!(text.contains("model.safetensors") && text.contains(part), "{text}");
    }
}

#[test]
fn tensors_that_overlap_or_lie_about_their_size() {
    let world = world();
    let whole = world.read(NAME);
    for (key, value) in [
        ("data_offsets", json!([0, 16384])),
        ("data_offsets", json!([1_u64 << 62, (1_u64 << 62) + 16384])),
        ("data_offsets", json!([16384, 0])),
        ("shape", json!([1_u64 << 40, 1_u64 << 40])),
        ("shape", json!([64, 63])),
        ("shape", json!([-64, -64])),
        ("dtype", json!("F33")),
    ] {
        world.edit_header(NAME, |header| header[Q_PROJ][key] = value);
        for line in [QUANTIZE, EVAL, "inspect model"] {
            world.refuses(line, &["model.safetensors"]);
        }
        world.write(NAME, &whole);
    }
}

#[test]
fn tensors_of_the_wrong_dtype_or_shape() {
    let world = world();
    let whole = world.read(NAME);
    for (tensor, key, value) in [
        (Q_PROJ, "dtype", json!("I32")),
        (Q_PROJ, "dtype", json!("U32")),
        (Q_PROJ, "shape", json!([32, 128])),
        (Q_PROJ, "shape", json!([4096])),
        ("model.layers.1.input_layernorm.weight", "shape", json!([8, 8])),
        ("model.embed_tokens.weight", "dtype", json!("I32")),
        ("lm_head.weight", "shape", json!([64, 256])),
    ] {
        world.edit_header(NAME, |header| header[tensor][key] = value);
        for line in [QUANTIZE, EVAL, GENERATE] {
            world.refuses(line, &["model", tensor]);
        }
        world.write(NAME, &whole);
    }
}

#[test]
fn a_tensor_that_is_missing() {
    let world = world();
    for tensor in [Q_PROJ, "model.norm.weight", "lm_head.weight"] {
        world.edit_header(NAME, |header| {
            let entry = header.remove(tensor).unwrap();
            header.insert("stranger".to_owned(), entry);
        });
        for line in [QUANTIZE, EVAL, GENERATE] {
            world.refuses(line, &[tensor, "missing"]);
        }
        world.restore();
    }
}

#[test]
fn an_index_that_points_outside_or_at_nothing() {
    let world = world();
    world.ok("quantize model -o shards --method rtn --group-size 32 --max-shard-size 60KiB -q");
    let index = "shards/model.safetensors.index.json";
    let whole = world.read(index);
    let tensor = "model.norm.weight";
    let eval = "eval shards --perplexity text.txt --seqlen 64 --max-windows 2 -q";
    let absolute = world.path(NAME).display().to_string();
    for target in ["../model/model.safetensors", "/etc/passwd", &absolute, "..", ""] {
        world.edit(index, |map| map["weight_map"][tensor] = json!(target));
        for line in [eval, "inspect shards", "generate shards --prompt a -q"] {
            world.refuses(line, &["index.json", tensor, "not a plain file name"]);
        }
        world.write(index, &whole);
    }
    world.edit(index, |map| map["weight_map"][tensor] = json!("model-00099.safetensors"));
    world.refuses(eval, &["model-00099.safetensors", tensor, "download"]);
    world.write(index, &whole);
    world.edit(index, |map| map["weight_map"]["stranger"] = map["weight_map"][tensor].clone());
    world.refuses(eval, &["index.json", "stranger"]);
    for bytes in [&b"{"[..], b"[]", b"\xff\xfe", b"{\"weight_map\": 7}"] {
        world.write(index, bytes);
        world.refuses(eval, &["index.json"]);
    }
}

#[test]
fn a_shard_that_is_missing() {
    let world = world();
    world.ok("quantize model -o shards --method rtn --group-size 32 --max-shard-size 60KiB -q");
    let index = world.read_json("shards/model.safetensors.index.json");
    let places: &Map<String, Value> = index["weight_map"].as_object().unwrap();
    let shard = places["model.layers.1.mlp.down_proj.qweight"].as_str().unwrap();
    std::fs::remove_file(world.path("shards").join(shard)).unwrap();
    for line in [
        "eval shards --perplexity text.txt --seqlen 64 --max-windows 2 -q",
        "generate shards --prompt a -q",
        "inspect shards",
        "convert shards --to hf -o out -q",
    ] {
        world.refuses(line, &[shard, "missing", "download"]);
    }
}

/// Files without content that say they are huge, under a limit that their sizes exceed by far.
#[test]
fn what_files_claim_takes_no_memory() {
    let world = world();
    let sparse = |name: &str, start: &[u8], bytes: u64| {
        world.write(name, start);
        let file = std::fs::OpenOptions::new().write(true).open(world.path(name)).unwrap();
        file.set_len(bytes).unwrap();
    };
    let huge = 1_u64 << 38;
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    {
        sparse(&format!("model/{name}"), b"{", huge);
        world.refuses(GENERATE, &[name, "more than the 100000000 bytes"]);
        world.restore();
    }
    sparse(NAME, &99_999_999_u64.to_le_bytes(), 100_000_007);
    world.refuses(GENERATE, &["model.safetensors", "header"]);
    let header = format!(
        "{{\"model.embed_tokens.weight\":{{\"dtype\":\"F32\",\"shape\":[256,64],\"data_offsets\":[0,65536]}},\
         \"{Q_PROJ}\":{{\"dtype\":\"F32\",\"shape\":[{},64],\"data_offsets\":[65536,{}]}}}}",
        huge / 256,
        huge + 65536
    );
    let start = safetensors_file::file(&header, b"");
    sparse(NAME, &start, start.len() as u64 + huge + 65536);
    for line in [QUANTIZE, EVAL, GENERATE] {
        world.refuses(line, &["model.safetensors"]);
    }
    world.restore();
    sparse("big.txt", b"text", huge);
    world.refuses(&EVAL.replace("text.txt", "big.txt"), &["big.txt"]);
    sparse("big.jsonl", b"{\"text\": \"", huge);
    world.refuses(&QUANTIZE.replace("text.txt", "big.jsonl"), &["big.jsonl", "64 MiB"]);
    let counts = [&b"GGUF\x03\0\0\0"[..], &[0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0]].concat();
    sparse("big.gguf", &[&counts[..], &counts[8..]].concat(), huge);
    world.refuses("generate big.gguf --prompt a -q", &["big.gguf"]);
    sparse("rules.json", b"{", huge);
    world.refuses(&format!("{QUANTIZE} --dynamic rules.json"), &["rules.json", "100000000"]);
}
