//! The one block of all families: norms, the four stages and the wiring between them, as the spec says.

use std::mem::swap;
use std::sync::Arc;

use gptq_compute::{
    AttnParams, AttnSpan, Linear, Norm, Pool, Tensor, activate, activate_gated, add_scaled,
    attention, clamp, gather_cols, linear, norm, norm_heads, rope,
};
use gptq_format::Checkpoint;

use crate::fused::FusedColumns;
use crate::load::{LinearSource, Loader};
use crate::rope::Rope;
use crate::spec::{GateUp, Mlp, Positions, Qkv, Spec, SublayerNorms};
use crate::stages::{LinearSpec, Stage};
use crate::state::{BlockState, Ctx, SeqSpan, check_spans};
use crate::{ModelError, Result};

/// One transformer block with its weights.
pub struct Block {
    layer: usize,
    spec: Arc<Spec>,
    attention_norms: Norms,
    mlp_norms: Norms,
    qk_norms: Option<[Norm; 2]>,
    params: AttnParams,
    fused: Option<FusedColumns>,
    linears: [Vec<Slot>; 4],
}

struct Norms {
    before: Option<Norm>,
    after: Option<Norm>,
    stream: Option<Norm>,
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
        let qk_norms = spec.attention.qk_norm.map(|qk| -> Result<[Norm; 2]> {
            let load = |name: &str, width| loader.norm(&format!("{block}.{name}"), width, qk.norm);
            let (q, k) = if qk.per_head {
                (spec.attention.head_dim, spec.attention.head_dim)
            } else {
                (spec.attention.q_width(), spec.attention.kv_width())
            };
            Ok([load(qk.q, q)?, load(qk.k, k)?])
        });
        let slots = |stage: Stage| -> Result<Vec<Slot>> {
            let slot = |linear: LinearSpec| {
                let weights =
                    (source != LinearSource::Unset).then(|| loader.linear(&linear, source));
                Ok(Slot { linear: weights.transpose()?, spec: linear })
            };
            spec.stage_linears(layer, stage).into_iter().map(slot).collect()
        };
        Ok(Self {
            layer,
            attention_norms: norms(&spec.residual.attention)?,
            mlp_norms: norms(&spec.residual.mlp)?,
            qk_norms: qk_norms.transpose()?,
            params: attention_params(spec, layer),
            fused: match spec.attention.qkv {
                Qkv::Fused { order, .. } => Some(order.columns(&spec.attention)),
                Qkv::Separate { .. } => None,
            },
            linears: [
                slots(Stage::Qkv)?,
                slots(Stage::AttnOut)?,
                slots(Stage::MlpUp)?,
                slots(Stage::MlpDown)?,
            ],
            spec: Arc::clone(spec),
        })
    }

    /// Index of the block.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// The linears of `stage`: what they are.
    pub fn linear_specs(&self, stage: Stage) -> impl ExactSizeIterator<Item = &LinearSpec> {
        self.linears[stage as usize].iter().map(|slot| &slot.spec)
    }

    /// Linear number `index` of `stage`, if it is loaded.
    ///
    /// # Panics
    /// If the stage has not so many linears.
    #[track_caller]
    pub fn linear(&self, stage: Stage, index: usize) -> Option<&Linear> {
        self.linears[stage as usize][index].linear.as_ref()
    }

    /// Replaces linear number `index` of `stage`.
    ///
    /// # Errors
    /// If its shape is not that of the spec.
    ///
    /// # Panics
    /// If the stage has not so many linears.
    #[track_caller]
    pub fn set_linear(&mut self, stage: Stage, index: usize, linear: Linear) -> Result<()> {
        let slot = &mut self.linears[stage as usize][index];
        let expected = (slot.spec.out_features, slot.spec.in_features);
        let got = (linear.weight.out_features(), linear.weight.in_features());
        if expected != got {
            return Err(ModelError::LinearShape {
                layer: self.layer,
                linear: slot.spec.name.to_owned(),
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
    /// If the stage has not so many linears.
    #[track_caller]
    pub fn take_linear(&mut self, stage: Stage, index: usize) -> Option<Linear> {
        self.linears[stage as usize][index].linear.take()
    }

    /// Bytes of weights that one pass reads.
    pub fn weight_bytes(&self) -> usize {
        let linears = self.linears.iter().flatten().filter_map(|slot| slot.linear.as_ref());
        linears.map(|linear| linear.weight.bytes()).sum()
    }

    /// Computes the input of the first stage from the stream.
    pub fn begin(&self, ctx: &mut Ctx, state: &mut BlockState) {
        self.enter(ctx, state, &self.attention_norms);
    }

    /// Takes `state.input` through the linears of `stage` and what follows them: afterwards `state.input` is the input of
    /// the next stage or, after [`Stage::MlpDown`], `state.hidden` is the block's output. Stages run in the order of
    /// [`Stage::ALL`]; only [`Stage::Qkv`] uses `seqs`, and appends to their caches.
    ///
    /// # Errors
    /// If a linear is not loaded or the spans do not cover the rows.
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
            Stage::MlpUp => self.widen(ctx, state),
            Stage::MlpDown => self.leave_mlp(ctx, state),
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
        Stage::ALL.iter().try_for_each(|&stage| self.run_stage(ctx, stage, state, seqs))
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
        let Ctx { pool, scratch, q, k, v, wide, .. } = ctx;
        if let Some(columns) = &self.fused {
            linear(pool, &state.input, &mut [(self.get(Stage::Qkv, 0)?, wide)], scratch);
            gather_cols(pool, wide, &columns.q, q);
            gather_cols(pool, wide, &columns.k, k);
            gather_cols(pool, wide, &columns.v, v);
        } else {
            let get = |index| self.get(Stage::Qkv, index);
            let mut jobs = [(get(0)?, &mut *q), (get(1)?, &mut *k), (get(2)?, &mut *v)];
            linear(pool, &state.input, &mut jobs, scratch);
        }
        let shape = &self.spec.attention;
        if let Some(limit) = shape.clip_qkv {
            for x in [&mut *q, &mut *k, &mut *v] {
                clamp(pool, x, limit);
            }
        }
        if let Some([q_norm, k_norm]) = &self.qk_norms {
            let whole = shape.qk_norm.is_some_and(|qk| !qk.per_head);
            let width = |all| if whole { all } else { shape.head_dim };
            norm_heads(pool, q, width(shape.q_width()), q_norm);
            norm_heads(pool, k, width(shape.kv_width()), k_norm);
        }
        if let (Some(index), Some(rope)) =
            (self.spec.layers[self.layer].rope, self.spec.rope(self.layer))
        {
            rotate(ctx, index, rope, shape.head_dim, seqs);
        }
        for seq in &mut *seqs {
            seq.kv.append(&ctx.k, &ctx.v, seq.rows.clone());
        }
        if self.spec.residual.parallel && self.mlp_norms.before.is_none() {
            swap(&mut state.input, &mut state.shared);
        }
        let Ctx { pool, q, .. } = ctx;
        // One sequence, the case of decoding, allocates nothing.
        if let [seq] = &*seqs {
            let span = AttnSpan { rows: seq.rows.clone(), kv: seq.kv };
            attention(pool, q, &[span], &self.params, &mut state.input);
        } else {
            let spans: Vec<AttnSpan<'_>> =
                seqs.iter().map(|seq| AttnSpan { rows: seq.rows.clone(), kv: seq.kv }).collect();
            attention(pool, q, &spans, &self.params, &mut state.input);
        }
        Ok(())
    }

    fn leave_attention(&self, ctx: &mut Ctx, state: &mut BlockState) -> Result<()> {
        self.project(ctx, state, Stage::AttnOut, &self.attention_norms)?;
        if !self.spec.residual.parallel {
            self.add(ctx, state, &self.attention_norms);
            self.enter(ctx, state, &self.mlp_norms);
            return Ok(());
        }
        swap(&mut ctx.out, &mut state.carry);
        match &self.mlp_norms.before {
            Some(before) => norm(&ctx.pool, &state.hidden, before, &mut state.input),
            None => swap(&mut state.input, &mut state.shared),
        }
        Ok(())
    }

    fn widen(&self, ctx: &mut Ctx, state: &mut BlockState) -> Result<()> {
        let Ctx { pool, scratch, wide, gate, out, .. } = ctx;
        let get = |index| self.get(Stage::MlpUp, index);
        match self.spec.mlp {
            Mlp::Gated { gate_up: GateUp::Separate { .. }, activation, .. } => {
                linear(
                    pool,
                    &state.input,
                    &mut [(get(0)?, &mut *gate), (get(1)?, &mut *wide)],
                    scratch,
                );
                activate_gated(pool, activation, gate, wide);
            }
            Mlp::Gated { gate_up: GateUp::Fused(_), width, activation, .. } => {
                linear(pool, &state.input, &mut [(get(0)?, &mut *wide)], scratch);
                gather_cols(pool, wide, &[(0, width)], gate);
                gather_cols(pool, wide, &[(width, width)], out);
                activate_gated(pool, activation, gate, out);
            }
            Mlp::Plain { activation, .. } => {
                linear(pool, &state.input, &mut [(get(0)?, &mut *gate)], scratch);
                activate(pool, activation, gate);
            }
        }
        swap(&mut state.input, gate);
        Ok(())
    }

    fn leave_mlp(&self, ctx: &mut Ctx, state: &mut BlockState) -> Result<()> {
        self.project(ctx, state, Stage::MlpDown, &self.mlp_norms)?;
        if self.spec.residual.parallel {
            add_scaled(&ctx.pool, &mut state.hidden, &state.carry, self.spec.residual.multiplier);
        }
        self.add(ctx, state, &self.mlp_norms);
        Ok(())
    }

    /// The output of a sublayer, normalised where the spec says so, into `ctx.out`.
    fn project(
        &self,
        ctx: &mut Ctx,
        state: &BlockState,
        stage: Stage,
        norms: &Norms,
    ) -> Result<()> {
        let Ctx { pool, scratch, wide, out, .. } = ctx;
        linear(pool, &state.input, &mut [(self.get(stage, 0)?, &mut *out)], scratch);
        if let Some(after) = &norms.after {
            norm(pool, out, after, wide);
            swap(out, wide);
        }
        Ok(())
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

    fn get(&self, stage: Stage, index: usize) -> Result<&Linear> {
        let slot = &self.linears[stage as usize][index];
        slot.linear.as_ref().ok_or_else(|| ModelError::LinearNotLoaded {
            layer: self.layer,
            linear: slot.spec.name.to_owned(),
        })
    }
}

fn attention_params(spec: &Spec, layer: usize) -> AttnParams {
    let attention = &spec.attention;
    AttnParams {
        heads: attention.heads,
        kv_heads: attention.kv_heads,
        head_dim: attention.head_dim,
        scale: attention.scale,
        causal: attention.causal,
        window: spec.layers[layer].window,
        soft_cap: attention.soft_cap,
        alibi: match &spec.positions {
            Positions::Alibi { slopes } => Some(slopes.clone()),
            Positions::Rotary(_) | Positions::Learned { .. } => None,
        },
    }
}

/// Rotates queries and keys by their positions.
fn rotate(ctx: &mut Ctx, index: usize, scheme: &Rope, head_dim: usize, seqs: &[SeqSpan<'_>]) {
    let Ctx { pool, ropes, q, k, out, positions, .. } = ctx;
    positions.clear();
    positions.extend(seqs.iter().flat_map(|seq| seq.positions().map(|position| position as u32)));
    let end = seqs.iter().map(|seq| seq.positions().end).max().unwrap_or(0);
    let keys = || seqs.iter().map(|seq| scheme.length_key(seq.positions().end));
    if keys().all(|key| key == scheme.length_key(end)) {
        let table = ropes.get(index, scheme, end);
        rope(pool, q, head_dim, table, positions);
        rope(pool, k, head_dim, table, positions);
        return;
    }
    // Frequencies that depend on the length, and lengths that differ: sequence by sequence, so that the result of one does
    // not depend on the others.
    for seq in seqs {
        let end = seq.positions().end;
        let table = ropes.get(index, scheme, end);
        for x in [&mut *q, &mut *k] {
            let cols = x.cols();
            let part = seq.rows.start * cols..seq.rows.end * cols;
            out.resize(seq.rows.len(), cols);
            out.as_mut_slice().copy_from_slice(&x.as_slice()[part.clone()]);
            rope(pool, out, head_dim, table, &positions[seq.rows.clone()]);
            x.as_mut_slice()[part].copy_from_slice(out.as_slice());
        }
    }
}

pub(crate) fn copy(pool: &Pool, from: &Tensor, to: &mut Tensor) {
    gather_cols(pool, from, &[(0, from.cols())], to);
}
