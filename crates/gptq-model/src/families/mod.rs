//! The table of families: `model_type` of a config.json to the function that turns the config into a [`Spec`].
//!
//! Each family is one file that says how it differs from the others; what they share in reading a config is in
//! `read.rs`. To add one: write the file, list it in [`FAMILIES`], copy a fixture to `testdata/fixtures`.

mod arcee;
mod baichuan;
mod bert;
mod bloom;
mod chatglm;
mod codegen;
mod cohere;
mod deberta_v2;
mod distilbert;
mod experts;
mod falcon;
mod gemma;
mod gemma2;
mod gemma3_text;
mod glm;
mod gpt2;
mod gpt_bigcode;
mod gpt_neo;
mod gpt_neox;
mod gptj;
mod granite;
mod internlm2;
mod llama;
mod mistral;
mod mixtral;
mod modernbert;
mod mpt;
mod olmo;
mod olmo2;
mod opt;
mod phi;
mod phi3;
mod qwen;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod read;
mod roberta;
mod seed_oss;
mod smollm3;
mod stablelm;
mod starcoder2;

use std::path::Path;

use gptq_format::Config;
use serde_json::{Map, Value};

use crate::fields::Fields;
use crate::spec::Spec;
use crate::table::FamilyTable;
use crate::{ModelError, Result};

/// A supported architecture.
#[derive(Clone, Copy)]
pub struct Family {
    /// Value of `model_type` in config.json.
    pub model_type: &'static str,
    build: fn(&Fields<'_>) -> Result<Spec>,
    /// The file of the family, which begins with what it is.
    source: &'static str,
}

impl Family {
    /// What the family is: the first lines of its file.
    pub fn about(&self) -> String {
        let lines = self.source.lines().map_while(|line| line.strip_prefix("//!"));
        lines.map(str::trim).collect::<Vec<_>>().join("\n")
    }

    /// The architecture that a config of this family describes; keys that it does not ask for are not looked at.
    pub(crate) fn build(&self, fields: &Fields<'_>) -> Result<Spec> {
        (self.build)(fields)
    }
}

impl std::fmt::Debug for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Family").field("model_type", &self.model_type).finish_non_exhaustive()
    }
}

/// A line of the table: `model_type`, the file, and its function.
macro_rules! family {
    ($model_type:literal, $file:ident :: $build:ident) => {
        Family {
            model_type: $model_type,
            build: $file::$build,
            source: include_str!(concat!(stringify!($file), ".rs")),
        }
    };
}

/// All supported architectures, by name.
pub const FAMILIES: &[Family] = &[
    family!("arcee", arcee::spec),
    family!("baichuan", baichuan::spec),
    family!("bert", bert::spec),
    family!("bloom", bloom::spec),
    family!("camembert", roberta::spec),
    family!("chatglm", chatglm::spec),
    family!("codegen", codegen::spec),
    family!("cohere", cohere::spec),
    family!("deberta-v2", deberta_v2::spec),
    family!("distilbert", distilbert::spec),
    family!("falcon", falcon::spec),
    family!("gemma", gemma::spec),
    family!("gemma2", gemma2::spec),
    family!("gemma3_text", gemma3_text::spec),
    family!("glm", glm::glm),
    family!("glm4", glm::glm4),
    family!("gpt2", gpt2::spec),
    family!("gpt_bigcode", gpt_bigcode::spec),
    family!("gpt_neo", gpt_neo::spec),
    family!("gpt_neox", gpt_neox::spec),
    family!("gptj", gptj::spec),
    family!("granite", granite::spec),
    family!("internlm2", internlm2::spec),
    family!("llama", llama::spec),
    family!("mistral", mistral::spec),
    family!("mixtral", mixtral::spec),
    family!("modernbert", modernbert::spec),
    family!("mpt", mpt::spec),
    family!("olmo", olmo::spec),
    family!("olmo2", olmo2::spec),
    family!("opt", opt::spec),
    family!("phi", phi::spec),
    family!("phi3", phi3::spec),
    family!("qwen", qwen::spec),
    family!("qwen2", qwen2::spec),
    family!("qwen2_moe", qwen2_moe::spec),
    family!("qwen3", qwen3::spec),
    family!("qwen3_moe", qwen3_moe::spec),
    family!("roberta", roberta::spec),
    family!("seed_oss", seed_oss::spec),
    family!("smollm3", smollm3::spec),
    family!("stablelm", stablelm::spec),
    family!("starcoder2", starcoder2::spec),
    family!("xlm-roberta", roberta::spec),
];

impl Spec {
    /// Reads the architecture from a config.json, in the spelling of transformers 4 or 5; with the table of `--family`
    /// where one is installed that is for it.
    ///
    /// # Errors
    /// An unknown `model_type`, activation or rope type; a missing or impossible value; a key which changes the result and
    /// is not implemented. The error names file, key and value.
    pub fn from_config(config: &Config) -> Result<Self> {
        match FamilyTable::installed(config) {
            Some(table) => table.spec(config),
            None => Self::built_in(config.path(), config.map()),
        }
    }

    /// Reads the architecture with one of [`FAMILIES`].
    pub(crate) fn built_in(file: &Path, config: &Map<String, Value>) -> Result<Self> {
        let fields = Fields::new(file, config);
        let model_type =
            fields.opt_text("model_type")?.ok_or_else(|| fields.missing("model_type"))?;
        let family =
            FAMILIES.iter().find(|family| family.model_type == model_type).ok_or_else(|| {
                let names: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
                ModelError::UnknownFamily {
                    file: fields.file().to_owned(),
                    model_type: model_type.to_owned(),
                    supported: names.join(", "),
                }
            })?;
        let spec = (family.build)(&fields)?;
        fields.only("is_encoder_decoder", &Value::Bool(false))?;
        fields.only("add_cross_attention", &Value::Bool(false))?;
        fields.finish()?;
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::spec::{Layer, Mlp, Positions};

    fn read(changes: &Value) -> Result<Spec> {
        let mut config = json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128,
            "hidden_act": "silu"
        });
        let map = config.as_object_mut().unwrap();
        map.extend(changes.as_object().unwrap().clone());
        map.retain(|_, value| value != "ABSENT");
        Spec::from_config(&Config::new(Path::new("some/config.json"), map.clone()))
    }

    fn refused(changes: &Value, parts: &[&str]) {
        let error = read(changes).map(|_| ()).unwrap_err().to_string();
        for part in ["some/config.json"].iter().chain(parts) {
            assert!(error.contains(part), "{error}: lacks {part}");
        }
    }

    #[test]
    fn what_is_unknown_is_refused_by_name() {
        refused(&json!({ "model_type": "llama9" }), &["llama9", "qwen3, ", "llama, "]);
        refused(&json!({ "model_type": "ABSENT" }), &["model_type"]);
        refused(&json!({ "hidden_act": "selu" }), &["hidden_act", "selu", "silu"]);
        refused(
            &json!({ "rope_scaling": { "type": "su", "factor": 2 } }),
            &["rope_scaling.type", "su", "longrope"],
        );
        refused(
            &json!({ "rope_scaling": { "rope_type": "mrope", "mrope_section": [1] } }),
            &["mrope_section"],
        );
        refused(
            &json!({ "rope_parameters": { "rope_type": "ntk" } }),
            &["rope_parameters.rope_type", "ntk"],
        );
        refused(&json!({ "use_qk_norm": true }), &["use_qk_norm", "llama"]);
        refused(&json!({ "num_local_experts": 8 }), &["num_local_experts"]);
        refused(&json!({ "is_encoder_decoder": true }), &["is_encoder_decoder"]);
        refused(&json!({ "rope_interleaved": true }), &["rope_interleaved"]);
        refused(
            &json!({ "model_type": "mistral", "attention_bias": true }),
            &["attention_bias", "mistral"],
        );
        refused(
            &json!({ "model_type": "qwen3", "layer_types": ["chunked_attention", "a", "b", "c"] }),
            &["layer_types", "chunked"],
        );
    }

    #[test]
    fn impossible_values_are_refused_by_name() {
        refused(&json!({ "num_hidden_layers": 1_000_000 }), &["num_hidden_layers", "4096"]);
        refused(&json!({ "num_hidden_layers": 1u64 << 60 }), &["num_hidden_layers"]);
        refused(&json!({ "num_key_value_heads": 3 }), &["num_key_value_heads", "divisor"]);
        refused(
            &json!({ "num_attention_heads": 5, "num_key_value_heads": 5 }),
            &["num_attention_heads", "64"],
        );
        refused(&json!({ "hidden_size": "64" }), &["hidden_size"]);
        refused(&json!({ "vocab_size": 0 }), &["vocab_size"]);
        refused(&json!({ "rms_norm_eps": -1 }), &["rms_norm_eps"]);
        refused(&json!({ "rope_theta": 0 }), &["rope_theta"]);
        refused(&json!({ "head_dim": 15 }), &["rope_theta", "even"]);
        refused(
            &json!({ "rope_scaling": { "type": "linear" } }),
            &["rope_scaling.factor", "missing"],
        );
        refused(
            &json!({ "rope_scaling": { "type": "linear", "factor": 0.5 } }),
            &["rope_scaling.factor"],
        );
        refused(
            &json!({ "rope_scaling": { "type": "longrope", "long_factor": [1.0], "short_factor": [1.0] } }),
            &["original_max_position_embeddings"],
        );
        refused(
            &json!({ "rope_scaling": { "type": "longrope", "long_factor": [1.0], "short_factor": [1.0] },
                "original_max_position_embeddings": 16 }),
            &["short_factor", "8 numbers"],
        );
    }

    /// What the classes of transformers 5.23 hold after reading such a config.json.
    #[test]
    fn the_gemmas_read_the_key_of_their_activation_as_transformers_does() {
        use gptq_compute::Activation::{Gelu, GeluTanh, Relu, Silu};
        let found = |family: &str, act: &str, activation: &str| {
            let window = if family == "gemma" { json!("ABSENT") } else { json!(8) };
            let config = json!({ "model_type": family, "hidden_act": act,
                "hidden_activation": activation, "sliding_window": window });
            let Mlp::Gated { activation, .. } = read(&config).unwrap().mlp else { panic!() };
            activation
        };
        for (act, activation, first, later) in [
            ("ABSENT", "ABSENT", GeluTanh, GeluTanh),
            ("gelu", "ABSENT", GeluTanh, GeluTanh),
            ("gelu", "gelu_pytorch_tanh", GeluTanh, GeluTanh),
            ("ABSENT", "gelu", GeluTanh, Gelu),
            ("silu", "ABSENT", Silu, GeluTanh),
            ("silu", "relu", Silu, Relu),
            ("gelu_pytorch_tanh", "gelu", GeluTanh, Gelu),
        ] {
            assert_eq!(found("gemma", act, activation), first, "{act} {activation}");
            for family in ["gemma2", "gemma3_text"] {
                assert_eq!(found(family, act, activation), later, "{family} {act} {activation}");
            }
        }
    }

    #[test]
    fn both_spellings_of_rope_give_the_same() {
        let old = json!({ "rope_theta": 5e5, "rope_scaling": { "type": "linear", "factor": 4 }, "partial_rotary_factor": 0.5 });
        let new = json!({ "rope_parameters":
            { "rope_theta": 5e5, "rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5 } });
        let (old, new) = (read(&old).unwrap(), read(&new).unwrap());
        assert_eq!(old, new);
        let Positions::Rotary(ropes) = &new.positions else { panic!() };
        assert_eq!((ropes[0].theta, ropes[0].rotary_dim), (5e5, 8));
    }

    #[test]
    fn windows_follow_the_family_rules() {
        let windows = |changes: &Value| -> Vec<Option<usize>> {
            read(changes).unwrap().layers.iter().map(|layer: &Layer| layer.window).collect()
        };
        let all = [Some(8); 4];
        assert_eq!(windows(&json!({ "model_type": "mistral", "sliding_window": 8 })), all);
        assert_eq!(windows(&json!({ "model_type": "mistral", "sliding_window": null })), [None; 4]);
        assert_eq!(windows(&json!({ "model_type": "mistral" })), [Some(4096); 4]);
        let qwen = |on: bool, from: usize| {
            windows(
                &json!({ "model_type": "qwen2", "use_sliding_window": on, "sliding_window": 8, "max_window_layers": from }),
            )
        };
        assert_eq!(qwen(true, 0), all);
        assert_eq!(qwen(true, 2), [None, None, Some(8), Some(8)]);
        assert_eq!(qwen(false, 0), [None; 4]);
        let off =
            json!({ "model_type": "qwen2", "use_sliding_window": false, "sliding_window": 0 });
        assert_eq!(windows(&off), [None; 4]);
        let types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"];
        let listed = json!({ "model_type": "qwen3", "use_sliding_window": true, "sliding_window": 8, "layer_types": types });
        assert_eq!(windows(&listed), [None, Some(8), None, Some(8)]);
        refused(
            &json!({ "model_type": "qwen2", "use_sliding_window": true, "max_window_layers": 0 }),
            &["sliding_window"],
        );
        refused(
            &json!({ "model_type": "qwen2", "layer_types": types }),
            &["layer_types", "use_sliding_window"],
        );
    }

    #[test]
    fn stages_list_the_linears_in_true_sequential_order() {
        let spec = read(&json!({ "model_type": "qwen2" })).unwrap();
        let stages = spec.stages(3);
        let names: Vec<Vec<&str>> = stages
            .iter()
            .map(|stage| stage.linears.iter().map(|l| l.name.as_str()).collect())
            .collect();
        let expected: [&[&str]; 4] = [
            &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            &["self_attn.o_proj"],
            &["mlp.gate_proj", "mlp.up_proj"],
            &["mlp.down_proj"],
        ];
        assert_eq!(names, expected);
        let k = &stages[0].linears[1];
        assert_eq!(k.module, "model.layers.3.self_attn.k_proj");
        assert_eq!((k.out_features, k.in_features, k.bias), (32, 64, true));
        let down = &stages[3].linears[0];
        assert_eq!((down.out_features, down.in_features, down.bias), (64, 128, false));
    }
}
