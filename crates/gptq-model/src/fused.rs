//! Where queries, keys and values lie in the output of a fused projection.

use crate::spec::Attention;

/// Order of the outputs of a fused query-key-value projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FusedOrder {
    /// All queries, all keys, all values.
    Concat,
    /// For each key head: its queries, the key, the value. With as many key heads as heads: q, k, v per head.
    Grouped,
    /// CodeGen: as if cut over `parts` devices, each with its queries, values, keys.
    Devices {
        /// Number of parts.
        parts: usize,
    },
}

/// Columns of a fused projection: (first column, count) runs of queries, keys and values.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FusedColumns {
    /// Queries.
    pub q: Vec<(usize, usize)>,
    /// Keys.
    pub k: Vec<(usize, usize)>,
    /// Values.
    pub v: Vec<(usize, usize)>,
}

impl FusedOrder {
    /// Where queries, keys and values lie in the output of the fused projection.
    pub fn columns(self, attention: &Attention) -> FusedColumns {
        let Attention { heads, kv_heads, head_dim, .. } = *attention;
        let (q, kv) = (attention.q_width(), attention.kv_width());
        let mut columns = FusedColumns::default();
        match self {
            Self::Concat => {
                columns = FusedColumns { q: vec![(0, q)], k: vec![(q, kv)], v: vec![(q + kv, kv)] };
            }
            Self::Grouped => {
                let group = heads / kv_heads * head_dim;
                for first in (0..kv_heads).map(|head| head * (group + 2 * head_dim)) {
                    columns.q.push((first, group));
                    columns.k.push((first + group, head_dim));
                    columns.v.push((first + group + head_dim, head_dim));
                }
            }
            Self::Devices { parts } => {
                let part = q / parts;
                for first in (0..parts).map(|index| index * 3 * part) {
                    columns.q.push((first, part));
                    columns.v.push((first + part, part));
                    columns.k.push((first + 2 * part, part));
                }
            }
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Qkv;

    fn attention(heads: usize, kv_heads: usize, head_dim: usize) -> Attention {
        Attention {
            heads,
            kv_heads,
            head_dim,
            scale: 1.0,
            scale_by_depth: false,
            causal: true,
            relative: None,
            soft_cap: None,
            clip_qkv: None,
            qkv: Qkv::Fused { name: "qkv", order: FusedOrder::Concat },
            qkv_bias: false,
            qk_norm: None,
            out: "o",
            out_bias: false,
        }
    }

    #[test]
    fn every_order_covers_every_column_once() {
        let cases = [
            (FusedOrder::Concat, attention(4, 2, 8)),
            (FusedOrder::Concat, attention(4, 1, 8)),
            (FusedOrder::Grouped, attention(4, 2, 8)),
            (FusedOrder::Grouped, attention(4, 4, 8)),
            (FusedOrder::Devices { parts: 4 }, attention(8, 8, 4)),
        ];
        for (order, attention) in cases {
            let FusedColumns { q, k, v } = order.columns(&attention);
            let width = |runs: &[(usize, usize)]| runs.iter().map(|run| run.1).sum::<usize>();
            assert_eq!(
                (width(&q), width(&k), width(&v)),
                (attention.q_width(), attention.kv_width(), attention.kv_width())
            );
            let mut columns: Vec<usize> =
                [q, k, v].concat().iter().flat_map(|&(first, len)| first..first + len).collect();
            columns.sort_unstable();
            assert_eq!(
                columns,
                (0..attention.q_width() + 2 * attention.kv_width()).collect::<Vec<_>>(),
                "{order:?}"
            );
        }
    }
}
