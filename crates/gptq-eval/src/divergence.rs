//! Statistics of the divergence from a reference over all scored tokens.

use gptq_compute::Divergence;
use serde::{Deserialize, Serialize};

/// Divergence of a model from its reference, D(reference ‖ model) in nats per token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DivergenceSummary {
    /// Mean.
    pub kl_mean: f64,
    /// Median.
    pub kl_median: f64,
    /// 99th percentile.
    pub kl_99: f64,
    /// 99.9th percentile.
    pub kl_99_9: f64,
    /// Largest.
    pub kl_max: f64,
    /// Share of tokens with the same most likely next token.
    pub top1_agreement: f64,
}

impl DivergenceSummary {
    /// Summarizes the divergences of all scored tokens; `None` if there are none.
    pub fn new(tokens: &[Divergence]) -> Option<Self> {
        let mut kl: Vec<f64> = tokens.iter().map(|t| t.kl).collect();
        kl.sort_by(f64::total_cmp);
        let n = kl.len();
        // The nearest rank: exact for any count, no interpolation between tokens.
        let percentile = |p: f64| kl[((p * n as f64).ceil() as usize).clamp(1, n) - 1];
        (n > 0).then(|| Self {
            kl_mean: kl.iter().sum::<f64>() / n as f64,
            kl_median: percentile(0.5),
            kl_99: percentile(0.99),
            kl_99_9: percentile(0.999),
            kl_max: kl[n - 1],
            top1_agreement: tokens.iter().filter(|t| t.same_top).count() as f64 / n as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        assert_eq!(DivergenceSummary::new(&[]), None);
        let tokens: Vec<Divergence> = (1..=1000)
            .rev()
            .map(|i| Divergence { kl: f64::from(i), same_top: i % 4 == 0 })
            .collect();
        let s = DivergenceSummary::new(&tokens).unwrap();
        assert_eq!((s.kl_median, s.kl_99, s.kl_99_9, s.kl_max), (500.0, 990.0, 999.0, 1000.0));
        assert_eq!((s.kl_mean, s.top1_agreement), (500.5, 0.25));
    }
}
