//! What the output holds: which modules are quantized how, and every tensor of the shards.

use std::collections::HashMap;

use gptq_format::dynamic::Decision;
use gptq_format::gptq_linear::LinearShape;
use gptq_format::{
    Checkpoint, DType, Dynamic, ModuleSettings, QuantizeConfig, ShardPlan, TensorSpec,
};
use gptq_model::{LinearSpec, Spec, Stage, is_buffer};
use serde_json::{Value, json};

use super::options::QuantizeOptions;
use crate::error::{QuantizeError, Result};

/// Names of a model's blocks that transformers (by optimum) finds by itself. Where they have another one, as in encoders,
/// it needs to be told, and opens nothing otherwise.
const GUESSED_BY_OPTIMUM: [&str; 7] = [
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "h",
    "decoder.layers",
    "layers",
];

/// A tensor that is copied, in another float type where f16 is the common one.
#[derive(Debug, Clone)]
pub(crate) struct Copied {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: DType,
}

/// The contents of the output.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) config: QuantizeConfig,
    pub(crate) plan: ShardPlan,
    pub(crate) copied: Vec<Copied>,
    /// Settings, linear and block by module name; the head's block is the one behind the last.
    modules: HashMap<String, (ModuleSettings, LinearSpec, usize)>,
    /// All parameters of the model.
    pub(crate) parameters: u64,
    /// Bytes of the quantized modules.
    quantized_bytes: u64,
}

impl Layout {
    /// Sorts out the tensors of `checkpoint`.
    pub(crate) fn new(
        checkpoint: &Checkpoint,
        spec: &Spec,
        options: &QuantizeOptions,
    ) -> Result<Self> {
        if let Some(config) = &checkpoint.quantize_config {
            let (path, bits) = (checkpoint.path.clone(), config.bits.as_u32());
            return Err(QuantizeError::AlreadyQuantized { path, bits });
        }
        let mut config = options.config();
        let blocks = spec.blocks_name();
        if !GUESSED_BY_OPTIMUM.contains(&blocks.as_str()) {
            config.other.insert("block_name_to_quantize".into(), json!(blocks));
        }
        let own = spec.attention.relative.is_some_and(|relative| relative.own().next().is_some());
        if own || spec.moe.is_some() {
            // Linears that stay floats in every block (routers, projections of distances): transformers
            // would take them for quantized ones.
            config.modules_in_block_to_quantize = Some(json!(stages_of_all_blocks(spec)));
        }
        let mut modules = HashMap::new();
        for layer in 0..spec.layer_count() {
            for linear in spec.stages(layer).into_iter().flat_map(|s| s.linears) {
                if let Some(settings) = config.settings_for(&linear.module) {
                    modules.insert(linear.module.clone(), (settings, linear, layer));
                }
            }
        }
        if modules.is_empty() {
            return Err(QuantizeError::NothingToQuantize);
        }
        if options.lm_head {
            let head = untied_head(spec)?;
            let settings = head_settings(&mut config, &head.module)?;
            if let Some(Value::Array(listed)) = &mut config.modules_in_block_to_quantize {
                // vLLM takes what is not listed for floats.
                listed.push(json!([head.module]));
            }
            modules.insert(head.module.clone(), (settings, head, spec.layer_count()));
        }
        let mut names: Vec<&str> = checkpoint.tensors.names().collect();
        names.sort_by(|a, b| natural(a).cmp(&natural(b)));
        let (mut copied, mut tensors) = (Vec::new(), Vec::new());
        let (mut parameters, mut quantized_bytes) = (0, 0);
        for name in names {
            if is_buffer(name) {
                continue;
            }
            let info = checkpoint.tensors.info(name)?;
            parameters += info.elements() as u64;
            let module = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias"));
            if let Some((settings, linear, _)) = module.and_then(|m| modules.get(m)) {
                if name.ends_with(".weight") {
                    let specs = linear_shape(settings, linear).tensor_specs(&linear.module)?;
                    quantized_bytes += specs.iter().map(bytes).sum::<u64>();
                    tensors.extend(specs);
                }
                continue;
            }
            let dtype = match info.dtype {
                DType::F32 | DType::F64 | DType::Ggml(_) => DType::F16,
                other => other,
            };
            let copy = Copied { name: name.to_owned(), shape: info.shape.clone(), dtype };
            tensors.push(TensorSpec { name: copy.name.clone(), dtype, shape: copy.shape.clone() });
            copied.push(copy);
        }
        let plan = ShardPlan::new(tensors, options.max_shard_bytes)?;
        Ok(Self { config, plan, copied, modules, parameters, quantized_bytes })
    }

    /// How a module is quantized; `None` leaves it as it is.
    pub(crate) fn settings(&self, module: &str) -> Option<&ModuleSettings> {
        self.modules.get(module).map(|(settings, ..)| settings)
    }

    /// Whether some linear of `stage` is quantized.
    pub(crate) fn quantizes(&self, spec: &Spec, layer: usize, stage: Stage) -> bool {
        spec.stage_linears(layer, stage).iter().any(|l| self.settings(&l.module).is_some())
    }

    /// Parts of the work that are finished one after the other: the blocks, and the head if it is
    /// quantized.
    pub(crate) fn units(&self, spec: &Spec) -> usize {
        spec.layer_count() + usize::from(self.config.lm_head)
    }

    /// The block of a tensor of a quantized module; `None` for all others.
    pub(crate) fn layer_of(&self, tensor: &str) -> Option<usize> {
        let (module, _) = tensor.rsplit_once('.')?;
        self.modules.get(module).map(|(_, _, layer)| *layer)
    }

    pub(crate) fn modules(&self) -> impl Iterator<Item = &LinearSpec> {
        self.modules.values().map(|(_, linear, _)| linear)
    }

    /// Weights in quantized modules.
    pub(crate) fn quantized_weights(&self) -> u64 {
        self.modules().map(|l| (l.in_features * l.out_features) as u64).sum()
    }

    /// Bits per quantized weight with everything that is stored for it.
    pub(crate) fn bits_per_weight(&self) -> f64 {
        8.0 * self.quantized_bytes as f64 / self.quantized_weights().max(1) as f64
    }

    /// The type of the floats in the output, as config.json names it.
    pub(crate) fn float_type(&self) -> &'static str {
        let bf16 = self.copied.iter().any(|c| c.dtype == DType::BF16);
        if bf16 { "bfloat16" } else { "float16" }
    }
}

/// The names of the linears of each stage that some block has, blocks' differences joined.
fn stages_of_all_blocks(spec: &Spec) -> Vec<Vec<String>> {
    let mut stages: Vec<Vec<String>> = Vec::new();
    for stage in (0..spec.layer_count()).flat_map(|layer| spec.stages(layer)) {
        let names: Vec<String> = stage.linears.into_iter().map(|linear| linear.name).collect();
        if !stages.contains(&names) {
            stages.push(names);
        }
    }
    stages
}

/// The head, if it can be quantized.
fn untied_head(spec: &Spec) -> Result<LinearSpec> {
    let refuse = |reason: &str| {
        let reason = format!("{reason}; run without --lm-head");
        Err(QuantizeError::Option { option: "lm_head", reason })
    };
    let head = &spec.head;
    if head.tied {
        return refuse(
            "the head of this model is its embedding (tie_word_embeddings), which a GPTQ checkpoint keeps as floats: \
             untie it first, by saving the model with a copy of the embedding as lm_head.weight and tie_word_embeddings \
             false",
        );
    }
    if head.unit_rows {
        return refuse(
            "this family scales the rows of its head when it is loaded, as only floats allow",
        );
    }
    match spec.head_linear() {
        Some(linear) if head.transform.is_none() => Ok(linear),
        Some(_) => {
            refuse("the head of a masked language model is part of no engine's quantized model")
        }
        None => refuse("this model gives hidden states and has no head"),
    }
}

/// The settings of the head: those of a rule of `dynamic` that names it, else GPTQModel's, which become
/// a rule.
fn head_settings(config: &mut QuantizeConfig, module: &str) -> Result<ModuleSettings> {
    if config.dynamic.decide(module) == Decision::Default {
        let mut rules = config.dynamic.source().clone();
        // Nothing behind the head makes up for its errors.
        let usual =
            json!({ "bits": 8, "group_size": 32, "sym": true, "desc_act": false, "mse": 2.4 });
        rules.insert(module.to_owned(), usual);
        config.dynamic = Dynamic::from_map(&rules)?;
    }
    config.settings_for(module).ok_or_else(|| QuantizeError::Option {
        option: "lm_head",
        reason: format!("a rule of --dynamic leaves {module} out; drop the rule or --lm-head"),
    })
}

pub(crate) fn linear_shape(settings: &ModuleSettings, linear: &LinearSpec) -> LinearShape {
    LinearShape {
        bits: settings.bits,
        in_features: linear.in_features,
        out_features: linear.out_features,
        group_size: settings.group_size,
        bias: linear.bias,
    }
}

fn bytes(spec: &TensorSpec) -> u64 {
    spec.dtype.byte_len(&spec.shape).unwrap_or(0) as u64
}

/// Sorts `layers.10` behind `layers.9`, and what has no layer before or behind by name.
fn natural(name: &str) -> Vec<(u64, &str)> {
    name.split('.').map(|part| (part.parse().map_or(0, |n: u64| n + 1), part)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_stay_together_in_order() {
        let mut names =
            vec!["model.layers.10.a", "model.layers.9.b", "model.embed", "model.norm", "lm_head"];
        names.sort_by(|a, b| natural(a).cmp(&natural(b)));
        assert_eq!(
            names,
            ["lm_head", "model.embed", "model.layers.9.b", "model.layers.10.a", "model.norm"]
        );
    }
}
