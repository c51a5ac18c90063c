//! What a block is tuned on: tokens, the float block's output, and the distance from it.

use gptq_compute::Tensor;
use gptq_model::{Block, BlockState, Ctx, Trace};

use crate::error::Result;
use crate::pipeline::activations::Chunk;

/// A chunk of tokens and what the float block makes of it.
pub(super) struct Example {
    chunk: Chunk,
    target: Tensor,
    /// 1 / ‖target‖² of each token.
    weights: Vec<f32>,
}

impl Example {
    pub(super) fn new(ctx: &mut Ctx, float: &Block, chunk: Chunk) -> Result<Self> {
        let mut state = BlockState::new(chunk.input.clone());
        float.run_whole(ctx, &mut state, &chunk.windows)?;
        let target = state.hidden;
        let weight = |row: usize| {
            let square: f32 = target.row(row).iter().map(|x| x * x).sum();
            1.0 / square.max(f32::MIN_POSITIVE)
        };
        let weights = (0..target.rows()).map(weight).collect();
        Ok(Self { chunk, target, weights })
    }

    /// The sum over the tokens of ‖y - target‖² / ‖target‖², with y the block's output.
    fn error(&self, ctx: &mut Ctx, block: &Block) -> Result<f64> {
        let mut state = BlockState::new(self.chunk.input.clone());
        block.run_whole(ctx, &mut state, &self.chunk.windows)?;
        let rows = (0..self.target.rows()).map(|row| {
            let pairs = state.hidden.row(row).iter().zip(self.target.row(row));
            let square: f32 = pairs.map(|(y, target)| (y - target) * (y - target)).sum();
            f64::from(self.weights[row] * square)
        });
        Ok(rows.sum())
    }

    /// The gradient of that by y, and the block's pass.
    pub(super) fn gradient(&self, ctx: &mut Ctx, block: &Block) -> Result<(Tensor, Trace)> {
        let mut state = BlockState::new(self.chunk.input.clone());
        let trace = block.trace(ctx, &mut state, &self.chunk.windows)?;
        let mut gradient = state.hidden;
        for row in 0..gradient.rows() {
            let target = self.target.row(row);
            for (y, target) in gradient.row_mut(row).iter_mut().zip(target) {
                *y = 2.0 * self.weights[row] * (*y - target);
            }
        }
        Ok((gradient, trace))
    }
}

/// The mean over all tokens of the relative squared error of the block's output.
pub(super) fn mean_error(ctx: &mut Ctx, block: &Block, examples: &[Example]) -> Result<f64> {
    let (mut sum, mut tokens) = (0.0, 0);
    for example in examples {
        sum += example.error(ctx, block)?;
        tokens += example.target.rows();
    }
    Ok(sum / tokens.max(1) as f64)
}
