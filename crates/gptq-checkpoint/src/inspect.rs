//! What a checkpoint holds, from its headers alone.

use std::collections::{BTreeMap, HashSet};

use gptq_format::{Checkpoint, CheckpointFormat, CheckpointKind};
use gptq_model::Spec;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::Result;
use crate::modules::{self, PARTS, quantized_part};

/// What a checkpoint holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// `safetensors`, `gptq`, `awq` or `gguf`.
    pub format: &'static str,
    /// `model_type` of the config.
    pub family: Option<String>,
    /// Number of transformer blocks; `None` if the family is not known.
    pub blocks: Option<usize>,
    /// All parameters, each quantized weight counted as one.
    pub parameters: u64,
    /// Stored size of all tensors.
    pub file_bytes: u64,
    /// Size with two bytes for every parameter.
    pub f16_bytes: u64,
    /// Parameters by type; those of quantized linears under `4-bit` and so on.
    pub dtypes: BTreeMap<String, u64>,
    /// The settings of the whole model; `None` if it is not GPTQ.
    pub quantization: Option<Quantization>,
    /// Every quantized linear.
    pub modules: Vec<ModuleInfo>,
    /// Names of the tensors that are not part of one.
    pub not_quantized: Vec<String>,
    /// The same tensors with what their headers say.
    pub tensors: Vec<TensorRow>,
}

/// The settings of a GPTQ checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Quantization {
    /// Bits of a code.
    pub bits: u32,
    /// Inputs per group, or -1 for all.
    pub group_size: i64,
    /// Symmetric grid.
    pub sym: bool,
    /// Activation order with groups formed in it.
    pub desc_act: bool,
    /// `gptq`, `gptq_v2` or `awq`.
    pub checkpoint_format: &'static str,
    /// The tools that wrote it, as they say.
    pub quantizer: Option<Value>,
    /// Rules for single modules, as given.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub dynamic: Map<String, Value>,
    /// Bits per weight of the quantized linears, with codes, scales, zero points and group indices.
    pub bits_per_weight: f64,
}

/// A quantized linear.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModuleInfo {
    /// Its full name.
    pub module: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Bits of a code.
    pub bits: u32,
    /// Inputs per group, or -1 for all.
    pub group_size: i64,
    /// Symmetric grid.
    pub sym: bool,
    /// Activation order with groups formed in it.
    pub desc_act: bool,
    /// Stored size, bias included.
    pub bytes: u64,
    /// Stored bits per weight, bias not counted.
    pub bits_per_weight: f64,
}

/// A tensor that is not part of a quantized linear.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorRow {
    /// Its name.
    pub tensor: String,
    /// Its shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Its type.
    pub dtype: String,
    /// Stored size.
    pub bytes: u64,
}

/// Looks at the headers of a checkpoint. An unknown family and quantized linears that cannot be made out are no errors: their
/// tensors are listed as they are.
///
/// # Errors
/// If a tensor's header cannot be read.
pub fn inspect(checkpoint: &Checkpoint) -> Result<Inspection> {
    let store = &checkpoint.tensors;
    let spec = Spec::for_checkpoint(checkpoint).ok();
    let linears = spec.as_ref().map(modules::linears).unwrap_or_default();
    let mut found = Vec::new();
    let (mut weights, mut weight_bytes) = (0u64, 0u64);
    let mut dtypes: BTreeMap<String, u64> = BTreeMap::new();
    for module in modules::quantized(checkpoint, &linears) {
        let Some(info) = module_info(checkpoint, &module)? else { continue };
        let count = (info.shape[0] as u64).saturating_mul(info.shape[1] as u64);
        weights += count;
        weight_bytes += (info.bits_per_weight * count as f64 / 8.0).round() as u64;
        *dtypes.entry(format!("{}-bit", info.bits)).or_default() += count;
        found.push(info);
    }
    let packed: HashSet<&str> = found.iter().map(|info| info.module.as_str()).collect();
    let mut parameters = weights;
    let mut tensors = Vec::new();
    let mut names: Vec<&str> = store.names().collect();
    names.sort_by_key(|name| modules::natural(name));
    for name in names {
        let info = store.info(name)?;
        let part = quantized_part(store, name).filter(|(module, _)| packed.contains(module));
        if let Some((_, part)) = part {
            if part == "bias" {
                parameters += info.elements() as u64;
                *dtypes.entry(info.dtype.to_string()).or_default() += info.elements() as u64;
            }
            continue;
        }
        parameters += info.elements() as u64;
        *dtypes.entry(info.dtype.to_string()).or_default() += info.elements() as u64;
        tensors.push(TensorRow {
            tensor: name.to_owned(),
            shape: info.shape.clone(),
            dtype: info.dtype.to_string(),
            bytes: info.bytes as u64,
        });
    }
    let quantization = checkpoint.quantize_config.as_ref().map(|config| Quantization {
        bits: config.bits.as_u32(),
        group_size: config.group_size,
        sym: config.sym,
        desc_act: config.desc_act,
        checkpoint_format: config.format.as_str(),
        quantizer: config.meta.get("quantizer").cloned(),
        dynamic: config.dynamic.source().clone(),
        bits_per_weight: 8.0 * weight_bytes as f64 / weights.max(1) as f64,
    });
    Ok(Inspection {
        format: match (&checkpoint.kind, &checkpoint.quantize_config) {
            (CheckpointKind::Gguf(_), _) => "gguf",
            (_, Some(config)) if config.format == CheckpointFormat::AwqGemm => "awq",
            (_, Some(_)) => "gptq",
            (_, None) => "safetensors",
        },
        family: checkpoint.config.opt_str("model_type").ok().flatten().map(str::to_owned),
        blocks: spec.as_ref().map(Spec::layer_count),
        parameters,
        file_bytes: store.total_bytes(),
        f16_bytes: parameters.saturating_mul(2),
        dtypes,
        quantization,
        modules: found,
        not_quantized: tensors.iter().map(|row: &TensorRow| row.tensor.clone()).collect(),
        tensors,
    })
}

/// What the headers say of a quantized linear; `None` if they contradict the config.
fn module_info(checkpoint: &Checkpoint, module: &str) -> Result<Option<ModuleInfo>> {
    let store = &checkpoint.tensors;
    let info = store.info(&format!("{module}.qweight"))?;
    let settings = checkpoint.quantize_config.as_ref().and_then(|c| c.settings_for(module));
    let (&[rows, columns], Some(settings)) = (info.shape.as_slice(), settings) else {
        return Ok(None);
    };
    let format = checkpoint.quantize_config.as_ref().map(|config| config.format);
    let shape = match format {
        // Packed along the outputs.
        Some(CheckpointFormat::AwqGemm) => settings.bits.codes(columns).map(|out| (rows, out)),
        _ => settings.bits.codes(rows).map(|inputs| (inputs, columns)),
    };
    let Some((inputs, outputs)) = shape else { return Ok(None) };
    let size = |part: &str| store.info(&format!("{module}.{part}")).map_or(0, |i| i.bytes as u64);
    let codes: u64 = PARTS.iter().map(|part| size(part)).sum();
    let count = (inputs as u64).saturating_mul(outputs as u64);
    Ok(Some(ModuleInfo {
        module: module.to_owned(),
        shape: [outputs, inputs],
        bits: settings.bits.as_u32(),
        group_size: settings.group_size,
        sym: settings.sym,
        desc_act: settings.desc_act,
        bytes: codes + size("bias"),
        bits_per_weight: 8.0 * codes as f64 / count.max(1) as f64,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantized_fixture_adds_up() {
        let Some(dir) = gptq_testkit::fixtures::dir("quant/b4_g32_asym.gptq_v2") else { return };
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let seen = inspect(&checkpoint).unwrap();
        assert_eq!((seen.format, seen.blocks), ("gptq", Some(2)));
        let quantization = seen.quantization.unwrap();
        assert_eq!((quantization.bits, quantization.sym), (4, false));
        assert_eq!(quantization.checkpoint_format, "gptq_v2");
        assert_eq!(seen.modules.len(), 14);
        let q = &seen.modules[0];
        assert_eq!(q.module, "model.layers.0.self_attn.q_proj");
        assert_eq!(q.shape, [128, 128]);
        // 4 bits, 20 bits of scale and zero point per group of 32, 32 bits per input over 128 outputs.
        let expected = 4.0 + 20.0 / 32.0 + 32.0 / 128.0;
        assert!((q.bits_per_weight - expected).abs() < 1e-9, "{}", q.bits_per_weight);
        let listed: u64 = seen.modules.iter().map(|m| m.bytes).sum::<u64>()
            + seen.tensors.iter().map(|t| t.bytes).sum::<u64>();
        assert_eq!(listed, seen.file_bytes);
        assert_eq!(seen.dtypes.values().sum::<u64>(), seen.parameters);
    }

    #[test]
    fn an_unknown_family_is_listed_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        gptq_testkit::tiny_llama(dir.path(), 1);
        let path = dir.path().join("config.json");
        let text = std::fs::read_to_string(&path).unwrap().replace("\"llama\"", "\"novel\"");
        std::fs::write(&path, text).unwrap();
        let seen = inspect(&Checkpoint::open(dir.path()).unwrap()).unwrap();
        assert_eq!((seen.format, seen.blocks), ("safetensors", None));
        assert_eq!(seen.family.as_deref(), Some("novel"));
        assert_eq!(seen.f16_bytes, 2 * seen.parameters);
        assert!(seen.modules.is_empty() && seen.quantization.is_none());
    }
}
