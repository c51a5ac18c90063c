//! A run that is killed goes on where it was and ends with the same bytes.

#![allow(clippy::print_stderr, missing_docs)] // The counts are shown with --nocapture.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use gptq_format::TensorStore;
use gptq_testkit::{Rng, TinyLlama};
use serde_json::Value;

fn prepare(dir: &Path) {
    let shape = TinyLlama { layers: 6, hidden: 64, intermediate: 192, ..TinyLlama::default() };
    shape.write(&dir.join("model"), 11);
    let text: String =
        (0..6000).flat_map(|i| [(i * 7919 % 1009).to_string(), " ".to_owned()]).collect();
    std::fs::write(dir.join("text.txt"), text).unwrap();
}

fn command(dir: &Path, extra: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gptq"));
    let line = "quantize model --calibration text.txt --nsamples 16 --seqlen 96 --group-size 32 -q";
    command.args(line.split(' ')).args(extra).current_dir(dir).stderr(Stdio::piped());
    command
}

fn run(dir: &Path, extra: &[&str]) -> (bool, String) {
    let output = command(dir, extra).output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn journal(dir: &Path) -> Option<Value> {
    let text = std::fs::read_to_string(dir.join(".out.partial/journal.json")).ok()?;
    Some(serde_json::from_str(&text).unwrap())
}

/// What a power cut may do: everything that no journal counted is lost.
fn damage_unfinished_blocks(dir: &Path) {
    let Some(journal) = journal(dir) else { return };
    let done = journal["blocks_done"].as_u64().unwrap();
    let path = dir.join(".out.partial/model.safetensors");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).unwrap();
    let data = 8 + u64::from_le_bytes(length);
    let mut header = vec![0; data as usize - 8];
    file.read_exact_at(&mut header, 8).unwrap();
    let header: Value = serde_json::from_slice(&header).unwrap();
    for (name, entry) in header.as_object().unwrap() {
        let quantized =
            [".qweight", ".qzeros", ".scales", ".g_idx"].iter().any(|s| name.ends_with(s));
        let layer = name.split('.').find_map(|part| part.parse::<u64>().ok());
        if quantized && layer.is_some_and(|l| l >= done) {
            let [start, end] = [0, 1].map(|i| entry["data_offsets"][i].as_u64().unwrap());
            file.write_all_at(&vec![0xAA; (end - start) as usize], data + start).unwrap();
        }
    }
}

#[test]
fn killed_anywhere_it_resumes_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    let start = Instant::now();
    let (ok, stderr) = run(dir, &["-o", "whole"]);
    assert!(ok, "{stderr}");
    let whole = start.elapsed();
    let expected = std::fs::read(dir.join("whole/model.safetensors")).unwrap();
    TensorStore::open_dir(&dir.join("whole")).unwrap();

    let mut random = Rng::new(20_261_121);
    let (mut kills, mut resumed) = (0, 0);
    for round in 0..8 {
        let _ = std::fs::remove_dir_all(dir.join("out"));
        for _ in 0..50 {
            let mut child = command(dir, &["-o", "out", "--resume"]).spawn().unwrap();
            let limit = whole.mul_f64(f64::from(random.uniform().abs()).clamp(0.02, 1.0));
            let begun = Instant::now();
            let finished = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    assert!(status.success(), "round {round}");
                    break true;
                }
                if begun.elapsed() > limit {
                    child.kill().unwrap();
                    child.wait().unwrap();
                    break false;
                }
                std::thread::sleep(Duration::from_millis(1));
            };
            if finished {
                break;
            }
            kills += 1;
            assert!(!dir.join("out").exists(), "the name appears only when all is whole");
            resumed +=
                usize::from(journal(dir).is_some_and(|j| j["blocks_done"].as_u64() > Some(0)));
            if round % 2 == 1 {
                damage_unfinished_blocks(dir);
            }
        }
        let bytes = std::fs::read(dir.join("out/model.safetensors")).unwrap();
        assert!(bytes == expected, "round {round}: the bytes differ");
        assert!(!dir.join("out/journal.json").exists() && !dir.join(".out.partial").exists());
    }
    eprintln!("{kills} kills survived, {resumed} of them with finished blocks");
    assert!(kills >= 8 && resumed >= 3, "{kills} kills, {resumed} resumed");
}

#[test]
fn a_changed_command_is_refused_by_the_name_of_the_field() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    // Stop after some blocks.
    for _ in 0..40 {
        let mut child = command(dir, &["-o", "out", "--resume"]).spawn().unwrap();
        while journal(dir).is_none_or(|j| j["blocks_done"].as_u64() == Some(0)) {
            if child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = child.kill();
        child.wait().unwrap();
        if dir.join(".out.partial").exists() {
            break;
        }
        std::fs::remove_dir_all(dir.join("out")).unwrap();
    }
    for (extra, field) in [
        (&["--bits", "3"][..], "bits"),
        (&["--damp-percent", "0.1"], "damp_percent"),
        (&["--no-sym"], "sym"),
        (&["--seed", "4"], "calibration"),
        (&["--max-shard-size", "100KiB"], "max_shard_size"),
    ] {
        let (ok, stderr) = run(dir, &[&["-o", "out", "--resume"], extra].concat());
        assert!(!ok && stderr.contains(&format!("with {field} =")), "{field}: {stderr}");
    }
    std::fs::write(dir.join("model/other"), "").unwrap();
    let weights = dir.join("model/model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, bytes).unwrap();
    let (ok, stderr) = run(dir, &["-o", "out", "--resume"]);
    assert!(!ok && stderr.contains("model files"), "{stderr}");
    // The unfinished work survived all refusals; without --resume it makes room.
    assert!(journal(dir).is_some());
    let (ok, stderr) = run(dir, &["-o", "out"]);
    assert!(ok, "{stderr}");
    let (ok, stderr) = run(dir, &["-o", "out", "--resume"]);
    assert!(ok, "a finished directory is finished: {stderr}");
}

#[test]
fn two_runs_into_one_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    let mut child = command(dir, &["-o", "out"]).spawn().unwrap();
    while !dir.join(".out.partial/.lock").exists() {
        assert!(child.try_wait().unwrap().is_none(), "finished too early");
        std::thread::sleep(Duration::from_millis(1));
    }
    let (ok, stderr) = run(dir, &["-o", "out"]);
    // The first may have finished meanwhile; then its output is in the way.
    assert!(!ok && (stderr.contains("lock") || stderr.contains("out")), "{stderr}");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_first_interrupt_finishes_the_block_and_tells_how_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    for _ in 0..20 {
        let child = command(dir, &["-o", "out"]).spawn().unwrap();
        while journal(dir).is_none_or(|j| j["blocks_done"].as_u64() == Some(0))
            && !dir.join("out").exists()
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        let pid = child.id().to_string();
        Command::new("kill").args(["-INT", &pid]).status().unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            // It was in its last block.
            std::fs::remove_dir_all(dir.join("out")).unwrap();
            continue;
        }
        assert!(stderr.contains("--resume") && stderr.contains("of 6 blocks"), "{stderr}");
        assert!(journal(dir).unwrap()["blocks_done"].as_u64().unwrap() >= 1);
        let (ok, stderr) = run(dir, &["-o", "out", "--resume"]);
        assert!(ok, "{stderr}");
        return;
    }
    panic!("never interrupted in time");
}

#[test]
fn an_output_that_cannot_be_written_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepare(dir);
    // The shell's limit on file sizes stands for a full disk: writes fail in the middle.
    let gptq = env!("CARGO_BIN_EXE_gptq");
    let line = format!("trap '' XFSZ; ulimit -f 100; {gptq} quantize model -o out --method rtn -q");
    let output = Command::new("sh").args(["-c", &line]).current_dir(dir).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("model.safetensors") && !stderr.contains("panicked"), "{stderr}");
    assert!(!dir.join("out").exists() && !dir.join(".out.partial").exists());
    let (ok, stderr) = run(dir, &["-o", "/proc/nowhere/out"]);
    assert!(!ok && stderr.contains("/proc/nowhere"), "{stderr}");
}
