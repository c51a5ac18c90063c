//! Gradients of a block: how a number that is computed from its output changes with its input, its linears and
//! its norms.
//!
//! The forward pass keeps the input of every stage ([`Block::trace`]); the backward pass goes through the
//! stages from the last to the first and computes what lies inside of one once more. Each stage has one function
//! here, the mirror of the one in [`crate::block`].

mod experts;

use std::ops::Range;

use gptq_compute::{
    Activation, AttnTrace, LayerKv, Linear, Matrix, Pool, Tensor, activate_backward,
    activate_gated, add_scaled, attention_backward, gather_cols, input_gradient, linear, multiply,
    norm, norm_backward, norm_heads_backward, rope_backward, scale, scatter_cols,
};

use crate::backward::experts::ExpertsFlow;
use crate::block::{Block, Norms, copy};
use crate::gradients::{Gradients, NormPlace, Trace};
use crate::spec::{GateUp, Mlp};
use crate::stages::{Part, Stage};
use crate::state::{BlockState, Ctx, SeqSpan};
use crate::{ModelError, Result};

/// Gradients of the tensors of a [`BlockState`].
#[derive(Default)]
struct Flow {
    hidden: Tensor,
    input: Tensor,
    shared: Tensor,
    carry: Tensor,
    experts: ExpertsFlow,
}

/// Sequences from their beginning: what [`SeqSpan`] needs of them.
fn from_start<'a>(windows: &[Range<usize>], caches: &'a mut [LayerKv]) -> Vec<SeqSpan<'a>> {
    let spans = windows.iter().zip(caches);
    spans.map(|(rows, kv)| SeqSpan { rows: rows.clone(), kv }).collect()
}

impl Block {
    /// Runs the block over whole sequences, whose rows `windows` cover those of `state` in order.
    ///
    /// # Errors
    /// As [`Block::run_stage`].
    pub fn run_whole(
        &self,
        ctx: &mut Ctx,
        state: &mut BlockState,
        windows: &[Range<usize>],
    ) -> Result<()> {
        let mut caches = self.caches(windows.len());
        self.forward(ctx, state, &mut from_start(windows, &mut caches))
    }

    /// As [`Block::run_whole`], and keeps what [`Block::backward`] needs.
    ///
    /// # Errors
    /// As [`Block::run_stage`].
    pub fn trace(
        &self,
        ctx: &mut Ctx,
        state: &mut BlockState,
        windows: &[Range<usize>],
    ) -> Result<Trace> {
        let mut caches = self.caches(windows.len());
        let mut seqs = from_start(windows, &mut caches);
        let input = state.hidden.clone();
        self.begin(ctx, state);
        let [mut stream, mut carry] = [(); 2].map(|()| Tensor::default());
        let mut inputs = Vec::with_capacity(self.stages().len());
        for &stage in self.stages() {
            inputs.push(state.input.clone());
            self.run_stage(ctx, stage, state, &mut seqs)?;
            if stage == Stage::AttnOut {
                (stream, carry) = (state.hidden.clone(), state.carry.clone());
            }
        }
        let moe = std::mem::take(&mut state.moe);
        Ok(Trace { windows: windows.to_vec(), input, stream, carry, inputs, moe })
    }

    /// From `dy`, the gradient of the block's output `[rows, hidden]` in the pass that `trace` was made in, that of its
    /// input; those of linears and norms go to `gradients`. The linears must be floats.
    ///
    /// # Errors
    /// [`ModelError::NoGradient`]: a part whose gradient is not known, or a linear of codes.
    pub fn backward(
        &self,
        ctx: &mut Ctx,
        trace: &Trace,
        dy: Tensor,
        gradients: &mut impl Gradients,
    ) -> Result<Tensor> {
        self.spec.check_gradients(self.layer())?;
        let windows = &trace.windows;
        let mut flow = Flow { hidden: dy, ..Flow::default() };
        for (index, &stage) in self.stages().iter().enumerate().rev() {
            let input = &trace.inputs[index];
            match stage {
                Stage::Qkv => {
                    // The result of the attention is the input of the next stage.
                    let out = &trace.inputs[index + 1];
                    self.attend_backward(ctx, input, out, windows, &mut flow, gradients)?;
                }
                Stage::AttnOut => {
                    self.leave_attention_backward(ctx, trace, input, &mut flow, gradients)?;
                }
                Stage::MlpUp(part) => {
                    if input.rows() > 0 {
                        self.widen_backward(ctx, part, input, &mut flow, gradients)?;
                    }
                    self.enter_expert_backward(ctx, part, &trace.moe, &mut flow)?;
                }
                Stage::MlpDown(part) => {
                    self.leave_mlp_backward(ctx, part, trace, input, &mut flow, gradients)?;
                }
            }
        }
        let place = NormPlace::AttentionBefore;
        self.enter_backward(ctx, place, &trace.input, &mut flow, gradients);
        Ok(flow.hidden)
    }

    fn caches(&self, count: usize) -> Vec<LayerKv> {
        let attention = &self.spec.attention;
        (0..count).map(|_| LayerKv::new(attention.kv_heads, attention.head_dim)).collect()
    }

    /// `input = before(hidden)`, which also becomes the stream where the spec says so.
    fn enter_backward(
        &self,
        ctx: &Ctx,
        place: NormPlace,
        hidden: &Tensor,
        flow: &mut Flow,
        gradients: &mut impl Gradients,
    ) {
        if self.spec.residual.from_norm {
            add_scaled(&ctx.pool, &mut flow.input, &flow.hidden, 1.0);
            flow.hidden.as_mut_slice().fill(0.0);
        }
        match self.norms(place) {
            [norm] => {
                let gradient =
                    norm_backward(&ctx.pool, hidden, norm, &flow.input, true, &mut flow.hidden);
                gradients.norms(place, vec![gradient]);
            }
            _ => add_scaled(&ctx.pool, &mut flow.hidden, &flow.input, 1.0),
        }
    }

    /// The only linear of `stage`, from the gradient of its output: `flow.input` becomes that of its input.
    fn project_backward(
        &self,
        ctx: &Ctx,
        stage: Stage,
        input: &Tensor,
        dy: &Tensor,
        flow: &mut Flow,
        gradients: &mut impl Gradients,
    ) -> Result<()> {
        gradients.linear(ctx, stage, 0, input, dy);
        self.linear_backward(ctx, (stage, 0), dy, false, &mut flow.input)
    }

    /// dx (+)= dy W of linear number `index` of a stage.
    fn linear_backward(
        &self,
        ctx: &Ctx,
        (stage, index): (Stage, usize),
        dy: &Tensor,
        add: bool,
        dx: &mut Tensor,
    ) -> Result<()> {
        self.input_gradient(ctx, self.get(stage, index)?, dy, add, dx)
    }

    /// dx (+)= dy W of a linear.
    fn input_gradient(
        &self,
        ctx: &Ctx,
        linear: &Linear,
        dy: &Tensor,
        add: bool,
        dx: &mut Tensor,
    ) -> Result<()> {
        let Matrix::Dense(weight) = &linear.weight else {
            let part = "a linear of codes";
            return Err(ModelError::NoGradient { layer: self.layer(), part });
        };
        input_gradient(&ctx.pool, dy, weight, add, dx);
        Ok(())
    }

    /// What a sublayer does behind its projection `stage` of `input`: its output is normalised, scaled and added to the
    /// stream `before`, and the stream is normalised. Takes `flow.hidden` from the stream behind to the one before, and
    /// gives the gradient of the projection's output; `others` was added to the stream as well.
    fn leave_backward(
        &self,
        ctx: &mut Ctx,
        (stage, input): (Stage, &Tensor),
        (before, others): (&Tensor, Option<&Tensor>),
        flow: &mut Flow,
        gradients: &mut impl Gradients,
    ) -> Result<Tensor> {
        let (norms, after, stream) = self.sublayer(stage);
        let multiplier = self.spec.residual.multiplier;
        if norms.after.is_some() || norms.stream.is_some() {
            self.project(ctx, input, stage)?;
        }
        if let Some(stream_norm) = &norms.stream {
            let mut sum = before.clone();
            if let Some(part) = others {
                add_scaled(&ctx.pool, &mut sum, part, multiplier);
            }
            let mut normalized = Tensor::default();
            let out = match &norms.after {
                Some(after) => {
                    norm(&ctx.pool, &ctx.out, after, &mut normalized);
                    &normalized
                }
                None => &ctx.out,
            };
            add_scaled(&ctx.pool, &mut sum, out, multiplier);
            let mut dx = Tensor::default();
            let gradient =
                norm_backward(&ctx.pool, &sum, stream_norm, &flow.hidden, false, &mut dx);
            gradients.norms(stream, vec![gradient]);
            flow.hidden = dx;
        }
        let mut dy = flow.hidden.clone();
        scale(&ctx.pool, &mut dy, multiplier);
        if others.is_some() {
            flow.carry = dy.clone();
        }
        Ok(Self::after_backward(ctx, norms, after, dy, gradients))
    }

    /// The gradient of a projection's output `ctx.out` from that of what its norm makes of it.
    fn after_backward(
        ctx: &Ctx,
        norms: &Norms,
        place: NormPlace,
        dy: Tensor,
        gradients: &mut impl Gradients,
    ) -> Tensor {
        let Some(after) = &norms.after else { return dy };
        let mut dx = Tensor::default();
        let gradient = norm_backward(&ctx.pool, &ctx.out, after, &dy, false, &mut dx);
        gradients.norms(place, vec![gradient]);
        dx
    }

    /// The norms of the sublayer that `stage` ends, and the places of those behind it.
    fn sublayer(&self, stage: Stage) -> (&Norms, NormPlace, NormPlace) {
        match stage {
            Stage::Qkv | Stage::AttnOut => {
                (&self.attention_norms, NormPlace::AttentionAfter, NormPlace::AttentionStream)
            }
            _ => (&self.mlp_norms, NormPlace::MlpAfter, NormPlace::MlpStream),
        }
    }

    fn leave_mlp_backward(
        &self,
        ctx: &mut Ctx,
        part: Part,
        trace: &Trace,
        input: &Tensor,
        flow: &mut Flow,
        gradients: &mut impl Gradients,
    ) -> Result<()> {
        let stage = Stage::MlpDown(part);
        let last = self.moe().is_none_or(|moe| moe.after(part).is_none());
        let behind = if last {
            let others = self.spec.residual.parallel.then_some(&trace.carry);
            self.leave_backward(ctx, (stage, input), (&trace.stream, others), flow, gradients)?
        } else {
            Tensor::default()
        };
        let dy = match part {
            Part::Dense => behind,
            Part::Expert(_) | Part::Shared => {
                if last {
                    flow.experts = ExpertsFlow::new(behind, &trace.moe);
                }
                self.leave_expert_backward(ctx, part, input, &trace.moe, &mut flow.experts)?
            }
        };
        if input.rows() > 0 {
            self.project_backward(ctx, stage, input, &dy, flow, gradients)?;
        }
        Ok(())
    }

    fn widen_backward(
        &self,
        ctx: &mut Ctx,
        part: Part,
        input: &Tensor,
        flow: &mut Flow,
        gradients: &mut impl Gradients,
    ) -> Result<()> {
        let stage = Stage::MlpUp(part);
        let dy = std::mem::take(&mut flow.input);
        let Ctx { pool, scratch, wide, gate, out, .. } = ctx;
        match *self.form(part) {
            Mlp::Gated { gate_up: GateUp::Separate { .. }, activation, .. } => {
                let mut jobs =
                    [(self.get(stage, 0)?, &mut *gate), (self.get(stage, 1)?, &mut *wide)];
                linear(pool, input, &mut jobs, scratch);
                let (dgate, dup) = gated_backward(pool, activation, gate, wide, dy);
                gradients.linear(ctx, stage, 0, input, &dgate);
                gradients.linear(ctx, stage, 1, input, &dup);
                self.linear_backward(ctx, (stage, 0), &dgate, false, &mut flow.input)?;
                self.linear_backward(ctx, (stage, 1), &dup, true, &mut flow.input)
            }
            Mlp::Gated { gate_up: GateUp::Fused(_), width, activation, .. } => {
                linear(pool, input, &mut [(self.get(stage, 0)?, &mut *wide)], scratch);
                gather_cols(pool, wide, &[(0, width)], gate);
                gather_cols(pool, wide, &[(width, width)], out);
                let (dgate, dup) = gated_backward(pool, activation, gate, out, dy);
                let mut fused = Tensor::zeros(input.rows(), 2 * width);
                scatter_cols(&dgate, &[(0, width)], &mut fused);
                scatter_cols(&dup, &[(width, width)], &mut fused);
                self.project_backward(ctx, stage, input, &fused, flow, gradients)
            }
            Mlp::Plain { activation, .. } => {
                linear(pool, input, &mut [(self.get(stage, 0)?, &mut *gate)], scratch);
                activate_backward(pool, activation, gate, &dy);
                let dx = std::mem::take(gate);
                self.project_backward(ctx, stage, input, &dx, flow, gradients)
            }
        }
    }

    fn leave_attention_backward(
        &self,
        ctx: &mut Ctx,
        trace: &Trace,
        input: &Tensor,
        flow: &mut Flow,
        gradients: &mut impl Gradients,
    ) -> Result<()> {
        let stage = Stage::AttnOut;
        // The norm before the attention may have become the stream.
        let from_norm = self.spec.residual.from_norm;
        let before = if from_norm { &trace.inputs[0] } else { &trace.input };
        if self.spec.residual.parallel {
            // The MLP reads the stream, or what the attention read.
            if self.mlp_norms.before.is_some() {
                self.enter_backward(ctx, NormPlace::MlpBefore, before, flow, gradients);
            } else {
                flow.shared = std::mem::take(&mut flow.input);
            }
            let dy = std::mem::take(&mut flow.carry);
            if self.attention_norms.after.is_some() {
                self.project(ctx, input, stage)?;
            }
            let place = NormPlace::AttentionAfter;
            let dy = Self::after_backward(ctx, &self.attention_norms, place, dy, gradients);
            return self.project_backward(ctx, stage, input, &dy, flow, gradients);
        }
        let mut stream = Tensor::default();
        let stream = if from_norm && self.mlp_norms.before.is_some() {
            // The stream was replaced by its norm; `check_gradients` refuses norms behind sublayers then.
            self.project(ctx, input, stage)?;
            copy(&ctx.pool, before, &mut stream);
            add_scaled(&ctx.pool, &mut stream, &ctx.out, self.spec.residual.multiplier);
            &stream
        } else {
            &trace.stream
        };
        self.enter_backward(ctx, NormPlace::MlpBefore, stream, flow, gradients);
        let dy = self.leave_backward(ctx, (stage, input), (before, None), flow, gradients)?;
        self.project_backward(ctx, stage, input, &dy, flow, gradients)
    }

    /// `out`: the result of the attention.
    fn attend_backward(
        &self,
        ctx: &mut Ctx,
        input: &Tensor,
        out: &Tensor,
        windows: &[Range<usize>],
        flow: &mut Flow,
        gradients: &mut impl Gradients,
    ) -> Result<()> {
        let mut caches = self.caches(windows.len());
        let seqs = from_start(windows, &mut caches);
        self.project_heads(ctx, input)?;
        let plain = [ctx.q.clone(), ctx.k.clone(), ctx.v.clone()];
        self.normalize_heads(ctx);
        self.rotate(ctx, gptq_compute::rope, &seqs);
        let Ctx { pool, q, k, v, .. } = &*ctx;
        let trace = AttnTrace { params: &self.params, seqs: windows, q, k, v, out };
        let [dq, dk, dv] = attention_backward(pool, &trace, &flow.input);
        (ctx.q, ctx.k) = (dq, dk);
        self.rotate(ctx, rope_backward, &seqs);
        let mut heads = [std::mem::take(&mut ctx.q), std::mem::take(&mut ctx.k), dv];
        let places = [NormPlace::Query, NormPlace::Key];
        for (which, (place, width)) in places.into_iter().zip(self.norm_widths()).enumerate() {
            let norms = self.norms(place);
            if !norms.is_empty() {
                let mut dx = Tensor::default();
                let (x, dy) = (&plain[which], &heads[which]);
                let of_norms = norm_heads_backward(&ctx.pool, x, width, norms, dy, false, &mut dx);
                gradients.norms(place, of_norms);
                heads[which] = dx;
            }
        }
        if let Some(limit) = self.spec.attention.clip_qkv {
            // What was cut off does not change.
            for (x, dx) in plain.iter().zip(&mut heads) {
                let cut = dx.as_mut_slice().iter_mut().zip(x.as_slice());
                cut.filter(|(_, x)| x.abs() >= limit).for_each(|(dx, _)| *dx = 0.0);
            }
        }
        let stage = Stage::Qkv;
        if let Some(columns) = &self.fused {
            let width = heads.iter().map(Tensor::cols).sum();
            let mut fused = Tensor::zeros(input.rows(), width);
            for (part, columns) in heads.iter().zip([&columns.q, &columns.k, &columns.v]) {
                scatter_cols(part, columns, &mut fused);
            }
            self.project_backward(ctx, stage, input, &fused, flow, gradients)?;
        } else {
            for (index, part) in heads.iter().enumerate() {
                gradients.linear(ctx, stage, index, input, part);
                self.linear_backward(ctx, (stage, index), part, index > 0, &mut flow.input)?;
            }
        }
        if self.spec.residual.parallel && self.mlp_norms.before.is_none() {
            add_scaled(&ctx.pool, &mut flow.input, &flow.shared, 1.0);
        }
        Ok(())
    }
}

/// Gradients of gate and up from that of `activation(gate) · up`.
fn gated_backward(
    pool: &Pool,
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
    dy: Tensor,
) -> (Tensor, Tensor) {
    let mut dup = gate.clone();
    activate_gated(pool, activation, &mut dup, &dy);
    let mut product = dy;
    multiply(pool, &mut product, up);
    let mut dgate = gate.clone();
    activate_backward(pool, activation, &mut dgate, &product);
    (dgate, dup)
}
