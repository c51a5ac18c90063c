//! `config.json` and `generation_config.json` rebuilt from GGUF metadata.

use serde_json::{Map, Value, json};

use super::names::Architecture;
use super::{GgufError, GgufFile, GgufValue};

/// Metadata (after the architecture's prefix) that changes a model's results and has no counterpart in the configs
/// written here. A key is refused unless it holds the neutral value.
const RESULT_CHANGING: [(&str, f64); 10] = [
    ("expert_count", 0.0),
    ("attention.scale", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("embedding_scale", 1.0),
    ("rope.scaling.yarn_log_multiplier", 0.0),
];

impl GgufFile {
    /// The `config.json` of the Hugging Face checkpoint that this file was made from, as far as it can be known.
    ///
    /// Holds architectures, model_type, sizes, head counts, head_dim, norm eps, rope settings, vocabulary, tied head,
    /// special ids and `torch_dtype: float16`.
    ///
    /// # Errors
    /// [`GgufError`] naming the key that is missing, malformed, or stands for a feature that is not handled.
    pub fn hf_config(&self) -> Result<Map<String, Value>, GgufError> {
        let architecture = self.architecture()?;
        self.refuse_unknown_features()?;
        let hidden = self.size("embedding_length")?;
        let heads = self.heads()?;
        let kv_heads = self.kv_heads()?;
        let head_dim = self.head_dim(hidden, heads)?;
        let eps_key = self.key("attention.layer_norm_rms_epsilon");
        let eps = self.required(&eps_key, self.f64(&eps_key)?)?;
        let window = match self.u64(&self.key("attention.sliding_window"))? {
            Some(w) if w > 0 => Some(w),
            _ => None,
        };
        let (model_type, class) = match architecture {
            Architecture::Llama if window.is_some() => ("mistral", "MistralForCausalLM"),
            Architecture::Llama => ("llama", "LlamaForCausalLM"),
            Architecture::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Architecture::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
        };
        let embedding =
            self.tensor("token_embd.weight").filter(|t| t.dims.len() == 2).ok_or_else(|| {
                GgufError::Tensor {
                    path: self.path().into(),
                    tensor: "token_embd.weight".into(),
                    reason: "is missing or no matrix".into(),
                }
            })?;

        let mut config = Map::new();
        let mut set = |key: &str, value: Value| {
            config.insert(key.into(), value);
        };
        set("architectures", json!([class]));
        set("model_type", json!(model_type));
        set("hidden_act", json!("silu"));
        set("hidden_size", json!(hidden));
        set("intermediate_size", json!(self.size("feed_forward_length")?));
        set("num_hidden_layers", json!(self.size("block_count")?));
        set("num_attention_heads", json!(heads));
        set("num_key_value_heads", json!(kv_heads));
        set("head_dim", json!(head_dim));
        set("rms_norm_eps", json!(eps));
        set("max_position_embeddings", json!(self.size("context_length")?));
        set("vocab_size", json!(embedding.dims[1]));
        set("tie_word_embeddings", json!(self.tensor("output.weight").is_none()));
        set("torch_dtype", json!("float16"));
        let theta = self.f64(&self.key("rope.freq_base"))?.unwrap_or(10000.0);
        set("rope_theta", json!(theta));
        set("rope_scaling", self.rope_scaling(theta, head_dim)?);
        match (window, model_type) {
            (None, "qwen2" | "qwen3") => set("use_sliding_window", json!(false)),
            (None, _) => {}
            (Some(w), "mistral") => set("sliding_window", json!(w)),
            (Some(_), _) => return Err(self.unsupported_key("attention.sliding_window")),
        }
        match model_type {
            "llama" => {
                set("attention_bias", json!(self.tensor("blk.0.attn_q.bias").is_some()));
                set("mlp_bias", json!(self.tensor("blk.0.ffn_down.bias").is_some()));
            }
            "qwen3" => set("attention_bias", json!(self.tensor("blk.0.attn_q.bias").is_some())),
            _ => {}
        }
        for (key, id) in self.special_ids()? {
            set(key, json!(id));
        }
        Ok(config)
    }

    /// The `generation_config.json`: special ids, with every token that ends a turn among the `eos_token_id`s.
    ///
    /// # Errors
    /// [`GgufError::Value`] if an id is no integer or outside the vocabulary.
    pub fn hf_generation_config(&self) -> Result<Map<String, Value>, GgufError> {
        let mut config: Map<String, Value> =
            self.special_ids()?.into_iter().map(|(key, id)| (key.to_owned(), json!(id))).collect();
        let mut ends: Vec<u32> = Vec::new();
        for name in ["eos", "eot", "eom"] {
            if let Some(id) = self.token_id(name)?
                && !ends.contains(&id)
            {
                ends.push(id);
            }
        }
        if ends.len() > 1 {
            config.insert("eos_token_id".into(), json!(ends));
        }
        Ok(config)
    }

    /// The id under `tokenizer.ggml.{name}_token_id`, checked against the vocabulary; `None` if absent.
    ///
    /// # Errors
    /// [`GgufError::Value`] if it is no id of the vocabulary.
    pub fn token_id(&self, name: &str) -> Result<Option<u32>, GgufError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let tokens = self.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
        match self.u64(&key)? {
            // llama.cpp writes -1, as an unsigned number, where there is none.
            None => Ok(None),
            Some(id) if id == u64::from(u32::MAX) => Ok(None),
            Some(id) if id < tokens.len() as u64 => Ok(Some(id as u32)),
            Some(_) => Err(self.bad_value(&key, format!("an id below {}", tokens.len()))),
        }
    }

    /// Number of query heads.
    pub(crate) fn heads(&self) -> Result<usize, GgufError> {
        self.size("attention.head_count")
    }

    /// Number of key and value heads.
    pub(crate) fn kv_heads(&self) -> Result<usize, GgufError> {
        if self.value(&self.key("attention.head_count_kv")).is_none() {
            return self.heads();
        }
        self.size("attention.head_count_kv")
    }

    fn key(&self, name: &str) -> String {
        let architecture =
            self.value("general.architecture").and_then(GgufValue::as_str).unwrap_or_default();
        format!("{architecture}.{name}")
    }

    /// A size that must be there, at least 1 and below 2^31.
    fn size(&self, name: &str) -> Result<usize, GgufError> {
        let key = self.key(name);
        match self.value(&key).map(GgufValue::as_u64) {
            Some(Some(v)) if (1..1 << 31).contains(&v) => Ok(v as usize),
            None => Err(GgufError::MissingKey { path: self.path().into(), key }),
            _ => Err(self
                .bad_value(&key, "one integer of at least 1 (values per layer are not supported)")),
        }
    }

    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, GgufError> {
        let head_dim = if self.value(&self.key("attention.key_length")).is_some() {
            self.size("attention.key_length")?
        } else if hidden.is_multiple_of(heads) {
            hidden / heads
        } else {
            let expected = format!("a divisor of the {hidden} channels");
            return Err(self.bad_value(&self.key("attention.head_count"), expected));
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            let key = self.key(name);
            if self.u64(&key)?.is_some_and(|v| v != head_dim as u64) {
                return Err(self.bad_value(&key, format!("the head dimension {head_dim}")));
            }
        }
        Ok(head_dim)
    }

    fn special_ids(&self) -> Result<Vec<(&'static str, u32)>, GgufError> {
        let mut ids = Vec::new();
        for (name, key) in
            [("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")]
        {
            if let Some(id) = self.token_id(name)? {
                ids.push((key, id));
            }
        }
        Ok(ids)
    }

    fn refuse_unknown_features(&self) -> Result<(), GgufError> {
        for (name, neutral) in RESULT_CHANGING {
            let neutral_here = match self.value(&self.key(name)) {
                None => true,
                Some(GgufValue::Uint(v)) => *v as f64 == neutral,
                Some(v) => v.as_f64() == Some(neutral),
            };
            if !neutral_here {
                return Err(self.unsupported_key(name));
            }
        }
        if self.bool(&self.key("attention.causal"))? == Some(false) {
            return Err(self.unsupported_key("attention.causal"));
        }
        Ok(())
    }

    fn unsupported_key(&self, name: &str) -> GgufError {
        let key = self.key(name);
        let value = self.value(&key).map_or_else(|| "absent".into(), GgufValue::describe);
        GgufError::Unsupported { path: self.path().into(), feature: format!("`{key}` = {value}") }
    }

    /// `rope_scaling` as transformers spells it, or null.
    fn rope_scaling(&self, theta: f64, head_dim: usize) -> Result<Value, GgufError> {
        let number = |name: &str| self.f64(&self.key(&format!("rope.scaling.{name}")));
        let original = self.u64(&self.key("rope.scaling.original_context_length"))?;
        let kind = self.str(&self.key("rope.scaling.type"))?;
        if let Some(freqs) = self.tensor("rope_freqs.weight") {
            if !matches!(kind, None | Some("none" | "llama3")) {
                return Err(self.unsupported_key("rope.scaling.type"));
            }
            let unsupported = || GgufError::Unsupported {
                path: self.path().into(),
                feature: "`rope_freqs.weight` with factors other than Llama 3's".into(),
            };
            // Before it is read: nothing else bounds its size.
            if freqs.dims != [(head_dim / 2) as u64] {
                return Err(unsupported());
            }
            let factors = self.read_f32(freqs)?;
            return llama3_scaling(&factors, theta, head_dim, original).ok_or_else(unsupported);
        }
        let factor = match number("factor")? {
            Some(f) => Some(f),
            // Older files.
            None => self.f64(&self.key("rope.scale_linear"))?,
        };
        match (kind, factor) {
            (Some("none"), _) | (None | Some("linear"), None | Some(1.0)) => Ok(Value::Null),
            (None | Some("linear"), Some(factor)) if factor > 0.0 => {
                Ok(json!({"rope_type": "linear", "factor": factor}))
            }
            (Some("yarn"), Some(factor)) if factor >= 1.0 => {
                if number("yarn_ext_factor")?.is_some_and(|v| v != 1.0) {
                    return Err(self.unsupported_key("rope.scaling.yarn_ext_factor"));
                }
                let mut scaling = json!({"rope_type": "yarn", "factor": factor});
                if let Some(original) = original {
                    scaling["original_max_position_embeddings"] = json!(original);
                }
                for (name, hf) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")]
                {
                    if let Some(beta) = number(name)? {
                        scaling[hf] = json!(beta);
                    }
                }
                // llama.cpp multiplies YaRN's own attention factor by this one; transformers replaces it.
                let attention = match number("attn_factor")? {
                    Some(v) => Some(v),
                    None => number("yarn_attn_factor")?,
                };
                if let Some(v) = attention.filter(|&v| v != 1.0) {
                    scaling["attention_factor"] = json!(v * (0.1 * factor.ln() + 1.0));
                }
                Ok(scaling)
            }
            (Some("linear" | "yarn"), _) => {
                let key = self.key("rope.scaling.factor");
                Err(self.bad_value(&key, "a positive factor"))
            }
            _ => Err(self.unsupported_key("rope.scaling.type")),
        }
    }
}

/// The `rope_scaling` of type `llama3` that gives `factors` (one per pair of a head, as llama.cpp's converter computes
/// them), or `None` if none does.
///
/// The file does not say which parameters were used; Llama 3.1 to 3.3 all have the frequency factors 1 and 4 over 8192
/// positions, so these are tried and the result compared.
fn llama3_scaling(
    factors: &[f32],
    theta: f64,
    head_dim: usize,
    original: Option<u64>,
) -> Option<Value> {
    let factor = f64::from(*factors.last()?);
    let (low, high) = (1.0, 4.0);
    let fits = |original: u64| {
        factors.iter().enumerate().all(|(i, &given)| {
            let wavelength = std::f64::consts::TAU * theta.powf((2 * i) as f64 / head_dim as f64);
            let turns = original as f64 / wavelength;
            let expected = if turns > high {
                1.0
            } else if turns < low {
                factor
            } else {
                let smooth = (turns - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            };
            (f64::from(given) - expected).abs() <= 1e-3 * expected
        })
    };
    let original = [original, Some(8192)].into_iter().flatten().find(|&o| fits(o))?;
    (factor >= 1.0).then(|| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        })
    })
}

#[cfg(test)]
mod tests;
