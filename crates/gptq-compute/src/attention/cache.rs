//! Keys and values of one layer and one sequence.

use std::ops::Range;

use crate::arch::LANES;
use crate::tensor::Tensor;

/// Positions of one block.
pub(super) const BLOCK: usize = 64;

/// The cache grows by blocks of 64 positions. A block holds, for each kv head, the keys transposed
/// `[head_dim, 64]` (so that scores of 64 positions are one product without horizontal sums) and
/// the values `[64, head_dim rounded up to 16]`.
#[derive(Debug, Clone)]
pub struct LayerKv {
    blocks: Vec<Box<[f32]>>,
    kv_heads: usize,
    head_dim: usize,
    len: usize,
}

impl LayerKv {
    /// An empty cache.
    pub fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self { blocks: Vec::new(), kv_heads, head_dim, len: 0 }
    }

    /// Positions stored.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is stored.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Columns of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Forgets all positions and keeps the memory.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Forgets the positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Allocates blocks for `positions` in all, so that appending up to there does not.
    pub fn reserve(&mut self, positions: usize) {
        while self.blocks.len() * BLOCK < positions {
            self.blocks.push(vec![0.0; self.kv_heads * self.head_size()].into());
        }
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.blocks.len() * self.kv_heads * self.head_size() * size_of::<f32>()
    }

    /// Appends rows `rows` of `k` and `v`, both `[_, kv_heads * head_dim]`.
    ///
    /// # Panics
    /// If the widths do not fit.
    #[track_caller]
    pub fn append(&mut self, k: &Tensor, v: &Tensor, rows: Range<usize>) {
        let (d, width) = (self.head_dim, self.kv_heads * self.head_dim);
        assert_eq!((k.cols(), v.cols()), (width, width), "key and value width");
        self.reserve(self.len + rows.len());
        let (size, padded) = (self.head_size(), self.padded_dim());
        for row in rows {
            let (block, at) = (self.len / BLOCK, self.len % BLOCK);
            let heads = self.blocks[block].chunks_exact_mut(size);
            let keys = k.row(row).chunks_exact(d).zip(v.row(row).chunks_exact(d));
            for (head, (key, value)) in heads.zip(keys) {
                let (kt, vs) = head.split_at_mut(d * BLOCK);
                for (cell, x) in kt[at..].iter_mut().step_by(BLOCK).zip(key) {
                    *cell = *x;
                }
                vs[at * padded..at * padded + d].copy_from_slice(value);
            }
            self.len += 1;
        }
    }

    /// head_dim rounded up to whole vectors.
    pub(super) fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    fn head_size(&self) -> usize {
        BLOCK * (self.head_dim + self.padded_dim())
    }

    /// Keys `[head_dim, 64]` and values `[64, padded_dim]` of one block and head.
    pub(super) fn block(&self, block: usize, head: usize) -> (&[f32], &[f32]) {
        let size = self.head_size();
        self.blocks[block][head * size..(head + 1) * size].split_at(self.head_dim * BLOCK)
    }
}
