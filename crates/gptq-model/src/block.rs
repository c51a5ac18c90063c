//! The one block of all families: norms, the four stages and the wiring between them, as the spec says.

use std::mem::swap;
use std::sync::Arc;

use gptq_compute::{
    AttnParams, Linear, Norm, Pool, RopeTable, Tensor, activate, activate_gated, add_norm,
    add_scaled, attention, clamp, gather_cols, linear, norm, norm_heads, rope,
};
use gptq_format::Checkpoint;

use crate::convolution::ConvolutionLayer;
use crate::fused::FusedColumns;
use crate::load::{LinearSource, Loader};
use crate::moe::Router;
use crate::profile::Op;
use crate::relative::DistanceTable;
use crate::rope::Rope;
use crate::spec::{Attention, GateUp, Mlp, Moe, NormOver, Positions, Qkv, Spec, SublayerNorms};
use crate::stages::{LinearSpec, Part, Stage};
use crate::state::{BlockState, Ctx, SeqSpan, check_spans};
use crate::{ModelError, Result};

/// One transformer block with its weights.
pub struct Block {
    layer: usize,
    pub(crate) spec: Arc<Spec>,
    pub(crate) attention_norms: Norms,
    pub(crate) mlp_norms: Norms,
    /// Of queries and of keys: none, one norm, or one for each head.
    pub(crate) qk_norms: [Vec<Norm>; 2],
    pub(crate) params: AttnParams,
    pub(crate) fused: Option<FusedColumns>,
    distances: Option<DistanceTable>,
    convolution: Option<ConvolutionLayer>,
    pub(crate) router: Option<Router>,
    order: Vec<Stage>,
    /// By [`Stage::place`].
    linears: Vec<Vec<Slot>>,
}

pub(crate) struct Norms {
    pub(crate) before: Option<Norm>,
    pub(crate) after: Option<Norm>,
    pub(crate) stream: Option<Norm>,
}

struct Slot {
    spec: LinearSpec,
    linear: Option<Linear>,
}

impl Block {
    /// Loads block `layer`: its norms, and its linears from `source`.
    ///
    /// # Errors
    /// A tensor that is missing, unreadable or of another shape than the spec asks for; the error names it.
    ///
    /// # Panics
    /// If `layer` is not below [`Spec::layer_count`].
    pub fn load(
        checkpoint: &Checkpoint,
        spec: &Arc<Spec>,
        layer: usize,
        source: LinearSource,
    ) -> Result<Self> {
        let loader = Loader { checkpoint, spec };
        let block = spec.block_name(layer);
        let norms = |names: &SublayerNorms| -> Result<Norms> {
            let load = |name: Option<&str>| {
                name.map(|name| loader.norm(&format!("{block}.{name}"), spec.hidden, spec.norm))
                    .transpose()
            };
            Ok(Norms {
                before: load(names.before)?,
                after: load(names.after)?,
                stream: load(names.stream)?,
            })
        };
        let qk_norms = spec.attention.qk_norm.map(|qk| -> Result<[Vec<Norm>; 2]> {
            let Attention { heads, kv_heads, head_dim, .. } = spec.attention;
            let load = |name: &str, heads| {
                loader.head_norms(&format!("{block}.{name}"), heads, head_dim, &qk)
            };
            Ok([load(qk.q, heads)?, load(qk.k, kv_heads)?])
        });
        let slots = |&stage: &Stage| -> Result<Vec<Slot>> {
            let slot = |linear: LinearSpec| {
                let weights =
                    (source != LinearSource::Unset).then(|| loader.linear(&linear, source));
                Ok(Slot { linear: weights.transpose()?, spec: linear })
            };
            spec.stage_linears(layer, stage).into_iter().map(slot).collect()
        };
        let distances = spec.attention.relative;
        let distances =
            distances.map(|scheme| DistanceTable::load(&loader, &block, scheme, source));
        let convolution = spec.residual.convolution.filter(|_| layer == 0);
        let convolution = convolution.map(|scheme| ConvolutionLayer::load(&loader, scheme));
        let order = spec.stage_order(layer);
        let mut attention_names = spec.residual.attention;
        attention_names.before = attention_names.before.filter(|_| !spec.layers[layer].bare);
        Ok(Self {
            layer,
            attention_norms: norms(&attention_names)?,
            mlp_norms: norms(&spec.residual.mlp)?,
            qk_norms: qk_norms.transpose()?.unwrap_or_default(),
            params: attention_params(spec, layer),
            fused: match spec.attention.qkv {
                Qkv::Fused { order, .. } => Some(order.columns(&spec.attention)),
                Qkv::Separate { .. } => None,
            },
            distances: distances.transpose()?,
            convolution: convolution.transpose()?,
            router: spec.moe(layer).map(|moe| Router::load(&loader, &block, moe)).transpose()?,
            linears: order.iter().map(slots).collect::<Result<_>>()?,
            order,
            spec: Arc::clone(spec),
        })
    }

    /// Index of the block.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// The stages in the order in which they run.
    pub fn stages(&self) -> &[Stage] {
        &self.order
    }

    /// The linears of `stage`: what they are.
    ///
    /// # Panics
    /// If the block has no such stage.
    #[track_caller]
    pub fn linear_specs(&self, stage: Stage) -> impl ExactSizeIterator<Item = &LinearSpec> {
        self.linears[self.place(stage)].iter().map(|slot| &slot.spec)
    }

    /// Linear number `index` of `stage`, if it is loaded.
    ///
    /// # Panics
    /// If the block has no such stage or the stage not so many linears.
    #[track_caller]
    pub fn linear(&self, stage: Stage, index: usize) -> Option<&Linear> {
        self.linears[self.place(stage)][index].linear.as_ref()
    }

    /// Replaces linear number `index` of `stage`.
    ///
    /// # Errors
    /// If its shape is not that of the spec.
    ///
    /// # Panics
    /// If the block has no such stage or the stage not so many linears.
    #[track_caller]
    pub fn set_linear(&mut self, stage: Stage, index: usize, linear: Linear) -> Result<()> {
        let place = self.place(stage);
        let slot = &mut self.linears[place][index];
        let expected = (slot.spec.out_features, slot.spec.in_features);
        let got = (linear.weight.out_features(), linear.weight.in_features());
        if expected != got {
            return Err(ModelError::LinearShape {
                layer: self.layer,
                linear: slot.spec.name.clone(),
                expected,
                got,
            });
        }
        slot.linear = Some(linear);
        Ok(())
    }

    /// Takes linear number `index` of `stage` out of the block.
    ///
    /// # Panics
    /// If the block has no such stage or the stage not so many linears.
    #[track_caller]
    pub fn take_linear(&mut self, stage: Stage, index: usize) -> Option<Linear> {
        let place = self.place(stage);
        self.linears[place][index].linear.take()
    }

    /// Bytes of weights that one token reads; of the experts those of as many as it goes to.
    pub fn weight_bytes(&self) -> usize {
        let bytes = |slots: &Vec<Slot>| -> usize {
            let linears = slots.iter().filter_map(|slot| slot.linear.as_ref());
            linears.map(|linear| linear.weight.bytes()).sum()
        };
        let of = |expert: bool| {
            let stages = self.order.iter().zip(&self.linears);
            stages.filter(move |(stage, _)| stage.expert().is_some() == expert)
        };
        let experts: usize = of(true).map(|(_, slots)| bytes(slots)).sum();
        let active = self.moe().map_or(0, |moe| experts * moe.top_k / moe.count);
        of(false).map(|(_, slots)| bytes(slots)).sum::<usize>() + active
    }

    /// Multiplications with weights that one token takes; of the experts those of as many as it goes to.
    pub fn products_per_token(&self) -> usize {
        let products = |slots: &[Slot]| -> usize {
            slots.iter().map(|slot| slot.spec.out_features * slot.spec.in_features).sum()
        };
        let experts = |expert: bool| -> usize {
            let stages = self.order.iter().zip(&self.linears);
            let chosen = stages.filter(|(stage, _)| stage.expert().is_some() == expert);
            chosen.map(|(_, slots)| products(slots)).sum()
        };
        let active = self.moe().map_or(0, |moe| experts(true) * moe.top_k / moe.count);
        experts(false) + active
    }

    /// What the linears `[queries, keys, values]` of the first stage read besides tokens: rows `ids` of the embedding of
    /// distances `[ids, hidden]`, and which of the linears do; `None` in a block where none does.
    pub fn distance_inputs(&self, ctx: &mut Ctx, ids: &[u32]) -> Option<(Tensor, Vec<usize>)> {
        let distances = self.distances.as_ref()?;
        let linears = self.spec.attention.relative?.shared();
        let mut rows = Tensor::default();
        (!linears.is_empty()).then(|| {
            distances.rows(ctx, ids, &mut rows);
            (rows, linears)
        })
    }

    /// Computes the input of the first stage from the stream.
    pub fn begin(&self, ctx: &mut Ctx, state: &mut BlockState) {
        self.enter(ctx, state, &self.attention_norms);
        ctx.lap(Op::Norm, || 0);
    }

    /// Takes `state.input` through the linears of `stage` and what follows them: afterwards `state.input` is the input of
    /// the next stage or, after the last one, `state.hidden` is the block's output. Stages run in the order of
    /// [`Block::stages`]; only [`Stage::Qkv`] uses `seqs`, and appends to their caches. The input of an expert's stages has
    /// the rows of the tokens that are routed to it, which may be none.
    ///
    /// # Errors
    /// If a linear is not loaded or the spans do not cover the rows.
    ///
    /// # Panics
    /// If the block has no such stage.
    pub fn run_stage(
        &self,
        ctx: &mut Ctx,
        stage: Stage,
        state: &mut BlockState,
        seqs: &mut [SeqSpan<'_>],
    ) -> Result<()> {
        match stage {
            Stage::Qkv => self.attend(ctx, state, seqs),
            Stage::AttnOut => self.leave_attention(ctx, state),
            Stage::MlpUp(part) => {
                self.widen(ctx, part, &state.input)?;
                swap(&mut state.input, &mut ctx.gate);
                ctx.lap(Op::Activation, || 0);
                Ok(())
            }
            Stage::MlpDown(part) => self.leave_mlp(ctx, state, part),
        }
    }

    /// What the input of an expert's `stage` would be if every token were routed to it, while that stage comes next: for
    /// experts that see too few tokens. For other stages it is the input itself.
    ///
    /// # Errors
    /// If a linear of the expert is not loaded.
    pub fn unrouted_input(
        &self,
        ctx: &mut Ctx,
        stage: Stage,
        state: &BlockState,
        out: &mut Tensor,
    ) -> Result<()> {
        match stage {
            Stage::MlpUp(Part::Expert(_)) => copy(&ctx.pool, &state.moe.input, out),
            Stage::MlpDown(part @ Part::Expert(_)) => {
                self.widen(ctx, part, &state.moe.input)?;
                copy(&ctx.pool, &ctx.gate, out);
            }
            _ => copy(&ctx.pool, &state.input, out),
        }
        Ok(())
    }

    /// The input of `stage`, which comes next for both states; of an expert for the tokens that `router` sends to it, in
    /// their order there, wherever `state` sends them.
    ///
    /// # Panics
    /// If it is the second stage of an expert, whose input depends on the linears of the first.
    pub fn input_as_routed(
        &self,
        ctx: &Ctx,
        stage: Stage,
        state: &BlockState,
        router: &BlockState,
        out: &mut Tensor,
    ) {
        match stage {
            Stage::MlpUp(Part::Expert(expert)) => state.moe.enter_as(&router.moe, expert, out),
            Stage::MlpDown(Part::Expert(_)) => panic!("an input that depends on linears"),
            _ => copy(&ctx.pool, &state.input, out),
        }
    }

    /// The whole block: [`Block::begin`] and all stages.
    ///
    /// # Errors
    /// As [`Block::run_stage`].
    pub fn forward(
        &self,
        ctx: &mut Ctx,
        state: &mut BlockState,
        seqs: &mut [SeqSpan<'_>],
    ) -> Result<()> {
        self.begin(ctx, state);
        self.order.iter().try_for_each(|&stage| self.run_stage(ctx, stage, state, seqs))
    }

    /// Input of a sublayer from the stream.
    fn enter(&self, ctx: &Ctx, state: &mut BlockState, norms: &Norms) {
        match &norms.before {
            Some(before) => norm(&ctx.pool, &state.hidden, before, &mut state.input),
            None => copy(&ctx.pool, &state.hidden, &mut state.input),
        }
        if self.spec.residual.from_norm {
            copy(&ctx.pool, &state.input, &mut state.hidden);
        }
    }

    /// Queries, keys, values, and the attention over the cache.
    fn attend(
        &self,
        ctx: &mut Ctx,
        state: &mut BlockState,
        seqs: &mut [SeqSpan<'_>],
    ) -> Result<()> {
        check_spans(seqs, state.input.rows())?;
        if let Some(convolution) = &self.convolution {
            convolution.begin(ctx, &state.hidden, seqs, &mut state.carry);
        }
        self.project_heads(ctx, &state.input)?;
        self.normalize_heads(ctx);
        self.rotate(ctx, rope, seqs);
        // Whole sequences, which nothing is appended to.
        if self.distances.is_none() {
            for seq in &mut *seqs {
                seq.kv.append(&ctx.k, &ctx.v, seq.rows.clone());
            }
        }
        if self.spec.residual.parallel && self.mlp_norms.before.is_none() {
            swap(&mut state.input, &mut state.shared);
        }
        ctx.lap(Op::Rotate, || 0);
        match &self.distances {
            Some(distances) => {
                let linears = [self.get(Stage::Qkv, 0)?, self.get(Stage::Qkv, 1)?];
                distances.attend(ctx, linears, seqs, &self.params, &mut state.input);
            }
            None => attention(&ctx.pool, &ctx.q, seqs, &self.params, &mut state.input),
        }
        let cached = |seq: &SeqSpan<'_>| {
            let kv = &*seq.kv;
            kv.len() * kv.kind().bytes_per_token(kv.kv_heads(), kv.head_dim())
        };
        ctx.lap(Op::Attention, || seqs.iter().map(cached).sum());
        Ok(())
    }

    /// Queries, keys and values of the rows of `input`, clamped, into `ctx.q`, `ctx.k` and `ctx.v`.
    pub(crate) fn project_heads(&self, ctx: &mut Ctx, input: &Tensor) -> Result<()> {
        let Ctx { pool, scratch, q, k, v, wide, .. } = ctx;
        if let Some(columns) = &self.fused {
            linear(pool, input, &mut [(self.get(Stage::Qkv, 0)?, wide)], scratch);
            gather_cols(pool, wide, &columns.q, q);
            gather_cols(pool, wide, &columns.k, k);
            gather_cols(pool, wide, &columns.v, v);
        } else {
            let get = |index| self.get(Stage::Qkv, index);
            let mut jobs = [(get(0)?, &mut *q), (get(1)?, &mut *k), (get(2)?, &mut *v)];
            linear(pool, input, &mut jobs, scratch);
        }
        ctx.lap(Op::Qkv, || self.stage_bytes(Stage::Qkv));
        let Ctx { pool, q, k, v, .. } = ctx;
        if let Some(limit) = self.spec.attention.clip_qkv {
            for x in [q, k, v] {
                clamp(pool, x, limit);
            }
        }
        Ok(())
    }

    /// Normalises `ctx.q` and `ctx.k` where the spec says so.
    pub(crate) fn normalize_heads(&self, ctx: &mut Ctx) {
        let Ctx { pool, q, k, .. } = ctx;
        for ((x, norms), width) in [q, k].into_iter().zip(&self.qk_norms).zip(self.norm_widths()) {
            if !norms.is_empty() {
                norm_heads(pool, x, width, norms);
            }
        }
    }

    /// Columns of queries and of keys that are normalised together.
    pub(crate) fn norm_widths(&self) -> [usize; 2] {
        let shape = &self.spec.attention;
        let whole = shape.qk_norm.is_some_and(|qk| qk.over == NormOver::Row);
        [shape.q_width(), shape.kv_width()].map(|all| if whole { all } else { shape.head_dim })
    }

    /// Turns `ctx.q` and `ctx.k` by their positions: with [`rope`], or back with its transpose.
    pub(crate) fn rotate(&self, ctx: &mut Ctx, turn: Turn, seqs: &[SeqSpan<'_>]) {
        if let (Some(index), Some(scheme)) =
            (self.spec.layers[self.layer].rope, self.spec.rope(self.layer))
        {
            rotate(ctx, turn, (index, scheme), self.spec.attention.head_dim, seqs);
        }
    }

    fn leave_attention(&self, ctx: &mut Ctx, state: &mut BlockState) -> Result<()> {
        self.project(ctx, &state.input, Stage::AttnOut)?;
        ctx.lap(Op::AttentionOut, || self.stage_bytes(Stage::AttnOut));
        Self::normalize_output(ctx, &self.attention_norms);
        if self.spec.residual.parallel {
            swap(&mut ctx.out, &mut state.carry);
            match &self.mlp_norms.before {
                Some(before) => norm(&ctx.pool, &state.hidden, before, &mut state.input),
                None => swap(&mut state.input, &mut state.shared),
            }
        } else if let (Some(before), None, false) =
            (&self.mlp_norms.before, &self.attention_norms.stream, self.spec.residual.from_norm)
        {
            let BlockState { hidden, input, .. } = state;
            let scale = self.spec.residual.multiplier;
            add_norm(&ctx.pool, hidden, &ctx.out, scale, before, input);
        } else {
            self.add(ctx, state, &self.attention_norms);
            self.enter(ctx, state, &self.mlp_norms);
        }
        if let (Some(router), Some(moe)) = (&self.router, self.moe()) {
            let BlockState { input, moe: routed, .. } = state;
            router.route(ctx, moe, input, routed);
            routed.enter(Part::Expert(0), input);
        }
        ctx.lap(Op::AddNorm, || 0);
        Ok(())
    }

    /// What lies between the projections of one part of the MLP for the rows of `input`, into `ctx.gate`.
    fn widen(&self, ctx: &mut Ctx, part: Part, input: &Tensor) -> Result<()> {
        let stage = Stage::MlpUp(part);
        let get = |index| self.get(stage, index);
        let bytes = || self.stage_bytes(stage);
        let mlp = self.form(part);
        let Ctx { pool, scratch, wide, gate, out, profile, .. } = ctx;
        let mut lap = || {
            if let Some(profile) = profile {
                profile.lap(Op::GateUp, bytes());
            }
        };
        if input.rows() == 0 {
            gate.resize(0, mlp.width());
            return Ok(());
        }
        match *mlp {
            Mlp::Gated { gate_up: GateUp::Separate { .. }, activation, .. } => {
                let mut jobs = [(get(0)?, &mut *gate), (get(1)?, &mut *wide)];
                linear(pool, input, &mut jobs, scratch);
                lap();
                activate_gated(pool, activation, gate, wide);
            }
            Mlp::Gated { gate_up: GateUp::Fused(_), width, activation, .. } => {
                linear(pool, input, &mut [(get(0)?, &mut *wide)], scratch);
                lap();
                gather_cols(pool, wide, &[(0, width)], gate);
                gather_cols(pool, wide, &[(width, width)], out);
                activate_gated(pool, activation, gate, out);
            }
            Mlp::Plain { activation, .. } => {
                linear(pool, input, &mut [(get(0)?, &mut *gate)], scratch);
                lap();
                activate(pool, activation, gate);
            }
        }
        Ok(())
    }

    fn leave_mlp(&self, ctx: &mut Ctx, state: &mut BlockState, part: Part) -> Result<()> {
        self.project(ctx, &state.input, Stage::MlpDown(part))?;
        ctx.lap(Op::Down, || self.stage_bytes(Stage::MlpDown(part)));
        if let Some(moe) = self.moe() {
            state.moe.leave(part, &ctx.out);
            if let Some(next) = moe.after(part) {
                state.moe.enter(next, &mut state.input);
                return Ok(());
            }
            state.moe.finish(&mut ctx.out);
        }
        Self::normalize_output(ctx, &self.mlp_norms);
        if self.spec.residual.parallel {
            add_scaled(&ctx.pool, &mut state.hidden, &state.carry, self.spec.residual.multiplier);
        }
        self.add(ctx, state, &self.mlp_norms);
        if let Some(convolution) = &self.convolution {
            convolution.finish(ctx, &state.carry, &mut state.hidden);
        }
        ctx.lap(Op::Add, || 0);
        Ok(())
    }

    /// The only linear of `stage` on `input`, into `ctx.out`.
    pub(crate) fn project(&self, ctx: &mut Ctx, input: &Tensor, stage: Stage) -> Result<()> {
        let projection = self.get(stage, 0)?;
        if input.rows() == 0 {
            ctx.out.resize(0, projection.weight.out_features());
        } else {
            linear(&ctx.pool, input, &mut [(projection, &mut ctx.out)], &mut ctx.scratch);
        }
        Ok(())
    }

    /// Normalises the output of a sublayer, `ctx.out`, where the spec says so.
    fn normalize_output(ctx: &mut Ctx, norms: &Norms) {
        let Ctx { pool, wide, out, .. } = ctx;
        if let Some(after) = &norms.after {
            norm(pool, out, after, wide);
            swap(out, wide);
        }
    }

    /// Adds `ctx.out` to the stream and normalises the stream where the spec says so.
    fn add(&self, ctx: &mut Ctx, state: &mut BlockState, norms: &Norms) {
        let Ctx { pool, wide, out, .. } = ctx;
        add_scaled(pool, &mut state.hidden, out, self.spec.residual.multiplier);
        if let Some(stream) = &norms.stream {
            norm(pool, &state.hidden, stream, wide);
            swap(&mut state.hidden, wide);
        }
    }

    pub(crate) fn moe(&self) -> Option<&Moe> {
        self.spec.moe(self.layer)
    }

    /// The form of one part of the MLP.
    pub(crate) fn form(&self, part: Part) -> &Mlp {
        match (part, self.moe()) {
            (Part::Expert(_), Some(moe)) => &moe.expert,
            (Part::Shared, Some(Moe { shared: Some(shared), .. })) => &shared.mlp,
            _ => &self.spec.mlp,
        }
    }

    fn place(&self, stage: Stage) -> usize {
        stage.place(self.moe())
    }

    /// Bytes of the weights of one stage.
    fn stage_bytes(&self, stage: Stage) -> usize {
        let linears =
            self.linears[self.place(stage)].iter().filter_map(|slot| slot.linear.as_ref());
        linears.map(|linear| linear.weight.bytes()).sum()
    }

    pub(crate) fn get(&self, stage: Stage, index: usize) -> Result<&Linear> {
        let slot = &self.linears[self.place(stage)][index];
        slot.linear.as_ref().ok_or_else(|| ModelError::LinearNotLoaded {
            layer: self.layer,
            linear: slot.spec.name.clone(),
        })
    }
}

fn attention_params(spec: &Spec, layer: usize) -> AttnParams {
    let attention = &spec.attention;
    AttnParams {
        heads: attention.heads,
        kv_heads: attention.kv_heads,
        head_dim: attention.head_dim,
        scale: if attention.scale_by_depth {
            attention.scale / (layer + 1) as f32
        } else {
            attention.scale
        },
        causal: attention.causal,
        window: spec.layers[layer].window,
        soft_cap: attention.soft_cap,
        alibi: match &spec.positions {
            Positions::Alibi { slopes } => Some(slopes.clone()),
            Positions::Rotary(_) | Positions::Learned { .. } | Positions::None => None,
        },
    }
}

/// [`rope`] or what undoes it.
pub(crate) type Turn = fn(&Pool, &mut Tensor, usize, &RopeTable, &[u32]);

/// Rotates queries and keys by their positions.
fn rotate(
    ctx: &mut Ctx,
    turn: Turn,
    (index, scheme): (usize, &Rope),
    head_dim: usize,
    seqs: &[SeqSpan<'_>],
) {
    let Ctx { pool, ropes, q, k, out, positions, .. } = ctx;
    positions.clear();
    positions.extend(seqs.iter().flat_map(|seq| seq.positions().map(|position| position as u32)));
    let start = seqs.iter().map(|seq| seq.positions().start).min().unwrap_or(0);
    let end = seqs.iter().map(|seq| seq.positions().end).max().unwrap_or(0);
    let keys = || seqs.iter().map(|seq| scheme.length_key(seq.positions().end));
    if keys().all(|key| key == scheme.length_key(end)) {
        let table = ropes.get(index, scheme, start..end);
        turn(pool, q, head_dim, table, positions);
        turn(pool, k, head_dim, table, positions);
        return;
    }
    // Frequencies that depend on the length, and lengths that differ: sequence by sequence, so that the result of one does
    // not depend on the others.
    for seq in seqs {
        let table = ropes.get(index, scheme, seq.positions());
        for x in [&mut *q, &mut *k] {
            let cols = x.cols();
            let part = seq.rows.start * cols..seq.rows.end * cols;
            out.resize(seq.rows.len(), cols);
            out.as_mut_slice().copy_from_slice(&x.as_slice()[part.clone()]);
            turn(pool, out, head_dim, table, &positions[seq.rows.clone()]);
            x.as_mut_slice()[part].copy_from_slice(out.as_slice());
        }
    }
}

pub(crate) fn copy(pool: &Pool, from: &Tensor, to: &mut Tensor) {
    gather_cols(pool, from, &[(0, from.cols())], to);
}
