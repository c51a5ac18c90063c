//! Losses over rows of logits.

use crate::arch::{Kernel, LANES, Simd, dispatch};
use crate::math;
use crate::pool::Pool;
use crate::tensor::Tensor;

/// Log of the sum of exponentials of a row: the maximum in f32, the sum in f64 over 16 partial
/// sums, so that vocabularies of 10^5 lose nothing.
struct LogSumExp<'a>(&'a [f32]);

impl Kernel for LogSumExp<'_> {
    type Output = f64;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f64 {
        let x = self.0;
        let whole = x.len() - x.len() % LANES;
        let mut m = S::splat(f32::NEG_INFINITY);
        for i in (0..whole).step_by(LANES) {
            m = S::max(m, S::load(x.as_ptr().add(i)));
        }
        let max = x[whole..].iter().fold(S::max_lane(m), |a, &b| a.max(b));
        let (vmax, mut total) = (S::splat(max), 0.0f64);
        // Partial sums stay short, so f32 keeps them exact to 1e-7.
        for piece in x[..whole].chunks(256 * LANES) {
            let mut acc = S::splat(0.0);
            for i in (0..piece.len()).step_by(LANES) {
                let v = S::load(piece.as_ptr().add(i));
                acc = S::add(acc, math::exp::<S>(S::sub(v, vmax)));
            }
            total += f64::from(S::sum(acc));
        }
        total += x[whole..].iter().map(|&v| f64::from(v - max).exp()).sum::<f64>();
        f64::from(max) + total.ln()
    }
}

/// Σ e^(p - lp) ((p - lp) - (q - lq)) of two rows with their log-sum-exps.
struct RowDivergence<'a> {
    p: &'a [f32],
    q: &'a [f32],
    lp: f64,
    lq: f64,
}

impl Kernel for RowDivergence<'_> {
    type Output = f64;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f64 {
        let Self { p, q, lp, lq } = self;
        let whole = p.len() - p.len() % LANES;
        let (vlp, shift) = (S::splat(lp as f32), S::splat((lq - lp) as f32));
        let mut total = 0.0f64;
        for (p, q) in p[..whole].chunks(256 * LANES).zip(q[..whole].chunks(256 * LANES)) {
            let mut acc = S::splat(0.0);
            for i in (0..p.len()).step_by(LANES) {
                let (a, b) = (S::load(p.as_ptr().add(i)), S::load(q.as_ptr().add(i)));
                let weight = math::exp::<S>(S::sub(a, vlp));
                acc = S::fma(weight, S::add(S::sub(a, b), shift), acc);
            }
            total += f64::from(S::sum(acc));
        }
        for (&a, &b) in p[whole..].iter().zip(&q[whole..]) {
            total += (f64::from(a) - lp).exp() * (f64::from(a) - f64::from(b) + lq - lp);
        }
        total
    }
}

/// The index of the largest element, the first among equals; `None` for an empty row or one that
/// holds a NaN.
pub fn argmax(row: &[f32]) -> Option<usize> {
    // The largest by lanes, which compilers turn into vectors, then the first place that holds it.
    let (pieces, rest) = row.as_chunks::<16>();
    let (mut max, mut nan) = ([f32::NEG_INFINITY; 16], [false; 16]);
    for piece in pieces {
        for i in 0..16 {
            max[i] = if piece[i] > max[i] { piece[i] } else { max[i] };
            nan[i] |= piece[i].is_nan();
        }
    }
    if nan.contains(&true) || rest.iter().any(|v| v.is_nan()) {
        return None;
    }
    let largest = max.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter().position(|&v| v == largest)
}

fn collect<T: Copy + Default + Send>(
    pool: &Pool,
    n: usize,
    f: &(dyn Fn(usize) -> T + Sync),
) -> Vec<T> {
    let slots: Vec<std::sync::Mutex<T>> =
        (0..n).map(|_| std::sync::Mutex::new(T::default())).collect();
    pool.run(n, &|i| {
        if let Ok(mut slot) = slots[i].lock() {
            *slot = f(i);
        }
    });
    slots.into_iter().map(|s| s.into_inner().unwrap_or_default()).collect()
}

/// Negative log-likelihood in nats of `targets[i]` under row i of `logits` `[n, vocab]`.
///
/// # Panics
/// If a target is outside the vocabulary or the counts differ.
#[track_caller]
pub fn cross_entropy(pool: &Pool, logits: &Tensor, targets: &[u32]) -> Vec<f64> {
    assert_eq!(logits.rows(), targets.len(), "one target per row");
    assert!(targets.iter().all(|&t| (t as usize) < logits.cols()), "target outside the vocabulary");
    collect(pool, targets.len(), &|i| {
        let row = logits.row(i);
        dispatch(LogSumExp(row)) - f64::from(row[targets[i] as usize])
    })
}

/// How far a row of logits is from its reference.
#[derive(Debug, Clone, Copy, Default)]
pub struct Divergence {
    /// Kullback-Leibler divergence D(reference ‖ model) in nats.
    pub kl: f64,
    /// Whether both have their maximum at the same token.
    pub same_top: bool,
}

/// Divergence of each row of `logits` from the same row of `reference`, both `[n, vocab]`.
///
/// # Panics
/// If the shapes differ.
#[track_caller]
pub fn kl_divergence(pool: &Pool, reference: &Tensor, logits: &Tensor) -> Vec<Divergence> {
    assert_eq!(
        (reference.rows(), reference.cols()),
        (logits.rows(), logits.cols()),
        "shapes differ"
    );
    collect(pool, logits.rows(), &|i| {
        let (p, q) = (reference.row(i), logits.row(i));
        let (lp, lq) = (dispatch(LogSumExp(p)), dispatch(LogSumExp(q)));
        let kl = dispatch(RowDivergence { p, q, lp, lq });
        // Rounding can make the divergence of near-equal rows slightly negative. NaN stays NaN.
        let kl = if kl < 0.0 { 0.0 } else { kl };
        Divergence { kl, same_top: argmax(p) == argmax(q) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn match_f64() {
        let pool = Pool::new(2);
        let n = 5003;
        let row = |k: usize| (0..n).map(move |i| ((i * k % 977) as f32) * 0.013 - 4.0);
        let p = Tensor::from_vec(2, n, row(31).chain(row(7)).collect());
        let q = Tensor::from_vec(2, n, row(31).map(|x| x * 1.02).chain(row(11)).collect());
        let logp = |t: &Tensor, r: usize| {
            let z: f64 = t.row(r).iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            t.row(r).iter().map(|&x| f64::from(x) - z).collect::<Vec<_>>()
        };
        let nll = cross_entropy(&pool, &p, &[5, 4000]);
        let kl = kl_divergence(&pool, &p, &q);
        for r in 0..2 {
            let (a, b) = (logp(&p, r), logp(&q, r));
            assert!((nll[r] + a[[5, 4000][r]]).abs() < 1e-6);
            let want: f64 = a.iter().zip(&b).map(|(x, y)| x.exp() * (x - y)).sum();
            assert!((kl[r].kl - want).abs() < 1e-6 * (1.0 + want), "{} {want}", kl[r].kl);
        }
        assert!(kl[0].same_top);
    }

    #[test]
    fn what_is_no_number_diverges() {
        let pool = Pool::new(1);
        let row = |x: f32| Tensor::from_vec(1, 3, vec![1.0, x, 2.0]);
        let kl = |p: f32, q: f32| kl_divergence(&pool, &row(p), &row(q))[0].kl;
        assert_eq!(kl(0.5, 0.5), 0.0);
        for bad in [f32::NAN, f32::INFINITY] {
            assert!(kl(0.5, bad).is_nan() && kl(bad, 0.5).is_nan(), "{bad}");
        }
    }

    #[test]
    fn argmax_rejects_nan() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(argmax(&[f32::NEG_INFINITY]), Some(0));
        assert_eq!(argmax(&[1.0, f32::NAN]), None);
        assert_eq!(argmax(&[]), None);
    }
}
