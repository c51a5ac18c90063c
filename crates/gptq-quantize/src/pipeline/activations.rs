//! The calibration tokens on their way through the model: one chunk of windows at a time.

use std::ops::Range;
use std::sync::Arc;

use gptq_compute::{Gram, LayerKv, Tensor};
use gptq_format::Checkpoint;
use gptq_model::{Block, BlockState, Ctx, Embedder, LinearSource, SeqSpan, Spec, Stage};

use super::{MoeFallback, Phases};
use crate::calibration::CalibrationSet;
use crate::error::Result;
use crate::report::ExpertRecord;

/// Tokens of a chunk: enough rows for the products to run at full rate, few enough for the
/// temporaries of a chunk to stay small.
pub(crate) const CHUNK_TOKENS: usize = 2048;

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
        let embedder = Embedder::load(checkpoint, spec, LinearSource::Mapped)?;
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

    /// The inputs of `stage`, which comes next.
    pub(crate) fn inputs(
        &self,
        ctx: &mut Ctx,
        block: &Block,
        stage: Stage,
        fallback: MoeFallback,
        phases: &mut Phases,
    ) -> Result<StageInputs> {
        let mut sum = Sum::default();
        for chunk in &self.chunks {
            phases.time("hessian", || sum.add(ctx, &chunk.state.input));
        }
        if sum.unrouted(stage, fallback) {
            let mut all = Sum::default();
            for chunk in &self.chunks {
                all.add_unrouted(ctx, block, stage, &chunk.state, phases)?;
            }
            sum.gram = all.gram;
        }
        Ok(sum.finish(stage, fallback))
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

    /// Whether every element of the stream is a number.
    pub(crate) fn is_finite(&self) -> bool {
        let mut streams = self.chunks.iter().map(|chunk| chunk.state.hidden.as_slice());
        streams.all(|stream| stream.iter().all(|x| x.is_finite()))
    }

    /// The inputs of all stages as the block's present linears compute them; the stream stays where
    /// it is.
    pub(crate) fn all_inputs(
        &mut self,
        ctx: &mut Ctx,
        block: &Block,
        fallback: MoeFallback,
        phases: &mut Phases,
    ) -> Result<Vec<StageInputs>> {
        let mut sums: Vec<Sum> = block.stages().iter().map(|_| Sum::default()).collect();
        self.walk(ctx, block, phases, |ctx, index, state, phases| {
            phases.time("hessian", || sums[index].add(ctx, &state.input));
            Ok(())
        })?;
        let stages = block.stages();
        let starved: Vec<bool> =
            stages.iter().zip(&sums).map(|(&stage, sum)| sum.unrouted(stage, fallback)).collect();
        if starved.contains(&true) {
            let mut all: Vec<Sum> = stages.iter().map(|_| Sum::default()).collect();
            self.walk(ctx, block, phases, |ctx, index, state, phases| {
                if starved[index] {
                    all[index].add_unrouted(ctx, block, stages[index], state, phases)?;
                }
                Ok(())
            })?;
            for ((sum, all), _) in sums.iter_mut().zip(all).zip(&starved).filter(|(_, on)| **on) {
                sum.gram = all.gram;
            }
        }
        let inputs = stages.iter().zip(sums).map(|(&stage, sum)| sum.finish(stage, fallback));
        Ok(inputs.collect())
    }

    /// Takes copies of all chunks through the block, and shows the state before each stage.
    fn walk(
        &mut self,
        ctx: &mut Ctx,
        block: &Block,
        phases: &mut Phases,
        mut visit: impl FnMut(&mut Ctx, usize, &BlockState, &mut Phases) -> Result<()>,
    ) -> Result<()> {
        let Self { chunks, caches } = self;
        for chunk in chunks {
            let mut state = BlockState::new(chunk.state.hidden.clone());
            phases.time("inputs", || block.begin(ctx, &mut state));
            for (index, &stage) in block.stages().iter().enumerate() {
                visit(ctx, index, &state, phases)?;
                phases.time("inputs", || {
                    run(ctx, block, stage, &mut state, &chunk.windows, caches)
                })?;
            }
        }
        Ok(())
    }
}

/// What the linears of a stage are solved against.
pub(crate) struct StageInputs {
    /// XᵀX of the stage's inputs; `None`: they are rounded to nearest.
    pub(crate) gram: Option<Gram>,
    /// What the report says of an expert.
    pub(crate) expert: Option<ExpertRecord>,
}

/// XᵀX of a stage's inputs as it grows.
#[derive(Default)]
struct Sum {
    gram: Option<Gram>,
    /// Tokens that went to the stage, and its inputs.
    tokens: usize,
    width: usize,
}

impl Sum {
    fn add(&mut self, ctx: &Ctx, input: &Tensor) {
        self.gram.get_or_insert_with(|| Gram::new(input.cols())).accumulate(&ctx.pool, input);
        self.tokens += input.rows();
        self.width = input.cols();
    }

    /// Adds what an expert would see if every token were routed to it.
    fn add_unrouted(
        &mut self,
        ctx: &mut Ctx,
        block: &Block,
        stage: Stage,
        state: &BlockState,
        phases: &mut Phases,
    ) -> Result<()> {
        let mut input = Tensor::default();
        phases.time("inputs", || block.unrouted_input(ctx, stage, state, &mut input))?;
        phases.time("hessian", || self.add(ctx, &input));
        Ok(())
    }

    fn starved(&self, stage: Stage) -> bool {
        stage.expert().is_some() && MoeFallback::applies(self.tokens, self.width)
    }

    /// Whether the stage has to be calibrated on all tokens.
    fn unrouted(&self, stage: Stage, fallback: MoeFallback) -> bool {
        fallback == MoeFallback::AllTokens && self.starved(stage)
    }

    fn finish(self, stage: Stage, fallback: MoeFallback) -> StageInputs {
        let starved = self.starved(stage);
        let expert = stage.expert().map(|_| ExpertRecord {
            tokens: self.tokens as u64,
            fallback: starved.then(|| fallback.name().to_owned()),
        });
        let rounded = starved && fallback == MoeFallback::Rtn;
        StageInputs { gram: self.gram.filter(|_| !rounded), expert }
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
