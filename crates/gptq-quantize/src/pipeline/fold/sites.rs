//! Where the scales of a stage's inputs can be taken out again without a trace: tensors before the
//! stage whose outputs are its inputs, channel by channel.

use gptq_compute::Activation;
use gptq_model::spec::{GateUp, Mlp, Qkv};
use gptq_model::{Part, Spec, Stage};

/// Stages with one input, and what comes before it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Site {
    pub(super) stages: Vec<Stage>,
    pub(super) source: Source,
}

/// What takes the inverse of the scales.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Source {
    /// Weight and bias of a norm, by its full name.
    Norm(String),
    /// Outputs of a linear.
    Rows(Rows),
    /// Nothing does, and why.
    Nothing(&'static str),
}

/// Outputs of a linear that become inputs of a later stage.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rows {
    pub(super) stage: Stage,
    /// Index of the linear in its stage.
    pub(super) index: usize,
    /// Channel of each input of the later stage; several inputs may share one.
    pub(super) channels: Vec<usize>,
    /// Output of the linear that makes each channel.
    pub(super) outputs: Vec<usize>,
    /// A channel divided by s comes of an output divided by s to this power.
    pub(super) power: f64,
}

/// The sites of block `layer`. Together they have all its stages.
pub(super) fn sites(spec: &Spec, layer: usize) -> Vec<Site> {
    let norms = &spec.residual;
    let attention = norms.attention.before.filter(|_| !spec.layers[layer].bare);
    let shared = norms.parallel && norms.mlp.before.is_none_or(|mlp| Some(mlp) == attention);
    let norm = |name: Option<&str>| match name {
        None => Source::Nothing("no norm comes right before it"),
        Some(_) if norms.from_norm => {
            Source::Nothing("the residual stream goes on from the norm before it")
        }
        Some(_) if !spec.norm.weight => Source::Nothing("the norm before it has no weight"),
        Some(name) => Source::Norm(format!("{}.{name}", spec.block_name(layer))),
    };
    let distances = spec.attention.relative.is_some_and(|relative| !relative.shared().is_empty());
    let source = if distances {
        Source::Nothing("distances between tokens go through the same projections")
    } else {
        norm(attention)
    };
    let mut first = Site { stages: vec![Stage::Qkv], source };
    let mut sites = vec![Site { stages: vec![Stage::AttnOut], source: values(spec) }];
    for stage in spec.stage_order(layer) {
        match stage {
            Stage::Qkv | Stage::AttnOut => {}
            Stage::MlpUp(_) if spec.moe(layer).is_some() => {
                let source = Source::Nothing("the router of the experts reads the same norm");
                sites.push(Site { stages: vec![stage], source: source.clone() });
                if shared {
                    first.source = source;
                }
            }
            Stage::MlpUp(_) if shared => first.stages.push(stage),
            Stage::MlpUp(_) => {
                sites.push(Site { stages: vec![stage], source: norm(norms.mlp.before) });
            }
            Stage::MlpDown(part) => {
                sites.push(Site { stages: vec![stage], source: wide(spec, layer, part) });
            }
        }
    }
    sites.insert(0, first);
    sites
}

/// What makes the inputs of the attention's output projection: the values, whose weighted sums they are.
fn values(spec: &Spec) -> Source {
    let attention = &spec.attention;
    if attention.clip_qkv.is_some() {
        return Source::Nothing("the values before it are clamped");
    }
    let (width, per_head) = (attention.head_dim, attention.heads / attention.kv_heads.max(1));
    let channels = (0..attention.q_width())
        .map(|input| input / width / per_head.max(1) * width + input % width)
        .collect();
    let (index, outputs) = match attention.qkv {
        Qkv::Separate { .. } => (2, (0..attention.kv_width()).collect()),
        Qkv::Fused { order, .. } => {
            let runs = order.columns(attention).v.into_iter();
            (0, runs.flat_map(|(first, count)| first..first + count).collect())
        }
    };
    Source::Rows(Rows { stage: Stage::Qkv, index, channels, outputs, power: 1.0 })
}

/// What makes the inputs of the down projection of one part of the MLP.
fn wide(spec: &Spec, layer: usize, part: Part) -> Source {
    let mlp = match (part, spec.moe(layer)) {
        (Part::Dense, _) | (_, None) => &spec.mlp,
        (Part::Expert(_), Some(moe)) => &moe.expert,
        (Part::Shared, Some(moe)) => moe.shared.as_ref().map_or(&spec.mlp, |shared| &shared.mlp),
    };
    let (index, first, power) = match *mlp {
        Mlp::Gated { gate_up: GateUp::Separate { .. }, .. } => (1, 0, 1.0),
        Mlp::Gated { gate_up: GateUp::Fused(_), width, .. } => (0, width, 1.0),
        Mlp::Plain { activation: Activation::Relu, .. } => (0, 0, 1.0),
        Mlp::Plain { activation: Activation::ReluSquared, .. } => (0, 0, 0.5),
        Mlp::Plain { .. } => {
            return Source::Nothing("an activation that does not scale comes right before it");
        }
    };
    let width = mlp.width();
    Source::Rows(Rows {
        stage: Stage::MlpUp(part),
        index,
        channels: (0..width).collect(),
        outputs: (first..first + width).collect(),
        power,
    })
}
