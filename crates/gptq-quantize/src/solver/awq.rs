//! AWQ (Lin et al. 2023): weights of inputs that are large on average are made larger before they are
//! rounded, and the inputs smaller by as much; ranges of groups are cut where that lowers the error.
//!
//! Both searches of the paper measure the error of the outputs on kept activations. Here it is
//! tr(ΔW H ΔWᵀ) with the Hessian of the stage, which is the same number (up to a factor) for all
//! calibration tokens at once, and the magnitude of an input is √H_jj, its root mean square, where the
//! paper has its mean magnitude.

use gptq_compute::sweep::{Clip, Grid, ScaleSearch};
use gptq_compute::{Pool, Tensor, gemm_nt};
use gptq_format::quantize_config::group_len;

use super::{Solution, rtn};
use crate::hessian::{Factor, Hessian};
use crate::order::{ColumnOrder, OrderOptions};

/// Exponents that are tried: 0, 1/20, ... 19/20.
const RATIOS: usize = 20;
/// The smallest magnitude, as a share of the mean one: inputs that hardly ever fire are not scaled
/// without limit.
const LEAST_MAGNITUDE: f64 = 1e-3;

/// The search for the exponent α of s_j = m_j^α, with m_j the magnitude of input j.
#[derive(Debug, Clone)]
pub struct RatioSearch {
    /// `[in]`, above 0.
    magnitudes: Vec<f64>,
    /// tr(ΔW H ΔWᵀ) by exponent.
    losses: [f64; RATIOS],
}

/// What a [`RatioSearch`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct Ratio {
    /// The exponent α.
    pub alpha: f64,
    /// s, `[in]`.
    pub scales: Vec<f32>,
    /// The error of the outputs over that with α = 0.
    pub loss: f64,
}

impl RatioSearch {
    /// Begins a search with the mean square of each input, `[in]`.
    pub fn new(mean_squares: &[f64]) -> Self {
        let roots = mean_squares.iter().map(|m| m.max(0.0).sqrt());
        let mean = roots.clone().sum::<f64>() / mean_squares.len().max(1) as f64;
        let least = (mean * LEAST_MAGNITUDE).max(f64::MIN_POSITIVE);
        Self { magnitudes: roots.map(|m| m.max(least)).collect(), losses: [0.0; RATIOS] }
    }

    /// Adds the errors of some outputs of a linear: `weights` `[outputs, in]` are scaled, rounded to
    /// nearest by the range of each group, and scaled back.
    ///
    /// # Panics
    /// If the widths differ.
    #[track_caller]
    pub fn add(
        &mut self,
        pool: &Pool,
        weights: &[f32],
        hessian: &Hessian,
        group_size: i64,
        grid: Grid,
    ) {
        let inputs = self.magnitudes.len();
        assert_eq!(hessian.width(), inputs, "width of the Hessian");
        let grid = Grid { search: ScaleSearch::MinMax, ..grid };
        let matrix = hessian.dense();
        let (mut scaled, mut product) = (weights.to_vec(), Tensor::default());
        for step in 0..RATIOS {
            let scales = self.scales(step);
            for (to, from) in scaled.chunks_exact_mut(inputs).zip(weights.chunks_exact(inputs)) {
                for ((to, w), s) in to.iter_mut().zip(from).zip(&scales) {
                    *to = w * s;
                }
            }
            let mut error = rtn(pool, &scaled, inputs, group_size, grid).dequantize();
            for (e, w) in error.chunks_exact_mut(inputs).zip(weights.chunks_exact(inputs)) {
                for ((e, w), s) in e.iter_mut().zip(w).zip(&scales) {
                    *e = *e / s - w;
                }
            }
            let error = Tensor::from_vec(weights.len() / inputs, inputs, error);
            gemm_nt(pool, &error, &matrix, None, &mut product);
            let dot = |i: usize| -> f64 {
                error.row(i).iter().zip(product.row(i)).map(|(a, b)| f64::from(a * b)).sum()
            };
            self.losses[step] += (0..error.rows()).map(dot).sum::<f64>();
        }
    }

    /// The exponent of the least error, the smaller one of equals.
    pub fn best(&self) -> Ratio {
        let mut step = 0;
        for (other, loss) in self.losses.iter().enumerate() {
            if *loss < self.losses[step] {
                step = other;
            }
        }
        let whole = self.losses[0];
        Ratio {
            alpha: step as f64 / RATIOS as f64,
            scales: self.scales(step),
            loss: if whole > 0.0 { self.losses[step] / whole } else { 1.0 },
        }
    }

    /// The scales of an exponent, with 1 in the geometric middle between the least and the largest.
    fn scales(&self, step: usize) -> Vec<f32> {
        let alpha = step as f64 / RATIOS as f64;
        let powers = self.magnitudes.iter().map(|m| m.powf(alpha));
        let (low, high) = powers
            .clone()
            .fold((f64::INFINITY, 0.0), |(low, high): (f64, f64), s| (low.min(s), high.max(s)));
        // Not the root of the product, which may be too small for a float.
        let middle = low.sqrt() * high.sqrt();
        powers.map(|s| (s / middle) as f32).collect()
    }
}

/// Rounds to nearest with the range of each group cut where tr(ΔW H ΔWᵀ) is least. `weights`:
/// `[out, in]`; groups of neighbouring inputs, -1 for one group.
pub fn clipped(
    pool: &Pool,
    weights: &[f32],
    hessian: &Hessian,
    group_size: i64,
    grid: Grid,
) -> Solution {
    let inputs = hessian.width();
    let group_len = group_len(group_size, inputs);
    let clip = Clip { hessian: hessian.matrix(), inputs, group_len, grid };
    let g_idx: Vec<u32> = (0..inputs).map(|k| (k / group_len) as u32).collect();
    Solution::new(clip.run(pool, weights), &g_idx)
}

/// What a stage that is rounded has in place of a factor: columns from left to right and the diagonal
/// of H as it is. Inputs that never fire get next to nothing, so that refining divides by no 0.
pub(crate) fn unfactored(hessian: &Hessian, group_size: i64) -> Factor {
    let inputs = hessian.width();
    let order =
        OrderOptions { group_size, desc_act: false, act_group_aware: false, static_groups: true };
    let mean = hessian.diagonal().sum::<f32>() / inputs.max(1) as f32;
    let least = if mean > 0.0 { (1e-6 * mean).max(f32::MIN_POSITIVE) } else { 1.0 };
    let diagonal = hessian.diagonal().map(|d| d.max(least));
    Factor {
        columns: ColumnOrder::new(&vec![0.0; inputs], order),
        upper: Vec::new(),
        diagonal: Some(diagonal.collect()),
        dead: vec![false; inputs],
        damp_percent: 0.0,
        tries: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid {
        bits: 3,
        sym: false,
        search: ScaleSearch::MinMax,
        signed: false,
        min_zero: 1,
        f16_scales: false,
    };

    fn random(n: usize, seed: u64) -> Vec<f32> {
        gptq_testkit::Rng::new(seed).normals(n, 1.0)
    }

    /// XᵀX / tokens of inputs some of which are much larger than the others.
    fn hessian(inputs: usize, tokens: usize) -> Hessian {
        let mut x = random(inputs * tokens, 3);
        for token in x.chunks_mut(inputs) {
            token.iter_mut().step_by(7).for_each(|x| *x *= 12.0);
            token[5] = 0.0;
        }
        let at = |i: usize, j: usize| -> f32 {
            let sum: f64 = x.chunks(inputs).map(|t| f64::from(t[i]) * f64::from(t[j])).sum::<f64>();
            (sum / tokens as f64) as f32
        };
        let matrix = (0..inputs * inputs).map(|k| at(k / inputs, k % inputs)).collect();
        Hessian::from_matrix(matrix, inputs, tokens)
    }

    /// The error with exponent `alpha`, one weight after the other in f64.
    fn brute_force(w: &[f32], h: &Hessian, group: usize, alpha: f64, grid: Grid) -> f64 {
        let n = h.width();
        let at = |i: usize, j: usize| f64::from(h.matrix()[i * n + j]);
        let rms: Vec<f64> = (0..n).map(|j| at(j, j).sqrt()).collect();
        let least = rms.iter().sum::<f64>() / n as f64 * LEAST_MAGNITUDE;
        let s: Vec<f64> = rms.iter().map(|m| m.max(least).powf(alpha)).collect();
        let middle = (s.iter().fold(f64::INFINITY, |a, &b| a.min(b))
            * s.iter().fold(0.0, |a: f64, &b| a.max(b)))
        .sqrt();
        let mut total = 0.0;
        for row in w.chunks(n) {
            let mut e = vec![0.0; n];
            for first in (0..n).step_by(group) {
                let range = first..(first + group).min(n);
                let scaled = |k: usize| f64::from(row[k]) * s[k] / middle;
                let low = range.clone().map(scaled).fold(0.0, f64::min);
                let high = range.clone().map(scaled).fold(0.0, f64::max);
                let largest = high.max(-low);
                let (d, z) = if grid.sym && grid.signed {
                    // The lowest code holds the largest weight.
                    (largest / 4.0 * if -low < high { -1.0 } else { 1.0 }, 4.0)
                } else if grid.sym {
                    ((largest - if low < 0.0 { -largest } else { 0.0 }) / 7.0, 4.0)
                } else {
                    let d = (high - low) / 7.0;
                    let z = (-low / d).round_ties_even();
                    if z >= 1.0 { (d, z) } else { (high / 6.0, 1.0) }
                };
                for k in range {
                    let q = ((scaled(k) / d).round_ties_even() + z).clamp(0.0, 7.0);
                    e[k] = d * (q - z) * middle / s[k] - f64::from(row[k]);
                }
            }
            for i in 0..n {
                total += e[i] * (0..n).map(|j| at(i, j) * e[j]).sum::<f64>();
            }
        }
        total
    }

    #[test]
    fn the_exponent_is_that_of_brute_force() {
        let (inputs, outputs, group) = (48, 40, 16);
        let hessian = hessian(inputs, 100);
        let grids = [(false, false), (true, false), (true, true)].map(|(sym, signed)| Grid {
            sym,
            signed,
            ..GRID
        });
        for (seed, grid) in (1..4).flat_map(|seed| grids.map(|grid| (seed, grid))) {
            // The largest weight of a symmetric group is a tie between two codes.
            let tolerance = if grid.sym && !grid.signed { 0.06 } else { 0.02 };
            let weights = random(inputs * outputs, 100 + seed);
            let squares: Vec<f64> = hessian.diagonal().map(f64::from).collect();
            let mut search = RatioSearch::new(&squares);
            let pool = Pool::new(2);
            // In two parts, as slabs of a large linear come.
            let (a, b) = weights.split_at(inputs * 24);
            search.add(&pool, a, &hessian, group as i64, grid);
            search.add(&pool, b, &hessian, group as i64, grid);
            let losses: Vec<f64> = (0..RATIOS)
                .map(|step| {
                    brute_force(&weights, &hessian, group, step as f64 / RATIOS as f64, grid)
                })
                .collect();
            for (got, want) in search.losses.iter().zip(&losses) {
                assert!((got - want).abs() < tolerance * want, "{grid:?}: {got} {want}");
            }
            let best = (0..RATIOS).min_by(|&a, &b| losses[a].total_cmp(&losses[b])).unwrap();
            let found = search.best();
            let place = (found.alpha * RATIOS as f64).round() as usize;
            if tolerance < 0.05 {
                assert_eq!(place, best, "{grid:?}: {losses:?}");
            }
            assert!(losses[place] < (1.0 + tolerance) * losses[best], "{grid:?}: {losses:?}");
            assert!(found.alpha > 0.0 && found.loss < 0.9, "{found:?}");
            assert!((found.loss - losses[best] / losses[0]).abs() < tolerance / 2.0);
            assert!(found.scales[7] > 1.2 * found.scales[8]);
            assert!(found.scales.iter().all(|s| s.is_finite() && *s > 0.0));
        }
    }

    #[test]
    fn clipping_keeps_groups_of_neighbours_and_tells_its_loss() {
        let (inputs, outputs) = (40, 9);
        let hessian = hessian(inputs, 64);
        let weights = random(inputs * outputs, 8);
        let pool = Pool::new(1);
        for (group_size, groups) in [(16, 3), (-1, 1)] {
            let solution = clipped(&pool, &weights, &hessian, group_size, GRID);
            assert_eq!(solution.scales.len(), groups * outputs);
            assert_eq!(solution.g_idx[inputs - 1] as usize, groups - 1);
            let nearest = rtn(&pool, &weights, inputs, group_size, GRID);
            let error = |s: &Solution| {
                let mut sum = crate::hessian::OutputError::default();
                hessian.add_error(&pool, &weights, s.dequantize(), &mut sum);
                sum.relative()
            };
            assert!(error(&solution) < 0.95 * error(&nearest));
            assert!(solution.loss > 0.0);
        }
    }

    #[test]
    fn a_stage_without_inputs_is_not_scaled() {
        let search = RatioSearch::new(&[0.0; 4]);
        assert_eq!(search.best(), Ratio { alpha: 0.0, scales: vec![1.0; 4], loss: 1.0 });
        assert!(search.scales(19).iter().all(|s| *s == 1.0));
    }

    /// Refining what was clipped never harms, and inputs that never fire do not count, however small the others are.
    #[test]
    fn refinement_does_not_see_inputs_that_never_fire() {
        let (inputs, outputs, pool) = (64, 24, Pool::new(2));
        let weights = random(inputs * outputs, 9);
        for size in [1.0, 1e-3, 0.0] {
            let full = hessian(inputs, 200);
            let dead = |k: usize| k % 10 == 5;
            let element = |(index, h): (usize, &f32)| {
                if dead(index / inputs) || dead(index % inputs) { 0.0 } else { size * h }
            };
            let matrix = full.matrix().iter().enumerate().map(element).collect();
            let hessian = Hessian::from_matrix(matrix, inputs, 200);
            let error = |solution: &Solution| {
                let mut error = crate::hessian::OutputError::default();
                hessian.add_error(&pool, &weights, solution.dequantize(), &mut error);
                error.relative()
            };
            let before = clipped(&pool, &weights, &hessian, 32, GRID);
            let factor = unfactored(&hessian, 32);
            let after =
                crate::solver::refine(&pool, &weights, &hessian, &factor, GRID, 3, before.clone());
            assert!(after.scales.iter().all(|scale| scale.is_finite()));
            if size > 0.0 {
                assert!(
                    error(&after) < error(&before),
                    "{size}: {} {}",
                    error(&after),
                    error(&before)
                );
            }
        }
    }
}
