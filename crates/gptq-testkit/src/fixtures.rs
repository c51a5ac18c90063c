//! Where test data live, and which tests have to be skipped because they are absent.
//!
//! The shared data (fixtures, expected values, texts) lie beside the checkout in `../shared`, or
//! where the environment variable `GPTQ_SHARED` points; a small part may be kept in `testdata/`.
//! The real model lies in `.demo/`, where `make test` and `make demo` put it, or where
//! `GPTQ_SMOLLM2` points. A test that needs an absent file returns early; the helpers here have
//! then said on stderr what was skipped.

use std::path::PathBuf;

/// Name of the real model's file inside `.demo/`.
pub const SMOLLM2_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The fixture directory `name` (for example `llama` or `quant/b4_g32_sym.gptq`), or `None` after a
/// note on stderr.
pub fn dir(name: &str) -> Option<PathBuf> {
    let found = roots().into_iter().map(|root| root.join(name)).find(|path| path.is_dir());
    if found.is_none() {
        skipped(&format!("fixture {name}"));
    }
    found
}

/// Every architecture fixture: the directories that hold a config.json, a model and an
/// expected.safetensors, sorted by name. Empty after a note on stderr where there is none.
pub fn all() -> Vec<(String, PathBuf)> {
    listed("", "architecture fixtures")
}

/// Every quantized checkpoint fixture (`quant/*`), sorted by name. Empty after a note on stderr
/// where there is none.
pub fn quantized() -> Vec<(String, PathBuf)> {
    listed("quant", "quantized fixtures")
}

/// The path of `text/<name>` in the shared data, or `None` after a note on stderr.
pub fn shared_text(name: &str) -> Option<PathBuf> {
    shared_file(&format!("text/{name}"))
}

/// The path of `expected/<name>` in the shared data, or `None` after a note on stderr.
pub fn shared_expected(name: &str) -> Option<PathBuf> {
    shared_file(&format!("expected/{name}"))
}

/// SmolLM2-135M-Instruct as GGUF, or `None` after a note on stderr.
pub fn smollm2_gguf() -> Option<PathBuf> {
    let path = match std::env::var_os("GPTQ_SMOLLM2") {
        Some(path) => PathBuf::from(path),
        None => workspace().join(".demo").join(SMOLLM2_FILE),
    };
    if path.is_file() {
        return Some(path);
    }
    skipped(
        "SmolLM2-135M-Instruct (`make test` fetches it where pip reaches a registry, or set GPTQ_SMOLLM2)",
    );
    None
}

/// The root of the checkout: that of the test that runs, as two checkouts may share a build directory.
pub fn workspace() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR");
    let package = package.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    package.join("../..")
}

fn shared() -> PathBuf {
    std::env::var_os("GPTQ_SHARED").map_or_else(|| workspace().join("../shared"), PathBuf::from)
}

fn roots() -> [PathBuf; 2] {
    [shared().join("fixtures"), workspace().join("testdata/fixtures")]
}

fn shared_file(relative: &str) -> Option<PathBuf> {
    let path = shared().join(relative);
    if path.is_file() {
        return Some(path);
    }
    skipped(&format!("shared {relative}"));
    None
}

fn listed(under: &str, what: &str) -> Vec<(String, PathBuf)> {
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    for root in roots() {
        let Ok(entries) = std::fs::read_dir(root.join(under)) else {
            continue;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let whole =
                path.join("config.json").is_file() && path.join("expected.safetensors").is_file();
            if whole && found.iter().all(|(known, _)| *known != name) {
                found.push((name, path));
            }
        }
    }
    if found.is_empty() {
        skipped(what);
    }
    found.sort();
    found
}

#[allow(clippy::print_stderr, reason = "a skipped test has to be visible")]
fn skipped(what: &str) {
    eprintln!("SKIPPED: {what} not found");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_fixture_is_none() {
        assert_eq!(dir("no-such-family"), None);
        assert_eq!(shared_text("no-such-text.txt"), None);
    }

    #[test]
    fn listed_fixtures_can_be_opened() {
        for (name, path) in all().into_iter().chain(quantized()) {
            assert!(path.join("config.json").is_file(), "{name}");
        }
    }
}
