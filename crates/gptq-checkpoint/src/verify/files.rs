//! The files: does the index name every tensor, is every shard named, do the headers say what transformers asks for.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use gptq_format::Checkpoint;
use gptq_format::fs::read_json_if_exists;
use gptq_format::safetensors_file::MAX_HEADER_BYTES;
use serde_json::Value;

use super::finding::Findings;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Whether every header says that it was written for PyTorch.
pub(super) fn check(checkpoint: &Checkpoint, findings: &mut Findings) -> bool {
    let store = &checkpoint.tensors;
    let used: BTreeSet<&Path> = store
        .names()
        .filter_map(|name| store.info(name).ok())
        .map(|info| info.file.as_path())
        .collect();
    let names: BTreeSet<String> = used.iter().map(|path| file_name(path)).collect();
    check_index(checkpoint, &names, findings);
    check_strays(checkpoint, &names, findings);
    let mut all_pt = true;
    for path in used {
        let format = header_format(path);
        if !matches!(format.as_deref(), Some("pt")) {
            all_pt = false;
            findings.warning(
                "header-format",
                Some(&file_name(path)),
                match format {
                    Some(other) => format!("its header says that it was written for `{other}`, not `pt`"),
                    None => "its header does not say for which framework it was written (`format`: `pt`)".into(),
                },
                Some("`gptq convert` writes the files anew, with the header that transformers asks for"),
            );
        }
    }
    all_pt
}

fn check_index(checkpoint: &Checkpoint, used: &BTreeSet<String>, findings: &mut Findings) {
    // A broken index was refused when the checkpoint was opened, unless it was not needed.
    let Ok(Some(index)) = read_json_if_exists(&checkpoint.path.join(INDEX)) else { return };
    if used.contains(SINGLE) {
        findings.warning(
            "index-unused",
            Some(INDEX),
            "there is an index, but also a model.safetensors, which readers take first",
            Some("delete what belongs to an older state of the checkpoint"),
        );
        return;
    }
    let Some(map) = index.get("weight_map").and_then(Value::as_object) else { return };
    for name in checkpoint.tensors.names().filter(|name| !map.contains_key(*name)) {
        findings.error(
            "index-tensor",
            Some(name),
            "it is in a shard, but not in the index, so that readers do not find it",
            Some("`gptq convert` writes a new index"),
        );
    }
}

/// Shards of another state of the checkpoint.
fn check_strays(checkpoint: &Checkpoint, used: &BTreeSet<String>, findings: &mut Findings) {
    let Ok(entries) = std::fs::read_dir(&checkpoint.path) else { return };
    let mut strays: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(".safetensors") && !used.contains(name))
        .filter(|name| name.starts_with("model") || name.starts_with("gptq_model"))
        .collect();
    strays.sort();
    for name in strays {
        findings.warning(
            "index-shard",
            Some(&name),
            "it is not part of the checkpoint: no index names it",
            Some(
                "delete it, or download the index that names it; vLLM reads every safetensors file",
            ),
        );
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// `__metadata__.format` of a safetensors file.
fn header_format(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let length = u64::from_le_bytes(length).min(MAX_HEADER_BYTES as u64);
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).ok()?;
    let header: Value = serde_json::from_slice(&header).ok()?;
    Some(header.get("__metadata__")?.get("format")?.as_str()?.to_owned())
}
