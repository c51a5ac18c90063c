//! Convolutions over the tokens of a sequence.

use std::ops::Range;

use crate::gemm::product;
use crate::pool::Pool;
use crate::tensor::{RawSlice, Tensor};

/// Tokens of one task.
const TOKENS: usize = 128;

/// A convolution as torch's Conv1d has it, with as many zeros around a sequence as keep its length.
#[derive(Debug, Clone)]
pub struct Convolution {
    /// `[out, in / groups, kernel]`, row-major.
    pub weight: Vec<f32>,
    /// `[out]`
    pub bias: Vec<f32>,
    /// Tokens that an output is made of, an odd number: itself and as many on both sides.
    pub kernel: usize,
    /// Outputs and inputs are cut into so many groups; an output sees the inputs of its group.
    pub groups: usize,
}

impl Convolution {
    /// Inputs and outputs of one group.
    fn group(&self) -> (usize, usize) {
        (self.weight.len() / (self.bias.len() * self.kernel).max(1), self.bias.len() / self.groups)
    }
}

/// The convolution of `x` `[rows, in]` into `out` `[rows, out]`. Each of `spans` is a whole sequence;
/// other rows of `out` are unspecified.
///
/// # Panics
/// If shapes do not fit, spans overlap or do not ascend, or the kernel is even.
#[track_caller]
pub fn convolve(
    pool: &Pool,
    x: &Tensor,
    spans: &[Range<usize>],
    convolution: &Convolution,
    out: &mut Tensor,
) {
    let Convolution { weight, bias, kernel, groups } = convolution;
    let (kernel, groups, width) = (*kernel, *groups, bias.len());
    assert!(kernel % 2 == 1 && groups > 0 && width.is_multiple_of(groups), "kernel and groups");
    let (inputs, outputs) = convolution.group();
    assert_eq!(weight.len(), width * inputs * kernel, "weight of the convolution");
    assert_eq!(x.cols(), groups * inputs, "input width");
    let mut end = 0;
    for span in spans {
        assert!(span.start >= end && span.end <= x.rows(), "span outside the rows or another's");
        end = span.end;
    }
    out.resize(x.rows(), width);
    let out = RawSlice::new(out.as_mut_slice());
    let tiles = spans.iter().map(|span| span.len().div_ceil(TOKENS)).max().unwrap_or(0);
    pool.run(spans.len() * tiles * groups, &|task| {
        let (group, task) = (task % groups, task / groups);
        let (span, tile) = (spans[task / tiles].clone(), task % tiles);
        let first = tile * TOKENS;
        if first >= span.len() {
            return;
        }
        let tokens = first..(first + TOKENS).min(span.len());
        let column = group * outputs;
        for token in tokens.clone() {
            // SAFETY: the columns of one group in the rows of one tile belong to one task.
            let row = unsafe { out.range((span.start + token) * width + column, outputs) };
            row.copy_from_slice(&bias[column..column + outputs]);
        }
        let weight = &weight[column * inputs * kernel..(column + outputs) * inputs * kernel];
        for tap in 0..kernel {
            // Token t takes token t + tap - kernel / 2, where the sequence has it.
            let start = tokens.start.max((kernel / 2).saturating_sub(tap));
            let end = tokens.end.min((span.len() + kernel / 2).saturating_sub(tap));
            if start >= end {
                continue;
            }
            let row = span.start + start + tap - kernel / 2;
            let source = x.as_slice()[row * x.cols() + group * inputs..].as_ptr();
            let at = (span.start + start) * width + column;
            // SAFETY: the rows of both tensors exist by the bounds above, the weights of the group and
            // the tap by its shape; the outputs belong to this task.
            unsafe {
                product(
                    (end - start, outputs, inputs),
                    (source, x.cols(), 1),
                    (weight[tap..].as_ptr(), kernel, inputs * kernel),
                    (out.at(at, (end - start - 1) * width + outputs), width, 1),
                    true,
                );
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(i: usize) -> f32 {
        ((i * 7919 % 2003) as f32 - 1000.0) / 900.0
    }

    #[test]
    #[should_panic(expected = "span outside the rows or another's")]
    fn sequences_that_overlap_are_refused() {
        let convolution =
            Convolution { weight: vec![1.0; 4], bias: vec![0.0; 2], kernel: 1, groups: 1 };
        let x = Tensor::zeros(4, 2);
        convolve(&Pool::new(2), &x, &[0..4, 0..4], &convolution, &mut Tensor::default());
    }

    #[test]
    fn matches_f64_at_the_ends_of_sequences_and_for_groups() {
        let spans = [0..1, 1..4, 4..300];
        for (kernel, groups, inputs, outputs) in
            [(1, 1, 6, 6), (3, 1, 24, 24), (3, 2, 24, 12), (5, 4, 8, 16), (9, 8, 8, 8)]
        {
            let weights = outputs * (inputs / groups) * kernel;
            let convolution = Convolution {
                weight: (0..weights).map(value).collect(),
                bias: (0..outputs).map(|i| value(i + 17)).collect(),
                kernel,
                groups,
            };
            let x =
                Tensor::from_vec(300, inputs, (0..300 * inputs).map(|i| value(i + 5)).collect());
            let (mut out, mut again) = (Tensor::default(), Tensor::default());
            convolve(&Pool::new(1), &x, &spans, &convolution, &mut out);
            convolve(&Pool::new(3), &x, &spans, &convolution, &mut again);
            assert_eq!(out.as_slice(), again.as_slice());
            for span in &spans {
                for (t, o) in span.clone().flat_map(|t| (0..outputs).map(move |o| (t, o))) {
                    let mut want = f64::from(convolution.bias[o]);
                    let per_group = inputs / groups;
                    for c in 0..per_group {
                        for tap in 0..kernel {
                            let Some(from) = (t + tap).checked_sub(kernel / 2) else { continue };
                            if span.contains(&from) {
                                let w = convolution.weight[(o * per_group + c) * kernel + tap];
                                let column = o / (outputs / groups) * per_group + c;
                                want += f64::from(w) * f64::from(x.row(from)[column]);
                            }
                        }
                    }
                    let error = (f64::from(out.row(t)[o]) - want).abs();
                    assert!(error < 2e-5, "{kernel} {groups} {span:?} {t} {o}: {error}");
                }
            }
        }
    }
}
