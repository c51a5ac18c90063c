//! Readers of untrusted bytes on a corpus and on seeded mutations of it: no panic, no memory beyond what the input is worth,
//! and a typed error for what is refused. The fuzz targets in `fuzz/` run the same functions without an end.
//!
//! `GPTQ_MUTATIONS` sets the number of inputs for each reader, `GPTQ_TEST_SEED` the seed.

mod readers;

use std::panic::{AssertUnwindSafe, catch_unwind};

use gptq_testkit::{Rng, fixtures};
use readers::Read;

/// Peak memory of this process that all readers together may reach, in bytes. A chat template alone may take 256 MiB.
const MAX_PEAK: u64 = 1 << 30;

#[test]
fn safetensors_index() {
    run("safetensors_index", readers::safetensors_index, 3000);
}

#[test]
fn gguf() {
    run("gguf", readers::gguf, 3000);
}

#[test]
fn gptq_unpack() {
    run("gptq_unpack", readers::gptq_unpack, 20_000);
}

#[test]
fn config() {
    run("config", readers::config, 10_000);
}

#[test]
fn chat_template() {
    run("chat_template", readers::chat_template, 3000);
}

/// Gives the corpus of `name` and `count` mutations of it to `read`.
fn run(name: &str, read: fn(&[u8]) -> Read, count: usize) {
    let folder = fixtures::workspace().join("testdata/corpus").join(name);
    let mut paths: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let corpus: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    for (path, input) in paths.iter().zip(&corpus) {
        let refused = path.file_name().unwrap().to_string_lossy().starts_with("bad_");
        let result = read(input);
        assert_eq!(result.is_err(), refused, "{}: {result:?}", path.display());
    }
    let asked = std::env::var("GPTQ_MUTATIONS").ok().and_then(|text| text.parse().ok());
    let mut random = Rng::new(20_261_122);
    let (mut accepted, mut refused) = (0, 0);
    for index in 0..asked.unwrap_or(count) {
        let mut input = corpus[random.below(corpus.len())].clone();
        for _ in 0..=random.below(4) {
            mutate(&mut random, &corpus, &mut input);
        }
        match catch_unwind(AssertUnwindSafe(|| read(&input))) {
            Ok(Ok(())) => accepted += 1,
            Ok(Err(error)) => {
                refused += 1;
                let message = error.to_string();
                assert!(!message.is_empty() && message.len() < 2000, "input {index}: {message}");
            }
            Err(panic) => {
                let kept = std::env::temp_dir().join(format!("gptq-{name}-{index}"));
                std::fs::write(&kept, &input).unwrap();
                panic!("input {index} made it panic, kept in {}: {panic:?}", kept.display());
            }
        }
    }
    assert!(accepted > 0 && refused > 0, "{accepted} accepted, {refused} refused");
    if let Some(peak) = peak_bytes() {
        assert!(peak < MAX_PEAK, "{} MiB of memory", peak >> 20);
    }
}

/// One change: of a bit, of a byte, of a number, or of a stretch.
fn mutate(random: &mut Rng, corpus: &[Vec<u8>], input: &mut Vec<u8>) {
    const BYTES: [u8; 8] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'9'];
    const NUMBERS: [u64; 8] =
        [0, 1, 0x7f, 0xffff, 1 << 31, u32::MAX as u64, 1 << 40, i64::MAX as u64 + 1];
    let at = random.below(input.len() + 1);
    let stretch = |random: &mut Rng, length: usize| {
        let start = random.below(length + 1);
        start..(start + random.below(64)).min(length)
    };
    match random.below(8) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = BYTES[random.below(BYTES.len())],
        2 => input.insert(at, BYTES[random.below(BYTES.len())]),
        3 => drop(input.drain(stretch(random, input.len()))),
        4 => {
            let copied = input[stretch(random, input.len())].to_vec();
            input.splice(at..at, copied);
        }
        5 => {
            let other = &corpus[random.below(corpus.len())];
            let range = stretch(random, other.len());
            input.splice(at..at, other[range].iter().copied());
        }
        6 => input.truncate(at),
        _ => {
            let number = NUMBERS[random.below(NUMBERS.len())].to_le_bytes();
            let width = if random.below(2) == 0 { 4 } else { 8 };
            for (byte, value) in input.iter_mut().skip(at).zip(&number[..width]) {
                *byte = *value;
            }
        }
    }
}

fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
