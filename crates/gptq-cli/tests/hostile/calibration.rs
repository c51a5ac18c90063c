//! Texts and rules of `--dynamic`.

use serde_json::json;

use crate::{EVAL, QUANTIZE, world};

#[test]
fn malformed_jsonl_parquet_and_utf8() {
    let world = world();
    std::fs::create_dir(world.path("folder.txt")).unwrap();
    for (name, bytes, part) in [
        ("bytes.txt", &b"abc\xff\xfedef"[..], "not UTF-8"),
        ("cut.jsonl", b"{\"text\": \"abc", "line 1"),
        ("second.jsonl", b"{\"text\": \"abc\"}\n{\"text\": 7}\n", "line 2"),
        ("keys.jsonl", b"{\"txt\": \"abc\"}", "line 1"),
        ("bytes.jsonl", b"{\"text\": \"\xff\"}", "not UTF-8"),
        ("ids.jsonl", b"{\"input_ids\": [1, 99999]}", "99999"),
        ("negative.jsonl", b"{\"input_ids\": [-1]}", "-1"),
        ("deep.jsonl", "{\"text\":".repeat(50_000).as_bytes(), "line 1"),
        ("short.parquet", b"PAR1", "Parquet"),
        ("footer.parquet", b"PAR1\xff\xff\xff\x7fPAR1", "Parquet"),
        ("noise.parquet", &[&b"PAR1"[..], &[7; 64], &[64, 0, 0, 0], b"PAR1"].concat(), "Parquet"),
        ("zip.txt", b"\x1f\x8b\x08\x00", "gzip"),
    ] {
        world.write(name, bytes);
        world.refuses(&QUANTIZE.replace("text.txt", name), &[name, part]);
    }
    world.refuses(&QUANTIZE.replace("text.txt", "folder.txt"), &["folder.txt"]);
    for (name, part) in [("bytes.txt", "UTF-8"), ("folder.txt", "folder")] {
        world.refuses(&EVAL.replace("text.txt", name), &[part]);
    }
}

#[test]
fn more_tokens_than_there_can_be() {
    let world = world();
    for size in ["--nsamples 4", "--seqlen 64"] {
        let (option, _) = size.split_once(' ').unwrap();
        let line = QUANTIZE.replace(size, &format!("{option} {}", u64::MAX));
        for source in ["text.txt", "self"] {
            world.refuses(&line.replace("text.txt", source), &["too many tokens"]);
        }
    }
}

#[test]
fn calibration_that_is_empty() {
    let world = world();
    for (name, bytes) in
        [("empty.txt", &b""[..]), ("blank.jsonl", b"\n\n\n"), ("none.jsonl", b"{\"text\": \"\"}\n")]
    {
        world.write(name, bytes);
        world.refuses(&QUANTIZE.replace("text.txt", name), &[name, "0 tokens"]);
    }
    world.refuses(&EVAL.replace("text.txt", "empty.txt"), &["0 tokens"]);
    world.refuses(&QUANTIZE.replace("--nsamples 4", "--nsamples 0"), &["nothing to draw"]);
}

#[test]
fn dynamic_rules_that_are_bombs_or_no_rules() {
    let world = world();
    for (rules, parts) in [
        (json!({ r"(((\w{50}){50}){50}){50}": {} }).to_string(), ["rules.json", "when compiled"]),
        (json!({ r"((a{0,99}){0,99}){0,99}{0,99}": {} }).to_string(), ["rules.json", "rule"]),
        (json!({ "(".repeat(10_000): {} }).to_string(), ["rules.json", "(10000 characters)"]),
        (json!({ "a?".repeat(500_000): {} }).to_string(), ["rules.json", "(1000000 characters)"]),
        (json!({ "x": "y".repeat(1_000_000) }).to_string(), ["rules.json", "(1000002 characters)"]),
        (json!({ "+:x(": {} }).to_string(), ["rules.json", "unclosed"]),
        (json!({ ".*": { "bits": 5 } }).to_string(), ["rules.json", "bits"]),
        (json!({ ".*": 7 }).to_string(), ["rules.json", "rule"]),
        (json!([]).to_string(), ["rules.json", "object"]),
        ("{".to_owned(), ["rules.json", "JSON"]),
        ("[".repeat(100_000), ["rules.json", "JSON"]),
        (json!({ "-:.*": {} }).to_string(), ["--dynamic", "skip"]),
    ] {
        world.write("rules.json", rules);
        world.refuses(&format!("{QUANTIZE} --dynamic rules.json"), &parts);
    }
    world.refuses(&format!("{QUANTIZE} --dynamic absent.json"), &["absent.json"]);
    // A pattern that takes exponential time elsewhere takes linear time here.
    world.write("rules.json", json!({ "(.*)*(.+)+$": { "bits": 8 } }).to_string());
    world.ok(&format!("{QUANTIZE} --dynamic rules.json"));
}
