//! Statistics of one tensor, or of the weights of one quantized module.

use gptq_format::gguf::dequantize_rows;
use gptq_format::{Checkpoint, DType, GptqLinear, TensorStore};
use half::{bf16, f16};
use serde::Serialize;

use crate::error::{CheckpointError, Result};

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Statistics of a tensor. Values that are not finite are counted and otherwise left out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorStats {
    /// Name as asked for.
    pub tensor: String,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Stored type; `GPTQ` for the dequantized weights of a module.
    pub dtype: String,
    /// Least value; `None` if there is none.
    pub min: Option<f64>,
    /// Largest value.
    pub max: Option<f64>,
    /// Mean.
    pub mean: Option<f64>,
    /// Standard deviation, of the whole population.
    pub std: Option<f64>,
    /// Values that are NaN.
    pub nan: u64,
    /// Values that are infinite.
    pub infinite: u64,
    /// Values that are zero.
    pub zero: u64,
}

/// Reads a tensor, or dequantizes the quantized module of that name, and describes its values.
///
/// # Errors
/// If there is neither, its type holds no numbers that are known, or it cannot be read.
pub fn tensor_stats(checkpoint: &Checkpoint, name: &str) -> Result<TensorStats> {
    let store = &checkpoint.tensors;
    let mut sums = Sums::default();
    if let Some(config) = &checkpoint.quantize_config
        && !store.contains(name)
        && store.contains(&format!("{name}.qweight"))
    {
        let linear = GptqLinear::load(store, name, config, None)?;
        linear.dequantize().iter().for_each(|&x| sums.add(f64::from(x)));
        return Ok(sums.finish(name, &[linear.out_features, linear.in_features], "GPTQ"));
    }
    let info = store.info(name)?;
    each_chunk(store, name, |values| values.iter().for_each(|&x| sums.add(x)))?;
    Ok(sums.finish(name, &info.shape, &info.dtype.to_string()))
}

/// Calls `visit` with the values of a tensor, chunk by chunk, whatever they are. Rows that are stored permuted stay so.
pub(crate) fn each_chunk(
    store: &TensorStore,
    name: &str,
    mut visit: impl FnMut(&[f64]),
) -> Result<()> {
    let info = store.info(name)?;
    let (per_unit, unit_bytes) = info.dtype.unit();
    let decode = decoder(info.dtype).ok_or_else(|| CheckpointError::Unsupported {
        path: info.file.clone(),
        target: "numbers",
        reason: format!("tensor `{name}` has dtype {}", info.dtype),
    })?;
    let units = (CHUNK_BYTES / unit_bytes.max(1)).max(1);
    let mut bytes = vec![0; info.bytes.min(units * unit_bytes)];
    let mut values = Vec::new();
    let mut at = 0;
    while at < info.bytes {
        let len = bytes.len().min(info.bytes - at);
        store.copy_stored(name, at, &mut bytes[..len])?;
        values.clear();
        decode(&bytes[..len], len / unit_bytes * per_unit, &mut values);
        visit(&values);
        at += len;
    }
    Ok(())
}

type Decoder = Box<dyn Fn(&[u8], usize, &mut Vec<f64>)>;

/// Decodes bytes into so many values.
fn decoder(dtype: DType) -> Option<Decoder> {
    fn plain<const N: usize>(read: impl Fn([u8; N]) -> f64 + 'static) -> Decoder {
        Box::new(move |bytes, _, out| {
            out.extend(bytes.as_chunks::<N>().0.iter().map(|b| read(*b)));
        })
    }
    Some(match dtype {
        DType::F64 => plain(f64::from_le_bytes),
        DType::F32 => plain(|b| f64::from(f32::from_le_bytes(b))),
        DType::F16 => plain(|b| f16::from_le_bytes(b).to_f64()),
        DType::BF16 => plain(|b| bf16::from_le_bytes(b).to_f64()),
        DType::I64 => plain(|b| i64::from_le_bytes(b) as f64),
        DType::I32 => plain(|b| f64::from(i32::from_le_bytes(b))),
        DType::I16 => plain(|b| f64::from(i16::from_le_bytes(b))),
        DType::I8 => plain(|b| f64::from(i8::from_le_bytes(b))),
        DType::U64 => plain(|b| u64::from_le_bytes(b) as f64),
        DType::U32 => plain(|b| f64::from(u32::from_le_bytes(b))),
        DType::U16 => plain(|b| f64::from(u16::from_le_bytes(b))),
        DType::U8 | DType::Bool => plain(|b: [u8; 1]| f64::from(b[0])),
        DType::Ggml(ggml) => {
            ggml.block()?;
            Box::new(move |bytes, count, out| {
                let mut values = vec![0.0f32; count];
                // The chunks are whole blocks.
                if dequantize_rows(ggml, bytes, &mut values).is_ok() {
                    out.extend(values.into_iter().map(f64::from));
                }
            })
        }
        DType::F8E4M3 | DType::F8E5M2 => return None,
    })
}

/// Running sums; mean and variance by Welford's update, which does not cancel.
#[derive(Default)]
struct Sums {
    count: u64,
    mean: f64,
    squares: f64,
    min: Option<f64>,
    max: Option<f64>,
    nan: u64,
    infinite: u64,
    zero: u64,
}

impl Sums {
    fn add(&mut self, x: f64) {
        if x.is_nan() {
            self.nan += 1;
            return;
        }
        if x.is_infinite() {
            self.infinite += 1;
            return;
        }
        self.zero += u64::from(x == 0.0);
        self.count += 1;
        let delta = x - self.mean;
        self.mean += delta / self.count as f64;
        self.squares += delta * (x - self.mean);
        self.min = Some(self.min.map_or(x, |m| m.min(x)));
        self.max = Some(self.max.map_or(x, |m| m.max(x)));
    }

    fn finish(self, name: &str, shape: &[usize], dtype: &str) -> TensorStats {
        let some = |value: f64| (self.count > 0).then_some(value);
        TensorStats {
            tensor: name.to_owned(),
            shape: shape.to_vec(),
            dtype: dtype.to_owned(),
            min: self.min,
            max: self.max,
            mean: some(self.mean),
            std: some((self.squares / self.count.max(1) as f64).sqrt()),
            nan: self.nan,
            infinite: self.infinite,
            zero: self.zero,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gptq_format::{ShardPlan, ShardWriter, TensorSpec};
    use std::path::Path;

    fn checkpoint(dir: &Path, dtype: DType, shape: &[usize], bytes: &[u8]) -> Checkpoint {
        let spec = TensorSpec { name: "t".into(), dtype, shape: shape.to_vec() };
        let plan = ShardPlan::new(vec![spec], u64::MAX).unwrap();
        let mut writer = ShardWriter::create(dir, plan).unwrap();
        writer.write("t", bytes).unwrap();
        writer.finish().unwrap();
        std::fs::write(dir.join("config.json"), r#"{"model_type": "llama"}"#).unwrap();
        Checkpoint::open(dir).unwrap()
    }

    #[test]
    fn values_that_are_not_finite_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let values = [1.0f32, -3.0, f32::NAN, f32::INFINITY, 0.0, 2.0];
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let stats =
            tensor_stats(&checkpoint(dir.path(), DType::F32, &[2, 3], &bytes), "t").unwrap();
        assert_eq!((stats.min, stats.max, stats.mean), (Some(-3.0), Some(2.0), Some(0.0)));
        assert_eq!(stats.std, Some((14.0f64 / 4.0).sqrt()));
        assert_eq!((stats.nan, stats.infinite, stats.zero), (1, 1, 1));
        assert_eq!((stats.shape, stats.dtype.as_str()), (vec![2, 3], "F32"));
    }

    #[test]
    fn tensors_larger_than_a_chunk_are_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let count = CHUNK_BYTES / 2 + 7;
        let bytes: Vec<u8> =
            (0..count).flat_map(|i| f16::from_f32((i % 2) as f32).to_le_bytes()).collect();
        let stats =
            tensor_stats(&checkpoint(dir.path(), DType::F16, &[count], &bytes), "t").unwrap();
        assert_eq!(stats.zero, count.div_ceil(2) as u64);
        assert_eq!(stats.max, Some(1.0));
    }

    #[test]
    fn an_empty_tensor_has_no_extremes() {
        let dir = tempfile::tempdir().unwrap();
        let stats = tensor_stats(&checkpoint(dir.path(), DType::F16, &[0], &[]), "t").unwrap();
        assert_eq!((stats.min, stats.mean, stats.nan), (None, None, 0));
    }

    #[test]
    fn a_quantized_module_is_dequantized() {
        let Some(dir) = gptq_testkit::fixtures::dir("quant/b4_gm1_sym.gptq") else { return };
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let stats = tensor_stats(&checkpoint, "model.layers.1.mlp.down_proj").unwrap();
        assert_eq!((stats.shape, stats.dtype.as_str()), (vec![128, 256], "GPTQ"));
        assert!(stats.std.unwrap() > 0.0);
        let codes = tensor_stats(&checkpoint, "model.layers.1.mlp.down_proj.qweight").unwrap();
        assert_eq!(codes.dtype, "I32");
        assert!(tensor_stats(&checkpoint, "no.such.tensor").is_err());
    }
}
