//! Embedding, blocks and head together.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use gptq_compute::{LayerKv, Pool, Tensor};
use gptq_format::Checkpoint;

use crate::block::Block;
use crate::cache::Sequence;
use crate::embedder::Embedder;
use crate::head::HeadLayer;
use crate::load::LinearSource;
use crate::profile::Op;
use crate::spec::Spec;
use crate::state::{BlockState, Ctx, SeqSpan, recycle};
use crate::{ModelError, Result};

/// A model in memory: weights in their stored type, quantized linears as packed codes.
pub struct Model {
    pub(crate) spec: Arc<Spec>,
    pub(crate) embedder: Embedder,
    pub(crate) blocks: Vec<Block>,
    pub(crate) head: HeadLayer,
}

/// Buffers of forward calls, reused from call to call: after the first calls of a shape nothing is allocated.
pub struct Session {
    /// Threads, tables and kernel buffers.
    pub ctx: Ctx,
    pub(crate) state: BlockState,
    pub(crate) ids: Vec<u32>,
    pub(crate) types: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) rows: Vec<Range<usize>>,
    /// Keys and values of one block, one per sequence, while a batch is encoded.
    pub(crate) caches: Vec<LayerKv>,
    /// Memory for the spans of a batch.
    spans: Vec<SeqSpan<'static>>,
    picked: Tensor,
    pub(crate) normalized: Tensor,
    pub(crate) pooled: Tensor,
    logits: Tensor,
}

impl Session {
    /// A session on these threads.
    pub fn new(pool: Arc<Pool>) -> Self {
        Self {
            ctx: Ctx::new(pool),
            state: BlockState::default(),
            ids: Vec::new(),
            types: Vec::new(),
            positions: Vec::new(),
            rows: Vec::new(),
            caches: Vec::new(),
            spans: Vec::new(),
            picked: Tensor::default(),
            normalized: Tensor::default(),
            pooled: Tensor::default(),
            logits: Tensor::default(),
        }
    }

    /// The stream after the last block of the last forward call, before the final norm: `[rows, hidden]`, the sequences'
    /// rows one after the other.
    pub fn hidden(&self) -> &Tensor {
        &self.state.hidden
    }
}

/// Which rows of the last forward call get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// The last one of each sequence.
    Last,
    /// All.
    All,
}

/// How the projection to logits is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadBits {
    /// As the checkpoint has it.
    #[default]
    Stored,
    /// Floats are rounded to 8 bits with one scale per token of the vocabulary: half the bytes of f16, which are a fifth of
    /// what a model of a billion weights in 4 bits reads for a token. Packed codes stay as they are.
    Eight,
}

/// How [`Model::load_with`] loads.
#[derive(Default)]
pub struct LoadOptions<'a> {
    /// Threads that unpack and repack weights; without it the calling one.
    pub pool: Option<&'a Pool>,
    /// How the projection to logits is held.
    pub head: HeadBits,
    /// Is told the blocks that are loaded and their number, from any thread.
    pub progress: Option<&'a (dyn Fn(usize, usize) + Sync)>,
}

impl Model {
    /// Loads every weight of a checkpoint; floats stay in the mapped file where their type allows.
    ///
    /// # Errors
    /// A config that is not supported, or a tensor that is missing, unreadable or of another shape.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        Self::load_with(checkpoint, &LoadOptions::default())
    }

    /// As [`Model::load`], block by block in parallel. Memory holds what the kernels read, the parts of the mapped file that
    /// are used in place, and one unpacked linear per thread.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_with(checkpoint: &Checkpoint, options: &LoadOptions<'_>) -> Result<Self> {
        let spec = Arc::new(Spec::for_checkpoint(checkpoint)?);
        let embedder = Embedder::load(checkpoint, &spec, LinearSource::Mapped)?;
        let (layers, one) = (spec.layer_count(), Pool::new(1));
        let pool = options.pool.unwrap_or(&one);
        let slots: Vec<Mutex<Option<Result<Block>>>> =
            (0..layers).map(|_| Mutex::default()).collect();
        let done = AtomicUsize::new(0);
        pool.run(layers, &|layer| {
            let block = Block::load(checkpoint, &spec, layer, LinearSource::Mapped);
            *slots[layer].lock().unwrap_or_else(PoisonError::into_inner) = Some(block);
            if let Some(progress) = options.progress {
                progress(done.fetch_add(1, Ordering::Relaxed) + 1, layers);
            }
        });
        let blocks = slots.into_iter().filter_map(|slot| {
            // `run` has filled every slot.
            slot.into_inner().unwrap_or_else(PoisonError::into_inner)
        });
        Ok(Self {
            blocks: blocks.collect::<Result<_>>()?,
            head: HeadLayer::load_as(checkpoint, &spec, &embedder, options.head, pool)?,
            embedder,
            spec,
        })
    }

    /// The architecture.
    pub fn spec(&self) -> &Arc<Spec> {
        &self.spec
    }

    /// What happens before the blocks.
    pub fn embedder(&self) -> &Embedder {
        &self.embedder
    }

    /// The blocks in order.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// What happens after the blocks.
    pub fn head(&self) -> &HeadLayer {
        &self.head
    }

    /// Bytes of weights that decoding one token reads.
    pub fn weight_bytes(&self) -> usize {
        let blocks: usize = self.blocks.iter().map(Block::weight_bytes).sum();
        blocks + self.head.projection().map_or(0, |head| head.weight.bytes())
    }

    /// Multiplications with weights of the blocks that one token takes; the head comes on top where logits are wanted.
    pub fn products_per_token(&self) -> usize {
        self.blocks.iter().map(Block::products_per_token).sum()
    }

    /// Runs new tokens of several sequences through all blocks: `ids[i]` continues `batch[i]`. The result is
    /// [`Session::hidden`]; [`Model::logits`] goes on from there.
    ///
    /// # Errors
    /// An id outside the vocabulary, a position beyond a table of learned positions, an empty list of ids, a sequence made
    /// for a model with another number of blocks, or a model that reads in both directions. A failed call leaves the
    /// sequences as they were.
    pub fn forward(
        &self,
        session: &mut Session,
        batch: &mut [Sequence],
        ids: &[&[u32]],
    ) -> Result<()> {
        let result = self.try_forward(session, batch, ids);
        if result.is_err() {
            for (sequence, rows) in batch.iter_mut().zip(&session.rows) {
                sequence.truncate(session.positions[rows.start] as usize);
            }
            session.rows.clear();
        }
        result
    }

    fn try_forward(
        &self,
        session: &mut Session,
        batch: &mut [Sequence],
        ids: &[&[u32]],
    ) -> Result<()> {
        let Session { ctx, state, ids: flat, positions, rows, spans, .. } = session;
        if let Some(profile) = &mut ctx.profile {
            profile.start();
        }
        flat.clear();
        positions.clear();
        rows.clear();
        if !self.spec.attention.causal {
            return Err(ModelError::NotCausal { family: self.spec.family.to_owned() });
        }
        if self.head.projection().is_none() {
            return Err(ModelError::NoHead { family: self.spec.family.to_owned() });
        }
        let fits = |sequence: &Sequence| sequence.layers.len() == self.blocks.len();
        if batch.len() != ids.len()
            || ids.iter().any(|new| new.is_empty())
            || !batch.iter().all(fits)
        {
            let lengths: Vec<usize> = ids.iter().map(|new| new.len()).collect();
            let count = batch.len();
            return Err(ModelError::Batch(format!(
                "{count} sequences of this model with {lengths:?} new tokens"
            )));
        }
        for (sequence, new) in batch.iter().zip(ids) {
            let (first, start) = (flat.len(), sequence.len());
            flat.extend_from_slice(new);
            positions.extend((start..start + new.len()).map(|position| position as u32));
            rows.push(first..flat.len());
        }
        self.embedder.forward(ctx, flat, positions, &mut state.hidden)?;
        ctx.lap(Op::Embed, || 0);
        for (layer, block) in self.blocks.iter().enumerate() {
            let mut of_block = recycle(std::mem::take(spans));
            let caches = batch.iter_mut().map(|sequence| &mut sequence.layers[layer]);
            let rows = rows.iter().cloned();
            of_block.extend(rows.zip(caches).map(|(rows, kv)| SeqSpan { rows, kv }));
            let result = block.forward(ctx, state, &mut of_block);
            *spans = recycle(of_block);
            result?;
        }
        Ok(())
    }

    /// Logits `[rows, vocab]` of the last call of [`Model::forward`] or [`Model::encode`]; of no row if that failed, and
    /// `[rows, 0]` for a model that gives hidden states only.
    pub fn logits<'s>(&self, session: &'s mut Session, which: Rows) -> &'s Tensor {
        let Session { ctx, state, rows, picked, normalized, logits, .. } = session;
        if let Some(profile) = &mut ctx.profile {
            profile.start();
        }
        let all = !rows.is_empty() && (which == Rows::All || rows.len() == state.hidden.rows());
        if !all {
            picked.resize(rows.len(), state.hidden.cols());
            for (index, rows) in rows.iter().enumerate() {
                // Checked not to be empty by `forward`.
                picked.row_mut(index).copy_from_slice(state.hidden.row(rows.end - 1));
            }
        }
        self.head.normalize(ctx, if all { &state.hidden } else { picked }, normalized);
        ctx.lap(Op::FinalNorm, || 0);
        self.head.logits(ctx, normalized, logits);
        ctx.lap(Op::Head, || self.head.projection().map_or(0, |head| head.weight.bytes()));
        logits
    }
}
