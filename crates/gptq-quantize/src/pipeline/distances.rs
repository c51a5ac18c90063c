//! The embedding of distances in the Hessians of the projections that read it beside the tokens (DeBERTa).
//!
//! A score adds products of a query and a key with products of each and the distance between them. Where
//! distances go through the projections of queries and keys, an error there harms a score as much as one
//! in a token's query or key, and in directions that tokens may never show: GPTQ, which moves errors to
//! where no input goes, would put them there. Each score reads one query, one key and one distance, so
//! that distances count in all as much as tokens do, each by the share of the scores that read it. The
//! projection of values sees tokens alone.

use gptq_compute::Gram;
use gptq_model::{Block, Ctx, Stage};

use super::activations::Activations;

/// What some linears of a stage read besides the tokens.
pub(crate) struct DistanceInputs {
    /// Σ w x xᵀ with weights that add up to 1.
    pub(super) gram: Gram,
    /// Indices of the linears.
    pub(super) linears: Vec<usize>,
}

impl Activations<'_> {
    /// The distances between the tokens of all windows as the linears of `stage` read them, if any do.
    pub(super) fn distances(
        &self,
        ctx: &mut Ctx,
        block: &Block,
        stage: Stage,
    ) -> Option<DistanceInputs> {
        let relative = self.spec.attention.relative.filter(|_| stage == Stage::Qkv)?;
        let lengths = || self.chunks.iter().flatten().map(ExactSizeIterator::len);
        let mut shares = vec![0.0; 2 * relative.span];
        let scores: f64 = lengths().map(|length| (length * length) as f64).sum();
        for distance in 0..lengths().max()? {
            let reads = lengths().map(|length| length.saturating_sub(distance) as f64).sum::<f64>();
            let distance = distance as i64;
            shares[relative.row(distance)] += reads / scores;
            if distance > 0 {
                shares[relative.row(-distance)] += reads / scores;
            }
        }
        let read = |&id: &u32| shares[id as usize] > 0.0;
        let ids: Vec<u32> = (0..shares.len() as u32).filter(read).collect();
        let (mut rows, linears) = block.distance_inputs(ctx, &ids)?;
        for (row, &id) in ids.iter().enumerate() {
            let factor = shares[id as usize].sqrt() as f32;
            for x in rows.row_mut(row) {
                *x *= factor;
            }
        }
        let mut gram = Gram::new(rows.cols());
        gram.accumulate(&ctx.pool, &rows);
        Some(DistanceInputs { gram, linears })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use gptq_compute::Pool;
    use gptq_format::Checkpoint;
    use gptq_model::{ActivationType, LinearSource, Spec};
    use gptq_testkit::fixtures;

    use super::*;
    use crate::TokenWeights;
    use crate::calibration::{CalibrationOptions, CalibrationReport, CalibrationSet};

    /// Windows of different lengths.
    fn windows() -> CalibrationSet {
        let windows: Vec<Vec<u32>> =
            [40, 1, 7].iter().map(|&length| (0..length).map(|i| i % 90).collect()).collect();
        let options = CalibrationOptions { nsamples: windows.len(), seqlen: 40, seed: 0 };
        let report = CalibrationReport::new(Vec::new(), &windows, &options, 96);
        CalibrationSet::from_windows(windows, report)
    }

    fn inputs(fixture: &str, stage: Stage) -> Option<(Checkpoint, Option<DistanceInputs>)> {
        let checkpoint = Checkpoint::open(&fixtures::dir(fixture)?).unwrap();
        let spec = Arc::new(Spec::for_checkpoint(&checkpoint).unwrap());
        let mut ctx = Ctx::new(Arc::new(Pool::new(2)));
        let kept = (TokenWeights::Balanced, ActivationType::F32);
        let block = Block::load(&checkpoint, &spec, 1, LinearSource::Unset).unwrap();
        let set = windows();
        let activations =
            Activations::embed(&mut ctx, &checkpoint, &spec, &set, kept, None).unwrap();
        let found = activations.distances(&mut ctx, &block, stage);
        Some((checkpoint, found))
    }

    #[test]
    fn every_score_counts_the_distance_that_it_reads() {
        let Some((checkpoint, found)) = inputs("deberta_v2", Stage::Qkv) else { return };
        let DistanceInputs { gram, linears } = found.unwrap();
        assert_eq!(linears, [0, 1], "queries and keys, not values");
        let spec = Spec::for_checkpoint(&checkpoint).unwrap();
        let relative = spec.attention.relative.unwrap();
        let (rows, width) = (2 * relative.span, spec.hidden);
        let read = |name: &str, shape: &[usize]| checkpoint.tensors.read_f32(name, shape).unwrap();
        let name = |name: &str, part: &str| format!("{}{name}.{part}", spec.base);
        let table = read(&name(relative.embedding, "weight"), &[rows, width]);
        let norm = relative.norm.unwrap();
        let weight = read(&name(norm, "weight"), &[width]);
        let bias = read(&name(norm, "bias"), &[width]);
        // Layer norm of a row, in f64.
        let row = |row: usize| -> Vec<f64> {
            let x = &table[row * width..(row + 1) * width];
            let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / width as f64;
            let var = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width as f64;
            let scale = 1.0 / (var + f64::from(spec.norm.eps)).sqrt();
            let scaled = x.iter().map(|&x| (f64::from(x) - mean) * scale);
            let affine = scaled.zip(weight.iter().zip(&bias));
            affine.map(|(x, (w, b))| x * f64::from(*w) + f64::from(*b)).collect()
        };
        let mut want = vec![0.0; width * width];
        let mut scores = 0.0;
        for window in windows().windows {
            let length = window.len() as i64;
            for distance in (0..length).flat_map(|i| (0..length).map(move |j| i - j)) {
                let x = row(relative.row(distance));
                want.iter_mut().enumerate().for_each(|(i, w)| *w += x[i / width] * x[i % width]);
                scores += 1.0;
            }
        }
        for (got, want) in gram.into_symmetric(1.0).iter().zip(want) {
            let error = (f64::from(*got) - want / scores).abs();
            assert!(error < 1e-4, "{got} {}", want / scores);
        }
    }

    #[test]
    fn other_stages_and_projections_of_their_own_read_tokens_alone() {
        for (fixture, stage) in
            [("deberta_v2", Stage::AttnOut), ("deberta_v2_own", Stage::Qkv), ("bert", Stage::Qkv)]
        {
            let Some((_, found)) = inputs(fixture, stage) else { continue };
            assert!(found.is_none(), "{fixture}");
        }
    }
}
