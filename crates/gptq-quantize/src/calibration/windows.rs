//! Drawing windows: the generator, the offsets, and a fingerprint of what was drawn.

use std::ops::Range;

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): the
/// state grows by the golden ratio's 64 bits, the output is mixed from it. Integer arithmetic only,
/// so the same on every platform.
#[derive(Debug, Clone)]
pub(super) struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    pub(super) fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..bound`: the high half of a 128-bit product, whose bias is below `bound` /
    /// 2⁶⁴.
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}

/// `count` offsets of windows of `seqlen` tokens in a run of `tokens` >= `seqlen`, uniform over
/// `0..tokens - seqlen` as in the paper's loader (0 where the run is just one window).
pub(super) fn draw(
    tokens: usize,
    seqlen: usize,
    count: usize,
    generator: &mut SplitMix64,
) -> Vec<usize> {
    let bound = (tokens - seqlen).max(1);
    (0..count).map(|_| generator.below(bound)).collect()
}

/// `count` different ones of `records` records, or all of them, in their order in the file: the first steps of a shuffle
/// (Fisher and Yates), sorted.
pub(super) fn choose(records: usize, count: usize, generator: &mut SplitMix64) -> Vec<usize> {
    let mut all: Vec<usize> = (0..records).collect();
    if count < records {
        for index in 0..count {
            all.swap(index, index + generator.below(records - index));
        }
        all.truncate(count);
        all.sort_unstable();
    }
    all
}

/// Share of `tokens` positions that lie in at least one window.
pub(super) fn coverage(tokens: usize, windows: &[Range<usize>]) -> f64 {
    let mut sorted = windows.to_vec();
    sorted.sort_unstable_by_key(|window| (window.start, window.end));
    let (mut covered, mut end) = (0, 0);
    for window in sorted {
        covered += window.end - window.start.max(end).min(window.end);
        end = window.end.max(end);
    }
    covered as f64 / tokens.max(1) as f64
}

/// 64-bit FNV-1a over every window's length and tokens, each as 4 little-endian bytes.
pub(super) fn fingerprint(windows: &[Vec<u32>]) -> u64 {
    let words = windows
        .iter()
        .flat_map(|window| std::iter::once(window.len() as u32).chain(window.iter().copied()));
    words.flat_map(u32::to_le_bytes).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_the_published_one() {
        // The reference implementation's first outputs for seed 1234567.
        let mut generator = SplitMix64::new(1234567);
        assert_eq!(generator.next(), 6457827717110365317);
        assert_eq!(generator.next(), 3203168211198807973);
    }

    #[test]
    fn offsets_lie_in_the_papers_range_and_fill_it() {
        let offsets = draw(110, 100, 1000, &mut SplitMix64::new(3));
        let seen: std::collections::BTreeSet<_> = offsets.into_iter().collect();
        assert_eq!(seen, (0..10).collect());
        assert_eq!(draw(100, 100, 2, &mut SplitMix64::new(3)), [0, 0]);
    }

    #[test]
    fn coverage_counts_each_position_once() {
        assert_eq!(coverage(100, &[0..10, 0..10, 5..15]), 0.15);
        assert_eq!(coverage(100, &[90..100, 20..30]), 0.2);
        assert_eq!(coverage(100, &[0..10, 3..13, 4..14]), 0.14);
    }

    #[test]
    fn records_are_chosen_once_and_without_preference() {
        let mut hits = [0; 10];
        let mut generator = SplitMix64::new(5);
        for _ in 0..1000 {
            let chosen = choose(10, 4, &mut generator);
            assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]), "{chosen:?}");
            for &record in &chosen {
                hits[record] += 1;
            }
        }
        assert!(hits.iter().all(|hits| (320..480).contains(hits)), "{hits:?}");
        assert_eq!(choose(3, 4, &mut generator), [0, 1, 2]);
    }

    #[test]
    fn the_fingerprint_sees_order_and_borders() {
        let base = fingerprint(&[vec![1, 2], vec![3]]);
        assert_ne!(base, fingerprint(&[vec![2, 1], vec![3]]));
        assert_ne!(base, fingerprint(&[vec![1], vec![2, 3]]));
        assert_eq!(fingerprint(&[]), 0xcbf2_9ce4_8422_2325);
    }
}
