//! What the linears of a stage are solved against, and its sums as they grow.

use std::ops::Range;

use gptq_compute::{Activations, Cross, Gram, Tensor};
use gptq_model::{Block, BlockState, Ctx, Stage};

use super::distances::DistanceInputs;
use super::held_out::{Part, split};
use super::{MoeFallback, Phases};
use crate::error::Result;
use crate::report::ExpertRecord;
use crate::token_weights::RowWeights;

/// What the linears of a stage are solved against; by default they are rounded to nearest.
#[derive(Default)]
pub(crate) struct StageInputs {
    /// XᵀX of the stage's inputs; `None`: they are rounded to nearest.
    pub(crate) gram: Option<Gram>,
    /// That of windows which `gram` leaves out.
    pub(crate) held: Option<Gram>,
    /// X̂ᵀ(X - X̂) for the inputs X of the float model; `None`: they are not corrected.
    pub(crate) cross: Option<Cross>,
    /// What some of the linears read besides.
    pub(crate) distances: Option<DistanceInputs>,
    /// What the report says of an expert.
    pub(crate) expert: Option<ExpertRecord>,
}

impl StageInputs {
    /// Whether they are the inputs of the model: not so for an expert that is solved on tokens that it
    /// does not see.
    pub(super) fn can_be_corrected(&self) -> bool {
        let fallback = self.expert.as_ref().and_then(|expert| expert.fallback.as_ref());
        self.gram.is_some() && fallback.is_none()
    }
}

/// XᵀX of a stage's inputs as it grows.
#[derive(Default)]
pub(super) struct Sum {
    weights: RowWeights,
    scaled: Tensor,
    pub(super) gram: Option<Gram>,
    /// That of the windows which are held out.
    pub(super) held: Option<Gram>,
    /// Tokens that went to the stage, and its inputs.
    tokens: usize,
    width: usize,
}

impl Sum {
    /// An empty sum of rows that are weighted so.
    pub(super) fn new(weights: RowWeights) -> Self {
        Self { weights, ..Self::default() }
    }

    pub(super) fn add(&mut self, ctx: &Ctx, input: &Tensor, windows: &[Range<usize>]) {
        let gram = self.gram.get_or_insert_with(|| gram(ctx, input.cols()));
        self.weights.accumulate(gram, &ctx.pool, input, windows, &mut self.scaled);
        self.tokens += input.rows();
        self.width = input.cols();
    }

    /// Adds the inputs of `stage` for one chunk of windows, some of which may be `held` out.
    pub(super) fn add_chunk(
        &mut self,
        ctx: &Ctx,
        stage: Stage,
        state: &BlockState,
        windows: &[Range<usize>],
        held: Option<&Vec<bool>>,
    ) {
        let tokens = held.and_then(|_| state.routed_rows(stage));
        self.add_rows(ctx, &state.input, windows, held, tokens.as_deref());
    }

    /// The same of any input; `tokens`: those of its rows, where it has not all of them.
    pub(super) fn add_rows(
        &mut self,
        ctx: &Ctx,
        input: &Tensor,
        windows: &[Range<usize>],
        held: Option<&Vec<bool>>,
        tokens: Option<&[u32]>,
    ) {
        let Some(held) = held else { return self.add(ctx, input, windows) };
        let [fit, judge] = split(input, windows, held, tokens);
        let Part { input, windows } = judge;
        let gram = self.held.get_or_insert_with(|| gram(ctx, input.cols()));
        self.weights.accumulate(gram, &ctx.pool, &input, &windows, &mut self.scaled);
        self.tokens += input.rows();
        self.add(ctx, &fit.input, &fit.windows);
    }

    /// Adds what an expert would see if every token were routed to it.
    pub(super) fn add_unrouted(
        &mut self,
        ctx: &mut Ctx,
        block: &Block,
        stage: Stage,
        state: &BlockState,
        phases: &mut Phases,
    ) -> Result<()> {
        let mut input = Tensor::default();
        phases.time("inputs", || block.unrouted_input(ctx, stage, state, &mut input))?;
        phases.time("hessian", || self.add(ctx, &input, &[]));
        Ok(())
    }

    fn starved(&self, stage: Stage) -> bool {
        stage.expert().is_some() && MoeFallback::applies(self.tokens, self.width)
    }

    /// Whether the stage has to be calibrated on all tokens.
    pub(super) fn unrouted(&self, stage: Stage, fallback: MoeFallback) -> bool {
        fallback == MoeFallback::AllTokens && self.starved(stage)
    }

    pub(super) fn finish(self, stage: Stage, fallback: MoeFallback) -> StageInputs {
        let starved = self.starved(stage);
        let expert = stage.expert().map(|_| ExpertRecord {
            tokens: self.tokens as u64,
            fallback: starved.then(|| fallback.name().to_owned()),
        });
        let rounded = starved && fallback == MoeFallback::Rtn;
        StageInputs {
            gram: self.gram.filter(|_| !rounded),
            held: self.held.filter(|_| !rounded),
            cross: None,
            distances: None,
            expert,
        }
    }
}

/// Whether the forward pass rounds what it multiplies, so that sums and attention may do so, too.
pub(super) fn rounds(ctx: &Ctx) -> bool {
    ctx.scratch.activations() != Activations::F32
}

fn gram(ctx: &Ctx, width: usize) -> Gram {
    if rounds(ctx) { Gram::rounding(width) } else { Gram::new(width) }
}
