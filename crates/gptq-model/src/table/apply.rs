//! A table over the spec that its base made.

use gptq_compute::{Activation, NormKind, RopeStyle};

use super::{Experts, FamilyTable, NormName, OrderName, OverName, RopeName, Stages};
use crate::fused::FusedOrder;
use crate::spec::{Attention, GateUp, Mlp, NormOver, NormSpec, Positions, QkNorm, Qkv, Spec};

type Checked<T> = Result<T, String>;

impl FamilyTable {
    /// What can be checked without a config.
    pub(super) fn check(&self) -> Checked<()> {
        let Stages { qkv, attention_out, mlp_up, mlp_down, .. } = &self.stages;
        let Experts { router, list, up, down, .. } = &self.experts;
        if let Some(names) = qkv.as_ref().filter(|names| ![1, 3].contains(&names.len())) {
            return Err(format!(
                "stages.qkv has {} names, expected 3 (queries, keys, values) or 1",
                names.len()
            ));
        }
        for (at, names) in [("stages.mlp_up", mlp_up), ("experts.up", up)] {
            if let Some(names) = names.as_ref().filter(|names| ![1, 2].contains(&names.len())) {
                return Err(format!("{at} has {} names, expected 2 (gate, up) or 1", names.len()));
            }
        }
        let singles = [
            ("modules.blocks", &self.modules.blocks),
            ("modules.embedding", &self.modules.embedding),
            ("stages.attention_out", attention_out),
            ("stages.mlp_down", mlp_down),
            ("experts.router", router),
            ("experts.list", list),
            ("experts.down", down),
        ];
        let lists = [("stages.qkv", qkv), ("stages.mlp_up", mlp_up), ("experts.up", up)];
        let singles = singles.into_iter().filter_map(|(at, name)| Some((at, name.as_ref()?)));
        let listed =
            lists.into_iter().flat_map(|(at, names)| names.iter().flatten().map(move |n| (at, n)));
        for (at, name) in singles.chain(listed) {
            if name.is_empty() || name.starts_with('.') || name.ends_with('.') {
                return Err(format!(
                    "{at} is \"{name}\", expected the name of a module, without \".weight\""
                ));
            }
        }
        if let Some(name) = &self.mlp.activation {
            activation(name)?;
        }
        let dotted = |prefix: &&String| prefix.is_empty() || prefix.ends_with('.');
        if let Some(prefix) = self.modules.prefix.as_ref().filter(|prefix| !dotted(prefix)) {
            return Err(format!("modules.prefix is \"{prefix}\", expected \"{prefix}.\""));
        }
        let finite = [
            ("attention.scale", self.attention.scale),
            ("residual.multiplier", self.residual.multiplier),
            ("head.scale", self.head.scale),
        ];
        match finite.into_iter().find(|(_, x)| x.is_some_and(|x| !x.is_finite())) {
            Some((at, _)) => Err(format!("{at} must be a finite number")),
            None => Ok(()),
        }
    }

    /// Changes what the table says.
    pub(super) fn apply(&self, spec: &mut Spec) -> Checked<()> {
        self.apply_modules(spec)?;
        self.apply_norms(spec)?;
        self.apply_attention(spec)?;
        let Stages { mlp_up, mlp_down, transposed, .. } = &self.stages;
        spec.mlp = self.mlp_form(spec.mlp, mlp_up.as_deref(), mlp_down.as_deref(), "stages")?;
        set(&mut spec.conv1d, transposed.as_ref());
        self.apply_experts(spec)?;
        set(&mut spec.residual.parallel, self.residual.parallel.as_ref());
        set(&mut spec.residual.from_norm, self.residual.from_norm.as_ref());
        set_f32(&mut spec.residual.multiplier, self.residual.multiplier);
        set(&mut spec.head.tied, self.head.tied.as_ref());
        set(&mut spec.head.bias, self.head.bias.as_ref());
        set_f32(&mut spec.head.scale, self.head.scale);
        self.check_distances(spec)
    }

    fn apply_modules(&self, spec: &mut Spec) -> Checked<()> {
        let m = &self.modules;
        set(&mut spec.base, m.prefix.as_ref());
        set_name(&mut spec.blocks, m.blocks.as_deref());
        set_name(&mut spec.embedding.name, m.embedding.as_deref());
        set_optional(&mut spec.embedding.norm, m.embedding_norm.as_deref());
        set_optional(&mut spec.head.norm, m.final_norm.as_deref());
        set_optional(&mut spec.head.name, m.head.as_deref());
        let base = &self.base;
        let lacks = |at: &str| format!("{at} is given, but base {base} has no such part");
        if let Some(name) = m.positions.as_deref().filter(|name| !name.is_empty()) {
            match &mut spec.positions {
                Positions::Learned { name: old, .. } => *old = keep(name),
                Positions::Rotary(_) | Positions::Alibi { .. } | Positions::None => {
                    return Err(lacks("modules.positions"));
                }
            }
        }
        if let Some(name) = m.token_types.as_deref() {
            let types =
                spec.embedding.types.as_mut().ok_or_else(|| lacks("modules.token_types"))?;
            types.0 = keep(name);
        }
        // Whether there is a projection is decided by the sizes in the config.
        let projections = [
            (&mut spec.embedding.project_in, &m.project_in),
            (&mut spec.head.project_out, &m.project_out),
        ];
        for (old, name) in projections {
            if let (Some(old), Some(name)) = (old, name) {
                *old = keep(name);
            }
        }
        Ok(())
    }

    fn apply_norms(&self, spec: &mut Spec) -> Checked<()> {
        let n = &self.norms;
        let old = spec.norm;
        let change = |norm: &mut NormSpec| {
            if let Some(kind) = n.kind {
                norm.kind = match kind {
                    NormName::Rms => NormKind::Rms,
                    NormName::RmsPlusOne => NormKind::RmsPlusOne,
                    NormName::Layer => NormKind::Layer,
                };
            }
            set(&mut norm.weight, n.weight.as_ref());
            set(&mut norm.bias, n.bias.as_ref());
        };
        change(&mut spec.norm);
        let (attention, mlp) = (&mut spec.residual.attention, &mut spec.residual.mlp);
        set_optional(&mut attention.before, n.before_attention.as_deref());
        set_optional(&mut attention.after, n.after_attention.as_deref());
        set_optional(&mut attention.stream, n.stream_attention.as_deref());
        set_optional(&mut mlp.before, n.before_mlp.as_deref());
        set_optional(&mut mlp.after, n.after_mlp.as_deref());
        set_optional(&mut mlp.stream, n.stream_mlp.as_deref());
        let qk = &mut spec.attention.qk_norm;
        // Those of queries and keys follow the others where the base has them alike.
        if let Some(qk) = qk.as_mut().filter(|qk| qk.norm == old) {
            change(&mut qk.norm);
        }
        match (n.queries.as_deref(), n.keys.as_deref()) {
            (None, None) => {}
            (Some(""), Some("")) => *qk = None,
            (Some(q), Some(k)) if !q.is_empty() && !k.is_empty() => {
                let (norm, over) = qk.map_or((spec.norm, NormOver::Head), |qk| (qk.norm, qk.over));
                *qk = Some(QkNorm { q: keep(q), k: keep(k), norm, over });
            }
            _ => return Err("norms.queries and norms.keys go together".to_owned()),
        }
        if let (Some(over), Some(qk)) = (n.over, qk) {
            qk.over = match over {
                OverName::Row => NormOver::Row,
                OverName::Head => NormOver::Head,
                OverName::OwnHead => NormOver::OwnHead,
                OverName::ListedHead => NormOver::ListedHead,
            };
        }
        Ok(())
    }

    fn apply_attention(&self, spec: &mut Spec) -> Checked<()> {
        let (a, attention) = (&self.attention, &mut spec.attention);
        set(&mut attention.qkv_bias, a.qkv_bias.as_ref());
        set(&mut attention.out_bias, a.out_bias.as_ref());
        set(&mut attention.causal, a.causal.as_ref());
        set_f32(&mut attention.scale, a.scale);
        set_name(&mut attention.out, self.stages.attention_out.as_deref());
        let old = match attention.qkv {
            Qkv::Separate { .. } => None,
            Qkv::Fused { order, .. } => Some(order),
        };
        let order = match a.fused_order {
            Some(OrderName::Concat) => Some(FusedOrder::Concat),
            Some(OrderName::Grouped) => Some(FusedOrder::Grouped),
            Some(OrderName::FourDevices) => {
                if !attention.heads.is_multiple_of(4) || attention.heads != attention.kv_heads {
                    return Err("attention.fused_order = \"four_devices\" needs a multiple of 4 \
                                heads, and as many key heads"
                        .to_owned());
                }
                Some(FusedOrder::Devices { parts: 4 })
            }
            None => old,
        };
        match self.stages.qkv.as_deref() {
            Some([q, k, v]) => {
                attention.qkv = Qkv::Separate { q: keep(q), k: keep(k), v: keep(v) };
            }
            Some([name]) => {
                let order = order.ok_or(
                    "stages.qkv is one linear: attention.fused_order must say how its outputs are ordered",
                )?;
                attention.qkv = Qkv::Fused { name: keep(name), order };
            }
            _ => {
                if let (Qkv::Fused { order: old, .. }, Some(order)) = (&mut attention.qkv, order) {
                    *old = order;
                }
            }
        }
        if let (Some(style), Positions::Rotary(ropes)) = (a.rope, &mut spec.positions) {
            for rope in ropes {
                rope.style = match style {
                    RopeName::Half => RopeStyle::Half,
                    RopeName::Interleaved => RopeStyle::Interleaved,
                };
            }
        }
        Ok(())
    }

    /// What goes together with distances between tokens.
    fn check_distances(&self, spec: &Spec) -> Checked<()> {
        let Attention { relative, causal, qkv, qk_norm, .. } = &spec.attention;
        let base = &self.base;
        let plain = !causal && qk_norm.is_none() && matches!(qkv, Qkv::Separate { .. });
        if relative.is_some() && !plain {
            return Err(format!(
                "base {base} has scores of distances: it needs three linears in stages.qkv, no norms.queries and \
                 norms.keys, and attention.causal = false"
            ));
        }
        if spec.residual.convolution.is_some() && spec.residual.parallel {
            return Err(format!(
                "base {base} has a convolution: it needs residual.parallel = false"
            ));
        }
        Ok(())
    }

    fn apply_experts(&self, spec: &mut Spec) -> Checked<()> {
        let e = &self.experts;
        let Some(moe) = &mut spec.moe else {
            return if *e == Experts::default() {
                Ok(())
            } else {
                Err(format!("[experts] is given, but base {} has none", self.base))
            };
        };
        set_name(&mut moe.router, e.router.as_deref());
        set_name(&mut moe.experts, e.list.as_deref());
        set(&mut moe.renormalize, e.renormalize.as_ref());
        moe.expert = self.mlp_form(moe.expert, e.up.as_deref(), e.down.as_deref(), "experts")?;
        Ok(())
    }

    /// An MLP with what `[mlp]` and the names of its linears say.
    fn mlp_form(
        &self,
        old: Mlp,
        up_names: Option<&[String]>,
        down_name: Option<&str>,
        section: &str,
    ) -> Checked<Mlp> {
        let (old_gated, old_names, mut down, width, mut act, mut bias) = match old {
            Mlp::Gated { gate_up, down, width, activation, bias } => {
                let names = match gate_up {
                    GateUp::Separate { gate, up } => vec![gate, up],
                    GateUp::Fused(name) => vec![name],
                };
                (true, names, down, width, activation, bias)
            }
            Mlp::Plain { up, down, width, activation, bias } => {
                (false, vec![up], down, width, activation, bias)
            }
        };
        let gated = self.mlp.gated.unwrap_or(old_gated);
        let names = up_names.map_or(old_names, |names| names.iter().map(|n| keep(n)).collect());
        set_name(&mut down, down_name);
        set(&mut bias, self.mlp.bias.as_ref());
        if let Some(name) = &self.mlp.activation {
            act = activation(name)?;
        }
        let activation = act;
        Ok(match (gated, names.as_slice()) {
            (true, &[gate, up]) => {
                let gate_up = GateUp::Separate { gate, up };
                Mlp::Gated { gate_up, down, width, activation, bias }
            }
            (true, &[name]) => {
                Mlp::Gated { gate_up: GateUp::Fused(name), down, width, activation, bias }
            }
            (false, &[up]) => Mlp::Plain { up, down, width, activation, bias },
            _ => {
                return Err(format!(
                    "{section} names {} linears before an MLP's activation that is {}",
                    names.len(),
                    if gated { "gated" } else { "not gated (mlp.gated)" }
                ));
            }
        })
    }
}

fn activation(name: &str) -> Checked<Activation> {
    Activation::from_name(name).ok_or_else(|| {
        format!(
            "mlp.activation is \"{name}\", expected silu, gelu, gelu_pytorch_tanh, quick_gelu, relu, relu2 or tanh"
        )
    })
}

/// A name that lives as long as the process, as those of the built-in families do: a process reads one table.
fn keep(name: &str) -> &'static str {
    Box::leak(name.to_owned().into_boxed_str())
}

fn set<T: Clone>(old: &mut T, new: Option<&T>) {
    if let Some(new) = new {
        *old = new.clone();
    }
}

fn set_f32(old: &mut f32, new: Option<f64>) {
    set(old, new.map(|x| x as f32).as_ref());
}

fn set_name(old: &mut &'static str, new: Option<&str>) {
    if let Some(new) = new {
        *old = keep(new);
    }
}

fn set_optional(old: &mut Option<&'static str>, new: Option<&str>) {
    if let Some(new) = new {
        *old = (!new.is_empty()).then(|| keep(new));
    }
}
