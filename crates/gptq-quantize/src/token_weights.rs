//! How much each calibration token counts in a Hessian.
//!
//! GPTQ sums x xᵀ over the tokens, as if an error did the same harm in each. Two things that
//! transformers do make it otherwise:
//!
//! - The *attention sink* (Xiao et al. 2023): in a causal model most heads look at the first
//!   position more than at all others together. An error in its key or value reaches every later
//!   token, yet it is one token among thousands in the sum.
//! - *Massive activations* (Sun et al. 2024): no norm comes before the output projection of the
//!   attention and the down projection, and at a few positions the inputs of some down projections
//!   have 10⁵ times the energy of other tokens. They fill the Hessian and, through its mean
//!   diagonal, its damping; errors in all other tokens then cost nothing.

use std::ops::Range;

use gptq_compute::{Cross, Gram, Norm, NormKind, Pool, Tensor, add_scaled, norm};
use gptq_model::Stage;

/// What the first token of a window counts for in the inputs of a causal attention, as a share of
/// the tokens of that window. For SmolLM2-135M and windows of 2048 tokens, shares from 1/32 to 2 gave
/// about the same perplexity; 1/4 the best.
const SINK_SHARE: f32 = 0.25;

/// The weights of the tokens in the Hessians.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TokenWeights {
    /// All the same, as in the paper.
    Uniform,
    /// By the harm of an error: the first token of a window counts for a quarter of it where a
    /// causal attention reads it; inputs that no norm came before (of the output projection of the
    /// attention and of the down projection) count by direction, not by size.
    #[default]
    Balanced,
}

impl TokenWeights {
    /// Its name on the command line and in configs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Balanced => "balanced",
        }
    }

    /// How the rows of the inputs of `stage` are weighted. `causal`: no token sees those behind it.
    pub(crate) fn rows(self, stage: Stage, causal: bool) -> RowWeights {
        match (self, stage) {
            (Self::Balanced, Stage::Qkv) if causal => RowWeights::Sinks,
            (Self::Balanced, Stage::AttnOut | Stage::MlpDown(_)) => RowWeights::Directions,
            _ => RowWeights::Uniform,
        }
    }
}

/// How the rows of one stage's inputs are weighted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum RowWeights {
    /// All count once.
    #[default]
    Uniform,
    /// The first of a window counts for many.
    Sinks,
    /// All are scaled to the same size.
    Directions,
}

impl RowWeights {
    /// Adds the weighted xᵀx of `x` `[tokens, in]` to `gram`. `windows`: the rows of each window; `scaled`: a
    /// buffer.
    pub(crate) fn accumulate(
        self,
        gram: &mut Gram,
        pool: &Pool,
        x: &Tensor,
        windows: &[Range<usize>],
        scaled: &mut Tensor,
    ) {
        match self {
            Self::Uniform => gram.accumulate(pool, x),
            Self::Sinks => {
                gram.accumulate(pool, x);
                gram.emphasize(pool, &sinks(x, windows));
            }
            Self::Directions => {
                unit_rows(pool, x, scaled);
                gram.accumulate(pool, scaled);
            }
        }
    }

    /// Adds the weighted xᵀ(f - x) to `cross`, for x the inputs that [`RowWeights::accumulate`] sums up
    /// and f the same tokens' inputs in the float model, both `[tokens, in]`. f is overwritten.
    pub(crate) fn accumulate_shift(
        self,
        cross: &mut Cross,
        pool: &Pool,
        x: &Tensor,
        float: &mut Tensor,
        windows: &[Range<usize>],
    ) {
        let shift = float;
        add_scaled(pool, shift, x, -1.0);
        match self {
            Self::Uniform => cross.accumulate(pool, x, shift),
            Self::Sinks => {
                cross.accumulate(pool, x, shift);
                cross.emphasize(pool, &sinks(x, windows), &sinks(shift, windows));
            }
            Self::Directions => {
                for row in 0..x.rows() {
                    let energy = x.row(row).iter().map(|v| f64::from(v * v)).sum::<f64>();
                    let size = (energy / x.cols().max(1) as f64 + f64::from(UNIT_EPS)).sqrt();
                    shift.row_mut(row).iter_mut().for_each(|v| *v /= size as f32);
                }
                let mut scaled = Tensor::default();
                unit_rows(pool, x, &mut scaled);
                cross.accumulate(pool, &scaled, shift);
            }
        }
    }
}

/// Keeps rows of zeros from being divided by zero.
const UNIT_EPS: f32 = f32::MIN_POSITIVE;

/// The rows scaled to a mean square of 1.
fn unit_rows(pool: &Pool, x: &Tensor, scaled: &mut Tensor) {
    let unit = Norm { kind: NormKind::Rms, weight: None, bias: None, eps: UNIT_EPS };
    norm(pool, x, &unit, scaled);
}

/// The first row of each window, scaled to what it counts beyond once.
fn sinks(x: &Tensor, windows: &[Range<usize>]) -> Tensor {
    let mut rows = Vec::with_capacity(windows.len() * x.cols());
    for window in windows.iter().filter(|w| !w.is_empty()) {
        let factor = (SINK_SHARE * window.len() as f32 - 1.0).max(0.0).sqrt();
        rows.extend(x.row(window.start).iter().map(|v| v * factor));
    }
    Tensor::from_vec(rows.len() / x.cols().max(1), x.cols(), rows)
}

#[cfg(test)]
mod tests {
    use gptq_model::Part;

    use super::*;

    fn rows() -> Tensor {
        let values = (0..24 * 3).map(|i| ((i * 37 % 23) as f32 - 11.0) * 0.5);
        Tensor::from_vec(24, 3, values.collect())
    }

    /// Σ w x xᵀ in f64.
    fn oracle(x: &Tensor, weight: impl Fn(usize) -> f64) -> Vec<f64> {
        let mut sum = vec![0.0; 9];
        for i in 0..x.rows() {
            for a in 0..3 {
                for b in 0..3 {
                    sum[a * 3 + b] += weight(i) * f64::from(x.row(i)[a]) * f64::from(x.row(i)[b]);
                }
            }
        }
        sum
    }

    fn gram(weights: TokenWeights, stage: Stage, causal: bool) -> Vec<f32> {
        let mut gram = Gram::new(3);
        let weights = weights.rows(stage, causal);
        weights.accumulate(
            &mut gram,
            &Pool::new(1),
            &rows(),
            &[0..8, 8..24],
            &mut Tensor::default(),
        );
        assert_eq!(gram.rows(), 24, "tokens are counted once");
        gram.into_symmetric(1.0)
    }

    fn close(got: &[f32], expected: &[f64]) {
        for (g, e) in got.iter().zip(expected) {
            assert!((f64::from(*g) - e).abs() <= 1e-5 * (1.0 + e.abs()), "{got:?} {expected:?}");
        }
    }

    #[test]
    fn the_first_token_of_a_window_counts_for_a_quarter_of_it() {
        let weight = |i| match i {
            0 => 2.0,
            8 => 4.0,
            _ => 1.0,
        };
        close(&gram(TokenWeights::Balanced, Stage::Qkv, true), &oracle(&rows(), weight));
        let all = oracle(&rows(), |_| 1.0);
        close(&gram(TokenWeights::Balanced, Stage::Qkv, false), &all);
        close(&gram(TokenWeights::Uniform, Stage::Qkv, true), &all);
        close(&gram(TokenWeights::Balanced, Stage::MlpUp(Part::Dense), true), &all);
    }

    #[test]
    fn shifts_are_weighted_like_the_inputs() {
        let x = rows();
        let float: Vec<f32> = (0..24 * 3).map(|i| ((i * 53 % 29) as f32 - 14.0) * 0.4).collect();
        let float = Tensor::from_vec(24, 3, float);
        let energy = |i: usize| x.row(i).iter().map(|v| f64::from(v * v)).sum::<f64>();
        let sink = |i| match i {
            0 => 2.0,
            8 => 4.0,
            _ => 1.0,
        };
        let cases: [(RowWeights, &dyn Fn(usize) -> f64); 3] = [
            (RowWeights::Uniform, &|_| 1.0),
            (RowWeights::Sinks, &sink),
            (RowWeights::Directions, &|i| 3.0 / energy(i)),
        ];
        for (weights, weight) in cases {
            let (mut cross, pool) = (Cross::new(3), Pool::new(1));
            let windows = [0..8, 8..24];
            weights.accumulate_shift(&mut cross, &pool, &x, &mut float.clone(), &windows);
            let mut want = vec![0.0; 9];
            for i in 0..24 {
                for a in 0..3 {
                    for b in 0..3 {
                        let shift = f64::from(float.row(i)[b]) - f64::from(x.row(i)[b]);
                        want[a * 3 + b] += weight(i) * f64::from(x.row(i)[a]) * shift;
                    }
                }
            }
            close(&cross.into_matrix(1.0), &want);
        }
    }

    #[test]
    fn inputs_without_a_norm_count_by_direction() {
        let x = rows();
        let weight = |i: usize| 3.0 / x.row(i).iter().map(|v| f64::from(v * v)).sum::<f64>();
        for stage in [Stage::AttnOut, Stage::MlpDown(Part::Dense)] {
            close(&gram(TokenWeights::Balanced, stage, true), &oracle(&x, weight));
            close(&gram(TokenWeights::Uniform, stage, true), &oracle(&x, |_| 1.0));
        }
    }
}
