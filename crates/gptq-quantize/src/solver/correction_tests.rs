//! The corrections against slow versions of their definitions in f64.

#![allow(clippy::needless_range_loop)] // Indices as in the formulas.

use gptq_compute::sweep::{BLOCK, ScaleSearch};
use gptq_compute::{Cross, Gram, Tensor};
use gptq_testkit::Rng;

use super::*;
use crate::hessian::{Damping, Hessian};
use crate::order::OrderOptions;

const DAMP: f64 = 0.02;

/// Inputs X̂ and X, weights, and what the solvers make of them.
struct Case {
    n: usize,
    weights: Vec<f32>,
    quantized: Tensor,
    float: Tensor,
    hessian: Hessian,
    factor: Factor,
    grid: Grid,
    /// Scales are found before the sweep.
    static_groups: bool,
}

fn case(outputs: usize, n: usize, (order, grid): (OrderOptions, Grid)) -> Case {
    let (mut r, tokens) = (Rng::new(5), 3 * n);
    let weights = (0..outputs * n).map(|_| r.normal()).collect();
    let noise: Vec<f32> = (0..=tokens * n).map(|_| r.normal()).collect();
    let loud = |i: usize| if i % n < 4 { 3.0 } else { 1.0 };
    let float: Vec<f32> =
        (0..tokens * n).map(|i| (noise[i] + 0.6 * noise[i + 1]) * loud(i)).collect();
    let quantized = float.iter().map(|x| 0.9 * x + 0.2 * r.normal()).collect();
    let float = Tensor::from_vec(tokens, n, float);
    let quantized = Tensor::from_vec(tokens, n, quantized);
    let mut gram = Gram::new(n);
    gram.accumulate(&Pool::new(1), &quantized);
    let hessian = Hessian::new(gram);
    let factor = hessian.factor(order, Damping { percent: DAMP, auto_increment: 0.01 });
    let static_groups = order.static_groups;
    Case { n, weights, quantized, float, hessian, factor, grid, static_groups }
}

const ORDERS: [(bool, bool, bool); 4] =
    [(false, false, false), (false, true, false), (true, false, true), (true, false, false)];

/// Every order with a grid of searched scales and with one of ranges.
fn settings() -> impl Iterator<Item = (OrderOptions, Grid)> {
    let orders = ORDERS.into_iter().map(|(desc_act, act_group_aware, static_groups)| {
        OrderOptions { group_size: 16, desc_act, act_group_aware, static_groups }
    });
    let searched = Grid {
        bits: 3,
        sym: true,
        search: ScaleSearch::Hessian,
        signed: true,
        min_zero: 1,
        f16_scales: true,
    };
    let ranges =
        Grid { bits: 2, sym: false, search: ScaleSearch::MinMax, signed: false, ..searched };
    orders.flat_map(move |order| [(order, searched), (order, ranges)])
}

impl Case {
    fn shift(&self, correction: Correction, strength: f64) -> Shift {
        let pool = Pool::new(2);
        let mut shift = self.float.clone();
        let pairs = shift.as_mut_slice().iter_mut().zip(self.quantized.as_slice());
        pairs.for_each(|(f, q)| *f -= q);
        let mut cross = Cross::new(self.n);
        cross.accumulate(&pool, &self.quantized, &shift);
        Shift::new(cross, correction, strength)
    }

    fn solve(&self, correction: Correction, strength: f64, threads: usize) -> (Solution, Vec<f32>) {
        let (shift, pool) = (self.shift(correction, strength), Pool::new(threads));
        let passed_on = shift.passed_on(&pool, &self.factor);
        let corrected = Corrected { shift: &shift, passed_on: passed_on.as_deref() };
        let (solution, targets) = corrected.gptq(&pool, &self.weights, &self.factor, self.grid);
        let aim = corrected.weights(&pool, &self.weights, &self.factor);
        assert_eq!(aim, targets, "what other solvers are given");
        (solution, targets.into_owned())
    }

    /// 2/n Σ a bᵀ of two inputs in the order of the sweep, f64.
    fn moment(&self, a: &dyn Fn(usize, usize) -> f64, b: &dyn Fn(usize, usize) -> f64) -> Vec<f64> {
        let (n, tokens, order) = (self.n, self.quantized.rows(), &self.factor.columns.order);
        let mut sum = vec![0.0; n * n];
        for (i, &ki) in order.iter().enumerate() {
            for (j, &kj) in order.iter().enumerate() {
                let terms = (0..tokens).map(|t| a(t, ki as usize) * b(t, kj as usize));
                sum[i * n + j] = terms.sum::<f64>() * 2.0 / tokens as f64;
            }
        }
        sum
    }

    /// Damped H and D in the order of the sweep.
    fn moments(&self) -> (Vec<f64>, Vec<f64>) {
        let quantized = |t: usize, k: usize| f64::from(self.quantized.row(t)[k]);
        let shift = |t: usize, k: usize| f64::from(self.float.row(t)[k]) - quantized(t, k);
        let mut h = self.moment(&quantized, &quantized);
        let mean = (0..self.n).map(|i| h[i * self.n + i]).sum::<f64>() / self.n as f64;
        (0..self.n).for_each(|i| h[i * self.n + i] += DAMP * mean);
        (h, self.moment(&shift, &quantized))
    }

    /// A row of weights in the order of the sweep.
    fn row(&self, weights: &[f32], row: usize) -> Vec<f64> {
        let order = self.factor.columns.order.iter();
        order.map(|&k| f64::from(weights[row * self.n + k as usize])).collect()
    }
}

/// x with x A = b for the part of the symmetric A `[n, n]` from `from` on, by elimination.
fn solve(a: &[f64], n: usize, from: usize, b: &[f64]) -> Vec<f64> {
    let m = n - from;
    let mut a: Vec<Vec<f64>> =
        (0..m).map(|i| a[(from + i) * n + from..(from + i + 1) * n].to_vec()).collect();
    let mut b = b.to_vec();
    for p in 0..m {
        for i in p + 1..m {
            let f = a[i][p] / a[p][p];
            for j in p..m {
                a[i][j] -= f * a[p][j];
            }
            b[i] -= f * b[p];
        }
    }
    for p in (0..m).rev() {
        let rest: f64 = (p + 1..m).map(|j| a[p][j] * b[j]).sum();
        b[p] = (b[p] - rest) / a[p][p];
    }
    b
}

fn times(row: &[f64], matrix: &[f64]) -> Vec<f64> {
    let n = row.len();
    (0..n).map(|j| (0..n).map(|i| row[i] * matrix[i * n + j]).sum()).collect()
}

#[test]
fn qep_aims_at_the_best_float_weights() {
    for settings in settings() {
        let case = case(9, 48, settings);
        let (h, d) = case.moments();
        for strength in [0.5, 1.0] {
            let (solution, targets) = case.solve(Correction::Qep, strength, 2);
            for row in 0..9 {
                let w = case.row(&case.weights, row);
                let moved = solve(&h, case.n, 0, &times(&w, &d));
                for ((got, w), m) in case.row(&targets, row).iter().zip(w).zip(moved) {
                    assert!((got - (w + strength * m)).abs() < 2e-4, "{got} {w} {m}");
                }
            }
            // The solver gets these weights and nothing else.
            let plain = gptq(&Pool::new(1), &targets, &case.factor, case.grid);
            assert_eq!((solution.codes, solution.scales), (plain.codes, plain.scales));
        }
    }
}

/// What a code stands for in the order of the sweep, and the nearest one to a value.
fn values(case: &Case, s: &Solution, row: usize) -> Vec<f64> {
    let outputs = s.outputs();
    let value = |&k: &u32| {
        let at = s.g_idx[k as usize] as usize * outputs + row;
        let q = f64::from(s.codes[k as usize * outputs + row]) - f64::from(s.zeros[at]);
        f64::from(s.scales[at]) * q
    };
    case.factor.columns.order.iter().map(value).collect()
}

fn nearest(case: &Case, s: &Solution, row: usize, position: usize, w: f64) -> f64 {
    let k = case.factor.columns.order[position] as usize;
    let at = s.g_idx[k] as usize * s.outputs() + row;
    let (scale, zero) = (f64::from(s.scales[at]), f64::from(s.zeros[at]));
    let largest = f64::from(2u32.pow(case.grid.bits) - 1);
    scale * (((w / scale).round_ties_even() + zero).clamp(0.0, largest) - zero)
}

/// Codes of all rows that differ from what `weights` says each column should be rounded from, given the columns before it
/// as they came out; its last argument is how many have been rounded. Scales of ranges are those of the weights when
/// the block of columns that their group begins in is next, as in the published loop, or none is yet.
fn differing(
    case: &Case,
    s: &Solution,
    weights: impl Fn(usize, &[f64], usize) -> Vec<f64>,
) -> usize {
    let group_of = |position: usize| s.g_idx[case.factor.columns.order[position] as usize] as usize;
    let mut differing = 0;
    for row in 0..s.outputs() {
        let q = values(case, s, row);
        let from = weights(row, &q, case.n);
        differing += (0..case.n)
            .filter(|&c| (nearest(case, s, row, c, from[c]) - q[c]).abs() > 1e-9)
            .count();
        let groups =
            if case.grid.search == ScaleSearch::MinMax { s.scales.len() / s.outputs() } else { 0 };
        for group in 0..groups {
            let mut members = (0..case.n).filter(|&c| group_of(c) == group).peekable();
            let first = *members.peek().unwrap();
            let w = weights(row, &q, if case.static_groups { 0 } else { first - first % BLOCK });
            let (low, high) =
                members.fold((0.0f64, 0.0f64), |(l, h), c| (l.min(w[c]), h.max(w[c])));
            let expected = (high - low) / f64::from(2u32.pow(case.grid.bits) - 1);
            let scale = f64::from(s.scales[group * s.outputs() + row]);
            // Scales are rounded to f16.
            assert!((scale / expected - 1.0).abs() < 1e-3, "{group} {row}: {scale} {expected}");
        }
    }
    differing
}

/// Each column is rounded from the weights that the definition gives after all steps before it:
/// w_j -= e_c U_cj and w_j += w_c [D_c,c+1.. (H_c+1..)⁻¹]_j.
#[test]
fn gptaq_passes_the_share_of_each_column_on() {
    for settings in settings() {
        let case = case(9, 200, settings);
        let n = case.n;
        let (h, d) = case.moments();
        let strength = 0.7;
        // Row c: what column c passes on per unit of its weight; and -U_cj / U_cc.
        let passed: Vec<Vec<f64>> =
            (0..n).map(|c| solve(&h, n, c + 1, &d[c * n + c + 1..(c + 1) * n])).collect();
        let moved: Vec<Vec<f64>> =
            (0..n).map(|c| solve(&h, n, c + 1, &h[c * n + c + 1..(c + 1) * n])).collect();
        let (s, _) = case.solve(Correction::Gptaq, strength, 2);
        let wrong = differing(&case, &s, |row, q, rounded| {
            let mut w = case.row(&case.weights, row);
            for c in 0..rounded {
                for j in c + 1..n {
                    w[j] += (w[c] - q[c]) * moved[c][j - c - 1]
                        + strength * w[c] * passed[c][j - c - 1];
                }
            }
            w
        });
        // Sums in f32 may fall on the other side of a tie.
        assert!(wrong <= 2, "{wrong} of {} codes", 9 * n);
        let plain = gptq(&Pool::new(1), &case.weights, &case.factor, case.grid);
        let changed = plain.codes.iter().zip(&s.codes).filter(|(a, b)| a != b).count();
        assert!(changed > 9 * n / 20, "{changed} codes changed");
        let (same, _) = case.solve(Correction::Gptaq, strength, 1);
        assert_eq!(s.codes, same.codes);
    }
}

/// The first column by the correlation of what is left with it, the others reset to their optimum,
/// w_j = [w (H + αD)_2.. - q_1 H_1,2..] (H_2..)⁻¹, then error diffusion. Before the first column is rounded all are at
/// their optimum, w (H + αD) H⁻¹.
#[test]
fn qronos_follows_its_definition() {
    for (settings, strength) in settings().flat_map(|s| [(s, 1.0), (s, 0.6)]) {
        let case = case(9, 60, settings);
        let n = case.n;
        let (h, d) = case.moments();
        let (s, _) = case.solve(Correction::Qronos, strength, 2);
        let moved: Vec<Vec<f64>> =
            (0..n).map(|c| solve(&h, n, c + 1, &h[c * n + c + 1..(c + 1) * n])).collect();
        let sum: Vec<f64> = h.iter().zip(&d).map(|(h, d)| h + strength * d).collect();
        let wrong = differing(&case, &s, |row, q, rounded| {
            let v = case.row(&case.weights, row);
            let g = times(&v, &sum);
            if rounded == 0 {
                return solve(&h, n, 0, &g);
            }
            let rest: f64 = (1..n).map(|j| v[j] * h[j]).sum();
            let mut w = vec![(g[0] - rest) / h[0]];
            let right: Vec<f64> = (1..n).map(|j| g[j] - q[0] * h[j]).collect();
            w.extend(solve(&h, n, 1, &right));
            for c in 1..rounded {
                for j in c + 1..n {
                    w[j] += (w[c] - q[c]) * moved[c][j - c - 1];
                }
            }
            w
        });
        assert!(wrong <= 2, "{wrong} of {} codes", 9 * n);
        let (same, _) = case.solve(Correction::Qronos, strength, 1);
        assert_eq!(s.codes, same.codes);
    }
}

/// On the inputs that the correction knows, each brings W X nearer than a sweep that knows H alone.
#[test]
fn corrections_come_nearer_to_the_float_output() {
    let case = case(32, 96, settings().next().unwrap());
    let error = |s: &Solution| -> f64 {
        let q = s.dequantize();
        let dot =
            |w: &[f32], x: &[f32]| -> f64 { w.iter().zip(x).map(|(w, x)| f64::from(w * x)).sum() };
        let of_row = |(w, q): (&[f32], &[f32])| -> f64 {
            (0..case.float.rows())
                .map(|t| (dot(w, case.float.row(t)) - dot(q, case.quantized.row(t))).powi(2))
                .sum()
        };
        case.weights.chunks(case.n).zip(q.chunks(case.n)).map(of_row).sum()
    };
    let plain = error(&gptq(&Pool::new(2), &case.weights, &case.factor, case.grid));
    for correction in [Correction::Qep, Correction::Gptaq, Correction::Qronos] {
        let corrected = error(&case.solve(correction, 1.0, 2).0);
        assert!(corrected < 0.9 * plain, "{correction:?}: {corrected} {plain}");
    }
}

/// Without a solvable H there is nothing to correct with, and a dead input stays at zero.
#[test]
fn nothing_is_corrected_without_a_hessian() {
    let mut case = case(4, 32, settings().next().unwrap());
    case.factor.diagonal = None;
    for correction in [Correction::Qep, Correction::Gptaq, Correction::Qronos] {
        let (solution, targets) = case.solve(correction, 1.0, 1);
        assert_eq!(targets, case.weights);
        let plain = gptq(&Pool::new(1), &case.weights, &case.factor, case.grid);
        assert_eq!(solution.codes, plain.codes);
    }
    assert_eq!(case.hessian.width(), 32);
}
