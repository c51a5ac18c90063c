//! Zero points: the two conventions, and what tools have made of them.

use gptq_format::{Bits, CheckpointFormat, QuantizeConfig};

use super::finding::Findings;
use super::module::Module;

/// What is to know of the zero points of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Zeros {
    /// The one true zero point, if all are equal.
    pub(super) constant: Option<u8>,
    /// How many true zero points are 0.
    pub(super) at_zero: usize,
    /// Group and output of the first of them.
    first: Option<(usize, usize)>,
    /// The words are those that GPTQModel before 7.0 made of symmetric 3-bit zero points.
    pub(super) damaged: bool,
}

/// Three words of 32 symmetric 3-bit zero points (4) as GPTQModel before 7.0 wrote them for the format `gptq`: it subtracted
/// the constants 0x24924924, 0x92492492 and 0x49249249 from whole words, in which the ones do not stand at the lowest bit
/// of every field. Source: `utils/model.py` of GPTQModel 1 to 6, `convert_gptq_v2_to_v1_format_module`; readers of 7.0 and
/// later, like all others, add 1 to each field.
const DAMAGED: [u32; 3] = damage([0x2492_4924, 0x4924_9249, 0x9249_2492]);

/// `zeros` as packed for `gptq_v2`, less the constants.
const fn damage(zeros: [u32; 3]) -> [u32; 3] {
    [
        zeros[0].wrapping_sub(0x2492_4924),
        zeros[1].wrapping_sub(0x9249_2492),
        zeros[2].wrapping_sub(0x4924_9249),
    ]
}

impl Zeros {
    /// `stored` are the words of `qzeros`, `decoded` the true zero points `[groups, outputs]`.
    pub(super) fn of(bits: Bits, stored: &[u32], decoded: &[u8], outputs: usize) -> Self {
        let same = decoded.windows(2).all(|pair| pair[0] == pair[1]);
        let first = decoded.iter().position(|&zero| zero == 0);
        Self {
            constant: decoded.first().copied().filter(|_| same),
            at_zero: decoded.iter().map(|&zero| usize::from(zero == 0)).sum(),
            first: first.map(|index| (index / outputs, index % outputs)),
            damaged: bits == Bits::B3
                && !stored.is_empty()
                && stored.chunks(3).all(|words| words == DAMAGED),
        }
    }
}

pub(super) fn check(config: &QuantizeConfig, modules: &[Module], findings: &mut Findings) {
    let v1 = config.format == CheckpointFormat::Gptq;
    let old = gptqmodel_version(config).is_some_and(|version| version < (7, 0));
    for module in modules {
        let (name, bits, zeros) = (module.name.as_str(), module.settings.bits, &module.zeros);
        let middle = 1u8 << (bits.as_u32() - 1);
        if v1 && zeros.damaged {
            findings.error(
                "gptqmodel-3-bit",
                Some(name),
                "its zero points are those that GPTQModel before 7.0 wrote for 3 bits, which no other reader understands",
                Some("quantize the original model again"),
            );
            continue;
        }
        if v1 && old && bits == Bits::B3 && !module.settings.sym {
            findings.warning(
                "gptqmodel-3-bit",
                Some(name),
                "GPTQModel before 7.0 wrote wrong zero points for 3 bits; with sym false it cannot be told whether these are",
                Some("quantize the original model again"),
            );
        }
        if v1 && let Some((group, output)) = zeros.first {
            findings.warning(
                "zero-point-zero",
                Some(name),
                format!(
                    "{} zero points are 0 (first: group {group}, output {output}), stored as all ones: GPTQModel reads 0, \
                     AutoGPTQ, TGI and ExLlama read {}",
                    zeros.at_zero,
                    u32::from(bits.max_code()) + 1
                ),
                Some("`gptq convert --to gptq_v2`"),
            );
        }
        if !module.settings.sym || zeros.constant == Some(middle) {
            continue;
        }
        let mislabelled = match config.format {
            CheckpointFormat::Gptq => zeros.constant == Some((middle + 1) & bits.max_code()),
            CheckpointFormat::GptqV2 => zeros.constant == Some(middle - 1),
            CheckpointFormat::AwqGemm => false,
        };
        if mislabelled {
            let (says, is) = if v1 { ("gptq", "gptq_v2") } else { ("gptq_v2", "gptq") };
            findings.error(
                "zero-point-label",
                Some(name),
                format!(
                    "its symmetric zero points are stored as in `{is}`, but the settings say `{says}`: readers are off by one \
                     step of the scale"
                ),
                Some("correct `checkpoint_format` and `format` in both configs"),
            );
        } else {
            findings.error(
                "zero-points-vary",
                Some(name),
                match zeros.constant {
                    Some(zero) => format!("its zero points are {zero}, but with sym true they have to be {middle}"),
                    None => format!(
                        "its zero points differ, but with sym true all have to be {middle}: engines that trust `sym` read \
                         other weights than those that read `qzeros`"
                    ),
                },
                Some("set `sym` to false in both configs if the checkpoint was made so"),
            );
        }
    }
}

/// Version of the GPTQModel that wrote the checkpoint, if it was one.
pub(super) fn gptqmodel_version(config: &QuantizeConfig) -> Option<(u32, u32)> {
    let quantizer = config.meta.get("quantizer")?;
    let tools = match quantizer.as_array() {
        Some(tools) => tools.iter().collect(),
        None => vec![quantizer],
    };
    tools.into_iter().filter_map(|tool| tool.as_str()).find_map(|tool| {
        let version = tool.strip_prefix("gptqmodel:")?;
        let mut parts = version.split('.').map(|part| part.parse().ok());
        Some((parts.next()??, parts.next().flatten().unwrap_or(0)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use gptq_format::pack::{pack_cols, unpack_cols};
    use serde_json::json;

    #[test]
    fn the_damage_is_that_of_symmetric_zero_points() {
        let packed = pack_cols(Bits::B3, &[4; 32], 1, 32).unwrap();
        assert_eq!(damage([packed[0], packed[1], packed[2]]), DAMAGED);
        let fields = unpack_cols(Bits::B3, &DAMAGED, 1, 32).unwrap();
        // Right by luck from field 11 to 21 only.
        assert!(fields[11..22].iter().all(|&field| field == 3));
        assert!(fields[..10].iter().all(|&field| field == 0));
        assert!(fields[22..].iter().all(|&field| field == 2));
    }

    #[test]
    fn versions_are_read() {
        let version = |value: serde_json::Value| {
            let mut config =
                QuantizeConfig::new(Bits::B4, 128, true, false, CheckpointFormat::Gptq);
            config.meta.insert("quantizer".into(), value);
            gptqmodel_version(&config)
        };
        assert_eq!(version(json!(["gptqmodel:6.0.3"])), Some((6, 0)));
        assert_eq!(version(json!("gptqmodel:7.7")), Some((7, 7)));
        assert_eq!(version(json!(["optimum:1.2", "gptqmodel:0.9.11-dev"])), Some((0, 9)));
        assert_eq!(version(json!(["gptq-rs:0.1.0"])), None);
    }
}
