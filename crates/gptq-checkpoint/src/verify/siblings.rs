//! Linears that engines fuse into one: q, k and v; gate and up; the experts of a block.

use std::collections::HashMap;

use gptq_model::LinearSpec;

use super::finding::Findings;
use super::model::Layout;
use super::module::Module;

/// Linears that some engines fuse.
#[derive(Debug)]
pub(super) struct Group {
    /// Their names, shortened to what differs: `model.layers.0.self_attn.{q,k,v}_proj`.
    pub(super) name: String,
    /// Outputs of all together.
    pub(super) outputs: usize,
    /// Indices of those that are quantized.
    pub(super) members: Vec<usize>,
    /// All are quantized in the same way, or none is.
    pub(super) uniform: bool,
    /// All have the same `g_idx`.
    pub(super) same_order: bool,
    /// They become one matrix; experts only one tensor.
    pub(super) fuses: bool,
}

/// Finds the groups and reports those that are not alike.
pub(super) fn check(layout: &Layout, modules: &[Module], findings: &mut Findings) -> Vec<Group> {
    let Some(spec) = &layout.spec else { return Vec::new() };
    let index: HashMap<&str, usize> =
        modules.iter().enumerate().map(|(at, module)| (module.name.as_str(), at)).collect();
    let mut groups = Vec::new();
    for layer in 0..spec.layer_count() {
        let mut experts = Vec::new();
        for stage in spec.stages(layer) {
            if stage.linears.len() > 1 {
                groups.push(group(
                    short_name(&stage.linears),
                    &stage.linears,
                    modules,
                    &index,
                    true,
                ));
            }
            if stage.stage.expert().is_some() {
                experts.extend(stage.linears);
            }
        }
        if !experts.is_empty() {
            let name = format!("the experts of {}", spec.block_name(layer));
            groups.push(group(name, &experts, modules, &index, false));
        }
    }
    for group in groups.iter().filter(|group| !group.uniform) {
        let settings: Vec<String> = group.members.iter().map(|&m| describe(&modules[m])).collect();
        let mut different = settings.clone();
        different.sort();
        different.dedup();
        findings.warning(
            "fused-settings",
            Some(&group.name),
            if different.len() > 1 {
                format!("they are quantized differently ({})", different.join("; "))
            } else {
                "only some of them are quantized".to_owned()
            },
            Some(
                "give them the same settings in `dynamic`: vLLM and TGI fuse them into one matrix",
            ),
        );
    }
    for group in groups.iter().filter(|group| group.uniform && !group.same_order) {
        findings.warning(
            "fused-order",
            Some(&group.name),
            "they have different `g_idx`",
            Some("quantize them with one activation order: vLLM and TGI fuse them into one matrix"),
        );
    }
    groups
}

fn group(
    name: String,
    linears: &[LinearSpec],
    modules: &[Module],
    index: &HashMap<&str, usize>,
    fuses: bool,
) -> Group {
    let members: Vec<usize> =
        linears.iter().filter_map(|linear| index.get(linear.module.as_str()).copied()).collect();
    let alike = |key: &dyn Fn(&Module) -> String| {
        members.windows(2).all(|pair| key(&modules[pair[0]]) == key(&modules[pair[1]]))
    };
    Group {
        outputs: linears.iter().fold(0, |sum, linear| sum.saturating_add(linear.out_features)),
        uniform: (members.is_empty() || members.len() == linears.len()) && alike(&describe),
        same_order: !fuses || alike(&|m| format!("{:?}", m.g_idx.map(|g| g.hash))),
        name,
        members,
        fuses,
    }
}

fn describe(module: &Module) -> String {
    let s = &module.settings;
    format!("{} bits, group {}, sym {}, desc_act {}", s.bits, s.group_size, s.sym, s.desc_act)
}

/// The common start and end of the names with what differs in braces.
fn short_name(linears: &[LinearSpec]) -> String {
    let names: Vec<&str> = linears.iter().map(|l| l.module.as_str()).collect();
    let Some((first, rest)) = names.split_first() else { return String::new() };
    let common = |a: &mut dyn Iterator<Item = (char, char)>| a.take_while(|(x, y)| x == y).count();
    let start =
        rest.iter().map(|name| common(&mut first.chars().zip(name.chars()))).min().unwrap_or(0);
    let end = rest
        .iter()
        .map(|name| common(&mut first.chars().rev().zip(name.chars().rev())))
        .min()
        .unwrap_or(0);
    let middle: Vec<String> = names
        .iter()
        .map(|name| {
            let count = name.chars().count();
            name.chars().skip(start).take(count.saturating_sub(start + end)).collect()
        })
        .collect();
    let head: String = first.chars().take(start).collect();
    let tail: String = first.chars().skip(first.chars().count().saturating_sub(end)).collect();
    format!("{head}{{{}}}{tail}", middle.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shortened_to_what_differs() {
        let linear = |module: &str| LinearSpec {
            name: String::new(),
            module: module.into(),
            out_features: 1,
            in_features: 1,
            bias: false,
            transposed: false,
        };
        let short =
            |names: &[&str]| short_name(&names.iter().map(|name| linear(name)).collect::<Vec<_>>());
        assert_eq!(short(&["a.0.q_proj", "a.0.k_proj", "a.0.v_proj"]), "a.0.{q,k,v}_proj");
        assert_eq!(short(&["m.gate_proj", "m.up_proj"]), "m.{gate,up}_proj");
        assert_eq!(short(&["m.w1", "m.w3"]), "m.w{1,3}");
    }
}
