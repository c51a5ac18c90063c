//! Chosen bits as rules of `dynamic`, which engines read.

use std::collections::BTreeMap;
use std::fmt::Write;

use gptq_format::Bits;
use gptq_model::Spec;
use serde_json::{Map, Value, json};

use super::groups::{Family, Group};

/// The width of most weights; of equally many the smaller.
pub(super) fn most_common(groups: &[Group], widths: &[Bits]) -> Option<Bits> {
    let mut counts: BTreeMap<u32, (u64, Bits)> = BTreeMap::new();
    for (group, &bits) in groups.iter().zip(widths) {
        counts.entry(bits.as_u32()).or_insert((0, bits)).0 += group.weights;
    }
    // The later of equal maxima is taken: the smaller width comes last.
    counts.into_values().rev().max_by_key(|(weights, _)| *weights).map(|(_, bits)| bits)
}

/// `given`, followed by a rule for each kind of group and each width but `base`.
pub(super) fn rules(
    spec: &Spec,
    groups: &[Group],
    widths: &[Bits],
    base: Bits,
    given: &Map<String, Value>,
) -> Map<String, Value> {
    let mut kinds: Vec<(Family, u32, Vec<&Group>)> = Vec::new();
    for (group, &bits) in groups.iter().zip(widths).filter(|(_, bits)| **bits != base) {
        let bits = bits.as_u32();
        match kinds.iter_mut().find(|(family, b, members)| {
            *family == group.family && *b == bits && members[0].names == group.names
        }) {
            Some((.., members)) => members.push(group),
            None => kinds.push((group.family, bits, vec![group])),
        }
    }
    let mut rules = given.clone();
    for (family, bits, members) in kinds {
        rules.insert(pattern(spec, family, &members), json!({ "bits": bits }));
    }
    rules
}

/// A pattern for the linears of some groups of the same kind, and for what engines call them after
/// fusing them.
fn pattern(spec: &Spec, family: Family, groups: &[&Group]) -> String {
    let layers: Vec<String> = groups.iter().map(|group| group.layer.to_string()).collect();
    let first = spec.block_name(groups[0].layer);
    let stem = first.rsplit_once('.').map_or(first.as_str(), |(stem, _)| stem);
    let mut text = format!("+:{}\\.{}\\.", escape(stem), any(&layers));
    let names = &groups[0].names;
    if family == Family::Experts {
        // Engines that fuse experts ask for what holds them. Writing to a string cannot fail.
        let holders = any(&names.iter().map(|n| escape(n)).collect::<Vec<_>>());
        let _ = write!(text, "{holders}(?:\\.|$)");
        return text;
    }
    // Siblings have the same parent; engines put the fused linear beside them.
    let parent = names[0].rsplit_once('.').map_or("", |(parent, _)| parent);
    let inside =
        |name: &String| escape(name.strip_prefix(parent).unwrap_or(name).trim_start_matches('.'));
    let mut inner: Vec<String> = names.iter().map(inside).collect();
    let fused = match family {
        Family::Qkv => "qkv_proj",
        Family::Up | Family::SharedUp => "gate_up_proj",
        _ => "",
    };
    if inner.len() > 1 && !fused.is_empty() {
        inner.push(fused.to_owned());
    }
    if !parent.is_empty() {
        let _ = write!(text, "{}\\.", escape(parent));
    }
    text + &any(&inner) + "$"
}

fn any(parts: &[String]) -> String {
    if let [one] = parts { one.clone() } else { format!("(?:{})", parts.join("|")) }
}

fn escape(name: &str) -> String {
    name.replace('.', "\\.")
}

#[cfg(test)]
mod tests {
    use gptq_format::dynamic::Decision;
    use gptq_format::{Checkpoint, Dynamic};
    use gptq_testkit::TinyLlama;

    use super::*;

    #[test]
    fn rules_name_their_groups_and_what_engines_fuse_them_to() {
        let folder = tempfile::tempdir().unwrap();
        TinyLlama { layers: 12, ..TinyLlama::default() }.write(folder.path(), 1);
        let spec = Spec::for_checkpoint(&Checkpoint::open(folder.path()).unwrap()).unwrap();
        let kinds: [(Family, &[&str]); 4] = [
            (Family::Qkv, &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
            (Family::Out, &["self_attn.o_proj"]),
            (Family::Up, &["mlp.gate_proj", "mlp.up_proj"]),
            (Family::Down, &["mlp.down_proj"]),
        ];
        let (mut groups, mut widths) = (Vec::new(), Vec::new());
        for layer in 0..12 {
            for (index, (family, names)) in kinds.into_iter().enumerate() {
                let mut group = Group::new(layer, family);
                group.names = names.iter().map(|&name| name.to_owned()).collect();
                groups.push(group);
                widths.push([Bits::B4, Bits::B2, Bits::B8, Bits::B3][(layer + index * layer) % 4]);
            }
        }
        let dynamic = rules(&spec, &groups, &widths, Bits::B4, &Map::new());
        let dynamic = Dynamic::from_map(&dynamic).unwrap();
        for (group, &bits) in groups.iter().zip(&widths) {
            let fused: &[&str] = match group.family {
                Family::Qkv => &["self_attn.qkv_proj"],
                Family::Up => &["mlp.gate_up_proj"],
                _ => &[],
            };
            for name in group.names.iter().map(String::as_str).chain(fused.iter().copied()) {
                let module = format!("model.layers.{}.{name}", group.layer);
                let decided = match dynamic.decide(&module) {
                    Decision::Default => Some(Bits::B4),
                    Decision::Override(overrides) => overrides.bits,
                    Decision::Skip => None,
                };
                assert_eq!(decided, Some(bits), "{module}");
            }
        }
        assert_eq!(dynamic.decide("lm_head"), Decision::Default);
    }

    #[test]
    fn rules_of_experts_name_what_holds_them() {
        let folder = tempfile::tempdir().unwrap();
        TinyLlama { layers: 12, ..TinyLlama::default() }.write(folder.path(), 1);
        let spec = Spec::for_checkpoint(&Checkpoint::open(folder.path()).unwrap()).unwrap();
        let groups: Vec<Group> = (0..12)
            .map(|layer| {
                let mut group = Group::new(layer, Family::Experts);
                group.names = vec!["mlp.experts".to_owned()];
                group
            })
            .collect();
        let widths: Vec<Bits> = (0..12).map(|i| [Bits::B4, Bits::B3][i % 2]).collect();
        let dynamic = rules(&spec, &groups, &widths, Bits::B4, &Map::new());
        let dynamic = Dynamic::from_map(&dynamic).unwrap();
        for layer in 0..12 {
            for (name, chosen) in [("experts", true), ("experts.7.up_proj", true), ("gate", false)]
            {
                let decided = dynamic.decide(&format!("model.layers.{layer}.mlp.{name}"));
                let narrow = matches!(decided, Decision::Override(o) if o.bits == Some(Bits::B3));
                assert_eq!(narrow, chosen && layer % 2 == 1, "{layer} {name}");
            }
        }
    }
}
