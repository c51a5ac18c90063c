//! Gradients of a mixture of experts: of what each expert makes of its rows, and of the weights that the router gives
//! them. Which experts a token goes to is taken as given.

use gptq_compute::{Tensor, linear};

use super::Flow;
use crate::Result;
use crate::block::Block;
use crate::moe::{MoeState, exponentials};
use crate::stages::{Part, Stage};
use crate::state::Ctx;

/// Gradients of what the parts of a mixture share.
#[derive(Default)]
pub(super) struct ExpertsFlow {
    /// Of the sum of the experts' outputs `[rows, hidden]`.
    sum: Tensor,
    /// Of the MLP's input `[rows, hidden]`, by the parts so far.
    input: Tensor,
    /// Of the weights of the routes.
    routes: Vec<f32>,
    /// Of the weights of the shared expert.
    shared: Vec<f32>,
}

impl ExpertsFlow {
    /// From the gradient of the sum of the experts' outputs.
    pub(super) fn new(sum: Tensor, state: &MoeState) -> Self {
        let input = Tensor::zeros(sum.rows(), sum.cols());
        let [routes, shared] = [state.routes.len(), state.shared.len()].map(|len| vec![0.0; len]);
        Self { sum, input, routes, shared }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Block {
    /// The gradient of the output of `part`, whose projection read `input`.
    pub(super) fn leave_expert_backward(
        &self,
        ctx: &mut Ctx,
        part: Part,
        input: &Tensor,
        state: &MoeState,
        experts: &mut ExpertsFlow,
    ) -> Result<Tensor> {
        self.project(ctx, input, Stage::MlpDown(part))?;
        let ExpertsFlow { sum, routes, shared, .. } = experts;
        let of_weights = match part {
            Part::Expert(expert) => &mut routes[state.starts(expert)],
            Part::Dense | Part::Shared => shared.as_mut_slice(),
        };
        let mut dy = Tensor::zeros(input.rows(), sum.cols());
        for (index, (row, weight)) in state.parts(part).enumerate() {
            let of_sum = sum.row(row);
            dy.row_mut(index).iter_mut().zip(of_sum).for_each(|(dy, of_sum)| *dy = weight * of_sum);
            of_weights[index] = dot(of_sum, ctx.out.row(index));
        }
        Ok(dy)
    }

    /// Adds `flow.input`, the gradient of the input of `part`, to that of the MLP's input, which `flow.input` becomes
    /// behind the first part, which comes last here.
    pub(super) fn enter_expert_backward(
        &self,
        ctx: &mut Ctx,
        part: Part,
        state: &MoeState,
        flow: &mut Flow,
    ) -> Result<()> {
        let Flow { experts, input, .. } = flow;
        if part == Part::Dense {
            return Ok(());
        }
        for (index, (row, _)) in state.parts(part).enumerate() {
            let pairs = experts.input.row_mut(row).iter_mut().zip(input.row(index));
            pairs.for_each(|(sum, part)| *sum += part);
        }
        if part == Part::Expert(0) {
            self.route_backward(ctx, state, experts)?;
            *input = std::mem::take(&mut experts.input);
        }
        Ok(())
    }

    /// Adds to the gradient of the MLP's input what comes from the weights of its experts.
    fn route_backward(
        &self,
        ctx: &mut Ctx,
        state: &MoeState,
        experts: &mut ExpertsFlow,
    ) -> Result<()> {
        let (Some(router), Some(moe)) = (&self.router, self.moe()) else { return Ok(()) };
        let rows = state.input.rows();
        // A softmax over the experts of a token, or over all.
        let mut shares = Tensor::zeros(rows, moe.count);
        if !moe.renormalize {
            linear(
                &ctx.pool,
                &state.input,
                &mut [(&router.experts, &mut shares)],
                &mut ctx.scratch,
            );
            for row in 0..rows {
                let total = exponentials(shares.row_mut(row));
                shares.row_mut(row).iter_mut().for_each(|share| *share /= total);
            }
        }
        let mut scores = Tensor::zeros(rows, moe.count);
        let mut means = vec![0.0; rows];
        for expert in 0..moe.count {
            let part = Part::Expert(expert as u32);
            let of_weights = &experts.routes[state.starts(expert as u32)];
            for ((row, weight), of_weight) in state.parts(part).zip(of_weights) {
                shares.row_mut(row)[expert] = weight;
                scores.row_mut(row)[expert] = *of_weight;
                means[row] += weight * of_weight;
            }
        }
        for (row, mean) in means.into_iter().enumerate() {
            let pairs = scores.row_mut(row).iter_mut().zip(shares.row(row));
            pairs.for_each(|(score, share)| *score = share * (*score - mean));
        }
        self.input_gradient(ctx, &router.experts, &scores, true, &mut experts.input)?;
        if let Some(gate) = &router.shared {
            // Of the sigmoid.
            let pairs = experts.shared.iter().zip(&state.shared);
            let of_gate = pairs.map(|(dy, y)| dy * y * (1.0 - y)).collect();
            let of_gate = Tensor::from_vec(rows, 1, of_gate);
            self.input_gradient(ctx, gate, &of_gate, true, &mut experts.input)?;
        }
        Ok(())
    }
}
