//! The model around the quantized linears: everything that its loader needs, and nothing that it does not know.

use std::collections::BTreeSet;
use std::sync::Arc;

use gptq_format::{Checkpoint, QuantizeConfig};
use gptq_model::{Block, Embedder, HeadLayer, LinearSource, LinearSpec, Spec, is_buffer};

use super::finding::Findings;
use crate::modules::{self, PARTS};
use crate::stats::each_chunk;

/// The linears that the config describes; none if the family is not known.
pub(super) struct Layout {
    pub(super) spec: Option<Arc<Spec>>,
    pub(super) linears: Vec<LinearSpec>,
    /// The projection to logits, tied or not.
    pub(super) head: Option<LinearSpec>,
    pub(super) tied: bool,
}

impl Layout {
    pub(super) fn of(checkpoint: &Checkpoint, findings: &mut Findings) -> Self {
        match Spec::for_checkpoint(checkpoint) {
            Ok(spec) => Self {
                linears: modules::linears(&spec),
                head: spec.head_linear(),
                tied: spec.head.tied,
                spec: Some(Arc::new(spec)),
            },
            Err(error) => {
                findings.note(
                    "unknown-model",
                    Some("config.json"),
                    format!(
                        "{error}; tensors are checked against each other, not against the model"
                    ),
                    None,
                );
                let tied = checkpoint.config.opt_bool("tie_word_embeddings").ok().flatten();
                let head = LinearSpec {
                    name: "lm_head".into(),
                    module: "lm_head".into(),
                    out_features: 0,
                    in_features: 0,
                    bias: false,
                    transposed: false,
                };
                Self { spec: None, linears: Vec::new(), head: Some(head), tied: tied == Some(true) }
            }
        }
    }

    pub(super) fn linear(&self, module: &str) -> Option<&LinearSpec> {
        self.linears.iter().chain(&self.head).find(|l| l.module == module && l.out_features > 0)
    }
}

pub(super) fn check(
    checkpoint: &Checkpoint,
    config: &QuantizeConfig,
    layout: &Layout,
    findings: &mut Findings,
) {
    check_head(checkpoint, config, layout, findings);
    check_floats(checkpoint, config, layout, findings);
    if let Some(spec) = &layout.spec {
        check_loading(checkpoint, spec, findings);
        check_unexpected(checkpoint, layout, findings);
    }
    check_values(checkpoint, findings);
}

/// The traps of a head that shares the embedding, and of one that is quantized.
fn check_head(
    checkpoint: &Checkpoint,
    config: &QuantizeConfig,
    layout: &Layout,
    findings: &mut Findings,
) {
    let Some(head) = &layout.head else { return };
    let name = head.module.as_str();
    let has = |part: &str| checkpoint.tensors.contains(&format!("{name}.{part}"));
    if layout.tied && has("qweight") {
        findings.error(
            "tied-head",
            Some(name),
            "it is quantized, but config.json ties it to the embedding (tie_word_embeddings): engines ignore one of the two",
            Some("quantize the original model again without the head, or untie the head before"),
        );
    } else if layout.tied && has("weight") {
        findings.note(
            "tied-head",
            Some(name),
            "it is stored, but config.json ties it to the embedding (tie_word_embeddings); it is not read",
            None,
        );
    } else if has("weight") && Spec::from_config(&checkpoint.config).is_ok_and(|s| s.head.tied) {
        findings.warning(
            "tied-head",
            Some(name),
            "it differs from the embedding, to which config.json ties it (tie_word_embeddings): transformers 5 reads it, \
             other engines do not",
            Some("set `tie_word_embeddings` to false in config.json"),
        );
    }
    match (config.lm_head, has("qweight")) {
        (true, false) => findings.error(
            "head-flag",
            Some(name),
            "the settings say `lm_head`: true, but it has no packed weights",
            Some("set `lm_head` to false in both configs"),
        ),
        (false, true) if !layout.tied => findings.error(
            "head-flag",
            Some(name),
            "it is quantized, but the settings do not say `lm_head`: true, so that engines look for floats",
            Some("set `lm_head` to true in both configs"),
        ),
        _ => {}
    }
}

/// Linears of the blocks that are stored as floats though no rule says so.
fn check_floats(
    checkpoint: &Checkpoint,
    config: &QuantizeConfig,
    layout: &Layout,
    findings: &mut Findings,
) {
    let head = layout.head.as_ref().map(|head| head.module.as_str());
    for linear in layout.linears.iter().filter(|l| Some(l.module.as_str()) != head) {
        let has = |part: &str| checkpoint.tensors.contains(&format!("{}.{part}", linear.module));
        if has("qweight") || !has("weight") || config.settings_for(&linear.module).is_none() {
            continue;
        }
        if listed(config, &linear.module) == Some(false) {
            continue;
        }
        findings.warning(
            "not-quantized",
            Some(&linear.module),
            "it is stored as floats, but no rule of `dynamic` leaves it out",
            Some("add a rule with `-:` to `dynamic`, by which engines know"),
        );
    }
}

/// Whether optimum's list of quantized modules, if there is one, holds the module.
fn listed(config: &QuantizeConfig, module: &str) -> Option<bool> {
    let list = config.modules_in_block_to_quantize.as_ref()?.as_array()?;
    let names = list.iter().flat_map(|entry| match entry.as_array() {
        Some(group) => group.iter().collect::<Vec<_>>(),
        None => vec![entry],
    });
    let mut names = names.filter_map(|name| name.as_str());
    Some(names.any(|name| module.ends_with(&format!(".{name}"))))
}

/// The rest is checked by the loader that would run it.
fn check_loading(checkpoint: &Checkpoint, spec: &Arc<Spec>, findings: &mut Findings) {
    let mut report = |error: gptq_model::ModelError| {
        findings.error("model-tensor", None, error.to_string(), None);
    };
    for layer in 0..spec.layer_count() {
        if let Err(error) = Block::load(checkpoint, spec, layer, LinearSource::Unset) {
            report(error);
        }
    }
    match Embedder::load(checkpoint, spec, LinearSource::Mapped) {
        Ok(embedder) => {
            if let Err(error) = HeadLayer::load(checkpoint, spec, &embedder) {
                report(error);
            }
        }
        Err(error) => report(error),
    }
}

/// Tensors that no part of the model reads.
fn check_unexpected(checkpoint: &Checkpoint, layout: &Layout, findings: &mut Findings) {
    let Some(spec) = &layout.spec else { return };
    let known: BTreeSet<&str> =
        layout.linears.iter().chain(&layout.head).map(|l| l.module.as_str()).collect();
    for name in checkpoint.tensors.names() {
        let Some((module, part)) = name.rsplit_once('.') else { continue };
        if PARTS.contains(&part) && !known.contains(module) {
            findings.warning(
                "unexpected-tensor",
                Some(name),
                "the model has no such linear; it is not read",
                None,
            );
        }
        let block = name.strip_prefix(&format!("{}{}.", spec.base, spec.blocks));
        let layer = block.and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        if layer.is_some_and(|layer| layer >= spec.layer_count()) && !is_buffer(name) {
            findings.warning(
                "unexpected-tensor",
                Some(name),
                format!("the config has {} blocks; it is not read", spec.layer_count()),
                Some("compare config.json with the model that the checkpoint was made from"),
            );
        }
    }
}

/// NaN and infinity in what is stored as floats.
fn check_values(checkpoint: &Checkpoint, findings: &mut Findings) {
    let store = &checkpoint.tensors;
    for name in store.names() {
        // Scales have their own check.
        if name.ends_with(".scales") || !store.info(name).is_ok_and(|info| info.dtype.is_float()) {
            continue;
        }
        let mut bad = 0u64;
        let read = each_chunk(store, name, |values| {
            bad += values.iter().filter(|x| !x.is_finite()).count() as u64;
        });
        if let Err(error) = read {
            findings.error("model-tensor", Some(name), error.to_string(), None);
        } else if bad > 0 {
            findings.error(
                "value-not-finite",
                Some(name),
                format!("it holds {bad} values that are NaN or infinite"),
                Some("compare it with the model that the checkpoint was made from"),
            );
        }
    }
}
