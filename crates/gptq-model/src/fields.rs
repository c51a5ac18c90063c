//! Reading a config.json strictly: every key is asked for by name, errors name file, key and value, and keys which look as
//! if they changed the result but were never asked for are refused.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::{ModelError, Result};

/// Upper bound of any count in a config (blocks have their own, lower one): keeps products of three within 64 bits.
const MAX_COUNT: u64 = 1 << 20;
/// The same of positions, which no tensor but a table of them has as many of.
const MAX_POSITIONS: u64 = 1 << 32;

/// The keys of a config (or of an object inside it), with a record of those that were asked for.
pub(crate) struct Fields<'a> {
    file: &'a Path,
    family: &'a str,
    prefix: String,
    map: &'a Map<String, Value>,
    seen: RefCell<BTreeMap<String, Asked>>,
}

/// What a family wants to know of a key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    /// Kind of the value, for example `number`; empty for a key that has no effect.
    pub(crate) kind: &'static str,
    /// What an absent key stands for, where that is a fixed value.
    pub(crate) default: Option<String>,
    /// The key must be there.
    pub(crate) required: bool,
}

impl<'a> Fields<'a> {
    /// The top level of `file`.
    pub(crate) fn new(file: &'a Path, map: &'a Map<String, Value>) -> Self {
        let family = map.get("model_type").and_then(Value::as_str).unwrap_or("?");
        Self { file, family, prefix: String::new(), map, seen: RefCell::default() }
    }

    /// The file, for errors.
    pub(crate) fn file(&self) -> &'a Path {
        self.file
    }

    /// The keys that were asked for so far.
    pub(crate) fn asked(&self) -> BTreeMap<String, Asked> {
        self.seen.borrow().clone()
    }

    /// Notes what kind of value `key` has.
    fn note(&self, key: &str, kind: &'static str, default: Option<String>) {
        let mut seen = self.seen.borrow_mut();
        let asked = seen.entry(key.to_owned()).or_default();
        if asked.kind.is_empty() || asked.kind == ANY {
            asked.kind = kind;
        }
        if default.is_some() {
            asked.default = default;
        }
    }

    /// The value of `key`; `null` counts as absent.
    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.note(key, ANY, None);
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the object has `key` at all, `null` included.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// A count of at least one.
    pub(crate) fn count(&self, key: &str) -> Result<usize> {
        let count = self.opt_count(key)?;
        self.require(key);
        count.ok_or_else(|| self.missing(key))
    }

    /// A count of at least one, or `default`.
    pub(crate) fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        self.note(key, COUNT, Some(default.to_string()));
        Ok(self.opt_count(key)?.unwrap_or(default))
    }

    /// A count of at least one, if the key is there.
    pub(crate) fn opt_count(&self, key: &str) -> Result<Option<usize>> {
        self.note(key, COUNT, None);
        let positions = key.ends_with("max_position_embeddings");
        let most = if positions { MAX_POSITIONS } else { MAX_COUNT };
        self.value(key)
            .map(|value| match value.as_u64() {
                Some(count) if (1..=most).contains(&count) => Ok(count as usize),
                // Some tools write counts as floats.
                _ => match value.as_f64() {
                    Some(count) if count.fract() == 0.0 && (1.0..=most as f64).contains(&count) => {
                        Ok(count as usize)
                    }
                    _ => Err(self.bad(key, format!("a whole number from 1 to {most}"))),
                },
            })
            .transpose()
    }

    /// A finite number.
    pub(crate) fn number(&self, key: &str) -> Result<f64> {
        let number = self.opt_number(key)?;
        self.require(key);
        number.ok_or_else(|| self.missing(key))
    }

    /// A finite number, or `default`.
    pub(crate) fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        self.note(key, NUMBER, Some(short(default)));
        Ok(self.opt_number(key)?.unwrap_or(default))
    }

    /// A finite number, if the key is there.
    pub(crate) fn opt_number(&self, key: &str) -> Result<Option<f64>> {
        self.note(key, NUMBER, None);
        let number = |value: &Value| {
            value.as_f64().filter(|x| x.is_finite()).ok_or_else(|| self.bad(key, "a number"))
        };
        self.value(key).map(number).transpose()
    }

    /// A finite number greater than zero that is switched off by `null`, or `default` if the key is not there at all.
    pub(crate) fn switchable(&self, key: &str, default: Option<f64>) -> Result<Option<f32>> {
        self.note(key, NUMBER, default.map(short));
        let number = if self.has(key) { self.opt_number(key)? } else { default };
        match number {
            Some(number) if number <= 0.0 => Err(self.bad(key, "a number above 0, or null")),
            _ => Ok(number.map(|number| number as f32)),
        }
    }

    /// A finite number greater than zero, or `default`.
    pub(crate) fn positive_or(&self, key: &str, default: f64) -> Result<f64> {
        let number = self.number_or(key, default)?;
        if number > 0.0 { Ok(number) } else { Err(self.bad(key, "a number above 0")) }
    }

    /// The epsilon of a norm, or `default`.
    pub(crate) fn eps_or(&self, key: &str, default: f64) -> Result<f32> {
        let eps = self.number_or(key, default)?;
        if (0.0..1.0).contains(&eps) {
            Ok(eps as f32)
        } else {
            Err(self.bad(key, "a number from 0 to 1"))
        }
    }

    /// A boolean, or `default`.
    pub(crate) fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        self.note(key, FLAG, Some(default.to_string()));
        let flag = |value: &Value| value.as_bool().ok_or_else(|| self.bad(key, "true or false"));
        self.value(key).map_or(Ok(default), flag)
    }

    /// A string, or `default`.
    pub(crate) fn text_or(&self, key: &str, default: &'a str) -> Result<&'a str> {
        self.note(key, TEXT, Some(format!("\"{default}\"")));
        Ok(self.opt_text(key)?.unwrap_or(default))
    }

    /// A string, if the key is there.
    pub(crate) fn opt_text(&self, key: &str) -> Result<Option<&'a str>> {
        self.note(key, TEXT, None);
        let text = |value: &'a Value| value.as_str().ok_or_else(|| self.bad(key, "a string"));
        self.value(key).map(text).transpose()
    }

    /// A list of numbers.
    pub(crate) fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        self.note(key, LIST, None);
        let list = self.value(key).ok_or_else(|| self.missing(key))?.as_array();
        list.and_then(|list| list.iter().map(Value::as_f64).collect())
            .ok_or_else(|| self.bad(key, "a list of numbers"))
    }

    /// A list of strings, if the key is there.
    pub(crate) fn opt_texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.note(key, LIST, None);
        let texts = |value: &'a Value| {
            let list = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
            list.ok_or_else(|| self.bad(key, "a list of strings"))
        };
        self.value(key).map(texts).transpose()
    }

    /// An object, if the key is there.
    pub(crate) fn opt_object(&self, key: &str) -> Result<Option<Fields<'a>>> {
        self.note(key, OBJECT, None);
        let object = |value: &'a Value| {
            let map = value.as_object().ok_or_else(|| self.bad(key, "an object"))?;
            let prefix = format!("{}{key}.", self.prefix);
            Ok(Self { file: self.file, family: self.family, prefix, map, seen: RefCell::default() })
        };
        self.value(key).map(object).transpose()
    }

    /// Names of all keys.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }

    /// The value that can be computed here; any other value of `key` is refused.
    pub(crate) fn only(&self, key: &str, handled: &Value) -> Result<()> {
        self.note(key, ONLY, Some(handled.to_string()));
        match self.value(key) {
            Some(value) if value != handled => Err(self.unhandled(key)),
            _ => Ok(()),
        }
    }

    /// Marks keys as known to have no effect.
    pub(crate) fn ignore(&self, keys: &[&str]) {
        let mut seen = self.seen.borrow_mut();
        for &key in keys {
            seen.entry(key.to_owned()).or_default();
        }
    }

    fn require(&self, key: &str) {
        if let Some(asked) = self.seen.borrow_mut().get_mut(key) {
            asked.required = true;
        }
    }

    /// Error: `key` is not there.
    pub(crate) fn missing(&self, key: &str) -> ModelError {
        ModelError::MissingField {
            file: self.file.to_owned(),
            key: format!("{}{key}", self.prefix),
        }
    }

    /// Error: `key` has a value other than `expected`.
    pub(crate) fn bad(&self, key: &str, expected: impl Into<String>) -> ModelError {
        ModelError::BadField {
            file: self.file.to_owned(),
            key: format!("{}{key}", self.prefix),
            value: self.show(key),
            expected: expected.into(),
        }
    }

    /// Error: `key` has an effect that is not implemented.
    pub(crate) fn unhandled(&self, key: &str) -> ModelError {
        ModelError::UnhandledField {
            file: self.file.to_owned(),
            key: format!("{}{key}", self.prefix),
            value: self.show(key),
            family: self.family.to_owned(),
        }
    }

    /// Refuses keys that were never asked for, are not switched off, and whose name says that they change the result.
    pub(crate) fn finish(&self) -> Result<()> {
        let seen = self.seen.borrow();
        for (key, value) in self.map {
            let off = match value {
                Value::Null | Value::Bool(false) => true,
                Value::Number(number) => number.as_f64() == Some(0.0),
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                Value::String(_) | Value::Bool(true) => false,
            };
            let harmless = HARMLESS.contains(&key.as_str())
                || (key == "rope_parameters" && is_plain_rope(value));
            if !off && !seen.contains_key(key) && !harmless && sounds_relevant(key) {
                return Err(self.unhandled(key));
            }
        }
        Ok(())
    }

    fn show(&self, key: &str) -> String {
        const LONGEST: usize = 120;
        let mut text = self.map.get(key).map_or_else(|| "absent".to_owned(), Value::to_string);
        if text.len() > LONGEST {
            let cut = (0..=LONGEST).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
            text.truncate(cut);
            text.push('…');
        }
        text
    }
}

/// Kinds of values, for the reference.
const ANY: &str = "value";
const COUNT: &str = "count";
pub(crate) const NUMBER: &str = "number";
pub(crate) const FLAG: &str = "true or false";
pub(crate) const TEXT: &str = "text";
const LIST: &str = "list";
const OBJECT: &str = "object";
/// One value is implemented, which is also the default.
pub(crate) const ONLY: &str = "fixed";

/// A number as people write it: 1e-6 and 500000, not 0.000001 and 5e5.
fn short(number: f64) -> String {
    let size = number.abs();
    if size != 0.0 && size < 1e-3 { format!("{number:e}") } else { number.to_string() }
}

/// GPTQModel 7 adds these parameters to the config of every model it saves, with positions of another kind too.
fn is_plain_rope(value: &Value) -> bool {
    value.as_object().is_some_and(|map| {
        map.iter()
            .all(|(key, value)| key == "rope_theta" || (key == "rope_type" && value == "default"))
    })
}

fn sounds_relevant(key: &str) -> bool {
    const PARTS: [&str; 26] = [
        "attention",
        "attn",
        "rope",
        "rotary",
        "norm",
        "scale",
        "scaling",
        "multiplier",
        "softcap",
        "bias",
        "moe",
        "expert",
        "alibi",
        "window",
        "clip",
        "mlp",
        "head",
        "residual",
        "sparse",
        "mamba",
        "conv",
        "layer_type",
        "pattern",
        "position",
        "qk_",
        "kv_",
    ];
    PARTS.iter().any(|part| key.contains(part))
}

/// Keys that sound relevant but do not change what a causal model computes at inference: dropout, training, serving,
/// initialisation, heads of other tasks.
const HARMLESS: [&str; 26] = [
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_dropout",
    "attn_pdrop",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "attn_implementation",
    "_flash_attn_2_enabled",
    "use_flash_attn",
    "use_flash_attention",
    "use_flash_attention_2",
    "flash_attn",
    "residual_dropout",
    "layer_norm_elementwise_affine",
    "pre_allocate_kv_cache",
    "pretraining_tp",
    "attention_softmax_in_fp32",
    "scale_attention_softmax_in_fp32",
    "output_attentions",
    "output_router_logits",
    "pruned_heads",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "initializer_scale",
    "fused_bias_fc",
];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with<R>(value: &Value, read: impl FnOnce(&Fields<'_>) -> R) -> R {
        read(&Fields::new(Path::new("config.json"), value.as_object().unwrap()))
    }

    fn finish(value: &Value) -> Result<()> {
        Fields::new(Path::new("config.json"), value.as_object().unwrap()).finish()
    }

    #[test]
    fn a_plain_rope_is_no_effect_of_a_family_without_rope() {
        finish(&json!({ "rope_parameters": { "rope_theta": 10000.0, "rope_type": "default" } }))
            .unwrap();
        for rope in [
            json!({ "rope_type": "yarn" }),
            json!({ "rope_type": "default", "factor": 2 }),
            json!(2),
        ] {
            let error = finish(&json!({ "rope_parameters": rope })).unwrap_err().to_string();
            assert!(error.contains("rope_parameters"), "{error}");
        }
    }

    #[test]
    fn counts_reject_what_is_not_a_count() {
        for value in [json!(0), json!(-1), json!(1.5), json!("7"), json!(1u64 << 40), json!([])] {
            let config = json!({ "n": value });
            let error = with(&config, |f| f.count("n")).unwrap_err().to_string();
            assert!(error.contains("config.json") && error.contains("\"n\""), "{error}");
        }
        let config = json!({ "n": 7, "m": 8.0, "null": null });
        with(&config, |f| {
            assert_eq!((f.count("n").unwrap(), f.count("m").unwrap()), (7, 8));
            assert!(matches!(f.count("null"), Err(ModelError::MissingField { .. })));
        });
    }

    #[test]
    fn keys_with_an_effect_that_nobody_read_are_refused() {
        let config = json!({ "model_type": "x", "attn_logit_softcapping": 30.0 });
        let error = finish(&config).unwrap_err().to_string();
        assert!(error.contains("attn_logit_softcapping") && error.contains("30.0"), "{error}");
        for harmless in [
            json!({ "attn_logit_softcapping": null }),
            json!({ "attention_dropout": 0.1 }),
            json!({ "my": 1 }),
        ] {
            finish(&harmless).unwrap();
        }
    }

    #[test]
    fn long_values_are_cut_in_errors() {
        let config = json!({ "n": "ä".repeat(500) });
        let error = with(&config, |f| f.count("n")).unwrap_err().to_string();
        assert!(error.len() < 300, "{error}");
    }
}
