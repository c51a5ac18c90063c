//! The settings: what engines need in them, and whether the two files that hold them agree.

use gptq_format::fs::read_json_if_exists;
use gptq_format::{Checkpoint, CheckpointFormat, QuantizeConfig};
use serde_json::Value;

use super::finding::Findings;

/// Keys that change how weights are read.
const DECISIVE: [&str; 6] =
    ["bits", "group_size", "desc_act", "sym", "checkpoint_format", "dynamic"];

pub(super) fn check(checkpoint: &Checkpoint, config: &QuantizeConfig, findings: &mut Findings) {
    let inside = checkpoint.config.value("quantization_config");
    if config.format == CheckpointFormat::AwqGemm {
        if inside.is_none() {
            findings.warning(
                "no-quantization-config",
                Some("config.json"),
                "it has no `quantization_config`; the settings are in quant_config.json only",
                Some(
                    "copy them into config.json as `quantization_config`, with `quant_method` awq",
                ),
            );
        }
        return;
    }
    let path = checkpoint.path.join("quantize_config.json");
    match (inside, read_json_if_exists(&path)) {
        (None, _) => findings.warning(
            "no-quantization-config",
            Some("config.json"),
            "it has no `quantization_config`; the settings are in quantize_config.json only",
            Some(
                "copy the object of quantize_config.json into config.json as `quantization_config`",
            ),
        ),
        (Some(_), Err(error)) => {
            findings.warning(
                "config-mismatch",
                Some("quantize_config.json"),
                error.to_string(),
                None,
            );
        }
        (Some(inside), Ok(Some(beside))) => {
            for key in DECISIVE {
                let (a, b) = (value(inside, key), value(&beside, key));
                if a != b {
                    let show =
                        |v: Option<&Value>| v.map_or_else(|| "nothing".into(), Value::to_string);
                    findings.error(
                        "config-mismatch",
                        Some("quantize_config.json"),
                        format!(
                            "`{key}` is {} here and {} in config.json; engines read one or the other",
                            show(b),
                            show(a)
                        ),
                        Some("find out which is right and write it into both files"),
                    );
                }
            }
        }
        (Some(_), Ok(None)) => {}
    }
    if let Some(inside) = inside {
        for (key, effect) in [
            ("quant_method", "engines do not see that the checkpoint is quantized"),
            ("sym", "TGI takes it as false, other engines as true"),
            ("desc_act", "vLLM refuses the checkpoint"),
        ] {
            if inside.get(key).is_none_or(Value::is_null) {
                findings.warning(
                    "config-missing-key",
                    Some("config.json"),
                    format!("`quantization_config` has no `{key}`: {effect}"),
                    Some("add the key"),
                );
            }
        }
    }
    for key in config.dynamic.unknown_keys() {
        findings.note(
            "dynamic-key",
            None,
            format!("`dynamic` has the key `{key}`, which has no meaning here"),
            None,
        );
    }
}

/// The value of `key`, absent where it is null, with defaults and the newer name of the format resolved.
fn value<'a>(object: &'a Value, key: &str) -> Option<&'a Value> {
    let get = |key: &str| object.get(key).filter(|v| !v.is_null());
    match key {
        "checkpoint_format" => get(key).or_else(|| get("format")).filter(|v| *v != "gptq"),
        "dynamic" => get(key).filter(|v| v.as_object().is_none_or(|map| !map.is_empty())),
        "desc_act" => get(key).filter(|v| **v != Value::Bool(false)),
        _ => get(key),
    }
}
