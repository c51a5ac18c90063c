//! Random GPTQ checkpoints in the shapes of known models. Speed does not depend on the values, so that
//! all blocks have the same.

use std::path::Path;

use anyhow::Context;
use gptq_format::gptq_linear::LinearShape;
use gptq_format::quantize_config::group_len;
use gptq_format::{
    Bits, CheckpointFormat, DType, GptqLinear, QuantizeConfig, ShardPlan, ShardWriter, TensorSpec,
};
use gptq_quantize::Progress;
use half::f16;
use serde_json::json;

/// The shape of a Llama.
#[derive(Debug)]
pub(super) struct Shape {
    name: &'static str,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    tied: bool,
}

const fn shape(
    name: &'static str,
    [hidden, intermediate, layers]: [usize; 3],
    [heads, kv_heads]: [usize; 2],
    vocab: usize,
    tied: bool,
) -> Shape {
    Shape { name, hidden, intermediate, layers, heads, kv_heads, vocab, tied }
}

/// SmolLM2 (135m, 360m), TinyLlama (1.1b), Llama 3.2 (3b), Llama 3.1 (8b).
const SHAPES: [Shape; 5] = [
    shape("135m", [576, 1536, 30], [9, 3], 49152, true),
    shape("360m", [960, 2560, 32], [15, 5], 49152, true),
    shape("1.1b", [2048, 5632, 22], [32, 4], 32000, false),
    shape("3b", [3072, 8192, 28], [24, 8], 128_256, true),
    shape("8b", [4096, 14336, 32], [32, 8], 128_256, false),
];

pub(super) const NAMES: [&str; 5] = ["135m", "360m", "1.1b", "3b", "8b"];

/// Bytes of floats that are made at a time.
const PIECE: usize = 4 << 20;

/// The shape called `name`.
pub(super) fn named(name: &str) -> Option<&'static Shape> {
    SHAPES.iter().find(|shape| shape.name == name)
}

/// Writes a symmetric checkpoint without tokenizer into the directory `out`, with one linear in memory
/// at a time.
pub(super) fn write(
    shape: &Shape,
    bits: Bits,
    group_size: i64,
    out: &Path,
    progress: &dyn Progress,
) -> anyhow::Result<()> {
    let &Shape { hidden, intermediate, layers, heads, kv_heads, vocab, tied, .. } = shape;
    let format = CheckpointFormat::Gptq;
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden / heads,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
    });
    config["quantization_config"] =
        QuantizeConfig::new(bits, group_size, true, false, format).to_json();
    let path = out.join("config.json");
    std::fs::write(&path, config.to_string())
        .with_context(|| format!("cannot write {}", path.display()))?;

    let kv = hidden / heads * kv_heads;
    let linears = [
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", kv, hidden),
        ("self_attn.v_proj", kv, hidden),
        ("self_attn.o_proj", hidden, hidden),
        ("mlp.gate_proj", intermediate, hidden),
        ("mlp.up_proj", intermediate, hidden),
        ("mlp.down_proj", hidden, intermediate),
    ];
    let float = |name: String, shape: &[usize]| TensorSpec {
        name,
        dtype: DType::F16,
        shape: shape.to_vec(),
    };
    let mut specs = vec![float("model.embed_tokens.weight".into(), &[vocab, hidden])];
    let mut norms = vec!["model.norm.weight".to_owned()];
    for layer in 0..layers {
        let block = format!("model.layers.{layer}");
        for name in ["input_layernorm", "post_attention_layernorm"] {
            norms.push(format!("{block}.{name}.weight"));
        }
        for (name, out_features, in_features) in linears {
            let linear = LinearShape { bits, in_features, out_features, group_size, bias: false };
            specs.extend(linear.tensor_specs(&format!("{block}.{name}"))?);
        }
    }
    specs.extend(norms.iter().map(|name| float(name.clone(), &[hidden])));
    if !tied {
        specs.push(float("lm_head.weight".into(), &[vocab, hidden]));
    }
    let mut writer = ShardWriter::create(out, ShardPlan::new(specs, 4 << 30)?)?;
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    progress.phase("write random weights");
    let deviation = 1.0 / (hidden as f32).sqrt();
    random.floats(&mut writer, "model.embed_tokens.weight", vocab * hidden, deviation)?;
    if !tied {
        random.floats(&mut writer, "lm_head.weight", vocab * hidden, deviation)?;
    }
    let ones: Vec<u8> = (0..hidden).flat_map(|_| f16::ONE.to_le_bytes()).collect();
    for name in &norms {
        writer.write(name, &ones)?;
    }
    for (index, (name, out_features, in_features)) in linears.into_iter().enumerate() {
        let linear = LinearShape { bits, in_features, out_features, group_size, bias: false };
        let parts = random.linear(linear)?.encode("", format)?;
        for layer in 0..layers {
            for (spec, bytes) in &parts {
                // The name of a tensor of the module "" is ".qweight".
                writer.write(&format!("model.layers.{layer}.{name}{}", spec.name), bytes)?;
            }
        }
        progress.phase_progress(index + 1, linears.len());
    }
    writer.finish()?;
    Ok(())
}

/// Xorshift (Marsaglia 2003) with a multiplication, 64 bits.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Codes of equal probability, and a scale that gives the outputs about the size of the inputs.
    fn linear(&mut self, shape: LinearShape) -> gptq_format::Result<GptqLinear> {
        let LinearShape { bits, in_features, out_features, group_size, .. } = shape;
        let (width, groups) = (bits.as_u32(), shape.groups());
        let codes: Vec<u8> =
            (0..in_features * out_features).map(|_| (self.next() >> (64 - width)) as u8).collect();
        // Codes are uniform over 2^bits values.
        let deviation = f64::from(1u32 << width) / 12f64.sqrt();
        let scale = f16::from_f64(0.8 / (deviation * (in_features as f64).sqrt()));
        let group_len = group_len(group_size, in_features);
        GptqLinear::from_codes(
            bits,
            [in_features, out_features],
            &codes,
            vec![scale; groups * out_features],
            vec![1 << (width - 1); groups * out_features],
            (0..in_features).map(|k| (k / group_len) as u32).collect(),
            None,
        )
    }

    /// Writes `count` f16 values, uniform with this standard deviation.
    fn floats(
        &mut self,
        writer: &mut ShardWriter,
        name: &str,
        count: usize,
        deviation: f32,
    ) -> anyhow::Result<()> {
        let mut bytes = Vec::with_capacity(PIECE);
        let mut offset = 0;
        for index in 0..count {
            let unit = (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0;
            let value = f16::from_f32(unit * deviation * 3f32.sqrt());
            bytes.extend_from_slice(&value.to_le_bytes());
            if bytes.len() == PIECE || index + 1 == count {
                writer.write_part(name, offset, &bytes)?;
                offset += bytes.len() as u64;
                bytes.clear();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::progress::ProgressView;

    #[test]
    fn every_name_is_a_shape() {
        assert!(NAMES.iter().all(|name| named(name).is_some()));
        assert!(named("7b").is_none());
    }

    #[test]
    fn a_checkpoint_opens_and_its_outputs_have_the_size_of_its_inputs() {
        let tiny = shape("tiny", [64, 128, 2], [4, 2], 96, false);
        for bits in [2u8, 3, 4, 8].map(|bits| Bits::try_from(bits).unwrap()) {
            let dir = tempfile::tempdir().unwrap();
            write(&tiny, bits, 32, dir.path(), &ProgressView::new(true, false)).unwrap();
            let checkpoint = gptq_format::Checkpoint::open(dir.path()).unwrap();
            let model = gptq_model::Model::load(&checkpoint).unwrap();
            let mut session =
                gptq_model::Session::new(std::sync::Arc::new(gptq_compute::Pool::new(1)));
            let mut batch = [gptq_model::Sequence::new(model.spec())];
            model.forward(&mut session, &mut batch, &[&[1, 2, 3]]).unwrap();
            let logits = model.logits(&mut session, gptq_model::Rows::Last).row(0);
            let square: f32 = logits.iter().map(|x| x * x).sum::<f32>() / logits.len() as f32;
            assert!((0.05..20.0).contains(&square), "{bits} bits: {square}");
        }
    }
}
