//! Seeded random numbers for tests.

/// SplitMix64 (Steele, Lea and Flood 2014): 64 bits of state, the same numbers on every platform.
#[derive(Debug, Clone)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// Starts from `seed`, or from the environment variable `GPTQ_TEST_SEED` where that is set, and
    /// prints the seed on stderr: the test runner shows it when the test fails.
    #[allow(clippy::print_stderr, reason = "a failing random test has to show its seed")]
    pub fn new(seed: u64) -> Self {
        let asked = std::env::var("GPTQ_TEST_SEED").ok().and_then(|text| text.parse().ok());
        let seed = asked.unwrap_or(seed);
        eprintln!("random seed {seed}");
        Self { state: seed }
    }

    /// The next 64 random bits.
    pub fn u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..bound` (`bound` > 0).
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.u64()) * bound as u128) >> 64) as usize
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.u64() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Standard normal, by Box and Muller's transform.
    pub fn normal(&mut self) -> f32 {
        // 1 - u is in (0, 1], so that the logarithm is finite.
        let radius = (-2.0 * (1.0 - f64::from(self.uniform())).ln()).sqrt();
        (radius * (std::f64::consts::TAU * f64::from(self.uniform())).cos()) as f32
    }

    /// `count` normal numbers with standard deviation `std`.
    pub fn normals(&mut self, count: usize, std: f32) -> Vec<f32> {
        (0..count).map(|_| self.normal() * std).collect()
    }

    /// `count` token ids in `0..vocab`.
    pub fn tokens(&mut self, count: usize, vocab: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(vocab) as u32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_a_normal() {
        let sample = Rng::new(1).normals(20_000, 2.0);
        let mean: f32 = sample.iter().sum::<f32>() / 20_000.0;
        let variance: f32 = sample.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 20_000.0;
        assert!(
            mean.abs() < 0.06 && (variance - 4.0).abs() < 0.2,
            "mean {mean} variance {variance}"
        );
    }

    #[test]
    fn below_stays_below() {
        let mut rng = Rng::new(2);
        assert!((0..1000).all(|_| rng.below(7) < 7));
    }
}
