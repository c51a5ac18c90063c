//! Which tensor goes where, before any is known.

use super::write_error;
use crate::dtype::DType;
use crate::error::Result;
use crate::safetensors_file::MAX_HEADER_BYTES;
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// Name, dtype and shape of a tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// How its elements are stored.
    pub dtype: DType,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
}

/// Which tensor lies where in which file.
#[derive(Clone, Debug)]
pub struct ShardPlan {
    pub(super) shards: Vec<Shard>,
    /// Shard and position in it, by name.
    pub(super) places: HashMap<String, (usize, usize)>,
}

#[derive(Clone, Debug)]
pub(super) struct Shard {
    pub(super) name: String,
    /// Length, JSON and padding.
    pub(super) header: Vec<u8>,
    pub(super) tensors: Vec<Placed>,
    pub(super) data_bytes: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub(super) spec: TensorSpec,
    /// From the start of the data.
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// Data starts at a multiple of this, a cache line.
pub(super) const ALIGNMENT: usize = 64;

impl ShardPlan {
    /// Lays out `tensors` in their order: a file is closed when the next tensor would make its data larger than
    /// `max_shard_bytes`; a larger tensor gets a file of its own. One file is `model.safetensors`, several are
    /// `model-00001-of-0000N.safetensors` with an index.
    ///
    /// Inside a file wider elements come first, so that every tensor is aligned to its element, which PyTorch needs.
    ///
    /// # Errors
    /// If a name is empty, occurs twice or is reserved, a dtype cannot be stored in safetensors, or a size overflows.
    pub fn new(tensors: Vec<TensorSpec>, max_shard_bytes: u64) -> Result<Self> {
        let mut groups: Vec<Vec<Placed>> = vec![Vec::new()];
        let mut filled = 0u64;
        for spec in tensors {
            let bytes = stored_bytes(&spec)?;
            let larger = filled.checked_add(bytes);
            let full = larger.is_none_or(|sum| sum > max_shard_bytes);
            if full && groups.last().is_some_and(|g| !g.is_empty()) {
                groups.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            let placed = Placed { spec, offset: 0, bytes };
            // There is always a last group: one at the start, and groups are only added.
            if let Some(group) = groups.last_mut() {
                group.push(placed);
            }
        }
        let count = groups.len();
        let mut plan = Self { shards: Vec::with_capacity(count), places: HashMap::new() };
        for (index, mut tensors) in groups.into_iter().enumerate() {
            tensors.sort_by_key(|t| std::cmp::Reverse(t.spec.dtype.unit().1));
            let mut data_bytes = 0;
            for (position, tensor) in tensors.iter_mut().enumerate() {
                tensor.offset = data_bytes;
                data_bytes += tensor.bytes;
                let name = tensor.spec.name.clone();
                if plan.places.insert(name, (index, position)).is_some() {
                    return Err(write_error(&tensor.spec.name, "it is planned twice"));
                }
            }
            plan.shards.push(Shard {
                name: match count {
                    1 => "model.safetensors".to_owned(),
                    _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
                },
                header: header(&tensors)?,
                tensors,
                data_bytes,
            });
        }
        Ok(plan)
    }

    /// Size of all tensors in bytes, without headers.
    pub fn total_bytes(&self) -> u64 {
        self.shards.iter().map(|s| s.data_bytes).sum()
    }

    /// Name and size in bytes of every safetensors file.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        self.shards.iter().map(|s| (s.name.as_str(), s.file_bytes()))
    }

    /// All tensors, in the order of the files.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorSpec> {
        self.shards.iter().flat_map(|s| s.tensors.iter().map(|t| &t.spec))
    }

    /// The index of several files; `None` where one file needs none.
    pub(super) fn index(&self) -> Option<Value> {
        if self.shards.len() == 1 {
            return None;
        }
        let mut weight_map = Map::new();
        for shard in &self.shards {
            for tensor in &shard.tensors {
                weight_map.insert(tensor.spec.name.clone(), json!(shard.name));
            }
        }
        Some(json!({"metadata": {"total_size": self.total_bytes()}, "weight_map": weight_map}))
    }
}

impl Shard {
    pub(super) fn file_bytes(&self) -> u64 {
        self.header.len() as u64 + self.data_bytes
    }
}

fn stored_bytes(spec: &TensorSpec) -> Result<u64> {
    if spec.name.is_empty() || spec.name == "__metadata__" {
        return Err(write_error(&spec.name, "the name is reserved"));
    }
    if spec.dtype.safetensors().is_none() {
        let reason = format!("safetensors has no dtype {}", spec.dtype);
        return Err(write_error(&spec.name, &reason));
    }
    // Half of the range keeps sums of a few shards from overflowing; no disk is larger.
    spec.dtype
        .byte_len(&spec.shape)
        .filter(|&b| b <= usize::MAX >> 16)
        .map(|b| b as u64)
        .ok_or_else(|| write_error(&spec.name, &format!("the shape {:?} is too large", spec.shape)))
}

fn header(tensors: &[Placed]) -> Result<Vec<u8>> {
    let mut map = Map::new();
    // Transformers and accelerate refuse files without it.
    map.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    for t in tensors {
        let entry = json!({
            "dtype": t.spec.dtype.to_string(),
            "shape": t.spec.shape,
            "data_offsets": [t.offset, t.offset + t.bytes],
        });
        map.insert(t.spec.name.clone(), entry);
    }
    let mut bytes = vec![0; 8];
    bytes.extend_from_slice(Value::Object(map).to_string().as_bytes());
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), b' ');
    let length = bytes.len() - 8;
    if length > MAX_HEADER_BYTES {
        let name = tensors.first().map_or("", |t| t.spec.name.as_str());
        return Err(write_error(name, "the header of its file is too large; use smaller shards"));
    }
    bytes[..8].copy_from_slice(&(length as u64).to_le_bytes());
    Ok(bytes)
}
