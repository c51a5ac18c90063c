//! One quantized linear layer in the published GPTQ layout.

use crate::dtype::DType;
use crate::error::{FormatError, Result};
use crate::pack::{Bits, decode_zeros, encode_zeros, pack_rows, unpack_rows};
use crate::quantize_config::{CheckpointFormat, QuantizeConfig, group_len};
use crate::shards::TensorSpec;
use crate::tensors::TensorStore;
use half::f16;
use std::path::Path;

/// The tensors of a quantized linear, consistent with each other: `y = W x + bias` with
/// `W[n, k] = scales[g, n] * (code[k, n] - zeros[g, n])` and `g = g_idx[k]`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GptqLinear {
    /// Bits of a code.
    pub bits: Bits,
    /// Number of inputs, `in`.
    pub in_features: usize,
    /// Number of outputs, `out`.
    pub out_features: usize,
    /// Number of groups; every entry of `g_idx` is below it.
    pub groups: usize,
    /// Packed codes, `[in * bits / 32, out]`, row-major; inputs in their original order.
    pub qweight: Vec<u32>,
    /// Scales, `[groups, out]`, row-major, finite.
    pub scales: Vec<f16>,
    /// True zero points (not minus 1), `[groups, out]`, row-major.
    pub zeros: Vec<u8>,
    /// Group of each input, `[in]`.
    pub g_idx: Vec<u32>,
    /// Bias, `[out]`.
    pub bias: Option<Vec<f32>>,
}

/// Sizes of a quantized linear, known before it is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Bits of a code.
    pub bits: Bits,
    /// Number of inputs.
    pub in_features: usize,
    /// Number of outputs.
    pub out_features: usize,
    /// Inputs per group, or -1 for all in one.
    pub group_size: i64,
    /// Whether there is a bias.
    pub bias: bool,
}

impl LinearShape {
    /// Number of groups; the last may be shorter.
    pub fn groups(&self) -> usize {
        self.in_features.div_ceil(group_len(self.group_size, self.in_features))
    }

    /// The tensors of module `prefix` in a checkpoint, in the order of [`GptqLinear::encode`].
    ///
    /// # Errors
    /// If the inputs or outputs do not fill whole words.
    pub fn tensor_specs(&self, prefix: &str) -> Result<Vec<TensorSpec>> {
        tensor_specs(
            prefix,
            self.bits,
            [self.in_features, self.out_features, self.groups()],
            self.bias,
        )
    }
}

impl GptqLinear {
    /// Packs what a solver returns: `codes: [in, out]`, `scales` and true `zeros: [groups, out]`, `g_idx: [in]`, `bias:
    /// [out]`, all row-major.
    ///
    /// # Errors
    /// If the sizes contradict each other, a code or zero point exceeds the bits, an entry of `g_idx` is not below the
    /// number of groups, or a scale is not finite.
    pub fn from_codes(
        bits: Bits,
        [in_features, out_features]: [usize; 2],
        codes: &[u8],
        scales: Vec<f16>,
        zeros: Vec<u8>,
        g_idx: Vec<u32>,
        bias: Option<Vec<f32>>,
    ) -> Result<Self> {
        let qweight = pack_rows(bits, codes, in_features, out_features)?;
        let linear = Self {
            bits,
            in_features,
            out_features,
            groups: scales.len().checked_div(out_features).unwrap_or(0),
            qweight,
            scales,
            zeros,
            g_idx,
            bias,
        };
        linear.check().map_err(FormatError::Pack)?;
        Ok(linear)
    }

    /// Reads module `prefix` (`model.layers.0.mlp.down_proj`). `expected` is `[out, in]` where the model's config tells it.
    ///
    /// Modules in AutoAWQ's layout come out as GPTQ's: the same codes, scales and zero points. Otherwise a
    /// missing `g_idx`, and one of zeros only where there are several groups (early writers meant "no activation order"
    /// by it), is taken as `k / group_size`.
    ///
    /// # Errors
    /// If a tensor is missing or has a wrong dtype, the shapes contradict each other, the config or `expected`, an entry
    /// of `g_idx` is out of range, a scale or bias is not finite, or the config leaves the module unquantized.
    pub fn load(
        store: &TensorStore,
        prefix: &str,
        config: &QuantizeConfig,
        expected: Option<[usize; 2]>,
    ) -> Result<Self> {
        let wrong = |reason: String| linear_error(store.path(), prefix, reason);
        let name = |part: &str| format!("{prefix}.{part}");
        let settings = config.settings_for(prefix).ok_or_else(|| {
            wrong("the config leaves it unquantized, but it has a `qweight`".to_owned())
        })?;
        if config.format == CheckpointFormat::AwqGemm {
            return crate::awq::load(store, prefix, &settings, expected);
        }
        let bits = settings.bits;

        let info = store.info(&name("qweight"))?;
        let [rows, out] = *info.shape.as_slice() else {
            return Err(wrong(format!(
                "`qweight` has shape {:?}, expected [in * {bits} / 32, out]",
                info.shape
            )));
        };
        let inputs = bits.codes(rows).filter(|&i| i > 0 && out > 0).ok_or_else(|| {
            wrong(format!("`qweight` of shape [{rows}, {out}] cannot hold {bits}-bit codes"))
        })?;
        if let Some(expected) = expected
            && expected != [out, inputs]
        {
            return Err(wrong(format!(
                "`qweight` holds [{out}, {inputs}] (out, in) at {bits} bits, but the model needs {expected:?}"
            )));
        }
        let zero_words = bits.words(out).ok_or_else(|| {
            wrong(format!("{out} outputs do not fill whole words at {bits} bits"))
        })?;
        let per_group = settings.group_len(inputs);
        let groups = inputs.div_ceil(per_group);

        let qweight = words(store.read_i32(&name("qweight"), &[rows, out])?);
        let scales = store.read_f16(&name("scales"), &[groups, out])?;
        let qzeros = words(store.read_i32(&name("qzeros"), &[groups, zero_words])?);
        let zeros = decode_zeros(bits, config.format, &qzeros, groups, out)?;
        let stored_g_idx = match store.contains(&name("g_idx")) {
            true => Some(words(store.read_i32(&name("g_idx"), &[inputs])?)),
            false if settings.desc_act && groups > 1 && settings.static_groups != Some(true) => {
                return Err(wrong("it has no `g_idx`, which `desc_act` needs".to_owned()));
            }
            false => None,
        };
        let g_idx = stored_g_idx
            .filter(|g| groups == 1 || g.iter().any(|&i| i != 0))
            .unwrap_or_else(|| (0..inputs).map(|k| (k / per_group) as u32).collect());
        let bias = if store.contains(&name("bias")) {
            Some(store.read_f32(&name("bias"), &[out])?)
        } else {
            None
        };
        let linear = Self {
            bits,
            in_features: inputs,
            out_features: out,
            groups,
            qweight,
            scales,
            zeros,
            g_idx,
            bias,
        };
        linear.check().map_err(wrong)?;
        Ok(linear)
    }

    /// The codes `[in, out]`, row-major.
    ///
    /// # Errors
    /// If `qweight` does not have the size that the other parts tell.
    pub fn codes(&self) -> Result<Vec<u8>> {
        unpack_rows(self.bits, &self.qweight, self.in_features, self.out_features)
    }

    /// The weights as f32, `[out, in]`, row-major; the product is the only rounding.
    pub fn dequantize(&self) -> Vec<f32> {
        let (inputs, outputs) = (self.in_features, self.out_features);
        let mut weights = vec![0.0; inputs * outputs];
        // The sizes were checked when this was made.
        let Ok(codes) = self.codes() else { unreachable!("a GptqLinear has consistent sizes") };
        // Codes run along the outputs, weights along the inputs: a few inputs at a time fill whole cache lines of both.
        const BLOCK: usize = 16;
        for first in (0..inputs).step_by(BLOCK) {
            for n in 0..outputs {
                for k in first..inputs.min(first + BLOCK) {
                    let at = self.g_idx[k] as usize * outputs + n;
                    let steps = f32::from(codes[k * outputs + n]) - f32::from(self.zeros[at]);
                    weights[n * inputs + k] = self.scales[at].to_f32() * steps;
                }
            }
        }
        weights
    }

    /// The tensors of module `prefix` as they are stored: qweight, qzeros, scales, g_idx and, where there is one, bias.
    ///
    /// # Errors
    /// If a zero point is 0 in v1, or a bias is too large for f16.
    pub fn encode(
        &self,
        prefix: &str,
        format: CheckpointFormat,
    ) -> Result<Vec<(TensorSpec, Vec<u8>)>> {
        let sizes = [self.in_features, self.out_features, self.groups];
        let specs = tensor_specs(prefix, self.bits, sizes, self.bias.is_some())?;
        let qzeros = encode_zeros(self.bits, format, &self.zeros, self.groups, self.out_features)?;
        let mut data = vec![
            little_endian(&self.qweight, u32::to_le_bytes),
            little_endian(&qzeros, u32::to_le_bytes),
            little_endian(&self.scales, f16::to_le_bytes),
            little_endian(&self.g_idx, u32::to_le_bytes),
        ];
        if let Some(bias) = &self.bias {
            let halves: Vec<f16> = bias.iter().map(|&b| f16::from_f32(b)).collect();
            if let Some(n) = halves.iter().position(|h| !h.is_finite()) {
                return Err(FormatError::Pack(format!(
                    "bias {} of `{prefix}` at output {n} does not fit f16",
                    bias[n]
                )));
            }
            data.push(little_endian(&halves, f16::to_le_bytes));
        }
        Ok(specs.into_iter().zip(data).collect())
    }

    /// What is wrong with the parts, if anything.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let (inputs, out, groups) = (self.in_features, self.out_features, self.groups);
        let words = self.bits.words(inputs).and_then(|w| w.checked_mul(out));
        let sizes = [
            ("qweight", self.qweight.len(), words),
            ("scales", self.scales.len(), groups.checked_mul(out)),
            ("zeros", self.zeros.len(), groups.checked_mul(out)),
            ("g_idx", self.g_idx.len(), Some(inputs)),
        ];
        for (name, got, expected) in sizes {
            if Some(got) != expected {
                return Err(format!(
                    "{got} values of `{name}` do not fit {inputs} inputs, {out} outputs and {groups} groups"
                ));
            }
        }
        if groups == 0 || out == 0 {
            return Err(format!("it has {out} outputs and {groups} groups"));
        }
        if self.bits.words(out).is_none() {
            return Err(format!("{out} outputs do not fill whole words at {} bits", self.bits));
        }
        if self.bias.as_ref().is_some_and(|b| b.len() != out) {
            return Err(format!("its bias has not {out} values"));
        }
        if let Some(k) = self.g_idx.iter().position(|&g| g as usize >= groups) {
            return Err(format!(
                "`g_idx` places input {k} in group {}, but there are {groups} groups",
                self.g_idx[k] as i32
            ));
        }
        if let Some(i) = self.scales.iter().position(|s| !s.is_finite()) {
            return Err(format!(
                "the scale of group {}, output {} is {}",
                i / out,
                i % out,
                self.scales[i]
            ));
        }
        if let Some(i) = self.zeros.iter().position(|&z| z > self.bits.max_code()) {
            return Err(format!("zero point {} does not fit {} bits", self.zeros[i], self.bits));
        }
        Ok(())
    }
}

fn linear_error(path: &Path, module: &str, reason: String) -> FormatError {
    FormatError::Linear { path: path.to_owned(), module: module.to_owned(), reason }
}

fn tensor_specs(
    prefix: &str,
    bits: Bits,
    [inputs, outputs, groups]: [usize; 3],
    bias: bool,
) -> Result<Vec<TensorSpec>> {
    let words = |count: usize, axis: &str| {
        bits.words(count).ok_or_else(|| {
            FormatError::Pack(format!(
                "`{prefix}` has {count} {axis}, which must be a multiple of {} at {bits} bits; leave it unquantized",
                bits.codes_per_unit()
            ))
        })
    };
    let mut parts = vec![
        ("qweight", DType::I32, vec![words(inputs, "inputs")?, outputs]),
        ("qzeros", DType::I32, vec![groups, words(outputs, "outputs")?]),
        ("scales", DType::F16, vec![groups, outputs]),
        ("g_idx", DType::I32, vec![inputs]),
    ];
    if bias {
        parts.push(("bias", DType::F16, vec![outputs]));
    }
    Ok(parts
        .into_iter()
        .map(|(part, dtype, shape)| TensorSpec { name: format!("{prefix}.{part}"), dtype, shape })
        .collect())
}

/// The same bits without a sign, in place.
fn words(values: Vec<i32>) -> Vec<u32> {
    values.into_iter().map(i32::cast_unsigned).collect()
}

fn little_endian<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    let mut out = vec![0; values.len() * N];
    for (o, &v) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *o = bytes(v);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(groups: usize) -> Result<GptqLinear> {
        let (inputs, out) = (32, 8);
        GptqLinear::from_codes(
            Bits::B4,
            [inputs, out],
            &vec![9; inputs * out],
            vec![f16::from_f32(0.5); groups * out],
            vec![8; groups * out],
            (0..inputs).map(|k| (k * groups / inputs) as u32).collect(),
            Some(vec![1.5; out]),
        )
    }

    #[test]
    fn codes_become_weights() {
        let linear = linear(4).unwrap();
        assert_eq!(linear.groups, 4);
        assert_eq!(linear.dequantize(), vec![0.5; 32 * 8]);
    }

    #[test]
    fn planned_and_encoded_tensors_agree() {
        let shape = LinearShape {
            bits: Bits::B4,
            in_features: 32,
            out_features: 8,
            group_size: 8,
            bias: true,
        };
        let encoded = linear(4).unwrap().encode("m", CheckpointFormat::Gptq).unwrap();
        let specs: Vec<_> = encoded.iter().map(|(spec, _)| spec.clone()).collect();
        assert_eq!(shape.tensor_specs("m").unwrap(), specs);
        for (spec, bytes) in &encoded {
            assert_eq!(spec.dtype.byte_len(&spec.shape), Some(bytes.len()), "{}", spec.name);
        }
        let ragged = LinearShape { in_features: 96, group_size: 64, ..shape };
        assert_eq!(ragged.groups(), 2);
        let odd = LinearShape { out_features: 12, ..shape };
        let message = odd.tensor_specs("m").unwrap_err().to_string();
        assert!(message.contains("12 outputs"), "{message}");
    }

    #[test]
    fn parts_that_contradict_each_other_are_refused() {
        let good = linear(4).unwrap();
        let refused = |change: fn(&mut GptqLinear), part: &str| {
            let mut bad = good.clone();
            change(&mut bad);
            let reason = bad.check().unwrap_err();
            assert!(reason.contains(part), "{reason}");
        };
        refused(|l| l.g_idx[5] = 4, "input 5 in group 4");
        refused(|l| l.g_idx[0] = u32::MAX, "group -1");
        refused(|l| l.scales[9] = f16::NAN, "group 1, output 1");
        refused(|l| l.zeros[0] = 16, "zero point 16");
        refused(|l| l.zeros.truncate(8), "`zeros`");
        refused(|l| l.bias = Some(Vec::new()), "bias");
        refused(|l| l.groups = 0, "groups");
        assert!(linear(0).is_err());
    }

    #[test]
    fn a_bias_too_large_for_f16_is_refused() {
        let mut l = linear(1).unwrap();
        l.bias = Some(vec![1e5; 8]);
        let message = l.encode("m", CheckpointFormat::Gptq).unwrap_err().to_string();
        assert!(message.contains("100000") && message.contains("output 0"), "{message}");
    }
}
