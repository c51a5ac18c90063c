//! The settings of a run and their checks.

use gptq_format::{Bits, CheckpointFormat, Dynamic, ModuleSettings, QuantizeConfig};

use crate::error::{QuantizeError, Result};
use crate::token_weights::TokenWeights;

/// How weights become codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Column sweep with error feedback (Frantar et al. 2023).
    Gptq,
    /// Round to nearest; uses no data.
    Rtn,
    /// Greedy optimal brain quantizer (Frantar & Alistarh 2022): exact, O(in³) per row.
    Obq,
}

impl Method {
    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::Rtn => "rtn",
            Self::Obq => "obq",
        }
    }

    /// Whether it uses calibration data.
    pub fn needs_calibration(self) -> bool {
        self != Self::Rtn
    }
}

/// What is done with an expert that too few calibration tokens were routed to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MoeFallback {
    /// Its weights are rounded to nearest.
    #[default]
    Rtn,
    /// It is solved on what it computes for all tokens, as if every token had been routed to it.
    AllTokens,
}

impl MoeFallback {
    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::AllTokens => "all-tokens",
        }
    }

    /// Whether an expert with this many tokens for a stage of this many inputs is left to the fallback: none, or fewer
    /// than a quarter.
    pub(crate) fn applies(tokens: usize, inputs: usize) -> bool {
        tokens == 0 || tokens.saturating_mul(4) < inputs
    }
}

/// The settings of a run, by the names of GPTQModel's `QuantizeConfig`.
#[derive(Debug, Clone)]
pub struct QuantizeOptions {
    /// How weights become codes.
    pub method: Method,
    /// Bits per code.
    pub bits: Bits,
    /// Inputs that share a scale: -1 for all, else a multiple of 8.
    pub group_size: i64,
    /// Symmetric grid.
    pub sym: bool,
    /// Quantize columns by descending activation, groups along that order.
    pub desc_act: bool,
    /// Quantize columns by descending activation inside and among fixed groups (GAR).
    pub act_group_aware: bool,
    /// Find all scales before the sweep.
    pub static_groups: bool,
    /// Share of the mean diagonal added to the Hessian's diagonal, in (0, 1).
    pub damp_percent: f64,
    /// Added to `damp_percent` while the factorization fails.
    pub damp_auto_increment: f64,
    /// Exponent of the error that the search for scales minimises; `None` for min/max.
    pub mse: Option<f32>,
    /// Stages of a block see the quantized stages before them.
    pub true_sequential: bool,
    /// What is done with an expert that too few tokens were routed to.
    pub moe_fallback: MoeFallback,
    /// How much each calibration token counts.
    pub token_weights: TokenWeights,
    /// Zero-point convention of the output.
    pub format: CheckpointFormat,
    /// Per-module overrides.
    pub dynamic: Dynamic,
    /// Largest size of one safetensors file, in bytes.
    pub max_shard_bytes: u64,
    /// Quantize the head too, which must not be tied to the embedding.
    pub lm_head: bool,
    /// Most memory of the run, in bytes: above it the activations go to disk. The result does not
    /// depend on it.
    pub max_memory: Option<u64>,
    /// Replace an output directory that has content.
    pub overwrite: bool,
    /// Go on with what an interrupted run into the same directory left behind.
    pub resume: bool,
}

impl Default for QuantizeOptions {
    /// GPTQModel's defaults: 4 bits, groups of 128, symmetric, GAR, damping 0.05.
    fn default() -> Self {
        Self {
            method: Method::Gptq,
            bits: Bits::B4,
            group_size: 128,
            sym: true,
            desc_act: false,
            act_group_aware: true,
            static_groups: false,
            damp_percent: 0.05,
            damp_auto_increment: 0.01,
            mse: None,
            true_sequential: true,
            moe_fallback: MoeFallback::default(),
            token_weights: TokenWeights::default(),
            format: CheckpointFormat::Gptq,
            dynamic: Dynamic::default(),
            max_shard_bytes: 4 << 30,
            lm_head: false,
            max_memory: None,
            overwrite: false,
            resume: false,
        }
    }
}

impl QuantizeOptions {
    /// Checks ranges and combinations.
    ///
    /// # Errors
    /// [`QuantizeError::Option`] naming the option.
    pub fn check(&self) -> Result<()> {
        let error =
            |option, reason: &str| Err(QuantizeError::Option { option, reason: reason.to_owned() });
        let group = self.group_size;
        if group != -1 && (group < 8 || group % 8 != 0) {
            return error("group_size", "must be -1 or a multiple of 8");
        }
        if self.desc_act && self.act_group_aware {
            return error("act_group_aware", "cannot be combined with desc_act; choose one order");
        }
        if !(self.damp_percent > 0.0 && self.damp_percent < 1.0) {
            return error("damp_percent", "must lie between 0 and 1, both excluded");
        }
        if !(0.0..1.0).contains(&self.damp_auto_increment) {
            return error("damp_auto_increment", "must be at least 0 and below 1");
        }
        if self.mse.is_some_and(|norm| !(norm > 0.0 && norm <= 8.0)) {
            return error("mse", "the exponent must be above 0 and at most 8; 2.4 is usual");
        }
        if self.method == Method::Obq && self.desc_act {
            return error("desc_act", "OBQ chooses its own order; leave desc_act off");
        }
        Ok(())
    }

    /// The settings as a checkpoint records them.
    pub fn config(&self) -> QuantizeConfig {
        let mut config =
            QuantizeConfig::new(self.bits, self.group_size, self.sym, self.desc_act, self.format);
        config.damp_percent = self.method.needs_calibration().then_some(self.damp_percent);
        config.true_sequential = Some(self.true_sequential);
        config.static_groups = Some(self.static_groups);
        config.act_group_aware = Some(self.act_group_aware);
        config.mse = Some(self.mse.map_or(0.0, |norm| f64::from((norm * 1000.0).round()) / 1000.0));
        config.dynamic = self.dynamic.clone();
        config.lm_head = self.lm_head;
        config
    }

    /// The exponent of the scale search for a module.
    pub(crate) fn mse_of(settings: &ModuleSettings) -> Option<f32> {
        settings.mse.map(|norm| norm as f32).filter(|&norm| norm > 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contradictions_name_the_option() {
        let bad = |change: fn(&mut QuantizeOptions)| {
            let mut options = QuantizeOptions::default();
            change(&mut options);
            options.check().unwrap_err().to_string()
        };
        assert!(QuantizeOptions::default().check().is_ok());
        assert!(bad(|o| o.group_size = 12).starts_with("group_size"));
        assert!(bad(|o| o.group_size = 0).starts_with("group_size"));
        assert!(bad(|o| o.desc_act = true).starts_with("act_group_aware"));
        assert!(bad(|o| o.damp_percent = 0.0).starts_with("damp_percent"));
        assert!(bad(|o| o.damp_percent = f64::NAN).starts_with("damp_percent"));
        assert!(bad(|o| o.mse = Some(-1.0)).starts_with("mse"));
    }
}
