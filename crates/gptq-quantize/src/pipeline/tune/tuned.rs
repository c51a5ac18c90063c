//! What of a block is tuned: every scale and norm weight times a factor near 1, which Adam (Kingma & Ba 2015) moves.

use std::collections::HashMap;

use gptq_compute::{Linear, Matrix, NormGradient, Pool, Steps, Tensor, weight_gradient};
use gptq_format::{Bits, DType, GptqLinear};
use gptq_model::{Block, Ctx, Gradients, NormPlace, Stage};
use half::{bf16, f16};

use crate::error::Result;
use crate::pipeline::layout::Copied;
use crate::pipeline::output::halves;

/// Length of the first steps of a scale, times 2^bits: the most that its factor changes in one. The errors that it makes up
/// for are as small as the grid is fine.
const RATE: f32 = 0.04;
/// Adam's decay of the mean of gradients and of the mean of their squares. Shorter than usual: there are some dozens of steps.
const DECAY: [f32; 2] = [0.9, 0.95];

/// Factors near 1, as their distance from it, on their way along a gradient.
pub(super) struct Factors {
    moved: Vec<f32>,
    gradient: Vec<f32>,
    /// Means of the gradients and of their squares.
    means: [Vec<f32>; 2],
}

impl Factors {
    pub(super) fn new(count: usize) -> Self {
        let zeros = || vec![0.0; count];
        Self { moved: zeros(), gradient: zeros(), means: [zeros(), zeros()] }
    }

    /// Step number `step`, from 0, of Adam.
    fn step(&mut self, step: usize, rate: f32) {
        let [first, second] = DECAY.map(|decay| 1.0 - decay.powi(step as i32 + 1));
        let [means, squares] = &mut self.means;
        for (i, gradient) in self.gradient.iter_mut().enumerate() {
            means[i] += (1.0 - DECAY[0]) * (*gradient - means[i]);
            squares[i] += (1.0 - DECAY[1]) * (*gradient * *gradient - squares[i]);
            let spread = (squares[i] / second).sqrt();
            if spread > 0.0 {
                self.moved[i] -= rate * (means[i] / first) / spread;
            }
            *gradient = 0.0;
        }
    }

    fn factor(&self, index: usize) -> f32 {
        1.0 + self.moved[index]
    }
}

/// A linear whose scales are tuned.
pub(super) struct TunedLinear {
    pub(super) stage: Stage,
    pub(super) index: usize,
    pub(super) module: String,
    pub(super) packed: GptqLinear,
    steps: Steps,
    /// Of the scales `[groups, out]`.
    factors: Factors,
}

impl TunedLinear {
    pub(super) fn new(
        stage: Stage,
        index: usize,
        module: String,
        packed: GptqLinear,
    ) -> Result<Self> {
        let steps = Steps::new(&packed.codes()?, &packed.zeros, &packed.g_idx, packed.groups);
        let factors = Factors::new(packed.scales.len());
        Ok(Self { stage, index, module, packed, steps, factors })
    }

    /// The scales as they would be saved.
    pub(super) fn scales(&self) -> Vec<f16> {
        let scales = self.packed.scales.iter().enumerate();
        scales.map(|(i, scale)| f16::from_f32(scale.to_f32() * self.factors.factor(i))).collect()
    }

    /// The linear with these scales, as floats.
    fn linear(&self, pool: &Pool) -> Linear {
        let scales: Vec<f32> = self.scales().into_iter().map(f16::to_f32).collect();
        let weight = Matrix::Dense(self.steps.weights(pool, &scales));
        Linear { weight, bias: self.packed.bias.clone() }
    }

    /// Adds the gradient of the factors: a weight is step · scale · factor.
    fn add_gradient(&mut self, pool: &Pool, of_weights: &Tensor) {
        let mut of_scales = vec![0.0; self.packed.scales.len()];
        self.steps.add_gradient(pool, of_weights, &mut of_scales);
        for (i, of_scale) in of_scales.into_iter().enumerate() {
            self.factors.gradient[i] += self.packed.scales[i].to_f32() * of_scale;
        }
    }
}

/// The norms at one place, whose weights are tuned.
pub(super) struct TunedNorms {
    pub(super) place: NormPlace,
    /// The tensors of the weights, and their type.
    pub(super) tensors: Vec<Copied>,
    pub(super) dtype: DType,
    /// The weights as they are stored, one behind the other, and what is added to them in use.
    pub(super) weight: Vec<f32>,
    pub(super) plus: f32,
    pub(super) factors: Factors,
}

impl TunedNorms {
    fn weight(&self) -> Vec<f32> {
        let weights = self.weight.iter().enumerate();
        weights.map(|(i, w)| (w + self.plus) * self.factors.factor(i) - self.plus).collect()
    }

    /// The weights as they are saved, and their bytes.
    pub(super) fn stored(&self) -> (Vec<f32>, Vec<u8>) {
        let weight = self.weight();
        let bytes = halves(self.dtype, &weight);
        let stored = weight.into_iter().map(|x| match self.dtype {
            DType::BF16 => bf16::from_f32(x).to_f32(),
            _ => f16::from_f32(x).to_f32(),
        });
        (stored.collect(), bytes)
    }

    fn add_gradient(&mut self, of_norms: &[NormGradient]) {
        for (i, dw) in of_norms.iter().flat_map(|norm| &norm.weight).enumerate() {
            self.factors.gradient[i] += (self.weight[i] + self.plus) * dw;
        }
    }
}

/// Everything of a block that is tuned.
pub(super) struct Tuned {
    pub(super) linears: Vec<TunedLinear>,
    pub(super) norms: Vec<TunedNorms>,
    /// Place of each linear in the list.
    pub(super) places: HashMap<(Stage, usize), usize>,
}

impl Gradients for Tuned {
    fn linear(&mut self, ctx: &Ctx, stage: Stage, index: usize, x: &Tensor, dy: &Tensor) {
        if let Some(&place) = self.places.get(&(stage, index)) {
            let mut of_weights = Tensor::default();
            weight_gradient(&ctx.pool, dy, x, &mut of_weights);
            self.linears[place].add_gradient(&ctx.pool, &of_weights);
        }
    }

    fn norms(&mut self, place: NormPlace, gradients: Vec<NormGradient>) {
        if let Some(norms) = self.norms.iter_mut().find(|norms| norms.place == place) {
            norms.add_gradient(&gradients);
        }
    }
}

impl Tuned {
    /// Puts linears and norms as they are now into the block.
    pub(super) fn set(&self, pool: &Pool, block: &mut Block) -> Result<()> {
        for tuned in &self.linears {
            block.set_linear(tuned.stage, tuned.index, tuned.linear(pool))?;
        }
        for tuned in &self.norms {
            set_norms(block, tuned.place, &tuned.weight());
        }
        Ok(())
    }

    /// Step number `step` of `steps`; norms go with the coarsest of the linears.
    pub(super) fn step(&mut self, step: usize, steps: usize) {
        let coarsest = self.linears.iter().map(|tuned| tuned.packed.bits).min();
        for tuned in &mut self.linears {
            tuned.factors.step(step, rate(tuned.packed.bits, step, steps));
        }
        for tuned in &mut self.norms {
            tuned.factors.step(step, rate(coarsest.unwrap_or(Bits::B8), step, steps));
        }
    }
}

/// Replaces the weights of the norms at `place`, which are equally long.
pub(super) fn set_norms(block: &mut Block, place: NormPlace, weight: &[f32]) {
    let norms = block.norms_mut(place);
    let width = weight.len() / norms.len().max(1);
    for (norm, weight) in norms.iter_mut().zip(weight.chunks_exact(width.max(1))) {
        norm.weight = Some(weight.to_vec());
    }
}

/// The length of step `step` of `steps` at so many bits: half a cosine, down to nothing.
fn rate(bits: Bits, step: usize, steps: usize) -> f32 {
    let done = step as f32 / steps.max(1) as f32;
    let first = RATE / (1u32 << bits.as_u32()) as f32;
    first * 0.5 * (1.0 + (std::f32::consts::PI * done).cos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adam_finds_the_bottom_of_a_bowl() {
        // f(x) = a (x - b)², of very different steepness.
        let bowls = [(1.0f32, 0.05f32), (1e4, -0.03), (1e-4, 0.02), (0.0, 0.0)];
        let mut factors = Factors::new(bowls.len());
        let steps = 60;
        for step in 0..steps {
            for (i, (a, b)) in bowls.iter().enumerate() {
                factors.gradient[i] = 2.0 * a * (factors.moved[i] - b);
            }
            factors.step(step, rate(Bits::B2, step, steps));
        }
        for (i, (_, b)) in bowls.iter().enumerate() {
            assert!((factors.moved[i] - b).abs() < 2e-3, "{:?}", factors.moved);
        }
        assert_eq!(factors.gradient, [0.0; 4]);
    }

    #[test]
    fn a_linear_is_tuned_from_its_saved_weights_on() {
        let (inputs, outputs) = (16, 8);
        let codes: Vec<u8> = (0..inputs * outputs).map(|i| (i * 7 % 16) as u8).collect();
        let scale = |i: usize| f16::from_f32((i * 37 % 19) as f32 / 7.0 - 1.2);
        let scales: Vec<f16> = (0..2 * outputs).map(scale).collect();
        let zeros: Vec<u8> = (0..2 * outputs).map(|i| (i % 15 + 1) as u8).collect();
        let g_idx: Vec<u32> = (0..inputs).map(|k| (k / 3 % 2) as u32).collect();
        let shape = [inputs, outputs];
        let packed =
            GptqLinear::from_codes(Bits::B4, shape, &codes, scales, zeros, g_idx, None).unwrap();
        let mut tuned = TunedLinear::new(Stage::Qkv, 0, String::new(), packed.clone()).unwrap();
        let pool = Pool::new(2);
        let weights = |tuned: &TunedLinear| match tuned.linear(&pool).weight {
            Matrix::Dense(weight) => weight.to_f32(),
            Matrix::Quantized(_) => panic!("codes"),
        };
        assert_eq!(weights(&tuned), packed.dequantize());
        // The gradient of half the sum of all squared weights by a factor of 1: that sum over its group.
        let dw = Tensor::from_vec(outputs, inputs, packed.dequantize());
        tuned.add_gradient(&pool, &dw);
        for (at, got) in tuned.factors.gradient.iter().enumerate() {
            let (g, n) = (at / outputs, at % outputs);
            let group = (0..inputs).filter(|&k| packed.g_idx[k] as usize == g);
            let want: f64 = group.map(|k| f64::from(dw.row(n)[k]).powi(2)).sum();
            assert!((f64::from(*got) - want).abs() < 1e-4 * (1.0 + want), "{got} {want}");
        }
        // A factor moves its group of one output alone, by what f16 keeps of it.
        tuned.factors.moved[3] = 0.5;
        let moved = weights(&tuned);
        for (i, (new, old)) in moved.iter().zip(packed.dequantize()).enumerate() {
            let own = i / inputs == 3 && packed.g_idx[i % inputs] == 0;
            let want = if own { 1.5 * old } else { old };
            assert!((new - want).abs() <= 1e-3 * want.abs(), "{i}: {new} {want}");
        }
    }
}
