//! From logits to a token.
//!
//! Order of operations, the same as transformers': repetition penalty, temperature, top-k, top-p, min-p, draw. Each filter
//! works on the probabilities of what the earlier ones left. Ties go to the lower token id, everywhere.
//!
//! Random numbers are xoshiro256++ (Blackman & Vigna 2019) seeded through SplitMix64 from the seed and a stream number, and
//! probabilities are computed in f64 with a software exponential: the same logits, seed and stream give the same tokens on
//! every platform.

use std::cmp::Ordering;

use gptq_compute::argmax;

use crate::random::Xoshiro;
use crate::{ModelError, Result};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 takes the most likely token (after the repetition penalty).
    pub temperature: f32,
    /// Only the `top_k` most likely tokens; 0: all.
    pub top_k: usize,
    /// Only the most likely tokens whose probabilities sum up to `top_p`; 1: all.
    pub top_p: f32,
    /// Only tokens at least `min_p` times as likely as the most likely one; 0: all.
    pub min_p: f32,
    /// Logits of tokens that occurred before are divided by this where positive, multiplied where negative (Keskar et al.
    /// 2019); 1: off.
    pub repetition_penalty: f32,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Checks the ranges of all options.
    ///
    /// # Errors
    /// The first option that is out of range.
    pub fn check(&self) -> Result<()> {
        let in_range = |option, value: f32, ok: bool, expected| {
            if ok { Ok(()) } else { Err(ModelError::Sampling { option, value, expected }) }
        };
        let Self { temperature: t, top_p, min_p, repetition_penalty: r, .. } = *self;
        in_range("temperature", t, t >= 0.0 && t.is_finite(), "a finite number of at least 0")?;
        in_range("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1")?;
        in_range("min_p", min_p, (0.0..=1.0).contains(&min_p), "from 0 to 1")?;
        in_range("repetition_penalty", r, r > 0.0 && r.is_finite(), "a finite number above 0")
    }
}

/// Chooses the tokens of one sequence. Its buffers are reused: nothing is allocated after the first tokens.
#[derive(Debug)]
pub struct Sampler {
    options: Sampling,
    random: Xoshiro,
    /// Tokens that occurred, in order of first occurrence.
    seen: Vec<u32>,
    /// One bit per token id that occurred.
    seen_bits: Vec<u64>,
    candidates: Vec<Candidate>,
    steps: usize,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// Penalised logit over temperature, later the weight exp(logit - largest).
    value: f64,
    id: u32,
}

impl Sampler {
    /// A sampler with the random numbers of `stream`; sequences with different stream numbers are independent.
    ///
    /// # Errors
    /// An option that is out of range.
    pub fn new(options: Sampling, stream: u64) -> Result<Self> {
        options.check()?;
        Ok(Self {
            random: Xoshiro::new(options.seed, stream),
            options,
            seen: Vec::new(),
            seen_bits: Vec::new(),
            candidates: Vec::new(),
            steps: 0,
        })
    }

    /// Makes tokens known to the repetition penalty: the prompt, and every token that is appended.
    pub fn observe(&mut self, ids: &[u32]) {
        if self.options.repetition_penalty == 1.0 {
            return;
        }
        for &id in ids {
            let (word, bit) = (id as usize / 64, 1 << (id % 64));
            if self.seen_bits.len() <= word {
                self.seen_bits.resize(word + 1, 0);
            }
            if self.seen_bits[word] & bit == 0 {
                self.seen_bits[word] |= bit;
                self.seen.push(id);
            }
        }
    }

    /// Chooses a token from `logits` `[vocab]`.
    ///
    /// # Errors
    /// If a logit is NaN or positive infinity, or none is finite.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let step = self.steps;
        self.steps += 1;
        let bad = |what| Err(ModelError::BadLogits { what, step });
        let Some(best) = argmax(logits) else {
            return bad(if logits.is_empty() { "infinite" } else { "NaN" });
        };
        if !logits[best].is_finite() {
            return bad("infinite");
        }
        if self.options.temperature == 0.0 && self.seen.is_empty() {
            // No penalty moves a logit: no list of candidates is needed.
            return Ok(best as u32);
        }
        self.fill(logits);
        if self.options.temperature == 0.0 {
            let best = self.candidates.iter().min_by(|a, b| order(a, b));
            // `logits` is not empty: its largest element is finite.
            return Ok(best.map_or(0, |candidate| candidate.id));
        }
        self.filter_and_weigh();
        Ok(self.draw())
    }

    /// Candidates with penalty and temperature applied, in order of id.
    fn fill(&mut self, logits: &[f32]) {
        let Sampling { temperature, repetition_penalty, .. } = self.options;
        let divisor = if temperature == 0.0 { 1.0 } else { f64::from(temperature) };
        self.candidates.clear();
        self.candidates.extend(
            (0u32..).zip(logits).map(|(id, &value)| Candidate { value: f64::from(value), id }),
        );
        let penalty = f64::from(repetition_penalty);
        for &id in self.seen.iter().filter(|&&id| (id as usize) < logits.len()) {
            let value = &mut self.candidates[id as usize].value;
            *value = if *value > 0.0 { *value / penalty } else { *value * penalty };
        }
        if divisor != 1.0 {
            for candidate in &mut self.candidates {
                candidate.value /= divisor;
            }
        }
    }

    /// Leaves the candidates that pass top-k, top-p and min-p, with their weights.
    fn filter_and_weigh(&mut self) {
        let Sampling { top_k, top_p, min_p, .. } = self.options;
        let candidates = &mut self.candidates;
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, order);
            candidates.truncate(top_k);
        }
        let largest =
            candidates.iter().map(|candidate| candidate.value).fold(f64::NEG_INFINITY, f64::max);
        for candidate in &mut *candidates {
            candidate.value = libm::exp(candidate.value - largest);
        }
        if top_p < 1.0 {
            keep_mass(candidates, f64::from(top_p));
        }
        if min_p > 0.0 {
            // The most likely token has weight 1.
            candidates.retain(|candidate| candidate.value >= f64::from(min_p));
        }
        // Selection leaves an order of its own; the draw must not depend on it.
        candidates.sort_unstable_by_key(|candidate| candidate.id);
    }

    /// One of the candidates, with probability proportional to its weight.
    fn draw(&mut self) -> u32 {
        let total: f64 = self.candidates.iter().map(|candidate| candidate.value).sum();
        let mut rest = self.random.uniform() * total;
        let mut chosen = 0;
        for candidate in self.candidates.iter().filter(|candidate| candidate.value > 0.0) {
            chosen = candidate.id;
            rest -= candidate.value;
            if rest < 0.0 {
                break;
            }
        }
        chosen
    }
}

/// Largest value first, then lowest id.
fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.value.total_cmp(&a.value).then(a.id.cmp(&b.id))
}

/// Keeps the heaviest candidates until their weights reach `share` of the total; at least one.
fn keep_mass(candidates: &mut Vec<Candidate>, share: f64) {
    const FIRST: usize = 128;
    let limit = share * candidates.iter().map(|candidate| candidate.value).sum::<f64>();
    // Only as many as needed are sorted: the mass is usually in a few.
    let (mut sorted, mut mass) = (0, 0.0);
    let mut next = FIRST;
    while sorted < candidates.len() {
        let end = next.min(candidates.len());
        let rest = &mut candidates[sorted..];
        if end - sorted < rest.len() {
            rest.select_nth_unstable_by(end - sorted - 1, order);
        }
        rest[..end - sorted].sort_unstable_by(order);
        for index in sorted..end {
            mass += candidates[index].value;
            if mass >= limit {
                candidates.truncate(index + 1);
                return;
            }
        }
        (sorted, next) = (end, end * 4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [1.0, 3.0, 2.0, 3.0, -1.0, f32::NEG_INFINITY];

    fn sampler(options: Sampling) -> Sampler {
        Sampler::new(options, 0).unwrap()
    }

    fn survivors(options: Sampling) -> Vec<u32> {
        let mut sampler = sampler(Sampling { temperature: 1.0, ..options });
        let mut found: Vec<u32> = (0..4000).map(|_| sampler.sample(&LOGITS).unwrap()).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    #[test]
    fn greedy_takes_the_largest_and_the_lowest_id_of_a_tie() {
        assert_eq!(sampler(Sampling::default()).sample(&LOGITS).unwrap(), 1);
    }

    #[test]
    fn frequencies_are_the_probabilities() {
        let mut sampler = sampler(Sampling { temperature: 2.0, seed: 7, ..Sampling::default() });
        let draws = 40000;
        let mut counts = [0usize; 6];
        for _ in 0..draws {
            counts[sampler.sample(&LOGITS).unwrap() as usize] += 1;
        }
        let weights: Vec<f64> = LOGITS.iter().map(|&x| (f64::from(x) / 2.0).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(&weights) {
            let expected = weight / total * f64::from(draws);
            assert!(
                (*count as f64 - expected).abs() <= 4.5 * expected.sqrt(),
                "{counts:?} {weights:?}"
            );
        }
        assert_eq!(counts[5], 0);
    }

    #[test]
    fn filters_keep_what_they_say() {
        let none = Sampling::default();
        assert_eq!(survivors(none), [0, 1, 2, 3, 4]);
        assert_eq!(survivors(Sampling { top_k: 1, ..none }), [1]);
        assert_eq!(survivors(Sampling { top_k: 3, ..none }), [1, 2, 3]);
        assert_eq!(survivors(Sampling { top_k: 99, ..none }), [0, 1, 2, 3, 4]);
        // Probabilities: 0.399 twice, 0.147, 0.054, 0.007.
        assert_eq!(survivors(Sampling { top_p: 0.3, ..none }), [1]);
        assert_eq!(survivors(Sampling { top_p: 0.79, ..none }), [1, 3]);
        assert_eq!(survivors(Sampling { top_p: 0.81, ..none }), [1, 2, 3]);
        assert_eq!(survivors(Sampling { min_p: 0.3, ..none }), [1, 2, 3]);
        assert_eq!(survivors(Sampling { min_p: 1.0, ..none }), [1, 3]);
    }

    #[test]
    fn top_p_over_many_candidates_equals_a_full_sort() {
        let logits: Vec<f32> = (0..5000u32)
            .map(|i| ((i.wrapping_mul(2654435761) >> 16) % 997) as f32 / 100.0)
            .collect();
        let mut all: Vec<Candidate> = (0u32..)
            .zip(&logits)
            .map(|(id, &x)| Candidate { value: f64::from(x).exp(), id })
            .collect();
        let mut kept = all.clone();
        keep_mass(&mut kept, 0.95);
        all.sort_unstable_by(order);
        let limit = 0.95 * all.iter().map(|c| c.value).sum::<f64>();
        let mut mass = 0.0;
        let mut count = 0;
        while mass < limit {
            mass += all[count].value;
            count += 1;
        }
        assert!(count > 1000, "the case has to need several rounds");
        assert_eq!(
            kept.iter().map(|c| c.id).collect::<Vec<_>>(),
            all[..count].iter().map(|c| c.id).collect::<Vec<_>>()
        );
    }

    #[test]
    fn the_repetition_penalty_lowers_positive_and_negative_logits() {
        let mut sampler = sampler(Sampling { repetition_penalty: 2.0, ..Sampling::default() });
        sampler.observe(&[1, 3, 99]);
        assert_eq!(sampler.sample(&LOGITS).unwrap(), 2);
        assert_eq!(sampler.sample(&[-1.0, -1.5, -4.0, -1.4, -9.0, -9.0]).unwrap(), 0);
        // -0.6 * 2 = -1.2 is below -1.
        assert_eq!(sampler.sample(&[-1.0, -0.6]).unwrap(), 0);
    }

    #[test]
    fn seeds_and_streams_are_reproducible_and_independent() {
        let draw = |seed, stream| {
            let mut sampler =
                Sampler::new(Sampling { temperature: 1.0, seed, ..Sampling::default() }, stream)
                    .unwrap();
            (0..64).map(|_| sampler.sample(&[0.0; 64]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, 0), draw(1, 0));
        assert_ne!(draw(1, 0), draw(1, 1));
        assert_ne!(draw(1, 0), draw(2, 0));
        assert_ne!(draw(0, 1), draw(1, 0));
    }

    #[test]
    fn broken_logits_are_errors() {
        let mut sampler = sampler(Sampling::default());
        for logits in [&[0.0, f32::NAN][..], &[f32::NEG_INFINITY; 3], &[f32::INFINITY, 0.0], &[]] {
            assert!(
                matches!(sampler.sample(logits), Err(ModelError::BadLogits { .. })),
                "{logits:?}"
            );
        }
    }

    #[test]
    fn options_out_of_range_are_named() {
        let greedy = Sampling::default();
        for (options, name) in [
            (Sampling { temperature: -1.0, ..greedy }, "temperature"),
            (Sampling { temperature: f32::NAN, ..greedy }, "temperature"),
            (Sampling { top_p: 0.0, ..greedy }, "top_p"),
            (Sampling { min_p: 1.5, ..greedy }, "min_p"),
            (Sampling { repetition_penalty: 0.0, ..greedy }, "repetition_penalty"),
        ] {
            assert!(Sampler::new(options, 0).unwrap_err().to_string().contains(name));
        }
    }
}
