//! Embedding, blocks and head together.

use std::ops::Range;
use std::sync::Arc;

use gptq_compute::{
    DenseMatrix, Linear, Matrix, Norm, Pool, Tensor, add_scaled, embed, linear, norm, scale,
    soft_cap,
};
use gptq_format::Checkpoint;

use crate::block::Block;
use crate::cache::Sequence;
use crate::load::{LinearSource, Loader};
use crate::spec::{Positions, Spec};
use crate::stages::LinearSpec;
use crate::state::{BlockState, Ctx, SeqSpan};
use crate::{ModelError, Result};

/// Token and position embedding and what else happens before the first block.
pub struct Embedder {
    spec: Arc<Spec>,
    tokens: DenseMatrix,
    positions: Option<DenseMatrix>,
    norm: Option<Norm>,
    project_in: Option<Linear>,
}

impl Embedder {
    /// Loads the embedding; where its type allows it stays in the mapped file.
    ///
    /// # Errors
    /// A tensor that is missing, unreadable or of another shape than the spec asks for.
    pub fn load(checkpoint: &Checkpoint, spec: &Arc<Spec>) -> Result<Self> {
        let loader = Loader { checkpoint, spec };
        let Spec { base, embedding, hidden, .. } = &**spec;
        let weight = |name: &str| format!("{base}{name}.weight");
        let positions = match spec.positions {
            Positions::Learned { name, offset } => {
                let rows = spec.max_positions + offset;
                Some(loader.matrix(&weight(name), rows, *hidden, LinearSource::Mapped)?)
            }
            Positions::Rotary(_) | Positions::Alibi { .. } => None,
        };
        let norm = embedding
            .norm
            .map(|name| loader.norm(&format!("{base}{name}"), embedding.width, spec.norm));
        let project_in = embedding.project_in.map(|name| {
            let matrix =
                loader.matrix(&weight(name), *hidden, embedding.width, LinearSource::Mapped)?;
            Ok::<_, ModelError>(Linear { weight: Matrix::Dense(matrix), bias: None })
        });
        Ok(Self {
            tokens: loader.matrix(
                &weight(embedding.name),
                spec.vocab,
                embedding.width,
                LinearSource::Mapped,
            )?,
            positions,
            norm: norm.transpose()?,
            project_in: project_in.transpose()?,
            spec: Arc::clone(spec),
        })
    }

    /// The residual stream before the first block: `ids` and `positions` `[rows]` to `out` `[rows, hidden]`.
    ///
    /// # Errors
    /// An id outside the vocabulary, or a position beyond a table of learned positions.
    pub fn forward(
        &self,
        ctx: &mut Ctx,
        ids: &[u32],
        positions: &[u32],
        out: &mut Tensor,
    ) -> Result<()> {
        let vocab = self.spec.vocab;
        if let Some((index, &id)) = ids.iter().enumerate().find(|&(_, &id)| id as usize >= vocab) {
            return Err(ModelError::Token { id, index, vocab });
        }
        if ids.len() != positions.len() {
            return Err(ModelError::Batch(format!(
                "{} ids with {} positions",
                ids.len(),
                positions.len()
            )));
        }
        let pool = Arc::clone(&ctx.pool);
        embed(&self.tokens, ids, out);
        if self.spec.embedding.scale != 1.0 {
            scale(&pool, out, self.spec.embedding.scale);
        }
        if let Some(embedding_norm) = &self.norm {
            norm(&pool, out, embedding_norm, &mut ctx.spare);
            std::mem::swap(out, &mut ctx.spare);
        }
        if let Some(project_in) = &self.project_in {
            linear(&pool, out, &mut [(project_in, &mut ctx.spare)], &mut ctx.scratch);
            std::mem::swap(out, &mut ctx.spare);
        }
        if let (Some(table), Positions::Learned { offset, .. }) =
            (&self.positions, &self.spec.positions)
        {
            let end = positions.iter().max().map_or(0, |&last| last as usize + 1);
            self.spec.check_positions(end)?;
            ctx.rows.clear();
            ctx.rows.extend(positions.iter().map(|position| position + *offset as u32));
            embed(table, &ctx.rows, &mut ctx.spare);
            add_scaled(&pool, out, &ctx.spare, 1.0);
        }
        Ok(())
    }
}

/// What happens after the last block: the final norm and the projection to logits.
pub struct HeadLayer {
    spec: Arc<Spec>,
    norm: Option<Norm>,
    project_out: Option<Linear>,
    projection: Linear,
}

impl HeadLayer {
    /// Loads the head. With `tied` to the embedding it shares its memory; a quantized head in the checkpoint is used as it
    /// is.
    ///
    /// # Errors
    /// A tensor that is missing, unreadable or of another shape than the spec asks for.
    pub fn load(checkpoint: &Checkpoint, spec: &Arc<Spec>, embedder: &Embedder) -> Result<Self> {
        let loader = Loader { checkpoint, spec };
        let Spec { base, embedding, hidden, vocab, head, .. } = &**spec;
        let module = LinearSpec {
            name: head.name,
            module: head.name.to_owned(),
            out_features: *vocab,
            in_features: embedding.width,
            bias: head.bias,
            transposed: false,
        };
        let quantized = checkpoint.tensors.contains(&format!("{}.qweight", head.name));
        let projection = if head.tied && !quantized {
            let bias = loader.bias(head.name, *vocab, head.bias)?;
            Linear { weight: Matrix::Dense(embedder.tokens.clone()), bias }
        } else {
            loader.linear(&module, LinearSource::Mapped)?
        };
        let project_out = head.project_out.map(|name| {
            let name = format!("{base}{name}.weight");
            let matrix = loader.matrix(&name, embedding.width, *hidden, LinearSource::Mapped)?;
            Ok::<_, ModelError>(Linear { weight: Matrix::Dense(matrix), bias: None })
        });
        Ok(Self {
            norm: head
                .norm
                .map(|name| loader.norm(&format!("{base}{name}"), *hidden, spec.norm))
                .transpose()?,
            project_out: project_out.transpose()?,
            projection,
            spec: Arc::clone(spec),
        })
    }

    /// The final norm (and, where the family has it, the projection to the embedding's width): `[rows, hidden]` to
    /// `[rows, in_features of the head]`.
    pub fn normalize(&self, ctx: &mut Ctx, hidden: &Tensor, out: &mut Tensor) {
        match &self.norm {
            Some(final_norm) => norm(&ctx.pool, hidden, final_norm, out),
            None => crate::block::copy(&ctx.pool, hidden, out),
        }
        if let Some(project_out) = &self.project_out {
            linear(&ctx.pool, out, &mut [(project_out, &mut ctx.spare)], &mut ctx.scratch);
            std::mem::swap(out, &mut ctx.spare);
        }
    }

    /// Logits `[rows, vocab]` of normalised rows.
    pub fn logits(&self, ctx: &mut Ctx, normalized: &Tensor, out: &mut Tensor) {
        linear(&ctx.pool, normalized, &mut [(&self.projection, &mut *out)], &mut ctx.scratch);
        if self.spec.head.scale != 1.0 {
            scale(&ctx.pool, out, self.spec.head.scale);
        }
        if let Some(cap) = self.spec.head.soft_cap {
            soft_cap(&ctx.pool, out, cap);
        }
    }

    /// The projection to logits.
    pub fn projection(&self) -> &Linear {
        &self.projection
    }

    /// Replaces the projection to logits.
    ///
    /// # Errors
    /// If its shape is another.
    pub fn set_projection(&mut self, projection: Linear) -> Result<()> {
        let shape = |l: &Linear| (l.weight.out_features(), l.weight.in_features());
        let (expected, got) = (shape(&self.projection), shape(&projection));
        if expected != got {
            let (layer, linear) = (self.spec.layer_count(), self.spec.head.name.to_owned());
            return Err(ModelError::LinearShape { layer, linear, expected, got });
        }
        self.projection = projection;
        Ok(())
    }
}

/// A model in memory: weights in their stored type, quantized linears as packed codes.
pub struct Model {
    spec: Arc<Spec>,
    embedder: Embedder,
    blocks: Vec<Block>,
    head: HeadLayer,
}

/// Buffers of forward calls, reused from call to call: after the first calls of a shape nothing is allocated.
pub struct Session {
    /// Threads, tables and kernel buffers.
    pub ctx: Ctx,
    state: BlockState,
    ids: Vec<u32>,
    positions: Vec<u32>,
    rows: Vec<Range<usize>>,
    picked: Tensor,
    normalized: Tensor,
    logits: Tensor,
}

impl Session {
    /// A session on these threads.
    pub fn new(pool: Arc<Pool>) -> Self {
        Self {
            ctx: Ctx::new(pool),
            state: BlockState::default(),
            ids: Vec::new(),
            positions: Vec::new(),
            rows: Vec::new(),
            picked: Tensor::default(),
            normalized: Tensor::default(),
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

impl Model {
    /// Loads every weight of a checkpoint; floats stay in the mapped file where their type allows.
    ///
    /// # Errors
    /// A config that is not supported, or a tensor that is missing, unreadable or of another shape.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let spec = Arc::new(Spec::for_checkpoint(checkpoint)?);
        let embedder = Embedder::load(checkpoint, &spec)?;
        let blocks = (0..spec.layer_count())
            .map(|layer| Block::load(checkpoint, &spec, layer, LinearSource::Mapped));
        Ok(Self {
            blocks: blocks.collect::<Result<_>>()?,
            head: HeadLayer::load(checkpoint, &spec, &embedder)?,
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
        blocks + self.head.projection.weight.bytes()
    }

    /// Runs new tokens of several sequences through all blocks: `ids[i]` continues `batch[i]`. The result is
    /// [`Session::hidden`]; [`Model::logits`] goes on from there.
    ///
    /// # Errors
    /// An id outside the vocabulary, a position beyond a table of learned positions, an empty list of ids, or a sequence
    /// made for a model with another number of blocks. A failed call leaves the sequences as they were.
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
        let Session { ctx, state, ids: flat, positions, rows, .. } = session;
        flat.clear();
        positions.clear();
        rows.clear();
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
        for (layer, block) in self.blocks.iter().enumerate() {
            // One sequence, the case of decoding, allocates nothing.
            if let [sequence] = batch {
                let span = SeqSpan { rows: rows[0].clone(), kv: &mut sequence.layers[layer] };
                block.forward(ctx, state, &mut [span])?;
            } else {
                let caches = batch.iter_mut().map(|sequence| &mut sequence.layers[layer]);
                let spans =
                    rows.iter().zip(caches).map(|(rows, kv)| SeqSpan { rows: rows.clone(), kv });
                block.forward(ctx, state, &mut spans.collect::<Vec<_>>())?;
            }
        }
        Ok(())
    }

    /// Logits `[rows, vocab]` of the last forward call; of no row if that failed.
    pub fn logits<'s>(&self, session: &'s mut Session, which: Rows) -> &'s Tensor {
        let Session { ctx, state, rows, picked, normalized, logits, .. } = session;
        let all = !rows.is_empty() && (which == Rows::All || rows.len() == state.hidden.rows());
        if !all {
            picked.resize(rows.len(), state.hidden.cols());
            for (index, rows) in rows.iter().enumerate() {
                // Checked not to be empty by `forward`.
                picked.row_mut(index).copy_from_slice(state.hidden.row(rows.end - 1));
            }
        }
        self.head.normalize(ctx, if all { &state.hidden } else { picked }, normalized);
        self.head.logits(ctx, normalized, logits);
        logits
    }
}
