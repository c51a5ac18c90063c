//! Models by hub id, from the Hugging Face cache or the network.

use crate::error::{FormatError, Result};
use crate::fs::read_json;
use crate::side_files::{CUSTOM_CODE, MODULES, SETTINGS, is_code, is_sentence_config};
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;
use std::env;
use std::path::{Path, PathBuf};

/// Called while a file is downloaded: its name, bytes so far, bytes in all.
pub type OnProgress<'a> = dyn Fn(&str, u64, u64) + 'a;

/// Files beside the weights that are fetched where the repository has them.
const SMALL_FILES: [&str; 19] = [
    "README.md",
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    MODULES,
    SETTINGS,
];

/// Turns what the user named into a path: an existing file or directory; else `owner/name` or `owner/name@revision` on
/// the hub, from the local cache (`HF_HUB_CACHE`, `HF_HOME`) if it holds the whole model, otherwise downloaded into it
/// (`HF_TOKEN` and `HF_ENDPOINT` are honoured) unless `HF_HUB_OFFLINE` is set.
///
/// # Errors
/// If it is neither a path nor a hub id, or the model is not cached and cannot be downloaded; the message says what to do
/// without a network.
pub fn resolve(model: &str, on_progress: &OnProgress<'_>) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(path.to_owned());
    }
    let Some(id) = HubId::parse(model) else {
        return Err(FormatError::NoCheckpoint {
            path: path.to_owned(),
            reason: "no such file or directory, and it is not a hub id (`owner/name`)".to_owned(),
        });
    };
    from_hub(model, &id, &cache_directory(), is_offline(), on_progress)
}

fn from_hub(
    model: &str,
    id: &HubId,
    cache: &Path,
    offline: bool,
    on_progress: &OnProgress<'_>,
) -> Result<PathBuf> {
    let cached = cached(cache, id);
    // Other tools may have fetched the weights alone.
    if let Some(snapshot) = &cached
        && (offline || snapshot.join("tokenizer.json").exists())
    {
        tracing::debug!(model, path = %snapshot.display(), "found in the hub cache");
        return Ok(snapshot.clone());
    }
    let failed = |reason: String| FormatError::Hub {
        model: model.to_owned(),
        reason,
        hint: format!(
            "without a network, put the model into a directory and name that, or copy it into the cache `{}`",
            cache.display()
        ),
    };
    if offline {
        return Err(failed("it is not in the cache and HF_HUB_OFFLINE is set".to_owned()));
    }
    match (download(cache, id, on_progress), cached) {
        (Err(reason), Some(snapshot)) => {
            tracing::warn!(
                "{model} is in the cache without its tokenizer, which cannot be fetched: {reason}"
            );
            Ok(snapshot)
        }
        (downloaded, _) => downloaded.map_err(failed),
    }
}

/// `owner/name` at a revision.
#[derive(Debug, PartialEq, Eq)]
struct HubId {
    repository: String,
    revision: String,
}

impl HubId {
    fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = repository.split_once('/')?;
        let word = |w: &str| {
            w.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && w.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        // The parts become path components of the cache and of a URL. A revision may have slashes: `refs/pr/1`.
        let valid = word(owner)
            && word(name)
            && !name.to_ascii_lowercase().ends_with(".gguf")
            && revision.split('/').all(word);
        valid.then(|| Self { repository: repository.to_owned(), revision: revision.to_owned() })
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.repository.clone(), RepoType::Model, self.revision.clone())
    }
}

fn is_offline() -> bool {
    env::var("HF_HUB_OFFLINE")
        .is_ok_and(|v| matches!(v.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"))
}

fn cache_directory() -> PathBuf {
    match env::var_os("HF_HUB_CACHE") {
        Some(path) if !path.is_empty() => path.into(),
        _ => Cache::from_env().path().clone(),
    }
}

/// The snapshot of the cache that holds all weights of the model.
fn cached(cache: &Path, id: &HubId) -> Option<PathBuf> {
    let repository = cache.join(id.repo().folder_name());
    let commit = std::fs::read_to_string(repository.join("refs").join(&id.revision))
        .unwrap_or_else(|_| id.revision.clone());
    let commit = commit.trim();
    if !is_commit(commit) {
        return None;
    }
    let snapshot = repository.join("snapshots").join(commit);
    let entries = std::fs::read_dir(&snapshot).ok()?;
    let names: Vec<String> =
        entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    let weights = match Weights::choose(&names)? {
        Weights::File(name) => vec![name],
        Weights::Index(name) => shards(&snapshot.join(name))?,
    };
    let whole = snapshot.join("config.json").exists()
        && weights.iter().all(|name| snapshot.join(name).exists());
    whole.then_some(snapshot)
}

/// Commits become path components.
fn is_commit(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric())
}

/// Whether a file of a repository is fetched wherever it is there.
fn is_small(name: &str) -> bool {
    SMALL_FILES.contains(&name) || is_sentence_config(name)
}

/// Whether a file is the config of a step of `modules.json`, such as `1_Pooling/config.json`.
fn is_of_module(modules: &Value, name: &str) -> bool {
    let paths =
        modules.as_array().into_iter().flatten().filter_map(|module| module["path"].as_str());
    let inside = |path: &str| name.strip_prefix(path).and_then(|rest| rest.strip_prefix('/'));
    paths.filter(|path| !path.is_empty()).filter_map(inside).any(|file| file == "config.json")
}

/// Which files of a repository are its weights, by the same preference as [`crate::TensorStore::open_dir`].
enum Weights {
    File(String),
    Index(String),
}

impl Weights {
    fn choose(names: &[String]) -> Option<Self> {
        let named = |name: &str| names.iter().find(|n| *n == name).cloned();
        let only = |suffix: &str| {
            let mut found = names.iter().filter(|n| {
                n.ends_with(suffix) && !n.contains('/') && *n != "adapter_model.safetensors"
            });
            found.next().filter(|_| found.next().is_none()).cloned()
        };
        named("model.safetensors")
            .map(Self::File)
            .or_else(|| named("model.safetensors.index.json").map(Self::Index))
            .or_else(|| only(".safetensors.index.json").map(Self::Index))
            .or_else(|| only(".safetensors").map(Self::File))
    }
}

/// The shard names of an index, each once; `None` if it is malformed or names a file elsewhere.
fn shards(index: &Path) -> Option<Vec<String>> {
    let index = read_json(index).ok()?;
    let mut names: Vec<String> = index["weight_map"]
        .as_object()?
        .values()
        .map(|v| v.as_str().map(str::to_owned))
        .collect::<Option<_>>()?;
    names.sort();
    names.dedup();
    let plain = |n: &String| !n.contains(['/', '\\']) && n.ends_with(".safetensors");
    names.iter().all(plain).then_some(names)
}

fn download(
    cache: &Path,
    id: &HubId,
    on_progress: &OnProgress<'_>,
) -> std::result::Result<PathBuf, String> {
    let mut builder = ApiBuilder::from_env()
        .with_cache_dir(cache.to_owned())
        .with_progress(false)
        .with_retries(3);
    if let Ok(token) = env::var("HF_TOKEN") {
        builder = builder.with_token(Some(token));
    }
    let api = builder.build().map_err(|e| e.to_string())?;
    let info = api.repo(id.repo()).info().map_err(|e| e.to_string())?;
    if !is_commit(&info.sha) {
        return Err(format!("the hub names the strange commit `{}`", info.sha));
    }
    // Pinned, so that a push during the download cannot mix two revisions.
    let pinned = HubId { repository: id.repository.clone(), revision: info.sha };
    let names: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    if !names.iter().any(|n| n == "config.json") {
        return Err("the repository has no config.json".to_owned());
    }
    let weights = Weights::choose(&names).ok_or_else(|| {
        let others: Vec<&str> = names
            .iter()
            .map(String::as_str)
            .filter(|n| [".gguf", ".bin", ".safetensors"].iter().any(|e| n.ends_with(e)))
            .take(8)
            .collect();
        format!("the repository has no weights in safetensors (found: {})", others.join(", "))
    })?;
    let repo = api.repo(pinned.repo());
    let local = Cache::new(cache.to_owned()).repo(pinned.repo());
    let get = |name: &str| match local.get(name) {
        Some(path) => Ok(path),
        None => fetch(&repo, name, on_progress),
    };
    let config = get("config.json")?;
    for name in names.iter().filter(|name| is_small(name)) {
        let path = get(name)?;
        if name == "config.json" && read_json(&path).is_ok_and(|c| c.get(CUSTOM_CODE).is_some()) {
            for code in names.iter().filter(|name| is_code(name)) {
                get(code)?;
            }
        }
        if name == MODULES {
            let modules = read_json(&path).map_err(|e| e.to_string())?;
            for name in names.iter().filter(|name| is_of_module(&modules, name)) {
                get(name)?;
            }
        }
    }
    match weights {
        Weights::File(name) => drop(get(&name)?),
        Weights::Index(name) => {
            let index = get(&name)?;
            let shards = shards(&index).ok_or_else(|| format!("its `{name}` is malformed"))?;
            for shard in shards {
                get(&shard)?;
            }
        }
    }
    // Last: from here on the branch's name leads to a whole snapshot.
    Cache::new(cache.to_owned())
        .repo(id.repo())
        .create_ref(&pinned.revision)
        .map_err(|e| e.to_string())?;
    match config.parent() {
        Some(snapshot) => Ok(snapshot.to_owned()),
        None => Err(format!("unexpected place in the cache: `{}`", config.display())),
    }
}

fn fetch(
    repo: &ApiRepo,
    name: &str,
    on_progress: &OnProgress<'_>,
) -> std::result::Result<PathBuf, String> {
    struct Report<'a, 'b> {
        on_progress: &'a OnProgress<'b>,
        name: &'a str,
        done: u64,
        total: u64,
    }

    impl Progress for Report<'_, '_> {
        fn init(&mut self, size: usize, _filename: &str) {
            self.total = size as u64;
            (self.on_progress)(self.name, 0, self.total);
        }

        fn update(&mut self, size: usize) {
            self.done += size as u64;
            (self.on_progress)(self.name, self.done, self.total);
        }

        fn finish(&mut self) {}
    }

    let report = Report { on_progress, name, done: 0, total: 0 };
    repo.download_with_progress(name, report).map_err(|e| format!("downloading `{name}`: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn hub_ids_are_told_from_paths() {
        let id = HubId::parse("HuggingFaceTB/SmolLM2-135M-Instruct").unwrap();
        assert_eq!(
            (id.repository.as_str(), id.revision.as_str()),
            ("HuggingFaceTB/SmolLM2-135M-Instruct", "main")
        );
        assert_eq!(HubId::parse("a/b@refs/pr/1").unwrap().revision, "refs/pr/1");
        for text in [
            "model",
            "./a/b",
            "/a/b",
            "../b",
            "a/..",
            "a/b/c",
            "a/b@../../x",
            "a/b@",
            "a/b.gguf",
            "a/b c",
            "",
            "a/",
        ] {
            assert_eq!(HubId::parse(text), None, "{text}");
        }
    }

    #[test]
    fn what_makes_vectors_of_texts_is_fetched() {
        let modules = serde_json::json!([
            { "path": "", "type": "sentence_transformers.models.Transformer" },
            { "path": "1_Pooling", "type": "sentence_transformers.models.Pooling" }
        ]);
        for name in [MODULES, SETTINGS, "sentence_bert_config.json", "vocab.txt", "config.json"] {
            assert!(is_small(name), "{name}");
        }
        assert!(is_of_module(&modules, "1_Pooling/config.json"));
        assert!(is_code("modeling_x.py") && !is_code("scripts/x.py") && !is_code("py"));
        for name in
            ["1_Pooling", "1_Pooling/x/config.json", "2_Dense/config.json", "onnx/model.onnx"]
        {
            assert!(!is_small(name) && !is_of_module(&modules, name), "{name}");
        }
    }

    #[test]
    fn existing_paths_win_and_others_are_explained() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert_eq!(resolve(path, &|_, _, _| {}).unwrap(), dir.path());
        let message = resolve(&format!("{path}/absent"), &|_, _, _| {}).unwrap_err().to_string();
        assert!(message.contains("no such file"), "{message}");
    }

    #[test]
    fn offline_errors_say_what_to_do() {
        let cache = tempfile::tempdir().unwrap();
        let id = HubId::parse("o/n").unwrap();
        let error = from_hub("o/n", &id, cache.path(), true, &|_, _, _| {}).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("HF_HUB_OFFLINE"), "{message}");
        assert!(message.contains("put the model into a directory"), "{message}");
        assert!(message.contains(cache.path().to_str().unwrap()), "{message}");
    }

    #[test]
    fn only_whole_snapshots_are_taken_from_the_cache() {
        let cache = tempfile::tempdir().unwrap();
        let id = HubId::parse("o/n").unwrap();
        let repository = cache.path().join("models--o--n");
        let snapshot = repository.join("snapshots/abc123");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(repository.join("refs")).unwrap();
        let touch = |name: &str, text: &str| fs::write(snapshot.join(name), text).unwrap();
        touch("config.json", "{}");
        touch(
            "model.safetensors.index.json",
            r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#,
        );
        touch("1.safetensors", "");
        touch("2.safetensors", "");
        assert_eq!(cached(cache.path(), &id), None);
        fs::write(repository.join("refs/main"), "abc123\n").unwrap();
        assert_eq!(cached(cache.path(), &id), Some(snapshot.clone()));
        let by_commit = HubId::parse("o/n@abc123").unwrap();
        assert_eq!(cached(cache.path(), &by_commit), Some(snapshot.clone()));
        fs::remove_file(snapshot.join("2.safetensors")).unwrap();
        assert_eq!(cached(cache.path(), &id), None);
        touch("model.safetensors.index.json", r#"{"weight_map": {"a": "../1.safetensors"}}"#);
        assert_eq!(cached(cache.path(), &id), None);
        fs::write(repository.join("refs/main"), "../../x").unwrap();
        assert_eq!(cached(cache.path(), &id), None);
    }
}
