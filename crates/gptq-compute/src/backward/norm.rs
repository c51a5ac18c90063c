//! Gradients of normalisations.

use crate::norm::{Norm, NormKind, check, rows_per_task};
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Gradient of the parameters of a [`Norm`], `[width]` each, whether the norm has them or not.
#[derive(Debug, Clone, PartialEq)]
pub struct NormGradient {
    /// Of the weight as it is stored.
    pub weight: Vec<f32>,
    /// Of the bias.
    pub bias: Vec<f32>,
}

/// Gradients of y = [`norm`](crate::norm()) of `x`, all `[rows, width]`: that of x is stored in `dx`,
/// or added to it.
///
/// # Panics
/// If the shapes do not match.
#[track_caller]
pub fn norm_backward(
    pool: &Pool,
    x: &Tensor,
    n: &Norm,
    dy: &Tensor,
    add: bool,
    dx: &mut Tensor,
) -> NormGradient {
    let norms = std::slice::from_ref(n);
    let mut gradients = norm_heads_backward(pool, x, x.cols(), norms, dy, add, dx);
    // One norm has one gradient.
    gradients.swap_remove(0)
}

/// The same of [`norm_heads`](crate::norm_heads); the gradients of the parameters of each norm.
///
/// # Panics
/// If the shapes do not match.
#[track_caller]
pub fn norm_heads_backward(
    pool: &Pool,
    x: &Tensor,
    head_dim: usize,
    norms: &[Norm],
    dy: &Tensor,
    add: bool,
    dx: &mut Tensor,
) -> Vec<NormGradient> {
    let (rows, cols) = (x.rows(), x.cols());
    assert_eq!((dy.rows(), dy.cols()), (rows, cols), "shapes differ");
    assert!(cols.is_multiple_of(head_dim), "{cols} columns are not heads of {head_dim}");
    let heads = cols / head_dim;
    assert!([1, heads].contains(&norms.len()), "{} norms for {heads} heads", norms.len());
    for norm in norms {
        check(norm, head_dim);
    }
    if add {
        assert_eq!((dx.rows(), dx.cols()), (rows, cols), "shape of the sum");
    } else {
        dx.resize(rows, cols);
        dx.as_mut_slice().fill(0.0);
    }
    let step = rows_per_task(cols);
    let tasks = rows.div_ceil(step);
    // What each task adds up for the weights and for the biases.
    let mut sums = vec![0.0f32; tasks * 2 * cols];
    let (sum, out) = (RawSlice::new(&mut sums), RawSlice::new(dx.as_mut_slice()));
    pool.run(tasks, &|task| {
        // SAFETY: each task has its own sums.
        let (weights, biases) = unsafe { sum.range(task * 2 * cols, 2 * cols) }.split_at_mut(cols);
        for row in task * step..((task + 1) * step).min(rows) {
            // SAFETY: each row belongs to one task.
            let dx = unsafe { out.range(row * cols, cols) };
            for (head, norm) in (0..heads).zip(norms.iter().cycle()) {
                let at = head * head_dim..(head + 1) * head_dim;
                let (x, dy) = (&x.row(row)[at.clone()], &dy.row(row)[at.clone()]);
                let sums = [&mut weights[at.clone()], &mut biases[at.clone()]];
                backward_row(norm, x, dy, &mut dx[at], sums);
            }
        }
    });
    let mut gradients =
        vec![NormGradient { weight: vec![0.0; head_dim], bias: vec![0.0; head_dim] }; norms.len()];
    for task in sums.chunks_exact(2 * cols.max(1)) {
        let (weights, biases) = task.split_at(cols);
        let heads = weights.chunks_exact(head_dim).zip(biases.chunks_exact(head_dim));
        for (head, (weights, biases)) in heads.enumerate() {
            let gradient = &mut gradients[head % norms.len()];
            gradient.weight.iter_mut().zip(weights).for_each(|(sum, w)| *sum += w);
            gradient.bias.iter_mut().zip(biases).for_each(|(sum, b)| *sum += b);
        }
    }
    gradients
}

/// With x' the normalised row and g = dy · w: dx = (g - mean(g) - x' mean(g x')) / std, without the
/// mean of g where x is not centred; dw = dy x'.
fn backward_row(n: &Norm, x: &[f32], dy: &[f32], dx: &mut [f32], [dw, db]: [&mut [f32]; 2]) {
    let len = x.len() as f32;
    let centred = n.kind == NormKind::Layer;
    let mean = if centred { x.iter().sum::<f32>() / len } else { 0.0 };
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / len;
    let inverse = 1.0 / (variance + n.eps).sqrt();
    let offset = if n.kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 };
    let weight = |i: usize| n.weight.as_ref().map_or(1.0, |w| w[i] + offset);
    let (mut along, mut level) = (0.0f32, 0.0f32);
    for i in 0..x.len() {
        let (g, unit) = (dy[i] * weight(i), (x[i] - mean) * inverse);
        along += g * unit;
        level += g;
        dw[i] += dy[i] * unit;
        db[i] += dy[i];
    }
    (along, level) = (along / len, if centred { level / len } else { 0.0 });
    for i in 0..x.len() {
        let unit = (x[i] - mean) * inverse;
        dx[i] += inverse * (dy[i] * weight(i) - level - unit * along);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The norm in f64.
    fn forward(x: &[f64], n: &Norm, w: &[f64], b: &[f64]) -> Vec<f64> {
        let len = x.len() as f64;
        let mean = if n.kind == NormKind::Layer { x.iter().sum::<f64>() / len } else { 0.0 };
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / len;
        let inverse = 1.0 / (variance + f64::from(n.eps)).sqrt();
        let plus = if n.kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 };
        (0..x.len()).map(|i| (x[i] - mean) * inverse * (w[i] + plus) + b[i]).collect()
    }

    fn wide(x: &[f32]) -> Vec<f64> {
        x.iter().map(|x| f64::from(*x)).collect()
    }

    /// Derivative of `f` by element `i` of `x`, by central difference in f64.
    fn slope(x: &[f64], i: usize, f: impl Fn(&[f64]) -> f64) -> f64 {
        let mut moved = x.to_vec();
        moved[i] += 1e-5;
        let above = f(&moved);
        moved[i] -= 2e-5;
        (above - f(&moved)) / 2e-5
    }

    #[test]
    fn match_differences_in_f64() {
        let value = |i: usize| ((i * 7919 % 2003) as f32 - 1000.0) / 700.0;
        for kind in [NormKind::Rms, NormKind::RmsPlusOne, NormKind::Layer] {
            for (rows, heads, width, own) in [(1, 1, 5, false), (3, 2, 7, false), (700, 3, 8, true)]
            {
                let cols = heads * width;
                let tensor = |seed: usize| {
                    let values = (0..rows * cols).map(|i| value(i + seed)).collect();
                    Tensor::from_vec(rows, cols, values)
                };
                let (x, dy) = (tensor(1), tensor(500));
                let norm = |h: usize| Norm {
                    kind,
                    weight: Some((0..width).map(|i| 1.0 + 0.3 * value(i + 9 * h)).collect()),
                    bias: Some((0..width).map(|i| value(i + 77 * h)).collect()),
                    eps: 1e-5,
                };
                let norms: Vec<Norm> = (0..if own { heads } else { 1 }).map(norm).collect();
                // Added to what was there before, here the inputs, or not.
                let mut alone = Tensor::default();
                let gradients =
                    norm_heads_backward(&Pool::new(1), &x, width, &norms, &dy, false, &mut alone);
                let mut dx = x.clone();
                let added =
                    norm_heads_backward(&Pool::new(1), &x, width, &norms, &dy, true, &mut dx);
                let mut again = x.clone();
                let threads = Pool::new(3);
                let same = norm_heads_backward(&threads, &x, width, &norms, &dy, true, &mut again);
                assert_eq!((dx.as_slice(), &gradients), (again.as_slice(), &same));
                assert_eq!(gradients, added);
                for ((alone, sum), x) in
                    alone.as_slice().iter().zip(dx.as_slice()).zip(x.as_slice())
                {
                    assert!((x + alone - sum).abs() < 1e-5 * (1.0 + sum.abs()));
                }
                let mut weights = vec![vec![0.0f64; width]; norms.len()];
                for row in 0..rows {
                    for head in 0..heads {
                        let at = head * width..(head + 1) * width;
                        let n = &norms[head % norms.len()];
                        let (xs, g) =
                            (wide(&x.row(row)[at.clone()]), wide(&dy.row(row)[at.clone()]));
                        let w = wide(n.weight.as_ref().unwrap());
                        let b = wide(n.bias.as_ref().unwrap());
                        let loss = |x: &[f64], w: &[f64]| -> f64 {
                            forward(x, n, w, &b).iter().zip(&g).map(|(y, g)| y * g).sum()
                        };
                        for i in 0..width {
                            let want = xs[i] + slope(&xs, i, |x| loss(x, &w));
                            let got = f64::from(dx.row(row)[at.start + i]);
                            assert!((got - want).abs() < 2e-5 * (1.0 + want.abs()), "{kind:?}");
                            weights[head % norms.len()][i] += slope(&w, i, |w| loss(&xs, w));
                        }
                    }
                }
                for (gradient, want) in gradients.iter().zip(&weights) {
                    for (got, want) in gradient.weight.iter().zip(want) {
                        // Sums over all rows in f32.
                        let tolerance = 1e-6 * (rows * heads) as f64 + 2e-5;
                        assert!((f64::from(*got) - want).abs() < tolerance, "{kind:?} {rows}");
                    }
                }
                let total: f64 = dy.as_slice().iter().map(|x| f64::from(*x)).sum();
                let biases: f64 =
                    gradients.iter().flat_map(|g| &g.bias).map(|x| f64::from(*x)).sum();
                assert!((total - biases).abs() < 1e-6 * (rows * cols) as f64 + 1e-5);
            }
        }
    }
}
