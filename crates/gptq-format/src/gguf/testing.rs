//! A writer of small GGUF files for tests, valid or not.

use std::path::Path;

use super::{GgufFile, header};

/// Metadata and tensors in the order in which they were added.
#[derive(Clone, Default)]
pub(crate) struct Builder {
    keys: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl Builder {
    /// A key of any type, its value already in bytes. Replaces an earlier one of that name.
    pub(crate) fn raw(mut self, key: &str, kind: u32, value: Vec<u8>) -> Self {
        self.keys.retain(|(k, _, _)| k != key);
        self.keys.push((key.into(), kind, value));
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.keys.retain(|(k, _, _)| k != key);
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, value.to_le_bytes().into())
    }

    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, value.to_le_bytes().into())
    }

    pub(crate) fn bool(self, key: &str, value: bool) -> Self {
        self.raw(key, 7, vec![u8::from(value)])
    }

    pub(crate) fn str(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, string(value))
    }

    pub(crate) fn strings(self, key: &str, values: &[&str]) -> Self {
        let body = values.iter().flat_map(|v| string(v)).collect();
        self.raw(key, 9, array(8, values.len(), body))
    }

    pub(crate) fn i32s(self, key: &str, values: &[i32]) -> Self {
        let body = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.raw(key, 9, array(5, values.len(), body))
    }

    pub(crate) fn f32s(self, key: &str, values: &[f32]) -> Self {
        let body = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.raw(key, 9, array(6, values.len(), body))
    }

    /// A tensor with ggml's type number; `dims` fastest first.
    pub(crate) fn tensor(mut self, name: &str, dims: &[u64], kind: u32, data: Vec<u8>) -> Self {
        self.tensors.push((name.into(), dims.into(), kind, data));
        self
    }

    pub(crate) fn f32_tensor(self, name: &str, dims: &[u64], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, dims, 0, data)
    }

    /// The file; tensor data are padded to 32 bytes between tensors, but not after the last.
    pub(crate) fn build(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.keys {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut data = Vec::new();
        for (name, dims, kind, bytes) in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            out.extend(string(name));
            out.extend((dims.len() as u32).to_le_bytes());
            out.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }

    /// The file as [`GgufFile`], without tensor data to read.
    pub(crate) fn open(&self) -> GgufFile {
        let bytes = self.build();
        let path = Path::new("test.gguf");
        GgufFile {
            path: path.into(),
            header: header::parse(&bytes, bytes.len() as u64, path).unwrap(),
        }
    }

    /// Writes the file into `directory` and opens it.
    pub(crate) fn write(&self, directory: &Path) -> GgufFile {
        let path = directory.join("test.gguf");
        std::fs::write(&path, self.build()).unwrap();
        GgufFile::open(&path).unwrap()
    }
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out
}

pub(crate) fn array(kind: u32, count: usize, body: Vec<u8>) -> Vec<u8> {
    let mut out = kind.to_le_bytes().to_vec();
    out.extend((count as u64).to_le_bytes());
    out.extend(body);
    out
}

/// A model of one layer with 2 query heads, 1 key head, and a tokenizer of `tokens`.
pub(crate) fn tiny_llama(architecture: &str) -> Builder {
    let key = |name: &str| format!("{architecture}.{name}");
    let norm = [1.0; 64];
    let q4_0 = |rows: usize| vec![1; rows * 2 * 18];
    let b = Builder::default()
        .str("general.architecture", architecture)
        .u32(&key("block_count"), 1)
        .u32(&key("context_length"), 256)
        .u32(&key("embedding_length"), 64)
        .u32(&key("feed_forward_length"), 64)
        .u32(&key("attention.head_count"), 2)
        .u32(&key("attention.head_count_kv"), 1)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
        .f32(&key("rope.freq_base"), 10000.0)
        .str("tokenizer.ggml.model", "gpt2")
        .str("tokenizer.ggml.pre", "gpt-2")
        .strings("tokenizer.ggml.tokens", &["a", "b", "c", "ab", "Ġ", "Ġab", "<s>", "</s>"])
        .i32s("tokenizer.ggml.token_type", &[1, 1, 1, 1, 1, 1, 3, 3])
        .strings("tokenizer.ggml.merges", &["a b", "Ġ ab"])
        .u32("tokenizer.ggml.bos_token_id", 6)
        .u32("tokenizer.ggml.eos_token_id", 7)
        .str(
            "tokenizer.chat_template",
            "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}",
        )
        .tensor("token_embd.weight", &[64, 8], 2, q4_0(8))
        .f32_tensor("output_norm.weight", &[64], &norm);
    [
        ("attn_q", 64),
        ("attn_k", 32),
        ("attn_v", 32),
        ("attn_output", 64),
        ("ffn_gate", 64),
        ("ffn_up", 64),
        ("ffn_down", 64),
    ]
    .into_iter()
    .fold(b, |b, (name, rows)| {
        b.tensor(&format!("blk.0.{name}.weight"), &[64, rows as u64], 2, q4_0(rows))
    })
    .f32_tensor("blk.0.attn_norm.weight", &[64], &norm)
    .f32_tensor("blk.0.ffn_norm.weight", &[64], &norm)
}
