//! Paths: outputs that cannot be written, inputs that are read-only, links that end nowhere, and two runs at once.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use crate::{EVAL, GENERATE, QUANTIZE, ROUND, world};

#[test]
fn output_that_cannot_be_written() {
    let world = world();
    world.write("file", "kept");
    symlink(world.path("loop"), world.path("loop")).unwrap();
    for output in ["file", "file/out", "loop/out", "/proc/nowhere/out"] {
        let name = output.split('/').find(|part| !part.is_empty()).unwrap();
        world.refuses(&QUANTIZE.replace("-o out", &format!("-o {output}")), &[name]);
    }
    assert_eq!(world.read("file"), b"kept");
    world.ok("quantize model -o q --method rtn --group-size 32 -q");
    for output in ["file/out", "loop/out", "loop"] {
        let name = output.split('/').next().unwrap();
        world.refuses(&format!("convert q --to hf -o {output} -q"), &[name]);
        world.refuses(&format!("convert q --to gguf -o {output}/x.gguf -q"), &[name]);
    }
}

/// A limit on the size of files stands for a disk that is full from the start.
#[test]
fn output_that_is_full() {
    let world = world();
    world.ok("quantize model -o q --method rtn --group-size 32 -q");
    for line in [
        ROUND,
        QUANTIZE,
        "convert q --to hf -o out -q",
        "convert q --to gguf -o out.gguf -q",
        "convert q --to gptq_v2 -o out -q",
    ] {
        for blocks in [0, 1, 40] {
            let before = world.files();
            let limited = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
            let run = Command::new("sh")
                .args(["-c", &limited, env!("CARGO_BIN_EXE_gptq")])
                .args(line.split(' '))
                .current_dir(world.dir())
                .output();
            let output = run.unwrap();
            let stderr = world.text(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{blocks}: gptq {line}: {stderr}");
            assert!(
                stderr.contains("out") && stderr.contains("File too large"),
                "{line}: {stderr}"
            );
            assert_eq!(world.files(), before, "{blocks}: gptq {line}");
        }
    }
    // What goes to stdout is data as well.
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
    let Ok(full) = full else { return };
    for line in ["inspect q", "eval q --perplexity text.txt --seqlen 64 --max-windows 1 --json -q"]
    {
        let output = world.command(line).stdout(full.try_clone().unwrap()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "gptq {line}");
        let stderr = world.text(&output.stderr);
        assert!(stderr.contains("No space left") && !stderr.contains("panicked"), "{stderr}");
    }
}

#[test]
fn input_that_is_read_only_is_read_and_left_as_it_was() {
    let world = world();
    let chmod = |name: &str, mode: u32| {
        std::fs::set_permissions(world.path(name), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    for entry in std::fs::read_dir(world.path("model")).unwrap() {
        chmod(&format!("model/{}", entry.unwrap().file_name().to_string_lossy()), 0o444);
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

/// A link that ends nowhere is an error where the file is needed, also where a missing one would be none.
#[test]
fn symlink_loops() {
    let world = world();
    let make_loop = |name: &str| {
        let _ = std::fs::remove_file(world.path(name));
        symlink(world.path(name), world.path(name)).unwrap();
    };
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        make_loop(&format!("model/{name}"));
        for line in [QUANTIZE, EVAL, GENERATE] {
            world.refuses(line, &[name]);
        }
        world.restore();
    }
    for name in ["loop", "loop.gguf", "loop.txt", "rules.json"] {
        make_loop(name);
    }
    world.refuses("inspect loop", &["loop"]);
    world.refuses("generate loop.gguf --prompt a -q", &["loop.gguf"]);
    world.refuses(&QUANTIZE.replace("text.txt", "loop.txt"), &["loop.txt"]);
    world.refuses(&EVAL.replace("text.txt", "loop.txt"), &["loop.txt"]);
    world.refuses(&format!("{QUANTIZE} --dynamic rules.json"), &["rules.json"]);
    // Beside what is needed, an index that nobody reads and a directory that holds itself are harmless.
    make_loop("model/model.safetensors.index.json");
    symlink(world.path("model"), world.path("model/self")).unwrap();
    world.ok(GENERATE);
    // Without the single file the index is needed.
    std::fs::remove_file(world.path("model/model.safetensors")).unwrap();
    world.refuses(GENERATE, &["model.safetensors.index.json"]);
}

#[test]
fn a_directory_that_another_run_writes_to() {
    let world = world();
    let partial = world.path(".out.partial");
    std::fs::create_dir(&partial).unwrap();
    let lock = std::fs::File::create(partial.join(".lock")).unwrap();
    lock.lock().unwrap();
    for line in
        [QUANTIZE, ROUND, &format!("{QUANTIZE} --resume"), &format!("{QUANTIZE} --overwrite")]
    {
        world.refuses(line, &["another run is writing to `out`", ".lock", "wait for it"]);
    }
    drop(lock);
    // A lock file that nobody holds is in nobody's way.
    world.ok(QUANTIZE);
}
