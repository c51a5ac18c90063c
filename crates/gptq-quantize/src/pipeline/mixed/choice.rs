//! A width for each group: the least sum of costs within a size, by Lagrange's multipliers (Shoham
//! and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988).

use gptq_format::Bits;

/// One width that a group may have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub(super) width: Bits,
    /// Bits that the group takes in all.
    pub(super) bits: f64,
    /// What it costs the model.
    pub(super) cost: f64,
}

/// The index of a candidate for each group, such that their bits are at most `budget`; `None` where
/// that cannot be. From the smallest candidates on, the step with the largest fall of the cost per
/// bit comes first, as long as it fits: optimal for the sizes that it passes through. Equal steps come
/// in the order of the groups, so that the choice depends on the numbers alone.
pub(super) fn choose(groups: &[Vec<Candidate>], budget: f64) -> Option<Vec<usize>> {
    let hulls: Vec<Vec<usize>> = groups.iter().map(|group| hull(group)).collect();
    let mut chosen: Vec<usize> =
        hulls.iter().map(|hull| hull.first().copied()).collect::<Option<_>>()?;
    let mut used: f64 = groups.iter().zip(&chosen).map(|(group, &c)| group[c].bits).sum();
    if used > budget {
        return None;
    }
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (index, (group, hull)) in groups.iter().zip(&hulls).enumerate() {
        for pair in hull.windows(2) {
            let (from, to) = (group[pair[0]], group[pair[1]]);
            steps.push(((from.cost - to.cost) / (to.bits - from.bits), index, pair[1]));
        }
    }
    // Stable: the steps of a group stay in order, their slopes fall along the hull.
    steps.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut stopped = vec![false; groups.len()];
    for (_, index, to) in steps {
        let more = groups[index][to].bits - groups[index][chosen[index]].bits;
        if stopped[index] || used + more > budget {
            stopped[index] = true;
            continue;
        }
        used += more;
        chosen[index] = to;
    }
    Some(chosen)
}

/// The candidates on the lower convex hull of cost over bits, by ascending bits.
fn hull(group: &[Candidate]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..group.len()).collect();
    order.sort_by(|&a, &b| {
        group[a].bits.total_cmp(&group[b].bits).then(group[a].cost.total_cmp(&group[b].cost))
    });
    let slope =
        |a: usize, b: usize| (group[b].cost - group[a].cost) / (group[b].bits - group[a].bits);
    let mut hull: Vec<usize> = Vec::new();
    for index in order {
        if hull.last().is_some_and(|&last| {
            group[index].bits <= group[last].bits || group[index].cost >= group[last].cost
        }) {
            continue;
        }
        while let [.., before, last] = hull[..]
            && slope(last, index) <= slope(before, last)
        {
            hull.pop();
        }
        hull.push(index);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(weights: f64, costs: [f64; 4]) -> Vec<Candidate> {
        let widths = [Bits::B2, Bits::B3, Bits::B4, Bits::B8];
        let of = |(width, cost): (Bits, f64)| {
            let bits = weights * f64::from(width.as_u32());
            Candidate { width, bits, cost }
        };
        widths.into_iter().zip(costs).map(of).collect()
    }

    fn total(groups: &[Vec<Candidate>], chosen: &[usize]) -> (f64, f64) {
        let picked = || groups.iter().zip(chosen).map(|(g, &c)| g[c]);
        (picked().map(|c| c.bits).sum(), picked().map(|c| c.cost).sum())
    }

    #[test]
    fn bits_go_where_they_help_most() {
        let groups = [group(10.0, [9.0, 2.0, 0.5, 0.0]), group(10.0, [1.0, 0.2, 0.1, 0.0])];
        assert_eq!(choose(&groups, 39.0), None);
        assert_eq!(choose(&groups, 40.0), Some(vec![0, 0]));
        assert_eq!(choose(&groups, 50.0), Some(vec![1, 0]));
        assert_eq!(choose(&groups, 60.0), Some(vec![2, 0]));
        assert_eq!(choose(&groups, 1e9), Some(vec![3, 3]));
    }

    #[test]
    fn every_choice_is_within_the_budget_and_the_best_or_near_it() {
        let mut state = 9u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f64 / (1u64 << 24) as f64
        };
        for _ in 0..50 {
            let groups: Vec<Vec<Candidate>> = (0..5)
                .map(|_| {
                    let scale = 0.1 + random();
                    let fall = [1.0, 0.2 + 0.1 * random(), 0.05, 1e-4].map(|part| part * scale);
                    group(1.0 + (random() * 4.0).floor(), fall)
                })
                .collect();
            let weights: f64 = groups.iter().map(|g| g[0].bits / 2.0).sum();
            let best = |budget: f64| {
                let all = (0..4usize.pow(5))
                    .map(|number| (0..5).map(|g| number / 4usize.pow(g) % 4).collect::<Vec<_>>());
                let within = all.map(|chosen| total(&groups, &chosen)).filter(|t| t.0 <= budget);
                within.map(|(_, cost)| cost).fold(f64::INFINITY, f64::min)
            };
            let budget = 3.4 * weights;
            let (bits, cost) = total(&groups, &choose(&groups, budget).unwrap());
            assert!(bits <= budget);
            assert!(cost <= 1.5 * best(budget), "{cost} {}", best(budget));
            // What is least with bits at a price is the best of its size.
            for price in (-24..4).map(|exponent| 2f64.powf(f64::from(exponent) / 2.0)) {
                let priced = |c: &Candidate| c.cost + price * c.bits;
                let least = |group: &Vec<Candidate>| {
                    (0..4).min_by(|&a, &b| priced(&group[a]).total_cmp(&priced(&group[b])))
                };
                let chosen: Vec<usize> = groups.iter().filter_map(least).collect();
                let (bits, cost) = total(&groups, &chosen);
                assert_eq!(choose(&groups, bits), Some(chosen));
                assert!((cost - best(bits)).abs() < 1e-12, "{cost} {}", best(bits));
            }
        }
    }

    #[test]
    fn candidates_above_the_hull_are_not_stopped_at() {
        // Three bits are hardly better than two.
        let odd = group(1.0, [1.0, 0.99, 0.1, 0.0]);
        assert_eq!(hull(&odd), [0, 2, 3]);
        // More bits and no less cost.
        assert_eq!(hull(&group(1.0, [1.0, 1.0, 2.0, 0.5])), [0, 3]);
    }
}
