//! Mixed precision to a size: bits for each group of fused linears, so that the whole model has at
//! most a given number of bits per weight and diverges least from the original.
//!
//! What a group costs is measured where it matters, in the logits: on some calibration tokens the
//! float model runs with this group alone at [`PROBE`] bits, and the Kullback–Leibler divergence from
//! the float model's logits is taken. (The output error of a linear cannot be compared between
//! linears: relative to its own output, the error of a value projection and of a key projection do
//! different harm, and early blocks do more than late ones.) At other bits it is scaled by the error
//! of the group's outputs, tr(ΔW·H·ΔWᵀ) / tr(W·H·Wᵀ), which a sample of rows gives at each width with
//! the grid, order and damping of the run. Divergences of groups are taken to add up.
//!
//! One pass over the float model does it all: at each block every variant of an earlier block moves
//! on, the Hessians of the block are summed, and a variant for each of its groups is made. The memory
//! is one block and the streams of the variants; the work is that of half the groups times
//! [`PROBE_TOKENS`] tokens, the solving of each linear once and of a sample of its rows four times.

mod choice;
mod groups;
mod measure;
mod rules;

use gptq_format::{Bits, Checkpoint, Dynamic};
use serde::{Deserialize, Serialize};

pub use measure::{Sensitivity, sensitivity};

use super::layout::Layout;
use super::{Job, Method, QuantizeOptions};
use crate::error::{QuantizeError, Result};
use choice::{Candidate, choose};
use gptq_model::Spec;

/// Bits at which the divergence of a group is measured: coarse enough to stand out of the noise, not
/// so coarse that the model breaks.
const PROBE: Bits = Bits::B3;
/// Tokens whose logits are compared.
const PROBE_TOKENS: usize = 512;

/// What was chosen and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MixedReport {
    /// The size asked for, in bits per weight.
    pub target_bpw: f64,
    /// The size reached, with scales, zeros and group indices.
    pub bits_per_weight: f64,
    /// Sum of the divergences expected of the groups, in nats per token.
    pub expected_kl: f64,
    /// Bits at which divergences were measured.
    pub probe_bits: u32,
    /// Tokens on which they were.
    pub probe_tokens: usize,
    /// Wall time of the measurements, in seconds.
    pub seconds: f64,
    /// The groups, in the order of the model.
    pub groups: Vec<MixedGroup>,
}

/// A group of linears that have the same bits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MixedGroup {
    /// Index of the block.
    pub layer: usize,
    /// Names of the linears within the block; of experts that of their list.
    pub modules: Vec<String>,
    /// Weights in the linears.
    pub weights: u64,
    /// Bits chosen.
    pub bits: u32,
    /// Divergence of the model with this group alone at `probe_bits`, in nats per token.
    pub kl: f64,
    /// Relative output error at 2, 3, 4 and 8 bits, of experts that saw enough tokens; `null` where the shape does not
    /// allow the width or no expert did.
    pub relative_output_error: Vec<Option<f64>>,
}

/// Chooses bits for `target` bits per weight from what was measured, and enters them into the
/// options: `bits` becomes the width of most weights, `dynamic` gets a rule for each kind of group
/// and other width behind the rules that it has.
///
/// # Errors
/// [`QuantizeError::Option`] if no choice is small enough.
pub fn apply(
    job: &Job<'_>,
    measured: &Sensitivity,
    target: f64,
    options: &mut QuantizeOptions,
) -> Result<()> {
    let spec = Spec::for_checkpoint(job.checkpoint)?;
    let layout = Layout::new(job.checkpoint, &spec, job.options)?;
    let weights = layout.quantized_weights();
    let all_bits = layout.bits_per_weight() * weights as f64;
    let own: f64 = measured.groups.iter().map(|group| group.bits_at_run).sum();
    let candidates: Vec<Vec<Candidate>> =
        measured.groups.iter().map(groups::Group::candidates).collect();
    // What no group may decide on: modules with rules of the user, and the head.
    let fixed = all_bits - own;
    let budget = target * weights as f64 - fixed;
    let least: f64 = candidates.iter().map(Vec::as_slice).map(least_bits).sum();
    let chosen = choose(&candidates, budget)
        .ok_or_else(|| unreachable_target(target, (fixed + least) / weights as f64))?;
    let picked: Vec<&Candidate> =
        candidates.iter().zip(&chosen).map(|(options, &index)| &options[index]).collect();
    let widths: Vec<Bits> = picked.iter().map(|candidate| candidate.width).collect();
    let total = fixed + picked.iter().map(|c| c.bits).sum::<f64>();
    let report = MixedReport {
        target_bpw: target,
        bits_per_weight: total / weights.max(1) as f64,
        expected_kl: picked.iter().map(|c| c.cost).sum(),
        probe_bits: PROBE.as_u32(),
        probe_tokens: measured.tokens,
        seconds: measured.seconds,
        groups: measured.groups.iter().zip(&widths).map(|(g, &bits)| g.report(bits)).collect(),
    };
    // Linears outside of the groups may follow the default, which is counted for them.
    let grouped: u64 = measured.groups.iter().map(|group| group.weights).sum();
    let base = rules::most_common(&measured.groups, &widths)
        .filter(|_| grouped == weights)
        .unwrap_or(options.bits);
    let rules = rules::rules(&spec, &measured.groups, &widths, base, job.options.dynamic.source());
    options.bits = base;
    options.dynamic = Dynamic::from_map(&rules)?;
    options.mixed = Some(report);
    Ok(())
}

/// Refuses a method without a choice of bits and a size that none reach, before anything is measured. `options` are those
/// that [`apply`] enters bits into.
///
/// # Errors
/// [`QuantizeError::Option`], or that the model cannot be read.
pub fn check_target(checkpoint: &Checkpoint, options: &QuantizeOptions, target: f64) -> Result<()> {
    if options.method != Method::Gptq {
        let reason = "chooses bits for --method gptq".to_owned();
        return Err(QuantizeError::Option { option: "target_bpw", reason });
    }
    let spec = Spec::for_checkpoint(checkpoint)?;
    let layout = Layout::new(checkpoint, &spec, options)?;
    let weights = layout.quantized_weights() as f64;
    let fewer = |group: &groups::Group| least_bits(&group.candidates()) - group.bits_at_run;
    let saved: f64 = groups::groups(&spec, &layout).iter().map(fewer).sum();
    let least = layout.bits_per_weight() + saved / weights;
    // What sums round is left to the choice.
    if target < least - 1e-9 { Err(unreachable_target(target, least)) } else { Ok(()) }
}

fn least_bits(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.bits).fold(f64::INFINITY, f64::min)
}

fn unreachable_target(target: f64, least: f64) -> QuantizeError {
    let reason = format!(
        "{target} bits per weight cannot be reached: the least is {least:.3}, with scales, zeros and group indices; a larger \
         --group-size needs less"
    );
    QuantizeError::Option { option: "target_bpw", reason }
}

/// Divides the error of rounding at one width by that at another, as the steps of the grid do.
fn grid_ratio(bits: Bits, to: Bits) -> f64 {
    let steps = |bits: Bits| f64::from((1u32 << bits.as_u32()) - 1);
    (steps(to) / steps(bits)).powi(2)
}
