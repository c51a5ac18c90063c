//! `--max-memory` by the real binary: the kernel's own peak obeys it, and the bytes do not change.

#![allow(clippy::print_stderr, missing_docs)] // The sizes are shown with --nocapture.

use std::time::Duration;

use gptq_testkit::{TinyLlama, World, byte_level_tokenizer, fixtures};
use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_gptq");
const SHAPE: TinyLlama =
    TinyLlama { hidden: 128, intermediate: 1024, layers: 2, heads: 4, kv_heads: 2, tied: false };

/// More text than the windows need.
fn with_text(world: World) -> World {
    let words = (0..40_000).map(|i| format!("{} ", i * 7919 % 10_007));
    world.write("text.txt", words.collect::<String>());
    world
}

/// A world with a fixture as `model`, with a tokenizer; `None` where it is absent.
fn with_fixture(name: &str) -> Option<World> {
    let source = fixtures::dir(name)?;
    let world = World::empty(BINARY);
    std::fs::create_dir(world.path("model")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(source.join(file), world.path("model").join(file)).unwrap();
    }
    world.write("model/tokenizer.json", byte_level_tokenizer().to_string());
    Some(with_text(world))
}

/// The least limit that is accepted, by asking until the answer is yes.
fn least_limit(world: &World, line: &str) -> u64 {
    let mut mib = 1;
    for _ in 0..8 {
        let output = world.gptq(&format!("{line} --dry-run --max-memory {mib}MiB"));
        let said = world.text(&output.stderr);
        if output.status.success() {
            return mib;
        }
        let named = said.split(" needs ").nth(1).and_then(|rest| rest.split(' ').next());
        let named: u64 = named.and_then(|mib| mib.parse().ok()).expect(&said);
        assert!(named > mib && said.contains(&format!("--max-memory {mib} MiB")), "{said}");
        mib = named;
    }
    panic!("no limit is accepted, up to {mib} MiB");
}

fn peak(report: &Value) -> u64 {
    report["peak_rss_bytes"].as_u64().unwrap()
}

/// Quantizes without a limit and with the least one, and compares; the peaks of both.
fn check(world: &World, settings: &str) -> [u64; 2] {
    let line = format!("quantize model --calibration text.txt --group-size 32 {settings}");
    let free = world.json(&format!("{line} -o free --overwrite --json -q"));
    assert_eq!(free["plan"]["scratch_bytes"], 0);
    let limit = least_limit(world, &line);
    let output = world.gptq(&format!("{line} -o tight --overwrite --json --max-memory {limit}MiB"));
    let said = world.text(&output.stderr);
    assert!(output.status.success() && said.contains("Spill the activations of"), "{said}");
    let tight: Value = serde_json::from_slice(&output.stdout).unwrap();
    let scratch = tight["plan"]["scratch_bytes"].as_u64().unwrap();
    eprintln!(
        "{settings}: {} MiB without a limit; limit {limit} MiB, {} MiB used, {} MiB planned, {} MiB on disk",
        peak(&free) >> 20,
        peak(&tight) >> 20,
        tight["plan"]["peak_rss_bytes"].as_u64().unwrap() >> 20,
        scratch >> 20
    );
    assert!(scratch > 0 && peak(&tight) <= limit << 20, "{} over {limit} MiB", peak(&tight));
    let weights = |name: &str| world.read(&format!("{name}/model.safetensors"));
    assert!(weights("free") == weights("tight"), "{settings}: the bytes differ");
    assert!(!world.files().iter().any(|file| file.contains("scratch")));
    [peak(&free), peak(&tight)]
}

#[test]
fn a_limit_spills_the_activations_and_changes_no_byte() {
    let world = with_text(World::with_model(BINARY, SHAPE));
    let [free, tight] = check(&world, "--nsamples 200 --seqlen 96");
    // Without a limit far more is in memory.
    assert!(free > tight + (40 << 20), "{free} {tight}");
}

#[test]
fn half_precision_takes_half_the_memory_in_memory_and_on_disk() {
    let world = with_text(World::with_model(BINARY, SHAPE));
    let windows = "--nsamples 420 --seqlen 96";
    let [half, _] = check(&world, &format!("{windows} --activation-dtype f16"));
    let line = format!("quantize model --calibration text.txt --group-size 32 {windows}");
    let whole = world.json(&format!("{line} -o whole --json -q"));
    assert!(peak(&whole) > half + (60 << 20), "{} {half}", peak(&whole));
    let weights = |name: &str| world.read(&format!("{name}/model.safetensors"));
    assert!(weights("whole") != weights("free"), "nothing was rounded");
}

#[test]
fn without_true_sequential_order_and_with_the_head() {
    let world = with_text(World::with_model(BINARY, SHAPE));
    check(&world, "--nsamples 220 --seqlen 97 --no-true-sequential --lm-head");
}

#[test]
fn both_streams_of_a_correction_spill() {
    let world = with_text(World::with_model(BINARY, SHAPE));
    check(&world, "--nsamples 200 --seqlen 96 --correction gptaq --damp-percent auto --lm-head");
    check(&world, "--nsamples 200 --seqlen 96 --correction qep --no-true-sequential");
}

#[test]
fn tuned_blocks_run_again_from_the_disk() {
    let world = with_text(World::with_model(BINARY, SHAPE));
    check(&world, "--nsamples 200 --seqlen 96 --tune-blocks 1");
    check(
        &world,
        "--nsamples 200 --seqlen 96 --tune-blocks 1 --activation-dtype f16 --correction qep",
    );
}

#[test]
fn experts_and_parallel_blocks_come_back_from_disk() {
    for world in ["mixtral", "gptj"].into_iter().filter_map(with_fixture) {
        check(&world, "--nsamples 600 --seqlen 64 --moe-fallback all-tokens");
        check(&world, "--nsamples 600 --seqlen 64 --correction qronos --damp-percent auto");
        check(&world, "--nsamples 600 --seqlen 64 --tune-blocks 1");
    }
}

#[test]
fn a_run_that_was_begun_without_a_limit_goes_on_with_one() {
    let world = with_text(World::with_model(BINARY, TinyLlama { layers: 4, ..SHAPE }));
    let line = "quantize model --calibration text.txt --group-size 32 --nsamples 200 --seqlen 96";
    world.ok(&format!("{line} -o whole -q"));
    let limit = least_limit(&world, line);
    let mut child = world.command(&format!("{line} -o out -q")).spawn().unwrap();
    let partial = world.path(".out.partial");
    while !std::fs::read_to_string(partial.join("journal.json"))
        .is_ok_and(|journal| journal.contains("\"blocks_done\":1"))
    {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    world.write(".out.partial/activations.scratch", "stale");
    let report = world.json(&format!("{line} -o out --resume --json -q --max-memory {limit}MiB"));
    assert!(report["plan"]["scratch_bytes"].as_u64() > Some(0));
    assert!(peak(&report) <= limit << 20, "{} over {limit} MiB", peak(&report));
    assert!(world.read("whole/model.safetensors") == world.read("out/model.safetensors"));
    assert!(!world.path("out/activations.scratch").exists());
}

/// A model that writes its own text needs all its weights: refused before it begins.
#[test]
fn a_limit_that_cannot_be_met_is_refused_before_the_run() {
    let world = World::new(BINARY);
    for calibration in ["text.txt", "self"] {
        let line = format!("quantize model -o out --calibration {calibration}");
        let line = format!("{line} --nsamples 8 --seqlen 64 --max-memory 2MiB");
        world.refuses(&line, &["--max-memory 2 MiB is too little", " needs ", " MiB"]);
    }
}

/// What bits are chosen from is measured within the limit, or refused before.
#[test]
fn bits_are_chosen_within_the_limit() {
    let world = with_text(World::new(BINARY));
    let line = "quantize model --calibration text.txt --nsamples 16 --seqlen 128 --group-size 32 --target-bpw 5";
    let limit = least_limit(&world, line);
    let report = world.json(&format!("{line} -o out --json -q --max-memory {limit}MiB"));
    assert!(peak(&report) <= limit << 20, "{} over {limit} MiB", peak(&report));
    let little = limit - 32;
    let line = format!("{line} -o none -q --max-memory {little}MiB");
    world.refuses(&line, &["measuring what --target-bpw chooses from needs"]);
}
