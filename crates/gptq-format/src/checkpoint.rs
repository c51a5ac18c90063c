//! A checkpoint on disk: config, tensors, quantization settings, tokenizer.

use crate::config::Config;
use crate::error::{FormatError, Result};
use crate::fs::read_json_if_exists;
use crate::gguf::GgufFile;
use crate::quantize_config::QuantizeConfig;
use crate::tensors::TensorStore;
use crate::tokenizer::Tokenizer;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Where the parts of a checkpoint come from.
#[derive(Clone, Debug)]
pub enum CheckpointKind {
    /// A directory with `config.json` and safetensors, plain or GPTQ.
    HuggingFace,
    /// A GGUF file, which holds everything.
    Gguf(Box<GgufFile>),
}

/// An opened checkpoint: headers are read and checked, weights are not.
#[derive(Debug)]
#[non_exhaustive]
pub struct Checkpoint {
    /// The directory or file.
    pub path: PathBuf,
    /// Its kind.
    pub kind: CheckpointKind,
    /// `config.json`, or what GGUF metadata say in its terms.
    pub config: Config,
    /// `generation_config.json`, if any.
    pub generation_config: Option<Value>,
    /// GPTQ settings; `None` if the linears are stored as floats (or ggml types).
    pub quantize_config: Option<QuantizeConfig>,
    /// The weights.
    pub tensors: TensorStore,
}

impl Checkpoint {
    /// Opens a directory with `config.json` and safetensors, or a `.gguf` file.
    ///
    /// # Errors
    /// If it is neither, or any part of it is malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(FormatError::io("open", path))?;
        if meta.is_dir() {
            return Self::open_dir(path);
        }
        if has_gguf_extension(path) {
            return Self::open_gguf(path);
        }
        let hint = match path.extension().and_then(|e| e.to_str()) {
            Some("safetensors" | "json") => "name the directory that holds it instead of the file",
            _ => "expected a directory with config.json and safetensors files, or a .gguf file",
        };
        Err(FormatError::NoCheckpoint { path: path.to_owned(), reason: hint.to_owned() })
    }

    /// The tokenizer that belongs to the model.
    ///
    /// # Errors
    /// If there is none or it is malformed.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(match &self.kind {
            CheckpointKind::HuggingFace => Tokenizer::from_dir(&self.path)?,
            CheckpointKind::Gguf(gguf) => Tokenizer::from_gguf(gguf)?,
        })
    }

    fn open_dir(path: &Path) -> Result<Self> {
        let config_path = path.join("config.json");
        if !config_path.exists() {
            return Err(FormatError::NoCheckpoint {
                path: path.to_owned(),
                reason: no_config(path),
            });
        }
        let config = Config::load(&config_path)?;
        let quantize_config = QuantizeConfig::load(path, &config)?;
        Ok(Self {
            path: path.to_owned(),
            kind: CheckpointKind::HuggingFace,
            generation_config: read_json_if_exists(&path.join("generation_config.json"))?,
            quantize_config,
            tensors: TensorStore::open_dir(path)?,
            config,
        })
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let gguf = GgufFile::open(path)?;
        Ok(Self {
            path: path.to_owned(),
            config: Config::new(path, gguf.hf_config()?),
            generation_config: Some(Value::Object(gguf.hf_generation_config()?)),
            quantize_config: None,
            tensors: TensorStore::open_gguf(&gguf)?,
            kind: CheckpointKind::Gguf(Box::new(gguf)),
        })
    }
}

fn has_gguf_extension(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

fn no_config(path: &Path) -> String {
    let gguf = std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .find(|name| has_gguf_extension(Path::new(name)));
    match gguf {
        Some(name) => format!("no config.json; to read `{name}`, name it instead of its directory"),
        None if path.join("adapter_config.json").exists() => {
            "it holds a LoRA adapter, not a model; name the model it was trained on".to_owned()
        }
        None => "no config.json".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn message(path: &Path) -> String {
        Checkpoint::open(path).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_checkpoint_is_refused_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        assert!(message(&at("absent")).contains("cannot open"));
        assert!(message(dir.path()).contains("no config.json"));
        fs::write(at("a.gguf"), "GGUF").unwrap();
        assert!(message(dir.path()).contains("`a.gguf`"));
        assert!(message(&at("a.gguf")).contains("a.gguf"));
        fs::write(at("x.safetensors"), "").unwrap();
        assert!(message(&at("x.safetensors")).contains("directory that holds it"));
        fs::write(at("x.txt"), "").unwrap();
        assert!(message(&at("x.txt")).contains(".gguf file"));
    }

    #[test]
    fn a_gguf_file_is_a_whole_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let gguf = crate::gguf::testing::tiny_llama("llama").write(dir.path());
        let checkpoint = Checkpoint::open(gguf.path()).unwrap();
        assert_eq!(checkpoint.config.str("model_type").unwrap(), "llama");
        assert!(checkpoint.quantize_config.is_none());
        assert_eq!(checkpoint.tokenizer().unwrap().eos_id(), Some(7));
        let q = "model.layers.0.self_attn.q_proj.weight";
        assert!(!checkpoint.tensors.is_identity(q));
        // Every byte of the blocks is 1: scale 0x0101, codes 1 and 0.
        let scale = half::f16::from_bits(0x0101).to_f32();
        let weights = checkpoint.tensors.read_f32(q, &[64, 64]).unwrap();
        assert_eq!(weights[..32], [[scale * -7.0; 16], [scale * -8.0; 16]].concat());
    }

    #[test]
    fn broken_configs_are_refused_by_file() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.json");
        for (text, part) in [
            ("{", "not valid JSON"),
            ("[1]", "an object"),
            (r#"{"quantization_config": {"bits": 4}}"#, "`group_size`"),
            (r#"{"quantization_config": 4}"#, "quantization_config"),
            ("{}", "model.safetensors"),
        ] {
            fs::write(&config, text).unwrap();
            let message = message(dir.path());
            assert!(message.contains(part), "{message}");
        }
    }
}
