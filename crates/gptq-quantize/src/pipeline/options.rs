//! The settings of a run and their checks.

use gptq_compute::Activations;
use gptq_compute::sweep::{Grid, ScaleSearch};
use gptq_format::{Bits, CheckpointFormat, Dynamic, ModuleSettings, QuantizeConfig};
use gptq_model::ActivationType;

use crate::error::{QuantizeError, Result};
use crate::order::OrderOptions;
use crate::solver::Correction;
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
    /// Activation-aware scales and clipped ranges, rounded to nearest (Lin et al. 2023).
    Awq,
}

impl Method {
    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::Rtn => "rtn",
            Self::Obq => "obq",
            Self::Awq => "awq",
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
    /// Quantize columns by descending activation over all groups; groups and their scales are fixed
    /// before, so that engines need no order. Without effect where `desc_act` is set.
    pub act_order_static: bool,
    /// Find all scales before the sweep.
    pub static_groups: bool,
    /// Share of the mean diagonal added to the Hessian's diagonal, in (0, 1).
    pub damp_percent: f64,
    /// Let windows that are held out choose that share for each stage instead.
    pub damp_auto: bool,
    /// Added to `damp_percent` while the factorization fails.
    pub damp_auto_increment: f64,
    /// What the scales are chosen for.
    pub scale_search: ScaleSearch,
    /// Scales of symmetric grids may be negative, so that the larger weights of a group lie where the
    /// grid reaches one step further.
    pub signed_scales: bool,
    /// Rounds of closed-form scales and coordinate descent after the sweep; 0 for none.
    pub refine: usize,
    /// Passes over some of the calibration tokens that scales and norms of each block are tuned for, by gradient
    /// towards the float block's output, when its codes are found; 0 for none.
    pub tune_blocks: usize,
    /// Stages of a block see the quantized stages before them.
    pub true_sequential: bool,
    /// What is done with an expert that too few tokens were routed to.
    pub moe_fallback: MoeFallback,
    /// How much each calibration token counts.
    pub token_weights: TokenWeights,
    /// How linears that are quantized already take their inputs in the calibration's forward pass; unless
    /// in f32, the inputs of Hessians and both sides of attention's and of the float model's products are rounded to
    /// 16 bits, too, where the processor multiplies pairs of these.
    pub activations: Activations,
    /// How activations are kept between stages.
    pub activation_dtype: ActivationType,
    /// How linears make up for inputs that are not those of the float model.
    pub correction: Correction,
    /// The share of that difference which is corrected, above 0 and at most 1; `None` for the usual one
    /// of the correction.
    pub correction_strength: Option<f64>,
    /// Fold AWQ's activation-aware scales into each block before it is quantized; [`Method::Awq`] does
    /// so always.
    pub awq_scales: bool,
    /// Zero-point convention of the output.
    pub format: CheckpointFormat,
    /// Per-module overrides.
    pub dynamic: Dynamic,
    /// How `bits` and `dynamic` were chosen for a size, for the report ([`super::apply_target`]).
    pub mixed: Option<super::MixedReport>,
    /// Largest size of one safetensors file, in bytes.
    pub max_shard_bytes: u64,
    /// Quantize the head too, which must not be tied to the embedding.
    pub lm_head: bool,
    /// Most memory of the run, in bytes: above it the activations go to disk, and a run that needs more still is
    /// refused. `None`: they go to disk where the machine has too little memory for them. The result does not
    /// depend on it.
    pub max_memory: Option<u64>,
    /// Replace an output directory that has content.
    pub overwrite: bool,
    /// Go on with what an interrupted run into the same directory left behind.
    pub resume: bool,
}

impl Default for QuantizeOptions {
    /// Those of [`Method::Gptq`].
    fn default() -> Self {
        Self::for_method(Method::Gptq)
    }
}

impl QuantizeOptions {
    /// GPTQModel's 4 bits, groups of 128, symmetric, GAR and damping 0.05. What GPTQ has on top of that gave much lower
    /// perplexities in and out of domain at the same size: scales by the solver's weights and of either sign, and
    /// weights moved for the errors of their inputs (docs/concepts/options.md). The order makes no difference to such
    /// scales. Refinement is off: it lowered the loss on the calibration text by a few percent and the perplexity of
    /// other text not at all. The other methods are baselines, as they were published (but
    /// for the symmetric grid of groups without negative weights, which is that of GPTQ).
    pub fn for_method(method: Method) -> Self {
        let gptq = method == Method::Gptq;
        Self {
            method,
            bits: Bits::B4,
            group_size: 128,
            sym: true,
            desc_act: false,
            act_group_aware: true,
            act_order_static: false,
            static_groups: false,
            damp_percent: 0.05,
            damp_auto: false,
            damp_auto_increment: 0.01,
            scale_search: if gptq { ScaleSearch::Hessian } else { ScaleSearch::MinMax },
            signed_scales: gptq,
            refine: 0,
            tune_blocks: 0,
            true_sequential: true,
            moe_fallback: MoeFallback::default(),
            token_weights: match method {
                Method::Gptq | Method::Rtn => TokenWeights::default(),
                Method::Obq | Method::Awq => TokenWeights::Uniform,
            },
            activations: Activations::Bf16,
            activation_dtype: ActivationType::default(),
            correction: if gptq { Correction::Qep } else { Correction::None },
            correction_strength: None,
            awq_scales: false,
            format: CheckpointFormat::Gptq,
            dynamic: Dynamic::default(),
            mixed: None,
            max_shard_bytes: 4 << 30,
            lm_head: false,
            max_memory: None,
            overwrite: false,
            resume: false,
        }
    }

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
        if self.act_order_static && self.act_group_aware {
            return error("order", "act-static cannot be combined with act_group_aware");
        }
        if self.refine > MOST_ROUNDS {
            return error("refine", "at most 100 rounds; three give most of the gain");
        }
        if self.refine > 0 && !self.method.needs_calibration() {
            return error("refine", "needs calibration data, which rtn has none of");
        }
        if self.tune_blocks > MOST_ROUNDS {
            return error("tune_blocks", "at most 100 passes; three give most of the gain");
        }
        if self.tune_blocks > 0 && !self.method.needs_calibration() {
            return error("tune_blocks", "needs calibration data, which rtn has none of");
        }
        if matches!(self.scale_search, ScaleSearch::Power(norm) if !(norm > 0.0 && norm <= 8.0)) {
            return error("mse", "the exponent must be above 0 and at most 8; 2.4 is usual");
        }
        if self.scale_search == ScaleSearch::Hessian && self.method != Method::Gptq {
            return error(
                "scale_search",
                "hessian weighs columns as the sweep of the method gptq does; choose minmax or mse",
            );
        }
        if self.scale_search != ScaleSearch::MinMax && self.method == Method::Awq {
            return error("scale_search", "AWQ searches ranges itself; leave it at minmax");
        }
        if self.damp_auto && self.method != Method::Gptq {
            return error("damp_percent", "auto is for the method gptq alone; give a number");
        }
        match (self.correction, self.method) {
            (Correction::None, _) | (_, Method::Gptq) | (Correction::Qep, Method::Obq) => {}
            (_, Method::Rtn | Method::Awq) => {
                return error(
                    "correction",
                    "rounding to nearest has no sweep to correct; choose none, or the method gptq",
                );
            }
            (_, Method::Obq) => {
                return error("correction", "obq has no sweep to correct; only qep fits before it");
            }
        }
        if self.correction == Correction::Gptaq && self.refine > 0 {
            return error("refine", "would undo what gptaq corrects; leave it at 0");
        }
        if self.correction_strength.is_some_and(|share| !(share > 0.0 && share <= 1.0)) {
            return error("correction_strength", "must be above 0 and at most 1");
        }
        if self.awq_scales && self.method == Method::Rtn {
            return error("awq_scales", "rounding to nearest with them is --method awq");
        }
        let ordered = self.desc_act || self.act_order_static;
        if matches!(self.method, Method::Rtn | Method::Awq) && ordered {
            return error("desc_act", "rounding to nearest has no order; leave --order alone");
        }
        if self.folds() && self.correction != Correction::None {
            return error(
                "correction",
                "does not go with AWQ's scales, as the float model is not folded; choose none",
            );
        }
        if self.method == Method::Obq && ordered {
            return error("desc_act", "OBQ chooses its own order; leave --order alone");
        }
        Ok(())
    }

    /// The grid of a module's codes.
    pub(crate) fn grid_of(&self, settings: &ModuleSettings) -> Grid {
        Grid {
            bits: settings.bits.as_u32(),
            sym: settings.sym,
            search: self.search_of(settings),
            signed: self.signed_scales,
            min_zero: u8::from(self.format == CheckpointFormat::Gptq),
            f16_scales: true,
        }
    }

    /// Whether the calibration tokens run through each block once more, because it is tuned after they did.
    pub(crate) fn runs_blocks_again(&self) -> bool {
        self.tune_blocks > 0 && self.true_sequential
    }

    /// Whether scales are folded into the blocks.
    pub(crate) fn folds(&self) -> bool {
        self.awq_scales || self.method == Method::Awq
    }

    /// The settings as a checkpoint records them.
    pub fn config(&self) -> QuantizeConfig {
        let mut config =
            QuantizeConfig::new(self.bits, self.group_size, self.sym, self.desc_act, self.format);
        let solves = matches!(self.method, Method::Gptq | Method::Obq);
        config.damp_percent = (solves && !self.damp_auto).then_some(self.damp_percent);
        config.true_sequential = Some(self.true_sequential);
        config.static_groups = Some(self.static_groups);
        config.act_group_aware = Some(self.act_group_aware && self.method == Method::Gptq);
        let (search, norm) = match self.scale_search {
            ScaleSearch::MinMax => ("minmax", 0.0),
            ScaleSearch::Power(norm) => ("mse", f64::from((norm * 1000.0).round()) / 1000.0),
            ScaleSearch::Hessian => ("hessian", 0.0),
        };
        config.mse = Some(norm);
        let order = match (self.desc_act, self.act_group_aware, self.act_order_static) {
            (true, ..) => "desc-act",
            (_, true, _) => "group-aware",
            (.., true) => "act-static",
            _ => "natural",
        };
        for (key, value) in [
            ("order", order.into()),
            ("scale_search", search.into()),
            ("signed_scales", (self.sym && self.signed_scales).into()),
            ("refine", self.refine.into()),
            ("token_weights", self.token_weights.name().into()),
            ("correction", self.correction.name().into()),
        ] {
            let used = match key {
                "order" => self.method == Method::Gptq,
                "token_weights" => self.method.needs_calibration(),
                _ => true,
            };
            if used {
                config.meta.insert(key.to_owned(), value);
            }
        }
        if self.tune_blocks > 0 {
            config.meta.insert("tune_blocks".to_owned(), self.tune_blocks.into());
        }
        if self.damp_auto {
            config.meta.insert("damp_percent_auto".to_owned(), true.into());
        }
        if let Some(strength) = self.correction_share() {
            config.meta.insert("correction_strength".to_owned(), strength.into());
        }
        if self.folds() {
            config.meta.insert("awq_scales".to_owned(), true.into());
        }
        config.dynamic = self.dynamic.clone();
        config.lm_head = self.lm_head;
        config
    }

    /// The share of the input error that is corrected, if any is.
    pub(crate) fn correction_share(&self) -> Option<f64> {
        let corrects = self.correction != Correction::None;
        corrects.then(|| self.correction_strength.unwrap_or(self.correction.usual_strength()))
    }

    /// What the scales of a module are chosen for: an exponent among its settings, else what holds
    /// for the run.
    pub(crate) fn search_of(&self, settings: &ModuleSettings) -> ScaleSearch {
        match (settings.mse.map(|norm| norm as f32), self.scale_search) {
            (Some(norm), _) if norm > 0.0 => ScaleSearch::Power(norm),
            (_, ScaleSearch::Hessian) => ScaleSearch::Hessian,
            _ => ScaleSearch::MinMax,
        }
    }

    /// The order of a module's columns; from left to right unless `ordered`.
    pub(crate) fn order_of(&self, settings: &ModuleSettings, ordered: bool) -> OrderOptions {
        let group_aware = settings.act_group_aware.unwrap_or(self.act_group_aware);
        let static_order = self.act_order_static && !settings.desc_act && !group_aware;
        OrderOptions {
            group_size: settings.group_size,
            desc_act: ordered && (settings.desc_act || static_order),
            act_group_aware: ordered && !settings.desc_act && group_aware,
            static_groups: static_order || settings.static_groups.unwrap_or(self.static_groups),
        }
    }
}

/// The most rounds that may be asked for.
const MOST_ROUNDS: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::ColumnOrder;

    #[test]
    fn act_static_is_act_order_with_groups_in_place() {
        let options = QuantizeOptions {
            act_order_static: true,
            act_group_aware: false,
            ..QuantizeOptions::default()
        };
        let config = options.config();
        assert_eq!((config.desc_act, config.act_group_aware), (false, Some(false)));
        let settings = config.settings_for("m").unwrap();
        let order = options.order_of(&settings, true);
        assert!(order.desc_act && order.static_groups && !order.act_group_aware);
        let natural = options.order_of(&settings, false);
        assert!(!natural.desc_act && natural.static_groups);
        let columns =
            ColumnOrder::new(&[1.0, 4.0, 2.0, 3.0], OrderOptions { group_size: 2, ..order });
        assert_eq!((columns.order, columns.g_idx), (vec![1, 3, 2, 0], vec![0, 0, 1, 1]));
        // A rule for a module asks for groups along the order.
        let order = options.order_of(&ModuleSettings { desc_act: true, ..settings }, true);
        assert!(order.desc_act && !order.static_groups);
    }

    #[test]
    fn an_exponent_of_a_module_goes_before_the_search_of_the_run() {
        for (search, mse, want) in [
            (ScaleSearch::MinMax, Some(2.0), ScaleSearch::Power(2.0)),
            (ScaleSearch::Hessian, Some(2.0), ScaleSearch::Power(2.0)),
            (ScaleSearch::Hessian, Some(0.0), ScaleSearch::Hessian),
            (ScaleSearch::Power(2.4), Some(0.0), ScaleSearch::MinMax),
        ] {
            let options = QuantizeOptions { scale_search: search, ..QuantizeOptions::default() };
            let settings = options.config().settings_for("m").unwrap();
            assert_eq!(options.search_of(&settings), search);
            assert_eq!(options.search_of(&ModuleSettings { mse, ..settings }), want);
        }
        let meta = QuantizeOptions::default().config().meta;
        assert!(meta.contains_key("scale_search") && meta.contains_key("refine"));
    }

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
        assert!(bad(|o| o.act_order_static = true).starts_with("order"));
        assert!(bad(|o| o.refine = 101).starts_with("refine"));
        let corrected = |correction, method| {
            let options = QuantizeOptions { correction, ..QuantizeOptions::for_method(method) };
            options.check().map_err(|error| error.to_string())
        };
        let searched = |search, method| {
            let scale_search = search;
            let options = QuantizeOptions { scale_search, ..QuantizeOptions::for_method(method) };
            options.check().map_err(|error| error.to_string())
        };
        let mse = ScaleSearch::Power(2.4);
        for method in [Method::Rtn, Method::Obq, Method::Awq] {
            let refused = searched(ScaleSearch::Hessian, method);
            assert!(refused.is_err_and(|error| error.starts_with("scale_search")));
            assert_eq!(searched(mse, method).is_ok(), method != Method::Awq);
            for desc_act in [true, false] {
                let ordered = QuantizeOptions {
                    desc_act,
                    act_order_static: !desc_act,
                    act_group_aware: false,
                    ..QuantizeOptions::for_method(method)
                };
                let refused = ordered.check().map_err(|error| error.to_string());
                assert!(refused.is_err_and(|error| error.starts_with("desc_act")));
            }
        }
        assert!(corrected(Correction::Qep, Method::Obq).is_ok());
        assert!(corrected(Correction::Qronos, Method::Gptq).is_ok());
        assert!(corrected(Correction::Gptaq, Method::Obq).is_err_and(|e| e.contains("qep")));
        assert!(corrected(Correction::Qep, Method::Rtn).is_err_and(|e| e.contains("nearest")));
        assert!(bad(|o| o.correction_strength = Some(1.5)).starts_with("correction_strength"));
        assert!(bad(|o| (o.correction, o.refine) = (Correction::Gptaq, 3)).starts_with("refine"));
        assert!(bad(|o| o.awq_scales = true).starts_with("correction"));
        assert!(
            bad(|o| *o =
                QuantizeOptions { awq_scales: true, ..QuantizeOptions::for_method(Method::Rtn) })
            .starts_with("awq_scales")
        );
        for method in [Method::Rtn, Method::Obq, Method::Awq] {
            assert!(QuantizeOptions::for_method(method).check().is_ok());
        }
        assert!(bad(|o| o.scale_search = ScaleSearch::Power(-1.0)).starts_with("mse"));
    }
}
