//! From one zero-point convention to the other. Only `qzeros` change; group indices that are absent or all zeros, by which
//! early writers meant `k / group_size`, are written out. Of AutoAWQ's checkpoints `qweight` is packed anew, too.

use std::path::Path;

use gptq_format::pack::encode_zeros;
use gptq_format::{
    Checkpoint, CheckpointFormat, CheckpointKind, DType, FormatError, GptqLinear, OutputDir,
    ShardPlan, ShardWriter, TensorSpec,
};
use serde_json::Value;

use super::{
    ConvertOptions, Converted, ConvertedModule, Progress, copy, write_json, write_side_files,
};
use crate::error::{CheckpointError, Result};
use crate::modules;

pub(super) fn convert(
    checkpoint: &Checkpoint,
    output: &Path,
    format: CheckpointFormat,
    options: &ConvertOptions,
    progress: Progress<'_>,
) -> Result<Converted> {
    let store = &checkpoint.tensors;
    let not_gptq = |reason| CheckpointError::NotGptq { path: checkpoint.path.clone(), reason };
    if matches!(checkpoint.kind, CheckpointKind::Gguf(_)) {
        return Err(not_gptq("it is a GGUF file; `gptq quantize` makes a GPTQ checkpoint of it"));
    }
    let config = checkpoint.quantize_config.as_ref().ok_or_else(|| {
        not_gptq("its weights are floats; `gptq quantize` makes a GPTQ checkpoint of it")
    })?;
    let packed = modules::quantized(checkpoint, &[]);
    let repacked = config.format == CheckpointFormat::AwqGemm;
    let mut specs = Vec::new();
    for name in store.names() {
        let part = modules::quantized_part(store, name);
        if repacked && matches!(part, Some((_, "qweight" | "g_idx"))) {
            continue;
        }
        let info = store.info(name)?;
        // Those that are written anew have 32 bits.
        let anew = match part {
            Some((_, "g_idx")) => true,
            Some((_, "qzeros")) => format != config.format,
            _ => false,
        };
        specs.push(TensorSpec {
            name: name.to_owned(),
            dtype: if anew { DType::I32 } else { info.dtype },
            shape: info.shape.clone(),
        });
    }
    for module in &packed {
        let name = format!("{module}.g_idx");
        if repacked || !store.contains(&name) {
            let linear = GptqLinear::load(store, module, config, None)?;
            if repacked {
                let name = format!("{module}.qweight");
                let shape = vec![linear.in_features / 8, linear.out_features];
                specs.push(TensorSpec { name, dtype: DType::I32, shape });
            }
            specs.push(TensorSpec { name, dtype: DType::I32, shape: vec![linear.in_features] });
        }
    }
    specs.sort_by(|a, b| modules::natural(&a.name).cmp(&modules::natural(&b.name)));
    let plan = ShardPlan::new(specs, options.max_shard_bytes)?;
    let output_bytes = plan.total_bytes();

    let mut new = config.in_format(format);
    // The file that it names is not written.
    new.other.shift_remove("model_file_base_name");
    let new = new.to_json();
    let mut json = checkpoint.config.map().clone();
    json.insert("quantization_config".into(), new.clone());

    let directory = OutputDir::create(output, options.overwrite)?;
    write_side_files(checkpoint, &Value::Object(json), directory.path())?;
    write_json(&directory.path().join("quantize_config.json"), &new)?;
    let mut writer = ShardWriter::create(directory.path(), plan)?;
    let total = packed.len() + store.names().count();
    for (done, module) in packed.iter().enumerate() {
        progress(done, total);
        let linear = GptqLinear::load(store, module, config, None)?;
        let words = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        writer.write(&format!("{module}.g_idx"), &words(&linear.g_idx))?;
        let name = format!("{module}.qzeros");
        if repacked {
            writer.write(&format!("{module}.qweight"), &words(&linear.qweight))?;
        }
        if format == config.format {
            copy_as_is(checkpoint, &name, &mut writer)?;
            continue;
        }
        let zeros =
            encode_zeros(linear.bits, format, &linear.zeros, linear.groups, linear.out_features);
        let zeros = zeros.map_err(|error| match error {
            FormatError::ZeroPointZero { group, output } => {
                CheckpointError::ZeroPointZero { module: module.clone(), group, output }
            }
            other => other.into(),
        })?;
        writer.write(&name, &words(&zeros))?;
    }
    for (done, name) in store.names().enumerate() {
        progress(packed.len() + done, total);
        let part = modules::quantized_part(store, name);
        let written = match part {
            Some((_, "g_idx" | "qzeros")) => true,
            Some((_, "qweight")) => repacked,
            _ => false,
        };
        if !written {
            copy_as_is(checkpoint, name, &mut writer)?;
        }
    }
    writer.finish()?;
    let output = directory.commit()?;
    let modules = packed.into_iter().map(|module| ConvertedModule {
        module,
        to: format.as_str(),
        exact: true,
    });
    Ok(Converted { output, output_bytes, modules: modules.collect(), notes: Vec::new() })
}

fn copy_as_is(checkpoint: &Checkpoint, name: &str, writer: &mut ShardWriter) -> Result<()> {
    let store = &checkpoint.tensors;
    let info = store.info(name)?;
    if info.bytes == 0 {
        return Ok(writer.write(name, &[])?);
    }
    let mut at = 0u64;
    copy::stream(store, name, info.dtype, None, &mut |bytes| {
        writer.write_part(name, at, bytes)?;
        at += bytes.len() as u64;
        Ok(())
    })
}
