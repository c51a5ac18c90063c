//! Gradients of the blocks of every fixture against differences of its own forward pass.

#![allow(clippy::print_stdout, reason = "what was tested is what a reader of a failure wants")]

mod common;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use common::open;
use gptq_compute::{
    Activation, DenseMatrix, LayerKv, Linear, Matrix, NormGradient, Pool, Tensor, weight_gradient,
};
use gptq_format::Config;
use gptq_model::spec::{Attention, Mlp};
use gptq_model::{
    Block, BlockState, Ctx, FAMILIES, Gradients, LinearSource, ModelError, NormPlace, SeqSpan,
    Spec, Stage,
};
use gptq_testkit::{Rng, fixtures, models_with_head_norms};

/// Two sequences, one longer than the fixtures' sliding windows (8) and the lengths at which their frequencies change (16).
const WINDOWS: [Range<usize>; 2] = [0..19, 19..24];
/// How far the slope along a direction may be from the gradient's, relative to the product of their lengths. Differences of
/// f32 passes have an error of up to 5e-3 of that; a factor of 1.02 too much in one term is seen.
const TOLERANCE: f64 = 6e-3;
/// Inputs that are tried until none of the steps changes a token's experts.
const INPUTS: u64 = 100;
/// Shorter gradients are compared as if they were this long: that of a bias of keys is zero where nothing rotates.
const SHORTEST: f64 = 3.0;

/// All gradients of a block.
#[derive(Default)]
struct Kept {
    weights: HashMap<(Stage, usize), Vec<f32>>,
    biases: HashMap<(Stage, usize), Vec<f32>>,
    norms: HashMap<NormPlace, Vec<NormGradient>>,
}

impl Gradients for Kept {
    fn linear(&mut self, ctx: &Ctx, stage: Stage, index: usize, x: &Tensor, dy: &Tensor) {
        let mut dw = Tensor::default();
        weight_gradient(&ctx.pool, dy, x, &mut dw);
        let mut bias = vec![0.0; dy.cols()];
        for row in 0..dy.rows() {
            bias.iter_mut().zip(dy.row(row)).for_each(|(sum, dy)| *sum += dy);
        }
        assert!(self.weights.insert((stage, index), dw.as_slice().to_vec()).is_none());
        self.biases.insert((stage, index), bias);
    }

    fn norms(&mut self, place: NormPlace, gradients: Vec<NormGradient>) {
        assert!(self.norms.insert(place, gradients).is_none(), "{place:?} twice");
    }
}

/// Which rows each stage had, where not all.
type Routes = Vec<Option<Vec<u32>>>;

/// A block's output is multiplied with `dy`, and that is what gradients are of.
struct Probe<'a> {
    ctx: Ctx,
    spec: &'a Spec,
    windows: &'a [Range<usize>],
    input: Vec<f32>,
    dy: Vec<f32>,
    routes: Routes,
}

impl<'a> Probe<'a> {
    fn new(rng: &mut Rng, spec: &'a Spec, block: &Block, windows: &'a [Range<usize>]) -> Self {
        let ctx = Ctx::new(Arc::new(Pool::new(2)));
        let count = windows.last().unwrap().end * spec.hidden;
        let (input, dy) = (rng.normals(count, 1.0), rng.normals(count, 1.0));
        let mut probe = Self { ctx, spec, windows, input, dy, routes: Vec::new() };
        probe.routes = probe.output(block, &probe.input.clone()).1;
        probe
    }

    fn tensor(&self, x: &[f32]) -> Tensor {
        Tensor::from_vec(x.len() / self.spec.hidden, self.spec.hidden, x.to_vec())
    }

    fn output(&mut self, block: &Block, input: &[f32]) -> (Vec<f32>, Routes) {
        let mut state = BlockState::new(self.tensor(input));
        let Attention { kv_heads, head_dim, .. } = self.spec.attention;
        let mut caches: Vec<LayerKv> =
            self.windows.iter().map(|_| LayerKv::new(kv_heads, head_dim)).collect();
        let spans = self.windows.iter().cloned().zip(&mut caches);
        let mut seqs: Vec<SeqSpan<'_>> = spans.map(|(rows, kv)| SeqSpan { rows, kv }).collect();
        block.begin(&mut self.ctx, &mut state);
        let run = |&stage: &Stage| {
            let rows = state.routed_rows(stage);
            block.run_stage(&mut self.ctx, stage, &mut state, &mut seqs).unwrap();
            rows
        };
        let routes = block.stages().iter().map(run).collect();
        (state.hidden.as_slice().to_vec(), routes)
    }

    fn gradients(&mut self, block: &Block) -> (Tensor, Kept) {
        let mut state = BlockState::new(self.tensor(&self.input));
        let trace = block.trace(&mut self.ctx, &mut state, self.windows).unwrap();
        let mut kept = Kept::default();
        let dy = self.tensor(&self.dy);
        (block.backward(&mut self.ctx, &trace, dy, &mut kept).unwrap(), kept)
    }

    /// `None` if a token goes to other experts than before.
    fn loss_of(&mut self, block: &Block, input: &[f32]) -> Option<f64> {
        let (out, routes) = self.output(block, input);
        (routes == self.routes).then(|| dot(&out, &self.dy))
    }

    fn loss(&mut self, block: &Block) -> Option<f64> {
        let input = std::mem::take(&mut self.input);
        let loss = self.loss_of(block, &input);
        self.input = input;
        loss
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Compares the slopes of `loss` around `x` along the gradient and along two random directions with those that `gradient`
/// tells; `None` where `loss` has none.
fn check(
    what: &str,
    rng: &mut Rng,
    x: &[f32],
    gradient: &[f32],
    mut loss: impl FnMut(&[f32]) -> Option<f64>,
) -> Option<()> {
    let length = dot(gradient, gradient).sqrt();
    // Biases of keys and nothing else.
    assert!(length > SHORTEST || what.contains("bias"), "{what}: a gradient of {length}");
    let size = (dot(x, x) / x.len() as f64).sqrt().max(0.3);
    let along: Vec<f32> =
        gradient.iter().map(|g| (f64::from(*g) / length.max(1e-30)) as f32).collect();
    for direction in [along, rng.normals(x.len(), 1.0), rng.normals(x.len(), 1.0)] {
        let norm = dot(&direction, &direction).sqrt();
        // A step that moves x by a thousandth of its length; of vectors a larger one, so that the outputs change by more than
        // their rounding.
        let share = if x.len() < 512 { 4e-3 } else { 1e-3 };
        let step = share * size * (x.len() as f64).sqrt() / norm.max(1e-30);
        let mut slope = |step: f64| {
            let moved = |sign: f64| -> Vec<f32> {
                let pairs = x.iter().zip(&direction);
                pairs.map(|(x, d)| x + (sign * step * f64::from(*d)) as f32).collect()
            };
            Some((loss(&moved(1.0))? - loss(&moved(-1.0))?) / (2.0 * step))
        };
        // Of two steps, without the error that grows with their square.
        let slope = (4.0 * slope(step / 2.0)? - slope(step)?) / 3.0;
        let want = dot(gradient, &direction);
        let error = (slope - want).abs() / (length.max(SHORTEST) * norm);
        assert!(error < TOLERANCE, "{what}: {slope:e}, gradient {want:e}, error {error:e}");
    }
    Some(())
}

/// Compares all gradients; `None` if a token changed its experts on the way, where there is no slope.
fn check_block(name: &str, seed: u64, spec: &Spec, block: &mut Block) -> Option<()> {
    let rng = &mut Rng::new(seed);
    let mut probe = Probe::new(rng, spec, block, &WINDOWS);
    let (dx, kept) = probe.gradients(block);
    check_input(name, rng, &mut probe, block, &dx)?;
    for (at, stage) in block.stages().to_vec().into_iter().enumerate() {
        let count = block.linear_specs(stage).len();
        for index in 0..count {
            let what = block.linear_specs(stage).nth(index).unwrap().name.clone();
            let linear = block.linear(stage, index).unwrap().clone();
            let Matrix::Dense(weight) = &linear.weight else { panic!("{name}: codes") };
            let (out, inputs) = (weight.out_features(), weight.in_features());
            let Some(gradient) = kept.weights.get(&(stage, index)) else {
                assert_eq!(probe.routes[at], Some(Vec::new()), "{name}: {what}");
                continue;
            };
            let mut set = |weight: &[f32], bias: Option<&[f32]>| {
                let weight = Matrix::Dense(DenseMatrix::from_f32(out, inputs, weight.to_vec()));
                let changed = Linear { weight, bias: bias.map(<[f32]>::to_vec) };
                block.set_linear(stage, index, changed).unwrap();
                probe.loss(block)
            };
            let floats = weight.to_f32();
            let bias = linear.bias.as_deref();
            let title = format!("{name}: {what}.weight");
            check(&title, rng, &floats, gradient, |weight| set(weight, bias))?;
            if let Some(bias) = bias {
                let gradient = &kept.biases[&(stage, index)];
                let title = format!("{name}: {what}.bias");
                check(&title, rng, bias, gradient, |bias| set(&floats, Some(bias)))?;
            }
            block.set_linear(stage, index, linear.clone()).unwrap();
        }
    }
    for place in NormPlace::ALL {
        let names = spec.norm_names(block.layer(), place);
        assert_eq!(names.is_empty(), block.norms(place).is_empty(), "{name}: {place:?}");
        check_norms(name, rng, &mut probe, block, place, &kept)?;
    }
    Some(())
}

fn check_input(
    name: &str,
    rng: &mut Rng,
    probe: &mut Probe<'_>,
    block: &Block,
    dx: &Tensor,
) -> Option<()> {
    let input = probe.input.clone();
    let title = format!("{name}: input");
    check(&title, rng, &input, dx.as_slice(), |input| probe.loss_of(block, input))
}

fn check_norms(
    name: &str,
    rng: &mut Rng,
    probe: &mut Probe<'_>,
    block: &mut Block,
    place: NormPlace,
    kept: &Kept,
) -> Option<()> {
    let count = block.norms(place).len();
    assert_eq!(count, kept.norms.get(&place).map_or(0, Vec::len), "{name}: {place:?}");
    for index in 0..count {
        let title = |part| format!("{name}: {place:?} {index} {part}");
        let norm = block.norms(place)[index].clone();
        let NormGradient { weight: of_weight, bias: of_bias } = &kept.norms[&place][index];
        if let Some(weight) = &norm.weight {
            check(&title("weight"), rng, weight, of_weight, |weight| {
                block.norms_mut(place)[index].weight = Some(weight.to_vec());
                probe.loss(block)
            })?;
        }
        block.norms_mut(place)[index] = norm.clone();
        if let Some(bias) = &norm.bias {
            check(&title("bias"), rng, bias, of_bias, |bias| {
                block.norms_mut(place)[index].bias = Some(bias.to_vec());
                probe.loss(block)
            })?;
        }
        block.norms_mut(place)[index] = norm;
    }
    Some(())
}

/// Two tokens leave experts without any: the first of them, and the last.
fn check_idle_experts(name: &str, spec: &Spec, block: &mut Block) {
    let windows = [Range { start: 0, end: 2 }];
    let stages = block.stages();
    let experts = stages.iter().filter(|stage| stage.expert().is_some()).count();
    for idle in [2, 2 + experts - 2] {
        let checked = (0..INPUTS).any(|seed| {
            let rng = &mut Rng::new(seed);
            let mut probe = Probe::new(rng, spec, block, &windows);
            if probe.routes[idle] != Some(Vec::new()) {
                return false;
            }
            let (dx, kept) = probe.gradients(block);
            let name = format!("{name}, expert of stage {idle} idle");
            check_input(&name, rng, &mut probe, block, &dx)
                .and_then(|()| {
                    let place = NormPlace::MlpBefore;
                    check_norms(&name, rng, &mut probe, block, place, &kept)
                })
                .is_some()
        });
        assert!(checked, "{name}: stage {idle}");
    }
}

/// Whether blocks of this fixture have gradients.
fn check_fixture(name: &str, dir: &Path) -> bool {
    let checkpoint = open(dir);
    let mut spec = Spec::for_checkpoint(&checkpoint).unwrap();
    if let Mlp::Plain { activation: activation @ Activation::Relu, .. } = &mut spec.mlp {
        // A difference across its corner is no slope; its derivative has a test of its own.
        *activation = Activation::GeluTanh;
    }
    let spec = Arc::new(spec);
    for layer in 0..spec.layer_count() {
        if let Err(error) = spec.check_gradients(layer) {
            assert!(matches!(error, ModelError::NoGradient { .. }), "{name}: {error}");
            return false;
        }
        let checked = (7..7 + INPUTS).any(|seed| {
            let mut block = Block::load(&checkpoint, &spec, layer, LinearSource::Copied).unwrap();
            check_block(&format!("{name} block {layer}"), seed, &spec, &mut block).is_some()
        });
        assert!(checked, "{name} block {layer}: tokens change their experts");
        if spec.moe(layer).is_some() {
            let mut block = Block::load(&checkpoint, &spec, layer, LinearSource::Copied).unwrap();
            check_idle_experts(&format!("{name} block {layer}"), &spec, &mut block);
        }
    }
    true
}

#[test]
fn blocks_of_every_family_change_as_their_gradients_say() {
    let (mut tested, mut without, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    let folder = tempfile::tempdir().unwrap();
    for (name, dir) in fixtures::all().into_iter().chain(models_with_head_norms(folder.path())) {
        let config = Config::load(&dir.join("config.json")).unwrap();
        let model_type = config.str("model_type").unwrap();
        let known = FAMILIES.iter().any(|family| family.model_type == model_type);
        // Adapters' directories have no model; quantized ones have codes.
        if !known || name.starts_with("lora") || name.starts_with("llama_q_") {
            continue;
        }
        match std::panic::catch_unwind(|| check_fixture(&name, &dir)) {
            Ok(true) => tested.push(name),
            Ok(false) => without.push(name),
            Err(_) => failed.push(name),
        }
    }
    println!("{} fixtures: {}", tested.len(), tested.join(", "));
    println!("without gradients: {}", without.join(", "));
    let known = ["deberta_v2", "deberta_v2_own"];
    assert!(without.iter().all(|name| known.contains(&name.as_str())), "{without:?}");
    assert!(tested.len() + failed.len() >= 20 || fixtures::all().is_empty(), "{tested:?}");
    assert!(failed.is_empty(), "failed: {}", failed.join(", "));
}
