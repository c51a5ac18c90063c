//! The GPTQ settings of a checkpoint: `quantization_config` of `config.json`, or `quantize_config.json`; and those of
//! AutoAWQ, as far as they can be expressed in GPTQ's.

use crate::awq;
use crate::config::Config;
use crate::dynamic::{Decision, Dynamic, is_group_size};
use crate::error::{FormatError, Result};
use crate::fs::read_json_if_exists;
use crate::pack::Bits;
use serde_json::{Map, Value, json};
use std::path::Path;

/// How zero points are stored. Everything else is equal in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CheckpointFormat {
    /// v1, `gptq`: a field of `qzeros` holds the zero point minus 1.
    #[default]
    Gptq,
    /// v2, `gptq_v2`: a field of `qzeros` holds the zero point.
    GptqV2,
    /// AutoAWQ's layout "gemm", which can be read only: another packing, zero points as they are.
    AwqGemm,
}

impl CheckpointFormat {
    /// The name in configuration files and reports.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::GptqV2 => "gptq_v2",
            Self::AwqGemm => "awq",
        }
    }
}

impl std::fmt::Display for CheckpointFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The settings of a quantized checkpoint. What a file leaves out and only informs is `None`.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizeConfig {
    /// Bits of a code.
    pub bits: Bits,
    /// Inputs per group, or -1 for all in one.
    pub group_size: i64,
    /// Whether columns were quantized in the order of activation, with groups formed in that order.
    pub desc_act: bool,
    /// Whether the grid is symmetric.
    pub sym: bool,
    /// Whether the head is quantized.
    pub lm_head: bool,
    /// The zero-point convention.
    pub format: CheckpointFormat,
    /// Share of the mean diagonal that was added to the Hessian's diagonal.
    pub damp_percent: Option<f64>,
    /// Whether the stages of a block were quantized one after another.
    pub true_sequential: Option<bool>,
    /// Whether group scales were found before the first column was quantized.
    pub static_groups: Option<bool>,
    /// Whether columns were ordered by activation inside and among groups.
    pub act_group_aware: Option<bool>,
    /// Exponent of the error norm in the search for scales; 0 for none.
    pub mse: Option<f64>,
    /// Overrides for modules by name.
    pub dynamic: Dynamic,
    /// Optimum's list of the modules of a block that are quantized, as given.
    pub modules_in_block_to_quantize: Option<Value>,
    /// Free-form information of the tool that wrote the checkpoint.
    pub meta: Map<String, Value>,
    /// Keys that are none of the above, in the order of the file.
    pub other: Map<String, Value>,
}

/// The settings of one module, with the overrides of [`Dynamic`] applied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModuleSettings {
    /// Bits of a code.
    pub bits: Bits,
    /// Inputs per group, or -1 for all in one.
    pub group_size: i64,
    /// Whether columns are quantized in the order of activation.
    pub desc_act: bool,
    /// Whether the grid is symmetric.
    pub sym: bool,
    /// Whether columns are ordered by activation inside and among groups.
    pub act_group_aware: Option<bool>,
    /// Whether group scales are found before the first column is quantized.
    pub static_groups: Option<bool>,
    /// Share of the mean diagonal that is added to the Hessian's diagonal.
    pub damp_percent: Option<f64>,
    /// Exponent of the error norm in the search for scales; 0 for none.
    pub mse: Option<f64>,
}

impl ModuleSettings {
    /// Inputs per group of a linear with `inputs` inputs; the last group may be shorter.
    pub fn group_len(&self, inputs: usize) -> usize {
        group_len(self.group_size, inputs)
    }
}

/// `group_size` with -1 resolved for `inputs` inputs; at least 1.
pub fn group_len(group_size: i64, inputs: usize) -> usize {
    usize::try_from(group_size).map_or(inputs, |g| g.min(inputs)).max(1)
}

/// Keys that become fields, so that they are not kept twice.
pub(crate) const KNOWN: [&str; 19] = [
    "act_group_aware",
    "bits",
    "checkpoint_format",
    "damp_percent",
    "desc_act",
    "dynamic",
    "format",
    "group_size",
    "is_marlin_format",
    "lm_head",
    "meta",
    "method",
    "modules_in_block_to_quantize",
    "mse",
    "pack_dtype",
    "quant_method",
    "static_groups",
    "sym",
    "true_sequential",
];

impl QuantizeConfig {
    /// Finds the settings of a checkpoint directory: `quantization_config` of its `config.json`, else the file
    /// `quantize_config.json`, or AutoAWQ's `quant_config.json`; `None` if it has none, so is not quantized.
    ///
    /// # Errors
    /// As [`QuantizeConfig::from_json`].
    pub fn load(directory: &Path, config: &Config) -> Result<Option<Self>> {
        if let Some(value) = config.value("quantization_config") {
            return Self::from_json(config.path(), value).map(Some);
        }
        let path = directory.join("quantize_config.json");
        if let Some(value) = read_json_if_exists(&path)? {
            return Self::from_json(&path, &value).map(Some);
        }
        // AutoAWQ's first versions.
        let path = directory.join("quant_config.json");
        match read_json_if_exists(&path)? {
            Some(Value::Object(map)) => awq::settings(&Config::new(&path, map)).map(Some),
            _ => Ok(None),
        }
    }

    /// Reads the settings from the object of `path`.
    ///
    /// A missing `sym` is true and a missing `desc_act` false, as GPTQModel and TGI read such files.
    ///
    /// # Errors
    /// If the method or format is not supported, a value is missing or impossible, or a rule of `dynamic` is malformed.
    pub fn from_json(path: &Path, value: &Value) -> Result<Self> {
        let Value::Object(map) = value else {
            return Err(FormatError::Config {
                path: path.to_owned(),
                key: "quantization_config".to_owned(),
                expected: "an object".to_owned(),
                got: "something else".to_owned(),
            });
        };
        let config = Config::new(path, map.clone());
        if awq::is_awq(&config)? {
            return awq::settings(&config);
        }
        check_method(&config)?;
        let format = read_format(&config)?;
        let bits = read_bits(&config)?;
        let group_size = config
            .value("group_size")
            .and_then(Value::as_i64)
            .filter(|&g| is_group_size(g))
            .ok_or_else(|| config.error("group_size", "-1 or a positive integer"))?;
        let sym = config.opt_bool("sym")?.unwrap_or_else(|| {
            tracing::warn!(path = %path.display(), "no `sym` in the quantization config; assuming true");
            true
        });
        let meta = config.section("meta")?;
        // GPTQModel moved what only informs into `meta`.
        let informative = |key: &str| {
            let holder = match &meta {
                Some(meta) if config.value(key).is_none() => meta,
                _ => &config,
            };
            holder.opt_bool(key)
        };
        let number = |key: &str| match &meta {
            Some(meta) if config.value(key).is_none() => meta.opt_f64(key),
            _ => config.opt_f64(key),
        };
        let dynamic = match config.section("dynamic")? {
            Some(rules) => Dynamic::from_map(rules.map())?,
            None => Dynamic::default(),
        };
        Ok(Self {
            bits,
            group_size,
            desc_act: config.opt_bool("desc_act")?.unwrap_or(false),
            sym,
            lm_head: config.opt_bool("lm_head")?.unwrap_or(false),
            format,
            damp_percent: number("damp_percent")?,
            true_sequential: informative("true_sequential")?,
            static_groups: informative("static_groups")?,
            act_group_aware: informative("act_group_aware")?,
            mse: number("mse")?,
            dynamic,
            modules_in_block_to_quantize: config.value("modules_in_block_to_quantize").cloned(),
            meta: meta.map(|m| m.map().clone()).unwrap_or_default(),
            other: map
                .iter()
                .filter(|(key, _)| !KNOWN.contains(&key.as_str()))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
        })
    }

    /// Settings for a new checkpoint: no overrides, nothing informative.
    pub fn new(
        bits: Bits,
        group_size: i64,
        sym: bool,
        desc_act: bool,
        format: CheckpointFormat,
    ) -> Self {
        Self {
            bits,
            group_size,
            desc_act,
            sym,
            lm_head: false,
            format,
            damp_percent: None,
            true_sequential: None,
            static_groups: None,
            act_group_aware: None,
            mse: None,
            dynamic: Dynamic::default(),
            modules_in_block_to_quantize: None,
            meta: Map::new(),
            other: Map::new(),
        }
    }

    /// The object for `config.json` and `quantize_config.json`: both spellings of method and format, so that every loader
    /// finds the one it knows. `meta.quantizer` names this tool, whoever wrote the checkpoint that was read.
    pub fn to_json(&self) -> Value {
        if self.format == CheckpointFormat::AwqGemm {
            return awq::to_json(self);
        }
        let mut out = Map::new();
        let mut set = |key: &str, value: Value| out.insert(key.to_owned(), value);
        set("quant_method", json!("gptq"));
        set("method", json!("gptq"));
        set("bits", json!(self.bits.as_u32()));
        set("group_size", json!(self.group_size));
        set("desc_act", json!(self.desc_act));
        set("sym", json!(self.sym));
        set("lm_head", json!(self.lm_head));
        set("checkpoint_format", json!(self.format.as_str()));
        set("format", json!(self.format.as_str()));
        set("pack_dtype", json!("int32"));
        let informative = [
            ("true_sequential", self.true_sequential.map(Value::from)),
            ("damp_percent", self.damp_percent.map(Value::from)),
            ("static_groups", self.static_groups.map(Value::from)),
            ("act_group_aware", self.act_group_aware.map(Value::from)),
            ("mse", self.mse.map(Value::from)),
            ("modules_in_block_to_quantize", self.modules_in_block_to_quantize.clone()),
        ];
        for (key, value) in informative {
            if let Some(value) = value {
                set(key, value);
            }
        }
        if !self.dynamic.is_empty() {
            set("dynamic", Value::Object(self.dynamic.skips_first()));
        }
        let mut meta = self.meta.clone();
        let version = concat!("gptq-rs:", env!("CARGO_PKG_VERSION"));
        meta.insert("quantizer".to_owned(), json!([version]));
        set("meta", Value::Object(meta));
        out.extend(self.other.clone());
        Value::Object(out)
    }

    /// The same settings for the same codes in GPTQ's packing; of GPTQ's own formats with other zero points.
    #[must_use]
    pub fn in_format(&self, format: CheckpointFormat) -> Self {
        let mut config = Self { format, ..self.clone() };
        if self.format == CheckpointFormat::AwqGemm {
            config.other.retain(|key, _| !awq::KEYS.contains(&key.as_str()));
        }
        config
    }

    /// The settings of the module of that name (`model.layers.0.mlp.down_proj`); `None` if a rule of `dynamic` leaves it
    /// unquantized.
    pub fn settings_for(&self, module: &str) -> Option<ModuleSettings> {
        let mut settings = ModuleSettings {
            bits: self.bits,
            group_size: self.group_size,
            desc_act: self.desc_act,
            sym: self.sym,
            act_group_aware: self.act_group_aware,
            static_groups: self.static_groups,
            damp_percent: self.damp_percent,
            mse: self.mse,
        };
        match self.dynamic.decide(module) {
            Decision::Skip => return None,
            Decision::Default => {}
            Decision::Override(o) => {
                settings = ModuleSettings {
                    bits: o.bits.unwrap_or(settings.bits),
                    group_size: o.group_size.unwrap_or(settings.group_size),
                    desc_act: o.desc_act.unwrap_or(settings.desc_act),
                    sym: o.sym.unwrap_or(settings.sym),
                    act_group_aware: o.act_group_aware.or(settings.act_group_aware),
                    static_groups: o.static_groups.or(settings.static_groups),
                    damp_percent: o.damp_percent.or(settings.damp_percent),
                    mse: o.mse.or(settings.mse),
                };
            }
        }
        Some(settings)
    }
}

pub(crate) const REQUANTIZE: &str = "quantize the original model again with `gptq quantize`";

pub(crate) fn unsupported(config: &Config, what: String, hint: &'static str) -> FormatError {
    FormatError::Unsupported { path: config.path().to_owned(), what, hint }
}

fn check_method(config: &Config) -> Result<()> {
    for key in ["quant_method", "method"] {
        if let Some(method) = config.opt_str(key)?
            && method != "gptq"
        {
            let what = format!("the quantization method `{method}`");
            return Err(unsupported(config, what, REQUANTIZE));
        }
    }
    Ok(())
}

fn read_format(config: &Config) -> Result<CheckpointFormat> {
    if config.opt_bool("is_marlin_format")? == Some(true) {
        return Err(unsupported(config, "the format `marlin`".to_owned(), MARLIN));
    }
    let (old, new) = (config.opt_str("checkpoint_format")?, config.opt_str("format")?);
    if let (Some(old), Some(new)) = (old, new)
        && old != new
    {
        return Err(config.error(
            "format",
            format!("`{old}`, as `checkpoint_format` says (zero points depend on it)"),
        ));
    }
    match old.or(new) {
        None | Some("gptq") => Ok(CheckpointFormat::Gptq),
        Some("gptq_v2") => Ok(CheckpointFormat::GptqV2),
        Some(other) => {
            let hint = match other {
                "marlin" => MARLIN,
                "gptq_p" => {
                    "it packs bits in planes that only GPTQModel reads; save it as `gptq` or `gptq_v2` there"
                }
                _ => "supported are `gptq` and `gptq_v2`",
            };
            Err(unsupported(config, format!("the format `{other}`"), hint))
        }
    }
}

const MARLIN: &str = "its weights are shuffled for one GPU kernel; use the checkpoint in format `gptq` it was made from";

fn read_bits(config: &Config) -> Result<Bits> {
    let bits = config.u64("bits")?;
    match bits {
        5..=7 => {
            let what = format!("{bits} bits");
            Err(unsupported(config, what, "only GPTQModel's planar format holds them; use 4 or 8"))
        }
        _ => Bits::try_from(bits).map_err(|_| config.error("bits", "2, 3, 4 or 8")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: &Value) -> Result<QuantizeConfig> {
        QuantizeConfig::from_json(Path::new("quantize_config.json"), value)
    }

    fn message(value: &Value) -> String {
        parse(value).unwrap_err().to_string()
    }

    #[test]
    fn an_autogptq_config_gets_the_documented_defaults() {
        let config = parse(&json!({
            "bits": 4, "group_size": 128, "damp_percent": 0.01, "static_groups": false, "true_sequential": true,
            "model_name_or_path": null, "model_file_base_name": "gptq_model-4bit-128g"
        }))
        .unwrap();
        assert_eq!(config.format, CheckpointFormat::Gptq);
        assert!(config.sym && !config.desc_act && !config.lm_head);
        assert_eq!(config.damp_percent, Some(0.01));
        assert_eq!(config.other["model_file_base_name"], "gptq_model-4bit-128g");
        assert!(!config.other.contains_key("bits"));
    }

    #[test]
    fn informative_settings_are_found_in_meta() {
        let config = parse(&json!({
            "bits": 3, "group_size": -1, "sym": false, "desc_act": true, "format": "gptq_v2",
            "meta": {"damp_percent": 0.05, "act_group_aware": true, "mse": 2.4, "quantizer": ["gptqmodel:7.7.0"]}
        }))
        .unwrap();
        assert_eq!(config.format, CheckpointFormat::GptqV2);
        assert_eq!(config.damp_percent, Some(0.05));
        assert_eq!(config.act_group_aware, Some(true));
        assert_eq!(config.mse, Some(2.4));
        assert_eq!(group_len(config.group_size, 576), 576);
    }

    #[test]
    fn writing_and_reading_keeps_everything_but_the_quantizer() {
        let mut config = parse(&json!({
            "bits": 4, "group_size": 32, "sym": true, "desc_act": false, "checkpoint_format": "gptq_v2",
            "meta": {"quantizer": ["gptqmodel:7.7.0"], "uri": "x"}, "tokenizer": null, "dataset": ["a"],
            "dynamic": {"+:b": {"bits": 8}, "-:a": {}}, "modules_in_block_to_quantize": [["q", "k"]]
        }))
        .unwrap();
        let written = config.to_json();
        assert_eq!(written["quant_method"], "gptq");
        assert_eq!(written["checkpoint_format"], "gptq_v2");
        assert_eq!(written["format"], "gptq_v2");
        assert_eq!(
            written["dynamic"].as_object().unwrap().keys().collect::<Vec<_>>(),
            ["-:a", "+:b"]
        );
        let quantizer = written["meta"]["quantizer"].clone();
        assert!(quantizer[0].as_str().unwrap().starts_with("gptq-rs:"));
        assert!(quantizer.get(1).is_none());
        config.meta.insert("quantizer".to_owned(), quantizer);
        assert_eq!(parse(&written).unwrap(), config);
        let plain = QuantizeConfig::new(Bits::B4, 128, true, false, CheckpointFormat::Gptq);
        assert!(plain.to_json().get("dynamic").is_none());
        assert_eq!(parse(&plain.to_json()).unwrap().group_size, 128);
    }

    #[test]
    fn rules_change_the_settings_of_modules() {
        let config = parse(&json!({
            "bits": 4, "group_size": 128, "sym": true, "damp_percent": 0.05,
            "dynamic": {
                r".*\.down_proj": {"bits": 8, "group_size": 32, "sym": false, "desc_act": true, "mse": 2.4},
                r"-:.*layers\.0\.": {}
            }
        }))
        .unwrap();
        assert_eq!(config.settings_for("model.layers.0.mlp.down_proj"), None);
        let down = config.settings_for("model.layers.1.mlp.down_proj").unwrap();
        assert_eq!(
            (down.bits, down.group_size, down.sym, down.desc_act),
            (Bits::B8, 32, false, true)
        );
        assert_eq!((down.damp_percent, down.mse), (Some(0.05), Some(2.4)));
        assert_eq!(down.group_len(16), 16);
        let up = config.settings_for("model.layers.1.mlp.up_proj").unwrap();
        assert_eq!((up.bits, up.group_size, up.sym, up.desc_act), (Bits::B4, 128, true, false));
    }

    #[test]
    fn other_methods_and_formats_are_refused_by_name() {
        let with = |key: &str, value: Value| {
            let mut config = json!({"bits": 4, "group_size": 128, "sym": true});
            config[key] = value;
            message(&config)
        };
        assert!(with("method", json!("bitsandbytes")).contains("`bitsandbytes`"));
        assert!(with("checkpoint_format", json!("marlin")).contains("GPU kernel"));
        assert!(with("is_marlin_format", json!(true)).contains("GPU kernel"));
        assert!(with("format", json!("gptq_p")).contains("planes"));
        assert!(with("format", json!("bitblas")).contains("`bitblas`"));
        for bits in [5, 6, 7] {
            assert!(with("bits", json!(bits)).contains("planar"));
        }
    }

    #[test]
    fn impossible_values_are_refused_by_key() {
        assert!(message(&json!({"group_size": 128})).contains("`bits`"));
        assert!(message(&json!({"bits": 4})).contains("`group_size`"));
        assert!(message(&json!({"bits": 16, "group_size": 128})).contains("2, 3, 4 or 8"));
        assert!(message(&json!({"bits": 4, "group_size": 0})).contains("`group_size`"));
        assert!(message(&json!({"bits": 4, "group_size": 8, "sym": 1})).contains("`sym`"));
        assert!(message(&json!({"bits": 4, "group_size": 8, "dynamic": []})).contains("`dynamic`"));
        assert!(message(&json!([])).contains("an object"));
        let both =
            json!({"bits": 4, "group_size": 8, "format": "gptq", "checkpoint_format": "gptq_v2"});
        assert!(message(&both).contains("`format`"));
    }
}
