use gptq_testkit::{Expected, fixtures};

use super::*;
use crate::hessian::{Damping, Hessian, OutputError};
use crate::order::OrderOptions;

fn grid(bits: u32, sym: bool) -> Grid {
    Grid { bits, sym, search: ScaleSearch::MinMax, signed: false, min_zero: 0, f16_scales: false }
}

/// Codes, scales and zero points of the original gptq.py, on its Hessian.
#[test]
fn equals_the_reference_implementation() {
    let Some(dir) = fixtures::dir("gptq_algo") else { return };
    let cases = std::fs::read_to_string(dir.join("cases.json")).unwrap();
    let cases: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&cases).unwrap();
    let pool = Pool::new(2);
    for (name, case) in cases {
        // Some cases of the list are kept elsewhere.
        if !dir.join(format!("{name}.safetensors")).exists() {
            continue;
        }
        let inputs = Expected::open(dir.join(case["inputs"].as_str().unwrap()));
        let want = Expected::open(dir.join(format!("{name}.safetensors")));
        let (shape, w) = inputs.f32("W");
        let (outputs, n) = (shape[0], shape[1]);
        let h = Hessian::from_matrix(inputs.f32("H").1, n, 512);
        let flag = |key: &str| case[key].as_bool().unwrap();
        let order = OrderOptions {
            group_size: case["group"].as_i64().unwrap(),
            desc_act: flag("act"),
            act_group_aware: false,
            static_groups: flag("static"),
        };
        let damping = Damping { percent: case["damp"].as_f64().unwrap(), auto_increment: 0.01 };
        let factor = h.factor(order, damping);
        let bits = case["bits"].as_u64().unwrap() as u32;
        let s = gptq(&pool, &w, &factor, grid(bits, flag("sym")));

        let g_idx: Vec<u32> = want.i64("g_idx").1.iter().map(|&g| g as u32).collect();
        assert_eq!(s.g_idx, g_idx, "{name}");
        let codes = want.i64("codes").1;
        let differing: Vec<usize> = (0..n * outputs)
            .filter(|i| i64::from(s.codes[i % n * outputs + i / n]) != codes[*i])
            .map(|i| i / n)
            .collect();
        let rows: std::collections::BTreeSet<_> = differing.iter().collect();
        // A symmetric scale is max/7.5, so a group's extreme weight lies exactly between two codes
        // and the last bit of f32 sums decides; such a tie moves a few codes behind it in its row.
        assert!(
            rows.len() <= 1 && differing.len() * 500 <= codes.len(),
            "{name}: {} of {} codes differ, in rows {rows:?}",
            differing.len(),
            codes.len()
        );
        for (what, got) in [
            ("scales", s.scales.clone()),
            ("zeros", s.zeros.iter().map(|&z| f32::from(z)).collect()),
        ] {
            let want = want.f32(what).1;
            let worst = got
                .iter()
                .zip(&want)
                .map(|(a, b)| (a - b).abs() / b.abs().max(1e-9))
                .fold(0.0, f32::max);
            assert!(worst < 1e-4, "{name}: {what} differ by {worst}");
        }
        let error = relative_error(&h, &pool, &w, &s);
        let reference = case["rel_out_err"].as_f64().unwrap();
        // Their figure is the ratio of norms or energies; either way ours must not be worse.
        assert!(
            error < reference * 1.01 || error.sqrt() < reference * 1.01,
            "{name}: {error} {reference}"
        );
    }
}

fn relative_error(h: &Hessian, pool: &Pool, weights: &[f32], solution: &Solution) -> f64 {
    let mut sum = OutputError::default();
    h.add_error(pool, weights, solution.dequantize(), &mut sum);
    sum.relative()
}

fn toy(outputs: usize, n: usize) -> (Vec<f32>, Hessian) {
    let mut r = gptq_testkit::Rng::new(11);
    let w: Vec<f32> = (0..outputs * n).map(|_| r.normal()).collect();
    let noise: Vec<f32> = (0..=4 * n * n).map(|_| r.normal()).collect();
    // Neighbouring inputs are correlated, the first four are loud.
    let x = |t: usize, i: usize| {
        let at = t * n + i;
        (noise[at] + 0.7 * noise[at + 1]) * if i < 4 { 5.0 } else { 1.0 }
    };
    let sum = |i: usize| (0..4 * n).map(|t| x(t, i / n) * x(t, i % n)).sum::<f32>();
    (w, Hessian::from_matrix((0..n * n).map(sum).collect(), n, 4 * n))
}

#[test]
fn obq_and_gptq_beat_rounding_and_obq_is_greedy_optimal() {
    let (outputs, n) = (12, 32);
    let (w, h) = toy(outputs, n);
    let pool = Pool::new(2);
    let order = OrderOptions {
        group_size: 16,
        desc_act: false,
        act_group_aware: false,
        static_groups: true,
    };
    let factor = h.factor(order, Damping { percent: 0.01, auto_increment: 0.01 });
    for bits in [2, 3, 4] {
        let g = grid(bits, true);
        let error = |s: &Solution| relative_error(&h, &pool, &w, s);
        let r = error(&rtn(&pool, &w, n, 16, g));
        let q = error(&gptq(&pool, &w, &factor, g));
        let o = obq(&pool, &w, &factor, 16, g);
        let same = obq(&Pool::new(1), &w, &factor, 16, g);
        assert_eq!(o.codes, same.codes);
        let o = error(&o);
        assert!(q < r && o < r, "{bits} bits: rtn {r} gptq {q} obq {o}");
    }
}

/// Damping is a penalty on the distance from the original weights: ½ (tr(ΔW H ΔWᵀ) + λ ‖ΔW‖²) is what the sweep sums.
#[test]
fn damping_penalises_moved_weights() {
    let (outputs, n) = (12, 32);
    let (w, h) = toy(outputs, n);
    let order = OrderOptions {
        group_size: 16,
        desc_act: false,
        act_group_aware: false,
        static_groups: false,
    };
    let mean = (0..n).map(|i| f64::from(h.matrix()[i * n + i])).sum::<f64>() / n as f64;
    let mut moved = f64::INFINITY;
    for percent in [0.01, 0.1, 1.0, 10.0] {
        let factor = h.factor(order, Damping { percent, auto_increment: 0.01 });
        let s = gptq(&Pool::new(2), &w, &factor, grid(3, true));
        let d: Vec<f64> = w.iter().zip(s.dequantize()).map(|(w, q)| f64::from(w - q)).collect();
        let fit: f64 = d
            .chunks(n)
            .map(|d| {
                let product = |i: usize| d[i / n] * f64::from(h.matrix()[i]) * d[i % n];
                (0..n * n).map(product).sum::<f64>()
            })
            .sum();
        let distance: f64 = d.iter().map(|d| d * d).sum();
        let want = 0.5 * (fit + percent * mean * distance);
        assert!((s.loss - want).abs() < 1e-2 * want, "{percent}: {} {want}", s.loss);
        assert!(distance < 1.02 * moved, "{percent}: {distance} {moved}");
        moved = distance;
    }
}

/// One row, few weights: compare with every greedy step done by brute force in f64.
#[test]
fn obq_follows_the_definition() {
    let n = 6;
    let (w, h) = toy(1, n);
    let order = OrderOptions {
        group_size: -1,
        desc_act: false,
        act_group_aware: false,
        static_groups: true,
    };
    let factor = h.factor(order, Damping { percent: 0.01, auto_increment: 0.01 });
    // f16 scales: the extreme weight is not on a tie.
    let s = obq(&Pool::new(1), &w, &factor, -1, Grid { f16_scales: true, ..grid(2, true) });
    let (scale, zero) = (f64::from(s.scales[0]), f64::from(s.zeros[0]));
    let mean = (0..n).map(|i| f64::from(h.matrix()[i * n + i])).sum::<f64>() / n as f64;
    let mut left: Vec<usize> = (0..n).collect();
    let mut w: Vec<f64> = w.iter().map(|&x| f64::from(x)).collect();
    let quant = |x: f64| ((x / scale).round_ties_even() + zero).clamp(0.0, 3.0);
    while !left.is_empty() {
        let inverse = gauss_inverse(&left, |i, j| {
            f64::from(h.matrix()[i * n + j]) + if i == j { 0.01 * mean } else { 0.0 }
        });
        let error = |i: usize| w[left[i]] - scale * (quant(w[left[i]]) - zero);
        let m = left.len();
        let best = (0..m)
            .min_by(|&a, &b| {
                let cost = |i: usize| error(i).powi(2) / inverse[i * m + i];
                cost(a).total_cmp(&cost(b))
            })
            .unwrap();
        let k = left[best];
        assert_eq!(f64::from(s.codes[k]), quant(w[k]));
        let e = error(best) / inverse[best * m + best];
        for (i, &j) in left.iter().enumerate() {
            w[j] -= e * inverse[i * m + best];
        }
        left.remove(best);
    }
}

/// Of one group, too, whose range they are part of where errors are not weighed.
#[test]
fn inputs_that_never_fire_do_not_choose_searched_scales() {
    let (outputs, n, dead) = (20, 48, 5);
    let (mut w, h) = toy(outputs, n);
    // Small next to the diagonal of 1 that a dead input gets.
    let matrix = (0..n * n)
        .map(|i| if i / n == dead || i % n == dead { 0.0 } else { 1e-3 * h.matrix()[i] })
        .collect();
    let h = Hessian::from_matrix(matrix, n, 4 * n);
    for group_size in [16, n] {
        let order = OrderOptions {
            group_size: group_size as i64,
            desc_act: false,
            act_group_aware: false,
            static_groups: false,
        };
        let factor = h.factor(order, Damping { percent: 0.05, auto_increment: 0.01 });
        let g = Grid { search: ScaleSearch::Hessian, f16_scales: true, ..grid(3, true) };
        let mut solve = |dead_weight: f32| {
            w.iter_mut().skip(dead).step_by(n).for_each(|w| *w = dead_weight);
            gptq(&Pool::new(2), &w, &factor, g)
        };
        let (silent, loud) = (solve(0.0), solve(7.0));
        assert_eq!((silent.codes, silent.scales), (loud.codes, loud.scales), "{group_size}");
    }
}

/// Refinement in each order of columns: the loss it reports is ½ tr(ΔW H ΔWᵀ) with the damped H, and
/// below that of the sweep; inputs that never fire keep weight zero.
#[test]
fn refinement_lowers_the_damped_loss() {
    let (outputs, n, dead) = (20, 48, 5);
    let (w, h) = toy(outputs, n);
    let matrix = (0..n * n)
        .map(|i| if i / n == dead || i % n == dead { 0.0 } else { h.matrix()[i] })
        .collect();
    let h = Hessian::from_matrix(matrix, n, 4 * n);
    let pool = Pool::new(2);
    for (desc_act, static_groups) in [(false, false), (true, false), (true, true)] {
        let order =
            OrderOptions { group_size: 16, desc_act, act_group_aware: false, static_groups };
        let factor = h.factor(order, Damping { percent: 0.03, auto_increment: 0.01 });
        let g = Grid { signed: true, f16_scales: true, ..grid(3, true) };
        let swept = gptq(&pool, &w, &factor, g);
        let refined = refine(&pool, &w, &h, &factor, g, 3, swept.clone());
        let mean = (0..n)
            .map(|i| if i == dead { 1.0 } else { f64::from(h.matrix()[i * n + i]) })
            .sum::<f64>()
            / n as f64;
        let damped = |i: usize, j: usize| match (i == j, i == dead) {
            (true, true) => 1.0 + 0.03 * mean,
            (true, false) => f64::from(h.matrix()[i * n + i]) + 0.03 * mean,
            _ => f64::from(h.matrix()[i * n + j]),
        };
        let loss = |s: &Solution| -> f64 {
            let q = s.dequantize();
            let row = |r: usize| -> f64 {
                let e = |k: usize| {
                    let w = if k == dead { 0.0 } else { w[r * n + k] };
                    f64::from(q[r * n + k] - w)
                };
                (0..n * n).map(|i| 0.5 * e(i / n) * e(i % n) * damped(i / n, i % n)).sum()
            };
            (0..outputs).map(row).sum()
        };
        let (before, after) = (loss(&swept), loss(&refined));
        assert!(after < 0.97 * before, "{before} {after}");
        for (s, want) in [(&swept, before), (&refined, after)] {
            assert!((s.loss - want).abs() < 1e-3 * want, "{} {want}", s.loss);
        }
        assert_eq!(refined.g_idx, swept.g_idx);
        assert!(refined.dequantize().iter().skip(dead).step_by(n).all(|&w| w == 0.0));

        let diagonal = Factor { diagonal: None, ..factor };
        let same = refine(&pool, &w, &h, &diagonal, g, 3, swept.clone());
        assert_eq!((same.codes, same.loss), (swept.codes, swept.loss));
    }
}

pub(crate) fn gauss_inverse(index: &[usize], h: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let m = index.len();
    let mut a: Vec<f64> = (0..m * m).map(|i| h(index[i / m], index[i % m])).collect();
    let mut b: Vec<f64> = (0..m * m).map(|i| f64::from(u8::from(i / m == i % m))).collect();
    for p in 0..m {
        let d = a[p * m + p];
        for j in 0..m {
            a[p * m + j] /= d;
            b[p * m + j] /= d;
        }
        for i in (0..m).filter(|&i| i != p) {
            let f = a[i * m + p];
            for j in 0..m {
                a[i * m + j] -= f * a[p * m + j];
                b[i * m + j] -= f * b[p * m + j];
            }
        }
    }
    b
}

#[test]
fn parts_of_the_outputs_join_to_the_whole() {
    let (outputs, n) = (48, 32);
    let (w, h) = toy(outputs, n);
    let pool = Pool::new(2);
    let order = OrderOptions {
        group_size: 8,
        desc_act: true,
        act_group_aware: false,
        static_groups: false,
    };
    let factor = h.factor(order, Damping { percent: 0.01, auto_increment: 0.01 });
    let whole = gptq(&pool, &w, &factor, grid(4, false));
    let mut joined = Joined::new(outputs);
    for rows in [0..16, 16..17, 17..48] {
        assert!(joined.whole.is_none() || joined.filled < outputs);
        let part = &w[rows.start * n..rows.end * n];
        joined.push(gptq(&pool, part, &factor, grid(4, false)));
        let filled = joined.filled;
        let got = joined.whole.as_ref().unwrap().dequantize_rows(rows.clone());
        assert_eq!(got, whole.dequantize_rows(rows), "up to {filled}");
    }
    let joined = joined.finish().unwrap();
    assert_eq!(
        (&joined.codes, &joined.scales, &joined.zeros, &joined.g_idx),
        (&whole.codes, &whole.scales, &whole.zeros, &whole.g_idx)
    );
    assert!((joined.loss / whole.loss - 1.0).abs() < 1e-12);
    assert!(Joined::new(2).finish().is_none());
}
