//! Floats: quantized weights and matrices of more than 16 bits as f16, everything else as it is.

use std::collections::HashMap;
use std::path::Path;

use gptq_format::{Checkpoint, DType, GptqLinear, OutputDir, ShardPlan, ShardWriter, TensorSpec};
use gptq_model::{LinearSpec, Spec, is_buffer};
use serde_json::{Value, json};

use super::{ConvertOptions, Converted, ConvertedModule, Progress, copy, write_side_files};
use crate::error::Result;
use crate::modules;

pub(super) fn convert(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &ConvertOptions,
    progress: Progress<'_>,
) -> Result<Converted> {
    let store = &checkpoint.tensors;
    let mut notes = Vec::new();
    let linears: HashMap<String, LinearSpec> = match Spec::for_checkpoint(checkpoint) {
        Ok(spec) => modules::linears(&spec).into_iter().map(|l| (l.module.clone(), l)).collect(),
        Err(error) => {
            notes.push(format!(
                "{error}; weights are written [out, in], as most families have them"
            ));
            HashMap::new()
        }
    };
    let mut specs = Vec::new();
    let mut rounded = 0;
    for name in store.names().filter(|name| !is_buffer(name)) {
        let info = store.info(name)?;
        let (dtype, shape) = match modules::quantized_part(store, name) {
            Some((module, "bias")) if is_idle_bias(checkpoint, &linears, module)? => continue,
            Some((_, "bias")) | None => (float_type(info.dtype, &info.shape), info.shape.clone()),
            Some(_) => continue,
        };
        rounded +=
            usize::from(matches!(info.dtype, DType::F32 | DType::F64) && dtype == DType::F16);
        specs.push(TensorSpec { name: name.to_owned(), dtype, shape });
    }
    if rounded > 0 {
        notes.push(format!("{rounded} tensors of 32-bit floats are rounded to f16"));
    }
    let copied: Vec<(String, DType)> = specs.iter().map(|s| (s.name.clone(), s.dtype)).collect();
    let packed = modules::quantized(checkpoint, &[]);
    for module in &packed {
        let [rows, columns] = shape(checkpoint, &linears, module)?;
        let name = format!("{module}.weight");
        specs.push(TensorSpec { name, dtype: DType::F16, shape: vec![rows, columns] });
    }
    specs.sort_by(|a, b| modules::natural(&a.name).cmp(&modules::natural(&b.name)));
    let plan = ShardPlan::new(specs, options.max_shard_bytes)?;
    let output_bytes = plan.total_bytes();

    let directory = OutputDir::create(output, options.overwrite)?;
    let config = config(checkpoint, &copied);
    write_side_files(checkpoint, &config, directory.path())?;
    let mut writer = ShardWriter::create(directory.path(), plan)?;
    let total = packed.len() + copied.len();
    for (done, module) in packed.iter().enumerate() {
        progress(done, total);
        let weights = dequantize(checkpoint, &linears, module)?;
        let name = format!("{module}.weight");
        writer.write(&name, &copy::encode(&name, DType::F16, 0, &weights)?)?;
    }
    for (done, (name, dtype)) in copied.iter().enumerate() {
        progress(packed.len() + done, total);
        if store.info(name)?.elements() == 0 {
            writer.write(name, &[])?;
            continue;
        }
        let mut at = 0u64;
        copy::stream(store, name, *dtype, None, &mut |bytes| {
            writer.write_part(name, at, bytes)?;
            at += bytes.len() as u64;
            Ok(())
        })?;
    }
    writer.finish()?;
    let output = directory.commit()?;
    let modules =
        packed.into_iter().map(|module| ConvertedModule { module, to: "F16", exact: false });
    Ok(Converted { output, output_bytes, modules: modules.collect(), notes })
}

/// The type of a tensor in the output: 16 bits, but norms and biases of 32 bits, which are small, keep them.
fn float_type(dtype: DType, shape: &[usize]) -> DType {
    match dtype {
        DType::F32 if shape.len() < 2 => DType::F32,
        DType::F32 | DType::F64 | DType::Ggml(_) => DType::F16,
        other => other,
    }
}

fn load(
    checkpoint: &Checkpoint,
    linears: &HashMap<String, LinearSpec>,
    module: &str,
) -> Result<GptqLinear> {
    let Some(config) = &checkpoint.quantize_config else {
        let file = checkpoint.path.clone();
        let module = module.to_owned();
        return Err(gptq_model::ModelError::NoQuantizeConfig { file, module }.into());
    };
    let expected = linears.get(module).map(|l| [l.out_features, l.in_features]);
    Ok(GptqLinear::load(&checkpoint.tensors, module, config, expected)?)
}

/// Shape of the float weight of a quantized module.
fn shape(
    checkpoint: &Checkpoint,
    linears: &HashMap<String, LinearSpec>,
    module: &str,
) -> Result<[usize; 2]> {
    let (inputs, outputs) = if let Some(linear) = linears.get(module) {
        (linear.in_features, linear.out_features)
    } else {
        let linear = load(checkpoint, linears, module)?;
        (linear.in_features, linear.out_features)
    };
    Ok(if transposed(linears, module) { [inputs, outputs] } else { [outputs, inputs] })
}

fn transposed(linears: &HashMap<String, LinearSpec>, module: &str) -> bool {
    linears.get(module).is_some_and(|linear| linear.transposed)
}

/// The weights of a module in the order in which the family stores them.
fn dequantize(
    checkpoint: &Checkpoint,
    linears: &HashMap<String, LinearSpec>,
    module: &str,
) -> Result<Vec<f32>> {
    let linear = load(checkpoint, linears, module)?;
    let weights = linear.dequantize();
    if !transposed(linears, module) {
        return Ok(weights);
    }
    let (inputs, outputs) = (linear.in_features, linear.out_features);
    let mut turned = vec![0.0; weights.len()];
    for (n, row) in weights.chunks_exact(inputs).enumerate() {
        for (k, &weight) in row.iter().enumerate() {
            turned[k * outputs + n] = weight;
        }
    }
    Ok(turned)
}

/// Whether a module's bias is one of those zeros that old quantizers wrote for linears without.
fn is_idle_bias(
    checkpoint: &Checkpoint,
    linears: &HashMap<String, LinearSpec>,
    module: &str,
) -> Result<bool> {
    if linears.get(module).is_none_or(|linear| linear.bias) {
        return Ok(false);
    }
    let name = format!("{module}.bias");
    let shape = checkpoint.tensors.info(&name)?.shape.clone();
    Ok(checkpoint.tensors.read_f32(&name, &shape)?.iter().all(|&b| b == 0.0))
}

/// config.json without the settings of the quantization, and with the type of the floats.
fn config(checkpoint: &Checkpoint, copied: &[(String, DType)]) -> Value {
    let mut config = checkpoint.config.map().clone();
    config.shift_remove("quantization_config");
    let bf16 = copied.iter().any(|(_, dtype)| *dtype == DType::BF16);
    let dtype = if bf16 { "bfloat16" } else { "float16" };
    // Newer files spell it `dtype`.
    if config.contains_key("dtype") {
        config.insert("dtype".into(), json!(dtype));
    }
    config.insert("torch_dtype".into(), json!(dtype));
    Value::Object(config)
}
