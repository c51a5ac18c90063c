//! Files beside a checkpoint that only other programs read.
//!
//! The files by which sentence-transformers describes how a model's hidden states become one vector per text:
//! `modules.json` lists the steps and their directories (`1_Pooling`), beside it lie settings of the whole.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{FormatError, Result};
use crate::fs::{read_json_if_exists, read_limited, write_atomic};

pub(crate) const MODULES: &str = "modules.json";
/// The key of a `config.json` that names Python code beside it.
pub(crate) const CUSTOM_CODE: &str = "auto_map";
pub(crate) const SETTINGS: &str = "config_sentence_transformers.json";
/// Larger files than a dense layer of any such model are none of these.
const MAX_FILE_BYTES: u64 = 1 << 28;

/// Copies these files from one checkpoint directory to another; nothing where `from` has no `modules.json`.
///
/// # Errors
/// If a file cannot be read or written, `modules.json` is not JSON, or names a directory outside `from`.
pub fn copy_sentence_files(from: &Path, to: &Path) -> Result<()> {
    let file = from.join(MODULES);
    let Some(modules) = read_json_if_exists(&file)? else { return Ok(()) };
    let beside = |name: &OsStr| {
        let name = name.to_string_lossy();
        name == MODULES || name == SETTINGS || is_sentence_config(&name)
    };
    copy_files(from, to, beside)?;
    for module in modules.as_array().into_iter().flatten() {
        let inside = PathBuf::from(module.get("path").and_then(Value::as_str).unwrap_or(""));
        if !inside.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(FormatError::Config {
                path: file,
                key: "path".to_owned(),
                expected: "a path inside the directory".to_owned(),
                got: inside.display().to_string(),
            });
        }
        // The model itself is the empty path.
        if inside.as_os_str().is_empty() {
            continue;
        }
        copy_files(&from.join(&inside), &to.join(&inside), |_| true)?;
    }
    Ok(())
}

/// sentence_bert_config.json, sentence_roberta_config.json and so on.
pub(crate) fn is_sentence_config(name: &str) -> bool {
    name.starts_with("sentence_") && name.ends_with("_config.json") && !name.contains('/')
}

/// Whether a file is Python code beside the weights.
pub(crate) fn is_code(name: &str) -> bool {
    !name.contains('/') && Path::new(name).extension().is_some_and(|extension| extension == "py")
}

/// Copies the Python files that `auto_map` of a `config.json` names, and those beside them that they import: the output
/// names them, too. Nothing here runs them.
///
/// # Errors
/// If a file cannot be read or written.
pub fn copy_custom_code(config: &Map<String, Value>, from: &Path, to: &Path) -> Result<()> {
    if !config.contains_key(CUSTOM_CODE) {
        return Ok(());
    }
    copy_files(from, to, |name| is_code(&name.to_string_lossy()))
}

/// Copies the files of a directory, which need not exist, whose names are wanted.
fn copy_files(from: &Path, to: &Path, wanted: impl Fn(&OsStr) -> bool) -> Result<()> {
    let entries = match fs::read_dir(from) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(FormatError::io("list", from))?,
    };
    for entry in entries {
        let entry = entry.map_err(FormatError::io("list", from))?;
        let path = entry.path();
        if wanted(&entry.file_name()) && path.is_file() {
            fs::create_dir_all(to).map_err(FormatError::io("create", to))?;
            write_atomic(&to.join(entry.file_name()), &read_limited(&path, MAX_FILE_BYTES)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn directory(modules: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        fs::create_dir(folder.path().join("1_Pooling")).unwrap();
        write(MODULES, modules);
        write(SETTINGS, "{}");
        write("sentence_bert_config.json", r#"{"max_seq_length": 256}"#);
        write("1_Pooling/config.json", r#"{"pooling_mode": "cls"}"#);
        write("model.safetensors", "not one of these");
        folder
    }

    #[test]
    fn code_is_copied_where_the_config_names_it() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["modeling_x.py", "helper.py", "notes.txt"] {
            fs::write(from.path().join(name), name).unwrap();
        }
        let copy = |config: Value| {
            copy_custom_code(config.as_object().unwrap(), from.path(), to.path()).unwrap();
            names(to.path())
        };
        assert!(copy(json!({})).is_empty());
        let named = json!({ "auto_map": { "AutoModelForCausalLM": "modeling_x.X" } });
        assert_eq!(copy(named), ["helper.py", "modeling_x.py"]);
    }

    fn names(directory: &Path) -> Vec<String> {
        let name = |entry: std::io::Result<fs::DirEntry>| {
            entry.unwrap().file_name().into_string().unwrap()
        };
        let mut names: Vec<String> = fs::read_dir(directory).unwrap().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn what_modules_json_names_is_copied_and_nothing_else() {
        let from = directory(
            r#"[{"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "Pooling"},
                {"path": "2_Normalize", "type": "Normalize"}]"#,
        );
        let to = tempfile::tempdir().unwrap();
        copy_sentence_files(from.path(), to.path()).unwrap();
        let settings = ["1_Pooling", SETTINGS, MODULES, "sentence_bert_config.json"];
        assert_eq!(names(to.path()), settings);
        let pooling = fs::read_to_string(to.path().join("1_Pooling/config.json")).unwrap();
        assert_eq!(pooling, r#"{"pooling_mode": "cls"}"#);
        let plain = tempfile::tempdir().unwrap();
        let nothing = tempfile::tempdir().unwrap();
        copy_sentence_files(plain.path(), nothing.path()).unwrap();
        assert!(names(nothing.path()).is_empty());
    }

    #[test]
    fn a_path_that_leads_out_is_refused() {
        for path in ["../1_Pooling", "/etc", "a/../.."] {
            let from = directory(&format!(r#"[{{"path": "{path}", "type": "Pooling"}}]"#));
            let to = tempfile::tempdir().unwrap();
            let error = copy_sentence_files(from.path(), to.path()).unwrap_err().to_string();
            assert!(error.contains(MODULES) && error.contains(path), "{error}");
        }
    }
}
