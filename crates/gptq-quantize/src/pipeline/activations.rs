//! The calibration tokens on their way through the model: one chunk of windows at a time.

use std::ops::Range;
use std::sync::Arc;

use gptq_compute::{Gram, LayerKv};
use gptq_format::Checkpoint;
use gptq_model::{Block, BlockState, Ctx, Embedder, SeqSpan, Spec, Stage};

use super::Phases;
use crate::calibration::CalibrationSet;
use crate::error::Result;

/// Tokens of a chunk: enough rows for the products to run at full rate, few enough for the
/// temporaries of a chunk to stay small.
pub(crate) const CHUNK_TOKENS: usize = 4096;

/// Windows that are processed together.
struct Chunk {
    state: BlockState,
    /// Rows of each window.
    windows: Vec<Range<usize>>,
}

/// All calibration tokens between two stages.
pub(crate) struct Activations {
    chunks: Vec<Chunk>,
    /// Keys and values of the chunk at work, one per window.
    caches: Vec<LayerKv>,
}

impl Activations {
    /// Embeds the windows.
    pub(crate) fn embed(
        ctx: &mut Ctx,
        checkpoint: &Checkpoint,
        spec: &Arc<Spec>,
        set: &CalibrationSet,
    ) -> Result<Self> {
        let embedder = Embedder::load(checkpoint, spec)?;
        let per_chunk = (CHUNK_TOKENS / set.report.seqlen.max(1)).max(1);
        let mut chunks = Vec::new();
        for windows in set.windows.chunks(per_chunk) {
            let ids: Vec<u32> = windows.concat();
            let positions: Vec<u32> = windows.iter().flat_map(|w| 0..w.len() as u32).collect();
            let mut state = BlockState::default();
            embedder.forward(ctx, &ids, &positions, &mut state.hidden)?;
            let mut start = 0;
            let rows = windows.iter().map(|w| {
                start += w.len();
                start - w.len()..start
            });
            chunks.push(Chunk { state, windows: rows.collect() });
        }
        let cache = || LayerKv::new(spec.attention.kv_heads, spec.attention.head_dim);
        let caches = (0..per_chunk.min(set.windows.len())).map(|_| cache()).collect();
        Ok(Self { chunks, caches })
    }

    /// Computes the inputs of a block's first stage.
    pub(crate) fn begin(&mut self, ctx: &mut Ctx, block: &Block, phases: &mut Phases) {
        phases
            .time("inputs", || self.chunks.iter_mut().for_each(|c| block.begin(ctx, &mut c.state)));
    }

    /// XᵀX of the inputs of the stage that comes next.
    pub(crate) fn gram(&self, ctx: &Ctx, phases: &mut Phases) -> Gram {
        phases.time("hessian", || {
            let width = self.chunks.first().map_or(0, |c| c.state.input.cols());
            let mut gram = Gram::new(width);
            self.chunks.iter().for_each(|c| gram.accumulate(&ctx.pool, &c.state.input));
            gram
        })
    }

    /// Takes all tokens through `stage`.
    pub(crate) fn advance(
        &mut self,
        ctx: &mut Ctx,
        block: &Block,
        stage: Stage,
        phases: &mut Phases,
    ) -> Result<()> {
        let Self { chunks, caches } = self;
        phases.time("inputs", || {
            chunks.iter_mut().try_for_each(|chunk| {
                run(ctx, block, stage, &mut chunk.state, &chunk.windows, caches)
            })
        })
    }

    /// XᵀX of all four stages as the block's present linears compute them; the stream stays where
    /// it is.
    pub(crate) fn grams(
        &mut self,
        ctx: &mut Ctx,
        block: &Block,
        phases: &mut Phases,
    ) -> Result<Vec<Gram>> {
        let Self { chunks, caches } = self;
        let mut grams: Vec<Option<Gram>> = vec![None; Stage::ALL.len()];
        for chunk in chunks {
            let mut state = BlockState::new(chunk.state.hidden.clone());
            phases.time("inputs", || block.begin(ctx, &mut state));
            for (stage, gram) in Stage::ALL.into_iter().zip(&mut grams) {
                phases.time("hessian", || {
                    gram.get_or_insert_with(|| Gram::new(state.input.cols()))
                        .accumulate(&ctx.pool, &state.input);
                });
                phases.time("inputs", || {
                    run(ctx, block, stage, &mut state, &chunk.windows, caches)
                })?;
            }
        }
        Ok(grams.into_iter().flatten().collect())
    }
}

fn run(
    ctx: &mut Ctx,
    block: &Block,
    stage: Stage,
    state: &mut BlockState,
    windows: &[Range<usize>],
    caches: &mut [LayerKv],
) -> Result<()> {
    let spans = windows.iter().zip(caches).map(|(rows, kv)| {
        kv.clear();
        SeqSpan { rows: rows.clone(), kv }
    });
    Ok(block.run_stage(ctx, stage, state, &mut spans.collect::<Vec<_>>())?)
}
