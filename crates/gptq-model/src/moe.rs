//! Mixture of experts: which tokens go to which expert, their rows, and the sum of what the experts make of them.

use std::io;

use gptq_compute::{Linear, Tensor, linear};

use crate::Result;
use crate::load::{LinearSource, Loader};
use crate::spec::Moe;
use crate::stages::{LinearSpec, Part};
use crate::state::{ActivationType, Ctx, restore_tensor, save_tensor};

/// The linears that decide where a token goes. They stay floats.
pub(crate) struct Router {
    pub(crate) experts: Linear,
    pub(crate) shared: Option<Linear>,
}

impl Router {
    /// Loads the router of the block named `block`.
    pub(crate) fn load(loader: &Loader<'_>, block: &str, moe: &Moe) -> Result<Self> {
        let load = |name: &str, out_features: usize| {
            let linear = LinearSpec {
                name: name.to_owned(),
                module: format!("{block}.{name}"),
                out_features,
                in_features: loader.spec.hidden,
                bias: false,
                transposed: false,
            };
            loader.linear(&linear, LinearSource::Copied)
        };
        Ok(Self {
            experts: load(moe.router, moe.count)?,
            shared: moe.shared.map(|shared| load(shared.gate, 1)).transpose()?,
        })
    }

    /// Finds the experts of each row of the MLP's `input` and keeps both in `state`.
    pub(crate) fn route(&self, ctx: &mut Ctx, moe: &Moe, input: &Tensor, state: &mut MoeState) {
        let Ctx { pool, scratch, scores, .. } = ctx;
        crate::block::copy(pool, input, &mut state.input);
        state.sum.resize(input.rows(), input.cols());
        state.sum.as_mut_slice().fill(0.0);
        state.shared.clear();
        if let Some(gate) = &self.shared {
            linear(pool, input, &mut [(gate, &mut *scores)], scratch);
            let sigmoid = |x: &f32| 1.0 / (1.0 + libm::expf(-x));
            state.shared.extend(scores.as_slice().iter().map(sigmoid));
        }
        linear(pool, input, &mut [(&self.experts, &mut *scores)], scratch);
        state.chosen.clear();
        for row in 0..scores.rows() {
            choose(scores.row_mut(row), moe, &mut state.chosen);
        }
        state.group(moe);
    }
}

/// Appends the `top_k` experts of one token with their weights; `scores` are overwritten.
fn choose(scores: &mut [f32], moe: &Moe, chosen: &mut Vec<(u32, f32)>) {
    let total = exponentials(scores);
    let first = chosen.len();
    for _ in 0..moe.top_k {
        // The first of equals, and some expert even where the scores are not numbers.
        let mut best = (0, -1.0);
        for (expert, &score) in scores.iter().enumerate() {
            if score > best.1 {
                best = (expert, score);
            }
        }
        scores[best.0] = -2.0;
        chosen.push((best.0 as u32, best.1 / total));
    }
    if moe.renormalize {
        let kept: f32 = chosen[first..].iter().map(|(_, weight)| weight).sum();
        chosen[first..].iter_mut().for_each(|(_, weight)| *weight /= kept);
    }
}

/// Replaces scores by their exponentials, the largest of which is 1, and gives the sum of these.
pub(crate) fn exponentials(scores: &mut [f32]) -> f32 {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for score in scores.iter_mut() {
        *score = libm::expf(*score - largest);
    }
    scores.iter().sum()
}

impl Moe {
    /// The part of the MLP that runs after `part`.
    pub(crate) fn after(&self, part: Part) -> Option<Part> {
        match part {
            Part::Expert(expert) if (expert as usize) + 1 < self.count => {
                Some(Part::Expert(expert + 1))
            }
            Part::Expert(_) => self.shared.map(|_| Part::Shared),
            Part::Dense | Part::Shared => None,
        }
    }
}

/// The tokens of a [`crate::BlockState`] while the experts run.
#[derive(Default)]
pub(crate) struct MoeState {
    /// Input of the MLP `[rows, hidden]`.
    pub(crate) input: Tensor,
    /// Weighted sum of the experts' outputs so far `[rows, hidden]`.
    sum: Tensor,
    /// Expert and weight, `top_k` for each row.
    chosen: Vec<(u32, f32)>,
    /// Row and weight, by expert; those of expert `e` are `starts[e]..starts[e + 1]`.
    pub(crate) routes: Vec<(u32, f32)>,
    starts: Vec<usize>,
    /// Weight of the shared expert for each row.
    pub(crate) shared: Vec<f32>,
}

impl MoeState {
    /// Sorts what was chosen by expert.
    fn group(&mut self, moe: &Moe) {
        let Self { chosen, routes, starts, .. } = self;
        starts.clear();
        starts.resize(moe.count + 2, 0);
        for (expert, _) in &*chosen {
            starts[*expert as usize + 2] += 1;
        }
        for expert in 2..starts.len() {
            starts[expert] += starts[expert - 1];
        }
        routes.clear();
        routes.resize(chosen.len(), (0, 0.0));
        for (index, (expert, weight)) in chosen.iter().enumerate() {
            let next = &mut starts[*expert as usize + 1];
            routes[*next] = ((index / moe.top_k) as u32, *weight);
            *next += 1;
        }
    }

    /// Copies the rows of `part` into `input`.
    pub(crate) fn enter(&self, part: Part, input: &mut Tensor) {
        let Part::Expert(expert) = part else {
            input.resize(self.input.rows(), self.input.cols());
            input.as_mut_slice().copy_from_slice(self.input.as_slice());
            return;
        };
        self.enter_as(self, expert, input);
    }

    /// Copies those rows into `input` that `other` routes to `expert`.
    pub(crate) fn enter_as(&self, other: &Self, expert: u32, input: &mut Tensor) {
        let routes = other.routes(expert);
        input.resize(routes.len(), self.input.cols());
        for (index, (row, _)) in routes.iter().enumerate() {
            input.row_mut(index).copy_from_slice(self.input.row(*row as usize));
        }
    }

    /// Adds what `part` made of its rows.
    pub(crate) fn leave(&mut self, part: Part, out: &Tensor) {
        let mut sum = std::mem::take(&mut self.sum);
        for (index, (row, weight)) in self.parts(part).enumerate() {
            let pairs = sum.row_mut(row).iter_mut().zip(out.row(index));
            pairs.for_each(|(sum, out)| *sum += weight * out);
        }
        self.sum = sum;
    }

    /// The rows of `part` in their order, and the weights of what it makes of them.
    pub(crate) fn parts(&self, part: Part) -> impl Iterator<Item = (usize, f32)> {
        let (routes, shared) = match part {
            Part::Expert(expert) => (self.routes(expert), &[][..]),
            Part::Dense | Part::Shared => (&[][..], self.shared.as_slice()),
        };
        let routes = routes.iter().map(|&(row, weight)| (row as usize, weight));
        routes.chain(shared.iter().copied().enumerate())
    }

    /// The MLP's output, in exchange for a buffer.
    pub(crate) fn finish(&mut self, out: &mut Tensor) {
        std::mem::swap(&mut self.sum, out);
    }

    /// Size of its buffers in bytes.
    pub(crate) fn bytes(&self) -> usize {
        let routes = self.chosen.capacity() + self.routes.capacity();
        self.input.capacity_bytes()
            + self.sum.capacity_bytes()
            + routes * size_of::<(u32, f32)>()
            + self.shared.capacity() * size_of::<f32>()
    }

    /// Most bytes that [`MoeState::save`] writes for `rows` rows.
    pub(crate) fn saved_bytes(
        moe: &Moe,
        hidden: usize,
        rows: usize,
        kind: ActivationType,
    ) -> usize {
        let lists = rows * moe.top_k * size_of::<(u32, f32)>() + rows * size_of::<f32>();
        let starts = (moe.count + 2) * size_of::<u64>();
        2 * rows * hidden * kind.size() + lists + starts
    }

    /// Writes what the experts that are still to run need.
    pub(crate) fn save(&self, to: &mut impl io::Write, kind: ActivationType) -> io::Result<()> {
        save_tensor(&self.input, to, kind)?;
        save_tensor(&self.sum, to, kind)?;
        let starts: Vec<u64> = self.starts.iter().map(|&start| start as u64).collect();
        let pack = |&(row, weight): &(u32, f32)| u64::from(row) << 32 | u64::from(weight.to_bits());
        let routes: Vec<u64> = self.routes.iter().map(pack).collect();
        let lengths = [starts.len(), routes.len(), self.shared.len()].map(|len| len as u64);
        to.write_all(bytemuck::cast_slice(&lengths))?;
        to.write_all(bytemuck::cast_slice(&starts))?;
        to.write_all(bytemuck::cast_slice(&routes))?;
        to.write_all(bytemuck::cast_slice(&self.shared))
    }

    /// Reads what [`MoeState::save`] wrote.
    pub(crate) fn restore(
        &mut self,
        from: &mut impl io::Read,
        kind: ActivationType,
    ) -> io::Result<()> {
        restore_tensor(&mut self.input, from, kind)?;
        restore_tensor(&mut self.sum, from, kind)?;
        let mut lengths = [0u64; 3];
        from.read_exact(bytemuck::cast_slice_mut(&mut lengths))?;
        let [mut starts, mut routes] = [lengths[0], lengths[1]].map(|len| vec![0u64; len as usize]);
        from.read_exact(bytemuck::cast_slice_mut(&mut starts))?;
        from.read_exact(bytemuck::cast_slice_mut(&mut routes))?;
        self.shared.resize(lengths[2] as usize, 0.0);
        from.read_exact(bytemuck::cast_slice_mut(&mut self.shared))?;
        self.starts = starts.into_iter().map(|start| start as usize).collect();
        let unpack = |packed: u64| ((packed >> 32) as u32, f32::from_bits(packed as u32));
        self.routes = routes.into_iter().map(unpack).collect();
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn fill(&mut self, routes: &[(u32, f32)]) {
        self.sum = Tensor::from_vec(1, 2, vec![3.0, 4.0]);
        self.routes = routes.to_vec();
        self.starts = vec![0, routes.len(), routes.len()];
        self.shared = vec![0.5, -0.5];
    }

    /// The routes to an expert.
    pub(crate) fn starts(&self, expert: u32) -> std::ops::Range<usize> {
        self.starts[expert as usize]..self.starts[expert as usize + 1]
    }

    /// The rows that go to an expert.
    pub(crate) fn rows(&self, expert: u32) -> Vec<u32> {
        self.routes(expert).iter().map(|(row, _)| *row).collect()
    }

    fn routes(&self, expert: u32) -> &[(u32, f32)] {
        &self.routes[self.starts(expert)]
    }
}
