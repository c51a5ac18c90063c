//! Checkpoints that are changed before they are examined.

use std::collections::BTreeMap;
use std::path::Path;

use gptq_format::{Checkpoint, DType, ShardPlan, ShardWriter, TensorSpec};
use serde_json::Value;

/// A checkpoint in memory.
pub(crate) struct Edit {
    pub(crate) config: Value,
    pub(crate) quantize_config: Value,
    pub(crate) tensors: BTreeMap<String, (DType, Vec<usize>, Vec<u8>)>,
}

impl Edit {
    /// Reads a fixture; `None` where there is none.
    pub(crate) fn fixture(name: &str) -> Option<Self> {
        let dir = gptq_testkit::fixtures::dir(name)?;
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let json = |name: &str| {
            serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap_or(b"null".into()))
                .unwrap()
        };
        let store = &checkpoint.tensors;
        let tensors = store.names().map(|name| {
            let info = store.info(name).unwrap();
            let bytes = store.bytes(name).unwrap().to_vec();
            (name.to_owned(), (info.dtype, info.shape.clone(), bytes))
        });
        Some(Self {
            config: json("config.json"),
            quantize_config: json("quantize_config.json"),
            tensors: tensors.collect(),
        })
    }

    /// Changes a key of the settings in both files.
    pub(crate) fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        let value = value.into();
        self.config["quantization_config"][key] = value.clone();
        self.quantize_config[key] = value;
        self
    }

    /// The bytes of a tensor.
    pub(crate) fn bytes(&mut self, name: &str) -> &mut Vec<u8> {
        &mut self.tensors.get_mut(name).unwrap_or_else(|| panic!("no tensor {name}")).2
    }

    /// Replaces a tensor of 32-bit integers.
    pub(crate) fn put_words(&mut self, name: &str, words: impl IntoIterator<Item = u32>) {
        *self.bytes(name) = words.into_iter().flat_map(u32::to_le_bytes).collect();
    }

    pub(crate) fn rename(&mut self, from: &str, to: &str) {
        let tensor = self.tensors.remove(from).unwrap_or_else(|| panic!("no tensor {from}"));
        self.tensors.insert(to.to_owned(), tensor);
    }

    /// Writes everything into `dir`, in shards of at most `shard` bytes.
    pub(crate) fn write(&self, dir: &Path, shard: u64) {
        std::fs::create_dir_all(dir).unwrap();
        let specs = self.tensors.iter().map(|(name, (dtype, shape, _))| TensorSpec {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.clone(),
        });
        let plan = ShardPlan::new(specs.collect(), shard).unwrap();
        let mut writer = ShardWriter::create(dir, plan).unwrap();
        for (name, (_, _, bytes)) in &self.tensors {
            writer.write(name, bytes).unwrap();
        }
        writer.finish().unwrap();
        let json = |name: &str, value: &Value| {
            if !value.is_null() {
                std::fs::write(dir.join(name), value.to_string()).unwrap();
            }
        };
        json("config.json", &self.config);
        json("quantize_config.json", &self.quantize_config);
    }
}
