//! GGUF for llama.cpp. What ggml's blocks hold exactly is repacked to the bit; the rest needs `lossy`.

mod blocks;
mod metadata;

use std::path::Path;
use std::sync::Arc;

use gptq_format::gguf::{GgmlType, GgufWriter, PlannedTensor, RowMap, gguf_name};
use gptq_format::{Checkpoint, CheckpointKind, DType, GptqLinear, QuantizeConfig};
use gptq_model::{Block, HeadLayer, LinearSource, ModelError, Spec};

use super::{ConvertOptions, Converted, ConvertedModule, Progress, copy};
use crate::error::{CheckpointError, Result};
use crate::modules;
use blocks::Encoding;
use metadata::Architecture;

pub(super) fn convert(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &ConvertOptions,
    progress: Progress<'_>,
) -> Result<Converted> {
    if matches!(checkpoint.kind, CheckpointKind::Gguf(_)) {
        return Err(CheckpointError::Unsupported {
            path: checkpoint.path.clone(),
            target: "gguf",
            reason: "it is a GGUF file already".into(),
        });
    }
    let spec = Spec::for_checkpoint(checkpoint)?;
    let mut notes = Vec::new();
    let architecture = Architecture::of(checkpoint, &spec)?;
    metadata::check_windows(&spec, options.lossy, &mut notes)?;
    check_shapes(checkpoint, &spec)?;
    let sources = sources(checkpoint, &spec, architecture, options.lossy, &mut notes)?;
    let mut tensors: Vec<PlannedTensor> = sources.iter().map(|s| s.planned.clone()).collect();
    let factors = metadata::rope_factors(&spec);
    if let Some(factors) = &factors {
        tensors.push(PlannedTensor {
            name: "rope_freqs.weight".into(),
            dtype: GgmlType::F32,
            shape: vec![factors.len()],
        });
    }
    let metadata = metadata::all(
        checkpoint,
        &spec,
        architecture,
        file_type(&sources),
        output,
        options.lossy,
        &mut notes,
    )?;
    let mut writer = GgufWriter::create(output, options.overwrite, &metadata, &tensors)?;
    if let Some(factors) = &factors {
        let bytes = copy::encode("rope_freqs.weight", DType::F32, 0, factors)?;
        writer.append("rope_freqs.weight", &bytes)?;
    }
    let mut converted = Vec::new();
    for (done, source) in sources.iter().enumerate() {
        progress(done, sources.len());
        let name = &source.planned.name;
        if let Some((encoding, config)) = &source.quantized {
            let linear = GptqLinear::load(&checkpoint.tensors, &source.tensor, config, None)?;
            blocks::write(&linear, *encoding, &source.tensor, source.rows, &mut |bytes| {
                writer.append(name, bytes)
            })?;
            converted.push(ConvertedModule {
                module: source.tensor.clone(),
                to: encoding.name(),
                exact: encoding.exact(),
            });
        } else {
            copy::stream(
                &checkpoint.tensors,
                &source.tensor,
                source.planned.dtype.into(),
                source.rows,
                &mut |bytes| writer.append(name, bytes),
            )?;
        }
    }
    let output_bytes = tensors.iter().map(bytes).sum();
    let output = writer.finish()?;
    Ok(Converted { output, output_bytes, modules: converted, notes })
}

/// A tensor of the output and where it comes from.
struct Source<'a> {
    planned: PlannedTensor,
    /// Name of the tensor, or of the quantized module.
    tensor: String,
    quantized: Option<(Encoding, &'a QuantizeConfig)>,
    /// How its rows lie in the file.
    rows: Option<RowMap>,
}

/// What the config says and what the tensors are have to agree before any size is taken from either.
fn check_shapes(checkpoint: &Checkpoint, spec: &Spec) -> Result<()> {
    let store = &checkpoint.tensors;
    let check = |tensor: String, expected: &[usize]| -> Result<()> {
        let info = store.info(&tensor)?;
        if info.shape == expected {
            return Ok(());
        }
        let (file, got) = (info.file.clone(), info.shape.clone());
        Err(ModelError::Shape { file, tensor, expected: expected.to_vec(), got }.into())
    };
    let embedding = format!("{}{}.weight", spec.base, spec.embedding.name);
    check(embedding, &[spec.vocab, spec.embedding.width])?;
    for linear in modules::linears(spec) {
        let has = |part: &str| store.contains(&format!("{}.{part}", linear.module));
        // Packed weights are checked when they are read.
        if !has("qweight") {
            let shape = [linear.out_features, linear.in_features];
            check(format!("{}.weight", linear.module), &shape)?;
        }
        if linear.bias || has("bias") {
            check(format!("{}.bias", linear.module), &[linear.out_features])?;
        }
    }
    let spec = Arc::new(spec.clone());
    for layer in 0..spec.layer_count() {
        // Reads the norms.
        Block::load(checkpoint, &spec, layer, LinearSource::Unset)?;
    }
    HeadLayer::load_without_projection(checkpoint, &spec)?;
    Ok(())
}

/// Buffers that every loader makes anew.
const BUFFER: &str = ".rotary_emb.inv_freq";

fn sources<'a>(
    checkpoint: &'a Checkpoint,
    spec: &Spec,
    architecture: Architecture,
    lossy: bool,
    notes: &mut Vec<String>,
) -> Result<Vec<Source<'a>>> {
    let store = &checkpoint.tensors;
    let linears = modules::linears(spec);
    let tied_head = spec.head.name.filter(|_| spec.head.tied);
    let mut found = Vec::new();
    let mut names: Vec<&str> = store.names().collect();
    names.sort_by_key(|name| modules::natural(name));
    for name in names {
        let part = modules::quantized_part(store, name);
        let module = part.map(|(module, _)| module);
        let in_head =
            |head| name.strip_prefix(head).is_some_and(|rest: &str| rest.starts_with('.'));
        if name.ends_with(BUFFER) || tied_head.is_some_and(in_head) {
            continue;
        }
        let written = match part {
            Some((module, "qweight")) => format!("{module}.weight"),
            Some((_, "bias")) | None => name.to_owned(),
            Some(_) => continue,
        };
        let info = store.info(name)?;
        let (owner, kind) = written.rsplit_once('.').unwrap_or((&written, ""));
        let linear = linears.iter().find(|l| l.module == owner);
        if kind == "bias" && linear.is_some_and(|l| !l.bias) {
            // Old quantizers wrote zeros for every linear; anything else would not load.
            if store.read_f32(name, &info.shape)?.iter().any(|&b| b != 0.0) {
                let file = checkpoint.path.clone();
                let (tensor, family) = (name.to_owned(), spec.family.to_owned());
                return Err(ModelError::UnexpectedBias { file, tensor, family }.into());
            }
            continue;
        }
        let planned_name =
            gguf_name(&canonical(&written, spec)).ok_or_else(|| CheckpointError::Unsupported {
                path: checkpoint.path.clone(),
                target: "gguf",
                reason: format!("llama.cpp has no place for tensor `{name}`"),
            })?;
        let heads = match linear.map(|l| l.name.as_str()) {
            Some("self_attn.q_proj") if architecture.interleaves() => Some(spec.attention.heads),
            Some("self_attn.k_proj") if architecture.interleaves() => Some(spec.attention.kv_heads),
            _ => None,
        };
        let rows = heads.map(|heads| RowMap { heads, head_rows: spec.attention.head_dim });
        if let (Some((_, "qweight")), Some(module), Some(linear)) = (part, module, linear) {
            let Some(config) = &checkpoint.quantize_config else {
                let (file, module) = (checkpoint.path.clone(), module.to_owned());
                return Err(ModelError::NoQuantizeConfig { file, module }.into());
            };
            let shape = [linear.out_features, linear.in_features];
            let encoding = {
                let linear = GptqLinear::load(store, module, config, Some(shape))?;
                Encoding::choose(&linear, module, lossy)?
            };
            let planned =
                PlannedTensor { name: planned_name, dtype: encoding.dtype(), shape: shape.into() };
            let quantized = Some((encoding, config));
            found.push(Source { planned, tensor: module.to_owned(), quantized, rows });
            continue;
        }
        let dtype = match info.dtype {
            _ if info.shape.len() < 2 => GgmlType::F32,
            DType::F16 => GgmlType::F16,
            DType::BF16 => GgmlType::Bf16,
            _ => GgmlType::F32,
        };
        let planned = PlannedTensor { name: planned_name, dtype, shape: info.shape.clone() };
        found.push(Source { planned, tensor: name.to_owned(), quantized: None, rows });
    }
    let inexact = found
        .iter()
        .filter(|s| s.quantized.as_ref().is_some_and(|(encoding, _)| !encoding.exact()))
        .count();
    if inexact > 0 {
        notes.push(format!("the weights of {inexact} modules were rounded to ggml's types"));
    }
    Ok(found)
}

/// The name with the usual prefix; checkpoints of the bare model leave it out.
fn canonical(name: &str, spec: &Spec) -> String {
    match name.strip_prefix(&spec.base) {
        Some(rest) if spec.head.name.is_none_or(|head| !name.starts_with(head)) => {
            format!("model.{rest}")
        }
        _ => name.to_owned(),
    }
}

/// llama.cpp's number for the type of most weights; it only informs.
fn file_type(sources: &[Source<'_>]) -> u32 {
    let known = [
        (GgmlType::F32, 0),
        (GgmlType::F16, 1),
        (GgmlType::Q4_0, 2),
        (GgmlType::Q4_1, 3),
        (GgmlType::Q8_0, 7),
        (GgmlType::Bf16, 32),
    ];
    let weights = |dtype: GgmlType| -> usize {
        let blocks = sources.iter().filter(|s| s.planned.name.starts_with("blk."));
        let same = blocks.filter(|s| s.planned.dtype == dtype && s.planned.shape.len() == 2);
        same.map(|s| s.planned.shape.iter().product::<usize>()).sum()
    };
    known.into_iter().max_by_key(|(dtype, _)| weights(*dtype)).map_or(0, |(_, number)| number)
}

fn bytes(tensor: &PlannedTensor) -> u64 {
    let elements = tensor.shape.iter().map(|&d| d as u64).product();
    tensor.dtype.byte_len(elements).unwrap_or(0)
}
