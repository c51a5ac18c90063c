//! The order in which columns are quantized and the groups they fall into.

use std::cmp::Ordering;

/// Order and groups of the columns (inputs) of one stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnOrder {
    /// Input at each position of the sweep, `[in]`.
    pub order: Vec<u32>,
    /// Group at each position of the sweep, `[in]`.
    pub groups: Vec<u32>,
    /// Group of each input, `[in]`: what is stored as `g_idx`.
    pub g_idx: Vec<u32>,
    /// Whether scales are found before the sweep.
    pub static_groups: bool,
}

/// How columns are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrderOptions {
    /// Inputs that share a scale; -1 for all of them.
    pub group_size: i64,
    /// By descending diagonal of the Hessian; groups are formed along the sweep, so that inference
    /// needs `g_idx`.
    pub desc_act: bool,
    /// By descending diagonal inside each group and among groups (GAR, arXiv 2505.14638); groups
    /// stay where they are. Without effect when `desc_act` is set or there is one group.
    pub act_group_aware: bool,
    /// Scales are found before the sweep for groups of neighbouring inputs.
    pub static_groups: bool,
}

impl ColumnOrder {
    /// The order for a Hessian with this diagonal `[in]`. Equal values keep their order.
    pub fn new(diagonal: &[f32], options: OrderOptions) -> Self {
        let n = diagonal.len();
        let OrderOptions { desc_act, act_group_aware, static_groups, .. } = options;
        let one_group = options.group_size < 0 || options.group_size as usize >= n;
        let size = if one_group { n.max(1) } else { options.group_size.max(1) as usize };
        let descending = |a: &u32, b: &u32| -> Ordering {
            diagonal[*b as usize].total_cmp(&diagonal[*a as usize])
        };
        let mut order: Vec<u32> = (0..n as u32).collect();
        if desc_act {
            order.sort_by(descending);
        } else if act_group_aware && !one_group {
            let whole = n - n % size;
            let (groups, tail) = order.split_at_mut(whole);
            groups.chunks_mut(size).for_each(|g| g.sort_by(descending));
            let mut groups: Vec<Vec<u32>> = groups.chunks(size).map(<[u32]>::to_vec).collect();
            // After sorting, a group's largest diagonal is that of its first column.
            groups.sort_by(|a, b| descending(&a[0], &b[0]));
            let tail = tail.to_vec();
            order = groups.into_iter().flatten().chain(tail).collect();
        }
        let along_sweep = desc_act && !static_groups;
        let groups: Vec<u32> = order
            .iter()
            .enumerate()
            .map(|(p, &k)| (if along_sweep { p } else { k as usize } / size) as u32)
            .collect();
        let mut g_idx = vec![0; n];
        for (&k, &g) in order.iter().zip(&groups) {
            g_idx[k as usize] = g;
        }
        // The scales of a single group are found once on the whole row, as the reference does.
        Self { order, groups, g_idx, static_groups: static_groups || one_group }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIAGONAL: [f32; 7] = [1.0, 5.0, 3.0, 9.0, 2.0, 2.0, 100.0];

    fn order(
        group_size: i64,
        desc_act: bool,
        act_group_aware: bool,
        static_groups: bool,
    ) -> ColumnOrder {
        let options = OrderOptions { group_size, desc_act, act_group_aware, static_groups };
        ColumnOrder::new(&DIAGONAL, options)
    }

    #[test]
    fn plain_order() {
        let o = order(2, false, false, false);
        assert_eq!(o.order, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(o.g_idx, [0, 0, 1, 1, 2, 2, 3]);
        assert!(!o.static_groups);
        assert!(order(-1, false, true, false).static_groups);
        assert_eq!(order(-1, false, true, false).order, [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn desc_act_scatters_groups_unless_static() {
        let o = order(2, true, false, false);
        assert_eq!(o.order, [6, 3, 1, 2, 4, 5, 0]);
        assert_eq!(o.groups, [0, 0, 1, 1, 2, 2, 3]);
        assert_eq!(o.g_idx, [3, 1, 1, 0, 2, 2, 0]);
        let o = order(2, true, false, true);
        assert_eq!(o.order, [6, 3, 1, 2, 4, 5, 0]);
        assert_eq!(o.g_idx, [0, 0, 1, 1, 2, 2, 3]);
        assert_eq!(o.groups, [3, 1, 0, 1, 2, 2, 0]);
    }

    #[test]
    fn gar_keeps_groups_and_the_tail() {
        let o = order(2, false, true, false);
        assert_eq!(o.order, [3, 2, 1, 0, 4, 5, 6]);
        assert_eq!(o.groups, [1, 1, 0, 0, 2, 2, 3]);
        assert_eq!(o.g_idx, [0, 0, 1, 1, 2, 2, 3]);
    }
}
