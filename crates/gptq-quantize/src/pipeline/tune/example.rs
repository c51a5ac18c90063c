//! What a block is tuned on: tokens, the float block's output, and the distance from it.

use gptq_compute::Tensor;
use gptq_model::{Block, BlockState, Ctx, Trace};

use crate::error::Result;
use crate::pipeline::activations::Chunk;

/// A chunk of tokens and what the float block makes of it.
pub(super) struct Example {
    pub(super) chunk: Chunk,
    target: Tensor,
    /// 1 / ‖target‖² of each token.
    weights: Vec<f32>,
}

impl Example {
    pub(super) fn new(ctx: &mut Ctx, float: &Block, chunk: Chunk) -> Result<Self> {
        let mut state = BlockState::new(chunk.input.clone());
        float.trace(ctx, &mut state, &chunk.windows)?;
        let target = state.hidden;
        let weight = |row: usize| {
            let square: f32 = target.row(row).iter().map(|x| x * x).sum();
            1.0 / square.max(f32::MIN_POSITIVE)
        };
        let weights = (0..target.rows()).map(weight).collect();
        Ok(Self { chunk, target, weights })
    }

    /// The block's pass over the chunk and the error of its output: the mean over the tokens of ‖y - target‖² /
    /// ‖target‖²; the output becomes the gradient of that.
    pub(super) fn error(&self, ctx: &mut Ctx, block: &Block) -> Result<(f64, Tensor, Trace)> {
        let mut state = BlockState::new(self.chunk.input.clone());
        let trace = block.trace(ctx, &mut state, &self.chunk.windows)?;
        let mut output = state.hidden;
        let rows = output.rows();
        let mut error = 0.0f64;
        for row in 0..rows {
            let weight = self.weights[row];
            let mut square = 0.0f32;
            for (y, target) in output.row_mut(row).iter_mut().zip(self.target.row(row)) {
                let difference = *y - target;
                square += difference * difference;
                *y = 2.0 * weight * difference / rows as f32;
            }
            error += f64::from(weight * square);
        }
        Ok((error / rows.max(1) as f64, output, trace))
    }
}

/// The mean of [`Example::error`].
pub(super) fn mean_error(ctx: &mut Ctx, block: &Block, examples: &[Example]) -> Result<f64> {
    let mut sum = 0.0;
    for example in examples {
        sum += example.error(ctx, block)?.0;
    }
    Ok(sum / examples.len().max(1) as f64)
}
