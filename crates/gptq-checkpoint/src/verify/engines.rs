//! What each engine asks of a GPTQ checkpoint, as a table of rules.
//!
//! Read from the sources of vLLM, Text Generation Inference (TGI), optimum with GPTQModel (what transformers uses), ExLlamaV2
//! and GPTQModel 7.3 in November 2026; the comment of each rule names the place. Rules about the architecture of the model
//! are not among them.

use gptq_format::{Bits, CheckpointFormat};
use serde::Serialize;

use super::Facts;
use super::module::Module;
use super::zeros::gptqmodel_version;

/// A program that runs GPTQ checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// vLLM.
    Vllm,
    /// Hugging Face Text Generation Inference.
    Tgi,
    /// transformers, through optimum and GPTQModel.
    Transformers,
    /// ExLlamaV2.
    Exllama,
    /// GPTQModel by itself.
    Gptqmodel,
}

impl Engine {
    /// All engines.
    pub const ALL: [Self; 5] =
        [Self::Vllm, Self::Tgi, Self::Transformers, Self::Exllama, Self::Gptqmodel];

    /// Its name as its authors spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vLLM",
            Self::Tgi => "TGI",
            Self::Transformers => "transformers",
            Self::Exllama => "ExLlamaV2",
            Self::Gptqmodel => "GPTQModel",
        }
    }
}

/// Whether an engine opens a checkpoint and computes what was meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The engine.
    pub engine: Engine,
    /// Whether it does.
    pub opens: bool,
    /// Why not.
    pub reasons: Vec<String>,
    /// What has to be set for it.
    pub conditions: Vec<String>,
}

use Engine::{Exllama, Gptqmodel, Tgi, Transformers, Vllm};

/// A demand of some engines; the function says what a checkpoint does not meet.
struct Rule(&'static [Engine], Check);

enum Check {
    /// About the checkpoint as a whole.
    Whole(fn(&Facts<'_>) -> Option<String>),
    /// About each module.
    Each(fn(&Facts<'_>, &Module) -> Option<String>),
    /// What has to be set.
    Condition(fn(&Facts<'_>) -> Option<String>),
}

use Check::{Condition, Each, Whole};

const RULES: &[Rule] = &[
    // All read `quantization_config` of config.json; TGI and GPTQModel alone fall back to quantize_config.json.
    Rule(&[Vllm, Transformers, Exllama], Whole(no_config)),
    // transformers `quantizers/auto.py` and vLLM `override_quantization_method` go by `quant_method`.
    Rule(&[Vllm, Tgi, Transformers], Whole(|f| lacks(f, "quant_method"))),
    // vLLM `GPTQMarlinConfig.from_config`: get_from_keys without default.
    Rule(&[Vllm], Whole(|f| lacks(f, "desc_act"))),
    Rule(&[Vllm], Whole(|f| lacks(f, "sym"))),
    // transformers `load_state_dict` refuses safetensors without `format` in the header.
    Rule(
        &[Transformers],
        Whole(|f| (!f.headers_say_pt).then(|| "a file header does not say `format`: `pt`".into())),
    ),
    // vLLM reads 4 and 8 bits since its 2- and 3-bit kernels were dropped.
    Rule(&[Vllm], Each(|_, m| bits(m, &[Bits::B4, Bits::B8]))),
    // TGI `layers/gptq/quant_linear.py`: only 2, 4, 8 bits.
    Rule(&[Tgi], Each(|_, m| bits(m, &[Bits::B2, Bits::B4, Bits::B8]))),
    // ExLlamaV2's GPTQ kernels unpack 4 bits.
    Rule(&[Exllama], Each(|_, m| bits(m, &[Bits::B4]))),
    // vLLM's Marlin kernels bake the symmetric zero point in and ignore qzeros.
    Rule(
        &[Vllm],
        Each(|_, m| (!m.settings.sym).then(|| "asymmetric: its kernels ignore zero points".into())),
    ),
    // GPTQModel `models/loader.py`: sym=False in v1 only if meta.quantizer names gptqmodel 0.9.0 or newer.
    Rule(
        &[Gptqmodel],
        Whole(|f| {
            let asym = f.modules.iter().any(|m| !m.settings.sym);
            let trusted = gptqmodel_version(f.config).is_some_and(|version| version >= (0, 9));
            (v1(f) && asym && !trusted)
            .then(|| "asymmetric in format `gptq`, and not written by GPTQModel; convert to `gptq_v2`".into())
        }),
    ),
    // TGI looks at checkpoint_format for marlin only and adds 1 to every zero point.
    Rule(
        &[Tgi],
        Whole(|f| (!v1(f)).then(|| "it reads `gptq_v2` as `gptq`; convert to `gptq`".into())),
    ),
    // AutoGPTQ's and TGI's kernels, and ExLlamaV2's (`make_q_matrix`, which turns v2 into v1 first), add 1 to the field.
    Rule(&[Tgi], Each(|f, m| if v1(f) { true_zero(m) } else { None })),
    Rule(&[Exllama], Each(|_, m| true_zero(m))),
    // vLLM `GPTQMarlinLinearMethod.create_weights`: input_size % group_size.
    Rule(
        &[Vllm, Exllama],
        Each(|_, m| {
            m.ragged().then(|| {
                format!("{} inputs are no multiple of its group size {}", m.inputs, m.group_len())
            })
        }),
    ),
    // vLLM `marlin_utils.py`, MARLIN_SUPPORTED_GROUP_SIZES.
    Rule(
        &[Vllm],
        Each(|_, m| {
            let known = [-1, 32, 64, 128].contains(&m.settings.group_size) || m.groups == 1;
            (!known).then(|| {
                format!("group size {}; its kernels have -1, 32, 64, 128", m.settings.group_size)
            })
        }),
    ),
    // vLLM `kernels/linear/mixed_precision`: Marlin asks for inputs % 128 and (fused) outputs % 64; the next that takes
    // these types, ExLlama, for positive group sizes and float16.
    Rule(&[Vllm], Whole(no_kernel)),
    Rule(&[Vllm], Condition(needs_float16)),
    // All kernels multiply by the scale, whatever its sign: vLLM's and GPTQModel's Marlin (`scale`), ExLlama's
    // (`dequant_4bit_8_prep_zero_scale`), Triton's; AutoRound's checkpoints have negative ones, too. But Marlin with
    // int8 activations, which is off unless asked for, stores scales as int16 and reads them as uint16 (issue 48905).
    Rule(&[Vllm], Condition(needs_float_activations)),
    // GPTQModel `pack_block` works on 32 inputs at a time; outputs only have to fill their words.
    Rule(&[Tgi, Transformers, Exllama, Gptqmodel], Each(|_, m| multiple(m.inputs, 32, "inputs"))),
    // ExLlama's kernels, which TGI uses for 4 bits: output size % 32.
    Rule(&[Tgi, Exllama], Each(|_, m| multiple(m.outputs, 32, "outputs"))),
    // vLLM reads rules for single modules but fuses q/k/v, gate/up and experts.
    Rule(&[Vllm], Whole(fused)),
    // TGI `Weights.get_multi_weights_col` asserts equal g_idx of what it fuses.
    Rule(&[Tgi], Whole(fused_order)),
    // TGI, optimum and ExLlamaV2 take bits and group size from the whole model's settings.
    Rule(&[Tgi, Transformers, Exllama], Whole(mixed)),
    // optimum `GPTQQuantizer._replace_by_quant_layers` replaces linears of the blocks only.
    Rule(
        &[Transformers],
        Whole(|f| {
            f.quantized_head.then(|| {
                "the head is quantized; it looks for packed weights in the blocks only".into()
            })
        }),
    ),
    // GPTQModel `looper/module_looper.py` and loader: no quantized head with tied embeddings.
    Rule(
        &[Gptqmodel],
        Whole(|f| {
            (f.quantized_head && f.tied)
                .then(|| "the head is quantized and tied to the embedding".into())
        }),
    ),
    // GPTQModel's kernels use g_idx as it is.
    Rule(
        &[Transformers, Gptqmodel],
        Each(|_, m| {
            m.g_idx
                .is_some_and(|g| g.unset)
                .then(|| "`g_idx` is all zeros, which it takes literally".into())
        }),
    ),
    // optimum and GPTQModel register g_idx as a buffer of the module.
    Rule(
        &[Transformers, Gptqmodel],
        Each(|_, m| m.g_idx.is_none().then(|| "`g_idx` is missing".into())),
    ),
];

/// The verdicts for a checkpoint that cannot be opened at all.
pub(super) fn none_open() -> Vec<Verdict> {
    let reasons = vec!["the checkpoint has errors".to_owned()];
    let verdict =
        |engine| Verdict { engine, opens: false, reasons: reasons.clone(), conditions: Vec::new() };
    Engine::ALL.map(verdict).into()
}

/// The verdicts for an AutoAWQ checkpoint, which all but one know by its method.
fn judge_awq(facts: &Facts<'_>) -> Vec<Verdict> {
    let verdict = |engine| {
        let mut reasons = Vec::new();
        if facts.broken {
            reasons.push("the checkpoint has errors".to_owned());
        }
        match engine {
            // ExLlamaV2's `linear.py` knows GPTQ, EXL2 and floats.
            Exllama => reasons.push("it reads no AWQ; `gptq convert --to gptq`".to_owned()),
            // They look for `quantization_config`; AutoAWQ's first versions had a file of their own.
            Transformers | Tgi | Vllm => reasons.extend(no_config(facts)),
            Gptqmodel => {}
        }
        Verdict { engine, opens: reasons.is_empty(), reasons, conditions: Vec::new() }
    };
    Engine::ALL.map(verdict).into()
}

pub(super) fn judge(facts: &Facts<'_>) -> Vec<Verdict> {
    if facts.config.format == CheckpointFormat::AwqGemm {
        return judge_awq(facts);
    }
    let verdict = |engine| {
        let rules = RULES.iter().filter(|Rule(engines, _)| engines.contains(&engine));
        let (mut reasons, mut conditions) = (Vec::new(), Vec::new());
        if facts.broken {
            reasons.push("the checkpoint has errors".to_owned());
        }
        for Rule(_, check) in rules {
            let list = if matches!(check, Condition(_)) { &mut conditions } else { &mut reasons };
            list.extend(apply(facts, check));
        }
        let opens = reasons.is_empty();
        if !opens {
            conditions.clear();
        }
        Verdict { engine, opens, reasons, conditions }
    };
    Engine::ALL.map(verdict).into()
}

fn apply(facts: &Facts<'_>, check: &Check) -> Option<String> {
    match check {
        Whole(check) | Condition(check) => check(facts),
        Each(check) => {
            let mut failing =
                facts.modules.iter().filter_map(|m| Some((&m.name, check(facts, m)?)));
            let (first, reason) = failing.next()?;
            Some(match (failing.count(), facts.modules.len()) {
                (more, all) if more + 1 == all => reason,
                (0, _) => format!("{reason} ({first})"),
                (more, _) => format!("{reason} ({first} and {more} more)"),
            })
        }
    }
}

fn v1(facts: &Facts<'_>) -> bool {
    facts.config.format == CheckpointFormat::Gptq
}

fn no_config(facts: &Facts<'_>) -> Option<String> {
    facts.in_config_json.is_none().then(|| "config.json has no `quantization_config`".into())
}

fn lacks(facts: &Facts<'_>, key: &str) -> Option<String> {
    let config = facts.in_config_json?;
    let absent = config.get(key).is_none_or(serde_json::Value::is_null);
    absent.then(|| format!("`quantization_config` has no `{key}`"))
}

fn bits(module: &Module, known: &[Bits]) -> Option<String> {
    let bits = module.settings.bits;
    (!known.contains(&bits)).then(|| {
        let known: Vec<String> = known.iter().map(Bits::to_string).collect();
        format!("{bits} bits; it reads {}", known.join(", "))
    })
}

fn true_zero(module: &Module) -> Option<String> {
    (module.zeros.at_zero > 0).then(|| {
        format!("it reads zero points of 0 as {}", u32::from(module.settings.bits.max_code()) + 1)
    })
}

fn multiple(count: usize, of: usize, axis: &str) -> Option<String> {
    (!count.is_multiple_of(of)).then(|| format!("{count} {axis} are no multiple of {of}"))
}

/// The first module that vLLM's Marlin kernel does not take, and why.
fn beyond_marlin<'a>(facts: &'a Facts<'_>) -> Option<(&'a Module, String)> {
    facts.modules.iter().enumerate().find_map(|(index, module)| {
        let group = facts.fused.iter().find(|group| group.fuses && group.members.contains(&index));
        let outputs = group.map_or(module.outputs, |group| group.outputs);
        let refused =
            multiple(module.inputs, 128, "inputs").or_else(|| multiple(outputs, 64, "outputs"))?;
        Some((module, format!("{refused} ({})", group.map_or(&module.name, |group| &group.name))))
    })
}

fn no_kernel(facts: &Facts<'_>) -> Option<String> {
    let (module, refused) = beyond_marlin(facts)?;
    let channelwise = module.settings.group_size <= 0;
    channelwise.then(|| format!("{refused}, and its other kernel needs a group size"))
}

fn needs_float16(facts: &Facts<'_>) -> Option<String> {
    let (_, refused) = beyond_marlin(facts)?;
    facts.bf16.then(|| format!("--dtype float16, since {refused}"))
}

fn needs_float_activations(facts: &Facts<'_>) -> Option<String> {
    let negative = facts.modules.iter().any(|module| module.negative_scales);
    negative
        .then(|| "VLLM_MARLIN_INPUT_DTYPE unset or fp8, since int8 misreads negative scales".into())
}

fn fused(facts: &Facts<'_>) -> Option<String> {
    match facts.fused.iter().find(|group| !group.uniform) {
        Some(group) => {
            Some(format!("it fuses linears that are quantized differently ({})", group.name))
        }
        None => fused_order(facts),
    }
}

fn fused_order(facts: &Facts<'_>) -> Option<String> {
    let group = facts.fused.iter().find(|group| !group.same_order)?;
    Some(format!("it fuses linears with different `g_idx` ({})", group.name))
}

fn mixed(facts: &Facts<'_>) -> Option<String> {
    let config = facts.config;
    let differs =
        |m: &&Module| m.settings.bits != config.bits || m.settings.group_size != config.group_size;
    let first = facts.modules.iter().find(differs)?;
    Some(format!(
        "it ignores `dynamic`, by which {} has {} bits and group size {}",
        first.name, first.settings.bits, first.settings.group_size
    ))
}
