//! AutoAWQ's checkpoints, layout "gemm": the same grid as asymmetric GPTQ, packed otherwise.
//!
//! `qweight: [in, out / 8] i32` and `qzeros: [groups, out / 8] i32` hold eight neighbouring outputs in a
//! word, of which the lowest four bits are output 0, the next output 2, then 4, 6, 1, 3, 5, 7: what
//! AutoAWQ's CUDA kernel unpacks fastest. `scales: [groups, out] f16`. Zero points are stored as they
//! are; group g has the inputs from g * group_size on.

use half::f16;
use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::dynamic::{Dynamic, is_group_size};
use crate::error::{FormatError, Result};
use crate::gptq_linear::GptqLinear;
use crate::pack::{Bits, pack_rows};
use crate::quantize_config::{
    CheckpointFormat, KNOWN, ModuleSettings, QuantizeConfig, REQUANTIZE, unsupported,
};
use crate::tensors::TensorStore;

/// Codes of a word.
const PER_WORD: usize = 8;
/// Output of the eight that each four bits of a word hold, the lowest first.
const ORDER: [usize; PER_WORD] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Unpacks words `[rows, outputs / 8]` into codes `[rows, outputs]`, both row-major.
pub fn unpack(words: &[u32]) -> Vec<u8> {
    let mut codes = vec![0; words.len() * PER_WORD];
    for (word, codes) in words.iter().zip(codes.chunks_exact_mut(PER_WORD)) {
        for (place, &output) in ORDER.iter().enumerate() {
            codes[output] = (word >> (4 * place) & 0xF) as u8;
        }
    }
    codes
}

/// Reads module `prefix`, as [`GptqLinear::load`] does.
pub(crate) fn load(
    store: &TensorStore,
    prefix: &str,
    settings: &ModuleSettings,
    expected: Option<[usize; 2]>,
) -> Result<GptqLinear> {
    let wrong = |reason: String| FormatError::Linear {
        path: store.path().to_owned(),
        module: prefix.to_owned(),
        reason,
    };
    let name = |part: &str| format!("{prefix}.{part}");
    let info = store.info(&name("qweight"))?;
    let &[inputs, columns] = info.shape.as_slice() else {
        let shape = &info.shape;
        return Err(wrong(format!("`qweight` has shape {shape:?}, expected [in, out / 8]")));
    };
    let outputs = columns.checked_mul(PER_WORD).filter(|&out| out > 0 && inputs > 0);
    let outputs = outputs.ok_or_else(|| {
        wrong(format!("`qweight` of shape [{inputs}, {columns}] holds no weights"))
    })?;
    if let Some(expected) = expected
        && expected != [outputs, inputs]
    {
        return Err(wrong(format!(
            "`qweight` holds [{outputs}, {inputs}] (out, in), but the model needs {expected:?}"
        )));
    }
    if !inputs.is_multiple_of(PER_WORD) {
        return Err(wrong(format!("`qweight` has {inputs} inputs, which is no multiple of 8")));
    }
    let per_group = settings.group_len(inputs);
    if !inputs.is_multiple_of(per_group) {
        return Err(wrong(format!(
            "`qweight` has {inputs} inputs, which is no multiple of the group size {per_group}"
        )));
    }
    let groups = inputs / per_group;
    let words = |values: Vec<i32>| values.into_iter().map(i32::cast_unsigned).collect::<Vec<_>>();
    let codes = unpack(&words(store.read_i32(&name("qweight"), &[inputs, columns])?));
    let zeros = unpack(&words(store.read_i32(&name("qzeros"), &[groups, columns])?));
    let scales: Vec<f16> = store.read_f16(&name("scales"), &[groups, outputs])?;
    let bias = if store.contains(&name("bias")) {
        Some(store.read_f32(&name("bias"), &[outputs])?)
    } else {
        None
    };
    let linear = GptqLinear {
        bits: Bits::B4,
        in_features: inputs,
        out_features: outputs,
        groups,
        qweight: pack_rows(Bits::B4, &codes, inputs, outputs)?,
        scales,
        zeros,
        g_idx: (0..inputs).map(|k| (k / per_group) as u32).collect(),
        bias,
    };
    linear.check().map_err(wrong)?;
    Ok(linear)
}

/// Keys that only AutoAWQ's settings have.
pub(crate) const KEYS: [&str; 9] = [
    "version",
    "zero_point",
    "modules_to_not_convert",
    "backend",
    "w_bit",
    "q_group_size",
    "do_fuse",
    "fuse_max_seq_len",
    "modules_to_fuse",
];

/// Whether the settings are those of an AWQ checkpoint.
pub(crate) fn is_awq(config: &Config) -> Result<bool> {
    let method = config.opt_str("quant_method")?.or(config.opt_str("method")?);
    Ok(method == Some("awq"))
}

/// The settings of an AutoAWQ checkpoint.
pub(crate) fn settings(config: &Config) -> Result<QuantizeConfig> {
    let either = |new: &'static str, old: &'static str| {
        if config.value(new).is_none() && config.value(old).is_some() { old } else { new }
    };
    let mut version = None;
    for key in ["version", "format", "checkpoint_format"] {
        version = version.or(config.opt_str(key)?);
    }
    if let Some(version) = version.filter(|version| !version.eq_ignore_ascii_case("gemm")) {
        let what = format!("the AWQ version `{version}`");
        let hint = "only `gemm`, AutoAWQ's usual one, is read; or quantize the original model with `gptq quantize`";
        return Err(unsupported(config, what, hint));
    }
    let bits = config.u64(either("bits", "w_bit"))?;
    if bits != 4 {
        return Err(unsupported(config, format!("AWQ with {bits} bits"), REQUANTIZE));
    }
    let key = either("group_size", "q_group_size");
    let group_size = config.value(key).and_then(Value::as_i64).filter(|&g| is_group_size(g));
    let group_size = group_size.ok_or_else(|| config.error(key, "-1 or a positive integer"))?;
    // Parts of names, as AutoAWQ and transformers compare them.
    let mut rules = Map::new();
    match config.value("modules_to_not_convert") {
        None | Some(Value::Null) => {}
        Some(Value::Array(names)) => {
            for name in names {
                let Value::String(name) = name else {
                    return Err(config.error("modules_to_not_convert", "a list of names"));
                };
                rules.insert(format!("-:.*{}", regex::escape(name)), json!({}));
            }
        }
        Some(_) => return Err(config.error("modules_to_not_convert", "null or a list of names")),
    }
    let mut settings =
        QuantizeConfig::new(Bits::B4, group_size, false, false, CheckpointFormat::AwqGemm);
    settings.dynamic = Dynamic::from_map(&rules)?;
    let known = ["bits", "w_bit", "group_size", "q_group_size", "quant_method", "method"];
    settings.other = config
        .map()
        .iter()
        .filter(|(key, _)| !known.contains(&key.as_str()) && !KNOWN.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    Ok(settings)
}

/// The settings as AutoAWQ has them in `config.json`.
pub(crate) fn to_json(settings: &QuantizeConfig) -> Value {
    let mut out = settings.other.clone();
    let mut set = |key: &str, value: Value| out.insert(key.to_owned(), value);
    set("quant_method", json!("awq"));
    set("version", json!("gemm"));
    set("bits", json!(settings.bits.as_u32()));
    set("group_size", json!(settings.group_size));
    set("zero_point", json!(true));
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn nibbles_are_in_the_order_of_the_kernel() {
        // Lowest first: 0xF is output 0, 0xE output 2, 0xD output 4, and so on.
        assert_eq!(unpack(&[0x89AB_CDEF]), [0xF, 0xB, 0xE, 0xA, 0xD, 0x9, 0xC, 0x8]);
        // One set bit: place 4 is output 1.
        assert_eq!(unpack(&[0, 1 << 16])[8..], [0, 1, 0, 0, 0, 0, 0, 0]);
    }

    fn parse(value: &Value) -> Result<QuantizeConfig> {
        QuantizeConfig::from_json(Path::new("config.json"), value)
    }

    #[test]
    fn the_settings_of_autoawq_are_read() {
        let new = json!({
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 64, "zero_point": true,
            "modules_to_not_convert": ["gate", "visual."]
        });
        let config = parse(&new).unwrap();
        assert_eq!((config.format, config.bits), (CheckpointFormat::AwqGemm, Bits::B4));
        assert_eq!((config.group_size, config.sym, config.desc_act), (64, false, false));
        assert!(config.settings_for("model.layers.0.mlp.up_proj").is_some());
        assert_eq!(config.settings_for("model.layers.0.mlp.gate"), None);
        assert_eq!(config.settings_for("visual.proj"), None);
        assert_eq!(parse(&config.to_json()).unwrap(), config);
        // As GPTQ's: the same rules, none of AutoAWQ's keys.
        let gptq = config.in_format(CheckpointFormat::GptqV2);
        let written = gptq.to_json();
        assert_eq!(written["quant_method"], "gptq");
        assert!(written.get("version").is_none() && written.get("zero_point").is_none());
        let read = parse(&written).unwrap();
        assert_eq!((read.format, read.sym), (CheckpointFormat::GptqV2, false));
        assert_eq!(read.settings_for("model.layers.0.mlp.gate"), None);
        // AutoRound's symmetric ones have zero points, too, all of them 8.
        let mut some = new.clone();
        some["zero_point"] = json!(false);
        let symmetric = parse(&some).unwrap();
        assert_eq!((symmetric.format, symmetric.sym), (CheckpointFormat::AwqGemm, false));
        for list in [json!(null), json!([])] {
            let mut some = new.clone();
            some["modules_to_not_convert"] = list;
            assert!(parse(&some).unwrap().dynamic.is_empty());
        }

        let old = json!({"w_bit": 4, "q_group_size": 128, "zero_point": true, "version": "GEMM"});
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("quant_config.json"), old.to_string()).unwrap();
        let empty = Config::new(&directory.path().join("config.json"), Map::new());
        let config = QuantizeConfig::load(directory.path(), &empty).unwrap().unwrap();
        assert_eq!((config.format, config.group_size), (CheckpointFormat::AwqGemm, 128));

        let with = |key: &str, value: Value| {
            let mut config = new.clone();
            config[key] = value;
            parse(&config).unwrap_err().to_string()
        };
        for version in ["gemv", "marlin", "exllama", "ipex"] {
            assert!(with("version", json!(version)).contains(&format!("`{version}`")));
        }
        assert!(with("bits", json!(8)).contains("8 bits"));
        assert!(with("bits", json!("4")).contains("`bits`"));
        assert!(with("group_size", json!(0)).contains("`group_size`"));
        assert!(with("modules_to_not_convert", json!("gate")).contains("modules_to_not_convert"));
        assert!(with("modules_to_not_convert", json!([1])).contains("modules_to_not_convert"));
    }
}
