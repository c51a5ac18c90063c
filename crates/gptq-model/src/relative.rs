//! Scores that depend on the distance between query and key by products of their own: disentangled attention (He et al.
//! 2021).

use std::mem::swap;

use gptq_compute::{
    AttnParams, DenseMatrix, Distances, Linear, Norm, Tensor, embed, linear, norm,
    relative_attention,
};

use crate::Result;
use crate::load::{LinearSource, Loader};
use crate::stages::LinearSpec;
use crate::state::{Ctx, SeqSpan};

/// With d the distance from a key to its query, scores are `scale * (q·k + q·key(d) + k·query(d))`. Keys and queries of
/// distances are projections of an embedding of distances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relative {
    /// Tensor `[2 * span, hidden]`: the embedding of distances, relative to [`crate::Spec::base`].
    pub embedding: &'static str,
    /// Norm of its rows, relative to [`crate::Spec::base`].
    pub norm: Option<&'static str>,
    /// Distances from `-span` to `span - 1` have a row of their own; those beyond share the first or the last.
    pub span: usize,
    /// What is put in the place of the distance.
    pub buckets: Option<Buckets>,
    /// What makes keys of distances (content to position).
    pub keys: Option<DistanceLinear>,
    /// What makes queries of distances (position to content).
    pub queries: Option<DistanceLinear>,
}

/// Distances up to `half` stay as they are; the farther ones up to `limit` share as many numbers, by their logarithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buckets {
    /// Half of the number of buckets of one direction, rounded down.
    pub half: usize,
    /// The distance from which on there is one bucket.
    pub limit: usize,
}

/// A projection of the embedding of distances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DistanceLinear {
    /// The one of the tokens, quantized where that is.
    Shared,
    /// A linear with a bias, relative to the block. It is in no stage, since its inputs are not tokens, and stays floats.
    Own(&'static str),
}

impl Relative {
    /// The row of the embedding for a query `distance` tokens behind its key.
    pub fn row(&self, distance: i64) -> usize {
        let span = self.span as i64;
        let bucket = self.buckets.map_or(distance, |buckets| buckets.of(distance));
        (bucket + span).clamp(0, 2 * span - 1) as usize
    }

    /// Which of the linears for queries, keys and values read the embedding of distances too.
    pub fn shared(&self) -> Vec<usize> {
        let linears = [(0, self.queries), (1, self.keys)].into_iter();
        linears
            .filter(|(_, of)| *of == Some(DistanceLinear::Shared))
            .map(|(index, _)| index)
            .collect()
    }

    /// Linears of the block that no stage has.
    pub fn own(&self) -> impl Iterator<Item = &'static str> {
        [self.queries, self.keys].into_iter().filter_map(|of| match of {
            Some(DistanceLinear::Own(name)) => Some(name),
            _ => None,
        })
    }
}

impl Buckets {
    /// In single precision step by step, as the models were trained. A `limit` within `half` gives no order to the distances
    /// beyond, and they are what the same steps make of them.
    fn of(self, distance: i64) -> i64 {
        let (half, size) = (self.half as i64, distance.abs());
        if size <= half {
            return distance;
        }
        // Rounded once, whatever the system's logarithm of single precision is.
        let log = |of: i64| f64::from(of as f32 / half as f32).ln() as f32;
        let share = log(size) / log(self.limit as i64 - 1);
        let bucket = (share * (half - 1) as f32).ceil() + half as f32;
        // What is no number becomes the smallest integer in torch.
        if bucket.is_finite() { bucket as i64 * distance.signum() } else { -half * 4 }
    }
}

/// The embedding of distances as one block reads it.
pub(crate) struct DistanceTable {
    scheme: Relative,
    table: DenseMatrix,
    norm: Option<Norm>,
    /// Projections that are not those of the tokens.
    own_keys: Option<Linear>,
    own_queries: Option<Linear>,
}

impl DistanceTable {
    /// Loads it for `block`.
    pub(crate) fn load(
        loader: &Loader<'_>,
        block: &str,
        scheme: Relative,
        source: LinearSource,
    ) -> Result<Self> {
        let spec = loader.spec;
        // Linears outside the stages are nobody else's to set.
        let source = if source == LinearSource::Unset { LinearSource::Copied } else { source };
        let own = |of: Option<DistanceLinear>, out_features| match of {
            Some(DistanceLinear::Own(name)) => {
                let module = format!("{block}.{name}");
                let (name, in_features) = (name.to_owned(), spec.hidden);
                let (bias, transposed) = (true, spec.conv1d);
                let linear =
                    LinearSpec { name, module, out_features, in_features, bias, transposed };
                loader.linear(&linear, source).map(Some)
            }
            _ => Ok(None),
        };
        let name = |name: &str| format!("{}{name}", spec.base);
        let norm = scheme.norm.map(|norm| loader.norm(&name(norm), spec.hidden, spec.norm));
        let table = format!("{}.weight", name(scheme.embedding));
        Ok(Self {
            table: loader.matrix(&table, 2 * scheme.span, spec.hidden, source)?,
            norm: norm.transpose()?,
            own_keys: own(scheme.keys, spec.attention.kv_width())?,
            own_queries: own(scheme.queries, spec.attention.q_width())?,
            scheme,
        })
    }

    /// Rows `ids` of the embedding as the projections read them, `[ids, hidden]`.
    pub(crate) fn rows(&self, ctx: &mut Ctx, ids: &[u32], out: &mut Tensor) {
        embed(&self.table, ids, out);
        if let Some(of_rows) = &self.norm {
            norm(&ctx.pool, out, of_rows, &mut ctx.spare);
            swap(out, &mut ctx.spare);
        }
    }

    /// The attention of `ctx.q` over `ctx.k` and `ctx.v` within each of `seqs`. `linears`: those of queries and keys of
    /// tokens.
    pub(crate) fn attend(
        &self,
        ctx: &mut Ctx,
        linears: [&Linear; 2],
        seqs: &[SeqSpan<'_>],
        params: &AttnParams,
        out: &mut Tensor,
    ) {
        let reach = seqs.iter().map(|seq| seq.rows.len() as i64 - 1).max().unwrap_or(0);
        let mut rows: Vec<u32> =
            (-reach..=reach).map(|distance| self.scheme.row(distance) as u32).collect();
        let first = rows.iter().copied().min().unwrap_or(0);
        let last = rows.iter().copied().max().unwrap_or(0);
        for row in &mut rows {
            *row -= first;
        }
        let ids: Vec<u32> = (first..=last).collect();
        let mut inputs = std::mem::take(&mut ctx.wide);
        self.rows(ctx, &ids, &mut inputs);
        let Ctx { pool, scratch, q, k, v, gate, out: queries, .. } = ctx;
        let mut project = |of: Option<DistanceLinear>, own: &Option<Linear>, shared, to: &mut _| {
            let projection = own.as_ref().unwrap_or(shared);
            of.map(|_| linear(pool, &inputs, &mut [(projection, to)], scratch)).is_some()
        };
        let [of_queries, of_keys] = linears;
        let has_keys = project(self.scheme.keys, &self.own_keys, of_keys, gate);
        let has_queries = project(self.scheme.queries, &self.own_queries, of_queries, queries);
        let distances = Distances {
            rows: &rows,
            keys: has_keys.then_some(&*gate),
            queries: has_queries.then_some(&*queries),
        };
        let spans: Vec<_> = seqs.iter().map(|seq| seq.rows.clone()).collect();
        relative_attention(pool, [&*q, &*k, &*v], &spans, params, &distances, out);
        ctx.wide = inputs;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(span: usize, buckets: Option<Buckets>, distances: &[i64]) -> Vec<usize> {
        let relative =
            Relative { embedding: "", norm: None, span, buckets, keys: None, queries: None };
        distances.iter().map(|&distance| relative.row(distance)).collect()
    }

    #[test]
    fn distances_have_rows_up_to_the_span() {
        assert_eq!(rows(4, None, &[0, 1, 3, 4, 9, -1, -4, -5]), [4, 5, 7, 7, 7, 3, 0, 0]);
    }

    /// What `make_log_bucket_position` of transformers 5.23 gives, plus the span.
    #[test]
    fn far_distances_share_buckets_as_in_transformers() {
        let base = Some(Buckets { half: 128, limit: 512 });
        let near = [0, 127, 128, 129, 130, 131, -129];
        assert_eq!(rows(256, base, &near), [256, 383, 384, 385, 386, 387, 127]);
        let far = [200, 300, 511, 512, 900, -511, -900];
        assert_eq!(rows(256, base, &far), [425, 463, 511, 511, 511, 1, 0]);
        let small = Some(Buckets { half: 4, limit: 24 });
        let found: Vec<usize> = rows(8, small, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 23, 24, 29]);
        assert_eq!(found, [8, 9, 10, 11, 12, 13, 13, 13, 14, 14, 15, 15, 15, 15]);
    }
}
