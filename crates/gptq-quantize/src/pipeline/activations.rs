//! The calibration tokens on their way through the model: one chunk of windows at a time.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use gptq_compute::{KvMemory, KvType, LayerKv, Tensor};
use gptq_format::Checkpoint;
use gptq_model::{
    ActivationType, Block, BlockState, Ctx, Embedder, HeadLayer, LinearSource, SeqSpan, Spec, Stage,
};

use super::float_stream::Use;
use super::held_out::is_held_out;
use super::inputs::{StageInputs, Sum, rounds};
use super::native::{Inputs, Native};
use super::scratch::Scratch;
use super::states::{States, pack, unpack};
use super::{Job, MoeFallback, Phases};
use crate::calibration::CalibrationSet;
use crate::error::Result;
use crate::token_weights::{RowWeights, TokenWeights};

/// Tokens of a chunk: enough rows for the products to run at full rate, few enough for the
/// temporaries of a chunk to stay small. The same wherever the chunks are kept, because sums and the
/// rows of experts are rounded by chunk.
pub(crate) const CHUNK_TOKENS: usize = 2048;

/// Windows of a chunk.
pub(crate) fn windows_per_chunk(seqlen: usize) -> usize {
    (CHUNK_TOKENS / seqlen.max(1)).max(1)
}

/// How many of `chunks` chunks of `chunk_tokens` tokens hold about `tokens` tokens.
pub(super) fn chunks_of(tokens: usize, chunk_tokens: usize, chunks: usize) -> usize {
    chunks.min(tokens.div_ceil(chunk_tokens.max(1)))
}

/// The stream before a block, for some windows.
pub(super) struct Chunk {
    /// `[rows, hidden]`.
    pub(super) input: Tensor,
    /// Rows of each window.
    pub(super) windows: Vec<Range<usize>>,
}

/// All calibration tokens between two stages.
pub(crate) struct Activations<'a> {
    /// Rows of each window of each chunk.
    pub(super) chunks: Vec<Vec<Range<usize>>>,
    pub(super) states: States,
    pub(super) spec: Arc<Spec>,
    weights: TokenWeights,
    kind: ActivationType,
    /// Whether some windows are kept apart, to judge what is fitted on the others.
    hold_out: bool,
    /// The stream as it was before the block at work, where it will be needed again.
    start: Option<States>,
    /// The same tokens in the float model, where a correction needs them; moves with them.
    native: Option<Box<Native<'a>>>,
}

impl<'a> Activations<'a> {
    /// Embeds the windows. With `spill` they are kept in a scratch file in that directory.
    pub(crate) fn embed(
        ctx: &mut Ctx,
        checkpoint: &Checkpoint,
        spec: &Arc<Spec>,
        set: &CalibrationSet,
        (weights, kind): (TokenWeights, ActivationType),
        spill: Option<&Path>,
    ) -> Result<Self> {
        // Copied: mapped, the rows that are looked up would stay resident for the whole run.
        let embedder = Embedder::load(checkpoint, spec, LinearSource::Copied)?;
        let per_chunk = windows_per_chunk(set.report.seqlen);
        let mut states = match spill {
            None if kind == ActivationType::F32 => States::Memory(Vec::new()),
            None => States::Packed(Vec::new(), kind),
            Some(directory) => {
                let rows = set.windows.chunks(per_chunk).map(|w| w.iter().map(Vec::len).sum());
                let slot = BlockState::saved_bytes(spec, rows.max().unwrap_or(0), kind);
                States::Disk(Scratch::create(directory, slot, kind)?)
            }
        };
        let mut chunks: Vec<Vec<Range<usize>>> = Vec::new();
        for windows in set.windows.chunks(per_chunk) {
            let ids: Vec<u32> = windows.concat();
            let positions: Vec<u32> = windows.iter().flat_map(|w| 0..w.len() as u32).collect();
            let mut state = BlockState::default();
            embedder.forward(ctx, &ids, &positions, &mut state.hidden)?;
            states.push(chunks.len(), state)?;
            let mut start = 0;
            let rows = windows.iter().map(|w| {
                start += w.len();
                start - w.len()..start
            });
            chunks.push(rows.collect());
        }
        Ok(Self {
            chunks,
            states,
            spec: Arc::clone(spec),
            weights,
            kind,
            hold_out: false,
            start: None,
            native: None,
        })
    }

    /// Sums up the inputs of some windows apart from the others.
    pub(crate) fn with_held_out(mut self, hold_out: bool) -> Self {
        self.hold_out = hold_out;
        self
    }

    /// Keeps the stream as it is before each block ([`Activations::keep_start`]); what is on disk in another file, in
    /// `directory`.
    pub(crate) fn with_start(mut self, directory: &Path) -> Result<Self> {
        self.start = Some(self.states.empty(directory)?);
        Ok(self)
    }

    /// Copies the stream, which is before a block, if it is to be kept.
    pub(super) fn keep_start(&mut self, ctx: &mut Ctx, phases: &mut Phases) -> Result<()> {
        let Some(mut start) = self.start.take() else { return Ok(()) };
        start.clear();
        let mut index = 0;
        self.pass(ctx, phases, false, |_, state, _, phases| {
            index += 1;
            phases.time(start.phase(), || {
                start.push(index - 1, BlockState::new(state.hidden.clone()))
            })
        })?;
        self.start = Some(start);
        Ok(())
    }

    /// Takes the stream back to before the block and through it once more, because its linears have changed. The
    /// stream of the float model stays where it is.
    pub(super) fn run_again(
        &mut self,
        ctx: &mut Ctx,
        block: &Block,
        phases: &mut Phases,
    ) -> Result<()> {
        if let Some(start) = &mut self.start {
            std::mem::swap(&mut self.states, start);
            start.clear();
        }
        let native = self.native.take();
        self.begin(ctx, block, phases)?;
        for &stage in block.stages() {
            self.advance(ctx, block, stage, phases)?;
        }
        self.native = native;
        Ok(())
    }

    /// Chunks of about so many tokens in all, evenly spaced, as they are before the block at work.
    pub(super) fn some_chunks(&self, tokens: usize, phases: &mut Phases) -> Result<Vec<Chunk>> {
        let chunk_tokens =
            self.chunks.first().map_or(0, |windows| windows.iter().map(Range::len).sum());
        let count = chunks_of(tokens, chunk_tokens, self.chunks.len());
        let states = self.start.as_ref().unwrap_or(&self.states);
        let mut buffer = BlockState::default();
        let chosen = (0..count).map(|i| i * self.chunks.len() / count);
        chosen
            .map(|index| {
                let input = states.get(index, &mut buffer, phases)?.hidden.clone();
                Ok(Chunk { input, windows: self.chunks[index].clone() })
            })
            .collect()
    }

    /// Lets the tokens of the float model go beside them.
    pub(crate) fn with_native(
        mut self,
        ctx: &mut Ctx,
        job: &Job<'a>,
        set: &CalibrationSet,
        spill: Option<&Path>,
    ) -> Result<Self> {
        let spec = Arc::clone(&self.spec);
        let tokens = self.chunks.iter().flatten().map(Range::len).sum();
        let shared = job.float_stream;
        let used = shared.map(|shared| shared.use_of(job, &spec, self.chunks.len(), tokens));
        let inputs = match shared.zip(used) {
            Some((kept, Use::Read)) => Inputs::Kept(kept),
            other => {
                let weights = (self.weights, self.kind);
                Inputs::Computed {
                    stream: Self::embed(ctx, job.checkpoint, &spec, set, weights, spill)?,
                    block: None,
                    keep: other.filter(|(_, used)| *used == Use::Write).map(|(keep, _)| keep),
                }
            }
        };
        self.native = Some(Box::new(Native::new(spec, job.checkpoint, inputs)));
        Ok(self)
    }

    /// Shows the state of each chunk with its windows. What `visit` changes is kept only with `keep`;
    /// without it nothing may be changed.
    pub(super) fn pass(
        &mut self,
        ctx: &mut Ctx,
        phases: &mut Phases,
        keep: bool,
        mut visit: impl FnMut(&mut Ctx, &mut BlockState, &[Range<usize>], &mut Phases) -> Result<()>,
    ) -> Result<()> {
        let Self { chunks, states, .. } = self;
        let mut state = BlockState::default();
        match states {
            States::Memory(all) => {
                let mut all = all.iter_mut().zip(chunks);
                all.try_for_each(|(state, windows)| visit(ctx, state, windows, phases))
            }
            States::Packed(all, kind) => {
                for (packed, windows) in all.iter_mut().zip(chunks) {
                    phases.time("packing", || unpack(packed, *kind, &mut state))?;
                    visit(ctx, &mut state, windows, phases)?;
                    if keep {
                        phases.time("packing", || pack(&state, *kind, packed))?;
                    }
                }
                Ok(())
            }
            States::Disk(scratch) => {
                for (index, windows) in chunks.iter().enumerate() {
                    phases.time("scratch", || scratch.load(index, &mut state))?;
                    visit(ctx, &mut state, windows, phases)?;
                    if keep {
                        phases.time("scratch", || scratch.store(index, &state))?;
                    }
                }
                self.make_room(ctx);
                Ok(())
            }
        }
    }

    /// Between two passes over spilled activations, buffers make room for the factor.
    pub(super) fn make_room(&self, ctx: &mut Ctx) {
        if matches!(self.states, States::Disk(_)) {
            let activations = ctx.scratch.activations();
            *ctx = Ctx::new(Arc::clone(&ctx.pool));
            ctx.scratch.set_activations(activations);
        }
    }

    /// An empty sum over the inputs of `stage`.
    fn sum(&self, stage: Stage) -> Sum {
        Sum::new(self.row_weights(stage))
    }

    /// Which windows of each chunk are held out; empty where none are.
    fn held_out(&self) -> Vec<Vec<bool>> {
        if !self.hold_out {
            return Vec::new();
        }
        let windows = self.chunks.iter().map(Vec::len).sum();
        let mut next = 0..;
        let flags = |chunk: &Vec<Range<usize>>| {
            let windows = next.by_ref().take(chunk.len()).map(|i| is_held_out(i, windows));
            windows.collect()
        };
        self.chunks.iter().map(flags).collect()
    }

    /// How the tokens of `stage` are weighted.
    pub(super) fn row_weights(&self, stage: Stage) -> RowWeights {
        self.weights.rows(stage, self.spec.attention.causal)
    }

    /// Keys and values of a chunk's windows, as exact as the linears of the forward pass are.
    pub(super) fn caches(&self, ctx: &Ctx) -> Vec<LayerKv> {
        let attention = &self.spec.attention;
        let most = self.chunks.iter().map(Vec::len).max().unwrap_or(0);
        let kind = if rounds(ctx) { KvType::rounding() } else { KvType::F32 };
        let memory = KvMemory::default();
        let cache = |_| LayerKv::sharing(&memory, attention.kv_heads, attention.head_dim, kind);
        (0..most).map(cache).collect()
    }

    /// Computes the inputs of a block's first stage.
    pub(crate) fn begin(
        &mut self,
        ctx: &mut Ctx,
        block: &Block,
        phases: &mut Phases,
    ) -> Result<()> {
        self.pass(ctx, phases, true, |ctx, state, _, phases| {
            phases.time("inputs", || block.begin(ctx, state));
            Ok(())
        })?;
        self.native.as_mut().map_or(Ok(()), |native| native.begin(ctx, block.layer(), phases))
    }

    /// The inputs of `stage`, which comes next.
    pub(crate) fn inputs(
        &mut self,
        ctx: &mut Ctx,
        block: &Block,
        stage: Stage,
        fallback: MoeFallback,
        phases: &mut Phases,
    ) -> Result<StageInputs> {
        let mut sum = self.sum(stage);
        let held = self.held_out();
        let mut held = held.iter();
        self.pass(ctx, phases, false, |ctx, state, windows, phases| {
            let held = held.next();
            phases.time("hessian", || sum.add_chunk(ctx, stage, state, windows, held));
            Ok(())
        })?;
        if sum.unrouted(stage, fallback) {
            (sum.gram, sum.held) = (None, None);
            let mut all = self.sum(stage);
            self.pass(ctx, phases, false, |ctx, state, _, phases| {
                all.add_unrouted(ctx, block, stage, state, phases)
            })?;
            sum.gram = all.gram;
        }
        let mut inputs = sum.finish(stage, fallback);
        inputs.distances = phases.time("hessian", || self.distances(ctx, block, stage));
        if inputs.can_be_corrected()
            && let Some(mut native) = self.native.take()
        {
            let cross = native.cross(ctx, self, stage, phases);
            self.native = Some(native);
            inputs.cross = cross?;
        }
        Ok(inputs)
    }

    /// Takes all tokens through `stage`.
    pub(crate) fn advance(
        &mut self,
        ctx: &mut Ctx,
        block: &Block,
        stage: Stage,
        phases: &mut Phases,
    ) -> Result<()> {
        let mut caches = self.caches(ctx);
        self.pass(ctx, phases, true, |ctx, state, windows, phases| {
            phases.time("inputs", || run(ctx, block, stage, state, windows, &mut caches))
        })?;
        self.native.as_mut().map_or(Ok(()), |native| native.advance(ctx, stage, phases))
    }

    /// Whether every element of the stream is a number.
    pub(crate) fn is_finite(&mut self, ctx: &mut Ctx, phases: &mut Phases) -> Result<bool> {
        let mut finite = true;
        self.pass(ctx, phases, false, |_, state, _, _| {
            finite &= state.hidden.as_slice().iter().all(|x| x.is_finite());
            Ok(())
        })?;
        Ok(finite)
    }

    /// The inputs of all stages as the block's present linears compute them, empty for those that are not `wanted`; the
    /// stream stays where it is.
    pub(crate) fn all_inputs(
        &mut self,
        ctx: &mut Ctx,
        block: &Block,
        wanted: impl Fn(Stage) -> bool,
        fallback: MoeFallback,
        phases: &mut Phases,
    ) -> Result<Vec<StageInputs>> {
        let mut sums: Vec<Sum> = block.stages().iter().map(|&stage| self.sum(stage)).collect();
        let stages = block.stages();
        let wanted: Vec<bool> = stages.iter().map(|&stage| wanted(stage)).collect();
        let held = self.held_out();
        let mut chunk = 0;
        self.walk(ctx, block, phases, |ctx, index, state, windows, phases| {
            let (stage, held) = (stages[index], held.get(chunk));
            if wanted[index] {
                phases.time("hessian", || sums[index].add_chunk(ctx, stage, state, windows, held));
            }
            chunk += usize::from(index + 1 == stages.len());
            Ok(())
        })?;
        let starved: Vec<bool> = stages
            .iter()
            .zip(&sums)
            .zip(&wanted)
            .map(|((&stage, sum), &wanted)| wanted && sum.unrouted(stage, fallback))
            .collect();
        if starved.contains(&true) {
            for (sum, _) in sums.iter_mut().zip(&starved).filter(|(_, on)| **on) {
                (sum.gram, sum.held) = (None, None);
            }
            let mut all: Vec<Sum> = stages.iter().map(|&stage| self.sum(stage)).collect();
            self.walk(ctx, block, phases, |ctx, index, state, _, phases| {
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
        let mut inputs: Vec<StageInputs> = inputs.collect();
        for (inputs, &stage) in inputs.iter_mut().zip(stages) {
            inputs.distances = self.distances(ctx, block, stage);
        }
        if let Some(mut native) = self.native.take() {
            let crosses = native.all_crosses(ctx, self, block, &wanted, phases);
            self.native = Some(native);
            for (inputs, cross) in inputs.iter_mut().zip(crosses?) {
                inputs.cross = cross.filter(|_| inputs.can_be_corrected());
            }
        }
        Ok(inputs)
    }

    /// Takes copies of all chunks through the block, and shows the state before each stage.
    fn walk(
        &mut self,
        ctx: &mut Ctx,
        block: &Block,
        phases: &mut Phases,
        mut visit: impl FnMut(&mut Ctx, usize, &BlockState, &[Range<usize>], &mut Phases) -> Result<()>,
    ) -> Result<()> {
        let mut caches = self.caches(ctx);
        self.pass(ctx, phases, false, |ctx, state, windows, phases| {
            let mut state = BlockState::new(state.hidden.clone());
            phases.time("inputs", || block.begin(ctx, &mut state));
            for (index, &stage) in block.stages().iter().enumerate() {
                visit(ctx, index, &state, windows, phases)?;
                phases
                    .time("inputs", || run(ctx, block, stage, &mut state, windows, &mut caches))?;
            }
            Ok(())
        })
    }

    /// The inputs of the projection to logits, behind the last block.
    pub(crate) fn head_inputs(
        &mut self,
        ctx: &mut Ctx,
        head: &HeadLayer,
        phases: &mut Phases,
    ) -> Result<StageInputs> {
        let (mut sum, mut normalized) = (Sum::default(), Tensor::default());
        let held = self.held_out();
        let mut held = held.iter();
        self.pass(ctx, phases, false, |ctx, state, windows, phases| {
            phases.time("inputs", || head.normalize(ctx, &state.hidden, &mut normalized));
            let held = held.next();
            phases.time("hessian", || sum.add_rows(ctx, &normalized, windows, held, None));
            Ok(())
        })?;
        let mut inputs = StageInputs { gram: sum.gram, held: sum.held, ..StageInputs::default() };
        if let Some(mut native) = self.native.take() {
            let cross = native.head_cross(ctx, self, head, phases);
            self.native = Some(native);
            inputs.cross = cross?;
        }
        Ok(inputs)
    }
}

pub(super) fn run(
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
