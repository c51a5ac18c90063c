//! One quantized linear: dtypes and shapes, group indices, scales.

use gptq_format::awq::unpack;
use gptq_format::pack::decode_zeros;
use gptq_format::quantize_config::group_len;
use gptq_format::{
    Bits, Checkpoint, CheckpointFormat, DType, ModuleSettings, QuantizeConfig, TensorStore,
};

use super::finding::Findings;
use super::model::Layout;
use super::zeros::Zeros;
use crate::modules;
use crate::stats::each_chunk;

/// A quantized linear whose tensors fit each other.
#[derive(Debug)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) settings: ModuleSettings,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) groups: usize,
    /// Group of each input as stored; `None` where there is no `g_idx`.
    pub(super) g_idx: Option<GroupIndex>,
    pub(super) zeros: Zeros,
    /// A scale is below zero.
    pub(super) negative_scales: bool,
}

/// What is to know of a `g_idx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GroupIndex {
    /// It is `k / group_size`.
    pub(super) in_order: bool,
    /// It is zero everywhere though there are several groups.
    pub(super) unset: bool,
    /// FNV-1a hash of all indices, to compare modules.
    pub(super) hash: u64,
}

impl Module {
    /// Inputs per group.
    pub(super) fn group_len(&self) -> usize {
        self.settings.group_len(self.inputs)
    }

    /// The last group is shorter than the others.
    pub(super) fn ragged(&self) -> bool {
        !self.inputs.is_multiple_of(self.group_len())
    }
}

/// Reads every module that has a `qweight` or should have one.
pub(super) fn read_all(
    checkpoint: &Checkpoint,
    config: &QuantizeConfig,
    layout: &Layout,
    findings: &mut Findings,
) -> Vec<Module> {
    let store = &checkpoint.tensors;
    for linear in &layout.linears {
        let has = |part: &str| store.contains(&format!("{}.{part}", linear.module));
        match (has("weight"), has("qweight")) {
            (false, false) => findings.error(
                "missing-tensor",
                Some(&linear.module),
                "it has neither packed nor float weights",
                Some("download the checkpoint again, or quantize the original model again"),
            ),
            (true, true) => findings.error(
                "both",
                Some(&linear.module),
                "it has packed and float weights; engines read one or the other",
                Some("delete the one that is not meant"),
            ),
            _ => {}
        }
    }
    let names = modules::quantized(checkpoint, &layout.linears);
    names.iter().filter_map(|name| read(store, config, layout, name, findings)).collect()
}

fn read(
    store: &TensorStore,
    config: &QuantizeConfig,
    layout: &Layout,
    name: &str,
    findings: &mut Findings,
) -> Option<Module> {
    let Some(settings) = config.settings_for(name) else {
        findings.error(
            "skipped-but-quantized",
            Some(name),
            "a rule of `dynamic` leaves it unquantized, but it has packed weights",
            Some("correct the rule"),
        );
        return None;
    };
    let awq = config.format == CheckpointFormat::AwqGemm;
    let (inputs, outputs) = if awq {
        sizes_of_awq(store, &settings, layout, name, findings)?
    } else {
        sizes(store, settings.bits, layout, name, findings)?
    };
    let groups = inputs.div_ceil(group_len(settings.group_size, inputs));
    let module = format!("{name}.");
    let complete = [
        ("qzeros", DType::I32, vec![groups, settings.bits.words(outputs)?]),
        ("scales", DType::F16, vec![groups, outputs]),
    ]
    .iter()
    .map(|(part, dtype, shape)| tensor(store, &format!("{module}{part}"), *dtype, shape, findings))
    .fold(true, |all, fits| all & fits);
    let g_idx =
        if awq { None } else { read_groups(store, &settings, name, [inputs, groups], findings) };
    check_bias(store, layout, name, outputs, findings);
    check_codes(store, name, findings);
    if !complete {
        return None;
    }
    let signed = config.meta.get("signed_scales").is_some_and(|signed| *signed == true);
    let negative_scales = check_scales(store, name, [groups, outputs], signed, findings);
    let words = [groups, settings.bits.words(outputs)?];
    let stored: Vec<u32> = store
        .read_i32(&format!("{module}qzeros"), &words)
        .ok()?
        .into_iter()
        .map(i32::cast_unsigned)
        .collect();
    let decoded = if awq {
        unpack(&stored)
    } else {
        decode_zeros(settings.bits, config.format, &stored, groups, outputs).ok()?
    };
    let zeros = Zeros::of(settings.bits, &stored, &decoded, outputs);
    let name = name.to_owned();
    Some(Module { name, settings, inputs, outputs, groups, g_idx, zeros, negative_scales })
}

/// `(in, out)` of a module in AutoAWQ's layout, `qweight: [in, out / 8]`.
fn sizes_of_awq(
    store: &TensorStore,
    settings: &ModuleSettings,
    layout: &Layout,
    name: &str,
    findings: &mut Findings,
) -> Option<(usize, usize)> {
    let qweight = format!("{name}.qweight");
    let mut wrong = |what: &'static str, message: String| {
        findings.error(what, Some(&qweight), message, None);
        None
    };
    let info = store.info(&qweight).ok()?;
    if info.dtype != DType::I32 {
        return wrong("dtype", format!("its dtype is {}, expected I32", info.dtype));
    }
    let shape = match info.shape.as_slice() {
        &[inputs, columns] if inputs > 0 && columns > 0 => {
            columns.checked_mul(8).map(|o| (inputs, o))
        }
        _ => None,
    };
    let linear = layout.linear(name).map(|linear| (linear.in_features, linear.out_features));
    let Some((inputs, outputs)) = shape.filter(|shape| linear.is_none_or(|l| l == *shape)) else {
        let expected = linear.map_or_else(
            || "[in, out / 8]".to_owned(),
            |(inputs, outputs)| format!("[{inputs}, {outputs} / 8]"),
        );
        return wrong("shape", format!("its shape is {:?}, expected {expected}", info.shape));
    };
    if !inputs.is_multiple_of(settings.group_len(inputs)) || !inputs.is_multiple_of(8) {
        let message = format!("its {inputs} inputs are no multiple of 8 and of the group size");
        return wrong("shape", message);
    }
    Some((inputs, outputs))
}

/// `(in, out)` from `qweight` and, where the model is known, from its config.
fn sizes(
    store: &TensorStore,
    bits: Bits,
    layout: &Layout,
    name: &str,
    findings: &mut Findings,
) -> Option<(usize, usize)> {
    let qweight = format!("{name}.qweight");
    let info = store.info(&qweight).ok()?;
    if info.dtype != DType::I32 {
        findings.error(
            "dtype",
            Some(&qweight),
            format!("its dtype is {}, expected I32", info.dtype),
            None,
        );
    }
    let shape = match layout.linear(name) {
        Some(linear) => Some((linear.in_features, linear.out_features)),
        None => match info.shape.as_slice() {
            &[rows, outputs] => bits.codes(rows).map(|inputs| (inputs, outputs)),
            _ => None,
        },
    };
    let expected = shape
        .and_then(|(inputs, outputs)| Some((bits.words(inputs)?, bits.words(outputs)?, outputs)))
        .filter(|(rows, words, _)| *rows > 0 && *words > 0);
    match (expected, shape) {
        (Some((rows, _, outputs)), shape) if info.shape == [rows, outputs] => {
            if info.dtype == DType::I32 { shape } else { None }
        }
        (Some((rows, _, outputs)), Some((inputs, _))) => {
            let made_for = Bits::ALL.into_iter().find(|other| {
                *other != bits && other.words(inputs).is_some_and(|w| info.shape == [w, outputs])
            });
            let seems =
                made_for.map(|b| format!(", as {b}-bit codes would have")).unwrap_or_default();
            findings.error(
                "shape",
                Some(&qweight),
                format!(
                    "its shape is {:?}{seems}, expected [{rows}, {outputs}] for {inputs} inputs and {outputs} outputs at {bits} \
                     bits",
                    info.shape
                ),
                Some("compare `bits` and `dynamic` in the settings with what the checkpoint was made with"),
            );
            None
        }
        _ => {
            findings.error(
                "shape",
                Some(&qweight),
                format!("its shape {:?} cannot hold {bits}-bit codes of a linear", info.shape),
                Some("compare `bits` and `dynamic` in the settings with what the checkpoint was made with"),
            );
            None
        }
    }
}

/// Whether a tensor is there with its dtype (any float will do for F16) and shape.
fn tensor(
    store: &TensorStore,
    name: &str,
    dtype: DType,
    shape: &[usize],
    findings: &mut Findings,
) -> bool {
    let Ok(info) = store.info(name) else {
        findings.error("missing-tensor", Some(name), "it is missing", None);
        return false;
    };
    if info.shape != shape {
        findings.error(
            "shape",
            Some(name),
            format!("its shape is {:?}, expected {shape:?}", info.shape),
            Some("compare `group_size` and `dynamic` in the settings with what the checkpoint was made with"),
        );
        return false;
    }
    let rounds = dtype == DType::F16 && matches!(info.dtype, DType::F32 | DType::BF16);
    if rounds {
        let message = format!("its dtype is {}; readers round it to F16", info.dtype);
        findings.note("dtype", Some(name), message, None);
    } else if info.dtype != dtype {
        let message = format!("its dtype is {}, expected {dtype}", info.dtype);
        findings.error("dtype", Some(name), message, None);
        return false;
    }
    true
}

fn read_groups(
    store: &TensorStore,
    settings: &ModuleSettings,
    name: &str,
    [inputs, groups]: [usize; 2],
    findings: &mut Findings,
) -> Option<GroupIndex> {
    let tensor_name = format!("{name}.g_idx");
    if !store.contains(&tensor_name) {
        let message = "it is missing; readers that need it refuse, others take k / group_size";
        if settings.desc_act && groups > 1 {
            findings.error(
                "g-idx-missing",
                Some(&tensor_name),
                "it is missing, and `desc_act` needs it",
                None,
            );
        } else {
            findings.warning(
                "g-idx-missing",
                Some(&tensor_name),
                message,
                Some("`gptq convert` writes it"),
            );
        }
        return None;
    }
    if !tensor(store, &tensor_name, DType::I32, &[inputs], findings) {
        return None;
    }
    let g_idx = store.read_i32(&tensor_name, &[inputs]).ok()?;
    if let Some(k) = g_idx.iter().position(|&g| g < 0 || g as usize >= groups) {
        findings.error(
            "g-idx-range",
            Some(&tensor_name),
            format!("input {k} is in group {}, but there are {groups} groups", g_idx[k]),
            Some("compare `group_size` in the settings with what the checkpoint was made with"),
        );
        return None;
    }
    let per_group = settings.group_len(inputs);
    let in_order = g_idx.iter().enumerate().all(|(k, &g)| g as usize == k / per_group);
    let unset = groups > 1 && g_idx.iter().all(|&g| g == 0);
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in g_idx.iter().flat_map(|g| g.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    }
    let found = GroupIndex { in_order, unset, hash };
    if unset {
        findings.warning(
            "g-idx-zero",
            Some(&tensor_name),
            "it is all zeros though there are several groups: ExLlama and TGI take that as k / group_size, GPTQModel as \
             one group",
            Some("`gptq convert` writes k / group_size"),
        );
    } else if !in_order && !settings.desc_act {
        let k = g_idx.iter().enumerate().position(|(k, &g)| g as usize != k / per_group);
        let k = k.unwrap_or_default();
        findings.error(
            "g-idx-order",
            Some(&tensor_name),
            format!(
                "input {k} is in group {} instead of {}, but `desc_act` is false: engines that trust it ignore `g_idx`",
                g_idx[k],
                k / per_group
            ),
            Some("set `desc_act` to true in both configs if the checkpoint was made with activation order"),
        );
    } else if !in_order {
        let mut counts = vec![0usize; groups];
        for &g in &g_idx {
            counts[g as usize] += 1;
        }
        let size = |group: usize| per_group.min(inputs - group * per_group);
        if let Some(group) = (0..groups).find(|&group| counts[group] != size(group)) {
            findings.error(
                "g-idx-groups",
                Some(&tensor_name),
                format!(
                    "group {group} has {} inputs, expected {}: the groups are no permutation of the inputs",
                    counts[group],
                    size(group)
                ),
                None,
            );
        }
    }
    Some(found)
}

fn check_bias(
    store: &TensorStore,
    layout: &Layout,
    name: &str,
    outputs: usize,
    findings: &mut Findings,
) {
    let tensor_name = format!("{name}.bias");
    let expected = layout.linear(name).map(|linear| linear.bias);
    if !store.contains(&tensor_name) {
        if expected == Some(true) {
            findings.error("missing-tensor", Some(&tensor_name), "it is missing", None);
        }
        return;
    }
    if !tensor(store, &tensor_name, DType::F16, &[outputs], findings) || expected != Some(false) {
        return;
    }
    // Old quantizers wrote zeros for every linear.
    let zero = store.read_f32(&tensor_name, &[outputs]).is_ok_and(|b| b.iter().all(|&b| b == 0.0));
    if !zero {
        findings.error(
            "unexpected-tensor",
            Some(&tensor_name),
            "it is not zero, but the model has no such bias",
            Some("compare config.json with the model that the checkpoint was made from"),
        );
    }
}

/// Codes are valid whatever their bits; all zeros are what a writer leaves that did not finish.
fn check_codes(store: &TensorStore, name: &str, findings: &mut Findings) {
    let tensor_name = format!("{name}.qweight");
    let Ok(info) = store.info(&tensor_name) else { return };
    let mut piece = vec![0u8; info.bytes.min(1 << 16)];
    let mut at = 0;
    while at < info.bytes {
        let len = piece.len().min(info.bytes - at);
        if store.copy_stored(&tensor_name, at, &mut piece[..len]).is_err()
            || piece[..len].iter().any(|&byte| byte != 0)
        {
            return;
        }
        at += len;
    }
    findings.error(
        "weights-unwritten",
        Some(&tensor_name),
        "all its codes are zero; the file was probably not written or downloaded to its end",
        Some("download the checkpoint again, or quantize the original model again"),
    );
}

/// Whether a scale is below zero. `signed`: the checkpoint says that they may be.
fn check_scales(
    store: &TensorStore,
    name: &str,
    [groups, outputs]: [usize; 2],
    signed: bool,
    findings: &mut Findings,
) -> bool {
    // The smallest normal f16.
    const NORMAL: f64 = 6.103515625e-5;
    let tensor_name = format!("{name}.scales");
    let [mut bad, mut zero, mut negative, mut subnormal] = [0u64; 4];
    let mut first = None;
    let mut index = 0usize;
    let read = each_chunk(store, &tensor_name, |values| {
        for &x in values {
            if !x.is_finite() {
                bad += 1;
                first = first.or(Some((index, x)));
            } else if x == 0.0 {
                zero += 1;
            } else {
                negative += u64::from(x < 0.0);
                subnormal += u64::from(x.abs() < NORMAL);
            }
            index += 1;
        }
    });
    if let Err(error) = read {
        findings.error("model-tensor", Some(&tensor_name), error.to_string(), None);
        return false;
    }
    let total = groups * outputs;
    if let Some((index, value)) = first {
        findings.error(
            "scale-not-finite",
            Some(&tensor_name),
            format!(
                "{bad} of {total} scales are NaN or infinite, the first ({value}) for group {}, output {}",
                index / outputs,
                index % outputs
            ),
            Some("quantize the original model again, with more damping or more calibration data"),
        );
    }
    if zero > 0 && zero == total as u64 {
        findings.error(
            "weights-unwritten",
            Some(&tensor_name),
            "all its scales are zero; the file was probably not written or downloaded to its end",
            Some("download the checkpoint again, or quantize the original model again"),
        );
    } else if zero > 0 {
        findings.warning(
            "scale-zero",
            Some(&tensor_name),
            format!("{zero} of {total} scales are zero, so that all weights of these groups are"),
            None,
        );
    }
    if negative > 0 && !signed {
        let message = format!("{negative} of {total} scales are negative, which few tools write");
        findings.note("scale-negative", Some(&tensor_name), message, None);
    }
    if subnormal > 0 {
        findings.note(
            "scale-subnormal",
            Some(&tensor_name),
            format!("{subnormal} of {total} scales are below 6.1e-5, where f16 loses precision"),
            None,
        );
    }
    negative > 0
}
