//! A run that is stopped, by whatever, goes on where it was and ends with the same bytes.
//!
//! `GPTQ_KILLS` sets how often the runs are killed (default 16).

#![allow(clippy::print_stderr, missing_docs)] // The counts are shown with --nocapture.

use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use gptq_testkit::{Rng, TinyLlama, World, safetensors_file};
use serde_json::Value;

/// One thread: where many tests share a processor, threads that wait for each other take seconds.
const LINE: &str = "quantize model --calibration text.txt --nsamples 6 --seqlen 64 --group-size 32 --lm-head --threads 1 -q -o";
/// Blocks in front of the head, which is quantized too.
const BLOCKS: u64 = 6;

fn world() -> World {
    let shape = TinyLlama {
        layers: BLOCKS as usize,
        hidden: 64,
        intermediate: 128,
        ..TinyLlama::default()
    };
    World::with_model(env!("CARGO_BIN_EXE_gptq"), shape)
}

/// The bytes of a run that nobody disturbs, and its time.
fn undisturbed(world: &World) -> (Vec<u8>, Duration) {
    let start = Instant::now();
    world.ok(&format!("{LINE} whole"));
    (world.read("whole/model.safetensors"), start.elapsed())
}

fn start(world: &World, rest: &str) -> Child {
    let mut command = world.command(&format!("{LINE} {rest}"));
    command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
}

fn blocks_done(world: &World) -> Option<u64> {
    let text = std::fs::read_to_string(world.path(".out.partial/journal.json")).ok()?;
    serde_json::from_str::<Value>(&text).unwrap()["blocks_done"].as_u64()
}

/// Waits until blocks are finished; false if the run ended before.
fn wait_for_blocks(world: &World, child: &mut Child) -> bool {
    while blocks_done(world).unwrap_or(0) == 0 {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// Kills the run after `limit`, or when `reached` says so; false if it has ended by then.
fn kill_after(child: &mut Child, limit: Duration, reached: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < limit && !reached() {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            return false;
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    true
}

fn kills_wanted() -> usize {
    std::env::var("GPTQ_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(16)
}

/// What a power cut may do: whatever was not synced before the journal was written is lost. Tensors of unfinished blocks
/// turn into noise, and other files that are newer than the journal are empty.
fn cut_power(world: &World) {
    let partial = world.path(".out.partial");
    let Some(done) = blocks_done(world) else {
        for entry in std::fs::read_dir(&partial).into_iter().flatten().flatten() {
            if entry.file_type().unwrap().is_file() {
                std::fs::File::create(entry.path()).unwrap();
            }
        }
        return;
    };
    let synced = partial.join("journal.json").metadata().unwrap().modified().unwrap();
    for entry in std::fs::read_dir(&partial).unwrap().map(Result::unwrap) {
        let meta = entry.metadata().unwrap();
        let is_weights = entry.path().extension().is_some_and(|e| e == "safetensors");
        if meta.is_file() && !is_weights && meta.modified().unwrap() > synced {
            std::fs::File::create(entry.path()).unwrap();
        }
    }
    let name = ".out.partial/model.safetensors";
    let bytes = world.read(name);
    let file = std::fs::OpenOptions::new().write(true).open(world.path(name)).unwrap();
    for tensor in safetensors_file::parts(&bytes).0.keys() {
        let quantized =
            [".qweight", ".qzeros", ".scales", ".g_idx"].iter().any(|s| tensor.ends_with(s));
        // The head comes behind the blocks.
        let layer = tensor.split('.').find_map(|part| part.parse::<u64>().ok()).unwrap_or(BLOCKS);
        if quantized && layer >= done {
            let range = safetensors_file::range(&bytes, tensor);
            file.write_all_at(&vec![0xAA; range.len()], range.start as u64).unwrap();
        }
    }
}

#[test]
fn killed_anywhere_it_resumes_to_the_same_bytes() {
    let world = world();
    let (expected, whole) = undisturbed(&world);
    let mut random = Rng::new(20_261_121);
    let (mut kills, mut resumed, mut round) = (0, 0, 0);
    while kills < kills_wanted() {
        let _ = std::fs::remove_dir_all(world.path("out"));
        loop {
            // Some time after it began, or after some more blocks, whatever the speed of the machine.
            let some_time = whole.mul_f64(f64::from(random.uniform()).max(0.02));
            let some_block = blocks_done(&world).unwrap_or(0) + random.below(4) as u64;
            let by_time = random.below(2) == 0;
            let mut child = start(&world, "out --resume");
            let killed =
                kill_after(&mut child, if by_time { some_time } else { Duration::MAX }, || {
                    !by_time && blocks_done(&world) > Some(some_block)
                });
            if !killed {
                break;
            }
            kills += 1;
            resumed += usize::from(blocks_done(&world) > Some(0));
            if world.path("out").exists() {
                break;
            }
            if round % 2 == 1 {
                cut_power(&world);
            }
        }
        // Also where the kill hit it behind the rename.
        let bytes = world.read("out/model.safetensors");
        assert!(bytes == expected, "round {round}: the bytes differ");
        assert!(!world.path(".out.partial").exists());
        round += 1;
    }
    eprintln!(
        "{kills} kills survived in {round} runs, {resumed} of them with finished blocks, half of the runs with power cuts"
    );
    assert!(resumed >= kills / 8, "{kills} kills, {resumed} resumed");
}

/// The last moments of a run: reports, the rename, what is cleaned up behind it; also over an older output.
#[test]
fn killed_around_the_rename_the_directory_is_whole_or_not_there() {
    let world = world();
    let (expected, _) = undisturbed(&world);
    world.ok("quantize model -o older --method rtn --group-size 32 -q");
    let older = world.read("older/model.safetensors");
    let mut random = Rng::new(7);
    let (mut before, mut after) = (0, 0);
    for round in 0..kills_wanted() / 2 {
        let overwrite = round % 2 == 1;
        let line = if overwrite { "out --resume --overwrite" } else { "out --resume" };
        let _ = std::fs::remove_dir_all(world.path("out"));
        if overwrite {
            copy_dir(&world, "older", "out");
        }
        let mut child = start(&world, line);
        let begun = world.path(".out.partial");
        while !begun.join("quant_log.jsonl").exists() && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_micros(random.below(12_000) as u64));
        let killed = child.try_wait().unwrap().is_none();
        child.kill().unwrap();
        child.wait().unwrap();
        // What has the name is one or the other, and opens.
        if world.path("out").exists() {
            let bytes = world.read("out/model.safetensors");
            assert!(bytes == expected || overwrite && bytes == older, "round {round}");
            world.ok("inspect out");
            after += usize::from(killed && bytes == expected);
        }
        before += usize::from(killed && begun.exists());
        world.ok(&format!("{LINE} {line}"));
        assert!(world.read("out/model.safetensors") == expected, "round {round}");
        assert!(world.path("out/README.md").exists() && !begun.exists());
    }
    eprintln!("{before} kills survived just before the rename, {after} behind it");
    assert!(before > 0, "no kill hit the end of a run");
}

fn copy_dir(world: &World, from: &str, to: &str) {
    std::fs::create_dir(world.path(to)).unwrap();
    for entry in std::fs::read_dir(world.path(from)).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), world.path(to).join(entry.file_name())).unwrap();
        }
    }
}

#[test]
fn a_changed_command_is_refused_by_the_name_of_the_field() {
    let world = world();
    loop {
        let mut child = start(&world, "out --resume");
        let begun = wait_for_blocks(&world, &mut child);
        child.kill().unwrap();
        child.wait().unwrap();
        if begun && world.path(".out.partial").exists() {
            break;
        }
        std::fs::remove_dir_all(world.path("out")).unwrap();
    }
    for (extra, field) in [
        ("--bits 3", "bits"),
        ("--damp-percent 0.1", "damp_percent"),
        ("--no-sym", "sym"),
        ("--seed 4", "calibration"),
        ("--max-shard-size 100KiB", "max_shard_size"),
    ] {
        let output = world.gptq(&format!("{LINE} out --resume {extra}"));
        let stderr = world.text(&output.stderr);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr.contains(&format!("with {field} =")), "{field}: {stderr}");
    }
    let text = world.read("text.txt");
    world.write("text.txt", "another text ".repeat(400));
    let stderr = world.text(&world.gptq(&format!("{LINE} out --resume")).stderr);
    assert!(stderr.contains("with calibration ="), "{stderr}");
    world.write("text.txt", text);
    let weights = world.read("model/model.safetensors");
    world.write("model/model.safetensors", weights);
    let stderr = world.text(&world.gptq(&format!("{LINE} out --resume")).stderr);
    assert!(stderr.contains("with model files ="), "{stderr}");
    // The unfinished work survived all refusals; without --resume it makes room.
    assert!(blocks_done(&world) > Some(0));
    world.ok(&format!("{LINE} out"));
    // A finished directory is finished.
    let files = world.files();
    world.ok(&format!("{LINE} out --resume"));
    for (extra, field) in [
        ("--bits 3", "bits"),
        ("--no-sym", "sym"),
        ("--method rtn", "method"),
        ("--target-bpw 4.5", "target_bpw"),
        ("--damp-percent 0.1", "damp_percent"),
        ("--scale-search minmax", "scale_search"),
    ] {
        let stderr = world.fails(&format!("{LINE} out --resume {extra}"));
        assert!(stderr.contains(&format!("is finished, with {field} =")), "{field}: {stderr}");
    }
    assert_eq!(world.files(), files);
}

#[test]
fn two_runs_into_one_directory_are_refused() {
    let world = world();
    let mut child = start(&world, "out");
    while !world.path(".out.partial/.lock").exists() {
        assert!(child.try_wait().unwrap().is_none(), "finished too early");
        std::thread::sleep(Duration::from_millis(1));
    }
    let stderr = world.text(&world.gptq(&format!("{LINE} out")).stderr);
    // The first may have finished meanwhile; then its output is in the way.
    assert!(stderr.contains("another run") || stderr.contains("exists"), "{stderr}");
    assert!(child.wait().unwrap().success());
}

fn interrupt(child: &Child) {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
}

#[test]
fn a_first_interrupt_finishes_the_block_and_tells_how_to_go_on() {
    let world = world();
    let (expected, _) = undisturbed(&world);
    for _ in 0..20 {
        let mut child = start(&world, "out");
        wait_for_blocks(&world, &mut child);
        interrupt(&child);
        let output = child.wait_with_output().unwrap();
        let stderr = world.text(&output.stderr);
        if output.status.success() {
            // It was in its last block.
            std::fs::remove_dir_all(world.path("out")).unwrap();
            continue;
        }
        assert_eq!(output.status.code(), Some(130), "{stderr}");
        assert!(stderr.contains("finishing this block; Ctrl-C again stops now"), "{stderr}");
        assert!(stderr.contains("of 7 blocks") && stderr.contains("--resume"), "{stderr}");
        assert!(blocks_done(&world) > Some(0));
        world.ok(&format!("{LINE} out --resume"));
        assert!(world.read("out/model.safetensors") == expected);
        return;
    }
    panic!("never interrupted in time");
}

#[test]
fn a_second_interrupt_stops_at_once() {
    // Blocks that take long enough for two signals.
    let shape = TinyLlama { layers: 3, hidden: 256, intermediate: 512, ..TinyLlama::default() };
    let world = World::with_model(env!("CARGO_BIN_EXE_gptq"), shape);
    let (expected, _) = undisturbed(&world);
    for _ in 0..20 {
        let mut child = start(&world, "out");
        if !wait_for_blocks(&world, &mut child) {
            std::fs::remove_dir_all(world.path("out")).unwrap();
            continue;
        }
        interrupt(&child);
        std::thread::sleep(Duration::from_millis(5));
        interrupt(&child);
        let done = blocks_done(&world);
        let output = child.wait_with_output().unwrap();
        if output.status.success() || world.text(&output.stderr).contains("stopped after") {
            // The block ended between the signals, or it was the last.
            let _ = std::fs::remove_dir_all(world.path("out"));
            continue;
        }
        assert_eq!(output.status.code(), Some(130));
        assert!(!world.path("out").exists() && done > Some(0));
        world.ok(&format!("{LINE} out --resume"));
        assert!(world.read("out/model.safetensors") == expected);
        return;
    }
    panic!("never interrupted twice within a block");
}

/// Before there is anything to keep, the first one stops at once and leaves nothing that is in the way.
#[test]
fn an_interrupt_before_the_first_block_stops_at_once() {
    let world = world();
    let child = start(&world, "out");
    std::thread::sleep(Duration::from_millis(3));
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success() && !world.path("out").exists());
    world.ok(&format!("{LINE} out"));
}

/// A limit on the size of files stands for a full disk, where none can be mounted. Weights and their index have their size
/// from the start, and the reports are larger: the limits hit both ends of a run.
#[test]
fn a_full_disk_at_the_start_and_at_the_end_of_a_run() {
    let shape = TinyLlama { layers: 16, hidden: 32, intermediate: 32, ..TinyLlama::default() };
    let world = World::with_model(env!("CARGO_BIN_EXE_gptq"), shape);
    let line = |out: &str| format!("{LINE} {out} --max-shard-size 20KiB");
    world.ok(&line("whole"));
    let expected = shards(&world, "whole");
    let size = |name: &str| world.path("whole").join(name).metadata().unwrap().len();
    let at_start = size("model.safetensors.index.json");
    let at_end = size("quant_report.json");
    assert!(at_end > at_start + 2048, "{at_start} and {at_end} bytes");
    for (bytes, blocks) in [
        (at_start / 4, 0),
        (at_start - 1024, 0),
        (u64::midpoint(at_start, at_end), 17),
        (at_end - 1024, 17),
    ] {
        // In units of 512 bytes.
        let limited = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", bytes / 512);
        let mut command = Command::new("sh");
        command.args(["-c", &limited, env!("CARGO_BIN_EXE_gptq")]).args(line("out").split(' '));
        let output = command.current_dir(world.dir()).output().unwrap();
        let stderr = world.text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{bytes} bytes: {stderr}");
        assert!(stderr.contains("File too large") && !stderr.contains("panicked"), "{stderr}");
        assert!(!world.path("out").exists());
        assert_eq!(blocks_done(&world).unwrap_or(0), blocks, "{bytes} bytes: {stderr}");
        if blocks > 0 {
            assert!(stderr.contains("blocks are kept") && stderr.contains("--resume"), "{stderr}");
        } else {
            assert!(!world.path(".out.partial").exists(), "{stderr}");
        }
        world.ok(&format!("{} --resume", line("out")));
        assert!(shards(&world, "out") == expected, "{bytes} bytes: the bytes differ");
        std::fs::remove_dir_all(world.path("out")).unwrap();
    }
}

/// Name and bytes of all weights of a directory.
fn shards(world: &World, directory: &str) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(world.path(directory)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name.ends_with(".safetensors")).collect();
    names.sort();
    names
        .into_iter()
        .map(|name| (name.clone(), world.read(&format!("{directory}/{name}"))))
        .collect()
}

/// The same on a file system that is too small: refused before the run, or kept where it is nearly enough. Where the
/// kernel lets everyone mount one.
#[test]
fn no_space_left() {
    let world = world();
    let (expected, _) = undisturbed(&world);
    std::fs::create_dir(world.path("disk")).unwrap();
    let inside = |script: &str, arguments: &[&str]| {
        Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
            .args(arguments)
            .current_dir(world.dir())
            .output()
    };
    let mount = "mount -t tmpfs -o size=64k tmpfs disk";
    if !inside(mount, &[]).is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: no file system can be mounted here to fill it");
        return;
    }
    // First with too little room, then with enough.
    let script = "mount -t tmpfs -o size=$1k tmpfs disk && shift && \
        { \"$0\" \"$@\"; echo \"code $?\" >&2; } && cat disk/.out.partial/journal.json >journal 2>/dev/null; \
        mount -o remount,size=9000k disk && \"$0\" \"$@\" --resume && cp disk/out/model.safetensors result";
    let line = format!("{LINE} disk/out");
    let (mut refused, mut stops) = (0, Vec::new());
    for kib in (140..=300).step_by(20) {
        let _ = std::fs::remove_file(world.path("journal"));
        let size = kib.to_string();
        let mut arguments = vec![env!("CARGO_BIN_EXE_gptq"), &size];
        arguments.extend(line.split(' '));
        let output = inside(script, &arguments).unwrap();
        let stderr = world.text(&output.stderr);
        assert!(output.status.success() && !stderr.contains("panicked"), "{kib} KiB: {stderr}");
        assert!(world.read("result") == expected, "{kib} KiB: the bytes differ");
        let journal = std::fs::read(world.path("journal")).unwrap_or_default();
        let journal: Value = serde_json::from_slice(&journal).unwrap_or_default();
        if stderr.contains("code 0") {
            break;
        }
        assert!(stderr.contains("code 1"), "{stderr}");
        if stderr.contains("are free on its disk") {
            assert!(journal.is_null(), "{kib} KiB: it was begun");
            refused += 1;
            continue;
        }
        assert!(stderr.contains("No space left"), "{stderr}");
        stops.push(journal["blocks_done"].as_u64().unwrap_or(0));
    }
    eprintln!("{refused} refused; no space left after {stops:?} of {BLOCKS} blocks");
    assert!(refused > 0);
}
