//! Quantized linears whose tensors contradict each other.

use gptq_format::{
    Bits, CheckpointFormat, DType, GptqLinear, QuantizeConfig, ShardPlan, ShardWriter, TensorSpec,
    TensorStore,
};
use half::f16;
use tempfile::TempDir;

const MODULE: &str = "model.layers.0.mlp.up_proj";
const IN: usize = 64;
const OUT: usize = 32;
const GROUPS: usize = 2;

type Tensors = Vec<(TensorSpec, Vec<u8>)>;

fn linear() -> GptqLinear {
    let codes: Vec<u8> = (0..IN * OUT).map(|i| (i * 7 % 16) as u8).collect();
    let scales = (0..GROUPS * OUT).map(|i| f16::from_f32(0.01 * (i + 1) as f32)).collect();
    let zeros = (0..GROUPS * OUT).map(|i| (i % 15 + 1) as u8).collect();
    let g_idx = (0..IN).map(|k| (k / 32) as u32).collect();
    let bias = (0..OUT).map(|n| n as f32 * 0.5).collect();
    GptqLinear::from_codes(Bits::B4, [IN, OUT], &codes, scales, zeros, g_idx, Some(bias)).unwrap()
}

fn config() -> QuantizeConfig {
    QuantizeConfig::new(Bits::B4, 32, false, false, CheckpointFormat::Gptq)
}

fn load(tensors: &Tensors, config: &QuantizeConfig) -> Result<GptqLinear, String> {
    let dir: TempDir = tempfile::tempdir().unwrap();
    let specs = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let plan = ShardPlan::new(specs, u64::MAX).unwrap();
    let mut writer = ShardWriter::create(dir.path(), plan).unwrap();
    for (spec, bytes) in tensors {
        writer.write(&spec.name, bytes).unwrap();
    }
    writer.finish().unwrap();
    let store = TensorStore::open_dir(dir.path()).unwrap();
    GptqLinear::load(&store, MODULE, config, Some([OUT, IN])).map_err(|e| e.to_string())
}

/// The message of loading after `change` was applied to tensor `part`.
fn refused(part: &str, change: impl FnOnce(&mut TensorSpec, &mut Vec<u8>)) -> String {
    let mut tensors = linear().encode(MODULE, CheckpointFormat::Gptq).unwrap();
    let name = format!("{MODULE}.{part}");
    let (spec, bytes) = tensors.iter_mut().find(|(s, _)| s.name == name).unwrap();
    change(spec, bytes);
    let message = load(&tensors, &config()).unwrap_err();
    assert!(message.contains(MODULE), "{message}");
    message
}

fn encoded_without(part: &str) -> Tensors {
    let mut tensors = linear().encode(MODULE, CheckpointFormat::Gptq).unwrap();
    tensors.retain(|(spec, _)| !spec.name.ends_with(part));
    tensors
}

#[test]
fn what_was_encoded_is_loaded() {
    for format in [CheckpointFormat::Gptq, CheckpointFormat::GptqV2] {
        let mut config = config();
        config.format = format;
        let tensors = linear().encode(MODULE, format).unwrap();
        assert_eq!(load(&tensors, &config).unwrap(), linear());
    }
}

#[test]
fn missing_group_index_means_sequential_groups() {
    assert_eq!(load(&encoded_without("g_idx"), &config()).unwrap(), linear());
    let mut ordered = config();
    ordered.desc_act = true;
    let message = load(&encoded_without("g_idx"), &ordered).unwrap_err();
    assert!(message.contains("`desc_act`"), "{message}");
    ordered.static_groups = Some(true);
    assert_eq!(load(&encoded_without("g_idx"), &ordered).unwrap(), linear());
}

#[test]
fn group_index_of_zeros_means_sequential_groups() {
    let mut tensors = linear().encode(MODULE, CheckpointFormat::Gptq).unwrap();
    for (spec, bytes) in &mut tensors {
        if spec.name.ends_with("g_idx") {
            bytes.fill(0);
        }
    }
    assert_eq!(load(&tensors, &config()).unwrap(), linear());
}

#[test]
fn group_index_out_of_range() {
    let message = refused("g_idx", |_, bytes| bytes[4 * 7] = 2);
    assert!(message.contains("input 7 in group 2"), "{message}");
    let message = refused("g_idx", |_, bytes| bytes[..4].fill(0xFF));
    assert!(message.contains("input 0 in group -1"), "{message}");
}

#[test]
fn missing_tensors() {
    for part in ["qweight", "qzeros", "scales"] {
        let message = load(&encoded_without(part), &config()).unwrap_err();
        assert!(message.contains(&format!("{MODULE}.{part}")), "{message}");
    }
    assert_eq!(load(&encoded_without("bias"), &config()).unwrap().bias, None);
}

#[test]
fn wrong_shapes() {
    refused("qweight", |spec, _| spec.shape = vec![IN / 8 * OUT]);
    refused("qweight", |spec, _| spec.shape = vec![IN / 16, OUT * 2]);
    refused("qweight", |spec, bytes| {
        spec.shape = vec![0, OUT];
        bytes.clear();
    });
    refused("scales", |spec, _| spec.shape = vec![GROUPS * OUT]);
    refused("qzeros", |spec, _| spec.shape = vec![GROUPS * 2, OUT / 16]);
    refused("bias", |spec, _| spec.shape = vec![1, OUT]);
    refused("g_idx", |spec, _| spec.shape = vec![2, IN / 2]);
}

#[test]
fn wrong_dtypes() {
    refused("qweight", |spec, _| spec.dtype = DType::F32);
    refused("qzeros", |spec, _| spec.dtype = DType::U32);
    refused("scales", |spec, _| spec.dtype = DType::I16);
    refused("bias", |spec, _| spec.dtype = DType::I16);
}

#[test]
fn scales_that_are_not_finite() {
    let message = refused("scales", |_, bytes| {
        bytes[2 * 33..2 * 34].copy_from_slice(&f16::NAN.to_le_bytes());
    });
    assert!(message.contains("NaN at index 33"), "{message}");
    refused("bias", |_, bytes| {
        bytes[..2].copy_from_slice(&f16::INFINITY.to_le_bytes());
    });
}

#[test]
fn config_that_contradicts_the_tensors() {
    let tensors = || linear().encode(MODULE, CheckpointFormat::Gptq).unwrap();
    let mut bits = config();
    bits.bits = Bits::B8;
    assert!(load(&tensors(), &bits).unwrap_err().contains("[32, 32] (out, in) at 8 bits"));
    bits.bits = Bits::B3;
    assert!(load(&tensors(), &bits).unwrap_err().contains("3-bit"));
    let mut group = config();
    group.group_size = 16;
    assert!(load(&tensors(), &group).unwrap_err().contains("expected [4, 32]"));
    let rules = serde_json::json!({"-:.*up_proj": {}});
    let mut skipped = config();
    skipped.dynamic = gptq_format::Dynamic::from_map(rules.as_object().unwrap()).unwrap();
    assert!(load(&tensors(), &skipped).unwrap_err().contains("unquantized"));
}

#[test]
fn rules_for_the_module_are_applied() {
    let rules = serde_json::json!({r".*\.up_proj": {"bits": 4, "group_size": 32}});
    let mut config = QuantizeConfig::new(Bits::B8, -1, true, false, CheckpointFormat::Gptq);
    config.dynamic = gptq_format::Dynamic::from_map(rules.as_object().unwrap()).unwrap();
    let tensors = linear().encode(MODULE, CheckpointFormat::Gptq).unwrap();
    assert_eq!(load(&tensors, &config).unwrap(), linear());
}

#[test]
fn scales_in_other_float_types_are_accepted() {
    let mut tensors = linear().encode(MODULE, CheckpointFormat::Gptq).unwrap();
    for (spec, bytes) in &mut tensors {
        if spec.name.ends_with("scales") {
            spec.dtype = DType::F32;
            *bytes = bytes
                .chunks_exact(2)
                .flat_map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32().to_le_bytes())
                .collect();
        }
    }
    assert_eq!(load(&tensors, &config()).unwrap(), linear());
}
