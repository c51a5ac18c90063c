//! Scale searches and refinement against slow loops in f64.

use half::f16;

use super::tests::{GRID, dequantize, hessian, output_error, random};
use super::*;
use crate::cholesky::inverse_factor;

/// ½ e H e of each row, in f64.
fn losses(w: &[f32], q: &[f32], h: &[f32], n: usize) -> Vec<f64> {
    w.chunks(n).zip(q.chunks(n)).map(|(w, q)| 0.5 * output_error(w, q, h, n)).collect()
}

fn identity(n: usize, group: usize) -> (Vec<u32>, Vec<u32>) {
    let order: Vec<u32> = (0..n as u32).collect();
    let groups = order.iter().map(|k| k / group as u32).collect();
    (order, groups)
}

/// The search of the original quant.py: ranges shrunken by 0 to 79 %, judged by a power of the errors.
#[test]
fn power_search_is_that_of_the_reference() {
    let (rows, n) = (23, 48);
    let w = random(rows * n, 5);
    let (order, groups) = identity(n, n);
    for (bits, norm) in [(2, 2.4), (3, 2.4), (4, 2.4), (8, 2.4), (3, 2.0), (4, 1.0)] {
        for sym in [true, false] {
            let grid = Grid { bits, sym, search: ScaleSearch::Power(norm), ..GRID };
            let sweep = Sweep {
                factor: None,
                order: &order,
                groups: &groups,
                static_groups: true,
                grid: Grid { min_zero: 0, f16_scales: false, ..grid },
            };
            let swept = sweep.run(&Pool::new(2), &w, rows);
            let (top, half) = (f64::from(grid.max_code()), f64::from(1u32 << (bits - 1)));
            for (r, row) in w.chunks_exact(n).enumerate() {
                let error = |s: f64, z: f64| -> f64 {
                    let errors = row.iter().map(|&w| {
                        let w = f64::from(w);
                        let q = ((w / s).round_ties_even() + z).clamp(0.0, top);
                        (w - s * (q - z)).abs().powf(f64::from(norm))
                    });
                    errors.sum()
                };
                let mut low = row.iter().fold(0.0, |a: f64, &w| a.min(f64::from(w)));
                let mut high = row.iter().fold(0.0, |a: f64, &w| a.max(f64::from(w)));
                if sym {
                    high = high.max(-low);
                    low = if low < 0.0 { -high } else { low };
                }
                let tried = (0..80).map(|i| {
                    let p = 1.0 - f64::from(i) / 100.0;
                    let s = p * (high - low) / top;
                    error(s, if sym { half } else { (-p * low / s).round_ties_even() })
                });
                let best = tried.fold(f64::INFINITY, f64::min);
                let found = error(f64::from(swept.scales[r]), f64::from(swept.zeros[r]));
                assert!(
                    (found - best).abs() <= 1e-4 * best,
                    "{bits} bits, norm {norm}, sym {sym}, row {r}: {found} {best}"
                );
            }
        }
    }
}

#[test]
fn weighted_search_finds_the_best_scale() {
    let (rows, n) = (21, 40);
    let (w, h) = (random(rows * n, 3), hessian(n, 8));
    let u = inverse_factor(h, n).unwrap();
    let importance = |j: usize| f64::from(u[j * n + j]).powi(-2);
    let (order, groups) = identity(n, n);
    for bits in [2, 3, 4, 8] {
        for (sym, signed) in [(true, false), (true, true), (false, false)] {
            let grid = Grid { bits, sym, signed, search: ScaleSearch::Hessian, ..GRID };
            let sweep = Sweep {
                factor: Some(&u),
                order: &order,
                groups: &groups,
                static_groups: true,
                grid,
            };
            let swept = sweep.run(&Pool::new(2), &w, rows);
            let top = f64::from(grid.max_code());
            let half = f64::from(1u32 << (bits - 1));
            for r in 0..rows {
                let row = &w[r * n..(r + 1) * n];
                let error = |s: f64, z: f64| -> f64 {
                    (0..n)
                        .map(|j| {
                            let w = f64::from(row[j]);
                            let q = ((w / s).round_ties_even() + z).clamp(0.0, top);
                            importance(j) * (w - s * (q - z)).powi(2)
                        })
                        .sum()
                };
                let low = row.iter().fold(0.0, |a: f64, &w| a.min(f64::from(w)));
                let high = row.iter().fold(0.0, |a: f64, &w| a.max(f64::from(w)));
                let m = high.max(-low);
                let mut best = f64::INFINITY;
                for percent in 20..=(if signed { 110 } else { 100 }) {
                    let p = f64::from(percent) / 100.0;
                    let mut offer = |s: f64, z: f64| {
                        best = best.min(error(f16::from_f64(s).to_f64(), z));
                    };
                    match (sym, signed) {
                        (true, false) => offer(p * 2.0 * m / top, half),
                        (true, true) => {
                            offer(p * m / half, half);
                            offer(-p * m / half, half);
                        }
                        _ => {
                            let s = (high - low) / top;
                            for shift in [-1.0, 0.0, 1.0] {
                                offer(p * s, ((-low / s).round() + shift).clamp(1.0, top));
                            }
                        }
                    }
                }
                let found = error(f64::from(swept.scales[r]), f64::from(swept.zeros[r]));
                assert!(
                    found <= best * 1.01,
                    "{bits} bits, sym {sym}, signed {signed}, row {r}: {found} {best}"
                );
                assert_eq!(swept.scales[r], f16::from_f32(swept.scales[r]).to_f32());
            }
        }
    }
}

#[test]
fn signed_scales_hold_the_largest_weight_exactly() {
    let (order, groups) = identity(16, 16);
    let grid = Grid { signed: true, ..GRID };
    let sweep = Sweep { factor: None, order: &order, groups: &groups, static_groups: true, grid };
    for sign in [1.0f32, -1.0] {
        let w: Vec<f32> = (0..16).map(|i| sign * (i as f32 - 7.0)).collect();
        let s = sweep.run(&Pool::new(1), &w, 1);
        // 8 is the largest magnitude: steps of 1 from -8 to 7, or turned around.
        assert_eq!((s.scales[0], s.zeros[0]), (-sign, 8));
        assert_eq!(dequantize(&s, &groups, &order, 1), w);
    }
}

/// The rounds of `Refine` one row at a time in f64, with G computed anew before every step.
fn refine_oracle(w: &[f32], s: &mut Swept, h: &[f32], n: usize, group: usize, refine: &Refine<'_>) {
    let rows = w.len() / n;
    let grid = refine.grid;
    let top = f64::from(grid.max_code());
    let at = |i: usize, j: usize| f64::from(h[i * n + j]);
    for r in 0..rows {
        let w: Vec<f64> = w[r * n..(r + 1) * n].iter().map(|&x| f64::from(x)).collect();
        let mut q: Vec<f64> = (0..n).map(|k| f64::from(s.codes[k * rows + r])).collect();
        let groups = n.div_ceil(group);
        let mut scale: Vec<f64> = (0..groups).map(|g| f64::from(s.scales[g * rows + r])).collect();
        let mut zero: Vec<f64> = (0..groups).map(|g| f64::from(s.zeros[g * rows + r])).collect();
        let value =
            |q: &[f64], s: &[f64], z: &[f64], k: usize| s[k / group] * (q[k] - z[k / group]);
        let loss = |q: &[f64], s: &[f64], z: &[f64]| -> f64 {
            let e: Vec<f64> = (0..n).map(|k| value(q, s, z, k) - w[k]).collect();
            (0..n).map(|i| 0.5 * e[i] * (0..n).map(|j| at(i, j) * e[j]).sum::<f64>()).sum()
        };
        for _ in 0..refine.rounds {
            let per_segment = (BLOCK / group).max(1);
            for first in (0..groups).step_by(per_segment) {
                let last = (first + per_segment).min(groups);
                for g in first..last {
                    let (old_scale, old_zero) = (scale[g], zero[g]);
                    let mut best = (loss(&q, &scale, &zero), old_scale, old_zero);
                    for t in if grid.sym { vec![0.0] } else { vec![0.0, -1.0, 1.0] } {
                        zero[g] = old_zero + t;
                        if zero[g] < f64::from(grid.min_zero) || zero[g] > top {
                            continue;
                        }
                        // The loss is a parabola in the scale: through three points.
                        let mut f = |s: f64| {
                            scale[g] = s;
                            loss(&q, &scale, &zero)
                        };
                        let (a, b, c) = (f(-1.0), f(0.0), f(1.0));
                        let s = f16::from_f64((a - c) / (2.0 * (a + c - 2.0 * b))).to_f64();
                        let l = f(s);
                        if l < best.0 && (s > 0.0 || grid.signed && grid.sym) {
                            best = (l, s, zero[g]);
                        }
                    }
                    (scale[g], zero[g]) = (best.1, best.2);
                }
                for k in first * group..(last * group).min(n) {
                    let g = (0..n).map(|j| at(k, j) * (value(&q, &scale, &zero, j) - w[j]));
                    let target = value(&q, &scale, &zero, k) - g.sum::<f64>() / at(k, k);
                    let (s, z) = (scale[k / group], zero[k / group]);
                    q[k] = ((target / s).round_ties_even() + z).clamp(0.0, top);
                }
            }
        }
        (0..n).for_each(|k| s.codes[k * rows + r] = q[k] as u8);
        for g in 0..groups {
            s.scales[g * rows + r] = scale[g] as f32;
            s.zeros[g * rows + r] = zero[g] as u8;
        }
    }
}

#[test]
fn refinement_follows_the_definition_and_no_loss_rises() {
    for (rows, n, group, bits) in [(37, 72, 24, 3), (70, 150, 150, 2), (17, 300, 64, 4)] {
        let (w, h) = (random(rows * n, 17), hessian(n, 5));
        // The matrix without the damping that its factor has seen.
        let plain: Vec<f32> = h
            .iter()
            .enumerate()
            .map(|(i, h)| h - if i % (n + 1) == 0 { 0.04 } else { 0.0 })
            .collect();
        let diagonal: Vec<f32> = (0..n).map(|i| h[i * n + i]).collect();
        let u = inverse_factor(h.clone(), n).unwrap();
        let (order, groups) = identity(n, group);
        for (sym, signed) in [(true, false), (true, true), (false, false)] {
            let grid = Grid { bits, sym, signed, ..GRID };
            let sweep = Sweep {
                factor: Some(&u),
                order: &order,
                groups: &groups,
                static_groups: true,
                grid,
            };
            let first = sweep.run(&Pool::new(2), &w, rows);
            let error = |s: &Swept| losses(&w, &dequantize(s, &groups, &order, rows), &h, n);
            let mut refine = Refine {
                hessian: &plain,
                diagonal: &diagonal,
                order: &order,
                groups: &groups,
                grid,
                rounds: 0,
            };
            let (mut swept, mut want) = (first.clone(), first.clone());
            refine.run(&Pool::new(2), &w, &mut swept);
            assert_eq!((&swept.codes, &swept.scales), (&first.codes, &first.scales));
            let mut last = error(&first);
            for (loss, want) in swept.losses.iter().zip(&last) {
                assert!((loss - want).abs() < 1e-4 * want, "{loss} {want}");
            }
            refine.rounds = 1;
            for round in 0..3 {
                refine.run(&Pool::new(1 + round), &w, &mut swept);
                let now = error(&swept);
                for ((now, last), told) in now.iter().zip(&last).zip(&swept.losses) {
                    assert!(*now <= last * (1.0 + 1e-6), "{now} after {last}");
                    assert!((told - now).abs() < 1e-4 * now, "{told} {now}");
                }
                last = now;
            }
            assert!(swept.zeros.iter().all(|&z| (1..1 << bits).contains(&z)));
            // Ties that f32 breaks the other way send single rows elsewhere, not the sum.
            refine.rounds = 3;
            refine_oracle(&w, &mut want, &h, n, group, &refine);
            let sum = |losses: &[f64]| losses.iter().sum::<f64>();
            let (before, want, got) = (sum(&error(&first)), sum(&error(&want)), sum(&last));
            assert!(want < 0.99 * before, "{bits} bits: {want} of {before}");
            assert!((got - want).abs() < 0.02 * (before - want), "{got} {want} {before}");
        }
    }
}

#[test]
fn refinement_in_another_order_is_the_same() {
    let (rows, n, group) = (20, 96, 32);
    let (w, h) = (random(rows * n, 9), hessian(n, 4));
    let order: Vec<u32> = (0..n as u32).map(|i| i * 35 % n as u32).collect();
    let groups: Vec<u32> = (0..n as u32).map(|p| p / group as u32).collect();
    let permute = |m: &[f32]| -> Vec<f32> {
        let at = |i: usize| order[i / n] as usize * n + order[i % n] as usize;
        (0..n * n).map(|i| m[at(i)]).collect()
    };
    let hessian = permute(&h);
    let diagonal: Vec<f32> = (0..n).map(|i| hessian[i * n + i]).collect();
    let u = inverse_factor(hessian.clone(), n).unwrap();
    let sweep = Sweep {
        factor: Some(&u),
        order: &order,
        groups: &groups,
        static_groups: false,
        grid: GRID,
    };
    let first = sweep.run(&Pool::new(1), &w, rows);
    let mut swept = first.clone();
    let refine = Refine {
        hessian: &hessian,
        diagonal: &diagonal,
        order: &order,
        groups: &groups,
        grid: GRID,
        rounds: 2,
    };
    refine.run(&Pool::new(2), &w, &mut swept);
    // The same columns under other names.
    let renamed: Vec<f32> =
        w.chunks(n).flat_map(|row| order.iter().map(|&k| row[k as usize])).collect();
    let (natural, _) = identity(n, group);
    let mut same = first.clone();
    for (p, &k) in order.iter().enumerate() {
        let codes = &first.codes[k as usize * rows..][..rows];
        same.codes[p * rows..][..rows].copy_from_slice(codes);
    }
    Refine { order: &natural, ..refine }.run(&Pool::new(1), &renamed, &mut same);
    assert_eq!((&swept.scales, &swept.losses), (&same.scales, &same.losses));
    let q = dequantize(&swept, &groups, &order, rows);
    assert!(losses(&w, &q, &h, n).iter().sum::<f64>() < first.losses.iter().sum::<f64>());
}
