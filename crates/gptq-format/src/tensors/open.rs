//! Which files of a directory are the checkpoint.

use super::TensorStore;
use crate::error::{FormatError, Result};
use crate::fs::read_json;
use crate::mmap::MappedFile;
use crate::safetensors_file;
use std::collections::BTreeMap;
use std::path::{Component, Path};

const SINGLE: &str = "model.safetensors";
const INDEX_SUFFIX: &str = ".safetensors.index.json";
/// A LoRA adapter beside a model is not the model.
const ADAPTER: &str = "adapter_model.safetensors";

pub(super) fn directory(directory: &Path) -> Result<TensorStore> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(FormatError::io("list", directory))? {
        let entry = entry.map_err(FormatError::io("list", directory))?;
        // A name that is not UTF-8 is none of those looked for.
        names.extend(entry.file_name().into_string());
    }
    names.sort();
    let single = only(&names, |n| n == SINGLE);
    let index = only(&names, |n| n == "model.safetensors.index.json")
        .or_else(|| only(&names, |n| n.ends_with(INDEX_SUFFIX)));
    let other = only(&names, |n| n.ends_with(".safetensors") && n != ADAPTER)
        .or_else(|| only(&names, |n| n.starts_with("gptq_model-") && n.ends_with(".safetensors")))
        .filter(|n| !is_shard(n));
    match (single, index, other) {
        (Some(name), _, _) | (None, None, Some(name)) => {
            let mut store = TensorStore::open_file(&directory.join(name))?;
            directory.clone_into(&mut store.path);
            Ok(store)
        }
        (None, Some(index), _) => sharded(directory, index),
        (None, None, None) => {
            Err(FormatError::NoCheckpoint { path: directory.to_owned(), reason: describe(&names) })
        }
    }
}

/// Whether a file is one of several: `model-00001-of-00002.safetensors`.
fn is_shard(name: &str) -> bool {
    let stem = name.strip_suffix(".safetensors").unwrap_or(name);
    let Some((rest, of)) = stem.rsplit_once("-of-") else { return false };
    let number = |text: &str| text.parse::<u32>().ok();
    let first = rest.rsplit_once('-').and_then(|(_, first)| number(first));
    first.is_some() && number(of).is_some_and(|of| of > 1)
}

/// The one name that matches; `None` if none or several do.
fn only(names: &[String], matches: impl Fn(&str) -> bool) -> Option<&str> {
    let mut found = names.iter().map(String::as_str).filter(|n| matches(n));
    found.next().filter(|_| found.next().is_none())
}

fn describe(names: &[String]) -> String {
    let extension =
        |e: &str| names.iter().filter(|n| n.ends_with(e)).map(String::as_str).collect::<Vec<_>>();
    let safetensors = extension(".safetensors");
    let gguf = extension(".gguf");
    if let [only] = safetensors[..]
        && is_shard(only)
    {
        return format!(
            "`{only}` is one of several files, and there is no `model.safetensors.index.json` that joins them; download \
             the others"
        );
    }
    if safetensors.len() > 1 {
        return format!(
            "several safetensors files ({}) but no `model.safetensors.index.json` that joins them",
            safetensors.join(", ")
        );
    }
    if !gguf.is_empty() {
        return format!(
            "no safetensors file; to read `{}`, name it instead of its directory",
            gguf[0]
        );
    }
    if let Some(name) = [".bin", ".pt", ".pth"].iter().find_map(|e| extension(e).pop()) {
        return format!(
            "no safetensors file; `{name}` is a pickle, which can run code and is not read: convert it with transformers' \
             `save_pretrained`"
        );
    }
    let found = match names {
        [] => "nothing".to_owned(),
        few if few.len() <= 12 => few.join(", "),
        [first, ..] => format!("{first} and {} more", names.len() - 1),
    };
    format!(
        "expected model.safetensors or model.safetensors.index.json with its shards; found {found}"
    )
}

fn sharded(directory: &Path, index_name: &str) -> Result<TensorStore> {
    let index_path = directory.join(index_name);
    let invalid = |reason: String| FormatError::ShardIndex { path: index_path.clone(), reason };
    let index = read_json(&index_path)?;
    let weight_map = index
        .get("weight_map")
        .and_then(|m| m.as_object())
        .ok_or_else(|| invalid("it has no object `weight_map`".to_owned()))?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in weight_map {
        let shard = shard
            .as_str()
            .ok_or_else(|| invalid(format!("the shard of tensor `{tensor}` is not text")))?;
        let mut components = Path::new(shard).components();
        let plain = matches!(
            (components.next(), components.next()),
            (Some(Component::Normal(name)), None) if name == shard
        );
        // A backslash separates directories on other systems, where the checkpoint would then escape.
        if !plain || shard.contains('\\') {
            return Err(invalid(format!(
                "tensor `{tensor}` is placed in `{shard}`, which is not a plain file name beside the index"
            )));
        }
        shards.entry(shard).or_default().push(tensor);
    }
    if shards.is_empty() {
        return Err(invalid("its `weight_map` is empty".to_owned()));
    }

    let mut store =
        TensorStore { path: directory.to_owned(), files: Vec::new(), entries: BTreeMap::new() };
    for (shard, expected) in shards {
        let path = directory.join(shard);
        if !path.exists() {
            return Err(FormatError::MissingShard {
                directory: directory.to_owned(),
                shard: shard.to_owned(),
                tensor: expected[0].to_owned(),
            });
        }
        let file = MappedFile::open(&path)?;
        let tensors = safetensors_file::parse(&file)?;
        store.add_file(file, tensors.into_iter().map(|t| (t, None)).collect())?;
        let placed_here =
            |name: &&str| store.entries.get(*name).is_some_and(|e| e.info.file == path);
        if let Some(missing) = expected.into_iter().find(|name| !placed_here(name)) {
            return Err(invalid(format!(
                "it places tensor `{missing}` in `{shard}`, which does not hold it"
            )));
        }
    }
    Ok(store)
}
