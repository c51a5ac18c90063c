//! The clipping search against slow loops in f64.

use half::f16;

use super::tests::{GRID, dequantize, hessian, output_error, random};
use super::*;

/// Cuts the groups of every row one after the other, with the whole error computed anew for each cut.
/// Returns the error of each row.
fn oracle(w: &[f32], h: &[f32], n: usize, group: usize, grid: Grid) -> Vec<f64> {
    let top = f64::from(grid.max_code());
    let half = f64::from(1u32 << (grid.bits - 1));
    let stored = |s: f64| f16::from_f64(s).to_f64();
    let row = |w: &[f32]| {
        let w: Vec<f64> = w.iter().map(|&x| f64::from(x)).collect();
        let mut value = w.clone();
        let error = |value: &[f64]| -> f64 {
            let e: Vec<f64> = value.iter().zip(&w).map(|(v, w)| v - w).collect();
            let product = |i: usize| (0..n).map(|j| f64::from(h[i * n + j]) * e[j]).sum::<f64>();
            (0..n).map(|i| e[i] * product(i)).sum()
        };
        // The largest cut comes with p = 0.4.
        for shrinks in [vec![0], (0..=20).collect::<Vec<_>>()] {
            for first in (0..n).step_by(group) {
                let range = first..(first + group).min(n);
                let low = w[range.clone()].iter().fold(0.0, |a: f64, &w| a.min(w));
                let high = w[range.clone()].iter().fold(0.0, |a: f64, &w| a.max(w));
                let largest = high.max(-low);
                let mut best = (f64::INFINITY, Vec::new());
                let now = value[range.clone()].to_vec();
                for cut in &shrinks {
                    let p = 1.0 - f64::from(*cut) * 0.03;
                    let mut candidates = Vec::new();
                    match (grid.sym, grid.signed) {
                        (true, true) => {
                            let sign = if -low < high { -1.0 } else { 1.0 };
                            candidates.push((stored(sign * p * largest / half), half));
                            if shrinks.len() > 1 {
                                candidates.push((stored(-sign * p * largest / half), half));
                            }
                        }
                        (true, false) => {
                            let low = if low < 0.0 { -largest } else { 0.0 };
                            candidates.push((stored(p * (largest - low) / top), half));
                        }
                        _ => {
                            let s = stored(p * (high - low) / top);
                            let z = (-p * low / s).round_ties_even().clamp(0.0, top);
                            let raised = stored(p * high / (top - 1.0));
                            candidates.push(if z < 1.0 { (raised, 1.0) } else { (s, z) });
                        }
                    }
                    for (s, z) in candidates {
                        for k in range.clone() {
                            let q = ((w[k] / s).round_ties_even() + z).clamp(0.0, top);
                            value[k] = s * (q - z);
                        }
                        let found = error(&value);
                        if found < best.0 {
                            best = (found, value[range.clone()].to_vec());
                        }
                    }
                }
                value[range.clone()].copy_from_slice(&now);
                if !best.1.is_empty() {
                    value[range].copy_from_slice(&best.1);
                }
            }
        }
        error(&value)
    };
    w.chunks(n).map(row).collect()
}

#[test]
fn the_cuts_are_those_of_the_definition_and_no_error_rises() {
    for (rows, n, group, bits) in [(37, 72, 24, 3), (70, 40, 40, 2), (17, 200, 64, 4)] {
        let (mut w, h) = (random(rows * n, 17), hessian(n, 5));
        // Outliers, which are worth cutting.
        w.iter_mut().step_by(19).for_each(|w| *w *= 3.0);
        let groups: Vec<u32> = (0..n as u32).map(|k| k / group as u32).collect();
        let order: Vec<u32> = (0..n as u32).collect();
        for (sym, signed) in [(true, false), (true, true), (false, false)] {
            let grid = Grid { bits, sym, signed, ..GRID };
            let clip = Clip { hessian: &h, inputs: n, group_len: group, grid };
            let got = clip.run(&Pool::new(1), &w);
            let again = clip.run(&Pool::new(3), &w);
            assert_eq!((&got.codes, &got.losses), (&again.codes, &again.losses));
            let nearest = Sweep {
                factor: None,
                order: &order,
                groups: &groups,
                static_groups: true,
                grid: Grid { search: ScaleSearch::MinMax, ..grid },
            };
            let nearest = dequantize(&nearest.run(&Pool::new(2), &w, rows), &groups, &order, rows);
            let want = oracle(&w, &h, n, group, grid);
            let value = dequantize(&got, &groups, &order, rows);
            let (mut sum, mut rounded) = (0.0, 0.0);
            for r in 0..rows {
                let row = r * n..(r + 1) * n;
                let error = |q: &[f32]| output_error(&w[row.clone()], &q[row.clone()], &h, n);
                let (cut, whole) = (error(&value), error(&nearest));
                assert!(cut <= whole * (1.0 + 1e-5), "row {r}: {cut} after {whole}");
                assert!((2.0 * got.losses[r] - cut).abs() < 1e-4 * cut, "row {r}");
                sum += cut;
                rounded += whole;
            }
            // Ties that f32 breaks the other way change single rows a little.
            let want: f64 = want.iter().sum();
            let case = format!("{bits} bits, sym {sym}, signed {signed}: {sum} {want} {rounded}");
            assert!((sum - want).abs() < 0.01 * want, "{case}");
            assert!(sum < 0.9 * rounded, "{case}");
        }
    }
}
