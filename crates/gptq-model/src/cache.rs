//! The state of one sequence: keys and values of every block.

use gptq_compute::{KvMemory, KvType, LayerKv};

use crate::spec::Spec;

/// A sequence being processed; owns its key-value cache.
pub struct Sequence {
    pub(crate) layers: Vec<LayerKv>,
}

impl Sequence {
    /// An empty sequence for models of this architecture, with keys and values in 32-bit floats.
    pub fn new(spec: &Spec) -> Self {
        Self::with_cache(spec, KvType::F32)
    }

    /// An empty sequence that keeps keys and values as `kind`.
    pub fn with_cache(spec: &Spec, kind: KvType) -> Self {
        let (memory, attention) = (KvMemory::default(), &spec.attention);
        let layer = || LayerKv::sharing(&memory, attention.kv_heads, attention.head_dim, kind);
        Self { layers: (0..spec.layer_count()).map(|_| layer()).collect() }
    }

    /// Number of tokens that were processed; the next token's position.
    pub fn len(&self) -> usize {
        // All blocks have the same number between calls; while one fails, the last ones have what all have.
        self.layers.last().map_or(0, LayerKv::len)
    }

    /// Whether no token was processed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all but the first `len` tokens, keeping the memory.
    pub fn truncate(&mut self, len: usize) {
        for layer in &mut self.layers {
            layer.truncate(len.min(layer.len()));
        }
    }

    /// Forgets all tokens, keeping the memory.
    pub fn clear(&mut self) {
        self.layers.iter_mut().for_each(LayerKv::clear);
    }

    /// Size of the cache in bytes.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerKv::bytes).sum()
    }
}
