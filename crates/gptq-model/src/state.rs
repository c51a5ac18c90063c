//! What flows through a block and what is reused from call to call.

use std::ops::Range;
use std::sync::Arc;

use gptq_compute::{LayerKv, Pool, Scratch, Tensor};

use crate::moe::MoeState;
use crate::rope::RopeTables;
use crate::{ModelError, Result};

/// What running a block needs besides weights and state: threads, tables and buffers that are reused from call to call.
pub struct Ctx {
    /// The threads.
    pub pool: Arc<Pool>,
    /// Buffers of the kernels.
    pub scratch: Scratch,
    pub(crate) spare: Tensor,
    pub(crate) rows: Vec<u32>,
    pub(crate) ropes: RopeTables,
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    pub(crate) wide: Tensor,
    pub(crate) gate: Tensor,
    pub(crate) out: Tensor,
    pub(crate) scores: Tensor,
    pub(crate) positions: Vec<u32>,
}

impl Ctx {
    /// Empty buffers; they grow to what is needed on first use.
    pub fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            scratch: Scratch::default(),
            spare: Tensor::default(),
            rows: Vec::new(),
            ropes: RopeTables::default(),
            q: Tensor::default(),
            k: Tensor::default(),
            v: Tensor::default(),
            wide: Tensor::default(),
            gate: Tensor::default(),
            out: Tensor::default(),
            scores: Tensor::default(),
            positions: Vec::new(),
        }
    }
}

/// The activations of some rows (the tokens of one or several sequences) on their way through a block.
#[derive(Default)]
pub struct BlockState {
    /// The residual stream `[rows, hidden]`: before [`crate::Block::begin`] the block's input, after the last stage its output.
    pub hidden: Tensor,
    /// Input of the next stage `[rows, in_features of the stage]`; of an expert's stages only the rows routed to it.
    pub input: Tensor,
    /// Input that both sublayers of a parallel block share, kept while the attention runs.
    pub(crate) shared: Tensor,
    /// Output of the attention of a parallel block, kept while the MLP runs.
    pub(crate) carry: Tensor,
    /// The MLP's input and output while its experts run.
    pub(crate) moe: MoeState,
}

impl BlockState {
    /// A state whose stream is `hidden` `[rows, hidden]`.
    pub fn new(hidden: Tensor) -> Self {
        Self { hidden, ..Self::default() }
    }

    /// Size of its buffers in bytes.
    pub fn bytes(&self) -> usize {
        [&self.hidden, &self.input, &self.shared, &self.carry]
            .iter()
            .map(|t| t.capacity_bytes())
            .sum::<usize>()
            + self.moe.bytes()
    }
}

/// The rows of one sequence in a [`BlockState`], and its keys and values in this block.
pub struct SeqSpan<'a> {
    /// Rows of the state; the spans of a call cover all rows in order.
    pub rows: Range<usize>,
    /// Keys and values of the tokens before these rows; the first row's position is its length.
    pub kv: &'a mut LayerKv,
}

impl SeqSpan<'_> {
    /// Positions of the rows; valid until they are appended to the cache.
    pub(crate) fn positions(&self) -> Range<usize> {
        self.kv.len()..self.kv.len() + self.rows.len()
    }
}

/// Checks that the spans cover all rows of a state, in order and none empty.
pub(crate) fn check_spans(seqs: &[SeqSpan<'_>], rows: usize) -> Result<()> {
    let mut next = 0;
    for seq in seqs {
        if seq.rows.start != next || seq.rows.is_empty() {
            break;
        }
        next = seq.rows.end;
    }
    let covered = seqs.last().is_some_and(|last| last.rows.end == next && next == rows);
    if covered {
        return Ok(());
    }
    let spans: Vec<Range<usize>> = seqs.iter().map(|seq| seq.rows.clone()).collect();
    Err(ModelError::Batch(format!(
        "the sequences' rows {spans:?} do not cover the {rows} rows of the state in order"
    )))
}
