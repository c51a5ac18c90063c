//! Root-mean-square and layer normalisation.

use crate::arch::{Kernel, LANES, Simd, dispatch};
use crate::elementwise::add_row;
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Which normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// x / rms(x) · w.
    Rms,
    /// x / rms(x) · (1 + w), as Gemma stores it.
    RmsPlusOne,
    /// (x - mean) / std · w + b.
    Layer,
}

/// A normalisation with its parameters.
#[derive(Debug, Clone)]
pub struct Norm {
    /// Which one.
    pub kind: NormKind,
    /// `[width]`; absent means 1.
    pub weight: Option<Vec<f32>>,
    /// `[width]`; absent means 0.
    pub bias: Option<Vec<f32>>,
    /// Added to the mean square or the variance.
    pub eps: f32,
}

struct Row<'a> {
    norm: &'a Norm,
    x: *const f32,
    out: *mut f32,
    n: usize,
}

impl Kernel for Row<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { norm, x, out, n } = self;
        let whole = n - n % LANES;
        let mut mean = 0.0;
        if norm.kind == NormKind::Layer {
            let mut acc = S::splat(0.0);
            for i in (0..whole).step_by(LANES) {
                acc = S::add(acc, S::load(x.add(i)));
            }
            let tail: f32 = (whole..n).map(|i| *x.add(i)).sum();
            mean = (S::sum(acc) + tail) / n as f32;
        }
        let m = S::splat(mean);
        let mut acc = S::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            let d = S::sub(S::load(x.add(i)), m);
            acc = S::fma(d, d, acc);
        }
        let tail: f32 = (whole..n).map(|i| (*x.add(i) - mean) * (*x.add(i) - mean)).sum();
        let inv = 1.0 / ((S::sum(acc) + tail) / n as f32 + norm.eps).sqrt();
        let offset = if norm.kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 };
        let (vinv, voffset) = (S::splat(inv), S::splat(offset));
        for i in (0..whole).step_by(LANES) {
            let mut y = S::mul(S::sub(S::load(x.add(i)), m), vinv);
            if let Some(w) = &norm.weight {
                y = S::mul(y, S::add(S::load(w.as_ptr().add(i)), voffset));
            }
            if let Some(b) = &norm.bias {
                y = S::add(y, S::load(b.as_ptr().add(i)));
            }
            S::store(out.add(i), y);
        }
        for i in whole..n {
            let mut y = (*x.add(i) - mean) * inv;
            if let Some(w) = &norm.weight {
                y *= w[i] + offset;
            }
            if let Some(b) = &norm.bias {
                y += b[i];
            }
            *out.add(i) = y;
        }
    }
}

/// Checks that the parameters cover a row of `n`, which the kernel relies on.
#[track_caller]
pub(crate) fn check(norm: &Norm, n: usize) {
    assert!(norm.weight.as_ref().is_none_or(|w| w.len() == n), "norm weight is not [{n}]");
    assert!(norm.bias.as_ref().is_none_or(|b| b.len() == n), "norm bias is not [{n}]");
}

/// Rows that one task handles.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (16 * 1024 / cols.max(1)).max(1)
}

/// Normalises each row of `x` `[rows, width]` into `out` of the same shape.
///
/// # Panics
/// If the parameters are not `[width]`.
#[track_caller]
pub fn norm(pool: &Pool, x: &Tensor, n: &Norm, out: &mut Tensor) {
    let cols = x.cols();
    check(n, cols);
    out.resize(x.rows(), cols);
    let raw = RawSlice::new(out.as_mut_slice());
    let step = rows_per_task(cols);
    pool.run(x.rows().div_ceil(step), &|task| {
        for row in task * step..((task + 1) * step).min(x.rows()) {
            // SAFETY: each row belongs to one task.
            let out = unsafe { raw.range(row * cols, cols) };
            dispatch(Row { norm: n, x: x.row(row).as_ptr(), out: out.as_mut_ptr(), n: cols });
        }
    });
}

/// x <- x + scale · y, and the normalised rows of that into `out`: the end of one sublayer and the
/// beginning of the next, while a row is in the nearest cache. All are `[rows, width]`.
///
/// # Panics
/// If shapes differ or the parameters are not `[width]`.
#[track_caller]
pub fn add_norm(pool: &Pool, x: &mut Tensor, y: &Tensor, scale: f32, n: &Norm, out: &mut Tensor) {
    let (rows, cols) = (x.rows(), x.cols());
    check(n, cols);
    assert_eq!((rows, cols), (y.rows(), y.cols()), "shapes differ");
    out.resize(rows, cols);
    let (stream, raw) = (RawSlice::new(x.as_mut_slice()), RawSlice::new(out.as_mut_slice()));
    let step = rows_per_task(cols);
    pool.run(rows.div_ceil(step), &|task| {
        for row in task * step..((task + 1) * step).min(rows) {
            // SAFETY: each row belongs to one task.
            let (x, out) = unsafe { (stream.range(row * cols, cols), raw.range(row * cols, cols)) };
            add_row(x, y.row(row), scale);
            dispatch(Row { norm: n, x: x.as_ptr(), out: out.as_mut_ptr(), n: cols });
        }
    });
}

/// Normalises each piece of `head_dim` columns of each row by itself, in place (q/k norm), with the
/// same norm or each with its own. With `head_dim` equal to the width it is [`norm`] in place.
///
/// # Panics
/// If the parameters are not `[head_dim]`, the width is not a multiple of it, or there are neither
/// one norm nor as many as heads.
#[track_caller]
pub fn norm_heads(pool: &Pool, x: &mut Tensor, head_dim: usize, norms: &[Norm]) {
    for n in norms {
        check(n, head_dim);
    }
    let (rows, cols) = (x.rows(), x.cols());
    assert!(cols.is_multiple_of(head_dim), "{cols} columns are not heads of {head_dim}");
    let heads = cols / head_dim;
    assert!([1, heads].contains(&norms.len()), "{} norms for {heads} heads", norms.len());
    let raw = RawSlice::new(x.as_mut_slice());
    let step = rows_per_task(cols);
    pool.run(rows.div_ceil(step), &|task| {
        for row in task * step..((task + 1) * step).min(rows) {
            // SAFETY: each row belongs to one task.
            let heads = unsafe { raw.range(row * cols, cols) }.chunks_exact_mut(head_dim);
            for (head, norm) in heads.zip(norms.iter().cycle()) {
                let out = head.as_mut_ptr();
                dispatch(Row { norm, x: out, out, n: head_dim });
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elementwise::add_scaled;

    fn oracle(x: &[f32], n: &Norm) -> Vec<f64> {
        let len = x.len() as f64;
        let x: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        let mean = if n.kind == NormKind::Layer { x.iter().sum::<f64>() / len } else { 0.0 };
        let var = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / len;
        let inv = 1.0 / (var + f64::from(n.eps)).sqrt();
        let plus = if n.kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 };
        x.iter()
            .enumerate()
            .map(|(i, v)| {
                let w = n.weight.as_ref().map_or(1.0, |w| f64::from(w[i]) + plus);
                (v - mean) * inv * w + n.bias.as_ref().map_or(0.0, |b| f64::from(b[i]))
            })
            .collect()
    }

    #[test]
    fn every_head_may_have_a_norm_of_its_own() {
        let pool = Pool::new(2);
        let own = |weight: f32| Norm {
            kind: NormKind::Rms,
            weight: Some(vec![weight; 2]),
            bias: None,
            eps: 0.0,
        };
        let mut x = Tensor::from_vec(2, 4, vec![2.0, 2.0, 3.0, -3.0, -4.0, 4.0, 5.0, 5.0]);
        norm_heads(&pool, &mut x, 2, &[own(1.0), own(10.0)]);
        assert_eq!(x.as_slice(), [1.0, 1.0, 10.0, -10.0, -1.0, 1.0, 10.0, 10.0]);
    }

    #[test]
    fn all_kinds_and_widths() {
        let pool = Pool::new(2);
        for kind in [NormKind::Rms, NormKind::RmsPlusOne, NormKind::Layer] {
            for width in [1, 7, 16, 24, 33, 576] {
                let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) * 0.07;
                let x = Tensor::from_vec(3, width, (0..3 * width).map(value).collect());
                let n = Norm {
                    kind,
                    weight: Some((0..width).map(|i| 1.0 + value(i + 5) * 0.1).collect()),
                    bias: (kind == NormKind::Layer).then(|| (0..width).map(value).collect()),
                    eps: 1e-5,
                };
                let mut out = Tensor::default();
                norm(&pool, &x, &n, &mut out);
                let mut heads = Tensor::from_vec(1, 3 * width, x.as_slice().to_vec());
                norm_heads(&pool, &mut heads, width, std::slice::from_ref(&n));
                assert_eq!(heads.as_slice(), out.as_slice());
                // In one pass or two: the same to the bit.
                let (mut one, mut two, mut fused) = (x.clone(), x.clone(), Tensor::default());
                add_scaled(&pool, &mut one, &out, 0.3);
                norm(&pool, &one, &n, &mut heads);
                add_norm(&pool, &mut two, &out, 0.3, &n, &mut fused);
                assert_eq!((one.as_slice(), heads.as_slice()), (two.as_slice(), fused.as_slice()));
                for row in 0..3 {
                    for (y, t) in out.row(row).iter().zip(oracle(x.row(row), &n)) {
                        assert!(
                            (f64::from(*y) - t).abs() < 2e-6 * (1.0 + t.abs()),
                            "{kind:?} {width}"
                        );
                    }
                }
            }
        }
    }
}
