//! Linears that get the same bits together, and what was measured of them.

use gptq_format::dynamic::Decision;
use gptq_format::{Bits, ModuleSettings};
use gptq_model::{LinearSpec, Part, Spec, Stage};

use super::choice::Candidate;
use super::{MixedGroup, PROBE, grid_ratio};
use crate::pipeline::layout::{Layout, linear_shape};

/// Widths to choose from.
pub(super) const WIDTHS: [Bits; 4] = [Bits::B2, Bits::B3, Bits::B4, Bits::B8];

/// Which linears of a block are bound together: engines fuse them, and a mixture's experts are one
/// module to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Qkv,
    Out,
    Up,
    Down,
    Experts,
    SharedUp,
    SharedDown,
}

impl Family {
    pub(super) fn of(stage: Stage) -> Self {
        match stage {
            Stage::Qkv => Self::Qkv,
            Stage::AttnOut => Self::Out,
            Stage::MlpUp(Part::Dense) => Self::Up,
            Stage::MlpDown(Part::Dense) => Self::Down,
            Stage::MlpUp(Part::Expert(_)) | Stage::MlpDown(Part::Expert(_)) => Self::Experts,
            Stage::MlpUp(Part::Shared) => Self::SharedUp,
            Stage::MlpDown(Part::Shared) => Self::SharedDown,
        }
    }
}

/// Linears that get the same bits, and what was measured of them.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) layer: usize,
    pub(super) family: Family,
    /// Names within the block; of experts that of their list.
    pub(super) names: Vec<String>,
    pub(super) weights: u64,
    /// Bits that it takes at the widths, and with the settings of the run.
    sizes: [Option<f64>; 4],
    pub(super) bits_at_run: f64,
    /// Relative output error at the widths, weighted by the sizes of the linears.
    pub(super) errors: [f64; 4],
    /// Weights of the linears that these are of: not those of experts that saw too few tokens.
    pub(super) measured: u64,
    /// Divergence with this group alone at the width of [`Group::probe`], in nats per token.
    pub(super) kl: f64,
}

impl Group {
    /// The widths that it may have, with what each costs.
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        let probe = self.probe();
        let error = self.errors[probe];
        let of = |(index, &width): (usize, &Bits)| {
            let ratio = if error > 0.0 {
                self.errors[index] / error
            } else {
                grid_ratio(width, WIDTHS[probe])
            };
            Some(Candidate { width, bits: self.sizes[index]?, cost: self.kl * ratio })
        };
        WIDTHS.iter().enumerate().filter_map(of).collect()
    }

    /// Place in [`WIDTHS`] of the bits at which it is measured: [`PROBE`], or the next that its shape allows.
    pub(super) fn probe(&self) -> usize {
        let usual = WIDTHS.iter().position(|&width| width == PROBE).unwrap_or(0);
        (usual..WIDTHS.len()).find(|&index| self.sizes[index].is_some()).unwrap_or(usual)
    }

    pub(super) fn report(&self, bits: Bits) -> MixedGroup {
        let error = |index: usize| {
            let known = self.sizes[index].is_some() && self.measured > 0;
            known.then(|| self.errors[index] / self.measured as f64)
        };
        MixedGroup {
            layer: self.layer,
            modules: self.names.clone(),
            weights: self.weights,
            bits: bits.as_u32(),
            kl: self.kl,
            relative_output_error: (0..WIDTHS.len()).map(error).collect(),
        }
    }
}

/// The groups whose bits are free: no rule names any of their linears.
pub(super) fn groups(spec: &Spec, layout: &Layout) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for layer in 0..spec.layer_count() {
        let mut bound = Vec::new();
        for stage in spec.stages(layer) {
            let family = Family::of(stage.stage);
            for linear in stage.linears {
                let free = layout.config.dynamic.decide(&linear.module) == Decision::Default;
                let Some(settings) = layout.settings(&linear.module).filter(|_| free) else {
                    bound.push(family);
                    continue;
                };
                let open = groups.last().is_some_and(|g| g.layer == layer && g.family == family);
                if !open {
                    groups.push(Group::new(layer, family));
                }
                if let Some(group) = groups.last_mut() {
                    group.add(&linear, settings);
                }
            }
        }
        groups.retain(|group| group.layer != layer || !bound.contains(&group.family));
    }
    groups
}

impl Group {
    pub(super) fn new(layer: usize, family: Family) -> Self {
        let (names, sizes) = (Vec::new(), [Some(0.0); 4]);
        Self {
            layer,
            family,
            names,
            weights: 0,
            sizes,
            bits_at_run: 0.0,
            errors: [0.0; 4],
            measured: 0,
            kl: 0.0,
        }
    }

    fn add(&mut self, linear: &LinearSpec, settings: &ModuleSettings) {
        self.weights += (linear.in_features * linear.out_features) as u64;
        let size = |bits| {
            let shape = linear_shape(&ModuleSettings { bits, ..*settings }, linear);
            let specs = shape.tensor_specs(&linear.module).ok()?;
            let bytes = specs.iter().filter_map(|s| s.dtype.byte_len(&s.shape)).sum::<usize>();
            Some(8.0 * bytes as f64)
        };
        for (sum, bits) in self.sizes.iter_mut().zip(WIDTHS) {
            *sum = sum.zip(size(bits)).map(|(sum, size)| sum + size);
        }
        self.bits_at_run += size(settings.bits).unwrap_or(0.0);
        let name = match self.family {
            // `mlp.experts.3.up_proj`: all that engines know of is `mlp.experts`.
            Family::Experts => linear.name.rsplitn(3, '.').nth(2).unwrap_or(&linear.name),
            _ => &linear.name,
        };
        if !self.names.iter().any(|known| known == name) {
            self.names.push(name.to_owned());
        }
    }
}
